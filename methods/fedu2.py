"""FedU2 (Liao et al., CVPR 2024): BYOL with a regulariser at the client, FUR, and a rule at the server, EUA.

FUR pulls a batch's projections towards the uniform distribution on the unit sphere. It draws as many uniform points as the batch has and,
for each of 6 tangent points u, maps both sets to the tangent space at u (`log_u(x) = angle (x - cos u) / sin`, of the angle between u and
x), projects them on 6 normal directions, sorts each, and takes the mean squared difference; the result is the mean over the tangent points.
The loss is `BYOL + w (FUR(z1) + FUR(z2))` of the online projections, w = 0.01. The draws come from the step's generator.

EUA moves the server's parameters g along the direction in which all clients agree. With `d_k = g - x_k` and the weights w on the simplex
for which `|sum_k w_k 2 d_k / |d_k||` is least (MGDA: Frank-Wolfe on the Gram matrix from `w_k = n_k / n`, until the gap is below 1e-5 or
for 250 steps), `g <- g - lr_g sum_k w_k 2 d_k / |d_k|`. So a round moves the model by at most 2 lr_g, whatever the clients' steps.

This follows the equations and constants of the authors' code, and lr_g = 0.1 of its launcher, but for four points. FUR takes as many
tangent points there as the batch has, though its option says 6, and divides by 6. Its z are not of unit length there, so that the log map
is none. BatchNorm's statistics are averaged with weights n_k^(1/0.1) there, which are nearly the largest client's, and here n_k / n. The
whole network is exchanged there; here the target stays with its client as in FedU, so that the methods differ in FUR and EUA only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods.byol import BYOL, distance
from models import Encoder
from runtime.uploads import COLUMNS

if TYPE_CHECKING:
    from federation import Server
    from runtime.uploads import Uploads

POINTS = DIRECTIONS = 6
GAP, STEPS = 1e-5, 250


class FedU2(BYOL):
    """BYOL with FUR. uniformity: its weight w. server_lr: lr_g, which the server's rule reads. The others are BYOL's."""

    def __init__(
        self, encoder: Encoder, device: torch.device, predictor: bool = True, stop_gradient: bool = True, uniformity: float = 0.01,
        server_lr: float = 0.1,
    ):  # fmt: skip
        super().__init__(encoder, device, predictor, stop_gradient)
        self.uniformity, self.server_lr = uniformity, server_lr

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        return self.directions(partial(self.regularised, generator), view1, view2)

    def regularised(self, generator: torch.Generator | None, views: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        targets, online = self.project(*others), self.online.module
        projections = self.each(online.encoder, *views)
        predictions = self.each(online.predictor, *projections.chunk(len(views)))
        from_uniform = sum(distance_from_uniform(z, generator) for z in projections.chunk(len(views))) / len(views)
        return distance(predictions, targets) + self.uniformity * from_uniform


def distance_from_uniform(projections: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """FUR of projections `[B, d]`: `[]`."""
    batch, width = projections.shape
    shapes = (POINTS, width), (batch, width), (POINTS, width, DIRECTIONS)
    points, uniform, directions = (torch.randn(shape, generator=generator, device=projections.device) for shape in shapes)
    points, both = normalize(points), torch.stack([normalize(projections.float()), normalize(uniform)])  # [6, d], [2, B, d]
    cosines = (both @ points.T).float().movedim(2, 0)[..., None]  # [6, 2, B, 1]
    sines = (1 - cosines.square()).clamp(min=1e-12).sqrt()
    across = (both @ directions[:, None]).float() - cosines * (points[:, None] @ directions).float()[:, None]  # [6, 2, B, 6]
    mapped, drawn = (torch.atan2(sines, cosines) / sines * across).sort(2).values.unbind(1)
    return (mapped - drawn).square().mean()


def move_in_unison(server: Server, uploads: Uploads, networks: FedU2, shared: list[Tensor]) -> Tensor:
    """EUA, the server's rule, see above: `[P]`. Raises InputError if the uploads were aggregated in tiles."""
    rows, parameters = uploads.rows(), networks.online.param_slice
    model = uploads.sum()  # of which BatchNorm's statistics stay
    pieces = list(zip(rows[:, parameters].split(COLUMNS, 1), server.model[parameters].split(COLUMNS), strict=True))
    gram = sum((delta @ delta.T).double() for delta in (former - row for row, former in pieces)).cpu()
    lengths = gram.diagonal().sqrt()
    scale = torch.where(lengths > 0, 2 / lengths, 0)
    shares = torch.tensor([weight for weight in uploads.weights if weight], dtype=torch.float64)  # an outlier's, which has no row, is 0
    weights = min_norm_weights(scale[:, None] * gram * scale, shares / shares.sum())
    factors = (networks.server_lr * weights * scale).to(rows)
    model[parameters] = torch.cat([former - factors @ (former - row) for row, former in pieces])
    return model


def min_norm_weights(gram: Tensor, weights: Tensor) -> Tensor:
    """The weights `[K]` on the simplex for which `w' M w` is least: the point of the vectors' convex hull that is nearest to zero.

    gram: M, the vectors' products, `[K, K]`. weights: where to start.
    """
    for _ in range(STEPS):
        products = gram @ weights
        norm, best = weights @ products, products.argmin()
        gap = norm - products[best]
        if gap < GAP:
            break
        step = (gap / (norm - 2 * products[best] + gram[best, best])).clamp(max=1)
        weights = (1 - step) * weights
        weights[best] += step
    return weights
