"""Each op in plain torch: its specification, its fallback, and the oracle of its tests. Arguments are the registered op's.

Every refusal is a ValueError of one sentence that names the argument, what it must be and what it is; fused.cpp has the same ones.
"""

import torch
from torch import Tensor


def weighted_mean(clients: Tensor, weights: Tensor, out: Tensor) -> None:
    """Mean of the clients' vectors, `sum_k w_k x_k`, to out; see `ops.weighted_mean`."""
    _check_clients(clients, weights)
    _check_out(out, clients, weights)
    _write_mean(clients, weights, out)


def aggregate(clients: Tensor, weights: Tensor, received: Tensor, segments: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean to out, and each client's drift and spread by layer; see `ops.aggregate`."""
    _check_clients(clients, weights)
    _check_like("received", received, "clients", clients)
    if received.shape not in (clients.shape, clients.shape[1:]):
        raise ValueError(f"received must have shape {list(clients.shape[1:])} or {list(clients.shape)}, got {list(received.shape)}")
    _check_segments(segments, clients.shape[1])
    _check_out(out, clients, weights)
    _check_apart("out", out, "received", received)
    _write_mean(clients, weights, out)
    drift = torch.stack([_layer_norms(row, start, segments) for row, start in zip(clients, received.expand_as(clients), strict=True)])
    spread = torch.stack([_layer_norms(row, out, segments) for row in clients])
    return drift, spread


def layer_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    """Per-layer distance `norm2(a - b)`; see `ops.layer_norms`."""
    _check_leader("a", a)
    if a.dim() != 1:
        raise ValueError(f"a must have shape [P], got {list(a.shape)}")
    _check_like("b", b, "a", a)
    _check_shape("b", b, a.shape)
    _check_segments(segments, len(a))
    return _layer_norms(a, b, segments)


def ema_(target: Tensor, online: Tensor, decay: float) -> Tensor:
    """`target <- decay target + (1 - decay) online`, in place; see `ops.ema_`."""
    _check_leader("target", target)
    if target.dim() not in (1, 2):
        raise ValueError(f"target must have shape [P] or [K, P], got {list(target.shape)}")
    _check_like("online", online, "target", target)
    _check_shape("online", online, target.shape)
    _check_decay("decay", decay)
    if offset := _begins_after(online, target):
        raise ValueError(f"online must be target's own memory or share none with it, got one that begins {offset} bytes after it")
    _average(target, online, decay)
    return target


def sgd_ema_(
    weight: Tensor, gradient: Tensor, target: Tensor | None, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float
) -> None:
    """A step of SGD and of the moving average of its weights, in place; see `ops.sgd_ema_`."""
    _check_leader("weight", weight)
    if weight.dim() != 1:
        raise ValueError(f"weight must have shape [P], got {list(weight.shape)}")
    _check_like("gradient", gradient, "weight", weight)
    _check_shape("gradient", gradient, weight.shape)
    _check_apart("gradient", gradient, "weight", weight)
    if target is not None:
        _check_like("target", target, "weight", weight)
        if target.dim() != 1 or len(target) > len(weight):
            raise ValueError(f"target must have shape [T] with T <= {len(weight)}, got {list(target.shape)}")
        _check_apart("target", target, "weight", weight)
        _check_apart("target", target, "gradient", gradient)
    if lr.dtype != torch.float64 or lr.dim() or lr.device != weight.device:
        want, got = f"a float64 scalar on {weight.device} like weight", f"{_dtype(lr)} of shape {list(lr.shape)} on {lr.device}"
        raise ValueError(f"lr must be {want}, got {got}")
    _check_decay("ema_decay", ema_decay)
    weight.addcmul_(gradient, lr.to(weight.dtype), value=-1)
    gradient.mul_(momentum).add_(weight, alpha=weight_decay)
    if target is not None:
        _average(target, weight[: len(target)], ema_decay)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """One view of an image for each row of draws; see `ops.augment`.

    Every sample goes through all operations, those that it was not drawn for with a neutral amount: fixed shapes, and no wait for a GPU.
    """
    _check_images(images, draws)
    x = (images.float() / 255).repeat(len(draws) // max(len(images), 1), 1, 1, 1)
    box, flip, factors, shift, order, grey = draws.split([4, 1, 3, 1, 4, 1], dim=1)
    x = _resized_crop(x, *box.unbind(1), flip=flip[:, 0] != 0)
    x = _color_jitter(x, factors, shift[:, 0], order.long())
    return _blend(x, _luma(x), 1 - grey[:, 0])


def _average(target: Tensor, online: Tensor, decay: float) -> None:
    if decay == 1:  # exact even where a NaN or an Inf times 0 would be NaN
        return
    if decay == 0:
        target.copy_(online)
        return
    share = (1 - decay) * online  # before target changes: online may be target itself
    target.mul_(decay).add_(share)


def _write_mean(clients: Tensor, weights: Tensor, out: Tensor) -> None:
    torch.mul(clients[0], weights[0], out=out)
    for row, weight in zip(clients[1:], weights[1:], strict=True):  # in the order k = 0..K-1: the sum's rounding depends on it
        out.add_(row * weight)


def _layer_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    if a.is_meta or not len(segments):  # a meta tensor has a shape to give and no numbers
        return a.new_empty(len(segments), dtype=torch.float64)
    # float64 sums: over millions of float32 squares, a float32 sum is off in the third digit
    return torch.stack([torch.linalg.vector_norm(a[begin:end].double() - b[begin:end].double()) for begin, end in segments.tolist()])


def _resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """Cut out each sample's box, enlarge it bilinearly to the whole image, and mirror it where `flip`.

    Interpolation is linear in the pixels of a row and of a column, so it is one small matrix on each side of the image.
    """
    rows, columns = _hat_weights(x.shape[2], top, height), _hat_weights(x.shape[3], left, width)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return torch.matmul(torch.matmul(rows[:, None], x), columns[:, None].mT)


def _hat_weights(size: int, begin: Tensor, length: Tensor) -> Tensor:
    """Bilinear weights `[B, size, size]` (output pixel, input pixel) that stretch [begin, begin + length) over `size` pixels."""
    pixel = torch.arange(size, device=begin.device, dtype=torch.float32)
    source = (pixel + 0.5) * (length / size)[:, None] - 0.5  # pixel centres, as torchvision's interpolation has them
    source = begin[:, None] + torch.minimum(source.clamp(min=0), length[:, None] - 1)  # never looks beyond the box
    return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)


def _color_jitter(x: Tensor, factors: Tensor, shift: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation (factors `[B, 3]`) and hue (shift `[B]`) in each sample's own order `[B, 4]`.

    Hue is by far the dearest operation, so it is done once for the whole batch, with each sample's earlier blends before it and its
    later ones after it.
    """
    is_hue = (order == 3).int()
    hue_at, order = is_hue.argmax(1), order.gather(1, is_hue.argsort(dim=1, stable=True))[:, :3]
    factors = factors.gather(1, order)
    for earlier in (True, False):
        for slot in range(3):
            kind, factor = order[:, slot, None, None, None], factors[:, slot]
            base = torch.where(kind == 0, 0.0, torch.where(kind == 1, (luma := _luma(x)).mean((2, 3), keepdim=True), luma))
            x = _blend(x, base, torch.where((slot < hue_at) == earlier, factor, 1.0))
        x = _adjust_hue(x, shift) if earlier else x
    return x


def _blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """`factor x + (1 - factor) base`, clamped to [0, 1]: brightness, contrast, saturation and greyscale differ only in `base`."""
    factor = factor[:, None, None, None]
    return torch.addcmul(base * (1 - factor), x, factor).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    """Luma `[B, 1, H, W]` by ITU-R 601-2, as PIL and torchvision compute it."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def _adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns in HSV space; value and chroma stay, so the way back is one formula for the three channels."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    turned = sixths + 6 * shift[:, None, None]
    k = torch.stack([turned + 5, turned + 3, turned + 1], 1).remainder(6)  # red, green, blue
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _check_leader(name: str, t: Tensor) -> None:
    """The first vector argument; the others are held against it."""
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {_dtype(t)}")
    _check_plain(name, t)


def _check_like(name: str, t: Tensor, leader_name: str, leader: Tensor) -> None:
    if t.dtype != leader.dtype or t.device != leader.device:
        want, got = f"{_dtype(leader)} on {leader.device}", f"{_dtype(t)} on {t.device}"
        raise ValueError(f"{name} must be {want} like {leader_name}, got {got}")
    _check_plain(name, t)


def _check_plain(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())} for shape {list(t.shape)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad, pass {name}.detach()")


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, views: int,
    momentum: float, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """BatchNorm of each view by itself, and the ReLU behind it; see `ops.batch_norm`."""
    parts = [torch.batch_norm(part, weight, bias, running_mean, running_var, True, momentum, eps, True) for part in x.chunk(views)]
    y = torch.cat(parts) if views > 1 else parts[0]
    return y.relu_() if relu else y


def _check_shape(name: str, t: Tensor, shape: torch.Size) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")


def _check_decay(name: str, decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {decay:g}")


def _check_clients(clients: Tensor, weights: Tensor) -> None:
    _check_leader("clients", clients)
    if clients.dim() != 2 or len(clients) == 0:
        raise ValueError(f"clients must have shape [K, P] with K >= 1, got {list(clients.shape)}")
    _check_like("weights", weights, "clients", clients)
    _check_shape("weights", weights, clients.shape[:1])


def _check_out(out: Tensor, clients: Tensor, weights: Tensor) -> None:
    _check_like("out", out, "clients", clients)
    _check_shape("out", out, clients.shape[1:])
    _check_apart("out", out, "clients", clients)
    _check_apart("out", out, "weights", weights)


def _check_apart(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if (offset := _begins_after(t, other)) is not None:
        raise ValueError(f"{name} must share no memory with {other_name}, got one that begins {offset} bytes after it")


def _begins_after(t: Tensor, other: Tensor) -> int | None:
    """How many bytes after other's begin t begins, where they share memory."""
    offset = (t.storage_offset() - other.storage_offset()) * t.element_size()
    same = t.untyped_storage()._cdata == other.untyped_storage()._cdata
    return offset if same and t.nbytes and -t.nbytes < offset < other.nbytes else None


def _check_segments(segments: Tensor, size: int) -> None:
    if segments.dtype != torch.int64 or segments.dim() != 2 or segments.shape[1] != 2:
        raise ValueError(f"segments must be int64 of shape [L, 2], got {_dtype(segments)} of shape {list(segments.shape)}")
    at = 0
    for layer, (begin, end) in enumerate([] if segments.is_meta else segments.tolist()):
        if not at <= begin <= end <= size:
            inside = f"[{at}, {size}], after the one before and inside the vector"
            raise ValueError(f"segment {layer} must lie in {inside}, got [{begin}, {end}]")
        at = end


def _check_images(images: Tensor, draws: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape [B, 3, H, W], got {_dtype(images)} of shape {list(images.shape)}")
    _check_plain("images", images)
    if draws.dtype != torch.float32 or draws.device != images.device:
        raise ValueError(f"draws must be float32 on {images.device} like images, got {_dtype(draws)} on {draws.device}")
    _check_plain("draws", draws)
    if draws.dim() != 2 or draws.shape[1] != 14 or (len(draws) % len(images) if len(images) else len(draws)):
        raise ValueError(f"draws must have shape [N, 14] with N a multiple of {len(images)} images, got {list(draws.shape)}")
    height, width = images.shape[2:]
    if height * width > 2**28:
        raise ValueError(f"images must have at most 2^28 pixels, got {height} x {width}")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
