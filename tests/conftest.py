import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    """A tiny data set: 64 training and 16 test images of 16x16 pixels in 4 classes, each class with a colour of its own."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    rng = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[:, None, None]
    arrays = {}
    for split, count in (("train", 64), ("test", 16)):
        labels = np.arange(count) % 4
        arrays[f"x_{split}"] = (0.6 * colours[labels] + 0.4 * rng.integers(0, 256, (count, 16, 16, 3))).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny(npz) -> list[str]:
    """Options of a run that ends within a second or two."""
    options = {"--dataset": npz, "--encoder": "small", "--clients": 2, "--rounds": 3, "--local-epochs": 1, "--batch-size": 8}
    return [str(x) for item in (options | {"--lr": 0.05, "--knn-every": 1, "--device": "cpu"}).items() for x in item]


@pytest.fixture(scope="session")
def command():
    def run(script: str, *arguments, cwd: Path, variables: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
        line = [sys.executable, str(ROOT / script), *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as in this process: sums over a batch depend on it in the last bit
        env |= variables or {}
        return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, env=env, **kwargs)

    return run


@pytest.fixture(scope="session")
def finished(tiny, command, tmp_path_factory) -> Path:
    """A folder in which runs/run is a finished FedU run on the tiny data set."""
    folder = tmp_path_factory.mktemp("finished")
    done = command("fedu.py", *tiny, "--out", "runs/run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "runs/run holds the run" in done.stdout
    return folder


def refused(done: subprocess.CompletedProcess, *words: str) -> bool:
    """One sentence on stderr that has all the words, and exit status 2."""
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} not in {done.stderr!r}"
    return True
