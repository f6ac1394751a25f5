"""The method, held by numbers that the package did not make. Which test holds which rule of docs/methods.md:

| rule | test, or case of `test_a_run_is_the_slow_one` |
|---|---|
| loss, heads, predictor, target and queue of a method; its temperature, queue, dictionary and jitter | the method's name; `..., settings` |
| target: EMA 0.99 after each step, of parameters only, in train mode, with running statistics of its own | `fedu`; `target to ...` |
| SGD: momentum 0.9 from zero in each round, weight decay 5e-4; cosine over rounds; epochs, batches, the last dropped | all |
| mean with weights n_k / n, BatchNorm's statistics included | all with clients of unequal size (`DIRICHLET`) |
| other rules of a server | the method's name; test_rules.py |
| divergence: layer-mean or squared, of the online encoder, from what was received or the average | `..., divergence ...`; `target to ...` |
| divergence of a ResNet-18: 17 convolutions | `test_the_divergence_of_a_resnet` |
| DAPU: below mu the server's predictor, else the client's own | the cases that are named `dapu` |
| first participation takes all; the target a copy, or shared | all; `fedu, first target shared` |
| an absent client comes back with its own target, predictor, queue and divergence | the cases with `ABSENT` |
| FedEMA: mu_k, lambda_k, tau, all from the server after an absence | `fedema...` |
| which encoder is uploaded, which is replaced, whose predictor is taken; what is sent | `X to Y, predictor Z` |
| `single`, `central` | `single`, `central` |
| keys (seed, purpose, round, client) of sampling, dropout and training | `test_seeds_of_keys`; the cases with a seed, `ABSENT` or dropout |
| partition | `test_a_client_holds_its_share_of_the_classes`, `test_a_seed_keeps_its_partition` |
| networks: ResNet-18, projector and predictor, their initialisation | `test_resnet18_is_the_papers`, all |
| the encoder that is saved and measured is the server's | all |
| the defaults | `test_the_recipe`; each method's name |
| the two views | test_views.py, `test_a_round_in_float32_is_the_slow_one` |
"""

from dataclasses import replace

import numpy as np
import pytest
import slow_fedu
import torch
import torchvision

import fedu
import methods.orchestra
import ops
from data import load_images, partition, seed_of
from federation import build
from options import Options

# -------------------------------------------------------------------------------------------- runs against a slow FedU

DIRICHLET = {"partition": "dirichlet", "alpha": 2.0}  # clients of unequal size
ABSENT = {"clients": 4, "clients_per_round": 2, "rounds": 5}  # in seed 3, each client but one misses rounds and comes back
CASES = {
    "fedu, dapu": {"method": "fedu", "local_epochs": 2, **DIRICHLET},
    "fedu, dapu, clients absent": {"method": "fedu", "mu": 0.1, "seed": 3, **ABSENT},
    "fedu, clients drop out": {"method": "fedu", "mu": 0.0, "dropout": 0.4, "rounds": 5},
    "fedu, dapu, divergence squared": {"method": "fedu", "divergence": "squared", "mu": 1.0},
    "fedu, first target shared": {"method": "fedu", "first_target": "shared", "ema_decay": 0.9, "seed": 3, **ABSENT},
    "fedbyol": {"method": "fedbyol", "seed": 1, "partition": "iid"},
    "fedbyol, no predictor": {"method": "fedbyol", "no_predictor": True, "classes_per_client": 3},
    "fedbyol, no stop-gradient": {"method": "fedbyol", "no_stop_gradient": True},
    "fedema": {"method": "fedema", **DIRICHLET},
    "fedema, clients absent": {"method": "fedema", "tau": 0.5, "seed": 3, **ABSENT},
    "fedema, divergence from global": {"method": "fedema", "divergence_from": "global", "tau": 0.95, "seed": 3, "rounds": 4, **DIRICHLET},
    "fedsimsiam": {"method": "fedsimsiam", **DIRICHLET},
    "fedsimsiam, no stop-gradient": {"method": "fedsimsiam", "no_stop_gradient": True},
    "fedsimclr": {"method": "fedsimclr", **DIRICHLET},
    "fedca": {"method": "fedca", "rounds": 2, "seed": 2, **DIRICHLET},
    "fedmoco-v1": {"method": "fedmoco-v1", **DIRICHLET},
    "fedmoco-v2": {"method": "fedmoco-v2", "seed": 3, **ABSENT},
    "fedx": {"method": "fedx", **DIRICHLET},
    "fedx, clients absent": {"method": "fedx", "local_epochs": 2, "seed": 3, **ABSENT},
    "fedx, settings": {"method": "fedx", "settings": {"temperature": 0.3, "target_temperature": 0.2}, "predictor": "local", "rounds": 2},
    "orchestra, clients absent": {"method": "orchestra", "seed": 3, "iterations": 20, **ABSENT},
    "orchestra, settings": {
        "method": "orchestra",
        "local_epochs": 2,
        "rounds": 2,
        "settings": {"temperature": 0.3, "clusters": 8, "local_clusters": 3, "memory": 20, "target_decay": 0.9},
    },
    "fedbarlow": {"method": "fedbarlow", **DIRICHLET},
    "fedalignuniform": {"method": "fedalignuniform", **DIRICHLET},
    "fedbarlow, settings": {"method": "fedbarlow", "settings": {"redundancy": 0.5}, "rounds": 2},
    "fedalignuniform, settings": {"method": "fedalignuniform", "settings": {"uniformity": 0.3}, "rounds": 2},
    "fedsimclr, settings": {"method": "fedsimclr", "settings": {"temperature": 0.5, "jitter": 0.7}},
    "fedca, settings": {"method": "fedca", "settings": {"temperature": 0.3, "dictionary": 60}, "rounds": 2},
    "fedmoco-v2, settings": {"method": "fedmoco-v2", "settings": {"temperature": 0.3, "queue": 40}},
    "fedu, median": {"method": "fedu", "server_rule": "median", "seed": 3, **ABSENT},
    "fedu, median, divergence squared": {"method": "fedu", "server_rule": "median", "divergence": "squared", "mu": 1.0, **DIRICHLET},
    "fedsimclr, trimmed": {"method": "fedsimclr", "server_rule": "trimmed", **DIRICHLET},
    "fedu2": {"method": "fedu2", **DIRICHLET},
    "fedu2, settings": {"method": "fedu2", "settings": {"uniformity": 0.3, "server_lr": 2.0}, "seed": 3, **ABSENT},
    "ldawa": {"method": "ldawa", **DIRICHLET},
    "ldawa, target to target": {"method": "ldawa", "aggregate": "target", "update": "target", "seed": 3, **ABSENT},
    "fedu, decorrelation": {"method": "fedu", "settings": {"decorrelation": 0.1}, "rounds": 2},
    "fedsimclr, decorrelation": {"method": "fedsimclr", "settings": {"decorrelation": 1.0}, "rounds": 2, **DIRICHLET},
    "fedu, group norm": {"method": "fedu", "norm": "group", "seed": 3, **ABSENT},
    "fedmoco-v2, group norm": {"method": "fedmoco-v2", "norm": "group"},
    "fedu, dapu, statistics local": {"method": "fedu", "statistics": "local", "mu": 0.1, "seed": 3, **ABSENT},
    "fedu, statistics local, squared": {"method": "fedu", "statistics": "local", "divergence": "squared", "mu": 1.0, **DIRICHLET},
    "fedema, statistics local": {"method": "fedema", "statistics": "local", "seed": 3, **ABSENT},
    "ldawa, statistics local": {"method": "ldawa", "statistics": "local", "update": "both", "predictor": "local"},
    "orchestra, statistics local": {"method": "orchestra", "statistics": "local", "iterations": 20, **DIRICHLET},
    "fedu2, statistics local": {"method": "fedu2", "statistics": "local", "aggregate": "target", "update": "target", "norm": "group"},
    "fedavg-supervised": {"method": "fedavg-supervised", **DIRICHLET},
    "single": {"method": "single", **DIRICHLET},
    "central": {"method": "central"},
    "online to online, predictor local": {"method": "fedu", "predictor": "local", "seed": 3, **ABSENT},
    "online to target, predictor global": {"method": "fedu", "update": "target", "predictor": "global"},
    "online to target, predictor local": {"method": "fedu", "update": "target", "predictor": "local", "seed": 3, **ABSENT},
    "online to both, predictor dapu": {"method": "fedu", "update": "both"},
    "target to online, predictor global": {"method": "fedu", "aggregate": "target", "predictor": "global", **DIRICHLET},
    "target to target, predictor local": {"method": "fedu", "aggregate": "target", "update": "target", "predictor": "local"},
    "target to both, predictor dapu": {"method": "fedu", "aggregate": "target", "update": "both", **DIRICHLET},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """54 images of 16x16 pixels in four classes, each with a colour of its own, and 100 to test on."""
    rng, arrays = np.random.default_rng(0), {}
    colours = rng.integers(0, 256, (4, 1, 1, 3))
    for split, count in (("train", 54), ("test", 100)):
        arrays[f"y_{split}"] = labels = np.arange(count) % 4
        arrays[f"x_{split}"] = (0.5 * colours[labels] + 0.5 * rng.integers(0, 256, (count, 16, 16, 3))).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def view():
    """slow_fedu's view, made once for all that need it: both runs of a case, and cases whose seeds draw the same."""
    made, view = {}, slow_fedu.view

    def remembered(image, draw):
        key = image.numpy().tobytes(), draw.numpy().tobytes()
        if key not in made:
            made[key] = view(image, draw)
        return made[key]

    return remembered


@pytest.fixture
def float64(monkeypatch, view):
    """Networks and views in float64: in float32, rounding puts some ReLU on the other side of zero, and training enlarges that.

    The views are then the slow ones, since ops.augment has no others; test_views.py compares it with them.
    """
    monkeypatch.setattr(slow_fedu, "view", view)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        ops, "augment", lambda images, draws: torch.stack([view(images[i % len(images)], draw) for i, draw in enumerate(draws)])
    )
    yield
    torch.set_default_dtype(torch.float32)


def compare(dataset, folder, rel, method, clients=3, rounds=3, local_epochs=1, lr=0.05, **case):
    """Train by the package and by tests/slow_fedu.py, and compare the encoders and all that both say of each round; returns the rounds."""
    training = {"method": method, "rounds": rounds, "local_epochs": local_epochs, "batch_size": 8, "lr": lr}
    given = training | {name: value for name, value in case.items() if name != "iterations"}
    run = fedu.train(Options(dataset=str(dataset), encoder="tiny", device="cpu", knn_every=2, clients=clients, **given), folder)
    case |= case.pop("settings", {})
    images = load_images(str(dataset))
    data = {"kind": case.pop("partition", "classes"), "seed": case.get("seed", 0), "at_least": 8}
    data |= {name: case.pop(name) for name in ("alpha", "classes_per_client") if name in case}
    if method == "central":
        clients, data["kind"] = 1, "iid"
    x, y, private = images.x_train, images.y_train, np.arange(len(images.y_train))
    if method == "fedca":  # at least one batch is public, and nobody's; its loss reads the images' numbers
        order = np.random.default_rng([data["seed"], *b"public"]).permutation(len(y))
        private, case["public"], y = np.sort(order[8:]), torch.from_numpy(np.sort(order[:8])), torch.arange(len(y))
    parts = partition(images.y_train.numpy()[private], clients, **data)
    group = {k: torch.from_numpy(private[part]) for k, part in enumerate(parts)}
    groups = [{k: group[k]} for k in group] if method == "single" else [group]
    encoders, expected = slow_fedu.federate(x, y, groups, **training, **case)

    for row, slow in zip(run.metrics, expected, strict=True):
        for name, value in slow.items():
            assert row[name] == near(value, rel), f"{name} in round {row['round']}"
    saved = torch.load(folder / "encoder.pt")["encoders"]
    for encoder, slow in zip(saved, encoders, strict=True):
        for part, tensors in encoder.items():
            floats = {name: t for name, t in slow.get_submodule(part).state_dict().items() if t.is_floating_point()}
            torch.testing.assert_close(tensors, floats, rtol=rel, atol=rel)
    accuracies = [row["knn"] for row in run.metrics]
    assert [accuracy is None for accuracy in accuracies] == [r % 2 == 0 and r != rounds - 1 for r in range(rounds)]
    assert accuracies[-1] == pytest.approx(sum(knn(encoder.backbone, images) for encoder in encoders) / len(encoders))
    return run.metrics


def near(value, rel):
    """What equals a value: floats up to this relative error, all else exactly."""
    if isinstance(value, list):
        return [near(x, rel) for x in value]
    return pytest.approx(value, rel=rel) if isinstance(value, float) else value


@torch.no_grad()
def knn(backbone, images):
    """kNN accuracy with temperature 0.1, where the training images are fewer than k = 200."""
    train, test = (torch.nn.functional.normalize(backbone.eval()(x / 255)) for x in (images.x_train, images.x_test))
    votes = (test @ train.T / 0.1).exp() @ torch.nn.functional.one_hot(images.y_train).to(test)
    return (votes.argmax(1) == images.y_test).double().mean().item()


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_slow_one(name, dataset, tmp_path, monkeypatch, float64):
    if iterations := CASES[name].get("iterations"):  # fewer than 500, which one case has, and which take long
        monkeypatch.setattr(methods.orchestra, "ITERATIONS", iterations)
    metrics = compare(dataset, tmp_path / "run", rel=1e-8, **CASES[name])
    took = {whose for row in metrics for whose in row["predictor"]}
    assert not ("dapu" in name and len(took) == 1), "the case must have both decisions"
    if "clients_per_round" in CASES[name]:
        rounds = [[row["round"] for row in metrics if k in row["clients"]] for k in range(4)]
        assert any(b - a > 1 for taken in rounds for a, b in zip(taken, taken[1:])), "a client must be absent and come back"


@pytest.mark.parametrize("method", ["fedu", "fedmoco-v1"])
def test_a_round_in_float32_is_the_slow_one(method, dataset, tmp_path):
    """With the package's own views and few steps; where rounding moves a ReLU past zero, errors are up to 0.003."""
    compare(dataset, tmp_path / "run", rel=0.01, method=method, rounds=1, lr=0.01)


# ------------------------------------------------------------------------------------------------- constants and keys


def test_the_recipe():
    """The recipe of docs/methods.md, and the constants of the methods."""
    recipe = Options(dataset="cifar10")
    assert (recipe.method, recipe.encoder, recipe.partition, recipe.classes_per_client) == ("fedu", "resnet18", "classes", None)
    assert (recipe.lr, recipe.batch_size, recipe.local_epochs, recipe.rounds) == (0.032, 128, 5, 100)
    assert (recipe.clients, recipe.clients_per_round, recipe.dropout, recipe.seed) == (5, None, 0.0, 0)
    assert (recipe.ema_decay, recipe.mu, recipe.tau) == (0.99, 0.4, 0.7)
    assert (recipe.divergence, recipe.divergence_from, recipe.first_target) == ("layer-mean", "received", "copy")
    assert Options(dataset="cifar100") == replace(recipe, dataset="cifar100")


@pytest.mark.parametrize(
    "key, digest",
    [
        ((0, "training", 0, 0), "0b273e581b2d0bf5"),
        ((0, "training", 0, 1), "6a90b83f136aeca6"),
        ((0, "training", 1, 0), "5620bdfca3b16090"),
        ((1, "training", 0, 0), "6eaac2d6a2158795"),
        ((0, "clients", 0), "711c5b320001dec3"),
        ((0, "dropout", 0, 0), "0058ba9cb9289f05"),
    ],
)
def test_seeds_of_keys(key, digest):
    """digest: what `printf "(0, 'training', 0, 0)" | b2sum -l 64` prints."""
    assert seed_of(*key) == int.from_bytes(bytes.fromhex(digest), "little") // 2
    assert slow_fedu.generator(*key).initial_seed() == seed_of(*key)


def test_a_client_holds_its_share_of_the_classes():
    """1/K of the classes each: CIFAR-10's 50,000 images are 10,000 for each of five clients."""
    for num_classes, each in ((10, 2), (100, 20)):
        labels = np.arange(50_000) % num_classes
        parts = partition(labels, 5, "classes", seed=0)
        assert [len(part) for part in parts] == [10_000] * 5
        assert [len({*labels[part]}) for part in parts] == [each] * 5
        assert sorted(np.concatenate(parts)) == list(range(50_000))


@pytest.mark.parametrize(
    "kind, seed, first",
    [
        ("classes", 0, [0, 3, 4, 7, 8, 11]),
        ("classes", 1, [0, 1, 4, 5, 8, 9]),
        ("iid", 0, [0, 2, 7, 9, 10, 11]),
        ("iid", 1, [0, 4, 5, 7, 10, 11]),
        ("dirichlet", 0, [0, 1, 5, 6, 7, 9, 10]),
        ("dirichlet", 1, [1, 3, 4, 5, 8, 9]),
        ("dirichlet-balanced", 0, [0, 1, 4, 5, 8, 9]),
        ("dirichlet-balanced", 1, [0, 2, 4, 6, 8, 9]),
    ],
)
def test_a_seed_keeps_its_partition(kind, seed, first):
    """A run names its partition only by the seed: the first of two clients, of twelve images of four classes."""
    parts = partition(np.arange(12) % 4, 2, kind, seed)
    assert parts[0].tolist() == first and sorted(np.concatenate(parts)) == list(range(12))


# ---------------------------------------------------------------------------------------------------- the paper's networks


def test_resnet18_is_the_papers(dataset, tmp_path):
    """torchvision's network behind CIFAR's stem, the widths of both heads, the sizes of all, and PyTorch's default initialisation."""
    options = Options(dataset=str(dataset), encoder="resnet18", method="untrained", clients=2, batch_size=8, device="cpu")
    run = fedu.train(options, tmp_path / "run")
    saved = torch.load(run.folder / "encoder.pt")["encoders"][0]
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    theirs.maxpool = theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(dict(saved["backbone"]))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run.encoder(x), theirs.eval()(x))

    sizes = [sum(t.numel() for name, t in part.items() if "running" not in name) for part in (saved["backbone"], saved["projector"])]
    projector, predictor = (inputs * 4096 + 4096 + 2 * 4096 + 4096 * 2048 + 2048 for inputs in (512, 2048))
    statistics = 2 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512 + 4096 + 4096)  # a shortcut has some too, where the width changes
    model = build(replace(options, method="fedu"), load_images(str(dataset))).servers[0].model
    assert sizes == [11_168_832, projector] and len(model) - statistics == sum(sizes) + predictor == 38_460_480

    for name, t in [*saved["backbone"].items(), *saved["projector"].items()]:
        if t.ndim > 1:  # of a convolution or a linear layer: uniform within 1 / sqrt(inputs)
            bound = t[0].numel() ** -0.5
            assert 0.99 * bound < t.abs().max() <= bound and t.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_the_divergence_of_a_resnet(dataset, tmp_path):
    """The mean over 17 convolutions, without the three of 1x1 in shortcuts. With one client, its encoder is the server's."""
    common = {"dataset": str(dataset), "encoder": "resnet18-narrow", "batch_size": 16, "rounds": 1, "local_epochs": 1, "clients": 2}
    runs = [
        fedu.train(Options(method=method, device="cpu", knn_every=0, **common), tmp_path / method) for method in ("untrained", "central")
    ]
    before, after = (run.encoder.state_dict() for run in runs)
    convolutions = [name for name, t in before.items() if t.ndim == 4 and t.shape[2:] == (3, 3)]
    norms = [(after[name] - before[name]).norm().item() for name in convolutions]
    assert len(norms) == 17 and runs[1].metrics[0]["divergence"] == [pytest.approx(sum(norms) / 17, rel=1e-5)]
