"""Times each op against the other ways to the same result: `python -m bench.ops`.

One table, medians of interleaved repetitions. `x` is that way's time over the op's: above 1, the op is faster. GB/s counts the bytes
that the op must move; `copy` and `read` are the shares of the bandwidth of a plain `copy_` of a vector and of a plain sum over the
clients. Both are timed in turns with the op, for the bandwidth of a virtual machine halves and doubles within a minute. `error` is the
worst relative error of the norms against float64. The ways: ours; the same with `out=`; `reference` (FEDU_OPS=reference); `authors`, one
tensor of a state dict at a time and `torch.dist`; `foreach`, `torch._foreach_*` over the same tensors; the best plain torch over flat
vectors; and for sgd_ema_ `separate`, the four passes of torch and `ema_` that it replaces.

`round` is the server's work in one round on the whole online network, ResNet-18 with projector and predictor: `matrix`, one call on the
uploads [K, P] with `out=`, against `folded`, each upload stacked with the sum so far and aggregated, as it came. Bytes are what each
reads and writes in the vectors. Of 50 clients it takes 8 GB.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import ops
from bench.timing import print_origin, time_ways
from runtime.cli import Parser, number


def resnet18() -> list[tuple[str, int]]:
    """Names and sizes of the tensors of the paper's encoder: CIFAR ResNet-18 with its projector, 21,668,928 floats."""
    tensors = [("conv", 3 * 64 * 9), ("bn", 64), ("bn", 64)]
    width = 64
    for out in (64, 64, 128, 128, 256, 256, 512, 512):
        tensors += [("conv", width * out * 9), ("bn", out), ("bn", out), ("conv", out * out * 9), ("bn", out), ("bn", out)]
        if out != width:
            tensors += [("shortcut", width * out), ("bn", out), ("bn", out)]
        width = out
    return tensors + [("linear", 512 * 4096), *[("bn", 4096)] * 3, ("linear", 4096 * 2048), ("bn", 2048)]


def online() -> list[tuple[str, int]]:
    """The whole network that a client uploads: that encoder and its predictor, 38,460,480 floats."""
    return resnet18() + [("linear", 2048 * 4096), *[("bn", 4096)] * 3, ("linear", 4096 * 2048), ("bn", 2048)]


def small() -> list[tuple[str, int]]:
    """A network of 100,000 floats, where the cost of a call rules."""
    return [("conv", 9_900), ("bn", 100)] * 10


def without_library(way: Callable) -> Callable:
    def run():
        ops._fused = False
        try:
            return way()
        finally:
            ops._fused = True

    return run


class Case:
    """Vectors of one network and K clients, and every way to compute with them."""

    def __init__(self, tensors: list[tuple[str, int]], num_clients: int, device: str):
        sizes = torch.tensor([size for _, size in tensors])
        ends = sizes.cumsum(0)
        self.bounds = torch.stack([ends - sizes, ends], dim=1)
        self.layers = [i for i, (kind, _) in enumerate(tensors) if kind == "conv"]
        self.segments = self.bounds[self.layers]
        self.size, self.num_clients = int(ends[-1]), num_clients
        generator = torch.Generator(device).manual_seed(0)
        self.received = torch.randn(self.size, generator=generator, device=device) * 0.05
        self.clients = torch.empty(num_clients, self.size, device=device)
        for row in self.clients:
            row.normal_(generator=generator).mul_(0.002).add_(self.received)
        self.weights = torch.full((num_clients,), 1 / num_clients, device=device)
        self.target = self.received.clone()
        # the same memory as lists of tensors, for the ways that go through a state dict
        self.dicts = [self.split(row) for row in self.clients]
        self.received_dict, self.target_dict = self.split(self.received), self.split(self.target)

    def split(self, vector: Tensor) -> list[Tensor]:
        return [vector[begin:end] for begin, end in self.bounds.tolist()]

    def aggregate(self) -> dict[str, Callable]:
        def authors():
            mean = self.mean_of_dicts()
            drift = [[torch.dist(client[i], self.received_dict[i]) for i in self.layers] for client in self.dicts]
            spread = [[torch.dist(client[i], mean[i]) for i in self.layers] for client in self.dicts]
            return mean, torch.tensor(drift), torch.tensor(spread)

        def foreach():
            mean = self.foreach_mean()
            norms = []
            for other in (self.received_dict, mean):
                picked, rows = [other[i] for i in self.layers], []
                for client in self.dicts:
                    rows.append(torch.stack(torch._foreach_norm(torch._foreach_sub([client[i] for i in self.layers], picked))))
                norms.append(rows)
            return mean, *map(torch.stack, norms)

        def plain():
            mean = self.weights @ self.clients
            norms = [
                torch.stack([torch.linalg.vector_norm(self.clients[:, b:e] - other[b:e], dim=1) for b, e in self.segments.tolist()], dim=1)
                for other in (self.received, mean)
            ]
            return mean, *norms

        arguments = (self.clients, self.weights, self.received, self.segments)
        ours = partial(ops.aggregate, *arguments)
        ways = {"ours": ours, "out=": partial(ours, out=self.target), "reference": without_library(ours)}
        return ways | {"authors": authors, "foreach": foreach, "plain torch": plain}

    def weighted_mean(self) -> dict[str, Callable]:
        arguments = (self.clients, self.weights)
        ours = partial(ops.weighted_mean, *arguments)
        ways = {
            "ours": ours,
            "out=": partial(ours, out=self.target),
            "reference": without_library(ours),
            "authors": self.mean_of_dicts,
            "foreach": self.foreach_mean,
        }
        return ways | {"plain torch": lambda: self.weights @ self.clients}

    def layer_norms(self) -> dict[str, Callable]:
        arguments = (self.clients[0], self.received, self.segments)
        pairs = [(self.dicts[0][i], self.received_dict[i]) for i in self.layers]
        ours = partial(ops.layer_norms, *arguments)
        return {
            "ours": ours,
            "reference": without_library(ours),
            "authors": lambda: torch.stack([torch.dist(a, b) for a, b in pairs]),
            "foreach": lambda: torch.stack(torch._foreach_norm(torch._foreach_sub(*map(list, zip(*pairs, strict=True))))),
            "plain torch": lambda: torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]),
        }

    def ema_(self) -> dict[str, Callable]:
        def authors():
            for i, (old, new) in enumerate(zip(self.target_dict, self.dicts[0], strict=True)):
                self.target_dict[i] = old * 0.99 + (1 - 0.99) * new

        flat, online = self.split(self.target), self.dicts[0]
        arguments = (self.target, self.clients[0], 0.99)
        ours = partial(ops.ema_, *arguments)
        ways = {
            "ours": ours,
            "reference": without_library(ours),
            "authors": authors,
            "foreach": lambda: torch._foreach_lerp_(flat, online, 0.01),
        }
        return ways | {"plain torch": lambda: self.target.lerp_(self.clients[0], 0.01)}

    def sgd_ema_(self) -> dict[str, Callable]:
        weight, gradient, target = self.clients[0].clone().requires_grad_(), self.clients[1].clone(), self.target
        weight.grad, flat = gradient, weight.detach()
        optimizer = torch.optim.SGD([weight], 1e-9, fused=True)  # so small that the weights stay what they are
        rate = torch.tensor(1e-9, dtype=torch.float64, device=flat.device)

        def separate():
            gradient.mul_(0.9).add_(flat, alpha=5e-4)
            optimizer.step()
            ops.ema_(target, flat, 0.99)

        ours = partial(ops.sgd_ema_, flat, gradient, target, rate, momentum=0.9, weight_decay=5e-4, ema_decay=0.99)
        return {"ours": ours, "reference": without_library(ours), "separate": separate}

    def round(self) -> dict[str, Callable]:
        def folded():
            total = torch.zeros_like(self.received)
            for upload, weight in zip(self.clients, self.weights, strict=True):
                weights = torch.stack([torch.ones_like(weight), weight])
                mean, *_ = ops.aggregate(torch.stack([total, upload]), weights, self.received, self.segments)
                total.copy_(mean)

        return {
            "matrix": partial(ops.aggregate, self.clients, self.weights, self.received, self.segments, out=self.target),
            "folded": folded,
        }

    def mean_of_dicts(self) -> list[Tensor]:
        weights = self.weights.tolist()
        return [sum(w * t for w, t in zip(weights, tensors, strict=True)) for tensors in zip(*self.dicts, strict=True)]

    def foreach_mean(self) -> list[Tensor]:
        weights = self.weights.tolist()
        mean = torch._foreach_mul(self.dicts[0], weights[0])
        for w, tensors in zip(weights[1:], self.dicts[1:], strict=True):
            torch._foreach_add_(mean, tensors, alpha=w)
        return mean

    def floats(self, op: str, way: str) -> int:
        """The floats that the op must read and write; of a round, those that this way does."""
        measured = int((self.segments[:, 1] - self.segments[:, 0]).sum())
        mean = (self.num_clients + 1) * self.size
        if way == "folded":  # each upload: two vectors stacked, aggregated to a third, which is copied to the sum so far
            return self.size + self.num_clients * (4 * self.size + 3 * self.size + measured + 2 * self.size)
        return {
            "aggregate": mean + measured,
            "round": mean + measured,
            "weighted_mean": mean,
            "layer_norms": 2 * measured,
            "ema_": 3 * self.size,
            "sgd_ema_": 6 * self.size,
        }[op]

    def error(self, op: str, result) -> float | None:
        """Worst relative error of the norms in a result, against float64; None for an op that measures none."""
        if op == "layer_norms":
            pairs = [(result, self.clients[:1], self.received)]
        elif op == "aggregate":
            mean = result[0] if isinstance(result[0], Tensor) else torch.cat(result[0])
            pairs = [(result[1], self.clients, self.received), (result[2], self.clients, mean)]
        else:
            return None
        worst = 0.0
        for norms, vectors, other in pairs:
            for row, vector in zip(norms.reshape(len(vectors), -1).double().cpu(), vectors, strict=True):
                want = [torch.linalg.vector_norm(vector[b:e].double() - other[b:e].double()) for b, e in self.segments.tolist()]
                worst = max(worst, ((row - torch.stack(want).cpu()) / torch.stack(want).cpu()).abs().max().item())
        return worst


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=number(int, 3), default=25, help="of each way  [25]")
    parser.add_argument("--budget", type=number(float, 0), default=20, help="seconds to spend on an op, beyond 3 repeats  [20]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=("resnet18", "online", "small"), default=(), help="some of the networks  [all]")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to this torch")
    if not ops.load():
        print("ops: there is no library to time: without FEDU_OPS=reference, the warning says why", file=sys.stderr)
        return 2
    print_origin("bench.ops", f"3 to {options.repeats}, as many as {options.budget:g} s an op allow", options.device)
    print(f"{'network':9} {'K':>3} {'op':14} {'way':12} {'ms':>10} {'x':>7} {'GB/s':>6} {'copy':>5} {'read':>5}  error")
    round_ms = {}
    of_many = ("aggregate", "weighted_mean")
    of_all = (*of_many, "layer_norms", "ema_", "sgd_ema_")
    cases = [("resnet18", resnet18(), 5, of_all), ("resnet18", resnet18(), 50, of_many)]
    cases += [("online", online(), 5, ("round",)), ("online", online(), 50, ("round",)), ("small", small(), 5, (*of_all, "round"))]
    for name, network, num_clients, timed in cases:
        if options.only and name not in options.only:
            continue
        case = None  # before the next one's memory is taken
        case = Case(network, num_clients, options.device)
        destination = torch.empty_like(case.received)
        plain = {"copy_": partial(destination.copy_, case.received), "read": case.clients.sum}
        plain_floats = {"copy_": 2 * case.size, "read": case.clients.numel()}
        for op in timed:
            ways = getattr(case, op)()
            times = time_ways(ways | plain, options.repeats, options.budget, options.device)
            rates = {way: 4 * plain_floats[way] / times.pop(way) for way in plain}
            for way, rate in rates.items():
                print(f"{name:9} {num_clients:3} {way:14} {'':12} {4e3 * plain_floats[way] / rate:10.3f} {'':7} {rate / 1e9:6.1f}")
            for way, seconds in times.items():
                moved, error = 4 * case.floats(op, way), case.error(op, ways[way]())
                rate, note = moved / seconds, f"{moved / 1e9:.4f} GB" if op == "round" else "" if error is None else f"{error:.0e}"
                print(
                    f"{name:9} {num_clients:3} {op:14} {way:12} {seconds * 1e3:10.3f} {seconds / next(iter(times.values())):7.2f} "
                    f"{rate / 1e9:6.1f} {rate / rates['copy_']:5.0%} {rate / rates['read']:5.0%}  {note}".rstrip(),
                    flush=True,
                )
                round_ms[name, num_clients, op, way] = seconds * 1e3
    if ("resnet18", 5, "ema_", "ours") in round_ms:
        case = Case(resnet18(), 1, options.device)
        case.layers, case.segments = [0], torch.tensor([[0, case.size]])
        case.dicts, case.received_dict = [[case.clients[0]]], [case.received]
        for way, norm in case.layer_norms().items():
            print(f"the whole vector as one layer: relative error {case.error('layer_norms', norm()):.0e}, {way}")
        for way in ("ours", "reference", "authors"):
            ema, aggregate = round_ms["resnet18", 5, "ema_", way], round_ms["resnet18", 5, "aggregate", way]
            total = (5 * 390 * ema + aggregate) / 1e3
            print(f"a round of the paper (5 clients, 390 steps each): {total:.2f} s in the ops, {way}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
