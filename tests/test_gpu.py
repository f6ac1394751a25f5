"""Training on a GPU: what the tests on PyTorch's meta device and of the kernels on the CPU cannot show. Skipped where there is none."""

from statistics import mean

import pytest
import torch
from conftest import KINDS, load, load_metrics, networks_of, ready, refused

import training
from data import load_images, random_views

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def full_precision(monkeypatch):
    """Convolutions in float32 where PyTorch's default is TF32, to compare with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(kind: str, npz, device: torch.device, views=random_views):
    """An objective before and after two clients of four steps, on a GPU five of them by one graph and none waited for, and the mean loss.

    So small a learning rate that rounding is not amplified: at 0.01, 1e-6 in the weights becomes 10% of the update.
    """
    images = load_images(str(npz)).to(device)
    torch.manual_seed(0)
    objective = networks_of(kind, images.y_train, device)
    ready(objective)
    step = training.Step(objective, images.x_train, views=views)
    batches = [batch.expand(objective.batches, -1).squeeze(0) for batch in torch.arange(64, device=device).split(8)]
    before = {name: part.clone() for name, part in objective.parts.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for client, lr in enumerate((0.0005, 0.0004)):
            objective.begin(client, 2)
            step.generator.manual_seed(client)
            loss = training.local_training(step, batches[4 * client : 4 * client + 4], lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return before, objective.parts, loss


def assert_same_update(got, want) -> None:
    """Up to rounding: to 2% of the length of each vector's update."""
    torch.testing.assert_close(got[2].cpu(), want[2].cpu(), rtol=1e-4, atol=1e-4)
    for name in got[0]:
        began, mine, theirs = want[0][name], got[1][name].cpu(), want[1][name].cpu()
        assert (mine - theirs).norm() <= 0.02 * (theirs - began.cpu()).norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_what_it_gives_on_the_cpu(npz, full_precision, kind):
    """Views that need no random numbers: a GPU's generator draws others."""

    def views(images: torch.Tensor, _, count: int = 2) -> tuple[torch.Tensor, ...]:
        return (images / 255, images.flip(3) / 255)[:count]

    assert_same_update(train(kind, npz, GPU, views), train(kind, npz, CPU, views))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_gives_what_its_steps_give(npz, full_precision, monkeypatch, kind):
    replayed = train(kind, npz, GPU)
    monkeypatch.setattr(training, "GRAPHS_ON", "nothing")
    assert_same_update(replayed, train(kind, npz, GPU))


@pytest.mark.parametrize("method", ["fedu", "fedema", "fedca", "fedmoco-v1"])
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
    assert abs(mean(rows[0]["loss"]) - mean(rows[1]["loss"])) < 0.5
    assert abs(mean(rows[0]["divergence"]) / mean(rows[1]["divergence"]) - 1) < 0.5


def test_bf16_trains(tiny, command, tmp_path):
    done = command("fedu.py", *tiny, "--device", "cuda", "--precision", "bf16", "--out", "runs/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_is_not_there(tiny, command, tmp_path):
    done = command("fedu.py", *tiny, "--device", "cuda", cwd=tmp_path, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert refused(done, "--device got cuda")
