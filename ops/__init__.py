"""Operations over networks that are flattened into one vector each: fused C++ and CUDA kernels, with a twin in plain torch.

P is the number of floats in a network's vector, K the number of clients, L the number of segments: int64 `[L, 2]`, the
begin and end of each layer in the vector, ascending, without overlap. Floats outside every segment count towards no norm.
Segments may lie on the CPU or on the vectors' device; reading them from a GPU waits for it.

The kernels are built by `load`, or else by the first op (build.py). The environment variable FEDU_OPS says what happens: `auto` (the
default) builds, and falls back to reference.py with one warning where it cannot; `build` raises the reason; `reference` never builds.
Tensors of any other device than CPU and CUDA, such as `meta`, always take the reference.

All ops take contiguous float32 or float64 tensors, of one type and on one device, and raise ValueError for any other. Only `batch_norm`
has a gradient; the others refuse a tensor that requires one, except under `torch.no_grad()`. The same numbers give the same bits on any
number of threads or blocks, and NaN and Inf appear only in results that are computed from them.
"""

import os
import threading
import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import reference

__all__ = ["VIEW", "aggregate", "augment", "batch_norm", "ema_", "layer_norms", "load", "sgd_ema_", "weighted_mean"]

# The columns of `augment`'s draws. The box in pixels; flip and greyscale 0 or 1; factors, and hue's shift in turns; then the order of
# the four colour operations: 0 brightness, 1 contrast, 2 saturation, 3 hue.
VIEW = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "hue")
VIEW += ("first", "second", "third", "fourth", "greyscale")


def weighted_mean(clients: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Mean of the clients' vectors, `sum_k w_k x_k`, summed in the order k = 0..K-1 (FedAvg).

    clients: `[K, P]`, K >= 1. weights: `[K]`, of the same type, which the caller makes sum to 1. Returns `[P]`: out, or a new tensor.
    out: `[P]`, which must not overlap the others.
    """
    out = clients.new_empty(clients.shape[1:]) if out is None else out
    _implementation(clients).weighted_mean(clients, weights, out)
    return out


def aggregate(
    clients: Tensor, weights: Tensor, received: Tensor, segments: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the clients' vectors with each client's drift and spread by layer, all in one pass over the clients.

    clients, weights, out: as for `weighted_mean`. received: `[P]`, or `[K, P]` where clients started from different vectors.
    Returns mean `[P]`, drift `[K, L]` = `norm2(x_k - received_k)` and spread `[K, L]` = `norm2(x_k - mean)`,
    both given in float64 and right to 6e-7. The authors' divergence is the mean of a client's drift over the conv layers, the paper's the
    sum of its squares; FedEMA's paper measures the spread.

    Rows that do not fit the memory together may be aggregated in tiles: the mean so far is then the first row of the next tile, with
    weight 1. Mean and drift have the same bits for any tiles. The spread is from a tile's own mean; `layer_norms` gives it from the last.
    """
    out = clients.new_empty(clients.shape[1:]) if out is None else out
    drift, spread = _implementation(clients).aggregate(clients, weights, received, segments, out)
    return out, drift, spread


def layer_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """Per-layer distance `norm2(a - b)` of two vectors `[P]`: `[L]`, given in float64 and right to 6e-7."""
    return _implementation(a).layer_norms(a, b, segments)


def ema_(target: Tensor, online: Tensor, decay: float) -> Tensor:
    """Exponential moving average in place: `target <- decay target + (1 - decay) online` (BYOL, eq. 1). Returns target.

    target: `[P]` or `[K, P]`; online: of the same shape, target itself or elsewhere in memory. decay in [0, 1]; 0 and 1 are exact.
    """
    _implementation(target).ema_(target, online, decay)
    return target


def sgd_ema_(
    weight: Tensor, gradient: Tensor, target: Tensor | None, lr: float | Tensor, *, momentum: float, weight_decay: float, ema_decay: float
) -> None:
    """What follows backward() in a training step, in one pass over the memory and in place:

        weight   <- weight - lr gradient
        target   <- ema_decay target + (1 - ema_decay) weight[:T]
        gradient <- momentum gradient + weight_decay weight

    The gradient is then what the next backward() adds to, which makes this torch.optim.SGD with momentum; before the first it is
    `weight_decay weight`. weight, gradient: `[P]`; target: `[T]`, T <= P, or None; the three share no memory. lr: a number, or a
    float64 scalar `[]` beside the vectors, which a CUDA graph then reads anew at each replay. ema_decay as for `ema_`. On a CPU
    with AVX2 the bits are those of the same steps in plain torch.
    """
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=weight.device)
    _implementation(weight).sgd_ema_(weight, gradient, target, lr, momentum, weight_decay, ema_decay)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """One view of an image for each row of draws: crop and resize, flip, colour jitter, greyscale (SimCLR's, without blur).

    images: uint8 `[B, 3, H, W]`. draws: float32 `[N, 14]`, the columns of VIEW, N a multiple of B: view n is of image n mod B.
    Returns float32 `[N, 3, H, W]` in [0, 1]; the kernels agree with each other to the bit and with the reference on the CPU to 1e-5.
    """
    return _implementation(images).augment(images, draws)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, *,
    views: int = 1, momentum: float = 0.1, eps: float = 1e-5, relu: bool = False,
) -> Tensor:  # fmt: skip
    """BatchNorm in training mode, and the ReLU behind it, of views that lie one behind the other; the only op with a gradient.

    x: `[V B, C]` or `[V B, C, H, W]`, V views, each normalised by its own mean and variance. weight, bias: `[C]`, or None. The running
    statistics, `[C]` or None, follow in place, view after view: `r <- (1 - momentum) r + momentum s`, where the variance is the unbiased
    one. Returns y of x's shape. The kernel is for float32 and float64 on a CPU. On a GPU, in bf16 and under torch.compile, which fuses
    these operations itself, the reference computes it.
    """
    arguments = weight, bias, running_mean, running_var, views, momentum, eps, relu
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling() or not load():
        return reference.batch_norm(x, *arguments)
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
    return _BatchNorm.apply(x, *arguments) if torch.is_grad_enabled() else torch.ops.fedu.batch_norm(x, *arguments)[0]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *arguments):
        y, mean, inverse = torch.ops.fedu.batch_norm(x, weight, bias, *arguments)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.views, ctx.relu = arguments[2], arguments[-1]
        return y

    @staticmethod
    def backward(ctx, gradient):
        layout = torch.channels_last if gradient.ndim == 4 else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)
        of_x, of_weight, of_bias = torch.ops.fedu.batch_norm_backward(gradient, *ctx.saved_tensors, ctx.views, ctx.relu)
        return of_x, of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None, *[None] * 6


_lock = threading.Lock()
_fused: bool | None = None  # whether the library is loaded; None until an op needs to know


def _implementation(tensor: Tensor) -> ModuleType:
    """What has the ops for this tensor: the built library's namespace, or the reference."""
    return torch.ops.fedu if tensor.device.type in ("cpu", "cuda") and load() else reference


def load() -> bool:
    """Whether the kernels are there; the first call builds and loads them, and any outcome is remembered, so that no op pays twice.

    Raises ValueError for another FEDU_OPS than auto, build or reference, and with `build` what went wrong: BuildError or OSError.
    """
    global _fused
    if _fused is None:
        with _lock:
            if _fused is None:
                _fused = _load(os.environ.get("FEDU_OPS", "auto"))
    return _fused


# What torch.compiler.assume_constant_result sets, without its import of the compiler (2 s): the compiler then calls the function,
# which builds the library if need be, where it would otherwise break the graph at it.
load._dynamo_marked_constant = True


def _load(mode: str) -> bool:
    if mode not in ("auto", "build", "reference"):
        raise ValueError(f"FEDU_OPS must be auto, build or reference, got {mode!r}")
    if mode == "reference":
        return False
    try:
        from . import build

        build.load()
    except Exception as error:  # whatever went wrong, the results are the same without the library
        if mode == "build":
            raise
        summary, mend = getattr(error, "summary", f"{type(error).__name__}: {error}"), getattr(error, "mend", "see FEDU_OPS=build")
        warnings.warn(
            f"the fused ops cannot be used, and plain torch does their work slower: {summary}; to mend it, {mend}; "
            "FEDU_OPS=reference silences this",
            RuntimeWarning,
            stacklevel=5,
        )
        return False
    _register_shapes()
    return True


def _register_shapes() -> None:
    """Tell torch.compile and fake tensors each op's output: its shape and type."""

    @torch.library.register_fake("fedu::weighted_mean")
    def _(clients, weights, out):
        return None

    @torch.library.register_fake("fedu::aggregate")
    def _(clients, weights, received, segments, out):
        drift, spread = (clients.new_empty((len(clients), len(segments)), dtype=torch.float64) for _ in range(2))
        return drift, spread

    @torch.library.register_fake("fedu::layer_norms")
    def _(a, b, segments):
        return a.new_empty(len(segments), dtype=torch.float64)

    @torch.library.register_fake("fedu::augment")
    def _(images, draws):
        return draws.new_empty((len(draws), *images.shape[1:]))

    @torch.library.register_fake("fedu::batch_norm")
    def _(x, weight, bias, running_mean, running_var, views, momentum, eps, relu):
        return torch.empty_like(x), x.new_empty(views, x.shape[1]), x.new_empty(views, x.shape[1])

    @torch.library.register_fake("fedu::batch_norm_backward")
    def _(gradient, x, weight, bias, mean, inverse, views, relu):
        return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])

    @torch.library.register_fake("fedu::ema_")
    def _(target, online, decay):
        return None

    @torch.library.register_fake("fedu::sgd_ema_")
    def _(weight, gradient, target, lr, momentum, weight_decay, ema_decay):
        return None
