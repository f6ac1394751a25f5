"""Several processes, by --processes or by torchrun: the same bits as one, and no hang when one of them dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, heed, load, load_metrics, run

import fedu
from options import Options, parse
from runtime import cli, ranks
from runtime.cli import InputError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(count: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    line = [*TORCHRUN, str(count), str(ROOT / "fedu.py"), *arguments]
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def assert_same_runs(a: Path, b: Path) -> None:
    one, other = load(a), load(b)
    assert all(map(torch.equal, one["encoders"], other["encoders"]))
    assert [row | {"seconds": 0} for row in one["metrics"]] == [row | {"seconds": 0} for row in other["metrics"]]


@pytest.mark.parametrize(
    "count, more",
    [
        (2, ["--method", "fedca", "--clients", "5", "--partition", "dirichlet", "--batch-size", "2"]),  # of unequal size
        (3, ["--method", "fedmoco-v2", "--clients", "4", "--clients-per-round", "2"]),  # fewer than processes
        (2, ["--method", "fedx", "--clients", "3"]),
        (2, ["--method", "orchestra", "--clients", "3"]),
        (2, ["--method", "single", "--clients", "3"]),
        (2, ["--method", "fedu2", "--clients", "3", "--dropout", "0.2", "--statistics", "local"]),
        pytest.param(
            2, ["--encoder", "timm:test_vit", "--clients", "3", "--rounds", "2"],
            marks=pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed"),
        ),
    ],
)  # fmt: skip
def test_several_processes_give_the_bits_of_one(tiny, tmp_path, monkeypatch, count, more):
    """Also, one process continues a run that several began."""
    monkeypatch.setattr("methods.orchestra.ITERATIONS", 20)
    run(tmp_path / "alone", *tiny, *more)
    run(tmp_path / "together", *tiny, *more, "--processes", str(count))
    assert_same_runs(tmp_path / "alone", tmp_path / "together")
    for name in ("checkpoint.pt", "encoder.pt"):
        (tmp_path / "together" / name).unlink()
    fedu.resume(tmp_path / "together", processes=1)
    assert_same_runs(tmp_path / "alone", tmp_path / "together")
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()


def test_processes_share_the_threads_even_after_torch_used_them_here(tiny, tmp_path):
    """As in a notebook: OpenMP's threads and autograd were at work before the fork. Two processes of two threads have the bits of one."""
    script = f"""
import torch, fedu
from options import parse
torch.set_num_threads(4)
torch.nn.Conv2d(3, 8, 3)(torch.randn(64, 3, 64, 64)).sum().backward()
fedu.main(parse({[*tiny, "--processes", "2", "--out", str(tmp_path / "together")]}))
assert torch.get_num_threads() == 4
torch.set_num_threads(2)
fedu.main(parse({[*tiny, "--processes", "1", "--out", str(tmp_path / "alone")]}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cpu, 2 processes of 2 threads" in done.stdout and "cpu, 2 threads" in done.stdout
    assert_same_runs(tmp_path / "alone", tmp_path / "together")


@pytest.mark.parametrize(
    "threads, jobs, processes",
    [(1, 5, 1), (2, 1, 1), (2, 2, 2), (2, 4, 2), (2, 5, 3), (2, 7, 4), (4, 5, 5), (4, 8, 4), (8, 5, 5), (8, 10, 10), (16, 5, 5)],
)
def test_as_many_processes_as_end_a_round_first(threads, jobs, processes):
    assert ranks.best_count(threads, jobs) == processes


def test_how_many_processes_a_run_has(monkeypatch, refuses):
    def count(device="cpu", **options) -> int:
        return fedu.num_processes(Options(**options), torch.device(device))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert count() == 5 and count(clients_per_round=2) == 2 and count(processes=3) == 3 and count(processes=9) == 5
    assert count(method="central") == 1 and count(method="untrained") == 1 and count("cuda") == 1 and count("cuda", processes=1) == 1
    assert refuses(lambda: count("cuda", processes=2), "--processes got 2, needs a CPU")
    assert refuses(lambda: parse(["--processes", "0"]), "--processes: got '0', needs a whole number of at least 1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count() == 1 and count(processes=3) == 3
    monkeypatch.setattr(ranks, "TORCHRUN", 2)
    assert count() == 1
    assert refuses(lambda: count(processes=2), "--processes got 2, needs a CPU and no torchrun")


def test_what_another_process_meets_is_said_and_ends_the_run(tiny, tmp_path, monkeypatch, capfd):
    main, train = os.getpid(), fedu.train_client

    def fail_elsewhere(*arguments):
        if os.getpid() != main:
            raise RuntimeError("not enough memory: you tried to allocate 8 bytes")
        return train(*arguments)

    monkeypatch.setattr(fedu, "train_client", fail_elsewhere)
    with pytest.raises(InputError, match="rank 1 has ended: --resume continues after the last full round"):
        fedu.main(parse([*tiny, "--processes", "2", "--out", str(tmp_path / "run")]))
    assert "rank 1: RuntimeError: not enough memory: you tried to allocate 8 bytes\n" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_several_processes_continue_a_run_that_one_began(finished, stopped):
    (stopped / "checkpoint.pt").unlink()
    resumed = torchrun(2, "--resume", "run", cwd=stopped.parent)
    assert resumed.returncode == 0 and "continuing after 2 of 3 rounds" in resumed.stdout, resumed.stderr
    assert_same_runs(finished / "runs/run", stopped)


def test_a_mistake_is_one_sentence_from_all(tmp_path):
    done = torchrun(2, "--dataset", "absent.npz", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("absent.npz does not exist") == 1, done.stderr


def test_another_rank_says_what_only_it_has_met(monkeypatch, refuses):
    """It waits first: of an error that all meet, rank 0 speaks, and torchrun ends the others in that time."""
    waited = []
    monkeypatch.setattr(cli, "RANK", 1)
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=waited.append))
    assert refuses(lambda: parse(["--clients", "0"]), "rank 1: ", "--clients") and waited == [3]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(folder, *tiny, "--rounds", "5")
    return folder


@pytest.mark.parametrize("whom, how", [("another", "SIGKILL"), ("first", "SIGKILL"), ("first", "SIGTERM"), ("all", "SIGINT")])
def test_when_a_process_dies_the_others_end_and_the_last_full_round_resumes(tiny, tmp_path, straight, whom, how):
    line = [sys.executable, str(ROOT / "fedu.py"), *tiny, "--rounds", "5", "--processes", "2", "--out", "run"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True, preexec_fn=heed, **streams) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None, process.stderr.read()
        (other,) = children(process.pid)
        send = os.killpg if whom == "all" else os.kill
        send(other if whom == "another" else process.pid, signal.Signals[how])
        _, errors = process.communicate(timeout=60)
    if how != "SIGKILL" or whom == "another":
        assert errors.strip().count("\n") == 0 and "--resume" in errors, errors
        assert process.returncode == (2 if whom == "another" else 130)
    while Path(f"/proc/{other}").exists():  # it ends soon, even if the first process could tell it nothing
        time.sleep(0.1)
    fedu.resume(tmp_path / "run")
    assert_same_runs(straight, tmp_path / "run")
    assert len(load_metrics(tmp_path / "run")) == 5


def test_torchrun_ends_when_one_of_its_ranks_dies(tiny, tmp_path):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [*TORCHRUN, "2", str(ROOT / "fedu.py"), *tiny, "--rounds", "5", "--out", "run"]
    with subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, **streams) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None, process.stderr.read()
        os.kill(next(k for k in children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{k}/environ").read_bytes()), signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "rank 1 has ended" in errors or "interrupted; continue with" in errors, errors


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
