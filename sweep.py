"""Makes a run of every combination of options that is not there yet, evaluates the runs, and ends with their table and figure.

    python sweep.py --method single fedu fedema --seed 0 1 2 -- --rounds 20
    python sweep.py --mu 0.2 0.4 0.8 --seed 0 1 --eval linear "semi 0.1" --out runs/mu

Options of fedu.py before `--` may have several values, options after it go to every run. In a combination where an option before `--`
changes nothing, as --mu with --method single, it is left out. After an interrupt the same command goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from methods import of_run
from options import HOST_OPTIONS, OPTIONS, TASK_OPTIONS, Ineffective, Options, flag, run_name, training_parser
from runtime.cli import InputError, Parser, bars_are_hidden, command_line, number, os_errors, user_errors, user_path, write_atomic

ROOT, LIBC = Path(__file__).parent, ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


# -------------------------------------------------------------------------------- make runs, for results/experiments.py too


class Run(NamedTuple):
    """A run to be made, and the file that gets what its commands print.

    training, resuming: arguments of fedu.py, without the folder. evaluations: arguments of eval.py, by the names that eval.jsonl has.
    """

    folder: Path
    log: Path
    training: list[str]
    evaluations: dict[str, list[str]]
    resuming: Sequence[str] = ()

    def steps_left(self) -> list[list[str]]:
        """The scripts to be called, with their arguments, in order. Raises InputError if eval.jsonl is damaged."""
        steps, done, folder = [], {}, str(self.folder)
        if not (self.folder / "encoder.pt").exists():
            begun = (self.folder / "config.json").exists()
            steps = [["fedu.py", "--resume", folder, *self.resuming] if begun else ["fedu.py", *self.training, "--out", folder]]
        if (self.folder / "eval.jsonl").exists():
            from report.tables import read_rows  # here, since it loads torch

            done = read_rows(self.folder)
        return steps + [["eval.py", *arguments, folder] for name, arguments in self.evaluations.items() if name not in done]


def make(runs: list[Run], jobs: int, after: Callable[[Run], None] = lambda run: None) -> list[Run]:
    """Do what is left of the runs, `jobs` of them side by side, which share the cores. Returns the runs that failed.

    after: called with a run after each of its steps that ended well. An interrupt ends the running steps and is then passed on.
    """
    from tqdm import tqdm

    threads = max(1, os.cpu_count() // jobs)  # together no more than cores, or the threads of a run would wait for those of another
    waiting = [(run, steps) for run in runs if (steps := run.steps_left())]
    working, failed = [], []
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=bars_are_hidden()) as bar:
        try:
            while waiting or working:
                if waiting and len(working) < jobs:
                    run, (step, *later) = waiting.pop(0)
                    bar.write(in_shell(step))
                    sys.stdout.flush()
                    working.append((run, later, start(step, run.log, threads)))
                    continue
                time.sleep(0.1)
                bar.refresh()
                for job in [job for job in working if job[2].poll() is not None]:
                    working.remove(job)
                    run, later, process = job
                    if process.returncode:
                        failed.append(run)
                    else:
                        after(run)
                    if later and not process.returncode:
                        waiting.insert(0, (run, later))
                    else:
                        bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here") from None
        finally:
            for *_, process in working:
                process.terminate()
            for *_, process in working:
                process.wait()
    return failed


def start(step: list[str], log: Path, threads: int) -> subprocess.Popen:
    """Start a script, whose output is appended to the log. Not Ctrl-C but the end of this process ends it, by SIGTERM."""
    with os_errors(f"cannot write {log}"):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a")
    with file:
        print("$", in_shell(step), file=file, flush=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / step[0]), *step[1:]], env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True, preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip


def in_shell(step: list[str]) -> str:
    return shlex.join(["python", *step])


# ------------------------------------------------------------------------------------------------------- combinations


def combine(swept: dict[str, list], common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every combination of swept values, by the default name of its run with the common options.

    swept: the values of each option, or setting of the objective, by its name. It is left out of the combinations in which it changes
    nothing, as stderr then says. Raises InputError for a combination that fedu.py refuses, and if an option changes nothing in any.
    """
    combinations = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    found, left_out = {}, {}
    for combination in combinations:
        while True:
            settings = {k: v for k, v in combination.items() if k not in OPTIONS} | common.get("settings", {})
            given = common | {k: v for k, v in combination.items() if k in OPTIONS} | ({"settings": settings} if settings else {})
            try:
                options = Options(**given)
                options.refuse_ineffective(given)
                break
            except Ineffective as error:
                if error.name not in combination:
                    raise InputError(f"{error}; before `--` it would be left out there") from None
                del combination[error.name]
                left_out.setdefault(error.name, []).append((combination, error))
        found.setdefault(run_name(options), combination)
    for name, cases in left_out.items():
        if len(cases) == len(combinations):
            raise cases[0][1]
        where = f"{len(cases)} of {len(combinations)} combinations, as {shlex.join(arguments(cases[0][0]))}"
        print(f"{typed(name)} changes nothing in {where}: it is left out there", file=sys.stderr)
    return found


def typed(name: str) -> str:
    """An option, or a setting of the objective, as it is typed."""
    return flag(name) if name in OPTIONS else f"--set {name}"


def arguments(given: dict[str, Any]) -> list[str]:
    """Options and settings, by name, as arguments of fedu.py."""
    words: list[str] = []
    for name, value in given.items():
        if name == "settings":
            words += arguments(value)
        elif name not in OPTIONS:
            words += ["--set", f"{name}={value}"]
        elif value is not False:
            words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


def runs_in(out: Path) -> dict[str, Path]:
    """The run folders in a folder, by the default names of runs with their options. Of several with the same, a finished one."""
    found: dict[str, Path] = {}
    for path in sorted(out.glob("*/config.json"), key=lambda path: (not (path.parent / "encoder.pt").exists(), path)):
        try:
            config = json.loads(path.read_text())
            if "run" not in config:  # else Flower made it, from the images of parties
                own = of_run(path.parent, config, {})  # a method's file may have changed since
                found.setdefault(run_name(Options(**config["options"] | own)), path.parent)
        except (OSError, ValueError, KeyError, TypeError, InputError):
            pass  # no run, or one of another version
    return found


def new_folder(out: Path, name: str) -> Path:
    """A folder for a new run: of this name, or with a number behind it where something else has the name."""
    paths = itertools.chain([out / name], (out / f"{name}-{n}" for n in itertools.count(2)))
    return next(path for path in paths if not path.exists() or (path.is_dir() and not any(path.iterdir())))


# --------------------------------------------------------------------------------------------------- the command line


@command_line()
def parse(argv: list[str]) -> dict[str, Any]:
    """Read the command line; returns the arguments of `main`. A mistake ends the process with one sentence and exit status 2."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(__doc__.split("\n\n")[0])
    group = parser.add_argument_group("options of fedu.py", "Before `--` each may have several values; those of a flag are no and yes.")
    for name in (name for name in OPTIONS if name not in HOST_OPTIONS):
        group.add_argument(flag(name), dest=name, nargs="+", action="extend", metavar="VALUE", help=OPTIONS[name].metadata["help"])
    group = parser.add_argument_group("sweep", "After `--` any options of fedu.py may follow, for every run.")
    group.add_argument("--eval", nargs="*", type=evaluation, help="linear, knn, spectrum, 'semi F'; without a value: none  [linear knn]")
    group.add_argument("--out", type=user_path, help="folder of the runs, their logs, the table and the figure  [runs]")
    group.add_argument("--jobs", type=number(int, 1), help="runs side by side, which share the cores  [one a core]")
    group.add_argument("--list", action="store_true", help="print the commands that are left, and run nothing")
    given = {"eval": [evaluation("linear"), evaluation("knn")], "out": Path("runs"), "jobs": None, "list": False}
    given |= vars(parser.parse_args(argv[:end]))
    common = vars(training_parser().parse_args(argv[end + 1 :]))
    try:
        swept = swept_values({name: given.pop(name) for name in OPTIONS if name in given})
    except InputError as error:
        parser.error(str(error))
    if twice := swept.keys() & {*common, *common.get("settings", {})}:
        parser.error(f"{typed(min(twice))} has values before and after `--`, needs them on one side")
    if unknown := common.keys() - OPTIONS.keys():
        parser.error(f"--{min(unknown)} cannot go to every run: the sweep names the run folders, in the --out before `--`")
    if single := sorted(common.keys() & {"dry_run", "save_partition"}):
        parser.error(f"{flag(single[0])} cannot go to every run: give it to fedu.py, with one run's options")
    return {"swept": swept, "common": common} | given


def evaluation(text: str) -> tuple[str, list[str]]:
    """An argparse type: an evaluation's name in eval.jsonl, and its arguments."""
    task, *fraction = text.split(" ")
    if task == "semi" and len(fraction) == 1:
        return f"semi {number(float, 0, 1, open_low=True)(*fraction):g}", ["--semi", *fraction]
    if text in ("linear", "knn", "spectrum"):
        return text, [f"--{text}"]
    raise argparse.ArgumentTypeError(f"got {text!r}, needs linear, knn, spectrum or, in quotes, 'semi F'")


def swept_values(given: dict[str, list[str]]) -> dict[str, list]:
    """The values of each option and setting. Seeds are first, so that each setting gets its first run before any gets a second."""
    swept: dict[str, dict] = {}
    for option in sorted(given, key=lambda option: option != "seed"):
        for text in given[option]:
            name, value = option, text
            if option == "settings":
                name, _, value = text.partition("=")
                if not (name and value):
                    raise InputError(f"--set got {text!r}, needs NAME=VALUE, as temperature=0.1")
            elif isinstance(OPTIONS[option].default, bool):
                if text not in ("no", "yes"):
                    raise InputError(f"{flag(option)} got {text!r}, needs no, yes or both")
                value = text == "yes"
            swept.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in swept.items()}


@command_line()
def main(swept: dict[str, list], common: dict[str, Any], eval: list, out: Path, jobs: int | None, list: bool) -> None:
    host = {name: value for name, value in common.items() if name in HOST_OPTIONS}
    evaluations = {name: how + arguments({k: v for k, v in host.items() if k in TASK_OPTIONS}) for name, how in eval}
    combinations, there = combine(swept, common), runs_in(out)
    runs = {}
    for name, combination in combinations.items():
        folder = there.get(name) or new_folder(out, name)
        runs[name] = Run(folder, out / f"{folder.name}.log", arguments(combination | common), evaluations, arguments(host))
    if list:
        return print("".join(f"{in_shell(step)}\n" for run in runs.values() for step in run.steps_left()), end="")
    with os_errors(f"--out {out} cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    failed = make([*runs.values()], jobs or min(os.cpu_count(), len(runs)))
    numeric = [k for k, v in swept.items() if len(v) > 1 and k in OPTIONS and OPTIONS[k].metadata["type"] is not str]
    numeric = [k for k in numeric if k not in ("seed", "knn_every")]
    finished = {runs[name].folder: given for name, given in combinations.items() if (runs[name].folder / "encoder.pt").exists()}
    figures = {"round": [*finished]}
    if len(numeric) == 1:
        figures |= {k: [run for run, given in finished.items() if k in given or given.get("method") == "untrained"] for k in numeric}
    if finished:
        show(out, figures)
    if failed:
        print(f"\nsweep.py: {len(failed)} of {len(runs)} runs failed; the last lines of their logs:", file=sys.stderr)
        for run in failed:
            print(f"{run.log}: {run.log.read_text(errors='replace').splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)


def show(out: Path, figures: dict[str, list[Path]]) -> None:
    """Print the runs' table, write it to table.md, and draw the figures.

    figures: the runs by what their accuracy is drawn against: `round`, in figure.png, or an option of fedu.py, in figure-OPTION.png.
    """
    from report.figures import plot_against
    from report.tables import table

    text = table(figures["round"])
    write_atomic(out / "table.md", lambda file: file.write(text.encode() + b"\n"))
    print(f"\n{text}\n\n{out / 'table.md'} holds this table")
    for option, runs in figures.items():
        file, shown = (out / "figure.png", "kNN accuracy") if option == "round" else (out / f"figure-{option}.png", "accuracies")
        try:
            plot_against(option, runs, file)
            print(f"{file} shows the {shown} against {option}")
        except InputError as error:
            print(f"{file} was not drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    with user_errors("sweep.py"):
        main(**parse(sys.argv[1:]))
