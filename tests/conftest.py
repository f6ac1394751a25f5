import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
import torch

import eval as evaluation
import fedu
from federation import build_networks
from methods.byol import BYOL
from models import Encoder, Objective
from options import Options, parse, parse_evaluation
from runtime.cli import user_errors

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start too, which other tests run beside


def heed() -> None:
    """For a child process: let an interrupt end it. Where the tests run in the background it would inherit that they ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    """A tiny data set: 64 training and 16 test images of 16x16 pixels in 4 classes, each class with a colour of its own."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    rng = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[:, None, None]
    arrays = {}
    for split, count in (("train", 64), ("test", 16)):
        labels = np.arange(count) % 4
        arrays[f"x_{split}"] = (0.6 * colours[labels] + 0.4 * rng.integers(0, 256, (count, 16, 16, 3))).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny(npz) -> list[str]:
    """Options of a run that ends within a second or two."""
    options = {"--dataset": npz, "--encoder": "small", "--clients": 2, "--rounds": 3, "--local-epochs": 1, "--batch-size": 8}
    return [str(x) for item in (options | {"--lr": 0.05, "--knn-every": 1, "--device": "cpu"}).items() for x in item]


@pytest.fixture(scope="session")
def command():
    def run(script: str, *arguments, cwd: Path, variables: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
        line = [sys.executable, str(ROOT / script), *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as in this process: sums over a batch depend on it in the last bit
        env |= variables or {}
        return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, env=env, **kwargs)

    return run


@pytest.fixture(scope="session")
def finished(tiny, command, tmp_path_factory) -> Path:
    """A folder in which runs/run is a finished FedU run on the tiny data set."""
    folder = tmp_path_factory.mktemp("finished")
    done = command("fedu.py", *tiny, "--out", "runs/run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "runs/run holds the run" in done.stdout
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the finished run as it was before its encoder was written."""
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt", "bank.bin"):
        (tmp_path / "run" / name).write_bytes((finished / "runs/run" / name).read_bytes())
    return tmp_path / "run"


def refused(done: subprocess.CompletedProcess, *words: str) -> bool:
    """One sentence on stderr that has all the words, and exit status 2."""
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} not in {done.stderr!r}"
    return True


@pytest.fixture
def refuses(capsys):
    """`refused` for a call in this process, which costs a thousandth of a process of its own."""

    def check(call: Callable[[], object], *words: str) -> bool:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, user_errors("command"):
            call()
        return refused(subprocess.CompletedProcess([], stop.value.code, *capsys.readouterr()), *words)

    return check


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Runs in a test's own process draw no figures, which would take half of their time, unless the test has the mark `draws`."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(fedu, "draw_run", lambda *_: None)
        monkeypatch.setattr(fedu, "plot_partition", lambda *_: None)


@pytest.fixture
def evaluates(monkeypatch, capsys):
    """`command("eval.py", ...)` in this process, which costs a tenth of a process of its own."""

    def run(*arguments, cwd: Path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        status = 0
        try:
            with user_errors("eval.py"):
                evaluation.main(parse_evaluation([*map(str, arguments)]))
        except SystemExit as stop:
            status = stop.code
        return subprocess.CompletedProcess([], status, *capsys.readouterr())

    return run


class Forked(multiprocessing.get_context("fork").Process):
    """`subprocess.Popen` of fedu.py or eval.py as a copy of this process, which has loaded torch already, and draws as it does."""

    MAINS = {"fedu.py": lambda argv: fedu.main(parse(argv)), "eval.py": lambda argv: evaluation.main(parse_evaluation(argv))}

    def __init__(self, line: list[str], cwd: Path = Path(), stdout: IO | int = subprocess.DEVNULL, **_):
        _python, script, *argv = line
        super().__init__(target=self.work, args=(Path(script).name, argv, cwd, stdout))
        self.start()

    def work(self, script: str, argv: list[str], cwd: Path, stdout: IO | int) -> None:
        os.setsid()
        os.chdir(cwd)
        file = os.open(os.devnull, os.O_WRONLY) if stdout == subprocess.DEVNULL else stdout.fileno()
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # and not those of pytest
        with user_errors(script):
            self.MAINS[script](argv)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode

    returncode = property(poll)


@pytest.fixture
def forks(monkeypatch):
    """Processes that a module starts by `subprocess.Popen` are `Forked`, which costs a fifth of a process that loads torch."""
    return lambda module: monkeypatch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))


KINDS = {  # a method of each objective
    "byol": "fedu", "simsiam": "fedsimsiam", "simclr": "fedsimclr", "fedca": "fedca", "moco-v1": "fedmoco-v1", "moco-v2": "fedmoco-v2",
    "fedx": "fedx", "orchestra": "orchestra", "barlow": "fedbarlow", "alignuniform": "fedalignuniform",
    "supervised": "fedavg-supervised", "fedu2": "fedu2",
}  # fmt: skip


def networks_of(kind: str, labels: torch.Tensor | None = None, device: torch.device = CPU, encoder: str = "tiny") -> Objective:
    """An objective with its networks, as a run has them."""
    return build_networks(Options(method=KINDS[kind], encoder=encoder), labels, device)


def ready(networks: Objective) -> Objective:
    """An objective that has what it is given before its clients train, here made up: FedCA's public images, Orchestra's centroids."""
    device = networks.online.vector.device
    if hasattr(networks, "labels"):
        networks.labels = networks.labels.to(device)
    if hasattr(networks, "align"):
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, device=device)
        networks.align(images, torch.randn(8, 256, device=device))
    if hasattr(networks, "first_centroids"):
        networks.shared = networks.first_centroids
    return networks


def objective(device: torch.device = CPU) -> BYOL:
    torch.manual_seed(0)
    return BYOL(Encoder("small"), device)


def run(folder, *options: str) -> dict:
    """Run fedu.py in this process; returns its encoders' tensors and metrics."""
    fedu.main(parse([*options, "--out", str(folder)]))
    return load(folder)


def load_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load(folder) -> dict:
    encoders = torch.load(folder / "encoder.pt", weights_only=True)["encoders"]
    vectors = [torch.cat([t.flatten().double() for m in e.values() for t in m.values()]) for e in encoders]
    return {"encoders": vectors, "metrics": load_metrics(folder)}
