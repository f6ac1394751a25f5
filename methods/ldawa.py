"""L-DAWA (Rehman et al., ICCV 2023, arXiv 2307.07393): a server's rule that weighs each layer of a client by its angle to the server's.

For each client k and each tensor l, `c_kl = min(1, cos(x_kl, g_l))`, where x is the upload and g the server's model before the round; then
`g_l <- (1/K) sum_k c_kl x_kl`. The clients count equally, and the weights are not made to sum to 1: the model shrinks by the mean cosine.

c is 1 for BatchNorm's running statistics, which the authors' code weighs like any other tensor, and where a norm is 0, where their code
divides by the norm of g all the same. The re-implementation in FedU2's repository, which takes one cosine for the whole encoder, one for
the projector and one for the predictor, is not followed. The authors train SimCLR and Barlow Twins; here it is BYOL, as in FedU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from federation import Server
    from models import Objective
    from runtime.uploads import Uploads


def weigh_by_angle(server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """The server's rule, see above: `[P]`. Raises InputError if the uploads were aggregated in tiles."""
    rows, mean, parameters = uploads.rows(), torch.empty_like(server.model), networks.online.param_slice
    for statistics in (slice(0, parameters.start), slice(parameters.stop, None)):
        mean[statistics] = rows[:, statistics].mean(0)
    for _, begin, end in networks.online.segments:
        x, g = rows[:, begin:end], server.model[begin:end]
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g)
        cosines = torch.where(norms > 0, x @ g / norms, 1).clamp(max=1)
        torch.mv(x.T, cosines / len(x), out=mean[begin:end])
    return mean
