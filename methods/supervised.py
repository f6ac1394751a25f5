"""Cross-entropy of the first view with its label, the objective of supervised FedAvg (McMahan et al. 2017): an upper bound for IID data.

The projector is the classifier: one linear layer. Only this objective reads labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import Encoder, Objective


class Supervised(Objective):
    """labels: int64 `[N]`, of all images that are trained on."""

    def __init__(self, encoder: Encoder, device: torch.device, labels: Tensor):
        super().__init__(encoder, device)
        self.labels = labels

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [lambda: cross_entropy(self.online.module(view1), self.labels[batch])]
