"""Times local training, and compares it with other implementations.

    python -m bench.training [views|start|server|epoch|memory|growth|clients|ranks ...]

Times are medians. The ways of a row are timed alternately, each way of `epoch`, `memory` and `clients` in a process of its own. `x` is
that way's time (or memory) over ours: above 1, ours is better. `epoch` trains the same network on the same images:

    authors    a loop as in EasyFL's fedssl: PIL images in a DataLoader without workers, EMA tensor by tensor, a wait for the loss every
               step, deep copies around it
    lightly    the library's BYOL example: its transform, heads, loss, update_momentum and a DataLoader with 2 workers; `lightly-1` with
               one thread, which leaves a core to the workers
    core       our step without views and moving average
    floor      the network's convolutions and matrix products alone, each shape by itself, forwards and backwards
    bf16       our step with --precision bf16

`memory` is the peak of two rounds of the paper's setting, cut to two batches a client. `growth` is the time of a round as one thing
grows, `clients` the time and peak memory of a round of ten clients as the federation grows to 10,000. `ranks` are rounds of FedU by one
process a core, each of one thread, against one process with all threads. The operations of the model are counted; MFU, with
--peak-tflops, is the share of the device's peak that they make up.

    pip install -r requirements-dev.txt kornia lightly
    python -m bench.training
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import fedu
import models
import ops
import training
from bench.timing import print_origin, time_ways
from data import Images, draw_views, load_images, random_views
from federation import build
from methods.byol import BYOL
from models import HEADS, Encoder, Online, build_backbone, feature_dim
from options import Options
from report import canvas
from runtime.bank import Bank
from runtime.cli import Parser, number, user_errors, user_path
from runtime.device import StepGraph, keep_memory
from runtime.run import save_checkpoint

ROOT = Path(__file__).parent.parent
PARTS = ("views", "start", "server", "epoch", "memory", "growth", "clients", "ranks")
RECIPES = {"tiny": (32, 1184), "small": (64, 1920), "resnet18": (128, 256)}  # batch size, images of the epoch timed on a CPU
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
PIL_VIEW = transforms.Compose(
    [
        transforms.ToPILImage(),
        transforms.RandomResizedCrop(32, scale=(0.08, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(**JITTER)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToTensor(),
    ]
)


def timed(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, in turns."""
    return time_ways(ways, repeats, float("inf"), DEVICE.type)


class Worker:
    """Runs a way in a process of its own, so that none inherits another's memory or its memory settings; a call runs it once."""

    def __init__(self, way: Callable[..., Callable[[], object]], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, way, *arguments)).start()
        theirs.close()

    def __call__(self) -> None:
        self.pipe.send(None)
        self.peak_bytes = self.pipe.recv()

    def stop(self) -> None:
        self.pipe.close()


def serve(pipe: multiprocessing.connection.Connection, way: Callable[..., Callable[[], object]], *arguments: object) -> None:
    """Run a way whenever the pipe says so, and answer with the most memory that this process has needed so far, in bytes."""
    multiprocessing.set_start_method(None, force=True)  # a spawned process would spawn a DataLoader's workers too, where fork is usual
    warnings.filterwarnings("ignore", module="lightly|torch.utils.data")
    run = way(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            pipe.send(torch.cuda.max_memory_allocated())
        else:
            pipe.send(peak_resident_bytes())


def peak_resident_bytes() -> int:
    """The most memory that this process has needed; getrusage would count that of the process that started it too."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def print_rows(what: str, seconds: dict[str, float], images: int, notes: dict[str, str] | None = None) -> None:
    ours = next(iter(seconds.values()))
    for way, median in seconds.items():
        rate = f"{images / median:12.0f}" if images else f"{'':12}"
        print(f"{what:28} {way:10} {median * 1e3:12.2f} {median / ours:8.2f} {rate}  {(notes or {}).get(way, '')}".rstrip(), flush=True)


def installed(*packages: str) -> bool:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, since {', '.join(missing)} is not installed", file=sys.stderr)
    return not missing


# ---------------------------------------------------------------------------------------------------------- views


def bench_views(images: Tensor, repeats: int) -> None:
    batch = images[:128].contiguous()
    on_host = batch.cpu()
    ways = {
        "ours": lambda: random_views(batch),
        "reference": lambda: two_views_of_the_reference(batch),
        "PIL": lambda: [torch.stack([PIL_VIEW(x) for x in on_host]).to(DEVICE) for _ in range(2)],
    }
    if installed("kornia"):
        import kornia.augmentation as K

        view = nn.Sequential(
            K.RandomResizedCrop((32, 32), scale=(0.08, 1)),
            K.RandomHorizontalFlip(),
            K.ColorJitter(**JITTER, p=0.8),
            K.RandomGrayscale(p=0.2),
        )
        ways["kornia"] = lambda: [view(batch.float() / 255) for _ in range(2)]
    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        print_rows(f"views, B = 128, {count} thread{'s' * (count > 1)}", timed(ways, 2 * repeats), 128)
    torch.set_num_threads(threads)


def two_views_of_the_reference(images: Tensor) -> tuple[Tensor, Tensor]:
    return ops.reference.augment(images, draw_views(2 * len(images), *images.shape[2:], images.device)).chunk(2)


# ---------------------------------------------------------------------------------------------------------- epoch


class Pairs(torch.utils.data.Dataset):
    """Images as PIL's, and a transform that makes their views: what a DataLoader needs."""

    def __init__(self, images: Tensor, transform: Callable):
        self.images, self.transform = [transforms.functional.to_pil_image(x) for x in images.cpu()], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i])


def some_images(count: int) -> Tensor:
    return load_images("fashion").x_train[:count].contiguous().to(DEVICE)


def ours(
    encoder: str, count: int, batch_size: int, views: Callable = random_views, ema: bool = True, precision: str = "fp32"
) -> Callable[[], object]:
    keep_memory()
    networks, images = BYOL(Encoder(encoder), DEVICE), some_images(count)
    if not ema:
        networks.ema_target = None
    step, indices = training.Step(networks, images, precision, views), torch.arange(count, device=DEVICE)
    return lambda: training.local_training(step, training.local_batches(indices, 1, batch_size, step.generator), 0.032).item()


def core(encoder: str, count: int, batch_size: int) -> Callable[[], object]:
    fixed = tuple(torch.rand(batch_size, 3, 32, 32, device=DEVICE) for _ in range(2))
    return ours(encoder, count, batch_size, views=lambda *_: fixed, ema=False)


def authors(encoder: str, count: int, batch_size: int) -> Callable[[], object]:
    """In the manner of EasyFL's fedssl: download and upload are deep copies, EMA and optimizer go tensor by tensor."""
    server = Online(Encoder(encoder), predictor=True).to(DEVICE)
    target = copy.deepcopy(server.encoder)
    loader = authors_loader(some_images(count), batch_size)

    def epoch() -> None:
        model = copy.deepcopy(server)
        authors_training(model, target, loader)
        copy.deepcopy(model.state_dict())

    return epoch


def authors_loader(images: Tensor, batch_size: int) -> torch.utils.data.DataLoader:
    view = transforms.Compose(PIL_VIEW.transforms[1:])
    return torch.utils.data.DataLoader(Pairs(images, lambda x: (view(x), view(x))), batch_size, shuffle=True, drop_last=True)


def authors_training(model: nn.Module, target: nn.Module, loader: torch.utils.data.DataLoader) -> None:
    def loss_of(online: Tensor, target: Tensor) -> Tensor:
        online, target = nn.functional.normalize(online, dim=-1), nn.functional.normalize(target, dim=-1)
        return 2 - 2 * (online * target).sum(-1)

    optimizer = torch.optim.SGD(model.parameters(), 0.032, 0.9, weight_decay=5e-4)
    losses = []
    for x1, x2 in loader:
        x1, x2 = x1.to(DEVICE), x2.to(DEVICE)
        p1, p2 = model(x1), model(x2)
        with torch.no_grad():
            z1, z2 = target(x1).detach(), target(x2).detach()
        loss = (loss_of(p1, z2) + loss_of(p2, z1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for new, old in zip(model.encoder.parameters(), target.parameters(), strict=True):
            old.data = old.data * 0.99 + (1 - 0.99) * new.data


def lightly(encoder: str, count: int, batch_size: int, threads: int | None = None) -> Callable[[], object]:
    """The library's BYOL example for plain PyTorch, with our backbone, widths and batch size; CIFAR's transform has no blur."""
    if threads:
        torch.set_num_threads(threads)
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    views = [V(input_size=32, gaussian_blur=0.0, solarization_prob=0.0) for V in (BYOLView1Transform, BYOLView2Transform)]
    hidden, out = HEADS[encoder]
    backbone = build_backbone(encoder).to(DEVICE)
    projector = BYOLProjectionHead(feature_dim(backbone), hidden, out).to(DEVICE)
    predictor = BYOLPredictionHead(out, hidden, out).to(DEVICE)
    momentum = [copy.deepcopy(backbone), copy.deepcopy(projector)]
    for module in momentum:
        deactivate_requires_grad(module)
    pairs = Pairs(some_images(count), BYOLTransform(*views))
    loader = torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, drop_last=True, num_workers=2)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*backbone.parameters(), *projector.parameters(), *predictor.parameters()], lr=0.032)

    def train() -> None:
        total = 0
        for x0, x1 in loader:
            update_momentum(backbone, momentum[0], m=0.99)
            update_momentum(projector, momentum[1], m=0.99)
            x0, x1 = x0.to(DEVICE), x1.to(DEVICE)
            p0, p1 = (predictor(projector(backbone(x))) for x in (x0, x1))
            z0, z1 = (momentum[1](momentum[0](x)).detach() for x in (x0, x1))
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total.item()

    return train


def floor(encoder: str, count: int, batch_size: int) -> Callable[[], object]:
    """An epoch's convolutions and matrix products, one by one: online forwards and backwards on two views, target forwards."""
    keep_memory()
    network = models.Flat(Online(Encoder(encoder), predictor=True).to(DEVICE)).module
    calls: list[tuple[nn.Module, Tensor, bool]] = []  # module, input, whether the input needs a gradient

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((module, inputs[0].detach().clone(memory_format=torch.preserve_format), len(calls) > 0))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(record)
    network(torch.rand(batch_size, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last))
    for module, *_ in calls:
        module._forward_pre_hooks.clear()
    of_target = {id(m) for m in network.encoder.modules()}
    with torch.no_grad():
        gradients = [torch.randn_like(module(x)) for module, x, _ in calls]

    def step(_: Tensor) -> None:
        for (module, x, wants), gradient in zip(calls, gradients, strict=True):
            for _ in range(2):
                if id(module) in of_target:
                    with torch.no_grad():
                        module(x)
                x = x.detach().requires_grad_(wants)
                torch.autograd.grad(module(x), [*module.parameters(), *([x] if wants else [])], gradient)

    launcher = StepGraph(step, torch.Generator(DEVICE)) if DEVICE.type == "cuda" else nullcontext(step)

    def epoch() -> None:
        batch = torch.zeros((), device=DEVICE)  # that this step does not look at
        with launcher as run:
            for _ in range(count // batch_size):
                run(batch)

    return epoch


def operations(encoder: str) -> dict[str, float]:
    """Floating-point operations an image of a training step, a multiplication and an addition counted as two.

    Convolutions and matrix products alone, on both views: the online network forwards and backwards, the target network forwards.
    """
    counts = {}
    networks = BYOL(Encoder(encoder), torch.device("meta"))
    views = torch.empty(2, 2, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as target:
        networks.target.module(views[0])
    with FlopCounterMode(display=False) as forward:
        losses = [term() for term in networks.terms(*views, torch.empty(2, device="meta"), None)]
    with FlopCounterMode(display=False) as backward:
        for loss in losses:
            loss.backward()
    counts["target"] = target.get_total_flops()  # of two images, which is one image's two views
    return counts | {"forward": forward.get_total_flops() / 2 - counts["target"], "backward": backward.get_total_flops() / 2}


class Traffic(TorchDispatchMode):
    """Counts the operations that compute, and the bytes of the tensors that they are given and of those that they return.

    A GPU moves more than that: BatchNorm reads its input twice, and a convolution may arrange its own anew.
    """

    views = {"view", "detach", "t", "transpose", "expand", "_unsafe_view", "alias", "slice", "select", "unsqueeze", "permute", "as_strided"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.count = 0, 0

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
    images, batch = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    step = training.Step(networks, images, precision, lambda *_: views)
    with Traffic() as counted:
        step(batch)
    return counted


def bench_epoch(encoder: str, repeats: int, peak_tflops: float | None) -> None:
    batch_size, count = RECIPES[encoder]
    count = (6000 if DEVICE.type == "cuda" else count) // batch_size * batch_size
    builders = {"ours": ours, "core": core, "floor": floor, "authors": authors, "bf16": partial(ours, precision="bf16")}
    if installed("lightly"):
        builders |= {"lightly": lightly, "lightly-1": partial(lightly, threads=1)}
    ways = {name: Worker(way, encoder, count, batch_size) for name, way in builders.items()}
    seconds = timed(ways, repeats)
    counted = operations(encoder)
    rates = {way: sum(counted.values()) * count / s / 1e12 for way, s in seconds.items()}
    notes = {way: f"{rate:.3f} TFLOP/s" + (f", MFU {rate / peak_tflops:.0%}" if peak_tflops else "") for way, rate in rates.items()}
    print_rows(f"epoch, {encoder}, B = {batch_size}", seconds, count, notes)
    print(f"{f'operations, {encoder}':28} {', '.join(f'{k} {v / 1e6:,.1f} million' for k, v in counted.items())} an image", flush=True)
    for precision in ("fp32", "bf16"):
        moved = traffic(encoder, batch_size, precision)
        print(f"{f'traffic, {encoder}, {precision}':28} {moved.bytes / 1e9:.2f} GB in {moved.count} operations a step", flush=True)
    for worker in ways.values():
        worker.stop()


# -------------------------------------------------------------------------------------------------- whole rounds


def rounds_of_fedu(images: Images, folder: Path | None = None, per_client: int | None = None, **given: object) -> Callable[[], None]:
    """Rounds of FedU, one a call, with options as given and else the paper's; each client's images are cut to `per_client`.

    With a folder, each round ends with a checkpoint in it.
    """
    options = Options(**{"dataset": "cifar10"} | given)
    images = images.to(DEVICE)
    federation = build(options, images)
    for client in federation.clients:
        client.indices = client.indices[:per_client]
    rounds = itertools.count()
    bank = Bank(fedu.kept_parts(federation.networks, options), folder and folder / "bank.bin")
    uploads = fedu.uploads_of(federation, options)

    def run() -> None:
        fedu.run_round(options, federation, bank, uploads, next(rounds))
        if folder:
            save_checkpoint(folder, federation.checkpoint(1, 0.0), bank)

    return run


def as_large_as_cifar10() -> Images:
    """50,000 and 10,000 random images: memory does not depend on what they show."""
    x_train, x_test = (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (50_000, 10_000))
    return Images(x_train, torch.arange(50_000) % 10, x_test, torch.arange(10_000) % 10, 10)


def rounds_of_ours(folder: Path, rounds: int) -> Callable[[], object]:
    keep_memory()
    run = rounds_of_fedu(as_large_as_cifar10(), folder, per_client=256, local_epochs=1)
    return lambda: [run() for _ in range(rounds)]


def rounds_of_authors(rounds: int) -> Callable[[], object]:
    """Deep copies where EasyFL makes them: of the download, of each part on update, before and after training for the divergence,
    of the client's own model, and of the upload, which is pickled; the server keeps all uploads until it has averaged them."""
    images = as_large_as_cifar10()
    server = {"online": Online(Encoder("resnet18"), predictor=True).to(DEVICE), "target": None}
    kept: list[dict | None] = [None] * 5
    loaders = [authors_loader(images.x_train[k * 10_000 : k * 10_000 + 256], 128) for k in range(5)]

    def round_() -> None:
        uploads = []
        for k in range(5):
            model = copy.deepcopy(server)
            own = kept[k]
            model["target"] = copy.deepcopy(own["target"] if own else model["online"].encoder)
            model["online"] = copy.deepcopy(model["online"])
            before = copy.deepcopy([model["online"].encoder, model["target"]])
            authors_training(model["online"], model["target"], loaders[k])
            kept[k] = copy.deepcopy(model)
            after = copy.deepcopy([model["online"].encoder, model["target"]])
            [torch.dist(a, b) for a, b in zip(*(m[0].state_dict().values() for m in (before, after)), strict=True) if a.ndim == 4]
            uploads.append(pickle.loads(pickle.dumps(copy.deepcopy(model))))
            del model, before, after
        for part in ("online", "target"):
            total = copy.deepcopy(uploads[0][part].state_dict())
            for name, tensor in total.items():
                for upload in uploads[1:]:
                    tensor += upload[part].state_dict()[name]
                total[name] = torch.div(tensor, len(uploads))
            mean = copy.deepcopy(uploads[0][part])
            mean.load_state_dict(total)
            server[part] = mean

    return lambda: [round_() for _ in range(rounds)]


def bench_memory() -> None:
    peaks = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, way in {"ours": (rounds_of_ours, Path(folder), 2), "authors": (rounds_of_authors, 2)}.items():
            worker = Worker(*way)
            worker()
            worker.stop()
            peaks[name] = worker.peak_bytes
    for name, peak in peaks.items():
        print(f"{'memory, resnet18, K = 5':28} {name:10} {peak / 2**20:9.0f} MiB {peak / peaks['ours']:8.2f}", flush=True)


def bench_server(repeats: int) -> None:
    """All that a round of 5 clients does besides training: the stages' copies, aggregation, divergences, checkpoint."""
    keep_memory()
    usual, training.local_training = training.local_training, lambda *_, **__: torch.zeros(())
    with tempfile.TemporaryDirectory(dir=".") as folder:
        images = as_large_as_cifar10()
        ways = {"all": rounds_of_fedu(images, Path(folder)), "without checkpoint": rounds_of_fedu(images)}
        print_rows("server, resnet18, K = 5", timed(ways, repeats), 5 * 5 * 78 * 128)  # images of the paper's round
    training.local_training = usual


def bench_growth(repeats: int, figure: Path | None) -> None:
    """A round of two clients with 256 images each and the tiny encoder, B = 32, and what becomes of its time as one of these grows."""
    keep_memory()
    images = load_images("fashion")
    base = {"clients": 2, "per_client": 256, "batch_size": 32, "width": 1}
    seconds: dict[str, list[float]] = {}
    for what, of in (("images", "per_client"), ("clients", "clients"), ("width", "width"), ("batch size", "batch_size")):
        ways = {}
        for factor in (1, 2, 4, 8):
            size = base | {of: base[of] * factor}
            width, total = size.pop("width"), size["clients"] * size["per_client"]
            part = images._replace(x_train=images.x_train[:total], y_train=images.y_train[:total])
            with tiny_encoder(width):
                ways[f"x {factor}"] = rounds_of_fedu(part, encoder="tiny", partition="iid", local_epochs=1, **size)
        measured = timed(ways, repeats)
        seconds[what] = list(measured.values())
        print_rows(f"growth, {what}", measured, 0, {"x 8": f"slope {slope(seconds[what]):.2f}"})
    if figure:
        draw_growth(seconds, figure)


@contextmanager
def tiny_encoder(width: int) -> Iterator[None]:
    """Let networks that are built meanwhile be `width` times as wide as the tiny encoder's."""
    usual = models.WIDTHS["tiny"], HEADS["tiny"]
    models.WIDTHS["tiny"], HEADS["tiny"] = (tuple(width * w for w in widths) for widths in usual)
    try:
        yield
    finally:
        models.WIDTHS["tiny"], HEADS["tiny"] = usual


def slope(seconds: list[float]) -> float:
    """Of the line through log2(seconds) at factors 1, 2, 4, ...: 1 is linear growth."""
    return float(np.polyfit(range(len(seconds)), np.log2(seconds), 1)[0])


def draw_growth(seconds: dict[str, list[float]], path: Path) -> None:
    figure = canvas.new_figure(7, 4.5)
    axis = figure.subplots()
    for (what, times), colour, marker in zip(seconds.items(), canvas.COLOURS, "osD^"):
        label = f"{what}: slope {slope(times):.2f}"
        axis.plot([2**i for i in range(len(times))], times, color=colour, marker=marker, linewidth=2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="growth of one of them", ylabel="seconds a round", title="A round of 2 clients, 256 images each, tiny encoder, B = 32")
    axis.xaxis.set_major_formatter("{x:g} x")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    canvas.save_figure(figure, path)


def bench_clients(repeats: int, figure: Path | None) -> None:
    """Rounds of the small encoder, with a checkpoint each, 20 steps a client, on images as many as CIFAR-10's."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        sizes = [(10, 10), (100, 10), (1_000, 10), (10_000, 10), (10_000, 50)]
        for size in sizes:
            Path(folder, "-".join(map(str, size))).mkdir()
        ways = {size: Worker(rounds_of_many, *size, Path(folder, "-".join(map(str, size)))) for size in sizes}
        seconds = timed(ways, repeats)
        for worker in ways.values():
            worker.stop()
    peaks = {size: worker.peak_bytes / 2**20 for size, worker in ways.items()}
    for (clients, per_round), median in seconds.items():
        name = f"clients, small, {per_round} a round"
        times, more = median / seconds[10, 10], peaks[clients, per_round] / peaks[10, 10]
        print(f"{name:28} K = {clients:<6} {median * 1e3:12.2f} {times:8.2f} {peaks[clients, per_round]:9.0f} MiB {more:8.2f}", flush=True)
    if figure:
        draw_clients([size for size in sizes if size[1] == 10], seconds, peaks, figure)


def rounds_of_many(clients: int, per_round: int, folder: Path) -> Callable[[], object]:
    keep_memory()
    options = {"clients": clients, "clients_per_round": per_round, "encoder": "small", "partition": "iid"}
    return rounds_of_fedu(as_large_as_cifar10(), folder, per_client=5, batch_size=5, local_epochs=20, **options)


def draw_clients(sizes: list[tuple[int, int]], seconds: dict, peaks: dict, path: Path) -> None:
    figure = canvas.new_figure(9, 3.8)
    for axis, values, label in zip(figure.subplots(1, 2), (seconds, peaks), ("seconds a round", "peak resident memory (MiB)")):
        axis.plot([k for k, _ in sizes], [values[size] for size in sizes], color=canvas.COLOURS[0], marker="o", linewidth=2)
        axis.set(xlabel="clients K", ylabel=label, xscale="log", ylim=(0, 1.25 * max(values[size] for size in sizes)))
        axis.grid(alpha=0.25)
    figure.suptitle("Ten clients a round, drawn of K; small encoder, 20 steps each")
    canvas.save_figure(figure, path)


def bench_ranks(repeats: int) -> None:
    """A round by its own clock, the first left out, of processes that share this machine's cores."""
    fedu_py, cores = str(ROOT / "fedu.py"), os.cpu_count() or 1
    for clients in (5, 10):
        options = f"--encoder small --clients {clients} --classes-per-client 2 --rounds 2 --knn-every 0 --overwrite --out".split()
        seconds: dict[str, list[float]] = {}
        for _ in range(repeats):
            for count in (1, cores):
                out = Path("runs") / f"bench-ranks-{count}"
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
                env = os.environ | {"OMP_NUM_THREADS": str(cores // count)}
                subprocess.run([sys.executable, *start, fedu_py, *options, str(out)], env=env, check=True, capture_output=True)
                row = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
                seconds.setdefault(f"{count} x {cores // count}", []).append(row["seconds"])
        medians = {way: float(np.median(times)) for way, times in reversed(seconds.items())}
        print_rows(f"ranks, small, K = {clients}", medians, 6000 * 2)


# ------------------------------------------------------------------------------------------------------- start-up


def bench_start(repeats: int) -> None:
    def first_step() -> None:
        """Seconds from the command to the first training step, just before which the table's header is printed."""
        command = [sys.executable, str(ROOT / "fedu.py"), "--overwrite", "--out", "runs/bench-start", "--device", DEVICE.type]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
            while "predictor taken" not in process.stdout.readline():
                assert process.poll() is None, "fedu.py ended before its first step"
            process.kill()

    help_ = partial(subprocess.run, [sys.executable, str(ROOT / "fedu.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
    for name, way in (("--help", help_), ("to the first step", first_step)):
        print_rows("start-up", timed({name: way}, repeats), 0)


def parse_options() -> dict:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}  [all]")
    parser.add_argument("--encoder", action="append", choices=RECIPES, help="for epoch, may be repeated  [all]")
    parser.add_argument("--repeats", type=number(int, 3), help="of each way  [5]")
    parser.add_argument("--peak-tflops", type=number(float, 0, open_low=True), help="of this device, for the MFU of epoch  [not shown]")
    parser.add_argument("--figures", type=user_path, metavar="FOLDER", help="draw growth and clients there  [not drawn]")
    given = {"parts": [], "encoder": list(RECIPES), "repeats": 5, "peak_tflops": None, "figures": None} | vars(parser.parse_args())
    for part in given["parts"]:
        if part not in PARTS:
            parser.error(f"got {part!r}, needs one of {', '.join(PARTS)}")
    return given | {"parts": given["parts"] or list(PARTS)}


def main(parts: list[str], encoder: list[str], repeats: int, peak_tflops: float | None, figures: Path | None) -> None:
    ops.load()
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
    print_origin("bench.training", str(repeats))
    print(f"{'what':28} {'way':10} {'ms':>12} {'x':>8} {'images/s':>12}")
    warnings.filterwarnings("ignore", module="lightly|torch.utils.data")
    if "views" in parts:
        bench_views(some_images(128), repeats)
    if "start" in parts:
        bench_start(repeats)
    if "server" in parts:
        bench_server(repeats)
    for name in encoder if "epoch" in parts else []:
        bench_epoch(name, repeats, peak_tflops)
    if "memory" in parts:
        bench_memory()
    if "growth" in parts:
        bench_growth(repeats, figures and figures / "growth.png")
    if "clients" in parts:
        bench_clients(repeats, figures and figures / "clients.png")
    if "ranks" in parts:
        bench_ranks(repeats)


if __name__ == "__main__":
    with user_errors("bench.training"):
        main(**parse_options())
