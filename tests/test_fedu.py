import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import CPU, load, objective, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fedu
import models
import ops
from data import draw_views, load_npz, seed_of
from eval import load_encoders
from federation import Client, Federation, Server, Turn, build, divergence_segments
from fedu import Step, Uploads, cosine, divergence, local_batches, local_training, model_update
from models import BYOL, Encoder, in_memory_order
from options import METHODS, Options, parse
from runtime.bank import Bank
from runtime.cli import InputError

NOTHING = torch.empty(0, 2, dtype=torch.int64)  # segments, for those who measure none


# ---------------------------------------------------------------------------------------------------- aggregation


class Vectors:
    """Stands for an objective whose networks are a vector of any length."""

    def __init__(self, vector: torch.Tensor):
        self.online = type("Online", (), {"vector": vector})


def aggregate_all(
    uploads: list[torch.Tensor], num_examples: list[int], model: torch.Tensor, segments: torch.Tensor, rows: int | None = None
) -> tuple[torch.Tensor, list[float], int]:
    """The server's mean of the uploads, the divergence of each client, and the number of rows that the matrix of uploads had."""
    options = Options(divergence="squared", mu=1)
    memory = fedu.UPLOAD_MEMORY if rows is None else rows * model.nbytes
    clients = [Client(k, torch.arange(n)) for k, n in enumerate(num_examples)]
    server = Server(model.clone(), torch.empty(0, 0), clients)
    federation = Federation([server], Vectors(model.clone()), torch.empty(0), segments, torch.empty(0))
    matrix = Uploads(federation, options, memory)
    for client, upload in zip(clients, uploads, strict=True):
        matrix.next_row(server).copy_(upload)
        matrix.add(Turn(client, server, sum(num_examples), representations=torch.empty(0, 0)))
    matrix.finish(server)
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
            step = Step(net, images)
            step.generator.manual_seed(seed_of(0, "training", 0, k))
            local_training(step, local_batches(client.indices, 1, 8, step.generator), 0.05)
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
    """Also for a client that was absent from the round after it, and so took the server's model next, whatever its divergence was."""
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


# -------------------------------------------------------------------------------------------------- local training


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


def test_local_training_never_waits_for_the_device(monkeypatch):
    """On the meta device, every synchronisation and every mixing with another device's tensors raises. Nothing is copied there either."""
    meta = torch.device("meta")
    net = objective(meta)
    images = torch.empty(40, 3, 16, 16, dtype=torch.uint8, device=meta)
    batches = local_batches(torch.arange(40, device=meta), 2, 8, None)
    for constructor in ("tensor", "as_tensor", "from_numpy"):  # each would copy from the host, unseen by the recorder
        monkeypatch.setattr(torch, constructor, None)
    with Recorder(meta) as recorder:
        loss = local_training(Step(net, images), batches, 0.05)
    assert len(recorder.calls) > 1000
    assert loss.device == meta and loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_every_step_is_the_same_sequence_of_operations(npz):
    """A CUDA graph needs this for all images, draws and states. The first record also has what comes before the steps."""
    images = load_npz(npz).x_train
    net, steps = objective(), []
    with Recorder(CPU) as recorder:

        def batches():
            for batch in local_batches(torch.arange(32), 1, 8, torch.Generator().manual_seed(0)):
                yield batch
                steps.append(recorder.calls[:])
                recorder.calls.clear()

        local_training(Step(net, images), batches(), 0.05)
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


@pytest.mark.parametrize("kind", ["byol", "simclr"])
def test_compiled_networks_train_as_they_are(npz, monkeypatch, kind):
    """Three steps of a network so small that it is compiled in seconds: same loss, vectors and statistics but for rounding."""
    monkeypatch.setitem(models.WIDTHS, "tiny", (8,))
    monkeypatch.setitem(models.HEADS, "tiny", (16, 8))
    images, results = load_npz(npz), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = models.OBJECTIVES[kind]("tiny", CPU, images.y_train)
        if compiled:
            net.compile()
        step = Step(net, images.x_train)
        step.generator.manual_seed(0)
        results.append((local_training(step, torch.arange(24).split(8), 0.01), *net.networks()))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_local_training_is_torchs_sgd_over_the_modules_own_tensors(monkeypatch):
    """Momentum and weight decay on everything, here by the flat gradient; a decay large enough to be seen in four steps."""
    monkeypatch.setattr(fedu, "WEIGHT_DECAY", 0.1)
    torch.manual_seed(0)
    net, images = objective(), torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    module = copy.deepcopy(net.online.module)
    for p in module.parameters():
        p.grad = None
    batches, optimizer = torch.arange(32).split(8), torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    step = Step(net, images, views=lambda x, _: (x / 255, x.flip(3) / 255))
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
    images = load_npz(npz).x_train
    for ema_decay in (0.0, 0.99):
        batches = local_batches(torch.arange(16), 1, 8, torch.Generator().manual_seed(0))
        local_training(Step(net, images), batches, 0.05, ema_decay)
        weights = net.target.weights
        assert torch.equal(net.target.vector[weights], net.parts["encoder"][weights]) == (ema_decay == 0)


def test_learning_rate_is_a_cosine_over_rounds():
    rates = [cosine(0.032, r, 100) for r in (0, 50, 99)]
    assert rates == pytest.approx([0.032, 0.016, 0.032 * (1 + math.cos(0.99 * math.pi)) / 2])


# ---------------------------------------------------------------------------------------------------- whole runs


def test_bf16_trains(tiny, tmp_path):
    losses = [run(tmp_path / p, *tiny, "--precision", p)["metrics"][-1]["loss"] for p in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_narrow_resnet_trains(tiny, tmp_path):
    result = run(tmp_path / "run", *tiny, "--encoder", "resnet18-narrow", "--rounds", "2")
    assert result["metrics"][1]["loss"] < result["metrics"][0]["loss"]


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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_can_be_evaluated(tiny, tmp_path, capsys, method):
    result = run(tmp_path / "run", *tiny, "--method", method)
    assert ("--plot" in capsys.readouterr().out) == METHODS[method].trains
    assert all(t.isfinite().all() for t in result["encoders"])
    (encoder, *_) = load_encoders(tmp_path / "run")
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, encoder.head[-1])
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


# ------------------------------------------------------------------------------------------------- faults of clients


def test_what_a_poisoned_client_uploads_reaches_nobody(npz, tiny, capsys, monkeypatch):
    """Client 1 of 3 gets an infinite weight in round 1. It is as if it had dropped out, up to rounding, since the mean is rescaled."""
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
