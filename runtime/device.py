"""The device that a run computes on: its choice and name, a training step as one CUDA graph, and the C library's memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from runtime.cli import InputError


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises InputError for cuda where torch finds no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device got cuda, but torch finds no usable CUDA GPU here; it wants cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@contextmanager
def as_graph(step: Callable[[Tensor], None], generator: torch.Generator) -> Iterator[Callable[[Tensor], None]]:
    """A training step as a CUDA graph: one launch for the host instead of some 400, for which a GPU would wait.

    The first three steps run as they are, on the stream that the graph is captured on: PyTorch wants its libraries, the gradients and
    the momentum to be there by then. Gives what takes a batch, always of the same size, in place of `step`.
    """
    stream, graph, first = torch.cuda.Stream(), torch.cuda.CUDAGraph(), iter(range(3))
    captured: Tensor | None = None

    def run(batch: Tensor) -> None:
        nonlocal captured
        if next(first, None) is not None:
            return step(batch)
        if captured is None:
            captured = batch.clone()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=stream):
                step(captured)
        captured.copy_(batch)
        graph.replay()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield run
    torch.cuda.current_stream().wait_stream(stream)


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc; asked once, since the answer is read from the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_memory() -> None:
    """Let the C library keep the memory that tensors free, instead of giving it back to the system and faulting it in at every step.

    A fifth of a ResNet-18's step on the CPU went there. Vectors of whole networks, 64 MB or more, are still mapped and unmapped as they
    come and go, since they would leave holes. Does nothing where the library is not glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    if libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give back what `keep_memory` kept: local training's activations, before the server's vectors need room."""
    if libc := glibc():
        libc.malloc_trim(0)
