"""Orchestra (Lubana et al., ICML 2022, arXiv 2205.11506): clients predict which cluster of all clients' images theirs belong to.

z are projections at unit length: z1 of the first view by the target network, z2 of the second by the online one. C are the server's global
centroids, T the temperature, 0.1, and x3 a third view, turned by an angle of 0, 90, 180 or 270 degrees that a linear head names:

    loss = - mean_i sum_j softmax(z1 C^T / T)_ij log softmax(z2 C^T / T)_ij + CE(head(f(x3)), angle)

The target moves before its forward pass, with a decay of 0.996, and is exchanged and averaged as the online network and the head are, so
that clients keep nothing between rounds. A client remembers the newest 128 of its z1 and sends 16 local centroids of them: k-means with
clusters of equal size, by 5 assignments of Sinkhorn and Knopp. The server makes 128 global centroids of all that it gets, by 500 steps of
SGD on `- mean cos(SK(Z C^T), softmax(Z C^T / T))`. The local centroids leave the client. The run's first round trains nothing:
it fills the memories, of which the first global centroids are made. A memory is emptied when its round ends.

Not followed: where the memory is filled (the authors do that before the training), the draws of k-means (a client's batches come in random
order, so its centroids start as the newest rows, and an empty cluster takes one of the oldest), biases (ours stand before BatchNorm,
which subtracts them), and the authors' views and recipe: crops of 0.5 to 1, colour jitter (0.4, 0.4, 0.2, 0.1), blur, lr 0.003, B = 16,
E = 10, 100 clients of which half take part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, one_hot

import ops
from models import Encoder, Flat, Objective

if TYPE_CHECKING:
    from federation import Server
    from runtime.uploads import Uploads

ITERATIONS = 500  # of SGD, for the global centroids


class Orchestra(Objective):
    """clusters: of the server. local_clusters: of a client. memory: how many projections it clusters. target_decay: of the target."""

    def __init__(
        self, encoder: Encoder, device: torch.device, temperature: float = 0.1, clusters: int = 128, local_clusters: int = 16,
        memory: int = 128, target_decay: float = 0.996,
    ):  # fmt: skip
        self.target = Flat(copy.deepcopy(encoder).to(device), trained=False)
        super().__init__(encoder, device, predictor=(4,), exchanged=self.target)
        self.temperature, self.local_clusters, self.target_decay = temperature, local_clusters, target_decay
        self.first_centroids = normalize(torch.randn(clusters, encoder.width)).to(device)
        self.memory = torch.zeros(memory, encoder.width, device=device)  # the newest first; rows of zeros are not filled yet

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        with torch.no_grad():
            online = self.parts["encoder"][self.param_slices["encoder"]]
            ops.ema_(self.target.vector[self.target.param_slice], online, self.target_decay)
            z1 = normalize(self.target.module(view1).float())
            self.memory.copy_(torch.cat([z1, self.memory])[: len(self.memory)])
        if not len(self.shared):  # the first round
            return []
        angle = torch.randint(4, (len(batch),), generator=generator, device=batch.device)
        return [partial(self.clustering, z1, view2), partial(self.rotation, turned(self.view(batch), angle), angle)]

    def clustering(self, z1: Tensor, view2: Tensor) -> Tensor:
        z2 = normalize(self.online.module.encoder(view2).float())
        expected, predicted = ((z @ self.shared.T).float() / self.temperature for z in (z1, z2))
        return cross_entropy(predicted, expected.softmax(1))

    def rotation(self, view3: Tensor, angle: Tensor) -> Tensor:
        return cross_entropy(self.online.module(view3).float(), angle)

    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        """A step of SGD, and none in the first round; the target has moved before."""
        if len(self.shared):
            super().update(lr, momentum, weight_decay, ema_decay)

    def take_shared(self) -> Tensor:
        """The client's local centroids, at most `local_clusters` unit vectors; the memory is cleared."""
        centroids = local_centroids(self.memory[self.memory.any(1)], self.local_clusters)
        self.memory.zero_()
        return centroids


def turned(images: Tensor, angle: Tensor) -> Tensor:
    """Images `[B, C, S, S]`, each turned by its angle `[B]`, in quarters of a turn."""
    turns = torch.stack([images.rot90(quarters, (2, 3)) for quarters in range(4)])
    return turns[angle, torch.arange(len(angle), device=angle.device)].contiguous(memory_format=torch.channels_last)


def sinkhorn_knopp(similarities: Tensor) -> Tensor:
    """Assignments `[N, K]` whose rows sum to 1 and whose columns to nearly N / K, of similarities `[N, K]`, at a temperature of 1 / 25."""
    n, k = similarities.shape
    balanced = (25 * similarities).softmax(1)
    for _ in range(10):
        balanced = balanced / balanced.sum(0) * (n / k)
        balanced = balanced / balanced.sum(1, keepdim=True)
    return balanced


def local_centroids(z: Tensor, count: int) -> Tensor:
    """At most `count` unit vectors, the centroids of unit vectors `[N, d]` that lie in random order."""
    count = min(count, len(z))
    centroids = z[:count]
    for _ in range(5):
        members = one_hot(sinkhorn_knopp(z @ centroids.T).argmax(1), count).to(z)
        centroids = normalize(torch.where(members.any(0)[:, None], members.T @ z, z[-count:]))
    return centroids


def global_centroids(z: Tensor, start: Tensor, temperature: float) -> Tensor:
    """The server's centroids `[K, d]`, at unit length, of all clients' `[N, d]`. start: those of before."""
    centroids = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([centroids], 0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(ITERATIONS):
        similarities = z @ centroids.T
        assigned = sinkhorn_knopp(similarities.detach())
        optimizer.zero_grad()
        (-cosine_similarity(assigned, (similarities / temperature).softmax(1)).mean()).backward()
        optimizer.step()
        with torch.no_grad():
            centroids.copy_(normalize(centroids))
    return centroids.detach()


def cluster(server: Server, uploads: Uploads, networks: Orchestra, shared: list[Tensor]) -> Tensor:
    """The server's rule: FedAvg, and the global centroids of all local ones, which clients get with the next model."""
    start = server.state.get("shared", networks.first_centroids)
    server.state["shared"] = global_centroids(torch.cat(shared), start, networks.temperature)
    return uploads.sum()
