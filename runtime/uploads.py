"""A server's uploads of one round as the rows of a matrix: one pass over it gives their mean and how far each of them has moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ops
from runtime.cli import InputError

MEMORY = 2 << 30  # bytes for a round's uploads; what exceeds them is aggregated in tiles


class Uploads:
    """The uploads of one server after the other, each `[P]`, as rows of a matrix `[rows, P]` that all of them use.

    like: a vector of an upload's length, type and device. most: the most uploads that one server gets in a round. segments: where a drift
    is measured, `[L, 2]`. own_received: whether each client begins with a vector of its own, or all of a server with the same.

    If `memory`, in bytes, has room for fewer rows than `most`, the uploads are aggregated in tiles: the sum so far is then one more row, of
    weight 1. The results are the same bits.
    """

    def __init__(self, like: Tensor, most: int, segments: Tensor, own_received: bool = False, memory: int = MEMORY):
        rows = min(most, max(2, memory // ((1 + own_received) * like.nbytes)))
        self.matrix, self.mean, self.segments = like.new_empty(rows, len(like)), torch.empty_like(like), segments
        self.received = torch.empty_like(self.matrix) if own_received else None
        self.open()

    def open(self) -> None:
        """Begin with the next server."""
        self.weights: list[float] = []  # of all accepted uploads
        self.waiting: list[tuple[float, Tensor | None]] = []  # weight, and drift if it is measured already, of those in the matrix
        self.drifts: list[Tensor] = []  # of those in the sum so far, whose row is the matrix's first

    @property
    def filled(self) -> int:
        return bool(self.drifts) + len(self.waiting)

    def next_row(self) -> Tensor:
        """The row for the next upload, `[P]`, to be filled before `add` accepts it. A full matrix is aggregated first."""
        if self.filled == len(self.matrix):
            self.aggregate()
            self.matrix[0] = self.mean
        return self.matrix[self.filled]

    def add(self, weight: float, received: Tensor, online: Tensor | None = None) -> None:
        """Accept the upload in the next row.

        weight: n_k / n, where n counts the images of all clients that train for this server. received: the vector `[P]` that the client
        began with. online: the vector whose drift is measured, if that is not the upload.
        """
        if self.received is None:
            self.common = received
        else:
            self.received[self.filled] = received
        self.waiting.append((weight, None if online is None else ops.layer_norms(online, received, self.segments)))
        self.weights.append(weight)

    def aggregate(self) -> None:
        """Take the waiting uploads into the sum so far, and measure the drifts that are missing."""
        sums, count = bool(self.drifts), self.filled
        weights = torch.tensor([1.0] * sums + [weight for weight, _ in self.waiting]).to(self.matrix)
        received = self.common if self.received is None else self.received[:count]
        _, norms, _ = ops.aggregate(self.matrix[:count], weights, received, self.segments, out=self.mean)
        self.drifts += [row if drift is None else drift for (_, drift), row in zip(self.waiting, norms[sums:], strict=True)]
        self.waiting = []

    def sum(self) -> Tensor:
        """FedAvg's mean of the accepted uploads, `sum_k w_k x_k / sum_k w_k`, `[P]`; the next server's overwrites it."""
        if self.waiting:
            self.aggregate()
        accepted = math.fsum(self.weights)
        if not math.isclose(accepted, 1):  # some uploads were not finite
            self.mean.mul_(1 / accepted)
        return self.mean

    def rows(self) -> Tensor:
        """The accepted uploads, `[K, P]`. Raises InputError if they were aggregated in tiles."""
        if self.drifts:
            raise InputError(f"a round's uploads exceed the memory for them, {MEMORY >> 30} GiB: lower --clients-per-round")
        return self.matrix[: self.filled]

    def close(self) -> list[Tensor]:
        """The drift of each accepted upload, `[L]`, in their order; the next upload is the next server's."""
        if self.waiting:
            self.aggregate()
        drifts = self.drifts
        self.open()
        return drifts
