"""What a run says while it trains: a line for each round, a bar of its steps, an estimate of its time, and a log for TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from report.tables import mean
from runtime.cli import InputError, bars_are_hidden

TABLE_HEADER = (
    f"{'round':>7}{'lr':>10}{'loss':>9}{'divergence':>12}{'kNN %':>8}{'seconds':>9}{'left':>11}  predictor taken (global, local, mixed, -)"
)


def round_line(row: dict, seconds_left: float | None) -> str:
    """A round's line under TABLE_HEADER. row: as in metrics.jsonl. seconds_left: until the run's end; None leaves the column empty."""
    taken = "".join((predictor or "?")[0] for predictor in row["predictor"]) or "nobody reported: the global model stays as it was"
    if len(row["clients"]) > 20:
        taken = ", ".join(f"{taken.count(letter)} {letter}" for letter in "glm-?" if letter in taken)
    knn = "" if row["knn"] is None else f"{100 * row['knn']:.2f}"
    left = "" if seconds_left is None else duration(seconds_left)
    return (
        f"{row['round']:>7}{row['lr']:>10.5f}{mean(row['loss']):>9.4f}{mean(row['divergence']):>12.4f}"
        f"{knn:>8}{row['seconds']:>9.1f}{left:>11}  {taken}"
    )


def duration(seconds: float) -> str:
    """A time in words, to two digits: `0.4 s`, `12 s`, `3.4 min`, `2.7 h`, `11 days`."""
    for unit, length, end in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        text = two_digits(seconds / length)
        if float(text) < end:
            return f"{text} {unit}"
    return f"{two_digits(seconds / 86400)} days"


def two_digits(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def dapu_notice(metrics: list[dict], predictor: str, mu: float) -> str:
    """A sentence if all of DAPU's decisions were the same, so that mu made no difference; otherwise an empty string.

    metrics: the rows of metrics.jsonl. predictor, mu: the run's options.
    """
    decided = [(taken, d) for row in metrics for taken, d in zip(row["predictor"], row["decided_on"]) if d is not None]
    decisions, divergences = {taken for taken, _ in decided}, [d for _, d in decided]
    if predictor != "dapu" or len(decisions) != 1:
        return ""
    consequence = "predictors were as in FedBYOL" if decisions == {"global"} else "clients shared a predictor in their first round only"
    span = f"divergences {min(divergences):.3g} to {max(divergences):.3g}"
    return f"\nmu = {mu:g} never bound: every DAPU decision was {decisions.pop()} ({span}), so {consequence}.\n"


def tensorboard_log(folder: Path) -> Callable[[dict], None]:
    """A function that writes a row of metrics.jsonl to TensorBoard's files in `folder`, which the first row makes.

    It writes the mean loss, kNN accuracy in %, and for every client its loss, divergence and the share of its own predictor. If the folder
    already has rounds from the first row's on, as of a run that this one replaces, TensorBoard hides them. If it cannot be written, a
    warning says so, and the rest is left out. Raises InputError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log tensorboard needs the package tensorboard: `pip install -r requirements-optional.txt`") from None
    writer, failed = None, False

    def write(row: dict) -> None:
        nonlocal writer, failed
        if failed:
            return
        try:
            writer = writer or SummaryWriter(folder, purge_step=row["round"])
            values = {"loss/mean": mean(row["loss"])} if row["clients"] else {}
            for key in ("loss", "divergence", "own_share"):
                values |= {f"{key}/client {client}": value for client, value in zip(row["clients"], row[key])}
            values = {name: value for name, value in values.items() if value is not None}
            if row["knn"] is not None:
                values["knn/accuracy (%)"] = 100 * row["knn"]
            for name, value in values.items():
                writer.add_scalar(name, value, row["round"])
            writer.flush()
        except OSError as error:  # it must not cost the run
            failed = True
            print(f"cannot write to {folder} ({error.strerror}): the run goes on without this log", file=sys.stderr)

    return write


class Progress(tqdm):
    """A bar of a round's steps, on a terminal. announce: called once, after the first steps, with the estimated seconds of the round."""

    def __init__(self, title: str, steps: int, announce: Callable[[float], None] | None = None):
        super().__init__(total=steps, desc=title, unit="step", leave=False, disable=bars_are_hidden())
        self.steps, self.done, self.announce = steps, 0, announce

    def update(self) -> None:
        """Count a step."""
        super().update()
        self.done += 1
        if self.done == 1:  # which warms up
            self.warm = time.perf_counter()
        passed = time.perf_counter() - self.warm
        if self.announce and self.done > 2 and passed > 1:
            self.clear()  # else the announcement would stand behind the bar
            self.announce(passed / (self.done - 1) * self.steps)
            self.announce = None


def announce_time(rounds: int, seconds: float) -> None:
    """Print how long a round and the `rounds` that are left will take, and if that is more than a day, a smaller run for a CPU."""
    total = seconds * rounds
    smaller = "; --encoder small --batch-size 32 --local-epochs 1 --rounds 20 is a run for a CPU" if total > 24 * 3600 else ""
    print(f"a round will take about {duration(seconds)} here, and the run {duration(total)}{smaller}", flush=True)
