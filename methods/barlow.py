"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230), the objective of FedBarlow, which L-DAWA's authors (arXiv 2307.07393) train.

`sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2`, where `C = N(z1)^T N(z2) / B`, `[d, d]`, is the cross-correlation of the two views'
projections and N gives each of the d features mean 0 and variance 1 over the batch: a feature agrees between the views, and with no other
feature. lambda is 0.005. BatchNorm's statistics are per view. There is no predictor and no target. The authors' projector has three
layers of width 8192, and their optimizer is LARS, for which a loss's scale does not matter, on batches of 2048. Here both are those of the
other methods, and the loss is divided by d: with the sum, a first step at their learning rate destroys the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from models import Encoder, Objective


class BarlowTwins(Objective):
    """redundancy: lambda, the weight of the correlations between different features."""

    def __init__(self, encoder: Encoder, device: torch.device, redundancy: float = 0.005):
        super().__init__(encoder, device)
        self.redundancy = redundancy

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        z1, z2 = (batch_norm(z, None, None, training=True) for z in self.each(self.online.module, view1, view2).float().chunk(2))
        correlation = (z1.T @ z2).float() / len(z1)
        same = correlation.diagonal()
        return ((1 - same).square().sum() + self.redundancy * (correlation.square().sum() - same.square().sum())) / len(same)
