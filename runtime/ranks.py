"""Several processes: rank 0 holds the federation and writes all files, the other ranks train the clients that it sends them.

`torchrun` starts them, or on a CPU `forked`; otherwise there is only rank 0. A client's networks travel to a rank before its training and
back after it, by gloo between CPUs and by nccl between GPUs. Of everything else, a rank needs only the images.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from typing import NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, distributed

from runtime.cli import RANK, InputError, first_line

TORCHRUN = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes that torchrun started
TIMEOUT = timedelta(days=30)  # a rank's death is noticed by its closed connection, so this need not be shorter than a client's training
JOB = 4  # number of integers in a job: round, client, whether it is the client's first round, clients of the round
STOP = -1
Turn = TypeVar("Turn")


class Ended(InputError):
    """Another rank has ended."""


class Trainable(Protocol):
    """What the ranks train: `tensors()` are of fixed shape and changed in place; `shared` is one more of any shape `[N, d]`."""

    shared: Tensor

    def tensors(self) -> list[Tensor]: ...


def count() -> int:
    """The number of ranks that train side by side now."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks that torchrun started, if there are any; each uses a GPU of its own. At the end rank 0 tells them to stop."""
    if TORCHRUN == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
        for rank in range(1, TORCHRUN) if RANK == 0 else ():
            transfer(distributed.send, [torch.tensor([STOP] + [0] * (JOB + 1), device=device)], rank)
    finally:
        distributed.destroy_process_group()


def best_count(threads: int, jobs: int) -> int:
    """How many processes end `jobs` equal jobs first on `threads` cores, the fewest if several do.

    If the cores do not divide the jobs, this can be more than there are cores: 5 jobs on 2 cores take the time of 3 by two processes, and
    of 2.5 by three, whose first three jobs share the cores.
    """

    def duration(processes: int) -> float:
        full, rest = divmod(jobs, processes)
        return full * max(1, processes / threads) + (max(1, rest / threads) if rest else 0)

    return min(range(min(jobs, threads), min(jobs, 2 * threads) + 1), key=duration)


@contextmanager
def forked(processes: int, work: Callable[[], None]) -> Iterator[AbstractContextManager]:
    """While the block runs, `processes - 1` copies of this process do `work` as the other ranks, on the CPU; they share its memory.

    A copy ends with the block, and also if this process is killed. Ctrl-C does not reach it. Gives the context in which a copy's InputError
    is one here too.
    """
    if processes == 1:
        yield nullcontext()
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine takes part, whatever address this one's name stands for
    fork, copies = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder:
        meet, mistake = Path(folder, "ranks"), Path(folder, "mistake")
        try:
            former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                for rank in range(1, processes):
                    process = fork.Process(target=copy, args=(rank, processes, meet, mistake, work), daemon=True)
                    process.start()
                    copies.append(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            try:
                join(0, processes, meet)
            except RuntimeError as error:
                raise InputError(f"the processes of this run do not reach each other, use --processes 1 ({first_line(error)})") from None
            yield passed_on(mistake)
        finally:
            for process in copies:
                process.kill()
                process.join()
            if distributed.is_initialized():
                distributed.destroy_process_group()


@contextmanager
def passed_on(mistake: Path) -> Iterator[None]:
    """Raise the InputError whose sentence a copy left in a file before it ended."""
    try:
        yield
    except Ended:
        if mistake.exists():
            raise InputError(mistake.read_text()) from None
        raise


def join(rank: int, processes: int, meet: Path) -> None:
    """Join the group of forked processes. meet: a file by which they find each other."""
    store = distributed.FileStore(str(meet), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIMEOUT)


def copy(rank: int, processes: int, meet: Path, mistake: Path, work: Callable[[], None]) -> NoReturn:
    """What a forked process does, until it is killed or the first process is gone. mistake: the file for an InputError's sentence.

    It works in a new thread: the main one believes in OpenMP's threads of the first process, which do not exist here.
    """

    def serve(threads: int = torch.get_num_threads()) -> None:
        try:
            torch.set_num_threads(threads)
            join(rank, processes, meet)
            work()
        except Ended:  # the first process
            pass
        except InputError as error:
            mistake.write_text(str(error))
        except Exception as error:
            print(f"rank {rank}: {first_line(error)}", file=sys.stderr, flush=True)
        os._exit(1)

    Thread(target=serve).start()
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def train_all(
    turns: Sequence[Turn], start: Callable[[Turn], tuple[int, ...]], train: Callable[..., tuple[float, Tensor]], networks: Trainable
) -> Iterator[tuple[Turn, float, Tensor]]:
    """Train every turn, one on each rank at a time, and yield them in their order with the loss and what the client shares.

    start: fills the networks with what a turn starts from, and returns its job. train: does the job, which changes the networks.
    When a turn is yielded, the networks hold what it trained.
    """
    for first in range(0, len(turns), count()):
        wave = turns[first : first + count()]
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
    """Send tensors to a rank, or receive them from it; an empty one does not travel. Raises Ended if the rank has."""
    try:
        for tensor in tensors:
            if tensor.numel():
                send_or_receive(tensor, rank)
    except RuntimeError as error:  # its connection is closed
        raise Ended(
            f"rank {rank} has ended: --resume continues after the last full round; if memory ran out, "
            f"fewer --processes need less ({first_line(error)})"
        ) from None
