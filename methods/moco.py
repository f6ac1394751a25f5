"""MoCo (He et al. 2020, arXiv 1911.05722, and Chen et al. 2020, arXiv 2003.04297), the objective of FedMoCo v1 and v2.

Both directions: a query finds its key, the target encoder's projection of the other view, among a queue of former keys. The key encoder is
the target encoder, and stays with the client as the queue does. The rows of `options.METHODS` set what v1 and v2 differ in: the head (one
linear layer, or two), the temperature (0.07, 0.2) and the colour jitter, which the authors' code halves in v1. Their code also sets the key
encoder to the received one in each round (`--update both` here), and keeps v1's learning rate constant; neither is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models import Encoder, WithTarget


class MoCo(WithTarget):
    """Momentum contrast. temperature: the cosine similarities are divided by it. queue: how many keys, unit vectors, a client keeps."""

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float, queue: int = 4096):
        super().__init__(encoder, device)
        self.temperature, self.keys = temperature, []
        start = normalize(torch.randn(queue, encoder.width)).to(device)
        self.initial["queue"] = start.flatten()
        self.parts["queue"] = self.initial["queue"].clone()
        self.queue = self.parts["queue"].view(start.shape)

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return self.directions(self.direction, view1, view2)

    def direction(self, views: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        query, key = normalize(self.each(self.online.module, *views)), normalize(self.project(*others))
        self.keys.append(key)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], 1) / self.temperature
        return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        """A step as above; then the batch's keys replace the queue's oldest."""
        super().update(lr, momentum, weight_decay, ema_decay)
        self.queue.copy_(torch.cat([*self.keys, self.queue])[: len(self.queue)])
        self.keys.clear()
