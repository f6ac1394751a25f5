"""Uses a GPU for a given time: its tests, a local epoch's speed, then CIFAR-10 with ResNet-18 by `single`, `fedu` and `fedema`.

    python results/gpu.py --minutes 30 --out results/gpu
    python results/gpu.py --minutes 10 --out results/gpu fedu -- --rounds 10     one part, with options of fedu.py

All is made under runs/gpu. A check that has ended is not repeated, a run that was cut off continues after its last whole round, and one
that is finished gets its linear evaluation: several calls do what one long call does. Each call ends by copying to --out the logs, the
table, and of every run what a reader needs. Backbones are there in half precision, cut into pieces below 16 MiB:

    python results/pieces.py join results/gpu/fedu/backbone-0.pt.sha256 backbone.pt     {"encoder": name, "backbone": state_dict}
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from math import nan
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from report.tables import mean, read_evaluations, read_options
from results.pieces import split
from runtime.cli import InputError, Parser, number, user_errors, user_path, write_atomic
from runtime.run import interrupts_on_sigterm, read_metrics

ROOT, WORK = Path(__file__).parent.parent, Path("runs/gpu")
TESTS = [str(ROOT / f"tests/test_{name}.py") for name in ("ops", "gpu", "cuda")]
CHECKS = {  # a command, and the most seconds that it may take
    "tests": (["-m", "pytest", "-v", "-n", "4", "-k", "gpu or cuda", *TESTS], 120),
    "epoch": (["-m", "bench.training", "epoch", "--encoder", "resnet18", "--repeats", "3"], 180),
}
RUNS = ("single", "fedu", "fedema")
RECIPE = "--dataset cifar10 --encoder resnet18 --precision bf16 --batch-size 128 --local-epochs 5 --rounds 30"
KEPT = ("config.json", "metrics.jsonl", "eval.jsonl", "divergence.png")
GRACE, PACKING = 10, 20  # seconds: for a process to end when it is told to, and for what is copied to --out


def parse_options(argv: list[str]) -> dict:
    own = argv[: argv.index("--")] if "--" in argv else argv
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join((*CHECKS, *RUNS))}; options of fedu.py follow `--`  [all]")
    parser.add_argument("--minutes", type=number(float, 1), required=True, help="after which the command has ended")
    parser.add_argument("--out", type=user_path, required=True, help="folder for what is kept")
    given = {"parts": []} | vars(parser.parse_args(own))
    for part in given["parts"]:
        if part not in (*CHECKS, *RUNS):
            parser.error(f"got {part!r}, needs one of {', '.join((*CHECKS, *RUNS))}")
    return given | {"parts": given["parts"] or [*CHECKS, *RUNS], "options": argv[len(own) + 1 :]}


def main(parts: list[str], minutes: float, out: Path, options: list[str]) -> None:
    deadline = time.monotonic() + 60 * minutes - GRACE - PACKING
    WORK.mkdir(parents=True, exist_ok=True)
    failed = []
    try:
        with interrupts_on_sigterm():
            failed = [part for part in parts if (check(part, deadline) if part in CHECKS else train(part, options, deadline))]
    finally:
        collect(out)
    if failed:
        raise InputError(f"these did not end well, their logs in {out} say why: {', '.join(failed)}")


def check(name: str, deadline: float) -> bool:
    """Run tests or timings that have not been run yet; returns whether they failed."""
    log, (command, seconds) = WORK / f"{name}.log", CHECKS[name]
    done = log.exists() and "\n# ended" in log.read_text()
    return not done and bool(run(command, log, min(deadline, time.monotonic() + seconds)))


def train(method: str, options: list[str], deadline: float) -> bool:
    """Train and evaluate what is not done yet, as far as the time allows; returns whether anything failed."""
    folder, log, status = WORK / method, WORK / f"{method}.log", 0
    if not (folder / "encoder.pt").exists():
        begun = (folder / "config.json").exists()
        how = ["--resume", str(folder)] if begun else ["--method", method, *RECIPE.split(), "--out", str(folder)]
        status = run([str(ROOT / "fedu.py"), *how, *options], log, deadline)
    if status == 0 and "linear" not in read_evaluations(folder):
        status = run([str(ROOT / "eval.py"), "--linear", str(folder)], log, deadline)
    return bool(status)


def run(command: list[str], log: Path, deadline: float) -> int | None:
    """Run Python with this command, its output added to the log; returns its exit status, or None if it was not done in time."""
    if time.monotonic() >= deadline:
        return None
    print(title := f"$ {shlex.join(['python', *command])}".replace(f"{ROOT}/", ""), flush=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        print(title, file=file, flush=True)
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=env, start_new_session=True)
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.2)
        finally:
            end(process)
        how = "since its time was up" if status is None else f"with status {status}"
        print(f"# ended {how}, after {time.monotonic() - began:.0f} seconds", file=file)
    return status


def end(process: subprocess.Popen) -> None:
    """End a process and the processes that it started. A run that gets SIGTERM ends and keeps its last whole round."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def collect(out: Path) -> None:
    """Copy what a reader needs to a folder, and print the table."""
    table = "| run | rounds | seconds a round | kNN, last, % | linear, % |\n|---|---|---|---|---|\n"
    out.mkdir(parents=True, exist_ok=True)
    for log in WORK.glob("*.log"):
        shutil.copyfile(log, out / log.name)
    for folder in (WORK / name for name in RUNS if (WORK / name / "config.json").exists()):
        (out / folder.name).mkdir(exist_ok=True)
        for name in KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, out / folder.name / name)
        if (folder / "encoder.pt").exists():
            save_backbones(folder, out / folder.name)
        metrics, linear = read_metrics(folder), read_evaluations(folder).get("linear", nan)
        knn = [row["knn"] for row in metrics if row["knn"] is not None]
        numbers = mean([row["seconds"] for row in metrics]), 100 * mean(knn[-1:]), 100 * linear
        rounds = f"{len(metrics)} of {read_options(folder)['rounds']}"
        table += f"| {folder.name} | {rounds} | {' | '.join(f'{x:.2f}' for x in numbers)} |\n".replace("nan", "-")
    write_atomic(out / "table.md", lambda file: file.write(table.encode()))
    print(table, end="")


def save_backbones(folder: Path, out: Path) -> None:
    """Write the backbone of each of a run's encoders in half precision, as pieces of backbone-K.pt."""
    saved = torch.load(folder / "encoder.pt", map_location="cpu", weights_only=True)
    for k, state in enumerate(saved["encoders"]):
        half = {"encoder": saved["encoder"], "backbone": {name: tensor.half() for name, tensor in state["backbone"].items()}}
        whole = folder / f"backbone-{k}.pt"
        torch.save(half, whole)
        split(whole, out, mib=15)
        whole.unlink()


if __name__ == "__main__":
    with user_errors("gpu.py"):
        main(**parse_options(sys.argv[1:]))
