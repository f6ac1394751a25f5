"""Training on a GPU: what the tests on PyTorch's meta device and of the kernels on the CPU cannot show. Skipped where there is none."""

from contextlib import nullcontext

import pytest
import torch
from conftest import refused
from test_fedu import load, load_metrics

import fedu
from data import keyed_generator, load_npz, two_views
from models import OBJECTIVES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def full_precision(monkeypatch):
    """Convolutions in float32 where PyTorch's default is TF32, to compare with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(kind: str, npz, device: torch.device, views=two_views):
    """An objective after seven steps, four of them by a CUDA graph where there is a GPU, and its mean loss; without the wait for it."""
    images = load_npz(npz).to(device)
    torch.manual_seed(0)
    objective = OBJECTIVES[kind]("tiny", device, images.y_train)
    if kind == "fedca":
        objective.align(images.x_train[:8], torch.ones(8, 256, device=device))
    generator = keyed_generator(device, 0, "test")
    batches = torch.arange(56, device=device).split(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return objective, fedu.local_training(objective, images.x_train, batches, generator, 0.05, views=views)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_state(got, want, **tolerance: float) -> None:
    for name, part in got.parts.items():
        for mine, theirs in zip(part, want.parts[name]):
            torch.testing.assert_close(mine.cpu(), theirs.cpu(), **tolerance)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_gives_what_it_gives_on_the_cpu(npz, full_precision, kind):
    """Views that need no random numbers: a GPU's generator draws others."""

    def views(images: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
        return images / 255, images.flip(3) / 255

    (on_gpu, loss), (on_cpu, expected) = (train(kind, npz, device, views) for device in (GPU, CPU))
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert_same_state(on_gpu, on_cpu, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_graph_gives_what_its_step_gives(npz, full_precision, monkeypatch, kind):
    replayed, loss = train(kind, npz, GPU)
    monkeypatch.setattr(fedu, "as_graph", lambda step, generator: nullcontext(step))
    stepwise, expected = train(kind, npz, GPU)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert_same_state(replayed, stepwise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["fedu", "fedema", "fedca", "fedmoco-v2"])
def test_a_run_is_made_resumed_and_evaluated(tiny, command, tmp_path, method):
    options = [*tiny, "--device", "cuda", "--method", method]
    whole = command("fedu.py", *options, "--out", "runs/whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert len(load_metrics(tmp_path / "runs/whole")) == 3
    (tmp_path / "runs/whole/encoder.pt").unlink()
    resumed = command("fedu.py", "--resume", "runs/whole", "--device", "cuda", cwd=tmp_path)
    assert resumed.returncode == 0 and load(tmp_path / "runs/whole")["encoders"], resumed.stderr
    for how in (["--linear", "--epochs", "2"], ["--knn"], ["--semi", "0.5", "--epochs", "2"], ["--plot"]):
        done = command("eval.py", *how, "runs/whole", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_run_on_the_gpu_is_near_the_one_on_the_cpu(tiny, command, tmp_path):
    """Views are drawn by another generator there, so only the scale of what is learned can agree."""
    for device in ("cpu", "cuda"):
        assert command("fedu.py", *tiny, "--device", device, "--out", f"runs/{device}", cwd=tmp_path).returncode == 0
    rows = [load_metrics(tmp_path / "runs" / device)[-1] for device in ("cpu", "cuda")]
    assert abs(fedu.mean(rows[0]["loss"]) - fedu.mean(rows[1]["loss"])) < 0.5
    assert abs(fedu.mean(rows[0]["divergence"]) / fedu.mean(rows[1]["divergence"]) - 1) < 0.5


def test_bf16_trains(tiny, command, tmp_path):
    done = command("fedu.py", *tiny, "--device", "cuda", "--precision", "bf16", "--out", "runs/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_is_not_there(tiny, command, tmp_path):
    done = command("fedu.py", *tiny, "--device", "cuda", cwd=tmp_path, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert refused(done, "--device got cuda")
