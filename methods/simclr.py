"""SimCLR (Chen et al. 2020, arXiv 2002.05709), the objective of FedSimCLR.

NT-Xent: each of a batch's 2B views finds the other view of its image among the remaining `2B - 1`. Both views go through the network in one
forward pass. Its temperature, 0.07, is that of FedU's authors; there is no predictor and no target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models import Encoder, Objective


class SimCLR(Objective):
    """NT-Xent over the batch. temperature: the cosine similarities are divided by it."""

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float = 0.07):
        super().__init__(encoder, device)
        self.temperature = temperature

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        return nt_xent(normalize(self.online.module(torch.cat([view1, view2]))), self.temperature)


def nt_xent(z: Tensor, temperature: float, negatives: Tensor | None = None) -> Tensor:
    """NT-Xent of unit vectors `[2B, d]`, the first view's and then the second's, with more negatives `[N, d]` for each."""
    n = len(z)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), float("-inf"))
    if negatives is not None:
        logits = torch.cat([logits, z @ negatives.T / temperature], 1)
    return cross_entropy(logits, torch.arange(n, device=z.device).roll(n // 2))
