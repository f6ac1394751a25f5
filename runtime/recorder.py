"""Writes down a run while it is made: its rounds in metrics.jsonl and on stdout, and after each the checkpoint to continue from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from runtime.bank import Bank
from runtime.run import Checkpoint, load_checkpoint, read_metrics, save_checkpoint, write_config, write_metrics


class Storable(Protocol):
    """What changes in a round, and goes into its checkpoint. rounds, seconds: what is done, and how long it took."""

    def checkpoint(self, rounds: int, seconds: float) -> Checkpoint: ...

    def restore(self, saved: Checkpoint) -> None: ...


class Recorder:
    """A run's rounds, from its checkpoint on. `state` is put back as the checkpoint has it, and stored anew after each round.

    out: the run folder. config: what config.json holds; when all is done, it gets the seconds. rounds: of the whole run. show: is called
    with each round, as in metrics.jsonl, and with the estimated seconds that are left.
    """

    def __init__(
        self, out: Path, config: dict, rounds: int, state: Storable, bank: Bank, device: torch.device, show: Callable[[dict, float], None]
    ):
        self.out, self.config, self.rounds, self.state, self.bank, self.show = out, config, rounds, state, bank, show
        saved = load_checkpoint(out, bank, device)
        if saved:
            state.restore(saved)
        self.done, self.seconds = (saved.values["round"], saved.values["seconds"]) if saved else (0, 0.0)
        self.first, self.begun = self.done, time.perf_counter()
        self.metrics = read_metrics(out)[: self.done] if self.done else []

    def rounds_left(self) -> Iterator[int]:
        """The numbers of the rounds to be made."""
        yield from range(self.first, self.rounds)

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.begun

    def write(self, row: dict) -> None:
        """Write down the round that was made, as metrics.jsonl is to have it."""
        self.metrics.append(row)
        write_metrics(self.out, self.metrics)
        self.done = row["round"] + 1
        save_checkpoint(self.out, self.state.checkpoint(self.done, self.seconds + self.passed), self.bank)
        self.show(row, self.passed / (self.done - self.first) * (self.rounds - self.done))

    def finish(self) -> None:
        """Write the seconds that the run took into config.json."""
        write_config(self.out, self.config | {"seconds": round(self.seconds + self.passed, 1)})
