"""Kills runs at random moments; `FEDU_KILLS=30 python -m pytest tests/test_crash.py` is the long form."""

import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import Forked

import fedu

KILLS = int(os.environ.get("FEDU_KILLS", 2))


def contents(run) -> tuple[list[dict], list[torch.Tensor], list[dict]]:
    """All that a run leaves, apart from the seconds: metrics, encoder, the state of clients and server."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (encoder,) = torch.load(run / "encoder.pt", weights_only=True)["encoders"]
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (run / "divergence.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    tensors = [t for module in encoder.values() for t in module.values()]
    clients = checkpoint["values"]["clients"] | {"digests": [digest for _, digest in checkpoint["rows"]]}
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics], [*tensors, *checkpoint["tensors"]], clients


def equal(a, b) -> bool:
    """Whether two trees of dicts, lists and tensors are the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.draws
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tiny, tmp_path):
    def start(out: str) -> Forked:
        return Forked(["python", "fedu.py", *tiny, "--rounds", "6", "--out", out], cwd=tmp_path)

    begun = time.perf_counter()
    assert start("straight").wait() == 0
    seconds = time.perf_counter() - begun
    moments = random.Random(0)
    for kill in range(KILLS):
        run = tmp_path / f"killed{kill}"
        process = start(run.name)
        time.sleep(seconds * moments.uniform(0.1, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (run / "config.json").exists():
            (run / ".checkpoint.pt.fragment").write_bytes(b"half")  # as a kill while writing leaves it, seldom
            fedu.resume(run)
        else:
            assert start(run.name).wait() == 0
        assert not list(run.glob(".*"))
        assert all(map(equal, contents(run), contents(tmp_path / "straight"))), f"kill {kill}"
