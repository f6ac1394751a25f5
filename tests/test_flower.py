"""FedU between processes, by Flower: the same bits as the simulation, and what happens when a party fails."""

import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

pytest.importorskip("flwr", reason="flwr is not installed: pip install -r flower/requirements-flower.txt")
import client_app
import parties
import server_app
import strategy
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp
from messages import SENT_OPTIONS

import fedu
from data import load_images, load_unlabelled, partition
from eval import main as evaluate
from federation import build_networks
from models import load_encoders
from options import Options, parse, parse_evaluation
from report.figures import plot
from runtime.cli import InputError, command_line
from runtime.privacy import epsilon
from runtime.run import read_config, read_metrics, write_config

RECIPE = "--encoder small --clients 3 --rounds 3 --local-epochs 1 --batch-size 8 --lr 0.05 --knn-every 3 --device cpu"
FEDU = f"{RECIPE} --mu 0.45"  # of which both decisions come
DEALT = {"partition": "dirichlet", "alpha": 5.0}  # to clients of different size, which is their order in the mean


@pytest.fixture(scope="module")
def parts(npz, tmp_path_factory) -> list[Path]:
    """What three clients hold of the tiny data set: no labels, and no test images."""
    folder, images = tmp_path_factory.mktemp("parts"), load_images(str(npz))
    dealt = partition(images.y_train.numpy(), 3, DEALT["partition"], 0, alpha=DEALT["alpha"], at_least=8)
    paths = [folder / f"{k}.npz" for k in range(3)]
    for path, part in zip(paths, dealt):
        np.savez(path, x_train=images.x_train[part].permute(0, 2, 3, 1).numpy())
    return paths


def simulate(npz: Path, out: Path, text: str = FEDU, absent: tuple[int, int] | None = None) -> Path:
    """The run of fedu.py on the same parts. absent: a round, and the client that does not take part in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.partition", lambda labels, clients, kind, seed, *more, **kw: partition(labels, clients, kind, 0, *more, **kw))
        patch.setattr("federation.drops_out", lambda client, probability, seed, round_: (round_, client) == absent)
        return fedu.train(Options(**parse(shlex.split(text)).given, dataset=str(npz), **DEALT), out).folder


def encoders_of(run: Path) -> list[dict]:
    """What encoder.pt holds, and if parties keep their BatchNorm, what theirs do."""
    paths = [run / "encoder.pt"] if (run / "encoder.pt").exists() else []
    paths = paths or sorted((run.parent / "state" / read_config(run)["run"]).glob("*/encoder.pt"))
    return [encoder for path in paths for encoder in torch.load(path, weights_only=True)["encoders"]]


def assert_same_encoders(run: Path, simulated: Path) -> None:
    for mine, theirs in zip(encoders_of(run), encoders_of(simulated), strict=True):
        for part, state in theirs.items():
            assert all(torch.equal(tensor, mine[part][name]) for name, tensor in state.items()), part


def assert_same(run: Path, simulated: Path, lost: bool = False) -> None:
    """The same global encoder, or each party's, and the same rounds, to the bit.

    lost: an upload was, whose download is counted where that of one who does not take part is not.
    """
    assert_same_encoders(run, simulated)
    measured = {"seconds": 0} | ({"download_bytes": 0} if lost else {}) | ({} if (run / "encoder.pt").exists() else {"knn": None})
    for row, other in zip(read_metrics(run), read_metrics(simulated), strict=True):
        assert row | measured == other | measured


# ------------------------------------------------------------------------------- both sides in this process, without a network


BUSY = object()  # a node's that has not finished the message


class LocalGrid:
    """Flower's grid without a network: clients answer at once, and every message that passes is kept."""

    def __init__(self, folder: Path, *configs: dict):
        usual = {"state": str(folder / "state"), "device": "cpu"}
        self.contexts = {100 + k: Context(1, 100 + k, usual | config, RecordDict(), {}) for k, config in enumerate(configs)}
        self.messages: list[Message] = []
        self.fault = lambda message, answer: answer()  # what becomes of a training message: a reply, None if it is lost, or BUSY
        self.queues: dict[int, list[Message]] = {node: [] for node in self.contexts}
        self.replies: dict[str, Message] = {}
        self.keys: dict[int, bytes] = {}
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.contexts]

    def push_messages(self, messages) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's grids do it
            self.queues[message.metadata.dst_node_id].append(message)
            self.messages.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, keys) -> list[Message]:
        """Each node handles one message after the other, and not a second time one that is lost."""
        for queue in self.queues.values():
            while queue and (reply := self.deliver(queue[0])) is not BUSY:
                queue.pop(0)
                if reply:
                    self.replies[reply.metadata.reply_to_message_id] = reply
                    self.messages.append(reply)
        return [self.replies.pop(key) for key in list(keys) if key in self.replies]

    def deliver(self, message: Message) -> Message | None:
        answer = partial(client_app.app, message, self.contexts[message.metadata.dst_node_id])
        return self.fault(message, answer) if message.metadata.message_type == MessageType.TRAIN else answer()

    def serve(self, text: str, min_clients: int = 0, timeout: float = 60, max_share: float = 0.5) -> None:
        config = {"options": text, "min-clients": min_clients, "timeout": timeout, "max-share": max_share}
        with command_line():  # as the server's app does, which Flower's decorator hides
            inspect.unwrap(server_app.main)(self, Context(1, 0, {}, RecordDict(), config))


@pytest.fixture
def grid(parts, tmp_path, monkeypatch) -> LocalGrid:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategy, "SILENCE", 0)
    monkeypatch.setattr(strategy, "POLL", 0)
    return LocalGrid(tmp_path, *({"client": k, "data": str(path)} for k, path in enumerate(parts)))


@pytest.mark.parametrize(
    "text",
    [
        FEDU,
        f"{RECIPE} --method fedbyol",
        f"{RECIPE} --method fedema",
        f"{RECIPE} --predictor local --clients-per-round 2",
        f"{FEDU} --clients-per-round 2",
        f"{FEDU} --server-rule median",
        f"{FEDU} --set decorrelation=30",
        f"{FEDU} --seed 3",
        f"{FEDU} --statistics local --clients-per-round 2",
        f"{RECIPE} --statistics local --method fedema",
        f"{RECIPE} --statistics local --predictor local",
    ],
)
def test_the_bits_are_those_of_the_simulation(npz, grid, tmp_path, text):
    grid.serve(f"{text} --dataset {npz} --out run")
    assert_same(tmp_path / "run", simulate(npz, tmp_path / "simulated", text))


def pieces_of(tensors, every: int = 4096) -> set[bytes]:
    """64 bytes out of `every`; those of few values, as zeros, would be found by chance."""
    data = [np.ascontiguousarray(tensor).tobytes() for tensor in tensors]
    return {piece for d in data for i in range(0, len(d) - 64, every) if len(set(piece := d[i : i + 64])) > 20}


def contains(data: bytes, pieces: set[bytes]) -> bool:
    """Whether one of the pieces lies anywhere in the data."""
    heads = np.array([int.from_bytes(piece[:8], sys.byteorder) for piece in pieces], np.uint64)
    for begin in range(8):
        words = np.frombuffer(data[begin : begin + (len(data) - begin) // 8 * 8], np.uint64)
        if any(data[at : at + 64] in pieces for at in begin + 8 * np.flatnonzero(np.isin(words, heads))):
            return True
    return False


def wire(message: Message) -> bytes:
    """All that Flower sends of a message."""
    return b"".join(part.deflate() for part in get_all_nested_objects(message).values())


@pytest.mark.parametrize("predictor, statistics", [("dapu", "shared"), ("local", "local")])
def test_nothing_private_leaves_a_client(npz, parts, grid, tmp_path, capfd, monkeypatch, predictor, statistics):
    """Looked for in the bytes of every reply of each kind: images, what clients keep on their disks, and the names of their files."""
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "miller.png").write_bytes(b"no image")
    wrong = {(1, 100): {"state": str(npz)}, (2, 100): {"data": "a folder (of miller's).npz"}, (2, 102): {"data": str(tmp_path / "scans")}}
    looks = []

    def fail(message: Message, answer) -> Message:
        looks.append((message.content["config"]["round"], message.metadata.dst_node_id))
        if looks[-1] == (1, 101) and looks.count((1, 101)) < 4:  # it takes long, and is asked whether it is alive
            return BUSY
        if looks[-1] == (1, 102):  # an error that nobody expected
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(client_app, "load_unlabelled", lambda path, *how: (tmp_path / "miller" / path.name).read_bytes())
                return answer()
        config = grid.contexts[message.metadata.dst_node_id].node_config | wrong.get(looks[-1], {})
        return client_app.app(message, Context(1, message.metadata.dst_node_id, config, RecordDict(), {}))

    grid.fault = fail
    grid.serve(f"{RECIPE} --predictor {predictor} --statistics {statistics} --dataset {npz} --out run")
    options = Options(**read_config(tmp_path / "run")["options"])
    objective = build_networks(options, torch.empty(0), torch.device("cpu"))
    sizes = [len(objective.parts["target"]), len(objective.parts["predictor"]), len(objective.private)]
    rows = [np.fromfile(path, np.float32).reshape(-1, sum(sizes)) for path in (tmp_path / "state").glob("*/*/bank.bin")]
    assert len(rows) == 3
    images = [image for path in parts for image in np.load(path)["x_train"]]
    private = {
        "images": images + [image.transpose(2, 0, 1) for image in images],  # as in the file, and as they are trained on
        "targets": [row[: sizes[0]] for kept in rows for row in kept],
        "predictors": [row[sizes[0] : sum(sizes[:2])] for kept in rows for row in kept],
        "batchnorm": [row[sum(sizes[:2]) :] for kept in rows for row in kept],  # whose layers are all multiples of 16 numbers wide
    }
    pieces = {name: pieces_of(tensors, 64 if name == "batchnorm" else 4096) for name, tensors in private.items()}
    assert min(len(found) for name, found in pieces.items() if name != "batchnorm" or statistics == "local") > 60

    replies = [message for message in grid.messages if message.metadata.dst_node_id == 1]
    kinds = [(reply.metadata.message_type, reply.has_error()) for reply in replies]
    expected = {("query", False): 3, (strategy.ALIVE, False): 1, ("train", False): 5, ("train", True): 4}
    expected |= {("query.final", False): 3} if statistics == "local" else {}
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    for reply in (reply for reply in replies if reply.has_content()):
        told = reply.content.pop("turn", {})
        assert set(told) <= {"loss", "divergence", "predictor", "own-share", "decided-on"}
        if model := reply.content.pop("model", {}):
            assert list(model) == ["model"] and model["model"].numpy().shape == (int(objective.sent.sum()),)
            reply.content["model"] = model
        else:
            assert {name: set(record) for name, record in reply.content.items()} in ({}, {"client": {"id", "num-examples"}})
    sent = b"".join(map(wire, replies))
    assert not contains(sent, pieces["images"]) and not contains(sent, pieces["targets"])
    assert contains(sent, pieces["predictors"]) == (predictor == "dapu")  # which is shared by DAPU
    assert not contains(b"".join(map(wire, grid.messages)), pieces["batchnorm"])
    if statistics == "local":  # which would be found where it lies in a whole network
        objective.online.vector[objective.private] = torch.from_numpy(private["batchnorm"][-1])
        private["batchnorm"].append(objective.online.vector.numpy())
    for name, tensors in private.items() if statistics == "local" else [*private.items()][:3]:  # the search does find what is there
        assert contains(sent + b"odd" + np.ascontiguousarray(tensors[-1]).tobytes(), pieces[name])

    said, names = capfd.readouterr().err, [str(tmp_path), str(npz.parent), str(parts[0].parent), "miller"]
    assert all(name in said for name in names[:2] + names[3:]), said  # by the clients, of which the server reads:
    assert not any(name.encode() in sent for name in names)
    for sentence in ("its own log says why", "data set DATA does not exist", "DATA holds an image that cannot be read"):
        assert f"was left out: {sentence}\n" in said and sentence.encode() in sent


@pytest.mark.parametrize("text, trained", [(FEDU, False), (FEDU, True), (f"{FEDU} --statistics local", True)])
def test_a_node_that_has_lost_its_message_is_not_waited_for(npz, grid, tmp_path, capfd, text, trained):
    """It was killed and restarted, which Flower may not report. Trained: it kept what came of it, and the server never saw it."""

    def lose(message: Message, answer) -> Message | None:
        lost = (message.content["config"]["round"], message.metadata.dst_node_id) == (1, 101)
        reply = answer() if trained or not lost else None
        return None if lost else reply

    grid.fault = lose
    grid.serve(f"{text} --dataset {npz} --out run")
    assert "round 1: client 1 was left out: its node was lost, or did not answer in time" in capfd.readouterr().err
    assert_same(tmp_path / "run", simulate(npz, tmp_path / "simulated", text, absent=(1, 1)), lost=True)


def test_a_node_that_takes_long_is_waited_for(npz, grid, tmp_path, capfd, monkeypatch):
    """It is asked whether it has lost its message, and answers this after the message. The server says whom it awaits."""
    monkeypatch.setattr(strategy, "NEWS", 0)
    looks = []

    def work(message: Message, answer) -> Message:
        looks.append((message.content["config"]["round"], message.metadata.dst_node_id))
        return BUSY if looks[-1] == (1, 101) and looks.count((1, 101)) < 4 else answer()

    grid.fault = work
    grid.serve(f"{FEDU} --dataset {npz} --out run")
    assert [m.metadata.dst_node_id for m in grid.messages if m.metadata.message_type == strategy.ALIVE] == [101, 1]
    said = capfd.readouterr().out
    assert len(re.findall(r"  2 of 3 answers after [0-9.]+ s; awaited: 1\n", said)) == said.count("awaited: ") == 3
    assert_same(tmp_path / "run", simulate(npz, tmp_path / "simulated"))


def test_a_node_that_answers_nothing_is_waited_for_until_the_timeout(npz, grid, tmp_path):
    grid.fault = lambda message, answer: BUSY if message.metadata.dst_node_id == 101 else answer()
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run", timeout=1)
    assert read_metrics(tmp_path / "run")[0]["clients"] == [0, 2]


@pytest.mark.parametrize("text", [FEDU, f"{FEDU} --statistics local"])
def test_a_run_that_was_interrupted_goes_on(npz, grid, tmp_path, text):
    """In its second round, after some clients had trained and kept what came of it."""

    def interrupt(message: Message, answer) -> Message:
        if (message.content["config"]["round"], message.metadata.dst_node_id) == (1, 102):
            raise KeyboardInterrupt
        return answer()

    grid.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        grid.serve(f"{text} --dataset {npz} --out run")
    grid.fault = lambda message, answer: answer()
    grid.serve("--resume run")
    assert_same(tmp_path / "run", simulate(npz, tmp_path / "simulated", text))


def test_who_lacks_an_encoder_is_named_and_a_resumed_run_sends_it_again(npz, grid, tmp_path, capfd):
    """Client 0 loses the last message, client 1 answers it by more than it should, and client 2 has lost its BatchNorm."""
    deliver = grid.deliver

    def harm(message: Message) -> Message | None:
        if not message.metadata.message_type.endswith(".final") or message.metadata.dst_node_id == 100:
            return None if message.metadata.message_type.endswith(".final") else deliver(message)
        if message.metadata.dst_node_id == 102:
            shutil.rmtree(*(tmp_path / "state").glob("*/client-2"))
        reply = deliver(message)
        if message.metadata.dst_node_id == 101:
            reply.content["turn"] = ConfigRecord()
        return reply

    grid.deliver = harm
    grid.serve(f"{FEDU} --rounds 1 --statistics local --dataset {npz} --out run")
    told, said = capfd.readouterr()
    assert (
        told.count("The kNN column stays empty: each party keeps its BatchNorm") == 1 and "run holds the run, without an encoder: " in told
    )
    lacks = "lacks its encoder, which a resumed run sends again: "
    assert f"client 0 {lacks}its node was lost, or did not answer in time\n" in said
    assert f"client 1 {lacks}it has the record 'turn', perhaps by code of another version\n" in said
    assert f"client 2 {lacks}it has no encoder, since what it kept after round 0 is lost, its BatchNorm with it\n" in said
    with pytest.raises(InputError, match="run has no encoder.pt: .* its parties have the encoders"):
        load_encoders(tmp_path / "run")

    grid.deliver = deliver
    grid.serve("--resume run")
    said = capfd.readouterr().err
    assert f"client 0 {lacks}" not in said and f"client 1 {lacks}" not in said and f"client 2 {lacks}" in said
    simulated = fedu.load(simulate(npz, tmp_path / "simulated", f"{FEDU} --rounds 1 --statistics local"))
    images = load_images(str(npz)).x_test
    (folder,) = (tmp_path / "state").glob("*/client-0")
    assert fedu.load(folder).features(images).equal(simulated.features(images)[0])
    done = parse_evaluation(["--knn", "--transfer", str(npz), "--device", "cpu", str(folder)])
    evaluate(done)
    assert "knn on" in capfd.readouterr().out and (folder / "eval.jsonl").exists()
    fedu.train(Options(dataset=str(npz), clients=2, encoder="small", rounds=1, batch_size=8, init=str(folder)), tmp_path / "continued")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_upload_that_is_not_finite_is_refused_by_name(npz, grid, tmp_path, capfd, value):
    def spoil(message: Message, answer) -> Message:
        reply = answer()
        if (message.content["config"]["round"], message.metadata.dst_node_id) == (1, 101):
            upload = reply.content["model"]["model"].numpy().copy()
            upload[7] = value
            reply.content["model"] = ArrayRecord({"model": Array(upload)})
        return reply

    grid.fault = spoil
    grid.serve(f"{FEDU} --dataset {npz} --out run")
    assert "round 1: client 1 was left out: its upload is not finite" in capfd.readouterr().err
    assert read_metrics(tmp_path / "run")[1]["nonfinite"] == [1]
    simulated = simulate(npz, tmp_path / "simulated", absent=(1, 1))
    mine, theirs = (torch.load(path / "encoder.pt", weights_only=True)["encoders"][0]["backbone"] for path in (tmp_path / "run", simulated))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(InputError, match="round 1 cannot be made: client 1: its upload is not finite"):
        grid.serve(f"{FEDU} --dataset {npz} --on-nonfinite error --out stopped")


def test_a_party_whose_own_batchnorm_is_not_finite_is_left_out(npz, grid, tmp_path, monkeypatch):
    """Though what it would send is finite. It keeps what it had, as in the simulation."""
    training = client_app.train_client

    def spoil(options: Options, federation, progress, round_: int, client: int, *more) -> tuple:
        result, networks = training(options, federation, progress, round_, client, *more), federation.networks
        networks.online.vector[networks.private[: (round_, client) == (1, 1)]] = torch.inf
        return result

    monkeypatch.setattr(client_app, "train_client", spoil)
    grid.serve(f"{FEDU} --statistics local --dataset {npz} --out run")
    rows = read_metrics(tmp_path / "run")
    assert [row["nonfinite"] for row in rows] == [[], [1], []] and rows[2]["decided_on"][1] == rows[0]["divergence"][1]


@pytest.mark.parametrize(
    "shares, most, expected",
    [
        ([0.2, 0.3, 0.5], 0.5, [0.2, 0.3, 0.5]),
        ([0.1, 0.1, 0.8], 0.5, [0.25, 0.25, 0.5]),
        ([0.02, 0.28, 0.7], 0.4, [0.2, 0.4, 0.4]),  # what the third leaves lifts the second above the bound
        ([1e-9, 1e-9, 1 - 2e-9], 0.5, [0.25, 0.25, 0.5]),
        ([0.2, 0.3, 0.5], 0.1, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_nobody_has_more_than_its_share(shares, most, expected):
    assert strategy.capped(shares, most) == pytest.approx(expected)


def test_a_claim_of_many_images_weighs_half_and_one_that_changes_is_named(npz, grid, tmp_path, capfd):
    """Client 1 says that it has 10^9 images, and when the run is resumed, 10^8."""
    honest = client_app.open_client
    claims = iter([10**9, 10**8])

    def claim(context: Context, request) -> tuple:
        client, images = honest(context, request)
        if client.id == 1 and inspect.stack()[1].function == "introduce":
            client.indices = torch.empty(next(claims), device="meta")
        return client, images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "open_client", claim)
        grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run")
        assert "round 0: client 1 says that it has 100.0% of the images, and weighs 50.0% (max-share)" in capfd.readouterr().err
        grid.serve("--resume run")
    assert "client 1 now says that it has 100000000 images, and said 1000000000 before" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ privacy at a party


def sent_and_uploaded(grid: LocalGrid) -> list[tuple[Message, Message]]:
    """Each training message, and the reply to it."""
    replies = {message.metadata.reply_to_message_id: message for message in grid.messages}
    orders = [m for m in grid.messages if m.metadata.message_type == MessageType.TRAIN and m.metadata.dst_node_id != 1]
    return [(order, replies[order.metadata.message_id]) for order in orders]


@pytest.mark.parametrize("text", [FEDU, f"{RECIPE} --method fedema --predictor local", f"{FEDU} --statistics local"])
def test_private_parties_give_the_bits_of_the_simulation_with_the_same_noise(npz, grid, tmp_path, monkeypatch, capfd, text):
    """And they tell nothing besides."""

    def draw(message: Message, answer) -> Message | None:
        round_, node = message.content["config"]["round"], message.metadata.dst_node_id
        monkeypatch.setattr(client_app, "system_normal", fedu.repeatable_normal(0, round_, node - 100))
        return answer()

    for context in grid.contexts.values():
        context.node_config.update({"dp-clip": 1, "dp-noise": 0.01, "dp-delta": "1e-6"})
    grid.fault = draw
    grid.serve(f"{text} --dataset {npz} --out run")
    simulated = simulate(npz, tmp_path / "simulated", f"{text} --dp-clip 1 --dp-noise 0.01")
    assert_same_encoders(tmp_path / "run", simulated)
    for row, other in zip(read_metrics(tmp_path / "run"), read_metrics(simulated), strict=True):
        silent = dict.fromkeys(("loss", "divergence", "decided_on", "predictor", "own_share"), [None] * 3)
        silent |= {"knn": None} if "statistics" in text else {}
        assert row | {"seconds": 0} == other | {"seconds": 0} | silent
    assert all(list(reply.content) == ["model", "turn"] and not reply.content["turn"] for _, reply in sent_and_uploaded(grid))
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("client 2, round 2: ")]
    spent = f"{epsilon({0.01: 3}, 1e-6):.4g}"
    assert said == [f"client 2, round 2: epsilon after upload 3 of this run is {spent}, after upload 3 of all runs {spent}, at delta 1e-06"]
    if text == FEDU:
        plot([tmp_path / "run"], tmp_path / "run.png")  # without a loss to draw


@pytest.mark.parametrize("text", ["--lr 1e9", "--method fedema --tau 1"])
def test_nothing_leaves_a_party_unclipped_whatever_the_server_asks_for(npz, grid, text):
    """Where training gives a NaN, as at the highest rate, what leaves is what came."""
    for context in grid.contexts.values():
        context.node_config["dp-clip"] = 0.125
    grid.serve(f"{RECIPE} {text} --rounds 2 --dataset {npz} --out run")
    lengths = []
    for order, reply in sent_and_uploaded(grid):
        sent, uploaded = (message.content["model"]["model"].numpy().astype(float) for message in (order, reply))
        lengths.append(np.linalg.norm(uploaded - sent))
    assert len(lengths) == 6 and max(lengths) == pytest.approx(0.125, rel=1e-6) and (min(lengths) == 0) == (text == "--lr 1e9")


def test_an_upload_that_cannot_be_counted_does_not_leave_and_one_that_was_lost_is_counted(npz, grid, tmp_path, capfd):
    grid.contexts[101].node_config["dp-clip"] = 1

    def lose(message: Message, answer) -> Message | None:
        round_, node = message.content["config"]["round"], message.metadata.dst_node_id
        ledger = tmp_path / "state" / "privacy-1.json"
        if (round_, node) == (2, 101):
            (tmp_path / "ledger").write_text(ledger.read_text())
            ledger.write_text("[")
        return (answer(), None)[1] if (round_, node) == (1, 101) else answer()

    grid.fault = lose
    grid.serve(f"{FEDU} --dataset {npz} --out run")
    assert [noise for _, noise in json.loads((tmp_path / "ledger").read_text())] == [0, 0]
    assert [row["clients"] for row in read_metrics(tmp_path / "run")] == [[0, 1, 2], [0, 2], [0, 2]]
    assert [row["loss"][1] is None for row in read_metrics(tmp_path / "run")] == [True, False, False]
    said = capfd.readouterr()
    assert "round 2: client 1 was left out: its own log says why" in said.err and "privacy-1.json, which counts" in said.err
    assert "client 1, round 0: epsilon after upload 1 of this run is inf" in said.out


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"dp-clip": float("nan")}, "--node-config dp-clip got 'nan', needs a number of at least 1e-06 and at most 1e+06"),
        ({"dp-clip": 0}, "--node-config dp-clip got '0', needs a number of at least 1e-06"),
        ({"dp-clip": True}, "--node-config dp-clip got 'True', needs a number"),
        ({"dp-clip": 1, "dp-noise": -0.5}, "--node-config dp-noise got '-0.5', needs a number of at least 0.001 and at most 1000"),
        ({"dp-clip": 1, "dp-noise": float("inf")}, "--node-config dp-noise got 'inf'"),
        ({"dp-clip": 1, "dp-noise": 1, "dp-delta": 1}, "--node-config dp-delta got '1', needs a number of at least 1e-15 and at most 0.1"),
        ({"dp-noise": 1}, "--node-config dp-noise changes nothing without dp-clip"),
        ({"dp-clip": 1, "dp-delta": 1e-6}, "--node-config dp-delta changes nothing without dp-noise"),
        ({"dp_clip": 1}, "--node-config has the unknown key dp_clip; it knows client, data, device, dp-clip"),
        ({"dp-clip": 1, "dp-noise": 1, "": "absent"}, "--node-config dp-noise cannot be used: noise needs the package dp-accounting"),
    ],
)
def test_privacy_that_is_wrong_lets_nothing_leave(npz, grid, monkeypatch, config, sentence):
    """Refused at the server's first question and at an order to train."""
    if config.pop("", None):
        monkeypatch.setitem(sys.modules, "dp_accounting", None)
        monkeypatch.delitem(sys.modules, "dp_accounting.gaussian_mechanism", raising=False)
    grid.contexts[100].node_config.update(config)
    options = asdict(Options(dataset=str(npz), clients=3, encoder="small", batch_size=8))
    fields = {"options": json.dumps({name: options[name] for name in SENT_OPTIONS}), "run": "0" * 16, "image-size": 16}
    question = RecordDict({"config": ConfigRecord(fields)})
    model = ArrayRecord({"model": Array(np.zeros(9, np.float32))})
    order = RecordDict({"config": ConfigRecord(fields | {"round": 0, "last-round": -1}), "model": model})
    for kind, content in ((MessageType.QUERY, question), (MessageType.TRAIN, order)):
        assert grid.deliver(Message(content, dst_node_id=100, message_type=kind)).error.reason.startswith(sentence)


# ------------------------------------------------------------------------------------- certificates.sh and parties.json


def certificates(folder: Path, *line: str, path: str = os.environ["PATH"], umask: int = -1) -> subprocess.CompletedProcess:
    script = str(ROOT / "flower" / "certificates.sh")
    return subprocess.run(
        ["/bin/sh", script, *line], cwd=folder, env={"PATH": path}, capture_output=True, text=True, timeout=60, umask=umask
    )


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_certificates_of_names_and_addresses(tmp_path, umask):
    done = certificates(tmp_path, "the keys/", "fedu.example.org,localhost,10.0.0.255,::1", "2", umask=umask)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (folder,) = tmp_path.iterdir()
    made = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    names = {"ca.crt", "ca.key", "server.crt", "server.key", *(f"client-{k}{end}" for k in range(2) for end in ("", ".pub"))}
    assert folder.name == "the keys" and folder.stat().st_mode & 0o777 == 0o700 and made == dict.fromkeys(names, 0o600)
    line = ["openssl", "verify", "-CAfile", "ca.crt", "-purpose", "sslserver"]
    for checked in (["-verify_hostname", "localhost"], ["-verify_ip", "10.0.0.255"], ["-verify_ip", "::1"], ["-verify_ip", "127.0.0.1"]):
        assert subprocess.run([*line, *checked, "server.crt"], cwd=folder, capture_output=True).returncode == 0, checked
    assert parties.normal_key((folder / "client-1.pub").read_bytes()).startswith("ecdsa-sha2-nistp384 ")


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["keys", "a"], "got 2 arguments, needs FOLDER HOST[,HOST...] CLIENTS"),
        (["", "a", "1"], "FOLDER is empty"),
        (["there", "a", "1"], "FOLDER there exists already"),
        (["absent/keys", "a", "1"], "FOLDER absent/keys cannot be made: absent is not a folder"),
        (["/proc/no-keys", "a", "1"], "FOLDER /proc/no-keys cannot be made: no right to write there"),
        (["keys", "https://fedu.example.org", "1"], "HOST https://fedu.example.org is a URL or a path"),
        (["keys", "fedu.example.org:8000", "1"], "HOST fedu.example.org:8000 has a port"),
        (["keys", "", "1"], "HOST has an empty name"),
        (["keys", "a,,b", "1"], "HOST has an empty name"),
        (["keys", "a b", "1"], "HOST 'a b' has a character that no host's name has"),
        (["keys", "[::1]", "1"], "HOST '[::1]' has a character"),
        (["keys", "1:2:3", "1"], "HOST 1:2:3 has something that is no IPv6 address"),
        (["keys", "-a", "1"], "HOST -a is no host's name or address"),
        (["keys", "10.0.0.256", "1"], "HOST 10.0.0.256 is no host's name or address"),
        (["keys", "a." * 130 + "a", "1"], "is no host's name or address"),
        *((["keys", "a", count], f"CLIENTS got '{count}'") for count in ("0", "-1", "three", "1e3", "10000", "")),
    ],
)
def test_what_certificates_refuses_and_nothing_is_half_made(tmp_path, line, sentence):
    (tmp_path / "there").mkdir()
    done = certificates(tmp_path, *line)
    assert refused(done, sentence) and [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("absent", ["openssl", "ssh-keygen"])
def test_certificates_without_a_program_or_with_one_that_fails(tmp_path, absent):
    (tmp_path / "bin").mkdir()
    for name in ("dirname", "grep", "head", "mktemp", "rm", "mv", "seq", "openssl", "ssh-keygen"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / absent).unlink()
    assert refused(certificates(tmp_path, "keys", "a", "1", path=str(tmp_path / "bin")), f"{absent} is not installed")
    (tmp_path / "bin" / absent).write_text("#!/bin/sh\necho no entropy >&2\nexit 1\n")
    (tmp_path / "bin" / absent).chmod(0o755)
    assert refused(certificates(tmp_path, "keys", "a", "1", path=str(tmp_path / "bin")), f"{absent} failed: no entropy")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def new_key(path: Path) -> bytes:
    """A key pair as certificates.sh makes it; the public key as Flower gives it."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" client of a hospital\n")
    return public_key_to_bytes(key)


@pytest.fixture
def keys(grid, tmp_path, monkeypatch) -> list[bytes]:
    """The keys of the nodes of `grid`, client-K.pub here, and a command flwr that knows no key but refuses client-9.pub."""
    (tmp_path / "flwr").write_text('#!/bin/sh\necho "$@" >> called\ncase $3 in *9.pub) echo "no connection" >&2; exit 1;; esac\n')
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    keys = [new_key(tmp_path / f"client-{k}.pub") for k in range(4)]
    grid.keys = {100 + k: key for k, key in enumerate(keys[:3])}
    return keys


def test_a_key_is_a_party(npz, grid, keys, tmp_path, capfd):
    """Nodes 100 and 101 have the keys of clients 0 and 1. Node 102 says that it is client 2, whose key it does not have, and then has."""
    for k, name in enumerate(["St. Mary's", "Charité"]):
        parties.main([f"client-{k}.pub", str(k), "--name", name, "--images", "9"])
    parties.main(["client-3.pub", "2", "--name", "Third"])
    assert (tmp_path / "called").read_text().count("supernode register client-") == 3
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run", min_clients=2)
    said = capfd.readouterr()
    assert "node 102 was refused: it says that it is client 2, and its key is not in parties.json" in said.err
    assert "client 1 (Charité) says that it has " in said.err and "of which 9 count (parties.json)" in said.err
    assert "client 0 (St. Mary's) is node 100 and has 9 images" in said.out
    assert read_metrics(tmp_path / "run")[0]["clients"] == [0, 1] and read_metrics(tmp_path / "run")[0]["num_examples"] == [9, 9]
    grid.contexts[101].node_config["client"] = 0  # another's number
    parties.main(["client-2.pub", "2", "--name", "Third", "--replace"])  # a new key
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out other", min_clients=2)
    said = capfd.readouterr().err
    assert "node 101 was refused: it says that it is client 0, and its key is that of client 1 (Charité)" in said
    assert read_metrics(tmp_path / "other")[0]["clients"] == [0, 2]


def test_a_key_that_changes_during_a_run(npz, grid, keys, tmp_path, capfd):
    """After round 0 client 2 has another key, which its node lacks in round 1 and has in round 2. The file is damaged, and deleted."""
    for k in range(3):
        parties.main([f"client-{k}.pub", str(k)])

    def rotate(message: Message, answer) -> Message:
        place = (message.content["config"]["round"], message.metadata.dst_node_id)
        if place == (0, 100):
            parties.main(["client-3.pub", "2", "--replace"])
        if place == (1, 100):
            (tmp_path / "parties.json").write_text("[")
            grid.keys[102] = keys[3]
        if place == (2, 100):
            (tmp_path / "parties.json").unlink()
        return answer()

    grid.fault = rotate
    grid.serve(f"{FEDU} --rounds 4 --dataset {npz} --out run", min_clients=2)
    assert [row["clients"] for row in read_metrics(tmp_path / "run")] == [[0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2]]
    said = capfd.readouterr().err
    assert said.count("parties.json cannot be read (JSONDecodeError") == said.count("parties.json is no longer here: the parties stay") == 1
    (tmp_path / "parties.json").write_text("[")
    with pytest.raises(InputError, match="parties.json cannot be read"):
        grid.serve(f"{FEDU} --dataset {npz} --out other")


@pytest.mark.parametrize("fate", ["lost", "busy", "reported"])
def test_a_node_that_does_not_say_at_once_who_it_is(npz, grid, tmp_path, capfd, monkeypatch, fate):
    """The question is lost with its node; or is answered late, after a second one; or the SuperLink says that the node is lost."""
    monkeypatch.setattr(strategy, "ANSWER", 0)
    asked, deliver = [], grid.deliver

    def answer(message: Message) -> Message | None:
        if message.metadata.dst_node_id != 101 or message.metadata.message_type != MessageType.QUERY:
            return deliver(message)
        asked.append(message)
        if fate == "busy":
            return BUSY if len(asked) < 3 else deliver(message)
        if len(asked) > 1:
            return deliver(message)
        if fate == "lost":
            return None
        error = Message(Error(code=3, reason="Node Unavailable"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = 1
        return error

    grid.deliver = answer
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run")
    assert read_metrics(tmp_path / "run")[0]["clients"] == [0, 1, 2] and "refused" not in capfd.readouterr().err


def test_a_node_that_never_says_who_it_is_holds_up_only_the_beginning(npz, grid, tmp_path, monkeypatch):
    """The run looks for nodes again until it has waited for this one, and then once a round."""
    monkeypatch.setattr(strategy, "ANSWER", 1)
    deliver, nodes, looks = grid.deliver, grid.get_nodes, []
    grid.deliver = lambda message: BUSY if message.metadata.dst_node_id == 101 else deliver(message)
    grid.get_nodes = lambda: looks.append(len(grid.messages)) or nodes()
    grid.serve(f"{FEDU} --dataset {npz} --out run", min_clients=2)
    assert [row["clients"] for row in read_metrics(tmp_path / "run")] == [[0, 2]] * 3
    trained = next(k for k, message in enumerate(grid.messages) if message.metadata.message_type == MessageType.TRAIN)
    assert sum(look <= trained for look in looks) > 2 and sum(look > trained for look in looks) == 2


def test_a_round_that_waits_for_clients_says_for_whom(npz, grid, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(strategy, "NEWS", 0)
    late, nodes = grid.contexts.pop(101), grid.get_nodes
    looks = []

    def come_late() -> list[NodeInfo]:
        looks.append(1)
        grid.contexts |= {101: late} if len(looks) == 2 else {}
        return nodes()

    grid.queues[101], grid.get_nodes = [], come_late
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run")
    assert capfd.readouterr().out.count("  2 clients are here, a round waits for 3; absent: 1\n") == 1


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("client-9.pub 2", "client-9.pub cannot be read: No such file"),
        ("wrong.pub 2", "wrong.pub is not a public key in OpenSSH's form"),
        ("client-2.pub -1", "argument client: got '-1'"),
        ("client-2.pub 2 --images 0", "--images: got '0', needs a whole number of at least 1"),
        ("client-2.pub 0", "parties.json has client 0 already: --replace changes its key, name or images"),
        ("client-0.pub 1", "the key of client 1 is that of client 0 (a) in parties.json"),
        ("other-9.pub 2", "the SuperLink did not take the key: no connection"),
    ],
)
def test_what_the_command_for_parties_refuses(keys, tmp_path, refuses, line, sentence):
    (tmp_path / "wrong.pub").write_text("ssh-ed25519 AAAA")
    new_key(tmp_path / "other-9.pub")
    parties.main(["client-0.pub", "0", "--name", "a"])
    before = (tmp_path / "parties.json").read_bytes()
    line = line.split() if " -1" not in line else ["client-2.pub", "--", "-1"]
    assert refuses(lambda: parties.main(line), sentence) and (tmp_path / "parties.json").read_bytes() == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({}, "parties.json has the client 0 twice"),
        ({"client": 1}, "parties.json has the key ecdsa-sha2-nistp384 "),
        ({"client": "1"}, "client '1' needs a number from 0"),
        ({"client": 1, "images": -5}, "client 1 needs a number from 0, a name, and a number of images or null"),
        ({"client": 1, "key": "abc"}, "client 1 has no public key in OpenSSH's form"),
        ({"role": "x"}, "parties.json cannot be read (TypeError"),
    ],
)
def test_files_of_parties_that_are_refused(keys, tmp_path, change, sentence):
    parties.main(["client-0.pub", "0", "--name", "a"])
    (row,) = json.loads((tmp_path / "parties.json").read_text())
    (tmp_path / "parties.json").write_text(json.dumps([row, row | change]))
    with pytest.raises(InputError, match=re.escape(sentence)):
        parties.read_parties()


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_no_other_user_can_read_what_is_private(npz, grid, keys, tmp_path, umask):
    """Whatever the umask, and though the state folder was made by hand."""
    (tmp_path / "state").mkdir()
    before = os.umask(umask)
    try:
        for k in range(3):
            parties.main([f"client-{k}.pub", str(k)])
        grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out new/run")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("state", "new/run", "parties.json")}
    assert modes == {"state": 0o700, "new/run": 0o700, "parties.json": 0o600}


def test_what_a_client_has_to_mend_is_said_there_and_at_the_server_and_the_others_go_on(npz, parts, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few, large, grey = tmp_path / "few.npz", tmp_path / "large.npz", tmp_path / "empty"
    np.savez(few, x_train=np.zeros((7, 16, 16, 3), np.uint8))
    np.savez(large, x_train=np.zeros((9, 32, 32, 3), np.uint8))
    grey.mkdir()
    good = [{"client": k, "data": str(parts[k])} for k in range(2)]
    wrong = {
        "DATA has 7 images, a batch needs 8": {"client": 2, "data": str(few)},
        "DATA: the images are 32 pixels wide, the federation's are 16": {"client": 2, "data": str(large)},
        "data set DATA does not exist": {"client": 2, "data": "absent.npz"},
        "DATA is neither a file PATH.npz nor a folder with images": {"client": 2, "data": str(grey)},
        "--node-config has no client": {"data": str(parts[2])},
        "--node-config got client=3; the federation has the clients 0 to 2": {"client": 3, "data": str(parts[2])},
        "--node-config got statistics=local, and the run has --statistics shared": good[1] | {"client": 2, "statistics": "local"},
        "client 0 is node 100": {"client": 0, "data": str(parts[2])},
    }
    grid = LocalGrid(tmp_path, *good, *wrong.values())
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run", min_clients=2)
    assert read_metrics(tmp_path / "run")[0]["clients"] == [0, 1]
    said = capfd.readouterr().err.splitlines()
    for k, sentence in enumerate(wrong):
        config = grid.contexts[102 + k].node_config
        assert any(f"node {102 + k} was refused:" in line and sentence in line for line in said), sentence
        at_client = f"client {config.get('client')}: error: {sentence.replace('DATA', str(config['data']))}"
        assert sentence.startswith("client 0") or any(line.startswith(at_client) for line in said), at_client


def test_a_client_of_another_architecture_is_left_out(npz, grid, tmp_path, capfd):
    """At the client, which gets a network that is not its own, and at the server, which gets one."""

    def shorten(message: Message, answer) -> Message:
        node, round_ = message.metadata.dst_node_id, message.content["config"]["round"]
        shortened = ArrayRecord({"model": Array(message.content["model"]["model"].numpy()[:-1])})
        if (node, round_) == (100, 0):
            told = RecordDict({"model": shortened, "config": message.content["config"]})
            other = Message(told, dst_node_id=node, message_type=MessageType.TRAIN)
            other.metadata.__dict__["_message_id"] = message.metadata.message_id
            return client_app.app(other, grid.contexts[node])
        reply = answer()
        if (node, round_) == (102, 1):
            reply.content["model"] = shortened
        return reply

    grid.fault = shorten
    grid.serve(f"{FEDU} --dataset {npz} --out run")
    said = capfd.readouterr().err
    assert "client 0: error: the server sent a network of" in said
    assert "round 0: client 0 was left out: the server sent a network of" in said
    assert "round 1: client 2 was left out: it uploaded a network of" in said
    assert [row["clients"] for row in read_metrics(tmp_path / "run")] == [[1, 2], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("how", ["deleted", "cut", "random"])
def test_a_client_whose_state_is_lost_or_damaged_says_so_and_begins_anew(npz, grid, tmp_path, capfd, how):
    def harm(message: Message, answer) -> Message:
        if (message.content["config"]["round"], message.metadata.dst_node_id) == (2, 100):
            (folder,) = (tmp_path / "state").glob("*/client-0")
            for path in folder.iterdir():
                data = path.read_bytes()
                path.write_bytes(data[: len(data) // 2] if how == "cut" else os.urandom(len(data)))
            if how == "deleted":
                shutil.rmtree(folder)
        return answer()

    grid.fault = harm
    grid.serve(f"{FEDU} --rounds 4 --dataset {npz} --out run")
    told, said = capfd.readouterr()
    assert "does not hold what it kept after round 1; it starts as in its first round" in said and "Traceback" not in said
    assert ("client 0: " in said and "is not a readable checkpoint of this version" in said) == (how != "deleted")
    rows = read_metrics(tmp_path / "run")
    assert [row["clients"] for row in rows] == [[0, 1, 2]] * 4
    assert [[d is None for d in row["decided_on"]] for row in rows[2:]] == [[True, False, False], [False] * 3]
    lines = re.findall(r"client 0, round (.*) of 0 to 3: loss (.*), divergence (.*), began with (.*), sends (.*) MB after ", told)
    origin = {"global": "the server's predictor", "local": "its own predictor"}
    assert lines == [
        (str(k), f"{row['loss'][0]:.4f}", f"{row['divergence'][0]:.4f}", origin[row["predictor"][0]], f"{row['upload_bytes'] / 3e6:.2f}")
        for k, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("--method fedsimclr", "--method got fedsimclr, between parties it needs one of fedu, fedbyol, fedema"),
        ("--aggregate target", "target encoders do not leave the parties"),
        ("--statistics local --init x", "--init got x, but with --statistics local no party gets the BatchNorm of that encoder"),
        ("--resume run --seed 1", "--resume run continues with the options that the run has, and got --seed"),
        ("--dp-clip 1", "--dp-clip got 1, but between parties each sets its own in --node-config"),
        ("--partition iid", "--partition changes nothing between parties"),
        ("--lr -1", "--lr: got '-1', needs a number above 0"),
        ("--lr '1", '--run-config got options="--lr \'1": No closing quotation'),
        ("--help", "--help starts no run"),
        ("--dataset absent.npz", "absent.npz does not exist"),
        ("--resume absent", "absent is not a run folder"),
    ],
)
def test_options_that_the_server_refuses(grid, text, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        grid.serve(text)


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"min_clients": 4}, "--run-config min-clients got '4', needs a whole number of at least 0 and at most 3"),
        ({"max_share": 0}, "--run-config max-share got '0', needs a number above 0 and at most 1"),
        ({"timeout": "soon"}, "--run-config timeout got 'soon', needs a number above 0"),
    ],
)
def test_numbers_that_the_server_refuses(npz, grid, config, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        grid.serve(f"{FEDU} --dataset {npz}", **config)


def test_runs_that_the_server_does_not_resume(npz, grid, tmp_path):
    """One by a version with other options, and one of fedu.py; nor does fedu.py resume one of the server's."""
    grid.serve(f"{FEDU} --rounds 1 --dataset {npz} --out run")
    with pytest.raises(InputError, match="run was begun by flwr run, and only that can go on with it"):
        fedu.resume(tmp_path / "run")
    config = read_config(tmp_path / "run")
    write_config(tmp_path / "run", config | {"options": config["options"] | {"warm_up": 3}})
    with pytest.raises(InputError, match="run was begun by a version that had the option --warm-up: train it again with --overwrite"):
        grid.serve("--resume run")
    simulate(npz, tmp_path / "simulated", f"{FEDU} --rounds 1")
    with pytest.raises(InputError, match="simulated was begun by fedu.py, and only that can go on with it"):
        grid.serve("--resume simulated")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"aggregate": "target"}, "it asks for --method 'fedu' --aggregate 'target', which no party uploads"),
        ({"statistics": "none"}, "--statistics got 'none'"),
        ({"method": "./mine.py"}, "it asks for --method './mine.py' --aggregate 'online', which no party uploads"),
        ({"method": "fedavg-supervised", "predictor": "global"}, "it asks for --method 'fedavg-supervised'"),
        ({"init": "/etc/passwd"}, "of another version"),
        ({"views": "./views.py"}, "of another version"),
        ({"unheard": 1}, "of another version"),
        ({"batch_size": 0}, "--batch-size got '0'"),
    ],
)
def test_what_a_client_refuses_a_server(npz, grid, capfd, change, sentence):
    options = asdict(Options(dataset=str(npz), clients=3, encoder="small", batch_size=8))
    sent = json.dumps({name: options[name] for name in SENT_OPTIONS} | change)
    config = ConfigRecord({"options": sent, "run": "0" * 16, "image-size": 16})
    question = Message(RecordDict({"config": config}), dst_node_id=100, message_type=MessageType.QUERY)
    assert sentence in grid.deliver(question).error.reason and sentence in capfd.readouterr().err


def test_images_without_labels(tmp_path):
    from PIL import Image

    image = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    for place in ("a/1.png", "a/sub/2.jpg", "b/train/x/3.png", "b/test/4.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / place)
    assert load_unlabelled(tmp_path / "a", 16).shape == (2, 3, 16, 16)
    assert load_unlabelled(tmp_path / "b", 16).shape == (1, 3, 16, 16)
    np.savez(tmp_path / "grey.npz", x_train=np.ones((4, 16, 16), np.uint8))
    assert load_unlabelled(tmp_path / "grey.npz", 16).equal(torch.ones(4, 3, 16, 16, dtype=torch.uint8))
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="holds an image that cannot be read"):
        load_unlabelled(tmp_path / "a", 16)


PINNED = ROOT / "flower" / "pinned"


def test_a_party_can_pin_the_app_of_its_own_clone(monkeypatch):
    """Flower then neither unpacks nor loads the app that the server sent. With a Flower of other functions, the command ends."""
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))  # put back after the test
    pin = runpy.run_path(str(PINNED / "flwr-clientapp"))["pin"]
    pin()
    run_clientapp.install_from_fab(b"no app", skip_prompt=True)
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("somebody/else", "1.0.0", "0" * 64) is client_app.app
    monkeypatch.delattr(run_clientapp, "install_from_fab")
    with pytest.raises(SystemExit, match="this version of Flower has no install_from_fab"):
        pin()


def test_a_party_that_pins_its_app_runs_no_app_of_another_kind():
    assert set(TASK_TYPE_TO_COMMAND.values()) == {path.name for path in PINNED.iterdir() if path.name != "__pycache__"}
    done = subprocess.run([PINNED / "flwr-agentapp"], env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode and done.stderr == "flwr-agentapp: error: this party runs nothing but the app of its own clone\n"


# -------------------------------------------------------------------- real processes on this machine, with TLS and their own keys


class Deployment:
    """A SuperLink, and a SuperNode for each client; client 3 has a key that the SuperLink was not told of."""

    def __init__(self, folder: Path, parts: list[Path]):
        self.folder, self.parts, self.processes = folder, parts, []
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FLWR_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }  # fmt: skip
        self.address = f"127.0.0.1:{free_port()}"

    def begin(self) -> None:
        self.call(str(ROOT / "flower" / "certificates.sh"), "keys", "localhost", "4")
        folder = self.folder
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "{self.address}"\nroot-certificates = "{folder}/keys/ca.crt"\n'
        )
        tls = "--ssl-ca-certfile keys/ca.crt --ssl-certfile keys/server.crt --ssl-keyfile keys/server.key --enable-supernode-auth"
        self.start("link", f"flower-superlink --port {self.address[10:]} {tls} --disable-runtime-dependency-installation")
        wait_for(lambda: "Uvicorn running" in self.log("link"))
        for k in range(3):
            wait_for(partial(self.register, k))
        self.nodes = [self.start_node(k) for k in range(4)]

    def call(self, *line: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(line, cwd=self.folder, env=self.environment, check=check, capture_output=True, text=True, timeout=300)

    def register(self, k: int) -> bool:
        """Where the machine is slow, flwr gives up after two seconds, perhaps after the SuperLink has heard it."""
        line = (str(ROOT / "flower" / "parties.py"), f"keys/client-{k}.pub", str(k), "--name", f"Hospital {k}")
        return self.call(sys.executable, *line, check=False).returncode == 0

    def start(self, name: str, line: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "a") as log:
            process = subprocess.Popen(
                shlex.split(line), cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def start_node(self, k: int) -> subprocess.Popen:
        """As docs/flower.md says: again and again while the SuperLink takes a node that was killed for alive."""
        data = self.parts[min(k, 2)]
        node = f"flower-supernode --superlink {self.address} --root-certificates keys/ca.crt --auth-supernode-private-key keys/client-{k}"
        node += f""" --port {free_port()} --node-config 'client={k} data="{data}" state="state" device="cpu"'"""
        node = f"env PATH={PINNED}:$PATH {node}" if k == 2 else node  # one of them pins its app
        return self.start(f"node{k}", f"sh -c {shlex.quote(f'until {node}; do sleep 1; done')}" if k < 3 else node)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def run(self, name: str, text: str) -> subprocess.Popen:
        line = ["flwr", "run", str(ROOT / "flower"), "local", "--stream", "--run-config", f'options="{text} --out {name}"']
        return self.start(name, shlex.join(line))

    def finish(self, name: str, run: subprocess.Popen) -> Path:
        assert run.wait(timeout=400) == 0 and f"{name} holds the run" in self.log(name), self.log(name)
        return self.folder / name

    def end(self) -> None:
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_)
            with suppress(subprocess.TimeoutExpired):
                for process in self.processes:
                    process.wait(timeout=5)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def deployment(parts, tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("deployment"), parts)
    try:
        deployment.begin()
        yield deployment
    finally:
        deployment.end()


@pytest.mark.slow
def test_three_processes_give_the_bits_of_the_simulation(npz, deployment, tmp_path, command):
    run = deployment.finish("run", deployment.run("run", f"{FEDU} --dataset {npz}"))
    assert_same(run, simulate(npz, tmp_path / "simulated"))
    done = command("eval.py", run, "--device", "cpu", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0 and "linear" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_wrong_option_ends_the_run_as_failed_in_one_sentence(deployment):
    deployment.run("wrong", "--lr -1").wait(timeout=100)
    said, sentence = deployment.log("wrong"), "argument --lr: got '-1', needs a number above 0"
    assert f"error: {sentence}\n" in said and "Traceback" not in said and "exception" not in said.lower(), said
    (run,) = (
        run for run in json.loads(deployment.call("flwr", "list", "local", "--format", "json").stdout)["runs"] if run["run-id"] in said
    )
    assert run["status"] == "finished:failed" and run["status-details"].endswith(sentence)


@pytest.mark.slow
def test_a_node_with_an_unknown_key_is_refused(deployment):
    assert deployment.nodes[3].wait(timeout=60) != 0
    assert "Failed to activate SuperNode" in deployment.log("node3") and "SuperNode ID" not in deployment.log("node3")
    assert "No SuperNode found with the given public key" in deployment.log("link")


@pytest.mark.slow
def test_a_node_that_is_killed_and_restarted_takes_part_again(npz, deployment, tmp_path):
    """In the second round, which ends without it; what it keeps is then that of its first round, its BatchNorm included."""
    text = f"{FEDU} --statistics local"
    trainings = deployment.log("node1").count("Receiving: train")
    run = deployment.run("killed", f"{text} --dataset {npz}")
    wait_for(lambda: deployment.log("node1").count("Receiving: train") == trainings + 2)
    os.killpg(deployment.nodes[1].pid, signal.SIGKILL)
    deployment.nodes[1] = deployment.start_node(1)
    folder = deployment.finish("killed", run)
    assert "round 1: client 1 was left out: its node was lost" in deployment.log("killed")
    assert [row["clients"] for row in read_metrics(folder)] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert_same(folder, simulate(npz, tmp_path / "simulated", text, absent=(1, 1)), lost=True)
