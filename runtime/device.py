"""The device that a run computes on: its choice and name, a training step as one CUDA graph, and the C library's memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from runtime import ranks
from runtime.cli import InputError

GRAPHS_ON = "cuda"  # the type of device on which a step is launched as a graph


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises InputError for cuda where torch finds no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device got cuda, but torch finds no usable CUDA GPU here; it needs cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, processes = torch.get_num_threads(), ranks.count()
    return "cpu, " + f"{processes} processes of " * (processes > 1) + f"{threads} thread{'s' * (threads > 1)}"


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside this block."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


class StepGraph:
    """A training step as a CUDA graph: one launch for the host instead of some 400, for which a GPU would wait.

    The step takes a batch, always of the same size. All else that it reads and changes are tensors that stay where they are, so the graph
    is captured once and serves whatever they hold later. The first three steps run as they are, on the stream that the graph is captured
    on, since PyTorch's libraries, the gradients and the momentum have to exist before the capture. It is used inside a `with` block.
    """

    def __init__(self, step: Callable[[Tensor], None], generator: torch.Generator):
        self.step, self.generator = step, generator
        self.stream, self.graph, self.first = torch.cuda.Stream(), torch.cuda.CUDAGraph(), iter(range(3))
        self.batch: Tensor | None = None  # where the captured step reads its batch

    def __call__(self, batch: Tensor) -> None:
        if next(self.first, None) is not None:
            return self.step(batch)
        if self.batch is None:
            self.batch = batch.clone()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step(self.batch)
        self.batch.copy_(batch)
        self.graph.replay()

    def __enter__(self) -> StepGraph:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.on_stream = torch.cuda.stream(self.stream)
        self.on_stream.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.on_stream.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc; cached, since `libc_ver` reads the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_memory() -> None:
    """Let the C library keep the memory that tensors free, instead of giving it back to the system and faulting it in at every step.

    A fifth of a ResNet-18's step on the CPU went there. Blocks of 64 MB and more, such as whole networks, are still mapped and unmapped,
    since they would fragment the heap. Does nothing where the library is not glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    if libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give back what `keep_memory` kept: local training's activations, before the server's vectors need room."""
    if libc := glibc():
        libc.malloc_trim(0)
