"""Each op in plain torch: its specification, its fallback, and the oracle of its tests."""

import torch
from torch import Tensor


def weighted_mean(clients: Tensor, weights: Tensor) -> Tensor:
    mean = clients[0] * weights[0]
    for row, weight in zip(clients[1:], weights[1:]):  # in the order k = 0..K-1: the sum's rounding depends on it
        mean = torch.addcmul(mean, row, weight)
    return mean


def layer_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    # float64 sums: over millions of float32 squares, a float32 sum is off in the third digit
    norms = [torch.linalg.vector_norm(a[begin:end].double() - b[begin:end].double()) for begin, end in segments.tolist()]
    return torch.stack(norms) if norms else a.new_zeros(0, dtype=torch.float64)


def aggregate(clients: Tensor, weights: Tensor, received: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = weighted_mean(clients, weights)
    received = received.expand_as(clients)
    drift = torch.stack([layer_norms(row, start, segments) for row, start in zip(clients, received)])
    spread = torch.stack([layer_norms(row, mean, segments) for row in clients])
    return mean, drift, spread


def ema_(target: Tensor, online: Tensor, decay: float) -> Tensor:
    # not lerp_, which is inexact at decay 0 and 1 in the presence of Inf
    if decay == 1:
        return target
    if decay == 0:
        return target.copy_(online)
    return target.mul_(decay).add_(online, alpha=1 - decay)
