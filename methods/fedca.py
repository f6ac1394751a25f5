"""FedCA (Zhang et al. 2020, arXiv 2010.08982), made from its abstract, since there is no public code.

From the abstract: a dictionary of all clients' representations, shared through the server, keeps their spaces consistent, and an alignment
module draws each client to a base model trained on public data. Our choices: the dictionary holds the newest unit-length projections of
each client, which are further negatives of NT-Xent (see simclr.py) in the next round; alignment is `mean(1 - cos(f(x), base(x)))` on public
images, unaugmented and as many as the batch has, with weight 1; the base model is SimCLR's on these images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from methods.simclr import SimCLR, nt_xent
from models import Encoder, Objective, extract_features

if TYPE_CHECKING:
    from federation import Server
    from runtime.uploads import Uploads


class FedCA(SimCLR):
    """NT-Xent with the dictionary, and the alignment. dictionary: how many representations all clients of a round share."""

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float = 0.07, dictionary: int = 4096):
        super().__init__(encoder, device, temperature)
        self.newest = torch.zeros(dictionary, encoder.width, device=device)  # rows of zeros are not filled yet
        self.num_clients = 1
        self.public = self.base = torch.empty(0, device=device)

    def prepare(self, public: Tensor, train: Callable[[Objective, Tensor], None]) -> None:
        """Train the base model on the public images, `[N, 3, S, S]`."""
        base = SimCLR(copy.deepcopy(self.online.module.encoder), public.device, self.temperature)
        train(base, public)
        self.align(public, extract_features(base.online.module, public).clone())

    def align(self, public: Tensor, base: Tensor) -> None:
        """public: uint8 `[N, 3, S, S]`; base: the base model's projections of them, `[N, d]`."""
        self.public, self.base = public, base

    def begin(self, client_id: int, num_clients: int) -> None:
        self.num_clients = num_clients

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return [*super().terms(view1, view2, batch, generator), partial(self.alignment, batch % len(self.public))]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        z = normalize(self.online.module(torch.cat([view1, view2])))
        self.newest.copy_(torch.cat([z.detach(), self.newest])[: len(self.newest)])
        return nt_xent(z, self.temperature, self.shared if len(self.shared) else None)

    def alignment(self, chosen: Tensor) -> Tensor:
        images = self.public[chosen].float().div_(255).contiguous(memory_format=torch.channels_last)
        return (1 - cosine_similarity(self.online.module(images), self.base[chosen])).mean()

    def take_shared(self) -> Tensor:
        """The client's part of the next dictionary, of which each client of the round has an equal one."""
        newest = self.newest[self.newest.any(1)][: len(self.newest) // self.num_clients]
        self.newest.zero_()
        return newest


def share_dictionary(server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """The server's rule: FedAvg, and the clients' projections become the dictionary that they get with the next model."""
    server.state["shared"] = torch.cat(shared)
    return uploads.sum()
