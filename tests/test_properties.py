"""For random input, a function returns a result with the promised properties, or refuses the input in one sentence."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

import ops
from data import balanced_subset, partition
from options import ENCODERS, HOST_OPTIONS, METHODS, OPTIONS, PARTITIONS, Options, parse, run_name
from runtime.bank import Bank, Row
from runtime.cli import InputError

settings.register_profile("here", deadline=None, max_examples=100, derandomize=True)  # the same on every run; remove it to look further
settings.load_profile("here")


@given(
    labels=some.lists(some.integers(0, 6), min_size=1, max_size=80),
    clients=some.integers(1, 30),
    kind=some.sampled_from(["iid", "classes", "dirichlet", "dirichlet-balanced"]),
    classes=some.none() | some.integers(1, 9),
    alpha=some.floats(1e-3, 1e3),
    at_least=some.integers(1, 5),
)
def test_a_partition_is_disjoint_and_complete(labels, clients, kind, classes, alpha, at_least):
    labels = np.array(labels)
    try:
        parts = partition(labels, clients, kind, 0, classes, alpha, at_least)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(parts) == clients and min(map(len, parts)) >= at_least
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert kind not in ("iid", "dirichlet-balanced") or max(map(len, parts)) - min(map(len, parts)) <= 1


@given(labels=some.lists(some.integers(0, 4), min_size=1, max_size=60), fraction=some.floats(1e-3, 1))
def test_a_balanced_subset_has_every_class(labels, fraction):
    labels = torch.tensor(labels)
    chosen = balanced_subset(labels, fraction, 0)
    assert len(set(chosen.tolist())) == len(chosen) and set(labels[chosen].tolist()) == set(labels.tolist())


numbers = some.floats(-1e6, 1e6, width=32)


@given(data=some.data(), clients=some.integers(1, 6), size=some.integers(1, 40))
def test_the_mean_lies_within_the_clients_range_and_norms_are_those_of_the_segments(data, clients, size):
    rows = torch.tensor(data.draw(some.lists(some.lists(numbers, min_size=size, max_size=size), min_size=clients, max_size=clients)))
    examples = torch.tensor(data.draw(some.lists(some.integers(1, 10_000), min_size=clients, max_size=clients)), dtype=torch.float64)
    weights = (examples / examples.sum()).float()
    cuts = sorted(data.draw(some.lists(some.integers(0, size), max_size=6)))
    segments = torch.tensor([[a, b] for a, b in zip(cuts[::2], cuts[1::2])], dtype=torch.int64).reshape(-1, 2)
    assert abs(weights.sum().item() - 1) < 1e-6
    mean, drift, spread = ops.aggregate(rows, weights, rows[0].clone(), segments)
    slack = 1e-6 * rows.abs().max(0).values + 1e-38  # the smallest floats have no digits to spare
    assert (mean >= rows.min(0).values - slack).all() and (mean <= rows.max(0).values + slack).all()
    assert drift.shape == spread.shape == (clients, len(segments)) and not drift[0].any()
    total = torch.zeros(size)
    for row, weight in zip(rows, weights):  # the sum so far as one more row
        total, *_ = ops.aggregate(torch.stack([total, row]), torch.tensor([1, weight]), rows[0].clone(), segments)
    assert torch.equal(total, mean)


@given(turns=some.lists(some.sets(some.integers(0, 7), max_size=5), max_size=12))
def test_a_bank_keeps_what_the_last_two_checkpoints_name(turns):
    def state(value: int) -> dict[str, torch.Tensor]:
        return {"target": torch.tensor([float(value), 0])}

    bank, rows, before, value = Bank(state(0)), {}, {}, 0
    for members in turns:
        now: dict[int, tuple[Row, int]] = dict(rows)
        for client in members:
            value += 1
            now[client] = bank.write(state(value)), value
            for row, expected in [*rows.values(), *before.values(), *now.values()]:
                assert bank.read(row)["target"][0].item() == expected
        bank.protect(row.index for row, _ in now.values())
        before, rows = rows, now
    assert bank.count <= 8 + 2 * 5


words = some.sampled_from(
    ["--clients", "--mu", "--method", "--rounds", "--lr", "--alpha", "--seed", "--resume", "--out", "--dropout", "-x"]
)
values = some.sampled_from(["0", "-1", "1", "5", "nan", "inf", "1e400", "fedu", "", "none", "é", "--", "0x10", "1_0"]) | some.text(
    max_size=4
)


@given(some.lists(some.tuples(words, values), max_size=5))
def test_any_command_line_is_options_or_one_sentence(pairs):
    try:
        command = parse([word for pair in pairs for word in pair])
    except SystemExit as end:
        assert end.code == 2
        return
    assume(command.resume is None)
    options = Options(**command.given)
    assert options.clients >= 1 and options.lr > 0 and 0 <= options.dropout <= 1


SOME = {  # values of each option, also neighbours and values that look alike
    "dataset": ["fashion", "cifar10", "cifar100", "x", "x/", "./x", "x.npz", "a/x.npz", "x-fedu-5clients-s0", "y" * 70, "y" * 71],
    "data_root": ["~", "/data"],
    "image_size": [8, 64],
    "partition": [*PARTITIONS, "a/b.json", "a-b.json", "b.json", "./b.json", "b.csv"],
    "labels": [None, "a/b.csv", "a-b.csv"],
    "save_partition": [None, "b.json"],
    "views": [None],
    "encoder": [None, *ENCODERS, "timm:resnet18", "timm:resnet50"],
    "processes": ["auto", 1, 2],
    "init": [None, "runs/a", "b.safetensors"],
    "pixel_range": [None, "0,4095", "0,4096", "-1000,400"],
    "holdout": [0.0, 0.1, 0.10000001, 0.5],
    "method": [*METHODS],
    "settings": [
        {},
        *({name: 0.5} for name in ("jitter", "crop_scale", "greyscale", "temperature", "decorrelation")),
        {"jitter": 0.5, "temperature": 0.5},
        {"queue": 5},
    ],
    "seed": [0, 1, 11, 2**63 - 1],
    **{k: [*f.metadata["choices"]] for k, f in OPTIONS.items() if f.metadata["choices"] and k != "method"},
    **{k: [False, True] for k, f in OPTIONS.items() if isinstance(f.default, bool)},
    **{k: [2, 3, 128, 1234567, 1234568] for k in ("clients", "rounds", "local_epochs", "batch_size", "knn_every")},
    **{k: [None, 1, 2] for k in ("clients_per_round", "classes_per_client")},
    "max_drift": [1, 10.0, 10.000001, float("inf")],
    **{
        k: [0.1, 0.10000001, np.nextafter(0.1, 1).item(), 0.01, 1]
        for k in ("mu", "tau", "alpha", "dropout", "lr", "ema_decay", "momentum", "weight_decay", "dp_clip", "dp_noise", "dp_delta")
    },
}

NEEDED = {"dp_noise": {"dp_clip": 1.0}, "dp_delta": {"dp_clip": 1.0, "dp_noise": 1.0}}  # without which they are refused


@pytest.mark.parametrize("changed", OPTIONS)
@settings(max_examples=20)
@given(others=some.lists(some.sampled_from([*SOME]).flatmap(lambda k: some.tuples(some.just(k), some.sampled_from(SOME[k]))), max_size=3))
def test_runs_have_the_same_name_only_if_they_have_the_same_options(changed, others):
    names: dict[str, list] = {}
    for value in SOME[changed]:
        try:
            options = Options(**dict(others) | NEEDED.get(changed, {}) | {changed: value})
        except InputError:
            continue
        names.setdefault(run_name(options), []).append({k: v for k, v in vars(options).items() if k not in HOST_OPTIONS})
    assert all(same == [same[0]] * len(same) for same in names.values())
    assert all(a[0] != b[0] for a, b in itertools.combinations(names.values(), 2))
    assert all(len(name) <= 60 and "/" not in name for name in names)
