"""Alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242), the objective of FedAlignUniform, a baseline of SSD's (ICCV 2025).

`mean |z1 - z2|^2 + w (unif(z1) + unif(z2)) / 2` with `unif(z) = log mean_{i != j} exp(-2 |z_i - z_j|^2)`, where z are the projections at
unit length: an image's views meet, and different images spread over the sphere. w is 1. Both views go through the network in one forward
pass, as in Wang and Isola's code. There is no predictor and no target. Optimizer, projector and views are those of the other methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models import Encoder, Objective


class AlignUniform(Objective):
    """uniformity: w, the weight of the uniformity."""

    def __init__(self, encoder: Encoder, device: torch.device, uniformity: float = 1.0):
        super().__init__(encoder, device)
        self.uniformity = uniformity

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        z1, z2 = normalize(self.online.module(torch.cat([view1, view2])).float()).chunk(2)
        alignment = (z1 - z2).square().sum(1).mean()
        return alignment + self.uniformity * (uniformity(z1) + uniformity(z2)) / 2


def uniformity(z: Tensor) -> Tensor:
    """`log mean_{i != j} exp(-2 |z_i - z_j|^2)` of unit vectors `[B, d]`, for which `|z_i - z_j|^2 = 2 - 2 <z_i, z_j>`."""
    n = len(z)
    exponents = (4 * (z @ z.T).float() - 4).masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), float("-inf"))
    return exponents.flatten().logsumexp(0) - math.log(n * (n - 1))
