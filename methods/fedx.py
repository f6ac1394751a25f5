"""FedX (Han et al., ECCV 2022, arXiv 2207.09158): contrast and relations, each within the client's model and to the received one.

p and q are projections and predictions, t the projections of the received model, which stays as it was (eval mode, no gradient), all at
unit length; 1 and 2 are the two views of a batch, and r is one view of another batch of the client's images, drawn in its own order:

    loss = NT(p1, p2) + NT(q1, t2) + JS(q1, q2; tr) + JS(p1, p2; pr)

NT is NT-Xent (simclr.py). `JS(a, b; r) = (KL(m || s(a)) + KL(m || s(b))) / 2`, where `s(a) = softmax(a r^T / T)`, `[B, B]`, is how an image
relates to the others, and `m = (t(a) + t(b)) / 2` with t as s but of the target temperature. KL is the mean over the batch; the gradient
flows through m too. Both temperatures are 0.1 (a later re-implementation has 0.01 for m). All 3B views go through the network in one
forward pass. Projector and predictor are Linear - ReLU - Linear of width 256. The server averages all.

B is `--batch-size`, of each of the two batches; the authors' code gives each half of its option. Their recipe, SGD of learning rate 0.01
and weight decay 1e-5, E = 10, and their views are not followed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from methods.simclr import nt_xent
from models import Encoder, Flat, Objective


class FedX(Objective):
    """temperature: T of NT-Xent and of s. target_temperature: of m."""

    batches = 2

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float = 0.1, target_temperature: float = 0.1):
        teacher = copy.deepcopy(encoder).to(device)
        super().__init__(encoder, device, predictor=True)
        self.teacher = Flat(teacher.eval(), trained=False)
        self.others.append(self.teacher)
        self.temperature, self.target_temperature = temperature, target_temperature

    def begin(self, client_id: int, num_clients: int) -> None:
        """The teacher is the received model."""
        self.teacher.vector.copy_(self.parts["encoder"])

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, torch.cat([view1, view2, self.view(batch[1])]))]

    def loss(self, views: Tensor) -> Tensor:
        projections = self.online.module.encoder(views)
        p1, p2, pr = normalize(projections.float()).chunk(3)
        q1, q2, _ = normalize(self.online.module.predictor(projections).float()).chunk(3)
        with torch.no_grad():
            t2, tr = normalize(self.teacher.module(views[len(p1) :]).float()).chunk(2)
        contrast = nt_xent(torch.cat([p1, p2]), self.temperature) + nt_xent(torch.cat([q1, t2]), self.temperature)
        return contrast + self.relations(q1, q2, tr) + self.relations(p1, p2, pr)

    def relations(self, a: Tensor, b: Tensor, others: Tensor) -> Tensor:
        """JS of unit vectors `[B, d]`. others: `[B, d]`, what a and b relate to."""
        cosines = [(x @ others.T).float() for x in (a, b)]
        m = torch.logaddexp(*(log_softmax(c / self.target_temperature, 1) for c in cosines)) - math.log(2)
        return sum(kl_div(log_softmax(c / self.temperature, 1), m, reduction="batchmean", log_target=True) for c in cosines) / 2
