"""Five clients' forward and backward passes as one batched network, against one client after the other: `python -m results.speed.vmap`.

The batched network is torch.func's: the parameters stacked, and `vmap` over the gradient of BYOL's loss, with B = 32. Printed are ms of
both ways, in turns, on one thread and on two, and how far their gradients differ, as a share of the gradients' norm, in float32 and in
float64.
"""

import copy
from functools import partial

import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from bench.timing import print_origin, time_ways
from models import Encoder, Online

CLIENTS, BATCH = 5, 32


def loss(online, target, view1, view2):
    """Mean squared distance of unit vectors, both ways (BYOL, eq. 2)."""
    with torch.no_grad():
        directions = target(view2), target(view1)
    return sum(2 - 2 * torch.cosine_similarity(online(v), d, dim=1).mean() for v, d in zip((view1, view2), directions, strict=True))


def without_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """The network without BatchNorm's running statistics: vmap cannot write them, and training does not read them."""
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return network


def case(name: str, dtype: torch.dtype):
    """The two ways for an encoder of that name; each returns every client's gradients, in one vector `[CLIENTS * P]`."""
    torch.manual_seed(0)
    onlines = [Online(Encoder(name), predictor=True).to(dtype) for _ in range(CLIENTS)]
    targets = [Encoder(name).to(dtype) for _ in range(CLIENTS)]
    views = [torch.rand(CLIENTS, BATCH, 3, 32, 32, dtype=dtype) for _ in range(2)]
    parameters, target_parameters = (stack_module_state(networks)[0] for networks in (onlines, targets))
    online, target = (without_statistics(copy.deepcopy(networks[0])) for networks in (onlines, targets))

    def client(parameters, target_parameters, *views):
        called = (partial(functional_call, online, parameters), partial(functional_call, target, target_parameters))
        return loss(*called, *views)

    batched_grad = vmap(grad(client))

    def after_another():
        turns = zip(onlines, targets, *views, strict=True)
        rows = [torch.autograd.grad(loss(o, t, *pair), list(o.parameters())) for o, t, *pair in turns]
        return torch.cat([torch.stack(tensors).flatten() for tensors in zip(*rows, strict=True)])

    def batched():
        gradients = batched_grad(parameters, target_parameters, *views)
        return torch.cat([gradients[name].flatten() for name, _ in onlines[0].named_parameters()])

    return {"one after the other": after_another, "batched": batched}


print_origin("results.speed.vmap", "5 to 20")
for name in ("tiny", "small"):
    for dtype in (torch.float32, torch.float64):
        want, got = (way() for way in case(name, dtype).values())
        print(f"{name}, {dtype}: the gradients differ by {(got - want).norm() / want.norm():.1e} of their norm")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for way, seconds in time_ways(case(name, torch.float32), 20, 10, "cpu").items():
            print(f"{name}, {threads} thread{'s' * (threads > 1)}, {way}: {seconds * 1e3:.0f} ms", flush=True)
