import copy
import errno
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fedu
import ops
import simulation
from data import draw_views, keyed_generator, load_npz, partition
from eval import load_encoders
from federation import Client, Federation, Server, Turn, build, divergence_segments, drops_out, sample_clients
from fedu import Uploads, cosine, divergence, local_batches, local_training, model_update
from models import BYOL, Encoder, in_memory_order
from options import METHODS, Options, parse
from report import dapu_notice
from runtime.bank import Bank
from runtime.cli import InputError, write_atomic
from runtime.run import RUN_FILES, holds_run, open_run

CPU = torch.device("cpu")
NOTHING = torch.empty(0, 2, dtype=torch.int64)  # segments, for those who measure none


def objective(device: torch.device = CPU) -> BYOL:
    torch.manual_seed(0)
    return BYOL(Encoder("small"), device)


# ---------------------------------------------------------------------------------------------------- aggregation


class Vectors:
    """Stands for an objective whose networks are a vector of any length."""

    def __init__(self, vector: torch.Tensor):
        self.online = type("Online", (), {"vector": vector})


def aggregate_all(
    uploads: list[torch.Tensor], num_examples: list[int], model: torch.Tensor, segments: torch.Tensor, rows: int | None = None
) -> tuple[torch.Tensor, list[float], int]:
    """The server's mean of the uploads, each one's divergence, and the rows of the matrix that they passed through."""
    options = Options(divergence="squared", mu=1)
    memory = fedu.UPLOAD_MEMORY if rows is None else rows * model.nbytes
    clients = [Client(k, torch.arange(n)) for k, n in enumerate(num_examples)]
    server = Server(model.clone(), torch.empty(0, 0), clients)
    federation = Federation([server], Vectors(model.clone()), torch.empty(0), segments, torch.empty(0))
    matrix = Uploads(federation, options, memory)
    for client, upload in zip(clients, uploads, strict=True):
        matrix.next_row(server).copy_(upload)
        matrix.add(Turn(client, server, sum(num_examples), share=torch.empty(0, 0)))
    matrix.settle(server)
    return server.model, [client.divergence for client in clients], len(matrix.matrix)


def test_two_clients_by_hand():
    """n = 1 and 3: the mean is (1 x_1 + 3 x_2) / 4; drift is the distance from what was received, here squared over both layers."""
    uploads = [torch.tensor([4.0, 8.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])]
    model, drift, _ = aggregate_all(uploads, [1, 3], torch.tensor([0.0, 4.0, 0.0]), torch.tensor([[0, 2], [2, 3]]))
    assert model.tolist() == [1.0, 5.0, 9.0]
    assert drift == pytest.approx([32.0, 144.0])


@pytest.mark.parametrize("rows", [2, 3, 7, 19, 20])
def test_tiles_give_the_bits_of_one_matrix(rows):
    """Twenty uploads through fewer rows: the sum so far is one more row, of weight 1."""
    torch.manual_seed(0)
    uploads, model = [torch.randn(10_000) for _ in range(20)], torch.randn(10_000)
    n, segments = torch.randint(1, 50, (20,)).tolist(), torch.tensor([[3, 300], [401, 9_999]])
    whole, tiled = aggregate_all(uploads, n, model, segments), aggregate_all(uploads, n, model, segments, rows)
    assert torch.equal(whole[0], tiled[0]) and tiled[2] == rows
    assert whole[1] == tiled[1]
    weights = (torch.tensor(n, dtype=torch.float64) / sum(n)).float()
    assert torch.equal(whole[0], ops.weighted_mean(torch.stack(uploads), weights))


def test_one_client_is_the_identity():
    x = torch.tensor([0.1, -0.7, 3.3])
    assert torch.equal(aggregate_all([x], [17], torch.zeros(3), torch.tensor([[0, 3]]))[0], x)


def test_identical_clients_are_a_fixed_point():
    x = torch.randn(1000)
    model, drift, _ = aggregate_all([x, x, x], [5, 1, 2], x, torch.tensor([[0, 1000]]))
    torch.testing.assert_close(model, x, rtol=3e-7, atol=0)
    assert drift == [0, 0, 0]


def test_order_of_training_does_not_matter(npz):
    """Random numbers are keyed by (seed, round, client), so the clients may train in any order."""
    images = load_npz(npz).x_train
    net = objective()
    start = net.online.vector.clone()
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        uploads = {}
        for k in order:
            client = Client(k, torch.arange(k * 20, k * 20 + 16 + 4 * k))
            model_update(client, {}, start, net, Options(), NOTHING, 0)
            generator = keyed_generator(CPU, 0, "training", 0, k)
            local_training(net, images, local_batches(client.indices, 1, 8, generator), generator, 0.05)
            uploads[k] = fedu.model_upload(net, "online")
        results.append(aggregate_all([uploads[k] for k in range(3)], [16, 20, 24], start, torch.tensor([[0, 100]]))[0])
    assert torch.equal(*results)


def test_an_upload_is_online_encoder_and_predictor_alone():
    net = objective()
    net.target.vector.fill_(123.0)
    upload, module = fedu.model_upload(net, "online"), net.online.module
    statistics, top = [*module.encoder.buffers()], [*module.predictor.buffers()]
    assert torch.equal(upload, torch.cat([in_memory_order(t.detach()).flatten() for t in (*statistics, *module.parameters(), *top)]))
    assert not (upload == 123).any()


# ---------------------------------------------------------------------------------------------------- divergence


def test_divergence_by_hand():
    """A toy of two layers: drift norms 3 and 4. Mean over the layers 3.5, squared norm of the whole 25."""
    norms = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert divergence(norms, "layer-mean") == 3.5
    assert divergence(norms, "squared") == 25.0


def test_divergence_of_a_network():
    """Its four convolutions each move by a vector of norm 2, the projector's last bias by one of norm 16, and so does the predictor."""
    net = objective()
    convolutions, whole = (divergence_segments(net, kind) for kind in ("layer-mean", "squared"))
    assert len(convolutions) == 4 and len(whole) == 1
    moved = net.online.vector.clone()
    for begin, end in convolutions:
        moved[begin:end] += 2 / math.sqrt(end - begin)
    moved[net.target.segments[-1].begin :] += 1
    for kind, segments, expected in (("layer-mean", convolutions, 2), ("squared", whole, 4 * 2**2 + 16**2)):
        norms = ops.layer_norms(moved, net.online.vector, segments)
        assert divergence(norms, kind) == pytest.approx(expected, rel=1e-4)


def returning(net: BYOL, options: Options, **values: float) -> tuple[Client, dict[str, torch.Tensor], torch.Tensor]:
    """A client that took part in round 0, what it kept, filled with these values, and a server's model full of ones."""
    client = Client(0, torch.arange(4), divergence=0.3, last_round=0)
    kept = {name: torch.full_like(part, values.get(name, 0)) for name, part in fedu.kept_parts(net, options).items()}
    return client, kept, torch.ones_like(net.online.vector)


def constants(net: BYOL) -> dict[str, float]:
    """The value of each part's parameters, all of which must be one number."""
    vectors = {name: net.parts[name][net.weights[name]] for name in ("encoder", "predictor", "target")}
    assert all(v.eq(v[0]).all() for v in vectors.values())
    return {name: round(v[0].item(), 6) for name, v in vectors.items()}


@pytest.mark.parametrize("distance, taken", [(-1e-9, "global"), (0.0, "local"), (1e-9, "local")])
def test_dapu_below_at_and_above_mu(distance, taken):
    net = objective()
    client, kept, model = returning(net, Options(), predictor=5, target=6)
    client.divergence = 0.4 + distance
    assert model_update(client, kept, model, net, Options(), NOTHING, 1) == (taken, float(taken == "local"), client.divergence)
    assert constants(net) == {"encoder": 1, "predictor": 5 if taken == "local" else 1, "target": 6}


@pytest.mark.parametrize(
    "update, predictor, kept, expected",
    [
        ("online", "global", {"target": 6}, (1, 1, 6)),
        ("online", "local", {"target": 6, "predictor": 5}, (1, 5, 6)),
        ("target", "global", {"encoder": 4}, (4, 1, 1)),
        ("target", "local", {"encoder": 4, "predictor": 5}, (4, 5, 1)),
        ("both", "global", {}, (1, 1, 1)),
        ("both", "local", {"predictor": 5}, (1, 5, 1)),
    ],
)
def test_what_each_column_takes_and_keeps(update, predictor, kept, expected):
    net, options = objective(), Options(update=update, predictor=predictor)
    client, has, model = returning(net, options, **kept)
    assert has.keys() == kept.keys()
    model_update(client, has, model, net, options, NOTHING, 1)
    assert tuple(constants(net).values()) == expected


def test_the_target_can_be_what_is_averaged():
    net = objective()
    net.target.vector.fill_(7)
    upload, end = fedu.model_upload(net, "target"), len(net.target.vector)
    assert upload[:end].eq(7).all() and torch.equal(upload[end:], net.parts["predictor"])


def test_fedema_mixes_by_its_divergence():
    """lambda_k = tau / d_k at the first measurement, and stays; mu_k = min(1, lambda_k d_k) of the client's own model."""
    net, options = objective(), Options(method="fedema")
    client, kept, model = returning(net, options, encoder=3, predictor=5, target=6)
    statistics = net.weights["encoder"].start
    model[:statistics] = 8  # BatchNorm's, which are not mixed
    client.fix_ema_scale(0.3, options.tau)
    for round_, d, own_share in ((1, 0.3, 0.7), (2, 0.15, 0.35), (3, 0.6, 1.0)):
        client.divergence, client.last_round = d, round_ - 1
        update = model_update(client, kept, model, net, options, NOTHING, round_)
        assert update == ("local" if own_share == 1 else "mixed", pytest.approx(own_share), d)
        assert constants(net) == pytest.approx({"encoder": 1 + 2 * own_share, "predictor": 1 + 4 * own_share, "target": 6})
        assert net.online.vector[:statistics].eq(8).all() and net.parts["predictor"][net.weights["predictor"].stop :].eq(1).all()
    client.last_round = 1  # not in round 3
    assert model_update(client, kept, model, net, options, NOTHING, 4).predictor == "global"
    assert constants(net) == {"encoder": 1, "predictor": 1, "target": 1} and client.ema_scale == pytest.approx(0.7 / 0.3)


def test_fedema_is_scaled_by_the_first_divergence_that_was_measured(tiny, tmp_path):
    """Also of a client that was absent then, whose next model is the server's whatever it was."""
    run(tmp_path / "run", *tiny, "--method", "fedema", "--clients", "3", "--clients-per-round", "1", "--rounds", "6", "--seed", "2")
    metrics = load(tmp_path / "run")["metrics"]
    rounds = {k: [row for row in metrics if row["clients"] == [k]] for k in range(3)}
    assert any(b["round"] - a["round"] > 1 for taken in rounds.values() for a, b in zip(taken, taken[1:2]))
    stored = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["values"]["clients"]["ema_scale"]
    assert stored == [pytest.approx(0.7 / rounds[k][0]["divergence"][0]) if rounds[k] else None for k in range(3)]


def test_divergence_is_the_online_encoders_whichever_is_averaged(tiny, tmp_path):
    online, target = (
        run(tmp_path / aggregate, *tiny, "--method", "fedu", "--aggregate", aggregate, "--ema-decay", "1")["metrics"][0]
        for aggregate in ("online", "target")
    )
    assert min(target["divergence"]) > 0 and target["divergence"] == pytest.approx(online["divergence"], rel=1e-5)


def test_divergence_from_the_next_average():
    """Own encoder 3, average 1: every weight of a convolution moved by 2."""
    net, options = objective(), Options(method="fedema", divergence_from="global")
    client, kept, model = returning(net, options, encoder=3)
    segments = divergence_segments(net, "layer-mean")
    expected = sum(2 * math.sqrt(end - begin) for begin, end in segments.tolist()) / len(segments)
    assert model_update(client, kept, model, net, options, segments, 1).divergence == pytest.approx(expected, rel=1e-5)
    assert client.ema_scale == pytest.approx(0.7 / expected, rel=1e-5)


def test_first_participation_takes_everything_from_the_server():
    net = objective()
    model = net.online.vector.clone()
    net.target.vector.zero_()
    net.online.vector.zero_()
    assert model_update(Client(0, torch.arange(4)), {}, model, net, Options(mu=0), NOTHING, 3) == ("global", 0.0, None)
    assert torch.equal(net.online.vector, model)
    assert torch.equal(net.target.vector, net.parts["encoder"])
    assert net.target.vector.data_ptr() != net.parts["encoder"].data_ptr()


def test_notice_when_mu_never_bound():
    def metrics(*taken):
        return [{"predictor": [t], "decided_on": [d]} for t, d in zip(("global", *taken), (None, 0.9, 0.3))]

    notice = dapu_notice(metrics("global", "global"), "dapu", 1.0)
    assert "mu = 1 never bound" in notice and "0.3 to 0.9" in notice and "FedBYOL" in notice
    assert "every DAPU decision was local" in dapu_notice(metrics("local", "local"), "dapu", 0.1)
    assert dapu_notice(metrics("local", "global"), "dapu", 0.4) == ""
    assert dapu_notice(metrics("global", "global"), "global", 0.4) == ""


# -------------------------------------------------------------------------------------------------- local training


class Recorder(TorchDispatchMode):
    """Writes down each operation and its tensors' shapes, and asserts that all of these lie on one device."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.calls = device, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert all(t.device == self.device for t in tensors), f"{operation} mixes {[t.device for t in tensors]}"
        self.calls.append((str(operation), [list(t.shape) for t in tensors]))
        return result


def test_local_training_never_waits_for_the_device(monkeypatch):
    """On the meta device any synchronisation, and any mixing with another device's tensors, raises; nothing is copied there either."""
    meta = torch.device("meta")
    net = objective(meta)
    images = torch.empty(40, 3, 16, 16, dtype=torch.uint8, device=meta)
    batches = local_batches(torch.arange(40, device=meta), 2, 8, None)
    for constructor in ("tensor", "as_tensor", "from_numpy"):  # each would copy from the host, unseen by the recorder
        monkeypatch.setattr(torch, constructor, None)
    with Recorder(meta) as recorder:
        loss = local_training(net, images, batches, None, 0.05)
    assert len(recorder.calls) > 1000
    assert loss.device == meta and loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_every_step_is_the_same_sequence_of_operations(npz):
    """Whatever the images, the draws and the state: what a CUDA graph needs. The first step differs, as SGD then makes its momentum."""
    images = load_npz(npz).x_train
    net, steps = objective(), []
    with Recorder(CPU) as recorder:

        def batches():
            for batch in local_batches(torch.arange(32), 1, 8, torch.Generator().manual_seed(0)):
                yield batch
                steps.append(recorder.calls[:])
                recorder.calls.clear()

        local_training(net, images, batches(), torch.Generator().manual_seed(0), 0.05)
    assert len(steps) == 4 and len(steps[1]) > 300
    assert steps[1] == steps[2] == steps[3]


def test_views_and_loss_compile_without_a_graph_break():
    """Drawn numbers go in as a tensor: torch.compile knows no generators."""
    net = objective()
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = draw_views(16, 16, 16, CPU, torch.Generator().manual_seed(0))

    def step(images, draws):
        return sum(term() for term in net.terms(*ops.augment(images, draws).chunk(2), torch.arange(8)))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, draws), step(images, draws))


def test_local_training_is_torchs_sgd_over_the_modules_own_tensors(monkeypatch):
    """Momentum and weight decay on everything, here by the flat gradient; a decay large enough to be seen in four steps."""
    monkeypatch.setattr(fedu, "WEIGHT_DECAY", 0.1)
    torch.manual_seed(0)
    net, images = objective(), torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    module = copy.deepcopy(net.online.module)
    for p in module.parameters():
        p.grad = None
    batches, optimizer = torch.arange(32).split(8), torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    local_training(net, images, batches, None, 0.01, ema_decay=1.0, views=lambda x, _: (x / 255, x.flip(3) / 255))
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
    """So it is in a client's first round with --first-target shared."""
    net = objective()
    images = load_npz(npz).x_train
    for ema_decay in (0.0, 0.99):
        batches = local_batches(torch.arange(16), 1, 8, torch.Generator().manual_seed(0))
        local_training(net, images, batches, None, 0.05, ema_decay=ema_decay)
        weights = net.target.weights
        assert torch.equal(net.target.vector[weights], net.parts["encoder"][weights]) == (ema_decay == 0)


def test_learning_rate_is_a_cosine_over_rounds():
    rates = [cosine(0.032, r, 100) for r in (0, 50, 99)]
    assert rates == pytest.approx([0.032, 0.016, 0.032 * (1 + math.cos(0.99 * math.pi)) / 2])


def test_sampled_clients_are_distinct_and_by_round():
    draws = [sample_clients(20, 5, 0, r) for r in range(30)]
    assert all(len(d) == 5 and d <= set(range(20)) for d in draws)
    assert len({frozenset(d) for d in draws}) > 20 and draws[3] == sample_clients(20, 5, 0, 3)
    assert sample_clients(4, None, 0, 0) == {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------------------- whole runs


def run(folder, *options: str) -> dict:
    """Run fedu.py in this process; returns its encoders' tensors and metrics."""
    fedu.main(parse([*options, "--out", str(folder)]))
    return load(folder)


def load_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load(folder) -> dict:
    encoders = torch.load(folder / "encoder.pt", weights_only=True)["encoders"]
    vectors = [torch.cat([t.flatten().double() for m in e.values() for t in m.values()]) for e in encoders]
    return {"encoders": vectors, "metrics": load_metrics(folder)}


def test_run_folder(finished):
    folder = finished / "runs/run"
    assert {p.name for p in folder.iterdir()} == set(RUN_FILES) - {"eval.jsonl"}
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["clients"] == 2 and config["options"]["ema_decay"] == 0.99 and config["seconds"] > 0
    assert {"command", "versions", "device", "source", "commit"} <= config.keys()
    metrics = load(folder)["metrics"]
    assert [row["round"] for row in metrics] == [0, 1, 2]
    keys = {"round", "lr", "loss", "divergence", "decided_on", "predictor", "own_share", "num_examples", "clients"}
    keys |= {"dropped", "nonfinite", "upload_bytes", "download_bytes", "knn", "seconds"}
    assert all(row.keys() == keys for row in metrics)
    assert metrics[0]["decided_on"] == [None, None] and metrics[1]["decided_on"] == metrics[0]["divergence"]
    net = objective()
    assert metrics[0]["upload_bytes"] == metrics[0]["download_bytes"] == 2 * net.online.vector.nbytes
    assert metrics[0]["num_examples"] == [32, 32] and 0 < metrics[0]["knn"] <= 1
    assert (folder / "divergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebook_trains_and_gets_the_run(npz, finished, tmp_path):
    options = Options(
        dataset=str(npz), encoder="small", clients=2, rounds=3, local_epochs=1, batch_size=8, lr=0.05, knn_every=1, device="cpu"
    )
    done = fedu.train(options, tmp_path / "run")
    assert done.folder == tmp_path / "run" and [row["round"] for row in done.metrics] == [0, 1, 2]
    assert torch.equal(load(done.folder)["encoders"][0], load(finished / "runs/run")["encoders"][0])
    assert done.encoder(torch.rand(2, 3, 16, 16)).shape == (2, done.encoder.head[-1])


def test_one_seed_one_answer(tiny, finished, tmp_path):
    again, other = run(tmp_path / "a", *tiny), run(tmp_path / "b", *tiny, "--seed", "1")
    first = load(finished / "runs/run")["encoders"][0]
    assert torch.equal(first, again["encoders"][0]) and not torch.equal(first, other["encoders"][0])


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--method", "single"],
        ["--method", "fedema"],
        ["--method", "fedmoco-v2"],
        ["--method", "fedca"],
        ["--clients", "4", "--clients-per-round", "2", "--mu", "0.05"],
    ],
)
def test_resume_is_bit_identical(tiny, tmp_path, monkeypatch, more):
    straight = run(tmp_path / "straight", *tiny, *more)
    save = simulation.save_checkpoint

    def stop_after_round_1(out, checkpoint, bank):
        save(out, checkpoint, bank)
        if checkpoint.values["round"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "save_checkpoint", stop_after_round_1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", *tiny, *more)
    assert not (tmp_path / "stopped/encoder.pt").exists()
    monkeypatch.undo()
    fedu.resume(tmp_path / "stopped")
    resumed = load(tmp_path / "stopped")
    assert all(map(torch.equal, straight["encoders"], resumed["encoders"]))
    for a, b in zip(straight["metrics"], resumed["metrics"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_bf16_trains(tiny, tmp_path):
    losses = [run(tmp_path / p, *tiny, "--precision", p)["metrics"][-1]["loss"] for p in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_narrow_resnet_trains(tiny, tmp_path):
    result = run(tmp_path / "run", *tiny, "--encoder", "resnet18-narrow", "--rounds", "2")
    assert result["metrics"][1]["loss"] < result["metrics"][0]["loss"]


def test_single_never_communicates(tiny, npz, tmp_path):
    """Other images at client 1 change nothing at client 0, and no byte is counted."""
    import numpy as np

    alone = run(tmp_path / "a", *tiny, "--method", "single")
    assert all(row["upload_bytes"] == row["download_bytes"] == 0 for row in alone["metrics"])
    arrays = dict(np.load(npz))
    parts = partition(arrays["y_train"], 2, "classes", 0)
    arrays["x_train"][parts[1]] = 255 - arrays["x_train"][parts[1]]
    np.savez(tmp_path / "other.npz", **arrays)
    other = run(tmp_path / "b", *tiny, "--method", "single", "--dataset", str(tmp_path / "other.npz"))
    assert len(alone["encoders"]) == 2
    assert torch.equal(alone["encoders"][0], other["encoders"][0])
    assert not torch.equal(alone["encoders"][1], other["encoders"][1])


def test_methods_differ_where_they_should(tiny, tmp_path):
    fedbyol = run(tmp_path / "fedbyol", *tiny, "--method", "fedbyol")
    below, above = (run(tmp_path / f"mu{mu}", *tiny, "--mu", mu) for mu in ("inf", "0"))
    assert torch.equal(fedbyol["encoders"][0], below["encoders"][0])  # mu = infinity: always the global predictor
    assert not torch.equal(fedbyol["encoders"][0], above["encoders"][0])
    assert [row["predictor"] for row in above["metrics"]] == [["global"] * 2, ["local"] * 2, ["local"] * 2]
    central = run(tmp_path / "central", *tiny, "--method", "central")
    assert central["metrics"][0]["num_examples"] == [64] and central["metrics"][0]["upload_bytes"] == 0
    untrained = run(tmp_path / "untrained", *tiny, "--method", "untrained")
    torch.manual_seed(0)
    fresh = torch.cat([t.flatten().double() for t in BYOL(Encoder("small"), CPU).online.module.encoder.state_dict().values()])
    assert torch.equal(untrained["encoders"][0], fresh) and untrained["metrics"] == []
    fedu.resume(tmp_path / "untrained")  # as if it had been interrupted
    assert torch.equal(load(tmp_path / "untrained")["encoders"][0], fresh)


@pytest.mark.parametrize("method, strength", [("fedmoco-v1", 0.4), ("fedmoco-v2", 0.8), ("fedu", 0.8)])
def test_moco_v1_has_the_mild_colours_of_the_authors_code(tiny, tmp_path, monkeypatch, method, strength):
    views, augment = [], ops.augment
    monkeypatch.setattr(ops, "augment", lambda images, draws: views.append(draws) or augment(images, draws))
    run(tmp_path / "run", *tiny, "--method", method)
    column = dict(zip(ops.VIEW, torch.cat(views).unbind(1), strict=True))
    for name in ("brightness", "contrast", "saturation"):
        assert 0.9 * strength < (column[name] - 1).abs().max() < 1.000001 * strength
    assert 0.9 * strength / 4 < column["hue"].abs().max() <= strength / 4


def test_without_a_predictor_none_is_taken(tiny, tmp_path, capsys):
    rows = run(tmp_path / "run", *tiny, "--no-predictor")["metrics"]
    assert [row["predictor"] for row in rows] == [["-", "-"]] * 3
    assert "mu" not in capsys.readouterr().out


def test_fedema_takes_the_papers_divergence_which_has_no_mu_there(tiny, tmp_path):
    shares = [row["own_share"] for row in run(tmp_path / "run", *tiny, "--method", "fedema", "--divergence", "squared")["metrics"]]
    assert shares[0] == [0, 0] and all(0 < share <= 1 for share in shares[2])


def test_one_who_has_all_images_does_not_care_how_they_would_be_dealt(tiny, tmp_path):
    rows = run(tmp_path / "run", *tiny, "--method", "central", "--partition", "dirichlet", "--alpha", "0.001")["metrics"]
    assert rows[0]["num_examples"] == [64]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_can_be_evaluated(tiny, tmp_path, capsys, method):
    result = run(tmp_path / "run", *tiny, "--method", method)
    assert ("--plot" in capsys.readouterr().out) == METHODS[method].trains
    assert all(t.isfinite().all() for t in result["encoders"])
    (encoder, *_) = load_encoders(tmp_path / "run")
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, encoder.head[-1])
    if METHODS[method].trains:
        assert [row["round"] for row in result["metrics"]] == [0, 1, 2] and result["metrics"][-1]["knn"] > 0.2


def test_fedca_sets_public_images_aside_and_shares_representations(npz, tmp_path, tiny):
    images = load_npz(npz)
    options = Options(**parse([*tiny, "--method", "fedca"]).given)
    federation = build(options, images)
    fedu.align_with_base(federation, options)
    objective, private = federation.objective, torch.cat([client.indices for client in federation.clients])
    assert len(private) == 56 and len(private.unique()) == 56 and objective.public.shape == (8, 3, 16, 16)
    assert not any(torch.equal(public, image) for public in objective.public for image in images.x_train[private])
    first, second = run(tmp_path / "run", *tiny, "--method", "fedca", "--rounds", "2")["metrics"]
    networks, rows = 2 * objective.online.vector.nbytes, 2 * 3 * 16 * 256 * 4  # of 28 images, three batches of 8 and two views
    assert (first["upload_bytes"], first["download_bytes"]) == (networks + rows, networks)
    assert second["download_bytes"] == networks + 2 * rows


def test_an_own_predictor_is_not_sent(tiny, tmp_path):
    sent = {}
    for more in ([], ["--predictor", "local"], ["--update", "target", "--predictor", "global"], ["--no-predictor"]):
        sent[" ".join(more)] = run(tmp_path / str(len(sent)), *tiny, "--rounds", "1", *more)["metrics"][0]["upload_bytes"]
    net = objective()
    both, encoder = 2 * net.online.vector.nbytes, 2 * net.parts["encoder"].nbytes
    assert list(sent.values()) == [both, encoder, both, encoder]


@pytest.mark.parametrize("more", [["--aggregate", "target"], ["--update", "both"], ["--no-stop-gradient"], ["--ema-decay", "1"]])
def test_an_ablation_changes_the_run(tiny, finished, tmp_path, more):
    assert not torch.equal(run(tmp_path / "run", *tiny, *more)["encoders"][0], load(finished / "runs/run")["encoders"][0])


def test_the_rarer_options_together(tiny, tmp_path):
    """Shared first target, squared divergence, Dirichlet partition and sampled clients, against the same run with copied targets."""
    more = [
        "--clients",
        "4",
        "--clients-per-round",
        "2",
        "--partition",
        "dirichlet",
        "--alpha",
        "5",
        "--divergence",
        "squared",
        "--mu",
        "50",
    ]
    copied = run(tmp_path / "copied", *tiny, *more)
    shared = run(tmp_path / "shared", *tiny, *more, "--first-target", "shared")
    assert all(len(row["clients"]) == 2 for row in shared["metrics"])
    assert len({row["num_examples"][0] for row in shared["metrics"]}) > 1
    assert shared["metrics"][0]["loss"] != copied["metrics"][0]["loss"]
    longest = run(tmp_path / "mean", *tiny, *more[:-4], "--rounds", "1")["metrics"][0]["divergence"]
    assert all(squared > length for squared, length in zip(copied["metrics"][0]["divergence"], longest))


def test_an_image_folder_is_resized(tmp_path):
    for split, colour in itertools.product(("train", "test"), ("red", "blue")):
        (tmp_path / "images" / split / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 20), colour).save(tmp_path / "images" / split / colour / f"{i}.png")
    options = ["--dataset", str(tmp_path / "images"), "--image-size", "16", "--encoder", "tiny", "--method", "central", "--rounds", "1"]
    result = run(tmp_path / "run", *options, "--batch-size", "4", "--ema-decay", "0.9", "--clients", "2", "--data-root", str(tmp_path))
    assert result["metrics"][0]["num_examples"] == [8]


def test_paper_recipe():
    for dataset in ("cifar10", "cifar100"):
        options = asdict(Options(dataset=dataset))
        paper = {"encoder": "resnet18", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "ema_decay": 0.99, "mu": 0.4}
        paper |= {"clients": 5, "clients_per_round": None, "partition": "classes", "divergence": "layer-mean", "method": "fedu"}
        assert {k: options[k] for k in paper} == paper
    assert (fedu.MOMENTUM, fedu.WEIGHT_DECAY) == (0.9, 5e-4)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset", "mnist"], ["--dataset", "'mnist'"]),
        (["--dataset", "none.npz"], ["none.npz does not exist"]),
        (["--clients", "65"], ["65 clients", "--clients"]),
        (["--method", "single", "--predictor", "dapu"], ["--predictor dapu changes nothing"]),
        (["--clients", "0"], ["--clients", "'0'", "at least 1"]),
        (["--clients", "many"], ["--clients", "'many'"]),
        (["--clients-per-round", "3"], ["--clients-per-round got 3", "2 clients"]),
        (["--classes-per-client", "5"], ["--classes-per-client got 5", "4 classes"]),
        (["--batch-size", "33"], ["--batch-size"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2"]),
        (["--lr", "-1"], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "1e30"], ["round 0: no upload is finite", "--lr"]),
        (["--dropout", "1.5"], ["--dropout", "at most 1"]),
        (["--ema-decay", "1.5"], ["--ema-decay", "at most 1"]),
        (["--rounds", "1.5"], ["--rounds", "whole number"]),
        (["--partition", "dirichlet", "--alpha", "0"], ["--alpha", "at least 0.001"]),
        (["--partition", "dirichlet", "--alpha", "inf"], ["--alpha", "at most 1e+06"]),
        (["--seed", "18446744073709551616"], ["--seed", "at most"]),
        (["--method", "fedca", "--batch-size", "64"], ["2 clients want 64 images each, there are 0"]),
        (["--divergence", "squared"], ["--divergence squared wants a --mu"]),
        (["--method", "fedsimclr", "--predictor", "local"], ["--predictor local changes nothing in --method fedsimclr"]),
        (["--method", "fedsimsiam", "--update", "both"], ["--update both changes nothing"]),
        (["--method", "fedmoco-v1", "--no-predictor"], ["--no-predictor changes nothing"]),
        (["--method", "fedbyol", "--mu", "1"], ["--mu 1.0 changes nothing"]),
        (["--tau", "0.5"], ["--tau 0.5 changes nothing in --method fedu"]),
        (["--no-predictor", "--mu", "1"], ["--mu 1.0 changes nothing"]),
        (["--no-predictor", "--predictor", "local"], ["--predictor local changes nothing"]),
        (["--alpha", "0.1"], ["--alpha 0.1 changes nothing"]),
        (["--partition", "iid", "--classes-per-client", "2"], ["--classes-per-client 2 changes nothing"]),
        (["--method", "fedsimclr", "--ema-decay", "1"], ["--ema-decay 1.0 changes nothing"]),
        (["--method", "fedbyol", "--divergence-from", "global"], ["--divergence-from global changes nothing"]),
        (["--method", "central", "--clients-per-round", "1"], ["--clients-per-round 1 changes nothing"]),
        (["--image-size", "64"], ["--image-size 64 changes nothing"]),
        (["--method", "fedsgd"], ["--method", "fedsgd"]),
        (["--resume", "runs/none"], ["runs/none", "no config.json"]),
        (["--resume", "x", "--out", "y"], ["--resume", "--out"]),
        (["--out", "/proc/fedu"], ["--out /proc/fedu"]),
        (["--bogus"], ["--bogus"]),
    ],
)
def test_bad_options_are_one_sentence(tiny, command, tmp_path, options, words):
    base = [] if "--resume" in options else tiny
    assert refused(command("fedu.py", *base, *options, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("runs/*/encoder.pt")) and not list(tmp_path.glob("runs/*/.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_cuda_where_there_is_none(tiny, command, tmp_path):
    assert refused(command("fedu.py", *tiny, "--device", "cuda", cwd=tmp_path), "--device got cuda")
    assert not (tmp_path / "runs").exists()


def test_an_existing_folder_is_kept(tiny, command, finished, tmp_path):
    before = {p.name: p.read_bytes() for p in (finished / "runs/run").iterdir()}
    assert refused(command("fedu.py", *tiny, "--out", "runs/run", cwd=finished), "runs/run is not empty", "--resume", "--overwrite")
    assert refused(command("fedu.py", "--dataset", "absent.npz", "--out", "runs/run", cwd=finished), "runs/run is not empty")
    changed = command("fedu.py", "--resume", "runs/run", "--lr", "0.1", "--rounds", "9", cwd=finished)
    assert refused(changed, "--lr 0.1 (it was 0.05)", "--rounds 9 (it was 3)")
    bad = command("fedu.py", *tiny, "--clients", "99", "--out", "runs/run", "--overwrite", cwd=finished)
    assert refused(bad, "99 clients")
    assert before == {p.name: p.read_bytes() for p in (finished / "runs/run").iterdir()}
    (tmp_path / "thesis.txt").write_text("mine")
    assert refused(command("fedu.py", *tiny, "--out", tmp_path, "--overwrite", cwd=tmp_path), "no config.json")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_overwrite_replaces_a_run(tiny, command, tmp_path):
    for more in ([], ["--overwrite", "--rounds", "1"]):
        done = command("fedu.py", *tiny, "--out", "run", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def test_an_interrupted_overwrite_can_be_repeated(stopped, monkeypatch):
    unlink = Path.unlink

    def interrupt(path, missing_ok):
        if path.name == "bank.bin":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_run(stopped, {}, CPU, overwrite=True)
    monkeypatch.undo()
    assert holds_run(stopped, overwrite=True)


def test_without_git_and_where_folders_cannot_be_locked(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setenv("PATH", "")
    run(tmp_path / "run", *tiny, "--rounds", "1")
    assert json.loads((tmp_path / "run/config.json").read_text())["commit"] is None
    assert "run cannot be locked (Bad file descriptor)" in capsys.readouterr().err


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the finished run as it was before its encoder was written."""
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt", "bank.bin"):
        (tmp_path / "run" / name).write_bytes((finished / "runs/run" / name).read_bytes())
    return tmp_path / "run"


def damage(path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
    if how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": whole[:middle], "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "foreign"])
def test_damaged_checkpoints_are_refused_and_the_previous_one_continues(finished, stopped, command, how):
    damage(stopped / "checkpoint.pt", how)
    done = command("fedu.py", "--resume", "run", cwd=stopped.parent)
    assert done.returncode == 0 and "run/checkpoint.pt is" in done.stderr and "falling back to run/checkpoint-previous.pt" in done.stderr
    assert "continuing after 2 of 3 rounds" in done.stdout
    straight, resumed = load(finished / "runs/run"), load(stopped)
    assert all(map(torch.equal, straight["encoders"], resumed["encoders"])) and len(resumed["metrics"]) == 3
    # the whole one is kept beside the new one, not the damaged one
    assert torch.load(stopped / "checkpoint-previous.pt", weights_only=True)["values"]["round"] == 2


def test_a_damaged_row_of_the_bank_is_refused_and_the_previous_checkpoint_continues(finished, stopped, command):
    """Two clients and three rounds: the last checkpoint names rows 4 and 5, the one before it rows 2 and 3."""
    bank = stopped / "bank.bin"
    row_bytes = bank.stat().st_size // 6
    with bank.open("r+b") as file:
        file.seek(5 * row_bytes + 1000)
        file.write(b"\xff\xff")
    done = command("fedu.py", "--resume", "run", cwd=stopped.parent)
    assert done.returncode == 0 and "run/bank.bin is damaged: row 5" in done.stderr and "falling back" in done.stderr
    assert all(map(torch.equal, load(finished / "runs/run")["encoders"], load(stopped)["encoders"]))


def test_a_run_begun_before_an_option_existed_has_its_default(finished, stopped):
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "metrics.jsonl").unlink()  # and stopped right after it had begun
    (stopped / "checkpoint.pt").unlink()
    (stopped / "checkpoint-previous.pt").unlink()
    for name in ("update", "dropout"):
        del config["options"][name]
    (stopped / "config.json").write_text(json.dumps(config))
    fedu.resume(stopped)
    assert torch.equal(load(stopped)["encoders"][0], load(finished / "runs/run")["encoders"][0])


def test_without_a_whole_checkpoint_nothing_is_resumed(stopped, command):
    (stopped / "checkpoint.pt").unlink()  # as if killed between the two renames
    before = command("fedu.py", "--resume", "run", cwd=stopped.parent)
    assert before.returncode == 0 and "continuing after 2 of 3 rounds" in before.stdout
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        damage(stopped / name, "flipped")
    done = command("fedu.py", "--resume", "run", cwd=stopped.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "run/checkpoint-previous.pt is" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_name_the_command_that_continues(tiny, tmp_path, number):
    """And while the run goes on, its folder is refused to another."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "fedu.py"), *tiny, "--rounds", "999", "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # where the tests run in the background, interrupts are ignored, and a child would inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(line, cwd=tmp_path, env=env, preexec_fn=heed, **pipes) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None, process.stderr.read()
        for other, words in (
            ([*line, "--overwrite"], "run is in use by another run"),
            ([*line[:2], "--resume", "run"], "run is in use by another run"),
            (line, "run is not empty"),
        ):
            assert refused(subprocess.run(other, cwd=tmp_path, env=env, capture_output=True, text=True), words)
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr.read().splitlines()[-1] == "fedu.py: interrupted; continue with `python fedu.py --resume run`"
    assert len(load_metrics(tmp_path / "run")) >= 2 and not list((tmp_path / "run").glob(".*"))


# ------------------------------------------------------------------------------------------------- faults of clients


def test_a_dropped_client_is_as_it_was(tiny, tmp_path):
    """The clients that report are averaged alone; in a round without any the global model stays."""
    metrics = run(tmp_path / "run", *tiny, "--clients", "4", "--rounds", "6", "--dropout", "0.6", "--knn-every", "0")["metrics"]
    for row in metrics:
        expected = [k for k in range(4) if drops_out(k, 0.6, 0, row["round"])]
        assert row["dropped"] == expected and row["clients"] == [k for k in range(4) if k not in expected]
    assert len({tuple(row["clients"]) for row in metrics}) > 2
    nobody = run(tmp_path / "nobody", *tiny, "--dropout", "1", "--rounds", "2")
    assert all(row["clients"] == [] and row["upload_bytes"] == 0 for row in nobody["metrics"])
    assert torch.equal(nobody["encoders"][0], run(tmp_path / "untrained", *tiny, "--method", "untrained")["encoders"][0])


def test_what_a_poisoned_client_uploads_reaches_nobody(npz, tiny, capsys, monkeypatch):
    """Client 1 of 3 gets an infinite weight in round 1: as if it had dropped out, but that the others' shares are known only later."""
    images = load_npz(npz)
    options = Options(**parse([*tiny, "--clients", "3", "--method", "fedema"]).given)
    training = fedu.train_client

    def rounds(poisoned: bool, options: Options = options):
        federation = build(options, images)
        (server,), net = federation.servers, federation.objective
        bank, uploads = Bank(fedu.kept_parts(net, options)), Uploads(federation, options)
        first = fedu.run_round(options, federation, bank, uploads, 0)
        poisoned_client = server.clients[1]
        kept = bank.read(poisoned_client.row)

        def poison(*arguments):
            result = training(*arguments)
            if arguments[-2] == 1:  # the client's id
                net.online.vector[-1] = float("inf")
            return result

        with monkeypatch.context() as patch:
            if poisoned:
                patch.setattr(fedu, "train_client", poison)
            else:
                patch.setattr("federation.drops_out", lambda k, *_: k == 1)
            row = fedu.run_round(options, federation, bank, uploads, 1)
        now = bank.read(poisoned_client.row)
        assert kept.keys() == {"encoder", "target", "predictor"}
        assert all(torch.equal(tensor, now[name]) for name, tensor in kept.items())
        assert poisoned_client.divergence == first["divergence"][1] and poisoned_client.last_round == 0
        return row, server

    row, server = rounds(poisoned=True)
    assert row["nonfinite"] == [1] and row["clients"] == [0, 2]
    assert "round 1: the upload of client 1 is not finite and was left out" in capsys.readouterr().err
    expected, alone = rounds(poisoned=False)
    assert expected["loss"] == row["loss"] and expected["divergence"] == row["divergence"]
    torch.testing.assert_close(server.model, alone.model, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="round 1: the upload of client 1 is not finite"):
        rounds(poisoned=True, options=replace(options, on_nonfinite="error"))


# -------------------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_sentence_and_leaves_no_fragment(tiny, command, tmp_path):
    """A file-size limit below the bank's 14 MB stands for the full disk: both make write() fail in the middle."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = command("fedu.py", *tiny, "--out", "run", cwd=tmp_path, preexec_fn=limit)
    assert refused(done, "cannot write run/bank.bin")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["bank.bin", "config.json", "metrics.jsonl"]
    again = command("fedu.py", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0 and "continuing after 0 of 3 rounds" in again.stdout


def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint(finished, tiny, tmp_path):
    """A tmpfs of 16 MB holds the first round and not the second; what it holds is then continued elsewhere."""
    script = (
        f"mount -t tmpfs -o size=16m none full && {sys.executable} {ROOT / 'fedu.py'} {' '.join(tiny)} --out full/run; cp -r full/run run"
    )
    (tmp_path / "full").mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    if "full" in done.stderr and "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert re.fullmatch(r"fedu.py: error: cannot write full/run/\S+: No space left on device\n", done.stderr), done
    assert len(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["rows"]) == 2
    fedu.resume(tmp_path / "run")
    assert all(map(torch.equal, load(finished / "runs/run")["encoders"], load(tmp_path / "run")["encoders"]))


@pytest.mark.parametrize("cause, expected", [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), InputError)])
def test_what_keeps_torch_save_from_writing_is_what_is_reported(tmp_path, cause, expected):
    """Its archive writer makes a RuntimeError of either."""

    class Hindered:
        def __init__(self, file):
            self.file, self.turns = file, itertools.count()

        def write(self, piece) -> int:
            if next(self.turns) == 2:
                raise cause
            return self.file.write(piece)

        def flush(self) -> None:
            pass

    with pytest.raises(expected, match="No space left" if expected is InputError else None):
        write_atomic(tmp_path / "x.pt", lambda file: torch.save(torch.zeros(10_000), Hindered(file)))
    assert not list(tmp_path.iterdir())
