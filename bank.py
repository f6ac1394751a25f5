"""What clients keep between their rounds, in one file: ten thousand of them need no more memory than ten.

A row holds one client's networks; a client that never took part has none. A round writes to rows that no checkpoint names, so that the
last two checkpoints stay whole whatever interrupts it. Rows are read and written, not mapped: the system keeps them in memory while it
has room, a full disk is an error and not a signal, and what was read does not stay with the process. As many as `memory` has room for
stay there as well, and then need neither be read nor verified.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cli import InputError, os_errors
from models import Part


class Bank:
    """Rows of the form of `like`: a client's parts by their names.

    path: the file, made if it does not exist; without one a temporary file. memory: bytes for rows beside it. Raises InputError if the
    file cannot be read or written.
    """

    def __init__(self, like: Mapping[str, Part], path: Path | None = None, memory: int = 0):
        self.like, self.path = like, path
        self.row_bytes = sum(part.nbytes for part in like.values())
        with os_errors(f"cannot open {path}"):
            named = path and like  # nothing to keep, no file
            self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") if named else tempfile.TemporaryFile()  # noqa: SIM115
        self.count = 0  # of rows that were ever used
        self.free: list[int] = []
        self.named: set[int] = set()  # by the last checkpoint
        self.room = memory // self.row_bytes if like else 0
        self.held: dict[int, dict[str, Part]] = {}

    def write(self, state: Mapping[str, Part]) -> tuple[int, str]:
        """Put a client's state into a row that no checkpoint names; returns the row and its checksum."""
        row = self.free.pop() if self.free else self.count
        self.count = max(self.count, row + 1)
        state = {name: Part(*(t.cpu() for t in state[name])) for name in self.like}
        host = [tensor for part in state.values() for tensor in part]
        with os_errors(f"cannot write {self.path}"):
            self.file.seek(row * self.row_bytes)
            for tensor in host:
                self.file.write(tensor.numpy())
        if len(self.held) < self.room:
            self.held[row] = state
        return row, checksum(host)

    def read(self, row: int, digest: str) -> dict[str, Part]:
        """The state in a row, on the device of `like`. Raises InputError if it is not what was written."""
        state = self.held.pop(row, None) or self.verify(row, digest)  # popped: whoever reads it will write another
        return {name: Part(*(t.to(like.device) for t, like in zip(part, self.like[name]))) for name, part in state.items()}

    def verify(self, row: int, digest: str) -> dict[str, Part]:
        """The same in the host's memory, for one who asks only whether it is what was written."""
        state = {name: Part(*(torch.empty_like(t, device="cpu") for t in part)) for name, part in self.like.items()}
        host = [tensor for part in state.values() for tensor in part]
        with os_errors(f"cannot read or write {self.path}"):  # what was buffered is written first
            self.file.seek(row * self.row_bytes)
            size = sum(self.file.readinto(tensor.numpy()) for tensor in host)
        if size != self.row_bytes or checksum(host) != digest:
            raise InputError(f"{self.path} is damaged: row {row} does not have the checksum that it was written with")
        return state

    def flush(self) -> None:
        """Bring what was written to the disk, before a checkpoint names it."""
        with os_errors(f"cannot write {self.path}"):
            self.file.flush()
            os.fsync(self.file.fileno())

    def protect(self, rows: Iterable[int]) -> None:
        """A checkpoint names these rows now: others may be used again, but for those that the checkpoint before it names."""
        before, self.named = self.named, set(rows)
        self.count = max([self.count, *(row + 1 for row in self.named)])
        self.free = sorted(set(range(self.count)) - self.named - before, reverse=True)


def checksum(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' bytes, in their order."""
    digest = hashlib.sha256()  # which processors have instructions for
    for tensor in tensors:
        digest.update(tensor.cpu().numpy())
    return digest.hexdigest()
