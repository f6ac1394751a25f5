"""SimSiam (Chen and He 2021, arXiv 2011.10566), the objective of FedSimSiam.

The online network predicts its own projection of the other view, `-(cos(p1, sg z2) + cos(p2, sg z1)) / 2`, in [-1, 1]. It has no target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from models import Encoder, Objective


class SimSiam(Objective):
    """Negative cosine similarity, halved. predictor, stop_gradient: False for an ablation."""

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = True, stop_gradient: bool = True):
        super().__init__(encoder, device, predictor)
        self.stop_gradient = stop_gradient

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        encoder, predictor = self.online.module.encoder, self.online.module.predictor
        z = self.each(encoder, view1, view2)
        p = self.each(predictor, *z.chunk(2))
        others = z.roll(len(view1), 0)
        return -cosine_similarity(p, others.detach() if self.stop_gradient else others).mean()
