"""Counts the memory that a training step moves, as it is and in other ways: `python -m results.speed.traffic`.

step            all passes, but for views and update, operation by operation (`traffic` of bench/training.py)
--compile       the same with --compile: what inductor counts for its fused loops and for convolutions and products
target, twice   of these the target network's passes: one for each view
target, once    one pass for both views, in which BatchNorm takes each view by itself and its results are joined
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.training import Traffic, traffic
from methods.byol import BYOL
from models import Encoder
from runtime.run import describe_code


def target_traffic(encoder: str, batch_size: int, once: bool) -> Traffic:
    target = BYOL(Encoder(encoder), torch.device("meta")).target.module
    views = torch.zeros(2, batch_size, 3, 32, 32, device="meta")
    if once:
        for m in target.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.forward = view_by_view(m)
    with torch.no_grad(), Traffic() as counted:
        for x in [torch.cat([*views])] if once else views:
            target(x)
    return counted


def view_by_view(norm: nn.Module):
    forward = norm.forward
    return lambda x: torch.cat([forward(view) for view in x.chunk(2)])


def compiled_bytes(encoder: str, batch_size: int, precision: str) -> int:
    """Of both directions: each network is compiled in the first one, which is differentiated."""
    from torch._inductor import metrics

    torch._logging.set_logs(inductor_metrics=True)  # without it nothing is counted
    metrics.reset()
    torch._dynamo.reset()
    networks = BYOL(Encoder(encoder), torch.device("cpu"))
    networks.compile()
    view1, view2 = torch.zeros(2, batch_size, 3, 32, 32)
    views: list[Tensor] = [view.contiguous(memory_format=torch.channels_last) for view in (view1, view2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = networks.terms(*views, torch.zeros(batch_size), None)[0]()
    loss.backward()
    return 2 * metrics.num_bytes_accessed


def main() -> None:
    print("$ python -m results.speed.traffic")
    print(f"torch {torch.__version__}, commit {describe_code()['commit']}", flush=True)
    for encoder, batch_size in (("small", 64), ("resnet18", 128)):
        for precision in ("fp32", "bf16"):
            what, counted = f"{encoder}, B = {batch_size}, {precision}", traffic(encoder, batch_size, precision)
            show(what, "step", counted.bytes, counted.count)
            show(what, "--compile", compiled_bytes(encoder, batch_size, precision))
        for way in ("target, twice", "target, once"):
            counted = target_traffic(encoder, batch_size, once=way == "target, once")
            show(f"{encoder}, B = {batch_size}, fp32", way, counted.bytes, counted.count)


def show(what: str, way: str, moved: int, operations: int | None = None) -> None:
    print(f"{what:26} {way:14} {moved / 1e9:6.2f} GB" + (f" {operations:5} operations" if operations else ""), flush=True)


if __name__ == "__main__":
    main()
