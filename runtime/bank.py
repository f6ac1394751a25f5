"""What clients keep between their rounds, in one file: ten thousand of them need no more memory than ten.

A row holds one client's tensors; a client that never took part has none. A round writes to rows that no checkpoint names, so that the
last two checkpoints stay whole whatever interrupts it. Rows are read and written, not mapped: the system keeps them in its page cache
while there is room, a full disk is an OSError and not a signal, and what was read does not count as the process's memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.cli import InputError, os_errors


class Row(NamedTuple):
    """Where a client's tensors lie in the bank, and the checksum that they were written with."""

    index: int
    digest: str


class Bank:
    """A file of rows, each with one client's tensors, of the names and shapes of `like`.

    path: the file, made if it does not exist; None for a temporary file. Raises InputError if it cannot be read or written.
    """

    def __init__(self, like: Mapping[str, Tensor], path: Path | None = None):
        self.like, self.path = like, path
        self.row_bytes = sum(tensor.nbytes for tensor in like.values())
        named = path if like else None  # nothing to keep, no file
        with os_errors(f"cannot open {path}"):
            if named:  # opened to read and write, made if need be, not emptied
                self.file = os.fdopen(os.open(named, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            else:
                self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.count = 0  # rows used so far
        self.free: list[int] = []
        self.named: set[int] = set()  # rows that the last checkpoint refers to

    def write(self, state: Mapping[str, Tensor]) -> Row:
        """Put a client's tensors into a row that no checkpoint names."""
        index = self.free.pop() if self.free else self.count
        self.count = max(self.count, index + 1)
        host = [state[name].cpu() for name in self.like]
        with os_errors(f"cannot write {self.path}"):
            self.file.seek(index * self.row_bytes)
            for tensor in host:
                self.file.write(tensor.numpy())
        return Row(index, checksum(host))

    def read(self, row: Row) -> dict[str, Tensor]:
        """The tensors in a row, on the device of `like`. Raises InputError if they are not what was written."""
        return {name: tensor.to(self.like[name].device) for name, tensor in self.verify(row).items()}

    def verify(self, row: Row) -> dict[str, Tensor]:
        """As `read`, but the tensors stay in the host's memory, which is enough to see whether a row is damaged."""
        state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in self.like.items()}
        with os_errors(f"cannot read or write {self.path}"):  # seeking writes what is still buffered
            self.file.seek(row.index * self.row_bytes)
            size = sum(self.file.readinto(tensor.numpy()) for tensor in state.values())
        if size != self.row_bytes or checksum(state.values()) != row.digest:
            raise InputError(f"{self.path} is damaged: row {row.index} does not have the checksum that it was written with")
        return state

    def flush(self) -> None:
        """Wait until the rows are on the disk; needed before a checkpoint names them."""
        with os_errors(f"cannot write {self.path}"):
            self.file.flush()
            os.fsync(self.file.fileno())

    def protect(self, rows: Iterable[int]) -> None:
        """Keep the rows that a new checkpoint names, and those that the checkpoint before it names. All others may be used again."""
        before, self.named = self.named, set(rows)
        self.count = max([self.count, *(row + 1 for row in self.named)])
        self.free = sorted(set(range(self.count)) - self.named - before, reverse=True)


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in their order."""
    digest = hashlib.sha256()  # fast, since processors have instructions for it
    for tensor in tensors:
        digest.update(tensor.cpu().numpy())
    return digest.hexdigest()
