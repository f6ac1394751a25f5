import math
from dataclasses import replace

import pytest
import torch
from conftest import CPU, load, objective, run

import fedu
import ops
from data import load_images, seed_of
from federation import Client, Start, assemble, build, divergence_segments
from fedu import dapu, divergence, load_networks, start_of
from methods.byol import BYOL
from models import Encoder, in_memory_order, load_encoders
from options import METHODS, Options, parse
from report.export import export_encoders
from runtime.bank import Bank
from runtime.cli import InputError
from training import Step, local_batches, local_training

# ------------------------------------------------------------------------------------- DAPU, and what a client starts with


def test_dapu_keeps_the_own_predictor_from_mu_on():
    assert [dapu(d, 0.4) for d in (0.0, 0.4 - 1e-9, 0.4, 0.4 + 1e-9, 3.0)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert dapu(1e9, math.inf) == 0.0 and dapu(0.0, 0.0) == 1.0


@pytest.mark.parametrize(
    "method, columns, start",
    [
        ("fedu", {}, Start(0, 0, 1, 0.3)),
        ("fedu", {"mu": 0.3}, Start(0, 1, 1, 0.3)),
        ("fedbyol", {}, Start(0, 0, 1, 0.3)),
        ("fedbyol", {"predictor": "local"}, Start(0, 1, 1, 0.3)),
        ("fedbyol", {"update": "target"}, Start(1, 0, 0, 0.3)),
        ("fedbyol", {"update": "both"}, Start(0, 0, 0, 0.3)),
        ("fedema", {}, Start(0.6, 0.6, 1, 0.3)),
        ("fedema", {"predictor": "local"}, Start(0.6, 1, 1, 0.3)),
        ("fedema", {"update": "online"}, Start(0, 0.6, 1, 0.3)),
    ],
)
def test_what_a_client_starts_with_by_its_columns(method, columns, start):
    """Its divergence is 0.3, and lambda_k 2."""
    assert start_of(0.3, 2.0, Options(method=method, **columns)) == start


def test_fedemas_share_is_at_most_one_and_nothing_before_a_measurement():
    options = Options(method="fedema")
    assert [start_of(d, 2.0, options).encoder for d in (0.0, 0.15, 0.5, 0.7)] == [0.0, 0.3, 1.0, 1.0]
    assert start_of(0.3, None, options) == Start(0, 0, 1, 0.3)


def test_fedemas_scale_is_that_of_the_first_divergence():
    """lambda_k = tau / d_k, and stays."""
    client = Client(0, torch.arange(4))
    client.set_ema_scale_once(0.0, 0.7)  # a client that did not move has no scale yet
    assert client.ema_scale is None
    client.set_ema_scale_once(0.35, 0.7)
    client.set_ema_scale_once(0.1, 0.7)
    assert client.ema_scale == pytest.approx(2.0)


@pytest.mark.parametrize(
    "method, last_round, takes_all",
    [("fedu", None, True), ("fedu", 4, False), ("fedu", 1, False), ("fedema", None, True), ("fedema", 4, False), ("fedema", 3, True)],
)
def test_who_takes_everything_from_the_server_in_round_5(method, last_round, takes_all):
    assert fedu.takes_all(Client(0, torch.arange(4), last_round=last_round), Options(method=method), 5) == takes_all


def constants(net: BYOL) -> dict[str, tuple[float, float]]:
    """Of each part the value of its parameters and of its statistics, all of which must be one number."""
    values = {}
    for name in ("encoder", "predictor", "target"):
        part, statistics = net.parts[name], torch.ones(len(net.parts[name]), dtype=bool)
        statistics[net.param_slices[name]] = False
        parameters, statistics = part[~statistics], part[statistics]
        assert parameters.eq(parameters[0]).all() and statistics.eq(statistics[0]).all()
        values[name] = (round(parameters[0].item(), 6), round(statistics[0].item(), 6))
    return values


@pytest.mark.parametrize(
    "columns, start, encoder, predictor, target",
    [
        ({}, Start(0, 0, 1), (1, 1), (1, 1), (6, 6)),
        ({}, Start(0, 1, 1), (1, 1), (5, 5), (6, 6)),  # its own statistics come with its own predictor
        ({"update": "target"}, Start(1, 0, 0), (4, 4), (1, 1), (1, 1)),
        ({"update": "both"}, Start(0, 0, 0), (1, 1), (1, 1), (1, 1)),
        ({"method": "fedema"}, Start(0.5, 0.5, 1), (2.5, 1), (3, 1), (6, 6)),  # BatchNorm's statistics are not mixed
        ({"method": "fedema"}, Start(1, 1, 1), (4, 1), (5, 1), (6, 6)),
    ],
)
def test_networks_are_filled_as_the_start_says(columns, start, encoder, predictor, target):
    """The server's model is all ones; the client's own encoder is all fours, its predictor fives, its target sixes."""
    net, options = objective(), Options(**columns)
    own = {"encoder": 4, "predictor": 5, "target": 6}
    kept = {name: torch.full_like(part, own[name]) for name, part in fedu.kept_parts(net, options).items()}
    load_networks(net, torch.ones_like(net.online.vector), kept, start, options)
    assert constants(net) == {"encoder": encoder, "predictor": predictor, "target": target}


@pytest.mark.parametrize(
    "method, columns, kept",
    [
        ("fedu", {}, {"target", "predictor"}),
        ("fedbyol", {}, {"target"}),
        ("fedbyol", {"update": "target"}, {"encoder"}),
        ("fedbyol", {"update": "both", "predictor": "local"}, {"predictor"}),
        ("fedema", {}, {"encoder", "target", "predictor"}),
        ("fedema", {"update": "online", "predictor": "ema", "divergence_from": "global"}, {"encoder", "target", "predictor"}),
    ],
)
def test_what_a_client_keeps(method, columns, kept):
    assert fedu.kept_parts(objective(), Options(method=method, **columns)).keys() == kept


def test_a_first_round_takes_everything_from_the_server():
    net = objective()
    model = net.online.vector.clone()
    net.target.vector.zero_()
    net.online.vector.zero_()
    load_networks(net, model, {}, Start(), Options(mu=0))
    assert torch.equal(net.online.vector, model) and torch.equal(net.target.vector, net.parts["encoder"])
    assert net.target.vector.data_ptr() != net.parts["encoder"].data_ptr()


# ------------------------------------------------------------------------------------------------------- divergence


def test_divergence_by_hand():
    """A toy of two layers: drift norms 3 and 4. Mean over the layers 3.5, squared norm of the whole 25."""
    norms = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert divergence(norms, "layer-mean") == 3.5
    assert divergence(norms, "squared") == 25.0


def test_divergence_of_a_network():
    """Each of the four convolutions moves by norm 2, the projector's last bias by norm 16; the predictor moves too, and does not count."""
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


def test_divergence_is_the_online_encoders_whichever_is_averaged(tiny, tmp_path):
    online, target = (
        run(tmp_path / aggregate, *tiny, "--method", "fedu", "--aggregate", aggregate, "--ema-decay", "1")["metrics"][0]
        for aggregate in ("online", "target")
    )
    assert min(target["divergence"]) > 0 and target["divergence"] == pytest.approx(online["divergence"], rel=1e-5)


def test_fedema_is_scaled_by_the_first_divergence_that_was_measured(tiny, tmp_path):
    """Also for a client that was absent from the round after it, and so took the server's model next, whatever its divergence was."""
    run(tmp_path / "run", *tiny, "--method", "fedema", "--clients", "3", "--clients-per-round", "1", "--rounds", "6", "--seed", "2")
    metrics = load(tmp_path / "run")["metrics"]
    rounds = {k: [row for row in metrics if row["clients"] == [k]] for k in range(3)}
    assert any(b["round"] - a["round"] > 1 for taken in rounds.values() for a, b in zip(taken, taken[1:2]))
    stored = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["values"]["clients"]["ema_scale"]
    assert stored == [pytest.approx(0.7 / rounds[k][0]["divergence"][0]) if rounds[k] else None for k in range(3)]


def test_divergence_from_the_next_average(npz):
    """Own encoder 3, average 1: every weight of a convolution moved by 2."""
    options = Options(method="fedema", divergence_from="global", encoder="small")
    images = load_images(str(npz))
    federation = assemble(options, [[Client(0, torch.arange(8))]], images.x_train, images.y_train)
    (server,), net = federation.servers, federation.networks
    bank = Bank(fedu.kept_parts(net, options))
    server.model.fill_(1)
    client = server.clients[0]
    client.row = bank.write({name: torch.full_like(part, 3) for name, part in bank.like.items()})
    client.last_round, turn = 0, fedu.Turn(client, server, 8)
    assert fedu.start_turn(options, federation, bank, 1, 5, turn) == (1, 0, False, 5)
    expected = sum(2 * math.sqrt(end - begin) for begin, end in federation.segments.tolist()) / 4
    assert turn.start == Start(pytest.approx(0.7), pytest.approx(0.7), 1.0, pytest.approx(expected, rel=1e-5))
    assert client.ema_scale == pytest.approx(0.7 / expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------- uploads and servers


def test_an_upload_is_online_encoder_and_predictor_alone():
    net = objective()
    net.target.vector.fill_(123.0)
    upload, module = fedu.model_upload(net, "online"), net.online.module
    statistics, top = [*module.encoder.buffers()], [*module.predictor.buffers()]
    assert torch.equal(upload, torch.cat([in_memory_order(t.detach()).flatten() for t in (*statistics, *module.parameters(), *top)]))
    assert not (upload == 123).any()


def test_the_target_can_be_what_is_averaged():
    net = objective()
    net.target.vector.fill_(7)
    upload, end = fedu.model_upload(net, "target"), len(net.target.vector)
    assert upload[:end].eq(7).all() and torch.equal(upload[end:], net.parts["predictor"])


def test_order_of_training_does_not_matter(npz):
    """Random numbers are keyed by (seed, round, client), so the clients may train in any order."""
    images = load_images(str(npz)).x_train
    net = objective()
    model, results = net.online.vector.clone(), []
    for order in ((0, 1, 2), (2, 0, 1)):
        uploads = {}
        for k in order:
            load_networks(net, model, {}, Start(), Options())
            step = Step(net, images)
            step.generator.manual_seed(seed_of(0, "training", 0, k))
            local_training(step, local_batches(torch.arange(20 * k, 24 * k + 16), 1, 8, step.generator), 0.05)
            uploads[k] = fedu.model_upload(net, "online")
        results.append(torch.stack([uploads[k] for k in range(3)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [None, 2])
def test_two_servers_of_several_clients_average_their_own(npz, monkeypatch, rows):
    """Clients of unequal size, so that those of one server would lie between those of the other; rows: of the matrix of uploads."""
    images, options = load_images(str(npz)), Options(encoder="tiny", clients=5, batch_size=4, local_epochs=1, lr=0.05, rounds=2)
    sizes = [(0, 5), (5, 25), (25, 35), (35, 43), (43, 64)]
    clients = [Client(k, torch.arange(*span)) for k, span in enumerate(sizes)]
    federation = assemble(options, [[clients[0], clients[1], clients[4]], [clients[2], clients[3]]], images.x_train, images.y_train)
    net, seen = federation.networks, {}
    make_upload, start = fedu.model_upload, federation.servers[0].model.clone()

    def upload(networks, aggregate, out):
        made = make_upload(networks, aggregate, out)
        seen[len(seen)] = made.clone()
        return made

    monkeypatch.setattr(fedu, "model_upload", upload)
    uploads = fedu.uploads_of(federation, options)
    if rows:
        uploads = fedu.Uploads(net.online.vector, 3, federation.segments, memory=rows * net.online.vector.nbytes)
    row = fedu.run_round(options, federation, Bank(fedu.kept_parts(net, options)), uploads, 0)
    order = [4, 1, 0, 2, 3]  # a server's clients side by side, the largest first
    trained = {k: seen[place].double() for place, k in enumerate(order)}
    for server, members in zip(federation.servers, ([0, 1, 4], [2, 3])):
        total = sum(len(clients[k].indices) for k in members)
        mean = sum(len(clients[k].indices) / total * trained[k] for k in members)
        torch.testing.assert_close(server.model.double(), mean, rtol=1e-5, atol=1e-6)
    assert row["clients"] == [0, 1, 2, 3, 4] and row["num_examples"] == [5, 20, 10, 8, 21]
    segments = federation.segments.tolist()
    for k in range(5):
        moved = [(trained[k] - start)[begin:end].norm().item() for begin, end in segments]
        assert row["divergence"][k] == pytest.approx(sum(moved) / len(moved), rel=1e-4)


@pytest.mark.parametrize(
    "value, kind, named",
    [
        (float("inf"), "nonfinite", "is not finite and was left out"),
        (1e30, "outliers", "times as far as the round's median, above --max-drift 10, and was left out"),
    ],
)
def test_what_a_poisoned_client_uploads_reaches_nobody(npz, tiny, capsys, monkeypatch, value, kind, named):
    """Client 1 of 3 gets an infinite or a huge weight in round 1. It is as if it had dropped out, up to rounding: the mean is rescaled."""
    images = load_images(str(npz))
    options = Options(**parse([*tiny, "--clients", "3", "--method", "fedema"]).given)
    training = fedu.train_client

    def rounds(poisoned: bool, options: Options = options):
        federation = build(options, images)
        (server,), net = federation.servers, federation.networks
        bank, uploads = Bank(fedu.kept_parts(net, options)), fedu.uploads_of(federation, options)
        first = fedu.run_round(options, federation, bank, uploads, 0)
        poisoned_client = server.clients[1]
        kept = bank.read(poisoned_client.row)

        def poison(*arguments):
            result = training(*arguments)
            if arguments[4] == 1:  # the client's id
                net.online.vector[-1] = value
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
    assert {name: row[name] for name in ("nonfinite", "outliers")} == {"nonfinite": [], "outliers": []} | {kind: [1]}
    assert row["clients"] == [0, 2]
    said = capsys.readouterr().err
    assert said.startswith("round 1: the upload of client 1 ") and said.endswith(f"{named}\n"), said
    expected, alone = rounds(poisoned=False)
    assert expected["loss"] == row["loss"] and expected["divergence"] == row["divergence"]
    torch.testing.assert_close(server.model, alone.model, rtol=1e-5, atol=1e-7)
    if kind == "nonfinite":
        with pytest.raises(InputError, match="round 1: the upload of client 1 is not finite"):
            rounds(poisoned=True, options=replace(options, on_nonfinite="error"))


@pytest.mark.parametrize("method", ["fedu", "fedema"])
def test_what_stays_with_a_client_does_not_count_as_moved(npz, tiny, monkeypatch, method):
    """In round 1, when each client's BatchNorm is no longer the server's."""
    options = Options(**parse([*tiny, "--method", method, "--clients", "3", "--statistics", "local"]).given)
    federation = build(options, load_images(str(npz)))
    (server,), private = federation.servers, federation.networks.private
    uploads, moved = fedu.uploads_of(federation, options), []

    def exclude(self: fedu.Uploads, distances: list[float]) -> None:
        change = self.matrix - (self.common if self.received is None else self.received)
        moved.append((distances, change.double().norm(dim=1).tolist(), change[:, private].abs().sum().item()))

    monkeypatch.setattr(fedu.Uploads, "exclude", exclude)
    bank = Bank(fedu.kept_parts(federation.networks, options))
    for round_ in range(2):
        fedu.run_round(options, federation, bank, uploads, round_)
    assert not bank.read(server.clients[2].row)["private"].equal(server.model[private])
    assert len(moved) == 2
    for distances, expected, in_private in moved:
        assert distances == pytest.approx(expected, rel=1e-4) and in_private == 0


# ---------------------------------------------------------------------------------------------------- whole runs


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


def test_without_a_predictor_none_is_taken(tiny, tmp_path, capsys):
    rows = run(tmp_path / "run", *tiny, "--no-predictor")["metrics"]
    assert [row["predictor"] for row in rows] == [["-", "-"]] * 3
    assert "mu" not in capsys.readouterr().out


def test_fedema_takes_the_papers_divergence_which_has_no_mu_there(tiny, tmp_path):
    shares = [row["own_share"] for row in run(tmp_path / "run", *tiny, "--method", "fedema", "--divergence", "squared")["metrics"]]
    assert shares[0] == [0, 0] and all(0 < share <= 1 for share in shares[2])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_can_be_evaluated(tiny, tmp_path, capsys, method):
    result = run(tmp_path / "run", *tiny, "--method", method)
    assert ("--plot" in capsys.readouterr().out) == METHODS[method].trains
    assert all(t.isfinite().all() for t in result["encoders"])
    (encoder, *_) = load_encoders(tmp_path / "run")
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, encoder.width)
    if METHODS[method].trains:
        assert [row["round"] for row in result["metrics"]] == [0, 1, 2] and result["metrics"][-1]["knn"] > 0.2


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


def test_a_run_begins_with_the_encoder_of_another(tiny, tmp_path):
    """Its backbone and, as the heads are alike, its projector; of an exported file the backbone."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    first = run(tmp_path / "first", *tiny, "--rounds", "1", "--seed", "3")["encoders"][0]
    export_encoders(tmp_path / "first", tmp_path / "b.safetensors")
    for name in ("first", "first/encoder.pt"):
        begun = run(tmp_path / "begun", *tiny, "--method", "untrained", "--init", str(tmp_path / name), "--overwrite")["encoders"][0]
        assert torch.equal(begun, first)
    run(tmp_path / "exported", *tiny, "--method", "untrained", "--init", str(tmp_path / "b.safetensors"))
    one, other = (load_encoders(tmp_path / name)[0] for name in ("exported", "first"))
    assert torch.equal(one.backbone[0].weight, other.backbone[0].weight) and torch.equal(
        one.backbone[1].running_var, other.backbone[1].running_var
    )
    assert not torch.equal(one.projector[0].weight, other.projector[0].weight)
    trained = run(tmp_path / "trained", *tiny, "--rounds", "2", "--init", str(tmp_path / "first"))
    (tmp_path / "trained/encoder.pt").unlink()
    fedu.resume(tmp_path / "trained")
    assert torch.equal(load(tmp_path / "trained")["encoders"][0], trained["encoders"][0])
    other = run(tmp_path / "moco", *tiny, "--method", "fedmoco-v2", "--rounds", "1", "--init", str(tmp_path / "first"))
    assert other["metrics"][0]["loss"]  # whose projector has another form


@pytest.mark.parametrize(
    "init, words",
    [
        ("absent", "absent is not a run folder: it has no encoder.pt"),
        ("x.safetensors", "x.safetensors is not a readable"),
        ("x.pth", "x.pth cannot be read: No such file"),
    ],
)
def test_an_encoder_to_begin_with_that_is_none(tiny, tmp_path, init, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", *tiny, "--init", str(tmp_path / init))
    run(tmp_path / "other", *tiny, "--method", "single", "--encoder", "tiny", "--rounds", "1")
    with pytest.raises(InputError, match="holds 2 encoders, needs one"):
        run(tmp_path / "run", *tiny, "--init", str(tmp_path / "other"))
    run(tmp_path / "tiny", *tiny, "--method", "untrained", "--encoder", "tiny")
    with pytest.raises(InputError, match="--init .*tiny holds the encoder tiny, and --encoder is small"):
        run(tmp_path / "run", *tiny, "--init", str(tmp_path / "tiny"))
    run(tmp_path / "group", *tiny, "--method", "untrained", "--norm", "group")
    with pytest.raises(InputError, match="--init .*group holds an encoder of --norm group, and --norm is batch"):
        run(tmp_path / "run", *tiny, "--init", str(tmp_path / "group"))
    begun = run(tmp_path / "begun", *tiny, "--method", "untrained", "--norm", "group", "--seed", "1", "--init", str(tmp_path / "group"))
    assert torch.equal(begun["encoders"][0], load(tmp_path / "group")["encoders"][0])
    assert not (tmp_path / "run").exists()
