import copy
import math

import pytest
import torch
from conftest import CPU, KINDS, networks_of, objective, ready, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import ops
import training
from data import draw_views, load_images
from options import Options
from training import Step, cosine, local_batches, local_training


class Recorder(TorchDispatchMode):
    """Records each operation and its tensors' shapes, and asserts that all of these tensors lie on one device."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.calls = device, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert all(t.device == self.device for t in tensors), f"{operation} mixes {[t.device for t in tensors]}"
        self.calls.append((str(operation), [list(t.shape) for t in tensors]))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_local_training_never_waits_for_the_device(monkeypatch, kind):
    """On the meta device, every synchronisation and every mixing with another device's tensors raises. Nothing is copied there either."""
    meta = torch.device("meta")
    net = ready(networks_of(kind, torch.arange(16), meta))
    images = torch.empty(16, 3, 16, 16, dtype=torch.uint8, device=meta)
    batches = local_batches(torch.arange(16, device=meta), 2, 8, None, net.batches)
    for constructor in ("tensor", "as_tensor", "from_numpy"):  # each would copy from the host, unseen by the recorder
        monkeypatch.setattr(torch, constructor, None)
    with Recorder(meta) as recorder:
        loss = local_training(Step(net, images), batches, 0.05)
    assert len(recorder.calls) > 500
    assert loss.device == meta and loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


@pytest.mark.parametrize("kind", ["byol", "fedu2"])
def test_every_step_is_the_same_sequence_of_operations(npz, kind):
    """A CUDA graph needs this for all images, draws and states. The first record also has what comes before the steps."""
    images = load_images(str(npz)).x_train
    net, steps = networks_of(kind), []
    with Recorder(CPU) as recorder:

        def batches():
            for batch in local_batches(torch.arange(32), 1, 8, torch.Generator().manual_seed(0)):
                yield batch
                steps.append(recorder.calls[:])
                recorder.calls.clear()

        local_training(Step(net, images), batches(), 0.05)
    assert len(steps) == 4 and len(steps[1]) > 200
    assert steps[1] == steps[2] == steps[3]


def test_views_and_loss_compile_without_a_graph_break():
    """Drawn numbers go in as a tensor: torch.compile knows no generators."""
    net = objective()
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = draw_views(16, 16, 16, CPU, torch.Generator().manual_seed(0))

    def step(images, draws):
        return sum(term() for term in net.terms(*ops.augment(images, draws).chunk(2), torch.arange(8), None))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, draws), step(images, draws))


@pytest.mark.parametrize("kind, decorrelation", [("simclr", 0.0), ("byol", 0.1)])
def test_compiled_networks_train_as_they_are(npz, monkeypatch, kind, decorrelation):
    """Three steps of a network so small that it is compiled in seconds: same loss, vectors and statistics but for rounding."""
    monkeypatch.setitem(models.WIDTHS, "tiny", (8,))
    monkeypatch.setitem(models.HEADS, "tiny", (16, 8))
    images, results = load_images(str(npz)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = networks_of(kind, images.y_train, CPU)
        net.decorrelation = decorrelation
        if compiled:
            net.compile()
        step = Step(net, images.x_train)
        step.generator.manual_seed(0)
        results.append((local_training(step, torch.arange(24).split(8), 0.01), *net.tensors()))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_local_training_is_torchs_sgd_over_the_modules_own_tensors():
    """Momentum and weight decay on everything, here by the flat gradient; a decay large enough to be seen in four steps."""
    torch.manual_seed(0)
    net, images = objective(), torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    module = copy.deepcopy(net.online.module)
    for p in module.parameters():
        p.grad = None
    batches, optimizer = torch.arange(32).split(8), torch.optim.SGD(module.parameters(), 0.01, momentum=0.5, weight_decay=0.1)
    step = training.make_step(net, images, Options(momentum=0.5, weight_decay=0.1))
    step.views = lambda x, *_: (x / 255, x.flip(3) / 255)
    local_training(step, batches, 0.01, ema_decay=1.0)
    target = objective().target.module
    target.load_state_dict(module.encoder.state_dict())
    for batch in batches:
        views = images[batch] / 255, images[batch].flip(3) / 255
        loss = sum(2 - 2 * torch.cosine_similarity(module(x), target(y).detach()).mean() for x, y in (views, views[::-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(net.online.module.parameters(), module.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_batches_are_shuffled_passes_without_the_rest():
    indices = torch.arange(100, 121)
    batches = list(local_batches(indices, 2, 8, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [8] * 4
    first, second = torch.cat(batches[:2]).tolist(), torch.cat(batches[2:]).tolist()
    assert len(set(first)) == len(set(second)) == 16 and first != second and set(first) <= set(range(100, 121))


def test_without_decay_the_target_is_the_online_encoder(npz):
    """A client's first round with --first-target shared has no decay."""
    net = objective()
    images = load_images(str(npz)).x_train
    for ema_decay in (0.0, 0.99):
        batches = local_batches(torch.arange(16), 1, 8, torch.Generator().manual_seed(0))
        local_training(Step(net, images), batches, 0.05, ema_decay)
        weights = net.target.param_slice
        assert torch.equal(net.target.vector[weights], net.parts["encoder"][weights]) == (ema_decay == 0)


def test_learning_rate_is_a_cosine_over_rounds():
    rates = [cosine(0.032, r, 100) for r in (0, 50, 99)]
    assert rates == pytest.approx([0.032, 0.016, 0.032 * (1 + math.cos(0.99 * math.pi)) / 2])


def test_bf16_trains(tiny, tmp_path):
    losses = [run(tmp_path / p, *tiny, "--precision", p)["metrics"][-1]["loss"] for p in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_narrow_resnet_trains(tiny, tmp_path):
    result = run(tmp_path / "run", *tiny, "--encoder", "resnet18-narrow", "--rounds", "2")
    assert result["metrics"][1]["loss"] < result["metrics"][0]["loss"]


@pytest.mark.parametrize("method, strength", [("fedmoco-v1", 0.4), ("fedmoco-v2", 0.8), ("fedu", 0.8)])
def test_moco_v1_has_the_mild_colours_of_the_authors_code(tiny, tmp_path, monkeypatch, method, strength):
    views, augment = [], ops.augment
    monkeypatch.setattr(ops, "augment", lambda images, draws: views.append(draws) or augment(images, draws))
    run(tmp_path / "run", *tiny, "--method", method)
    column = dict(zip(ops.VIEW, torch.cat(views).unbind(1), strict=True))
    for name in ("brightness", "contrast", "saturation"):
        assert 0.9 * strength < (column[name] - 1).abs().max() < 1.000001 * strength
    assert 0.9 * strength / 4 < column["hue"].abs().max() <= strength / 4
