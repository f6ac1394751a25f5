"""Several processes: rank 0 holds the federation and alone writes, the others train the clients that it sends them.

`torchrun` starts them, and without it there is rank 0 alone. What travels is what a client trains from and what became of it, so a rank
needs nothing but the images: gloo carries it between CPUs, nccl between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from cli import RANK, InputError, first_line
from models import Objective

COUNT = int(os.environ.get("WORLD_SIZE", 1))
STOP = -1


@contextmanager
def together(device: torch.device):
    """Join the other processes, if there are any, each with a GPU of its own; at the end rank 0 dismisses them."""
    if COUNT == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # a rank that dies is noticed by its closed connection, so a wait may be as long as a client's training
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    try:
        yield
        for rank in range(1, COUNT) if RANK == 0 else ():
            send([torch.tensor([STOP, 0, 0, 0, 0], device=device)], rank)
    finally:
        distributed.destroy_process_group()


def networks(objective: Objective) -> list[Tensor]:
    """All that training changes, as views."""
    return [*objective.online.state, *(t for name in objective.own for t in objective.parts[name])]


def send_client(rank: int, round_: int, client: int, fresh: bool, objective: Objective) -> None:
    """Let a rank train a client from what the objective's networks hold."""
    header = torch.tensor([round_, client, fresh, *objective.shared.shape], device=objective.shared.device)
    send([header, *networks(objective), objective.shared], rank)


def receive_client(rank: int, objective: Objective) -> tuple[float, Tensor]:
    """Take what became of it into the objective's networks; returns the loss and what the client shares."""
    result = torch.empty(3, dtype=torch.float64, device=objective.shared.device)
    receive([result, *networks(objective)], rank)
    loss, *shape = result.tolist()
    share = objective.shared.new_empty([int(size) for size in shape])
    receive([share], rank)
    return loss, share


def serve(objective: Objective, train: Callable[[int, int, bool], tuple[float, Tensor]]) -> None:
    """The other ranks' work: `train(round, client, fresh)` on what rank 0 sends, until it sends no more."""
    header = torch.empty(5, dtype=torch.int64, device=objective.shared.device)
    while True:
        receive([header], 0)
        round_, client, fresh, *shape = header.tolist()
        if round_ == STOP:
            return
        objective.shared = objective.shared.new_empty(shape)
        receive([*networks(objective), objective.shared], 0)
        loss, share = train(round_, client, bool(fresh))
        result = torch.tensor([loss, *share.shape], dtype=torch.float64, device=header.device)
        send([result, *networks(objective), share], 0)


def send(tensors: list[Tensor], rank: int) -> None:
    each(distributed.send, tensors, rank)


def receive(tensors: list[Tensor], rank: int) -> None:
    each(distributed.recv, tensors, rank)


def each(transfer: Callable[[Tensor, int], object], tensors: list[Tensor], rank: int) -> None:
    try:
        for tensor in tensors:
            if tensor.numel():
                transfer(tensor, rank)
    except RuntimeError as error:  # its connection is closed
        raise InputError(f"rank {rank} has ended: --resume continues after the last full round ({first_line(error)})") from None
