"""What all benchmarks share: medians of ways that take turns, a heading that says what made the figures, and images to train on."""

import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import Images, load_images
from runtime.run import describe_code

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_ways(
    ways: dict[str, Callable], repeats: int, budget: float, device: str, commands: bool = False
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each way. They take turns, so that a busy moment of the machine falls on all; a fast way is timed in batches.

    commands: the ways are whole commands, which are too long for a call that only warms up. Each returns its own seconds, or None.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def seconds(way: Callable, calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            own = way()
        wait()
        return own if commands and own is not None else (time.perf_counter() - start) / calls

    calls, rounds = dict.fromkeys(ways, 1), repeats
    if not commands:
        once = {name: seconds(way, 1) for name, way in ways.items()}  # warms up
        once = {name: t if t > 0.1 else seconds(ways[name], 1) for name, t in once.items()}
        calls = {name: max(1, min(1000, int(0.005 / t))) for name, t in once.items()}
        rounds = int(max(3, min(repeats, budget / sum(once[name] * calls[name] for name in ways))))
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def print_origin(module: str, sizes: str, device: str | None = None) -> None:
    """What figures are made by: the command, torch, the device (a GPU where there is one), the commit, and the number of timings."""
    device = device or DEVICE.type
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of {describe_cpu()}"
    print("$", shlex.join(["python", "-m", module, *sys.argv[1:]]))
    print(f"torch {torch.__version__}, {device}: {where}; commit {describe_code()['commit']}; medians of {sizes}", flush=True)


def describe_cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def some_images(count: int) -> Tensor:
    return load_images("fashion").x_train[:count].contiguous().to(DEVICE)


def as_large_as_cifar10() -> Images:
    """50,000 and 10,000 random images: memory does not depend on what they show."""
    x_train, x_test = (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (50_000, 10_000))
    return Images(x_train, torch.arange(50_000) % 10, x_test, torch.arange(10_000) % 10, 10)
