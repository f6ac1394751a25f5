"""Several processes: rank 0 holds the federation and writes all files, the other ranks train the clients that it sends them.

`torchrun` starts them; without it there is only rank 0. A client's networks travel to a rank before its training and back after it,
by gloo between CPUs and by nccl between GPUs. Of everything else, a rank needs only the images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed

from runtime.cli import RANK, InputError, first_line

COUNT = int(os.environ.get("WORLD_SIZE", 1))
JOB = 4  # number of integers in a job: round, client, whether it is the client's first round, clients of the round
STOP = -1
Turn = TypeVar("Turn")


class Trainable(Protocol):
    """What the ranks train: `tensors()` are of fixed shape and changed in place; `shared` is one more of any shape `[N, d]`."""

    shared: Tensor

    def tensors(self) -> list[Tensor]: ...


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks, if there are any; each uses a GPU of its own. At the end rank 0 tells them to stop."""
    if COUNT == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # a rank's death is noticed by its closed connection, so the timeout need not be shorter than a client's training
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    try:
        yield
        for rank in range(1, COUNT) if RANK == 0 else ():
            transfer(distributed.send, [torch.tensor([STOP] + [0] * (JOB + 1), device=device)], rank)
    finally:
        distributed.destroy_process_group()


def train_all(
    turns: Sequence[Turn], start: Callable[[Turn], tuple[int, ...]], train: Callable[..., tuple[float, Tensor]], networks: Trainable
) -> Iterator[tuple[Turn, float, Tensor]]:
    """Train every turn, one on each rank at a time, and yield them in their order with the loss and what the client shares.

    start: fills the networks with what a turn starts from, and returns its job. train: does the job, which changes the networks.
    When a turn is yielded, the networks hold what it trained.
    """
    for first in range(0, len(turns), COUNT):
        wave = turns[first : first + COUNT]
        for rank, turn in reversed(list(enumerate(wave))):  # this rank's own turn is loaded last, and stays in the networks
            job = start(turn)
            if rank:
                header = torch.tensor([*job, *networks.shared.shape], device=networks.shared.device)
                transfer(distributed.send, [header, *networks.tensors(), networks.shared], rank)
        for rank, turn in enumerate(wave):
            yield turn, *(receive_result(rank, networks) if rank else train(*job))


def receive_result(rank: int, networks: Trainable) -> tuple[float, Tensor]:
    """Receive what a rank trained into the networks; returns the loss and what the client shares."""
    result = torch.empty(3, dtype=torch.float64, device=networks.shared.device)
    transfer(distributed.recv, [result, *networks.tensors()], rank)
    loss, *shape = result.tolist()
    shared = networks.shared.new_empty([int(size) for size in shape])
    transfer(distributed.recv, [shared], rank)
    return loss, shared


def serve(train: Callable[..., tuple[float, Tensor]], networks: Trainable) -> None:
    """What the other ranks do: they train each client that rank 0 sends, until it says stop."""
    header = torch.empty(JOB + 2, dtype=torch.int64, device=networks.shared.device)
    while True:
        transfer(distributed.recv, [header], 0)
        job, shape = header[:JOB].tolist(), header[JOB:].tolist()
        if job[0] == STOP:
            return
        networks.shared = networks.shared.new_empty(shape)
        transfer(distributed.recv, [*networks.tensors(), networks.shared], 0)
        loss, shared = train(*job)
        result = torch.tensor([loss, *shared.shape], dtype=torch.float64, device=header.device)
        transfer(distributed.send, [result, *networks.tensors(), shared], 0)


def transfer(send_or_receive: Callable[[Tensor, int], object], tensors: list[Tensor], rank: int) -> None:
    """Send tensors to a rank, or receive them from it; an empty one does not travel. Raises InputError if the rank has ended."""
    try:
        for tensor in tensors:
            if tensor.numel():
                send_or_receive(tensor, rank)
    except RuntimeError as error:  # its connection is closed
        raise InputError(f"rank {rank} has ended: --resume continues after the last full round ({first_line(error)})") from None
