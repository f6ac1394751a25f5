"""BYOL (Grill et al. 2020, arXiv 2006.07733), the objective of FedU, FedBYOL, FedEMA, single and central.

The online network predicts the target network's projection of the other view. The loss, in [0, 8], has two directions:
`mean(2 - 2 cos(p(f_theta(x1)), sg f_xi(x2)))` and the same with the views exchanged. BatchNorm's statistics are per view. The target is in
training mode; it has batch statistics and running statistics of its own.

In FedU's ablations it is trained without the predictor, and without the stop-gradient `sg`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from models import Encoder, WithTarget


class BYOL(WithTarget):
    """Bootstrap your own latent. predictor, stop_gradient: False for an ablation."""

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = True, stop_gradient: bool = True):
        super().__init__(encoder, device, predictor, stop_gradient)

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return self.directions(self.direction, view1, view2)

    def direction(self, views: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        projections = self.project(*others)
        return distance(self.each(self.online.module, *views), projections)


def distance(predictions: Tensor, projections: Tensor) -> Tensor:
    """`mean(2 - 2 cos(p, z))` of predictions and projections, each `[B, d]`: `[]`."""
    return 2 - 2 * cosine_similarity(predictions, projections).mean()
