"""Operations over networks that are flattened into one vector each.

P is the number of floats in a network's vector, K the number of clients, L the number of segments: int64 `[L, 2]`, the
begin and end of each layer in the vector, ascending, without overlap. Floats outside every segment count towards no norm.
"""

from torch import Tensor

from . import reference


def weighted_mean(clients: Tensor, weights: Tensor) -> Tensor:
    """Mean of the clients' vectors, `sum_k w_k x_k`, summed in the order k = 0..K-1 (FedAvg; METHOD step 3).

    clients: float32 or float64 `[K, P]`, K >= 1. weights: `[K]` of the same dtype, summing to 1. Returns `[P]`.
    """
    return reference.weighted_mean(clients, weights)


def aggregate(clients: Tensor, weights: Tensor, received: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the clients' vectors with, for each client and layer, its drift and its spread.

    clients: `[K, P]`. weights: `[K]`, summing to 1. received: `[P]`, or `[K, P]` where clients started from different vectors.
    Returns mean `[P]`, drift `[K, L]` = `norm2(x_k - received_k)` and spread `[K, L]` = `norm2(x_k - mean)`, both float64.
    """
    return reference.aggregate(clients, weights, received, segments)


def layer_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """Per-layer distance `norm2(a - b)` of two vectors `[P]`; returns float64 `[L]`."""
    return reference.layer_norms(a, b, segments)


def ema_(target: Tensor, online: Tensor, decay: float) -> Tensor:
    """Exponential moving average in place: `target <- decay target + (1 - decay) online` (BYOL, eq. 1).

    target: `[P]` or `[K, P]`; online: of the same shape. decay in [0, 1]; 0 and 1 are exact. Returns target.
    """
    return reference.ema_(target, online, decay)
