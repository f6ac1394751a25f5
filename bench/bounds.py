"""What a step of training cannot do without: its convolutions and matrix products, their operations, and the bytes that they move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import training
from bench.timing import DEVICE
from methods.byol import BYOL
from models import Encoder
from runtime.device import StepGraph, keep_memory


def floor(encoder: str, count: int, batch_size: int) -> Callable[[], object]:
    """An epoch's convolutions and matrix products, one by one: online forwards and backwards on two views, target forwards."""
    keep_memory()
    objective, calls = BYOL(Encoder(encoder), DEVICE), []
    network, passes = objective.online.module, 1 if objective.one_pass else 2

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0].detach().clone(memory_format=torch.preserve_format), torch.randn_like(output)))

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    network(torch.rand(2 // passes * batch_size, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    of_target = set(network.encoder.modules())

    def step(_: Tensor) -> None:
        for k, (module, x, gradient) in enumerate(calls):
            for _ in range(passes):
                if module in of_target:
                    with torch.no_grad():
                        module(x)
                x = x.detach().requires_grad_(k > 0)  # nobody needs the gradient of the images
                torch.autograd.grad(module(x), [*module.parameters(), *[x] * (k > 0)], gradient)

    launcher = StepGraph(step, torch.Generator(DEVICE)) if DEVICE.type == "cuda" else nullcontext(step)

    def epoch() -> None:
        batch = torch.zeros((), device=DEVICE)  # that this step does not look at
        with launcher as run:
            for _ in range(count // batch_size):
                run(batch)

    return epoch


def operations(encoder: str) -> dict[str, float]:
    """Floating-point operations an image of a training step, a multiplication and an addition counted as two.

    Convolutions and matrix products only, on both views: the online network forwards and backwards, the target network forwards.
    """
    networks, views = BYOL(Encoder(encoder), torch.device("meta")), torch.empty(2, 2, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as target:
        networks.target.module(views[0])
    with FlopCounterMode(display=False) as forward:
        losses = [term() for term in networks.terms(*views, torch.empty(2, device="meta"), None)]
    with FlopCounterMode(display=False) as backward:
        for loss in losses:
            loss.backward()
    both = target.get_total_flops()  # of two images, which is one image's two views
    return {"target": both, "forward": forward.get_total_flops() / 2 - both, "backward": backward.get_total_flops() / 2}


class Traffic(TorchDispatchMode):
    """Counts the operations that compute, and the bytes of the tensors that they are given and of those that they return.

    A GPU moves more than that: BatchNorm reads its input twice, and a convolution may arrange its own anew.
    """

    views = {"view", "detach", "t", "transpose", "expand", "_unsafe_view", "alias", "slice", "select", "unsqueeze", "permute", "as_strided"}
    bytes = count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation._opname not in self.views and not operation._opname.startswith("empty"):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.count += 1
        return result


def traffic(encoder: str, batch_size: int, precision: str = "fp32") -> Traffic:
    """Counts a training step, without its views and its update. In bf16 the CPU computes it, since autocast knows no meta device."""
    device = torch.device("meta" if precision == "fp32" else "cpu")
    networks, views = BYOL(Encoder(encoder), device), torch.zeros(2, batch_size, 3, 32, 32, device=device)
    networks.update = lambda *_: None
    step = training.Step(networks, torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device), precision, lambda *_: views)
    with Traffic() as counted:
        step(torch.zeros(1, dtype=torch.int64, device=device))
    return counted
