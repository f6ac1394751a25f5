"""A server's uploads of one round as the rows of a matrix: one pass over it gives their mean and how far each of them has moved.

An upload that has moved much further than the others is an outlier, which is left out of the mean or shortened. Only a round that has
one takes a second pass.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

import ops
from runtime.cli import InputError

HUGE = torch.finfo(torch.float32).max ** 0.5  # a vector that moved further has a squared length beyond float32
COLUMNS = 1 << 20  # of the matrix, which a rule that needs several times their memory takes at a time
MEMORY = 2 << 30  # bytes for a round's uploads; what exceeds them is aggregated in tiles


class Outlier(NamedTuple):
    """An upload that moved too far. times: as far as the round's median. shortened: to the bound, and used; else it was left out."""

    times: float
    shortened: bool


class Uploads:
    """The uploads of one server after the other, each `[P]`, as rows of a matrix `[rows, P]` that all of them use.

    like: a vector of an upload's length, type and device. most: the most uploads that one server gets in a round. segments: where a drift
    is measured, `[L, 2]`. own_received: whether each client begins with a vector of its own, or all of a server with the same.

    If `memory`, in bytes, has room for fewer rows than `most`, the uploads are aggregated in tiles: the sum so far is then one more row, of
    weight 1. The results are the same bits.

    max_drift: an upload is an outlier if its whole vector moved more than this many times as far as the median of the round's uploads. That
    takes three uploads; in tiles, those that came so far. One that moved further than `HUGE` is an outlier among any number of uploads.
    shorten: whether an outlier's change is shortened to that bound, instead of being left out.
    """

    def __init__(
        self, like: Tensor, most: int, segments: Tensor, own_received: bool = False, memory: int = MEMORY,
        max_drift: float = math.inf, shorten: bool = False,
    ):  # fmt: skip
        rows = min(most, max(2, memory // ((1 + own_received) * like.nbytes)))
        self.matrix, self.mean = like.new_empty(rows, len(like)), torch.empty_like(like)
        self.received = torch.empty_like(self.matrix) if own_received else None
        self.max_drift, self.shorten = max_drift, shorten
        judged = max_drift < math.inf
        self.segments, self.asked = covering(segments, len(like)) if judged else (segments, slice(None))
        self.open()

    def open(self) -> None:
        """Begin with the next server."""
        self.weights: list[float] = []  # of each accepted upload, 0 for one that was left out
        self.drifts: list[Tensor | None] = []  # of each accepted upload, None until it is measured
        self.moved: list[float] = []  # by the whole vectors that were measured so far
        self.outliers: dict[int, Outlier] = {}
        self.waiting: list[int] = []  # the uploads whose rows are in the matrix, in its order
        self.folded = False  # whether the matrix's first row is the sum so far
        self.measured = False  # whether `mean` and the drifts have all that is in the matrix

    @property
    def filled(self) -> int:
        return self.folded + len(self.waiting)

    def next_row(self) -> Tensor:
        """The row for the next upload, `[P]`, to be filled before `add` accepts it. A full matrix is aggregated first."""
        if self.filled == len(self.matrix):
            self.judge()
            self.matrix[0] = self.mean
            self.folded, self.waiting = True, []
        return self.matrix[self.filled]

    def add(self, weight: float, received: Tensor, online: Tensor | None = None, judged: Tensor | None = None) -> None:
        """Accept the upload in the next row.

        weight: n_k / n, where n counts the images of all clients that train for this server. received: the vector `[P]` that the client
        began with. online: the vector whose drift is measured, if that is not the upload. judged: then the vector from which the upload
        itself has moved, if that is not `received`.
        """
        start = received if judged is None else judged
        if self.received is None:
            self.common = start
        else:
            self.received[self.filled] = start
        self.waiting.append(len(self.weights))
        self.weights.append(weight)
        self.drifts.append(None if online is None else ops.layer_norms(online, received, self.segments[self.asked]))
        self.measured = False

    def judge(self) -> dict[int, Outlier]:
        """Take the waiting uploads into the sum so far, without the outliers; returns the round's outliers.

        They are numbered in the order of acceptance, from 0.
        """
        if self.measured or not self.waiting:
            return self.outliers
        received = self.common if self.received is None else self.received[: self.filled]
        _, norms, _ = ops.aggregate(self.matrix[: self.filled], self.row_weights(), received, self.segments, out=self.mean)
        for upload, row in zip(self.waiting, norms[self.folded :], strict=True):
            self.drifts[upload] = row[self.asked] if self.drifts[upload] is None else self.drifts[upload]
        self.measured = True
        if self.max_drift < math.inf:
            self.exclude(norms[self.folded :].square().sum(1).sqrt().nan_to_num(math.inf).tolist())
        return self.outliers

    def row_weights(self) -> Tensor:
        return torch.tensor([1.0] * self.folded + [self.weights[upload] for upload in self.waiting]).to(self.matrix)

    def exclude(self, moved: list[float]) -> None:
        """Leave the outliers out of the mean, or shorten them. moved: how far each of the waiting uploads has moved."""
        self.moved += moved
        median = statistics.median(self.moved)
        # a median of 0, where half of them have not moved, is no measure for the others
        measure = median if len(self.moved) > 2 and median else 0.0
        bound = min(HUGE, self.max_drift * measure or HUGE)
        far = [k for k, distance in enumerate(moved) if distance > bound]
        if not far:
            return
        for k in far:
            row, upload = self.matrix[self.folded + k], self.waiting[k]
            start = (self.common if self.received is None else self.received[self.folded + k]).double()
            change = row.double() - start  # whose norm is finite in double
            distance = change.norm().item()
            self.outliers[upload] = Outlier(distance / measure if measure else math.inf, self.shorten and bound < HUGE)
            if self.outliers[upload].shortened:
                row.copy_(start + change * (bound / distance))
            else:
                self.weights[upload] = 0.0
        left = [k for k in range(len(moved)) if self.weights[self.waiting[k]]]
        for place, k in enumerate(left):
            for rows in (self.matrix,) if self.received is None else (self.matrix, self.received):
                rows[self.folded + place] = rows[self.folded + k]
        self.waiting = [self.waiting[k] for k in left]
        if self.filled:
            ops.weighted_mean(self.matrix[: self.filled], self.row_weights(), out=self.mean)
        else:
            self.mean.zero_()

    def sum(self) -> Tensor:
        """FedAvg's mean of the accepted uploads, `sum_k w_k x_k / sum_k w_k`, `[P]`; the next server's overwrites it."""
        self.judge()
        accepted = math.fsum(self.weights)
        if accepted and not math.isclose(accepted, 1):  # some uploads were not finite, or outliers
            self.mean.mul_(1 / accepted)
        return self.mean

    def rows(self) -> Tensor:
        """The accepted uploads without the outliers, `[K, P]`. Raises InputError if they were aggregated in tiles."""
        if self.folded:
            raise InputError(f"a round's uploads exceed the memory for them, {MEMORY >> 30} GiB: lower --clients-per-round")
        self.judge()
        return self.matrix[: self.filled]

    def close(self) -> list[Tensor]:
        """The drift of each accepted upload, `[L]`, in their order; the next upload is the next server's."""
        self.judge()
        drifts = self.drifts
        self.open()
        return drifts


def covering(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """These segments and the gaps between them, together all of `[0, size)`: `[M, 2]`, and which of them are these, bool `[M]`."""
    zero, end = segments.new_zeros(1), segments.new_full((1,), size)
    gaps = torch.stack([torch.cat([zero, segments[:, 1]]), torch.cat([segments[:, 0], end])], 1)
    every = torch.cat([segments, gaps[gaps[:, 0] < gaps[:, 1]]])
    order = every[:, 0].argsort(stable=True)
    return every[order], order < len(segments)
