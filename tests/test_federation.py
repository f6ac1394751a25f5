import json

import numpy as np
import pytest
import torch
from conftest import load, run

import eval as evaluation
import fedu
import training
from data import load_images, partition
from federation import build, build_networks, drops_out, sample_clients
from models import load_encoders
from options import Options, parse, parse_evaluation


def test_sampled_clients_are_distinct_and_by_round():
    draws = [sample_clients(20, 5, 0, r) for r in range(30)]
    assert all(len(d) == 5 and d <= set(range(20)) for d in draws)
    assert len({frozenset(d) for d in draws}) > 20 and draws[3] == sample_clients(20, 5, 0, 3)
    assert sample_clients(4, None, 0, 0) == {0, 1, 2, 3}


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


def test_single_never_communicates(tiny, npz, tmp_path):
    """With other images at client 1, client 0 trains the same encoder; no byte of traffic is counted."""
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


def test_batchnorm_of_its_own_stays_with_a_client(tiny, tmp_path, capsys):
    """What travels is counted without it, the server's stays as initialised, and each client that took part is evaluated with its own."""
    more = ["--statistics", "local", "--clients", "3", "--dropout", "0.3", "--seed", "1"]
    local = run(tmp_path / "run", *tiny, *more)
    took_part = sorted({k for row in local["metrics"] for k in row["clients"]})
    first = load_encoders(tmp_path / "run")
    assert len(first) == len(took_part) > 1
    (untrained,) = run(tmp_path / "untrained", *tiny, "--method", "untrained", "--seed", "1")["encoders"]
    assert all(len(encoder) == len(untrained) for encoder in local["encoders"])
    one, other = (encoder.backbone for encoder in first[:2])
    assert torch.equal(one[0].weight, other[0].weight)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert not torch.equal(getattr(one[1], name), getattr(other[1], name))
    options = Options(**parse([*tiny, *more]).given)
    networks = build_networks(options, None, torch.device("cpu"))
    widths = [32, 64, 128, 256, 512, 512]  # of each BatchNorm; the last two in projector and predictor
    assert len(networks.private.unique()) == 4 * sum(widths)
    sent = networks.online.vector.nbytes - 4 * 4 * sum(widths)
    assert all(row["upload_bytes"] == sent * len(row["clients"]) for row in local["metrics"])
    server = torch.load(tmp_path / "run/checkpoint.pt")["tensors"][0]["model"]
    assert torch.equal(server[networks.private], networks.online.vector[networks.private]) and not torch.equal(
        server, networks.online.vector
    )
    evaluation.main(parse_evaluation(["--knn", str(tmp_path / "run")]))
    (line,) = map(json.loads, (tmp_path / "run/eval.jsonl").read_text().splitlines())
    assert len(line["accuracies"]) == len(took_part) and line["accuracy"] == pytest.approx(local["metrics"][-1]["knn"])

    (tmp_path / "run/checkpoint.pt").unlink()  # goes on from the round before
    (tmp_path / "run/encoder.pt").unlink()
    fedu.resume(tmp_path / "run")
    assert all(map(torch.equal, load(tmp_path / "run")["encoders"], local["encoders"]))


def test_one_who_has_all_images_does_not_care_how_they_would_be_dealt(tiny, tmp_path):
    rows = run(tmp_path / "run", *tiny, "--method", "central", "--partition", "dirichlet", "--alpha", "0.001")["metrics"]
    assert rows[0]["num_examples"] == [64]


def test_orchestra_begins_with_a_round_for_the_centroids(tiny, tmp_path):
    """Nothing is trained in it. Its clients send networks, target included, and 16 local centroids; the server sends 128 global ones."""
    first, second = run(tmp_path / "run", *tiny, "--method", "orchestra", "--rounds", "2")["metrics"]
    vector = build(Options(**parse([*tiny, "--method", "orchestra"]).given), load_images(tiny[1])).networks.online.vector
    assert first["loss"] == [0, 0] and first["divergence"] == [0, 0] and min(second["loss"] + second["divergence"]) > 0
    assert [row["upload_bytes"] for row in (first, second)] == 2 * [2 * (vector.nbytes + 16 * 512 * 4)]
    assert first["download_bytes"] == 2 * vector.nbytes and second["download_bytes"] == 2 * (vector.nbytes + 128 * 512 * 4)


def test_fedca_sets_public_images_aside_and_shares_representations(npz, tmp_path, tiny):
    images = load_images(str(npz))
    options = Options(**parse([*tiny, "--method", "fedca"]).given)
    federation = build(options, images)
    training.prepare(federation, options)
    objective, private = federation.networks, torch.cat([client.indices for client in federation.clients])
    assert len(private) == 56 and len(private.unique()) == 56 and objective.public.shape == (8, 3, 16, 16)
    assert not any(torch.equal(public, image) for public in objective.public for image in images.x_train[private])
    first, second = run(tmp_path / "run", *tiny, "--method", "fedca", "--rounds", "2")["metrics"]
    networks, rows = 2 * objective.online.vector.nbytes, 2 * 3 * 16 * 256 * 4  # of 28 images, three batches of 8 and two views
    assert (first["upload_bytes"], first["download_bytes"]) == (networks + rows, networks)
    assert second["download_bytes"] == networks + 2 * rows
