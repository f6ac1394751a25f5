"""Times local training, and compares it with other implementations.

    python -m bench.training [views|start|server|epoch|memory|growth|clients ...]

Times are medians, and the ways of a row are timed in turns. `x` is a way's time over that of the first one, ours: above 1, ours is better.
In `epoch`, `memory` and `clients` each way has a process of its own; its peak memory follows, and this memory over that of the first one.

    views      the two views of a batch
    start      whole commands: --help, the first step, the README's first run by all processes and by one (`former`: of the checkout
               --against), and by all beside a loop that computes all the time (`busy`)
    server     all that a round does besides training
    epoch      the same network on the same images by `authors` and `lightly` (bench/others.py; `lightly-1` has one thread, which leaves a
               core to its loaders), by our step without views and moving average (`core`), in bf16, and its convolutions and matrix
               products only (`floor`)
    memory     two rounds of the paper's setting, cut to two batches a client
    growth     a round as one thing grows
    clients    a round of ten clients as the federation grows to 10,000

The operations of the model are counted; MFU, with --peak-tflops, is the share of the device's peak that they make up.

    pip install -r requirements-dev.txt kornia lightly
    python -m bench.training
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import fedu
import models
import ops
import training
from bench.bounds import floor, operations, traffic
from bench.others import authors, kornia_views, lightly, pil_views, rounds_of_authors
from bench.timing import DEVICE, as_large_as_cifar10, print_origin, some_images, time_ways
from data import Images, draw_views, load_images, random_views
from federation import build
from methods.byol import BYOL
from models import Encoder
from options import Options
from report import canvas
from runtime.bank import Bank
from runtime.cli import Parser, number, user_errors, user_path
from runtime.device import keep_memory, limited_threads
from runtime.run import save_checkpoint

ROOT = Path(__file__).parent.parent
EPOCHS = {"tiny": (32, 1184), "small": (64, 1920), "resnet18": (128, 256)}  # batch size, images of the epoch timed on a CPU
README = ("--device", DEVICE.type, "--overwrite", "--out", "runs/bench-start")  # the README's first command, into this folder
Measured = tuple[dict[str, float], dict[str, float]]  # seconds and peak memory in MiB of each way


def compare(
    what: str, ways: dict[str, Callable], images: int = 0, *, apart: bool = False, commands: bool = False, operations: float = 0.0,
    repeats: int, peak_tflops: float | None = None,
) -> Measured:  # fmt: skip
    """Time ways in turns, ours first, and print a row for each.

    images: that a call trains on. apart: a way is called in a process of its own, and what it returns is timed there. commands: see
    `time_ways`. operations: floating-point operations an image.
    """
    spawn = multiprocessing.get_context("spawn")  # no process inherits another's memory or its memory settings
    pools = {name: ProcessPoolExecutor(1, spawn, build_way, (way,)) for name, way in ways.items()} if apart else {}
    for pool in pools.values():
        pool.submit(peak_memory).result()  # after this it has built its way
    called = {name: lambda pool=pool: pool.submit(run_way).result() for name, pool in pools.items()} or ways
    seconds = time_ways(called, repeats, float("inf"), DEVICE.type, commands)
    peaks = {name: pool.submit(peak_memory).result() for name, pool in pools.items()}
    for pool in pools.values():
        pool.shutdown()
    ours = next(iter(ways))
    for name, s in seconds.items():
        row = f"{what:28} {name:10} {s * 1e3:12.2f} {s / seconds[ours]:8.2f} " + (f"{images / s:12.0f}" if images else " " * 12)
        if rate := operations * images / s / 1e12:
            row += f"  {rate:.3f} TFLOP/s" + (f", MFU {rate / peak_tflops:.0%}" if peak_tflops else "")
        row += f" {peaks[name]:9.0f} MiB {peaks[name] / peaks[ours]:8.2f}" if apart else ""
        print(row.rstrip(), flush=True)
    return seconds, peaks


def build_way(way: Callable[[], Callable[[], object]]) -> None:
    multiprocessing.set_start_method(None, force=True)  # a spawned process would spawn a DataLoader's workers too, where fork is usual
    warnings.filterwarnings("ignore", module="lightly|torch.utils.data")
    run_way.way = way()


def run_way() -> None:
    run_way.way()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> float:
    """The most memory that this process has needed, in MiB; getrusage would count that of the process that started it too."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def installed(*packages: str) -> bool:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, since {', '.join(missing)} is not installed", file=sys.stderr)
    return not missing


def draw(path: Path, title: str, x: list[int], xlabel: str, panels: dict[str, dict[str, list[float]]], base: int, log: bool) -> None:
    """Draw lines over x, on a logarithmic scale. panels: for the label of each y axis its lines, by name. log: whether y is logarithmic."""
    figure = canvas.new_figure(2 + 4 * len(panels), 4)
    for axis, (ylabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for (name, y), colour, marker in zip(lines.items(), canvas.COLOURS, "osD^"):
            axis.plot(x, y, color=colour, marker=marker, linewidth=2, label=name)
        axis.set_xscale("log", base=base)
        axis.xaxis.set_major_formatter("{x:g}")
        if log:
            axis.set_yscale("log", base=base)
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(0, 1.25 * max(map(max, lines.values())))
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(title)
    canvas.save_figure(figure, path)


def compare_views(compare: Callable[..., Measured]) -> None:
    batch = some_images(128)
    ways = {
        "ours": partial(random_views, batch),
        "reference": lambda: ops.reference.augment(batch, draw_views(256, 32, 32, DEVICE)).chunk(2),
        "PIL": partial(pil_views, batch.cpu()),
    }
    if installed("kornia"):
        ways["kornia"] = partial(kornia_views(), batch)
    for count in sorted({1, torch.get_num_threads()}):
        with limited_threads(count):
            compare(f"views, B = 128, {count} thread{'s' * (count > 1)}", ways, 128)


def compare_commands(compare: Callable[..., Measured], against: Path | None) -> None:
    """against: a checkout of another commit, whose first run by one process is timed instead of this one's."""
    compare = partial(compare, commands=True)
    compare("start-up", {"--help": partial(seconds_of, "--help")})
    compare("start-up", {"to the first step": partial(seconds_of, *README, until="predictor taken")})
    other, root = ("former 1", against) if against else ("1", ROOT)
    runs = {"auto": partial(seconds_of, *README), other: partial(seconds_of, *README, "--processes", "1", root=root)}
    idle, _ = compare("the first run, --processes", runs)
    print(f"{f'auto over {other}, idle':28} {idle['auto'] / idle[other]:.2f}", flush=True)
    busy, _ = compare("the first run, --processes", {"auto busy": partial(runs["auto"], busy=True)})
    print(f"{'auto, busy over idle':28} {busy['auto busy'] / idle['auto']:.2f}", flush=True)


def seconds_of(*options: str, until: str | None = None, busy: bool = False, root: Path = ROOT) -> float:
    """Seconds from the start of fedu.py to its end, or until it prints a text; busy: beside a process that computes all the time."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    command, streams = [sys.executable, str(root / "fedu.py"), *options], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    start = time.perf_counter()
    try:
        with subprocess.Popen(command, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **streams) as process:
            if not any(until and until in line for line in process.stdout):
                assert process.wait() == 0 and not until, process.stderr.read()
            seconds = time.perf_counter() - start
            process.kill()
    finally:
        if other:
            other.kill()
            other.wait()
    return seconds


def compare_epochs(compare: Callable[..., Measured], encoders: list[str]) -> None:
    builders = {"ours": ours, "core": partial(ours, core=True), "floor": floor, "authors": authors, "bf16": partial(ours, precision="bf16")}
    if installed("lightly"):
        builders |= {"lightly": lightly, "lightly-1": partial(lightly, threads=1)}
    for encoder in encoders:
        batch_size, count = EPOCHS[encoder]
        count = (6000 if DEVICE.type == "cuda" else count) // batch_size * batch_size
        ways, counted = {name: partial(way, encoder, count, batch_size) for name, way in builders.items()}, operations(encoder)
        compare(f"epoch, {encoder}, B = {batch_size}", ways, count, apart=True, operations=sum(counted.values()))
        print(f"{f'operations, {encoder}':28} {', '.join(f'{k} {v / 1e6:,.1f} million' for k, v in counted.items())} an image")
        for precision in ("fp32", "bf16"):
            moved = traffic(encoder, batch_size, precision)
            print(f"{f'traffic, {encoder}, {precision}':28} {moved.bytes / 1e9:.2f} GB in {moved.count} operations a step", flush=True)


def ours(encoder: str, count: int, batch_size: int, precision: str = "fp32", core: bool = False) -> Callable[[], object]:
    """An epoch. core: without views and moving average."""
    keep_memory()
    networks, images, fixed = BYOL(Encoder(encoder), DEVICE), some_images(count), torch.rand(2, batch_size, 3, 32, 32, device=DEVICE)
    if core:
        networks.ema_target = None
    step = training.Step(networks, images, precision, (lambda *_: fixed) if core else random_views)
    indices = torch.arange(count, device=DEVICE)
    return lambda: training.local_training(step, training.local_batches(indices, 1, batch_size, step.generator), 0.032).item()


def rounds_of_fedu(images: Images, folder: Path | None = None, per_client: int | None = None, **given: object) -> Callable[[], None]:
    """Rounds of FedU, one a call, with options as given and else the paper's; each client's images are cut to `per_client`.

    With a folder, each round ends with a checkpoint in it.
    """
    options = Options(**{"dataset": "cifar10"} | given)
    federation = build(options, images.to(DEVICE))
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


def rounds_apart(rounds: int, folder: str, **given: object) -> Callable[[], object]:
    """So many rounds a call, with a new folder for what they write, in a process that times nothing else."""
    keep_memory()
    run = rounds_of_fedu(as_large_as_cifar10(), Path(tempfile.mkdtemp(dir=folder)), **given)
    return lambda: [run() for _ in range(rounds)]


def compare_servers(compare: Callable[..., Measured]) -> None:
    """All that a round of 5 clients does besides training: the stages' copies, aggregation, divergences, checkpoint."""
    keep_memory()
    untrained = patch.object(training, "local_training", lambda *_, **__: torch.zeros(()))
    with untrained, tempfile.TemporaryDirectory(dir=".") as folder:
        images = as_large_as_cifar10()
        ways = {"all": rounds_of_fedu(images, Path(folder)), "without checkpoint": rounds_of_fedu(images)}
        compare("server, resnet18, K = 5", ways, 5 * 5 * 78 * 128)  # images of the paper's round


def compare_memory(compare: Callable[..., Measured]) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        ways = {"ours": partial(rounds_apart, 2, folder, per_client=256, local_epochs=1), "authors": partial(rounds_of_authors, 2)}
        compare("memory, resnet18, K = 5", ways, apart=True, commands=True, repeats=1)


def compare_growth(compare: Callable[..., Measured], figures: Path | None) -> None:
    keep_memory()
    fashion, factors, lines = load_images("fashion"), (1, 2, 4, 8), {}
    base = {"images": 256, "clients": 2, "width": 1, "batch size": 32}  # images of each client
    for what in base:
        ways = {}
        for factor in factors:
            images, clients, width, batch_size = (base | {what: factor * base[what]}).values()
            widths, heads = (tuple(width * w for w in table["tiny"]) for table in (models.WIDTHS, models.HEADS))
            size = {"per_client": images, "clients": clients, "batch_size": batch_size}
            with patch.dict(models.WIDTHS, tiny=widths), patch.dict(models.HEADS, tiny=heads):
                ways[f"x {factor}"] = rounds_of_fedu(fashion, encoder="tiny", partition="iid", local_epochs=1, **size)
        times = list(compare(f"growth, {what}", ways)[0].values())
        slope = f"slope {np.polyfit(np.log2(factors), np.log2(times), 1)[0]:.2f}"  # 1 is linear growth
        print(f"{f'growth, {what}':28} {slope}", flush=True)
        lines[f"{what}: {slope}"] = times
    if figures:
        title = "A round of 2 clients, 256 images each, tiny encoder, B = 32"
        draw(figures / "growth.png", title, factors, "growth of one of them", {"seconds a round": lines}, 2, log=True)


def compare_clients(compare: Callable[..., Measured], figures: Path | None) -> None:
    """Rounds with a checkpoint each, 20 steps a client."""
    sizes = {f"{k}, {drawn}": (k, drawn) for k, drawn in ((10, 10), (100, 10), (1_000, 10), (10_000, 10), (10_000, 50))}
    fixed = {"encoder": "small", "partition": "iid", "per_client": 5, "batch_size": 5, "local_epochs": 20}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        ways = {name: partial(rounds_apart, 1, folder, clients=k, clients_per_round=n, **fixed) for name, (k, n) in sizes.items()}
        measured = compare("clients, small", ways, apart=True)
    if figures:
        ten = {name: k for name, (k, drawn) in sizes.items() if drawn == 10}
        labels = ("seconds a round", "peak resident memory (MiB)")
        panels = {label: {"10 clients a round": [values[name] for name in ten]} for label, values in zip(labels, measured)}
        title = "Ten clients a round, drawn of K; small encoder, 20 steps each"
        draw(figures / "clients.png", title, list(ten.values()), "clients K", panels, 10, log=False)


PARTS = {
    "views": compare_views, "start": compare_commands, "server": compare_servers, "epoch": compare_epochs, "memory": compare_memory,
    "growth": compare_growth, "clients": compare_clients,
}  # fmt: skip


def parse_options() -> dict:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}  [all]")
    parser.add_argument("--encoder", action="append", choices=EPOCHS, help="for epoch, may be repeated  [all]")
    parser.add_argument("--repeats", type=number(int, 3), help="of each way  [5]")
    parser.add_argument("--peak-tflops", type=number(float, 0, open_low=True), help="of this device, for the MFU of epoch  [not shown]")
    parser.add_argument("--against", type=user_path, metavar="CHECKOUT", help="whose first run to time in start  [this one]")
    parser.add_argument("--figures", type=user_path, metavar="FOLDER", help="draw growth and clients there  [not drawn]")
    given = {"parts": [], "encoder": list(EPOCHS), "repeats": 5, "peak_tflops": None, "against": None, "figures": None}
    given |= vars(parser.parse_args())
    for part in given["parts"]:
        if part not in PARTS:
            parser.error(f"got {part!r}, needs one of {', '.join(PARTS)}")
    return given | {"parts": given["parts"] or list(PARTS)}


def main(
    parts: list[str], encoder: list[str], repeats: int, peak_tflops: float | None, against: Path | None, figures: Path | None
) -> None:  # fmt: skip
    ops.load()
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
    print_origin("bench.training", str(repeats))
    print(f"{'what':28} {'way':10} {'ms':>12} {'x':>8} {'images/s':>12}")
    more = {"start": (against,), "epoch": (encoder,), "growth": (figures,), "clients": (figures,)}
    for part in PARTS:
        if part in parts:
            PARTS[part](partial(compare, repeats=repeats, peak_tflops=peak_tflops), *more.get(part, ()))


if __name__ == "__main__":
    with user_errors("bench.training"):
        main(**parse_options())
