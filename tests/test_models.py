import copy
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import slow_fedu
import torch
import torchvision
from conftest import KINDS, networks_of, ready

from methods.alignuniform import AlignUniform
from methods.barlow import BarlowTwins
from methods.byol import BYOL
from methods.fedca import FedCA
from methods.fedu2 import FedU2, distance_from_uniform
from methods.fedx import FedX
from methods.moco import MoCo
from methods.orchestra import Orchestra, global_centroids, local_centroids, sinkhorn_knopp, turned
from methods.simclr import SimCLR
from methods.simsiam import SimSiam
from methods.supervised import Supervised
from models import (
    HEADS,
    Encoder,
    Flat,
    Layers,
    Objective,
    build_backbone,
    build_head,
    correlation,
    feature_dim,
    initialise,
    layer_segments,
    load_backbone,
    load_encoders,
    save_encoders,
)
from report.export import export_encoders
from runtime.cli import InputError

CPU = torch.device("cpu")


def byol(name: str = "small", **ablation: bool) -> BYOL:
    torch.manual_seed(0)
    return BYOL(Encoder(name), CPU, **ablation)


@pytest.fixture
def float64(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name, convs, features", [("resnet18", 17, 512), ("resnet50", 49, 2048), ("resnet18-narrow", 17, 128)])
def test_resnets_are_the_papers(name, convs, features):
    with torch.device("meta"):
        backbone = build_backbone(name)
    objective = BYOL(Encoder(name), torch.device("meta"))
    layers = [segment.name for segment in layer_segments(objective.target)]
    assert len(layers) == convs and not any("downsample" in layer or "projector" in layer for layer in layers)
    assert feature_dim(backbone) == features
    assert backbone(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, features)
    stem = backbone.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(backbone.maxpool, torch.nn.Identity)


def test_parameter_counts_with_resnet18():
    objective = BYOL(Encoder("resnet18"), torch.device("meta"))
    encoder, predictor = objective.online.module.encoder, objective.online.module.predictor
    assert count(encoder.backbone) == 11_168_832
    assert count(encoder.projector) == 10_500_096
    assert count(predictor) == len(objective.parts["predictor"][objective.param_slices["predictor"]]) == 16_791_552
    assert len(objective.online.vector[objective.online.param_slice]) == 38_460_480


def test_the_narrow_resnet_has_a_quarter_of_the_channels_in_every_tensor():
    backbones = [build_backbone(name) for name in ("resnet18", "resnet18-narrow")]
    forms = [[(m.kernel_size, m.stride, m.padding) for m in x.modules() if isinstance(m, torch.nn.Conv2d)] for x in backbones]
    assert forms[0] == forms[1] and len(forms[0]) == 20
    whole, narrow = (backbone.state_dict() for backbone in backbones)
    assert whole.keys() == narrow.keys()
    for name, tensor in narrow.items():
        sizes = tensor.shape[:2]
        assert tensor.shape[2:] == whole[name].shape[2:]
        assert sizes == (16, 3) if name == "conv1.weight" else [4 * n for n in sizes] == list(whole[name].shape[:2])
    assert narrow["layer4.1.conv2.weight"].shape == (128, 128, 3, 3) and HEADS["resnet18-narrow"] == HEADS["small"]


@pytest.mark.parametrize("name, groups", [("tiny", 1), ("small", 2), ("resnet18-narrow", 1), ("resnet18", 32), ("resnet50", 32)])
def test_group_norm_stands_where_batch_norm_does(name, groups):
    """In the backbone, with the same initial weights; 16 channels a group in the narrow encoders. groups: of the first."""
    state = {}
    for norm in ("batch", "group"):
        torch.manual_seed(0)
        with torch.device("cpu" if groups < 32 else "meta"):
            encoder = Encoder(name, norm=norm)
        state[norm] = {key: t for key, t in encoder.backbone.state_dict().items() if "running" not in key and "tracked" not in key}
    assert state["batch"].keys() == encoder.backbone.state_dict().keys() and not list(encoder.backbone.buffers())
    assert feature_dim(encoder.backbone) == encoder.projector[0].in_features and isinstance(encoder.projector[1], torch.nn.BatchNorm1d)
    assert all(t.is_meta or torch.equal(t, state["batch"][key]) for key, t in state["group"].items())
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms[0].num_groups == groups
    assert all(m.num_groups == 32 if groups == 32 else m.num_channels // m.num_groups == 16 for m in norms)


@pytest.mark.parametrize("name, inputs", [("resnet18", 128), ("resnet18-narrow", 32)])
def test_initialisation_is_pytorchs_default(name, inputs):
    torch.manual_seed(0)
    conv = build_backbone(name).layer3[0].conv1.weight  # uniform in +-1/sqrt(fan_in), not He's normal
    bound = (inputs * 9) ** -0.5
    assert 0.99 * bound < conv.abs().max() <= bound


def test_exported_backbone_loads_into_torchvisions_resnet():
    objective = byol("resnet18")
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(dict(objective.online.module.encoder.backbone.state_dict()), strict=True)  # a plain dict, as in encoder.pt


@pytest.mark.parametrize("name", HEADS)
def test_parameters_are_views_and_segments_name_their_places(name):
    objective = byol(name) if name == "small" else BYOL(Encoder(name), torch.device("meta"))
    for network in (objective.online, objective.target):
        network.check_views()
        assert [s.begin for s in network.segments[1:]] == [s.end for s in network.segments[:-1]]
        assert (network.segments[0].begin, network.segments[-1].end) == (network.param_slice.start, network.param_slice.stop)
        assert network.param_slice.stop - network.param_slice.start == sum(p.numel() for p in network.module.parameters())
    assert objective.online.vector.dtype == torch.float32
    names = [s.name for s in objective.online.segments[: len(objective.target.segments)]]
    assert names == [f"encoder.{s.name}" for s in objective.target.segments]


def test_the_vector_and_the_module_are_one():
    objective = byol()
    encoder = objective.online.module.encoder
    objective.online.vector.fill_(3)
    objective.online.vector[objective.online.param_slice] = 2
    assert all((p == 2).all() for p in objective.online.module.parameters())
    assert all((b == 3).all() for b in objective.online.module.buffers()) and encoder.backbone[1].num_batches_tracked is None
    first, last = objective.online.module.predictor[0].weight, objective.online.module.predictor[1].running_var
    assert (
        objective.parts["predictor"].data_ptr() == first.data_ptr() and objective.parts["predictor"][-1:].data_ptr() == last[-1:].data_ptr()
    )
    assert objective.parts["encoder"].data_ptr() == encoder.backbone[1].running_mean.data_ptr()
    encoder(torch.rand(4, 3, 16, 16))
    assert not objective.parts["encoder"][: objective.param_slices["encoder"].start].eq(3).any() and last.eq(3).all()


def test_each_part_names_its_parameters():
    objective = byol()
    objective.online.vector.zero_()
    for name in ("encoder", "predictor"):
        objective.parts[name][objective.param_slices[name]] = 1
    assert objective.online.vector.eq(1).sum() == sum(p.numel() for p in objective.online.module.parameters())
    assert all((p == 1).all() for p in objective.online.module.parameters())


def test_flattening_keeps_the_values_and_lays_convolutions_channels_last():
    torch.manual_seed(0)
    module = build_backbone("small")
    before = copy.deepcopy(module)
    flat = Flat(module)
    for mine, theirs in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last) and not module[0].weight.is_contiguous()
    assert module[0].weight.grad.stride() == module[0].weight.stride()
    assert torch.equal(flat.vector[flat.param_slice][: 32 * 27].view(32, 3, 3, 3), before[0].weight.permute(0, 2, 3, 1))


def test_broken_views_are_noticed():
    network = Flat(build_head(3, 4, 2))
    network.module[0].weight.data = network.module[0].weight.data.clone()
    with pytest.raises(AssertionError, match="0.weight is no longer a view"):
        network.check_views()
    network = Flat(build_head(3, 4, 2))
    network.module.zero_grad()  # sets the gradients to None, so that backward makes new ones
    network.module(torch.rand(5, 3)).sum().backward()
    with pytest.raises(AssertionError, match="gradient of 0.weight is no longer a view"):
        network.check_views()


# --------------------------------------------------------------------------------------------------- objectives


def loss(objective: Objective, *views: torch.Tensor) -> torch.Tensor:
    return sum(term() for term in objective.terms(*views, batches_of(objective, len(views[0])), None))


def batches_of(objective: Objective, size: int) -> torch.Tensor:
    """As many batches as a step hands to the objective, all of the same images."""
    return torch.arange(size).expand(objective.batches, -1).squeeze(0)


def with_identity(objective: Objective) -> Objective:
    """The objective with networks that return the views as they are, so that views are projections."""
    objective.online.module = Layers()
    objective.online.module.encoder = objective.online.module.predictor = Layers()
    for name in ("target", "teacher"):
        if hasattr(objective, name):
            getattr(objective, name).module = Layers()
    return objective


def test_loss_by_hand():
    """Identity networks: the loss is 4 - 4 cos(x1, x2), so 0, 4 and 8 for equal, orthogonal and opposite views."""
    objective = with_identity(byol())
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert [loss(objective, a, view).item() for view in (a, b, -a)] == [0.0, 4.0, 8.0]
    # one view turned by 60 degrees, the other pair equal: mean over the batch of 4 - 4 * (1/2, 1)
    c = torch.tensor([[1.0, 3.0**0.5], [0.0, 1.0]])
    assert loss(objective, torch.cat([a, b]), c).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["byol", "simsiam", "moco-v1", "moco-v2", "fedu2", "barlow"])
def test_views_pass_together_as_one_by_one(kind, float64):
    """The loss, the gradients, both networks' running statistics and what else a term changes, as with a pass for each view."""
    results = []
    for one_pass in (True, False):
        torch.manual_seed(0)
        objective = networks_of(kind)
        calls = []
        objective.online.module.encoder.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(output)))
        objective.one_pass, objective.decorrelation = one_pass, 0.1
        views, batch = torch.rand(2, 8, 3, 16, 16), torch.arange(8)
        torch.manual_seed(1)  # of FedU2's draws
        terms = [term() for term in objective.losses(*views, batch, None)]
        sum(terms).backward()
        assert calls == ([16] if one_pass else [8, 8])
        keys = torch.cat(objective.keys) if kind.startswith("moco") else torch.empty(0)
        gradient = objective.online.trainable.grad.clone()
        objective.update(torch.tensor(0.05), momentum=0.9, weight_decay=0.0, ema_decay=0.9)
        results.append([sum(terms), gradient, keys, *objective.tensors()])
    for together, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-10)


def test_resnets_take_view_by_view():
    """Only half of a pass's activations are in memory at a time."""
    objective = networks_of("byol", encoder="resnet18-narrow")
    assert len(objective.terms(*torch.rand(2, 2, 3, 16, 16), torch.arange(2), None)) == 2


def test_differentiating_a_direction_before_the_next_gives_the_whole_gradient():
    """Local training of a ResNet does so to hold one direction's activations at a time."""
    objective = byol()
    objective.one_pass = False
    views = torch.rand(2, 8, 3, 16, 16)
    gradients = []
    for ways in (lambda terms: [term().backward() for term in terms], lambda terms: sum(term() for term in terms).backward()):
        objective.online.trainable.grad.zero_()
        ways(objective.terms(*views, torch.arange(8), None))
        gradients.append(objective.online.trainable.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def update(objective: Objective, lr: float = 0.0, ema_decay: float = 0.99) -> None:
    objective.update(torch.tensor(lr, dtype=torch.float64), momentum=1.0, weight_decay=0.0, ema_decay=ema_decay)


def test_target_follows_and_has_no_gradient():
    objective = byol()
    before = objective.target.vector.clone()
    loss(objective, *torch.rand(2, 8, 3, 16, 16)).backward()
    update(objective, lr=0.1)
    weights = objective.target.param_slice
    online, target, before = objective.parts["encoder"][weights], objective.target.vector[weights], before[weights]
    assert all(p.grad is None and not p.requires_grad for p in objective.target.module.parameters())
    assert (objective.online.trainable.grad != 0).float().mean() > 0.8
    assert not torch.equal(target, online) and not torch.equal(target, before)
    torch.testing.assert_close(target, 0.99 * before + 0.01 * online)


def test_ema_steps_have_the_closed_form():
    """After n steps towards a fixed theta: `xi_n = m^n xi_0 + (1 - m^n) theta`."""
    objective = byol()
    weights = objective.target.param_slice
    start = torch.randn(objective.target.vector[weights].shape)
    objective.target.vector[weights] = start
    for _ in range(7):
        update(objective, ema_decay=0.9)
    expected = 0.9**7 * start + (1 - 0.9**7) * objective.parts["encoder"][weights]
    torch.testing.assert_close(objective.target.vector[weights], expected, rtol=1e-5, atol=1e-6)


def test_without_stop_gradient_the_target_is_trained_too():
    objective = byol(stop_gradient=False)
    assert len(objective.trainable) == 2 and len(byol().trainable) == 1
    loss(objective, *torch.rand(2, 8, 3, 16, 16)).backward()
    assert (objective.target.trainable.grad != 0).float().mean() > 0.5


def test_without_a_predictor_the_projections_meet():
    objective = byol(predictor=False)
    assert len(objective.parts["predictor"]) == 0 and len(objective.online.segments) == len(objective.target.segments)
    view = torch.rand(8, 3, 16, 16)
    assert loss(objective, view, view).item() == pytest.approx(0, abs=1e-5)  # the target is a copy of the online encoder


def test_simsiam_by_hand():
    """Identity networks: -cos(x1, x2); a gradient through the projections only without stop-gradient."""
    objective = with_identity(SimSiam(Encoder("tiny"), CPU))
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert [loss(objective, a, view).item() for view in (a, b, -a)] == [-1.0, 0.0, 1.0]
    gradients = []
    for stop in (True, False):
        objective.stop_gradient = stop
        view = torch.tensor([[3.0, 4.0]], requires_grad=True)
        loss(objective, a, view).backward()
        gradients.append(view.grad)
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_nt_xent_by_hand():
    """Two images at right angles, equal views, T = 0.5: each view sees its twin at 1 / T and two others at 0."""
    objective = with_identity(SimCLR(Encoder("tiny"), CPU, temperature=0.5))
    views = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert loss(objective, views, views).item() == pytest.approx(expected)


def test_fedca_by_hand():
    """As NT-Xent above, with a dictionary of one vector equal to the first image's; and half of the public images agree with the base."""
    objective = with_identity(FedCA(Encoder("tiny"), CPU))
    objective.temperature, objective.shared, objective.newest = 0.5, torch.tensor([[1.0, 0.0]]), torch.zeros(6, 2)
    public = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    public[:, 0] = 255
    objective.align(public, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[:, :, None, None])
    views = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    contrast, alignment = (term().item() for term in objective.terms(views, views, torch.tensor([4, 7]), None))
    first, second = (-math.log(math.exp(2) / (math.exp(2) + 2 + math.exp(d))) for d in (2, 0))
    assert contrast == pytest.approx((first + second) / 2) and alignment == pytest.approx(0.5)
    assert objective.take_shared().tolist() == 2 * [[1.0, 0.0], [0.0, 1.0]] and len(objective.take_shared()) == 0


def test_fedu2s_regulariser_by_hand(monkeypatch):
    """On the circle, at the tangent point (1, 0), the log map is the signed angle along (0, 1), so FUR compares sorted angles.

    The projections are at 90 and -45 degrees, the uniform points at 60 and 0, and the direction has length 2 along (0, 1).
    """
    draws = [[[3.0, 0.0]], [[4.0, 0.0], [1.0, 3.0**0.5]], [[[0.5], [2.0]]]]
    monkeypatch.setattr(torch, "randn", lambda shape, **kwargs: torch.tensor(draws.pop(0)))
    expected = (2 * torch.tensor([-45.0, 90 - 60])).deg2rad().square().mean()
    assert distance_from_uniform(torch.tensor([[0.0, 7.0], [2.0, -2.0]])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_fedu2_is_byol_and_its_regulariser():
    """The regulariser has a weight, is small for uniform projections and large for equal ones, and has a gradient at each of them."""
    views = torch.randn(2, 64, 16, requires_grad=True)
    sums = []
    for weight in (0.0, 0.01, 0.02):
        torch.manual_seed(0)
        objective = with_identity(FedU2(Encoder("tiny"), CPU, uniformity=weight))
        torch.manual_seed(0)
        sums.append(loss(objective, *views))
    assert sums[0].item() == pytest.approx(loss(with_identity(byol()), *views).item())
    assert (sums[2] - sums[0]).item() == pytest.approx(2 * (sums[1] - sums[0]).item(), rel=1e-4) and sums[1] > sums[0]
    equal = torch.ones(64, 16, requires_grad=True)
    far, near = distance_from_uniform(equal), distance_from_uniform(views[0])
    assert far > 10 * near
    far.backward()
    assert equal.grad.isfinite().all() and equal.grad.any()


def test_feddecorrs_term_by_hand():
    """With unit deviation, two features of three images are (1, 0, -1) and (0, 1, -1), whose product is 1; a third is constant."""
    features = torch.tensor([[1.0, 0.0, 5.0], [0.0, 4.0, 5.0], [-1.0, -4.0, 5.0]])
    assert correlation(features[:, :2]).item() == pytest.approx(1 / 3)
    assert correlation(features).item() == pytest.approx(1 / 3 / 3, rel=1e-5)
    assert correlation(torch.eye(4)[:, :2] - torch.eye(4)[:, 2:]).item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_takes_the_decorrelation(kind):
    """Its terms get greater by a share that the weight says, and its backbone gets another gradient."""
    labels, views, sums, gradients = torch.arange(8) % 4, torch.rand(2, 8, 3, 16, 16), [], []
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        objective = ready(networks_of(kind, labels))
        objective.view = lambda batch: torch.rand(len(batch), 3, 16, 16)
        objective.decorrelation = weight
        torch.manual_seed(1)
        total = sum(term() for term in objective.losses(*views, batches_of(objective, 8), None))
        total.backward()
        sums.append(total.item())
        gradients.append(objective.online.trainable.grad[:100].clone())
        assert objective.online.module.encoder.passed is None
    assert sums[2] - sums[0] == pytest.approx(2 * (sums[1] - sums[0]), rel=1e-3) and sums[1] > sums[0] + 0.01
    assert not torch.equal(gradients[0], gradients[1])


def test_fedx_by_hand():
    """Two images at right angles with equal views, which relate to two others at the same places: T = 0.5, and 1 for the target m.

    The relations of the first image, softmax of (2, 0), lie at the same distance from its target's, of (1, 0), in all of JS's parts.
    """
    objective = with_identity(FedX(Encoder("tiny", (256, "relu", 256)), CPU, temperature=0.5, target_temperature=1.0))
    views, asked = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), []
    objective.view = lambda batch: asked.append(batch.tolist()) or views
    (term,) = objective.terms(views, views, torch.tensor([[4, 7], [2, 5]]), None)
    contrast = -math.log(math.exp(2) / (math.exp(2) + 2))
    s, m = (1 / (1 + math.exp(-x)) for x in (2, 1))
    relation = m * math.log(m / s) + (1 - m) * math.log((1 - m) / (1 - s))
    assert asked == [[2, 5]] and term().item() == pytest.approx(2 * contrast + 2 * relation)


def test_the_teacher_of_fedx_is_the_received_model():
    """It stays so while the client trains, in eval mode, and has no gradient."""
    objective = networks_of("fedx")
    objective.view = lambda batch: torch.rand(len(batch), 3, 16, 16)
    objective.online.vector.mul_(0.9)
    objective.begin(0, 5)
    received = objective.parts["encoder"].clone()
    loss(objective, *torch.rand(2, 8, 3, 16, 16)).backward()
    update(objective, lr=0.1)
    assert torch.equal(objective.teacher.vector, received) and not torch.equal(objective.parts["encoder"], received)
    assert not objective.teacher.module.training and not any(p.requires_grad for p in objective.teacher.module.parameters())


def test_orchestra_by_hand():
    """Two images and as many centroids, at right angles; T = 0.5. The target has the first for itself, the online network the second."""
    objective = with_identity(Orchestra(Encoder("tiny"), CPU, temperature=0.5, memory=3, local_clusters=2))
    objective.shared, objective.memory = torch.eye(2), torch.zeros(3, 2)
    views = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    images = torch.rand(1, 3, 4, 4)
    objective.view = lambda batch: images[batch]
    clustering, rotation = objective.terms(*views, torch.tensor([0]), torch.Generator().manual_seed(0))
    own = 1 / (1 + math.exp(-2))
    assert clustering().item() == pytest.approx(-own * math.log(1 - own) - (1 - own) * math.log(own))
    angle = torch.randint(4, (1,), generator=torch.Generator().manual_seed(0))
    objective.online.module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    logits = objective.online.module(images.rot90(angle.item(), (2, 3)))
    assert rotation().item() == pytest.approx(logits.logsumexp(1).item() - logits[0, angle].item())
    assert objective.memory.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert objective.take_shared().tolist() == [[1, 0]] and not objective.memory.any()  # one row gives no more than one centroid
    objective.shared = torch.empty(0, 2)
    assert objective.terms(*views, torch.tensor([0]), None) == []  # in the first round


def test_images_are_turned_by_their_angles():
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(4, -1, -1, -1)  # 0 1 / 2 3
    assert turned(images, torch.tensor([0, 1, 2, 3])).flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


def test_clusters_of_equal_size():
    """Four vectors are nearer to the first centroid than to the second; but each centroid has to have half of the six."""
    angles = torch.tensor([0.0, 10.0, 20.0, 40.0, 80.0, 90.0]).deg2rad()
    z = torch.stack([angles.cos(), angles.sin()], 1)
    assigned = sinkhorn_knopp(z @ torch.eye(2))
    torch.testing.assert_close(assigned.sum(1), torch.ones(6))
    torch.testing.assert_close(assigned.sum(0), torch.full((2,), 3.0), atol=0.3, rtol=0)
    assert assigned.argmax(1).tolist() == [0, 0, 0, 1, 1, 1]
    found = local_centroids(z[[0, 5, 1, 2, 3, 4]], 2)
    sums = torch.stack([z[:3].sum(0), z[3:].sum(0)])
    torch.testing.assert_close(found, sums / sums.norm(dim=1, keepdim=True))
    assert local_centroids(z[:1].expand(3, -1), 2).tolist() == 2 * [[1, 0]]  # of equal vectors, one cluster may be empty


def test_local_centroids_are_assigned_five_times():
    """As in the slow ones; vectors without clusters, so that the fifth assignment still moves them."""
    z = torch.nn.functional.normalize(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(local_centroids(z, 16), slow_fedu.local_centroids(z, SimpleNamespace(local_clusters=16)))


def test_global_centroids_find_the_clusters():
    """Sixteen local centroids at the four corners: the server's, from anywhere, end at unit length and nearer to them."""
    torch.manual_seed(0)
    corners, start = torch.eye(4), torch.nn.functional.normalize(torch.rand(4, 4) + torch.eye(4))
    found = global_centroids(corners.repeat(4, 1), start, 0.1)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (found.diagonal() > start.diagonal()).all() and (found.argmax(1) == torch.arange(4)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_names_all_its_networks(kind):
    """So that they are compiled and their views checked."""
    objective = networks_of(kind, torch.arange(8) % 4)
    assert {id(value) for value in vars(objective).values() if isinstance(value, Flat)} == {*map(id, [objective.online, *objective.others])}


def test_what_is_exchanged_with_the_network_lies_behind_it():
    """Orchestra's target: part of the uploaded vector, but not of what is trained."""
    objective = networks_of("orchestra")
    whole, target = objective.online.vector, objective.target.vector
    assert torch.equal(whole[-len(target) :], target) and whole[-1:].data_ptr() == target[-1:].data_ptr()
    assert torch.equal(target, objective.parts["encoder"])
    assert (
        len(whole)
        == len(objective.parts["encoder"]) + 512 * 4 + 4 + len(target)
        == sum(map(len, (objective.parts[p] for p in ("encoder", "predictor"))))
    )
    assert len(objective.trainable[0]) == count(objective.online.module)
    objective.check_views()
    whole.fill_(2)
    assert all((t == 2).all() for t in objective.target.module.state_dict().values())


def test_a_head_by_its_layers():
    def names(*layers: int | str) -> list[str]:
        return [type(m).__name__ for m in build_head(8, *layers).modules()]

    assert names(4) == ["Linear"]
    assert names(4, 2) == ["Layers", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert names(4, "relu", 2) == ["Layers", "Linear", "ReLU", "Linear"]
    assert names(4, 3, 2, "standardise") == ["Layers", *["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear", "BatchNorm1d"]
    assert len(list(build_head(8, 4, "standardise").parameters())) == 2
    encoder = Encoder("tiny", (0, 3, "standardise"))
    assert (encoder.head, encoder.width) == ((128, 3, "standardise"), 3) and encoder(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_moco_by_hand():
    """A key equal to its query and a queue of one opposite and two orthogonal vectors, both directions; then the keys join the queue."""
    objective = with_identity(MoCo(Encoder("tiny", (2,)), CPU, temperature=0.5, queue=3))
    objective.queue.copy_(torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    view = torch.tensor([[2.0, 0.0]])
    expected = -math.log(math.exp(2) / (math.exp(2) + math.exp(-2) + 2))
    assert loss(objective, view, view).item() == pytest.approx(2 * expected)
    update(objective)
    assert objective.queue.tolist() == [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
    assert objective.parts["queue"].tolist() == objective.queue.flatten().tolist() and not objective.keys


def test_barlow_twins_by_hand():
    """Two uncorrelated features of four images; the second view's features decide C, whatever their mean and deviation."""
    objective = with_identity(BarlowTwins(Encoder("tiny"), CPU, redundancy=0.5))
    a, b = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])
    pairs = {0.0: (a, b), 4.0: (a, -b), 1.5: (a, a), 3.0: (b, a)}  # C: the identity; -1 at C_22; 1 at C_12 and 0 at C_22; exchanged
    for expected, features in pairs.items():
        views = torch.stack([a, b], 1), torch.stack(features, 1) * 30 + 7
        assert 2 * loss(objective, *views).item() == pytest.approx(expected, abs=1e-3)  # 1e-5 is added to a variance


def test_alignment_and_uniformity_by_hand():
    """One of two images has its views at right angles. Those of the first view lie at right angles too, those of the second together."""
    objective = with_identity(AlignUniform(Encoder("tiny"), CPU, uniformity=0.25))
    views = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 5.0]])
    assert loss(objective, *views).item() == pytest.approx((2 + 0) / 2 + 0.25 * (-4 + 0) / 2)


def test_supervised_sees_the_labels_of_its_batch():
    objective = with_identity(Supervised(Encoder("tiny", (3,)), CPU, torch.tensor([9, 9, 2, 1])))
    (term,) = objective.terms(torch.eye(3)[:2], torch.zeros(2, 3), torch.tensor([3, 2]), None)
    assert term().item() == pytest.approx(math.log(2 + math.e))  # neither view has its logit at the label


@pytest.mark.parametrize("kind, widths, targets", [("moco-v1", (128,), 2), ("moco-v2", (256, 128), 2), ("supervised", (10,), 0)])
def test_heads_of_the_other_objectives(kind, widths, targets):
    objective = networks_of(kind, torch.arange(10), encoder="small")
    assert objective.online.module.encoder.head == widths
    assert len(objective.initial) == targets and len(objective.parts["predictor"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_gives_all_its_network_a_gradient(kind):
    torch.manual_seed(0)
    objective = ready(networks_of(kind, torch.arange(8) % 4))
    objective.view = lambda batch: torch.rand(len(batch), 3, 16, 16)
    loss(objective, *torch.rand(2, 8, 3, 16, 16)).backward()
    update(objective)
    assert (objective.online.trainable.grad != 0).float().mean() > 0.5


# -------------------------------------------------------------------------------------------------------- timm's encoders


class Tabled(torch.nn.Module):
    """A linear layer with a table of whole numbers, a constant that is not stored, and a statistic."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)
        self.register_buffer("table", torch.arange(4))
        self.register_buffer("mask", torch.full((5,), -torch.inf), persistent=False)
        self.register_buffer("statistic", torch.ones(7))


def test_a_vector_has_only_the_buffers_that_training_changes():
    module = Tabled()
    flat = Flat(module)
    assert len(flat.vector) == 7 + 9 and flat.param_slice == slice(7, 16)
    flat.vector.zero_()
    assert not module.statistic.any() and module.table.tolist() == [0, 1, 2, 3] and module.mask.isinf().all()
    with pytest.raises(InputError, match="Linear has parameters of torch.float64, needs torch.float32"):
        Flat(torch.nn.Linear(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "model, size, layers",
    [("test_vit", 16, ["patch_embed.proj", "attn.qkv", "mlp.fc1"]), ("test_convnext", 32, ["stem.0", "conv_dw", "fc1"])],
)
def test_an_encoder_of_timms(model, size, layers, tmp_path):
    """Its features' width is measured, its vector has all parameters, its dropout is off, and encoder.pt gives it back."""
    pytest.importorskip("timm", reason="timm is not installed")
    encoder = Encoder(f"timm:{model}", image_size=size)
    images = torch.rand(3, 3, size, size)
    width = encoder.backbone(images).shape[1]
    assert feature_dim(encoder.backbone) == width == encoder.projector[0].in_features and encoder.head == (512, 256)
    objective = BYOL(encoder, CPU)
    objective.check_views()
    for part, module in (("encoder", encoder), ("predictor", objective.online.module.predictor)):
        statistics = sum(b.numel() for name, b in module.named_buffers() if "running" in name)
        assert len(objective.parts[part]) == count(module) + statistics
    names = [segment.name for segment in layer_segments(objective.online)]
    assert all(any(layer in name for name in names) for layer in layers) and not any(
        "pos_embed" in name or "norm" in name for name in names
    )
    assert torch.equal(encoder(images), encoder(images))
    save_encoders(tmp_path, size, [encoder])
    (again,) = load_encoders(tmp_path)
    assert again.image_size == size and torch.equal(again(images), encoder.eval()(images))
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / "config.json").write_text('{"options": {"method": "fedu", "dataset": "x"}}')
    export_encoders(tmp_path, tmp_path / "x.safetensors")
    backbone = load_backbone(tmp_path / "x.safetensors")
    assert torch.equal(backbone(images), encoder.backbone(images)) and backbone.image_size == size
    initialise(fresh := Encoder(f"timm:{model}", image_size=size), tmp_path / "x.safetensors")
    assert torch.equal(fresh.eval().backbone(images), encoder.backbone(images))


def test_dropout_of_timms_is_off(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    images, rates = torch.rand(2, 3, 16, 16), {"drop_rate": 0.5, "drop_path_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **rates))
    noisy = timm.create_model("test_vit", num_classes=0, img_size=16)
    assert not torch.equal(noisy(images), noisy(images))
    still = build_backbone("timm:test_vit", image_size=16)
    assert still.training and torch.equal(still(images), still(images))


def test_what_timm_cannot_build_is_one_sentence(monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    for name, words in (
        ("timm:resnet19", "has no model 'resnet19' .*; did you mean resnet"),
        ("timm:hf-hub:timm/resnet18", "has no model 'hf-hub:timm/resnet18'"),
        ("timm:test_vit", r"needs images whose side is a multiple of its patches', \(16, 16\); these have 28"),
        ("timm:test_convnext", "cannot take images of 28 pixels"),
    ):
        with pytest.raises(InputError, match=words):
            build_backbone(name, image_size=28)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm:test_vit needs the package timm: `pip install -r requirements-optional.txt`"):
        build_backbone("timm:test_vit")


# ----------------------------------------------------------------------------------------------- weights of other programs


def test_weights_of_torchvisions_resnet_but_stem_and_classifier(tmp_path, capsys):
    """Also as a training script's checkpoint. The backbone, a view into its vector, gets them in place."""
    theirs = torchvision.models.resnet18()
    theirs.bn1.running_var.fill_(3)
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}  # as DistributedDataParallel has it
    torch.save({"epoch": 9, "state_dict": state}, tmp_path / "imagenet.pth")
    encoder = Encoder("resnet18", (8,))
    stem, network = encoder.backbone.conv1.weight.clone(), Flat(encoder)
    initialise(encoder, tmp_path / "imagenet.pth")
    network.check_views()
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, stem if name == "conv1.weight" else theirs.state_dict()[name]), name
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/imagenet.pth: fc.weight, fc.bias: not taken, since the encoder has no classifier",
        f"{tmp_path}/imagenet.pth: conv1.weight: not taken, since CIFAR's stem has another shape and stays random",
    ]


def test_weights_of_timms_with_positions_for_another_size(tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("test_vit")
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    encoder = Encoder("timm:test_vit", image_size=32)
    initialise(encoder, tmp_path / "vit.pth")
    own = encoder.backbone.state_dict()
    assert torch.equal(own["blocks.0.attn.qkv.weight"], theirs.blocks[0].attn.qkv.weight)
    assert own["pos_embed"].shape[1] == 5 and own["pos_embed"].std() > 0  # of 2 x 2 patches and the class token
    assert "head.weight, head.bias: not taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state | {"99.weight": torch.zeros(3)}, "does not hold a tiny backbone: it has the further 99.weight"),
        (lambda state: state | {"0.weight": torch.zeros(3)}, "it has another 0.weight"),
        (lambda state: {name: t for name, t in state.items() if name[:2] != "1."}, r"it has no 1.weight \(4 such tensors\)"),
        (lambda state: {"weights": 3}, "holds no state_dict, which is a dict of tensors by their names"),
        (lambda state: {"model": {}}, "holds no state_dict"),
        (lambda state: Path, r"needs to be .* what torch.save\(model.state_dict\(\), FILE\) wrote \(it is another file, or holds more"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, words):
    encoder = Encoder("tiny")
    before = {name: t.clone() for name, t in encoder.backbone.state_dict().items() if not name.endswith("tracked")}
    torch.save(change(before), tmp_path / "x.pt")
    Flat(encoder)
    with pytest.raises(InputError, match=words):
        initialise(encoder, tmp_path / "x.pt")
    assert all(torch.equal(before[name], t) for name, t in encoder.backbone.state_dict().items())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    encoder = Encoder("tiny")
    torch.save(encoder.backbone.state_dict() | {"0.weight": torch.full((16, 3, 3, 3), math.nan)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt holds numbers that are not finite"):
        initialise(encoder, tmp_path / "x.pt")
