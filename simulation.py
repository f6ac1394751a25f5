"""A whole run: all rounds, what is printed about them, and what the run folder holds at the end.

The function that makes a round is an argument: `fedu.py` gives one that simulates all clients, `flower/` one that asks real clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ops
from data import Images
from eval import knn, load_encoders
from federation import Federation, Turn, checkpoint, restore, save_encoders
from figures import plot
from models import Encoder
from options import HOST_OPTIONS, METHODS, OPTIONS, Options, flag
from report import TABLE_HEADER, dapu_notice, duration, mean, round_line
from runtime.bank import Bank
from runtime.cli import InputError
from runtime.device import describe_device
from runtime.run import load_checkpoint, read_config, read_metrics, save_checkpoint, write_config, write_metrics

Announce = Callable[[float], None] | None  # takes an estimate of a round's seconds after its first steps


class Run(NamedTuple):
    """A finished run: its folder, and its rounds as in metrics.jsonl."""

    folder: Path
    metrics: list[dict]

    @property
    def encoders(self) -> list[Encoder]:
        """One encoder for each server: of `single` one for each client, else one in all."""
        return load_encoders(self.folder)

    @property
    def encoder(self) -> Encoder:
        return self.encoders[0]


def load_kernels() -> None:
    """Build the fused kernels first, so that a build error leaves no run folder."""
    try:
        ops.load()
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from None


def stored_options(out: Path, given: dict[str, object]) -> Options:
    """The options of the run in a folder. given: those that may differ from them, such as `device`; others raise InputError."""
    stored = read_config(out)["options"]
    unknown = sorted(stored.keys() - OPTIONS.keys())
    if unknown:
        raise InputError(f"{out} was begun by a version that had the option {flag(unknown[0])}: train it again with --overwrite")
    begun = Options(**stored)
    changed = [name for name, value in given.items() if value != getattr(begun, name) and name not in HOST_OPTIONS]
    if changed:
        names = ", ".join(f"{flag(name)} {given[name]} (it was {getattr(begun, name)})" for name in changed)
        raise InputError(f"--resume {out} got other options than the run has: {names}")
    return replace(begun, **given)


def run_rounds(
    options: Options, out: Path, config: dict, federation: Federation, images: Images, bank: Bank,
    make_round: Callable[[int, Announce], dict], resumed: bool = False, log: Callable[[dict], None] = lambda row: None,
) -> Run:  # fmt: skip
    """Make the rounds that are left, all of them or those after the run's checkpoint, and write all that the run folder holds.

    make_round: makes the round of this number, which changes the federation, and returns its metrics. log: is called with these.
    """
    device = images.x_train.device
    rounds = options.rounds if METHODS[options.method].trains else 0
    start, seconds = restore(federation, load_checkpoint(out, bank, device))
    metrics, begun = read_metrics(out)[:start] if start else [], time.perf_counter()
    if resumed:
        print(f"{out}: continuing after {start} of {rounds} rounds")
    print(f"{options.method} on {options.dataset}: {len(images.x_train)} images, {federation.describe()}, {describe_device(device)}")
    print(TABLE_HEADER, flush=True)
    for round_ in range(start, rounds):
        announce = partial(announce_time, options) if round_ == start and device.type == "cpu" else None
        row = make_round(round_, announce)
        if options.knn_every and ((round_ + 1) % options.knn_every == 0 or round_ + 1 == rounds):
            row["knn"] = mean([knn(federation.load(server), images) for server in federation.servers])
        metrics.append(row)
        write_metrics(out, metrics)
        passed = time.perf_counter() - begun
        save_checkpoint(out, checkpoint(federation, round_ + 1, seconds + passed), bank)
        log(row)
        print(round_line(row, passed / (round_ + 1 - start) * (rounds - round_ - 1)), flush=True)

    save_encoders(out, options.encoder, federation)
    write_config(out, config | {"seconds": round(seconds + time.perf_counter() - begun, 1)})
    if any(row["clients"] for row in metrics):
        plot([out], out / "divergence.png")
        print(dapu_notice(metrics, options.predictor, options.mu), end="")
    print(f"\n{out} holds the run. Next:\n  python eval.py {out}" + f"\n  python eval.py --plot {out}" * bool(metrics))
    return Run(out, metrics)


def describe_round(round_: int, lr: float, reported: list[Turn], dropped: Iterable[int], nonfinite: Iterable[int]) -> dict:
    """A round as its line in metrics.jsonl, but for the bytes and seconds, which the caller fills in."""
    return {
        "round": round_,
        "lr": lr,
        "loss": [turn.loss for turn in reported],
        "divergence": [turn.client.divergence for turn in reported],
        "decided_on": [turn.update.divergence for turn in reported],
        "predictor": [turn.update.predictor for turn in reported],
        "own_share": [turn.update.own_share for turn in reported],
        "num_examples": [turn.client.num_examples for turn in reported],
        "clients": [turn.client.id for turn in reported],
        "dropped": sorted(dropped),
        "nonfinite": sorted(nonfinite),
        "upload_bytes": 0,
        "download_bytes": 0,
        "knn": None,
        "seconds": 0.0,
    }


def announce_time(options: Options, seconds: float) -> None:
    """Print how long a round and the run will take, and if that is more than a day, a smaller run for a CPU."""
    total = seconds * options.rounds
    smaller = "; --encoder small --batch-size 32 --local-epochs 1 --rounds 20 is a run for a CPU" if total > 24 * 3600 else ""
    print(f"a round will take about {duration(seconds)} here, and the run {duration(total)}{smaller}", flush=True)
