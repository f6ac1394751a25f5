"""Evaluations against scikit-learn and plain loops of torch, on classes that overlap, so that another constant gives another number."""

import copy
import hashlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import eval as evaluation
from data import Images, balanced_subset, load_images
from models import Encoder, build_backbone, extract_features, load_encoders
from options import Data, parse_evaluation
from report import tables
from runtime.cli import InputError, user_errors


@pytest.fixture
def images(npz) -> Images:
    return load_images(str(npz))


def hard_images(num_train: int, num_test: int, spread: float = 60, numbered: bool = False, side: int = 4) -> Images:
    """Ten classes that overlap. numbered: the first two values of an image are its number, which then can be told in a batch."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 25, (10, 3 * side**2))
    labels = rng.integers(0, 10, num_train + num_test)
    values = np.clip(centres[labels] + rng.normal(0, spread, (len(labels), 3 * side**2)), 0, 255).astype(np.uint8)
    if numbered:
        values[:, 0], values[:, 1] = np.divmod(np.arange(len(labels)), 256)
    x, y = torch.from_numpy(values).view(-1, 3, side, side), torch.from_numpy(labels)
    return Images(x[:num_train], y[:num_train], x[num_train:], y[num_train:], 10)


def save_npz(path: Path, images: Images) -> None:
    x_train, x_test = (x.permute(0, 2, 3, 1).numpy() for x in (images.x_train, images.x_test))
    np.savez(path, x_train=x_train, y_train=images.y_train.numpy(), x_test=x_test, y_test=images.y_test.numpy())


def one_colour(*colours: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)


class Means(nn.Module):
    """Features that can be worked out by hand: the mean red, green and blue."""

    def forward(self, images):
        return images.mean((2, 3))


# ----------------------------------------------------------------------------------------------------------- features


def test_features_by_hand():
    """Images are scaled to [0, 1]; BatchNorm in eval mode takes `(x - mean) / sqrt(variance)` by its running statistics."""
    norm = nn.BatchNorm2d(3, eps=0, affine=False)
    norm.running_mean.fill_(0.2)
    norm.running_var.fill_(0.25)
    module = nn.Sequential(norm, Means())
    features = extract_features(module, one_colour((51, 102, 255), (0, 0, 153)))
    torch.testing.assert_close(features, torch.tensor([[0.0, 0.4, 1.6], [-0.4, -0.4, 0.8]]))
    assert module.training and norm.num_batches_tracked == 0
    assert not extract_features(module.eval(), one_colour((0, 0, 0))).requires_grad and not module.training


def test_features_do_not_depend_on_the_batches(images):
    backbone = build_backbone("small")
    features = extract_features(backbone, images.x_train, batch_size=10)
    assert features.shape == (64, 256)
    torch.testing.assert_close(features, extract_features(backbone, images.x_train))


# --------------------------------------------------------------------------------------------------------------- kNN


def sklearn_knn(train: np.ndarray, y_train: np.ndarray, test: np.ndarray, y_test: np.ndarray, k: int, temperature: float) -> float:
    """The same by scikit-learn, whose cosine distance is 1 - cos."""
    classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature))
    return classifier.fit(train, y_train).score(test, y_test)


def test_knn_is_scikit_learns_with_200_neighbours_and_temperature_0_1():
    hard = hard_images(600, 5000, spread=90)
    arrays = [(x.flatten(1).numpy() / 255, y.numpy()) for x, y in ((hard.x_train, hard.y_train), (hard.x_test, hard.y_test))]
    accuracy = evaluation.knn(nn.Flatten(), hard)
    assert accuracy == pytest.approx(sklearn_knn(*arrays[0], *arrays[1], k=200, temperature=0.1), abs=1e-9)
    for k, temperature in ((190, 0.1), (210, 0.1), (200, 0.09), (200, 0.11)):
        assert abs(accuracy - sklearn_knn(*arrays[0], *arrays[1], k, temperature)) > 1e-3
    others = [KNeighborsClassifier(200).fit(*arrays[0]), KNeighborsClassifier(200, metric="cosine").fit(*arrays[0])]
    assert all(abs(accuracy - other.score(*arrays[1])) > 1e-3 for other in others)


def test_knn_by_hand():
    """One red neighbour outvotes two blue ones by weight, exp(cos / 0.1); with k = 1 only the nearest votes."""
    red, blue, purple, violet = (200, 0, 0), (0, 0, 200), (200, 0, 100), (100, 0, 200)
    train, labels = one_colour(red, blue, blue), torch.tensor([0, 1, 1])
    images = Images(train, labels, one_colour(purple, violet), torch.tensor([0, 1]), 2)
    assert evaluation.knn(Means(), images) == 1.0
    assert evaluation.knn(Means(), images, k=1) == 1.0
    assert evaluation.knn(Means(), images, temperature=1e3) == 0.5  # without weights the two blue ones win both


def test_knn_of_a_run_is_that_of_the_encoders_which_it_leaves(tiny, tmp_path):
    """Of `single` the mean over the clients' own; by scikit-learn, from the tensors of encoder.pt."""
    hard = hard_images(200, 300, side=16)
    save_npz(tmp_path / "hard.npz", hard)
    for method, count in (("fedu", 1), ("single", 2)):
        options = [*tiny, "--dataset", str(tmp_path / "hard.npz"), "--method", method, "--lr", "0.5", "--encoder", "tiny"]
        rows = run(tmp_path / method, *options)["metrics"]
        accuracies = []
        for features in encoder_features(tmp_path / method, "tiny", hard):
            accuracies.append(sklearn_knn(features[0], hard.y_train.numpy(), features[1], hard.y_test.numpy(), k=200, temperature=0.1))
        assert len(set(accuracies)) == len(accuracies) == count
        assert rows[-1]["knn"] == pytest.approx(sum(accuracies) / count, abs=2e-3) and rows[-1]["knn"] != rows[0]["knn"]


def encoder_features(run: Path, name: str, images: Images) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of training and test images by each backbone in RUN/encoder.pt, in eval mode, from images in [0, 1]."""
    result = []
    for state in torch.load(run / "encoder.pt", weights_only=True)["encoders"]:
        backbone = build_backbone(name).eval()
        backbone.load_state_dict(dict(state["backbone"]), strict=False)  # without BatchNorm's batch counters
        with torch.no_grad():
            result.append(tuple(backbone(x / 255).numpy() for x in (images.x_train, images.x_test)))
    return result


# ------------------------------------------------------------------------------------------- classifiers that are trained


class Seen(NamedTuple):
    layers: list[nn.Module]  # that were trained, in the order of their first calls
    batches: list[torch.Tensor]  # what the first of them was given


@pytest.fixture
def seen():
    """What is trained, and on which batches, as a hook into all of torch's modules sees it."""
    seen = Seen([], [])

    def record(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if module.training and torch.is_grad_enabled() and isinstance(module, nn.Linear | nn.Conv2d):
            if module not in seen.layers:
                seen.layers.append(module)
            if module is seen.layers[0]:
                seen.batches.append(inputs[0].detach().clone())

    hook = register_module_forward_hook(record)
    yield seen
    hook.remove()


def numbers_of(values: torch.Tensor) -> torch.Tensor:
    """The numbers of images `[N, 3 S S]`, as `hard_images` wrote them. values: in [0, 1]."""
    high, low = (255 * values[:, :2]).round().long().unbind(1)
    return 256 * high + low


def adam(model: nn.Module, batches: list[torch.Tensor], labels: list[torch.Tensor], lr: float) -> None:
    """Cross-entropy by PyTorch's own Adam, with its defaults for all but the learning rate."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for x, y in zip(batches, labels, strict=True):
        loss = -torch.log_softmax(model(x), 1).gather(1, y[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_shuffled_epochs(numbers: list[torch.Tensor], epochs: int, sizes: list[int], all_of: torch.Tensor, missing: int = 0) -> None:
    """Batches of these sizes, of which each epoch has every image once, but for `missing` of them, in an order of its own."""
    assert [len(n) for n in numbers] == sizes * epochs
    orders = [torch.cat(numbers[i : i + len(sizes)]) for i in range(0, len(numbers), len(sizes))]
    for order in orders:
        assert len(set(order.tolist())) == len(order) == len(all_of) - missing and set(order.tolist()) <= set(all_of.tolist())
    assert len({tuple(order.tolist()) for order in orders}) == epochs and not any(order.equal(order.sort().values) for order in orders)


def test_linear_is_adam_at_3e_3_for_200_epochs_of_batches_of_512(seen):
    hard = hard_images(1100, 1000, numbered=True)
    accuracy = evaluation.linear(nn.Flatten(), hard, seed=3)
    (head,), batches = seen
    scaler = StandardScaler().fit(hard.x_train.flatten(1).double() / 255)
    numbers = [numbers_of(torch.from_numpy(scaler.inverse_transform(batch))) for batch in batches]
    assert_shuffled_epochs(numbers, 200, [512, 512, 76], torch.arange(1100))
    train, test = (torch.from_numpy(scaler.transform(x.flatten(1).double() / 255)).float() for x in (hard.x_train, hard.x_test))
    for number, batch in zip(numbers[:6], batches):
        torch.testing.assert_close(batch, train[number], rtol=1e-3, atol=1e-3)  # their deviation has n - 1 for our n

    torch.manual_seed(3)
    reference = nn.Linear(48, 10)
    adam(reference, batches, [hard.y_train[number] for number in numbers], lr=3e-3)
    torch.testing.assert_close(head.weight, reference.weight, rtol=1e-3, atol=1e-4)
    expected = (reference(test).argmax(1) == hard.y_test).float().mean().item()
    assert accuracy == pytest.approx(expected, abs=2e-3)
    best = LogisticRegression(max_iter=1000).fit(train.numpy(), hard.y_train.numpy()).score(test.numpy(), hard.y_test.numpy())
    assert 0.5 < best < 0.8 and accuracy == pytest.approx(best, abs=0.02)


def test_linear_learns_features_that_are_small_or_constant():
    """Standardised, features of a thousandth give the same; one that never changes does no harm."""

    class Shrunk(nn.Flatten):
        def forward(self, images):
            features = super().forward(images) / 1000
            return torch.cat([features, torch.full_like(features[:, :1], 0.1)], 1)

    hard = hard_images(300, 500)
    accuracies = [evaluation.linear(module, hard, epochs=100) for module in (nn.Flatten(), Shrunk())]
    assert 0.4 < accuracies[0] < 0.8 and accuracies[1] == pytest.approx(accuracies[0], abs=0.02)


def test_linear_refuses_a_module_that_it_has_changed(images, monkeypatch):
    def careless(module, x):  # in train mode: moves BatchNorm's running statistics
        return module(x.float() / 255).detach()

    monkeypatch.setattr(evaluation, "extract_features", careless)
    with pytest.raises(AssertionError, match="changed the frozen module"):
        evaluation.linear(build_backbone("tiny"), images, epochs=1)


def small_backbone() -> nn.Module:
    """A convolution with BatchNorm whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    convolution = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
    backbone = nn.Sequential(*convolution, nn.Linear(64, 16), nn.Unflatten(1, (16, 1, 1)), nn.BatchNorm2d(16), nn.Flatten())
    with torch.no_grad():
        backbone(torch.rand(8, 3, 4, 4))
    return backbone


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_semi_is_adam_at_1e_3_for_100_epochs_of_batches_of_128_over_backbone_and_head(seen, head):
    """Of 257 labelled images the last batch of an epoch has one, which is left out: BatchNorm needs two."""
    hard, backbone = hard_images(600, 1000, numbered=True), small_backbone()
    before, labelled = copy.deepcopy(backbone), torch.randperm(600, generator=torch.Generator().manual_seed(0))[:257].sort().values
    accuracy = evaluation.fine_tune(backbone, hard, labelled, head, seed=3)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in backbone.state_dict().items())
    layers, batches = list(seen.layers), seen.batches
    numbers = [numbers_of(batch.flatten(1)) for batch in batches]
    assert_shuffled_epochs(numbers, 100, [128, 128], labelled, missing=1)
    for number, batch in zip(numbers[:4], batches):
        torch.testing.assert_close(batch, hard.x_train[number] / 255)

    torch.manual_seed(3)
    if head == "linear":
        top = nn.Linear(16, 10)
    else:
        top = nn.Sequential(nn.Linear(16, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 10))
    reference = nn.Sequential(before, top)
    adam(reference, batches, [hard.y_train[number] for number in numbers], lr=1e-3)
    expected = [module for module in reference.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for mine, theirs in zip(layers, expected, strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        predicted = reference.eval()(hard.x_test / 255).argmax(1)
    assert accuracy == pytest.approx((predicted == hard.y_test).float().mean().item(), abs=5e-3)
    assert 0.2 < accuracy < 0.8


# ---------------------------------------------------------------------------------------------------------- spectrum


def test_effective_rank_by_hand():
    """d of equal singular values, 1 of a single one, e^H of 3 and 1; the mean is not subtracted, and fewer images than d bound it."""
    identity, draw = torch.eye(16, dtype=torch.float64), torch.Generator().manual_seed(0)
    assert evaluation.effective_rank(torch.cat([identity, -identity])) == pytest.approx(16, abs=1e-3)
    assert evaluation.effective_rank(torch.outer(torch.rand(20, generator=draw).double(), identity.sum(0))) == pytest.approx(1, abs=1e-3)
    assert evaluation.effective_rank(torch.diag(torch.tensor([3.0, 1, 0, 0]).double())) == pytest.approx(4 / 3**0.75, abs=1e-4)
    assert evaluation.effective_rank(identity[:5]) == pytest.approx(5, abs=1e-3)
    z = torch.randn(60, 8, generator=draw).double() + 3
    p = torch.linalg.svdvals(z) / torch.linalg.svdvals(z).sum() + 1e-7
    assert evaluation.effective_rank(z) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p.tolist())), rel=1e-9)
    assert evaluation.effective_rank(z - z.mean(0)) > evaluation.effective_rank(z) + 1


def test_singular_values_are_those_of_the_covariance_at_unit_scale():
    z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).double() + 1
    scaled = z.numpy() / np.sqrt((z.numpy() ** 2).sum(1).mean())
    expected = np.linalg.svd(np.cov(scaled.T, bias=True))[1]
    np.testing.assert_allclose(evaluation.covariance_spectrum(1000 * z), expected, rtol=1e-9)
    assert evaluation.covariance_spectrum(z[:1].expand(60, 8)).max() < 1e-12


def test_alignment_and_uniformity_by_a_double_loop():
    """Over two drawn views of each image, and over all pairs of different images, whatever the blocks."""
    hard, module = hard_images(30, 23), nn.Flatten()
    views = lambda x, generator: [x / 255 * torch.rand(x.shape, generator=generator) for _ in range(2)]  # noqa: E731
    drawn = views(hard.x_test, torch.Generator().manual_seed(3))
    a, b, z = ([row / row.norm() for row in x.flatten(1).double()] for x in (*drawn, hard.x_test))
    aligned = sum((u - v).square().sum() for u, v in zip(a, b)) / 23
    result = evaluation.alignment(module, hard.x_test, views, torch.Generator().manual_seed(3))
    assert result == pytest.approx(aligned.item(), rel=1e-5) and result > 0.1
    pairs = [math.exp(-2 * (z[i] - z[j]).square().sum()) for i in range(23) for j in range(i)]
    for block in (1000, 23, 7, 1):
        assert evaluation.uniformity(hard.x_test.flatten(1).double(), block) == pytest.approx(math.log(np.mean(pairs)), rel=1e-9)


def test_uniformity_has_its_known_values():
    """0 where all images have one feature, log of half e^-8 and half 1 at two poles; uniform on a circle it is log(e^-4 I_0(4))."""
    z = torch.tensor([[1.0, 0.0]]).double()
    assert evaluation.uniformity(z.expand(50, 2)) == pytest.approx(0, abs=1e-12)
    assert evaluation.uniformity(torch.cat([z, -z])) == pytest.approx(-8)
    angles = torch.arange(400).double() * 2 * math.pi / 400
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    pairs_and_diagonal = math.exp(-4) * torch.special.i0(torch.tensor(4.0).double()).item()
    assert evaluation.uniformity(circle) == pytest.approx(math.log((400 * pairs_and_diagonal - 1) / 399), rel=1e-9)


# -------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    """The working folder, with two seeds of one setting and a run of `single` with two encoders, made from the finished run's files."""
    monkeypatch.chdir(tmp_path)
    for name, seed, method in (("s0", 0, "fedu"), ("s1", 1, "fedu"), ("single", 0, "single")):
        shutil.copytree(finished / "runs/run", tmp_path / "runs" / name)
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        config["options"] |= {"seed": seed, "method": method, "predictor": "dapu" if method == "fedu" else "global"}
        if seed:
            del config["options"]["dropout"]  # as a run has it from before the option existed
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    saved = torch.load(tmp_path / "runs/single/encoder.pt", weights_only=True)
    saved["encoders"].append({p: {k: v.flip(0) for k, v in state.items()} for p, state in saved["encoders"][0].items()})
    torch.save(saved, tmp_path / "runs/single/encoder.pt")
    for age, name in enumerate(("s1", "single", "s0")):
        os.utime(tmp_path / "runs" / name / "encoder.pt", (1e9 - age, 1e9 - age))
    return tmp_path


def evaluate(line: str) -> None:
    evaluation.main(parse_evaluation(line.split()))


def evaluations(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "eval.jsonl").read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What each evaluation is asked for, by argument, in place of its work; the first accuracy is 0.25, the next 0.5, and so on."""
    calls = []
    for name in ("knn", "linear", "fine_tune"):
        signature = inspect.signature(getattr(evaluation, name))

        def record(*args, name=name, signature=signature, **kwargs) -> float:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append({"evaluation": name} | bound.arguments)
            return 0.25 * len(calls)

        monkeypatch.setattr(evaluation, name, record)
    return calls


def assert_same_images(mine: Images, theirs: Images) -> None:
    assert mine.num_classes == theirs.num_classes and all(map(torch.equal, mine[:4], theirs[:4]))


@pytest.mark.parametrize(
    "line, what",
    [
        ("", {"evaluation": "linear", "epochs": 200, "seed": 0}),
        ("--linear --epochs 7 --seed 3", {"evaluation": "linear", "epochs": 7, "seed": 3}),
        ("--knn", {"evaluation": "knn", "k": 200, "temperature": 0.1}),
        ("--semi 0.25", {"evaluation": "fine_tune", "head": "linear", "epochs": 100, "seed": 0}),
        ("--semi 0.25 --head mlp --epochs 7 --seed 3", {"evaluation": "fine_tune", "head": "mlp", "epochs": 7, "seed": 3}),
    ],
)
def test_a_command_evaluates_the_newest_runs_backbone_as_it_says(runs, images, asked, capsys, line, what):
    evaluate(line)
    (call,) = asked
    assert {name: call[name] for name in what} == what
    assert_same_images(call["images"], images)
    if "semi" in line:
        labelled = call["labelled"]
        assert len(labelled.unique()) == 16 and images.y_train[labelled].bincount().tolist() == [4] * 4
        assert torch.equal(labelled, balanced_subset(images.y_train, 0.25, what["seed"]))
        assert not torch.equal(labelled, balanced_subset(images.y_train, 0.25, 3 - what["seed"]))
    ((_, expected),) = encoder_features(Path("runs/s1"), "small", images)
    module = call["backbone" if "semi" in line else "module"]
    np.testing.assert_allclose(extract_features(module, images.x_test), expected, rtol=1e-4, atol=1e-5)
    (row,) = evaluations("runs/s1")
    assert row["accuracy"] == 0.25 and row["accuracies"] == [0.25] and row["labels"] == (16 if "semi" in line else 64)
    assert row["evaluation"] == {"fine_tune": "semi 0.25"}.get(what["evaluation"], what["evaluation"])
    assert row.get("epochs") == what.get("epochs") and row["seed"] == what.get("seed", 0)
    printed = capsys.readouterr().out
    assert printed.startswith("runs/s1: ") and "25.00%" in printed and row["dataset"] in printed


def test_features_can_be_projections_or_pixels(runs, images, asked):
    for line, width in (("--knn --features projector", 256), ("--linear --features pixels", 3 * 16 * 16)):
        evaluate(f"{line} runs/s0")
        assert extract_features(asked[-1]["module"], images.x_test).shape == (16, width)
    (encoder,) = load_encoders(Path("runs/s0"))
    features = [extract_features(module, images.x_test) for module in (asked[0]["module"], asked[1]["module"], encoder.backbone)]
    with torch.no_grad():
        torch.testing.assert_close(features[0], encoder.eval().projector(features[2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[1], images.x_test.flatten(1) / 255)
    assert [row["features"] for row in evaluations("runs/s0")] == ["projector", "pixels"]


@pytest.mark.parametrize("line", ["--knn", "--linear", "--semi 0.5"])
def test_of_single_each_clients_encoder_is_evaluated_and_the_mean_reported(runs, images, asked, capsys, line):
    evaluate(f"{line} runs/single")
    modules = [call.get("module") or call["backbone"] for call in asked]
    expected = encoder_features(Path("runs/single"), "small", images)
    assert len(modules) == len(expected) == 2
    for module, (_, features) in zip(modules, expected):
        np.testing.assert_allclose(extract_features(module, images.x_test), features, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected[0][1], expected[1][1])
    (row,) = evaluations("runs/single")
    assert row["accuracies"] == [0.25, 0.5] and row["accuracy"] == 0.375
    assert "37.50% " in capsys.readouterr().out


@pytest.mark.parametrize("line", ["--knn", "--linear", "--semi 0.5"])
def test_transfer_takes_training_and_test_images_of_the_other_set(runs, asked, line):
    hard = hard_images(40, 30, side=16)
    save_npz(runs / "hard.npz", hard)
    evaluate(f"{line} --transfer hard.npz runs/s0")
    assert_same_images(asked[0]["images"], hard)
    (row,) = evaluations("runs/s0")
    assert row["dataset"] == "hard.npz" and row["labels"] == (20 if "semi" in line else 40)


def test_images_are_loaded_as_the_run_had_them(runs, images, asked, monkeypatch):
    loaded = []
    monkeypatch.setattr(evaluation, "load_dataset", lambda source, option: loaded.append((source, option)) or images)
    config = json.loads(Path("runs/s0/config.json").read_text())
    config["options"] |= {"dataset": "folder", "image_size": 24, "data_root": "there", "holdout": 0.1, "skip_broken": True}
    config["data"] = {"images": images.digest}
    Path("runs/s0/config.json").write_text(json.dumps(config))
    for line in ("--knn", "--knn --transfer cifar10 --data-root here"):
        evaluate(f"{line} runs/s0")
    own, other = (Data(partition="iid", image_size=24, skip_broken=True, **more) for more in (
        {"dataset": "folder", "data_root": "there", "holdout": 0.1}, {"dataset": "cifar10", "data_root": "here"}
    ))  # fmt: skip
    assert loaded == [(own, "--dataset"), (other, "--transfer")]


def test_evaluations_of_several_runs_are_added_to_what_each_has(runs, asked):
    evaluate("--knn runs")
    evaluate("--linear runs/s0 runs/s1 runs/s0")
    assert [row["accuracy"] for row in evaluations("runs/s0")] == [0.25, 1.25]
    assert [row["accuracy"] for row in evaluations("runs/s1")] == [0.5, 1.5]
    assert [row["evaluation"] for row in evaluations("runs/single")] == ["knn"]


@pytest.fixture
def spectra(monkeypatch) -> list[tuple[dict[Path, dict], Path]]:
    """The spectra and the file of each figure, in place of its drawing."""
    drawn = []
    monkeypatch.setattr(evaluation, "plot_spectra", lambda spectra, out, size, title: drawn.append((spectra, out)))
    return drawn


def test_a_spectrum_is_recorded_of_each_run_and_drawn_of_all(runs, images, spectra, capsys):
    evaluate("--spectrum runs/s0 runs/single")
    rows = {Path(run): evaluations(run)[-1] for run in ("runs/s0", "runs/single")}
    assert spectra == [(rows, Path("spectrum.png"))]
    one, two = rows.values()
    assert {k: one[k] for k in ("evaluation", "features", "split", "images", "width", "seed")} == {
        "evaluation": "spectrum", "features": "backbone", "split": "test", "images": 16, "width": 256, "seed": 0}  # fmt: skip
    z = torch.from_numpy(encoder_features(Path("runs/s0"), "small", images)[0][1]).double()
    assert one["rank"] == pytest.approx(evaluation.effective_rank(z), rel=1e-4) and "encoders" not in one
    assert one["uniformity"] == pytest.approx(evaluation.uniformity(z), rel=1e-4) and 0 < one["alignment"] < 4
    np.testing.assert_allclose(one["singular_values"][:10], evaluation.covariance_spectrum(z)[:10], rtol=1e-3)
    printed, ranks = capsys.readouterr().out, ", ".join(f"{encoder['rank']:.1f}" for encoder in two["encoders"])
    assert f"rank {one['rank']:.1f} of 256, alignment" in printed and printed.count(f"  (means; the ranks are {ranks})\n") == 1
    assert len(one["singular_values"]) == 256 and one["singular_values"][16:] == [0.0] * 240  # 16 images span no more
    assert [two[k] for k in tables.SPECTRUM] == pytest.approx([sum(e[k] for e in two["encoders"]) / 2 for k in tables.SPECTRUM])
    assert two["encoders"][0] == {k: one[k] for k in tables.SPECTRUM} != two["encoders"][1]
    assert tables.read_evaluations(Path("runs/s0")) == {}  # it is no accuracy

    Path("runs/s0/encoder.pt").unlink()
    evaluate("--spectrum runs/s0")  # of a run without weights, what is recorded
    assert spectra[-1] == ({Path("runs/s0"): one}, Path("runs/s0/spectrum.png")) and len(evaluations("runs/s0")) == 1
    with pytest.raises(SystemExit), user_errors("eval.py"):
        evaluate("--spectrum --seed 1 runs/s0")  # which is not
    assert "the run is not finished" in capsys.readouterr().err


def test_a_spectrum_needs_neither_labels_nor_test_images(runs, spectra):
    x = hard_images(7, 3, side=16).x_train.permute(0, 2, 3, 1).numpy()
    np.savez("unlabelled.npz", x_train=x)
    np.savez("tested.npz", x_train=x, x_test=x[:3])
    for name, split, count in (("unlabelled.npz", "train", 7), ("tested.npz", "test", 3)):
        evaluate(f"--spectrum --features projector --transfer {name} runs/s0")
        row = evaluations("runs/s0")[-1]
        assert (row["split"], row["images"], row["dataset"], row["features"]) == (split, count, name, "projector")
        assert 1 <= row["rank"] <= count


def test_alignment_is_over_the_views_that_the_run_was_trained_with(runs, images, spectra, refuses):
    def aligned(jitter: float = 1.0, seed: int = 0) -> float:
        config = json.loads(Path("runs/s0/config.json").read_text())
        config["options"]["settings"]["jitter"] = jitter
        Path("runs/s0/config.json").write_text(json.dumps(config))
        return evaluation.spectrum(Path("runs/s0"), [nn.Flatten()], images, seed)["alignment"]

    assert aligned() == aligned() != aligned(seed=1) and aligned(jitter=0.0) < aligned()
    config = json.loads(Path("runs/s0/config.json").read_text())
    for name in ("crop_scale", "greyscale"):  # which a run of an older version does not have
        del config["options"]["settings"][name]
    before = aligned()
    Path("runs/s0/config.json").write_text(json.dumps(config))
    assert aligned() == before
    source = "def view(images, generator):\n    return images.float() / 255 + LOW\n"
    config = json.loads(Path("runs/s0/config.json").read_text())
    config["options"]["views"], config["data"]["views"] = "v.py", hashlib.sha256(source.encode()).hexdigest()[:32]
    Path("runs/s0/config.json").write_text(json.dumps(config))
    assert refuses(lambda: evaluate("--spectrum runs/s0"), "--spectrum needs the views that runs/s0 was trained with")
    Path("runs/s0/views.py").write_text(source)
    assert refuses(lambda: evaluate("--spectrum runs/s0"), "runs/s0/views.py, line 2: NameError")
    Path("runs/s0/views.py").write_text(source + "LOW = 0\n")
    assert refuses(lambda: evaluate("--spectrum runs/s0"), "runs/s0/views.py is not what runs/s0 began with")
    config["data"]["views"] = hashlib.sha256((source + "LOW = 0\n").encode()).hexdigest()[:32]
    Path("runs/s0/config.json").write_text(json.dumps(config))
    assert aligned() == 0


def test_a_spectrum_of_many_images_is_of_some_drawn_by_the_seed(runs, images, monkeypatch):
    monkeypatch.setattr(evaluation, "SPECTRUM_IMAGES", 10)
    rows = [evaluation.spectrum(Path("runs/s0"), [nn.Flatten()], images, seed) for seed in (0, 0, 1)]
    assert rows[0]["images"] == 10 and rows[0] == rows[1] and rows[0]["uniformity"] != rows[2]["uniformity"]


def test_features_without_a_spectrum_are_one_sentence(runs, images, refuses):
    def measure(module: nn.Module, images: Images = images) -> None:
        evaluation.spectrum(Path("runs/s0"), [module], images)

    class Scaled(nn.Flatten):
        def forward(self, images):
            return super().forward(images) * self.factor

    for factor, words in ((math.nan, "are not finite"), (math.inf, "are not finite"), (0, "are all 0")):
        module = Scaled()
        module.factor = factor
        assert refuses(lambda module=module: measure(module), "the features of runs/s0", words, "no spectrum")
    for split, few in (("test", images._replace(x_test=images.x_test[:1])), ("train", images._replace(
        x_test=images.x_test[:0], x_train=images.x_train[:1]))):  # fmt: skip
        assert refuses(lambda few=few: measure(nn.Flatten(), few), "needs at least two images", f"runs/s0 has one {split} image")


def test_evaluations_of_the_embedded_images_end_in_an_accuracy(runs, capsys):
    """The whole command, with nothing replaced."""
    for line in ("--knn --transfer fashion", "--epochs 2", "--semi 0.25 --epochs 2 --head mlp"):
        evaluate(line)
    assert all(0 <= row["accuracy"] <= 1 for row in evaluations("runs/s1"))
    assert evaluations("runs/s1")[0]["labels"] == 6000 and capsys.readouterr().out.count("%\n") == 3


def test_output_that_nobody_reads_ends_silently(finished):
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "eval.py"), "--table", "runs/run"]
    done = subprocess.run(line, cwd=finished, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_representations_are_exported(runs, images, refuses, capsys):
    assert refuses(lambda: evaluate("--export f.npz runs"), "--export got 3 runs")
    evaluate("--export f.npz runs/s0")
    assert "train [64, 256]" in capsys.readouterr().out
    ((train, test),) = encoder_features(Path("runs/s0"), "small", images)
    with np.load("f.npz") as arrays:
        np.testing.assert_allclose(arrays["train"], train, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["test"], test, rtol=1e-4, atol=1e-5)
        assert (arrays["y_train"] == images.y_train.numpy()).all() and (arrays["y_test"] == images.y_test.numpy()).all()
    evaluate("--export p.npz runs/single --features projector")
    assert "test [2, 16, 256]" in capsys.readouterr().out


def save_encoders(run: Path, name: str, count: int, counters: bool) -> None:
    """encoder.pt of `count` encoders whose BatchNorm statistics are not the initial ones, with or without its batch counters."""
    encoders = []
    for _ in range(count):
        encoder = Encoder(name, (8,))
        encoder(torch.rand(4, 3, 16, 16))
        states = {part: module.state_dict() for part, module in encoder.named_children()}
        encoders.append({p: {k: v for k, v in s.items() if counters or "num_batches" not in k} for p, s in states.items()})
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"options": {"method": "fedu"}}))
    torch.save({"encoder": name, "head": [8], "encoders": encoders}, run / "encoder.pt")


@pytest.mark.parametrize("counters", [False, True])
def test_exported_weights_are_those_of_torchvisions_resnet(images, tmp_path, monkeypatch, capsys, counters):
    """They load with strict=True, whether or not the run's encoder.pt has BatchNorm's batch counters, as those of old runs have."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "resnet18", 1, counters)
    evaluate("--export backbone.safetensors run")
    assert "backbone.safetensors" in capsys.readouterr().out
    backbone = torchvision.models.resnet18()
    backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.maxpool = backbone.fc = nn.Identity()
    backbone.load_state_dict(safetensors.load_file("backbone.safetensors"), strict=True)
    (encoder,) = load_encoders(Path("run"))
    with torch.inference_mode():
        features = backbone.eval()(images.x_test / 255)
    torch.testing.assert_close(features, extract_features(encoder.backbone, images.x_test), rtol=1e-4, atol=1e-6)
    assert features.std(0).mean() > 1e-3


def test_exported_weights_of_the_narrow_resnet_load_into_build_backbone(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "resnet18-narrow", 1, counters=False)
    evaluate("--export b.safetensors run")
    build_backbone("resnet18-narrow").load_state_dict(safetensors.load_file("b.safetensors"), strict=True)


def test_exported_weights_of_single_are_a_file_a_client(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "tiny", 2, counters=False)
    evaluate("--export b.safetensors run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-0.safetensors", "b-1.safetensors", "run"]
    for k, encoder in enumerate(load_encoders(Path("run"))):
        saved = safetensors.load_file(f"b-{k}.safetensors")
        assert torch.equal(saved["0.weight"], encoder.backbone[0].weight)


@pytest.mark.parametrize(
    "line, words",
    [
        ("runs/none", ["runs/none", "no config.json"]),
        ("--knn --transfer mnist", ["--transfer got 'mnist'"]),
        ("--plot --out none/x.png", ["cannot write none/x.png"]),
        ("--plot --out x.xyz", ["--out got x.xyz", ".png"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(finished, refuses, monkeypatch, line, words):
    monkeypatch.chdir(finished)
    assert refuses(lambda: evaluate(line), *words)


def test_no_run_and_damaged_runs_are_one_sentence(finished, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refuses(lambda: evaluate(""), "no finished run under runs/")
    run = Path("run")
    shutil.copytree(finished / "runs/run", run)
    whole = (run / "encoder.pt").read_bytes()
    (run / "encoder.pt").write_bytes(whole[: len(whole) // 2])
    assert refuses(lambda: evaluate("run"), "run/encoder.pt is not a readable encoder")
    (run / "encoder.pt").unlink()
    assert refuses(lambda: evaluate("run"), "no encoder.pt", "not finished", "--resume run", "weights were not kept")
    for damaged in ('{"evaluation": "lin', '{"evaluation": "linear"}', '{"evaluation": "spectrum", "rank": 3}'):
        (run / "eval.jsonl").write_text(damaged)
        assert refuses(lambda: evaluate("--table run"), "eval.jsonl is not readable")
    (run / "metrics.jsonl").write_text('{"round": 0, "lo')
    assert refuses(lambda: evaluate("--plot run"), "metrics.jsonl is not readable")
    (run / "config.json").write_text("{}")
    assert refuses(lambda: evaluate("run"), "config.json is not readable")


def test_parallel_evaluations_are_all_recorded(tmp_path):
    """Without the lock each would write what it had read, and its own line."""
    (tmp_path / "config.json").write_text("{}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: evaluation.record(tmp_path, {"evaluation": str(k), "dataset": "x"}, [0.5]), range(40)))
    rows = [json.loads(row) for row in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert sorted(int(row["evaluation"]) for row in rows) == list(range(40))


def test_an_accuracy_that_cannot_be_recorded_is_shown(tmp_path, monkeypatch, capsys):
    def refuse(path, write):
        raise InputError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(evaluation, "write_atomic", refuse)
    line = evaluation.record(tmp_path, {"evaluation": "knn", "dataset": "x", "labels": 4}, [0.25, 0.75])
    assert line.endswith("knn on x, 4 labels: 50.00%  (mean of 25.00, 75.00)")
    assert capsys.readouterr().err == f"cannot write {tmp_path}/eval.jsonl: Read-only file system: the next line is recorded nowhere\n"
