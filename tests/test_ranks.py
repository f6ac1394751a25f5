"""Several processes by torchrun: the same bits as one, and no hang when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, load_metrics, run

import fedu
from options import parse
from runtime import cli

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
        (3, ["--method", "fedmoco-v2", "--clients", "4", "--clients-per-round", "2"]),  # fewer than ranks
        (2, ["--method", "single", "--clients", "3"]),
    ],
)
def test_several_processes_give_the_bits_of_one(tiny, tmp_path, count, more):
    """Also, one process continues a run that several began."""
    run(tmp_path / "alone", *tiny, *more)
    done = torchrun(count, *tiny, *more, "--out", "together", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("holds the run") == 1, done.stderr
    assert_same_runs(tmp_path / "alone", tmp_path / "together")
    for name in ("checkpoint.pt", "encoder.pt"):
        (tmp_path / "together" / name).unlink()
    fedu.resume(tmp_path / "together")
    assert_same_runs(tmp_path / "alone", tmp_path / "together")


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_and_the_last_full_round_resumes(tiny, tmp_path, rank):
    options = [*tiny, "--rounds", "8", "--out", "run"]
    with subprocess.Popen(
        [*TORCHRUN, "2", str(ROOT / "fedu.py"), *options],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None, process.stderr.read()
        os.kill(child_of(process.pid, rank), signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    if rank:
        assert "rank 1 has ended" in errors or "interrupted; continue with" in errors, errors
    fedu.resume(tmp_path / "run")
    run(tmp_path / "straight", *tiny, "--rounds", "8")
    assert_same_runs(tmp_path / "straight", tmp_path / "run")
    assert len(load_metrics(tmp_path / "run")) == 8


def child_of(parent: int, rank: int) -> int:
    """The process of this rank, from what /proc tells of torchrun's children."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(child) for child in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes())
