"""Thousands of malformed messages between server and parties: none ends a run, changes the model, or reaches a file of a party's."""

import io
import json
import math
import os
import pickle
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install -r flower/requirements-flower.txt")
import client_app
import strategy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import FINAL, SENT_OPTIONS

from federation import Client, assemble
from models import batchnorm_places
from options import Options
from runtime.cli import InputError, command_line

OPTIONS = Options(encoder="tiny", clients=3, rounds=3, local_epochs=1, batch_size=8, lr=0.05, mu=0.45)
RUN = "0123456789abcdef"


def many(examples: int):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=quiet)


# ------------------------------------------------------------------------------------- what is wrong with one message


whole, real = st.integers(-(2**63), 2**63 - 1) | st.just(10**12), st.floats(width=64)
single = whole | real | st.text(max_size=20) | st.binary(max_size=20) | st.booleans()
anything = single | st.lists(whole, max_size=3) | st.lists(st.text(max_size=5), max_size=3)
names = st.text(min_size=1, max_size=12) | st.sampled_from(["init", "labels", "data_root", "client", "model", "id", "path"])


def changed(fields: dict, right: dict) -> st.SearchStrategy[dict]:
    """These fields with one missing, one more, or one of a value that is wrong. right: says of each field's value whether it is right."""

    def with_wrong(name: str) -> st.SearchStrategy[dict]:
        return anything.filter(lambda value: not right[name](value)).map(lambda value: fields | {name: value})

    missing = st.sampled_from(sorted(fields)).map(lambda name: {key: value for key, value in fields.items() if key != name})
    further = st.tuples(names.filter(lambda name: name not in right), anything).map(lambda pair: fields | dict([pair]))
    return missing | further | st.one_of([with_wrong(name) for name in sorted(fields)])


def whole_in(low: int, high: int):
    return lambda value: type(value) is int and low <= value <= high


def real_in(low: float, high: float):
    return lambda value: type(value) is float and low <= value <= high


def wrong_records(right: dict) -> st.SearchStrategy[RecordDict]:
    """A message whose records are of another kind, or have other names. right: what it should hold."""
    others = st.sampled_from(
        [MetricRecord({"id": 1}), ConfigRecord(), ArrayRecord(), ArrayRecord({"model": Array(np.ones(3, np.float32))})]
    )

    def replaced(name: str) -> st.SearchStrategy[dict]:
        return others.filter(lambda record: type(record) is not type(right[name])).map(lambda record: right | {name: record})

    missing = st.sampled_from(sorted(right)).map(lambda name: {key: record for key, record in right.items() if key != name})
    further = st.tuples(names.filter(lambda name: name not in right), others).map(lambda pair: right | dict([pair]))
    return (missing | further | st.one_of([replaced(name) for name in sorted(right)])).map(RecordDict)


class Trap:
    """Unpickling it ends the process."""

    def __reduce__(self):
        return os._exit, (7,)


def saved(array: np.ndarray, **how) -> bytes:
    np.save(file := io.BytesIO(), array, **how)
    return file.getvalue()


def header(shape: tuple, dtype: str = "<f4") -> bytes:
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


def zipped(array: np.ndarray) -> bytes:
    np.savez(file := io.BytesIO(), model=array)
    return file.getvalue()


@cache
def wrong_networks(length: int) -> st.SearchStrategy[ArrayRecord]:
    """Records whose network is no float32 vector of this length, is not finite, cannot be read, or would run code if it were unpickled."""
    good = np.zeros(length, np.float32)
    data = [
        b"", saved(good)[:-1], saved(good) + b"\0", saved(good)[:60], zipped(good), pickle.dumps(Trap()), header((10**12,)), header((-4,)),
        header((10**12,), "|O"), header((2**62,)), saved(np.array([Trap()], dtype=object), allow_pickle=True),
    ]  # fmt: skip
    other = [
        good[:-1], good[:0], np.zeros(length + 1, np.float32), good.astype(np.float64), good.astype(">f4"), good.astype(np.int32),
        good[None], good.astype(np.float16), np.float32(1), good.astype("U1")[:5],
    ]  # fmt: skip
    spoilt = st.tuples(st.integers(0, length - 1), st.sampled_from([math.nan, math.inf, -math.inf])).map(
        lambda where: with_value(good, *where)
    )
    bytes_ = (st.sampled_from(data) | st.binary(max_size=200)).map(lambda data: Array("float32", (length,), "numpy.ndarray", data))
    arrays = st.sampled_from([saved(np.asarray(array)) for array in other]).map(
        lambda data: Array("float32", (length,), "numpy.ndarray", data)
    )
    kinds = st.text(max_size=8).map(lambda kind: Array("float32", (length,), kind, saved(good)))
    one = (bytes_ | arrays | kinds | spoilt.map(Array)).map(lambda array: {"model": array})
    few = st.sampled_from([{}, {"other": Array(good)}, {"model": Array(good), "other": Array(good[:1])}])
    return (one | few).map(ArrayRecord)


def with_value(vector: np.ndarray, place: int, value: float) -> np.ndarray:
    vector = vector.copy()
    vector[place] = value
    return vector


# ----------------------------------------------------------------------------------------------------- at the server


INTRODUCED, WHO = {"id": 1, "num-examples": 20}, {"id": whole_in(0, 2), "num-examples": whole_in(8, 10**9)}
TURN = {"loss": 1.0, "divergence": 0.5, "own-share": 1.0, "decided-on": 0.5}
TOLD = {"loss": real_in(-0.1, 8.1), "divergence": real_in(0, sys.float_info.max), "own-share": lambda v: v == 1.0 and type(v) is float}
TOLD |= {"decided-on": real_in(0.45, sys.float_info.max)}


def reply_of(node: int, content: RecordDict | Error) -> Message:
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN))


class Server:
    """A strategy whose three clients are connected. Client k uploads the server's first model plus k + 1."""

    def __init__(self):
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        clients = [Client(k, torch.empty(0, device="meta")) for k in range(3)]
        federation = assemble(OPTIONS, [clients], torch.empty(1, 3, 16, 16, dtype=torch.uint8), torch.empty(0))
        self.strategy = strategy.FedU(OPTIONS, federation, RUN, 3, 60, 0.5)
        self.first = self.strategy.server.model.clone()
        uploads = [(self.first + k + 1).numpy() for k in range(3)]
        content = [{"model": ArrayRecord({"model": Array(upload)}), "turn": ConfigRecord(TURN)} for upload in uploads]
        self.good = [reply_of(100 + k, RecordDict(records)) for k, records in enumerate(content)]

    def connect(self, *known: int) -> None:
        self.strategy.nodes = {k: 100 + k for k in known}
        for client in self.strategy.clients:
            client.indices, client.divergence, client.last_round = torch.empty(20, device="meta"), None, None
        self.strategy.server.model.copy_(self.first)

    def make_round(self, *replies: Message) -> dict:
        """Round 1 with these answers; its row."""
        self.connect(0, 1, 2)
        self.strategy.skipped = 0
        self.strategy.configure_train(2, self.strategy.global_model(), ConfigRecord(), self)
        self.strategy.aggregate_train(2, replies)
        return self.strategy.row

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=100 + k) for k in range(3)]


@pytest.fixture(scope="module")
def server() -> Server:
    server = Server()
    assert server.make_round(*server.good)["clients"] == [0, 1, 2]
    torch.testing.assert_close(server.strategy.server.model, server.first + 2)
    return server


def refuses(server: Server, content: RecordDict | Error, capfd) -> None:
    """This answer of client 1 is left out by a sentence with its number, and the round goes on with the mean of the others."""
    row = server.make_round(server.good[0], reply_of(101, content), server.good[2])
    said = capfd.readouterr().err
    assert said.startswith("round 1: client 1 was left out: ") and said.count("\n") == 1 and len(said) < 600, said
    assert row["clients"] == [0, 2] and (row["dropped"] or row["nonfinite"]) == [1]
    torch.testing.assert_close(server.strategy.server.model, server.first + 2)
    assert [client.last_round for client in server.strategy.clients] == [1, None, 1]


@many(1000)
@given(
    changed(INTRODUCED, WHO).map(lambda fields: RecordDict({"client": ConfigRecord(fields)}))
    | wrong_records({"client": ConfigRecord(INTRODUCED)})
)
def test_an_introduction_is_refused_in_one_sentence(server, capfd, content):
    server.connect()
    server.strategy.introduce(reply_of(101, content))
    said = capfd.readouterr()
    assert said.err.startswith("node 101 was refused: ") and said.err.count("\n") == 1 and not said.out, said
    assert server.strategy.nodes == {} and server.strategy.server.model.equal(server.first)


@many(1000)
@given(changed(TURN, TOLD))
def test_an_answer_with_a_wrong_field_is_left_out(server, capfd, fields):
    if set(fields) == TURN.keys() - {"decided-on"}:  # which then is a first round's, of the wrong share
        assert fields["own-share"] == 1
    refuses(server, RecordDict({"model": server.good[1].content["model"], "turn": ConfigRecord(fields)}), capfd)


@many(400)
@given(st.data())
def test_an_answer_with_a_wrong_network_is_left_out(server, capfd, data):
    network = data.draw(wrong_networks(len(server.first)))
    refuses(server, RecordDict({"model": network, "turn": ConfigRecord(TURN)}), capfd)


@many(300)
@given(st.data())
def test_an_answer_of_other_records_or_an_error_is_left_out(server, capfd, data):
    right = dict(server.good[1].content)
    errors = st.builds(Error, st.integers(0, 2**31), st.text(max_size=2000) | st.none())
    refuses(server, data.draw(wrong_records(right) | errors), capfd)


@pytest.mark.parametrize("on_outlier", ["drop", "clip"])
@pytest.mark.parametrize(
    "attack, stopped",
    [
        (lambda first, change, other: torch.full_like(first, 1e30), True),
        (lambda first, change, other: torch.full_like(first, -3e38), True),
        (lambda first, change, other: first + 100 * change, True),
        (lambda first, change, other: first - change, False),
        (lambda first, change, other: first + torch.randn(len(first)) * change.norm() / len(first) ** 0.5, False),
        (lambda first, change, other: other, False),
    ],
    ids=["1e30", "3e38", "scaled", "flipped", "noise", "copy"],
)
def test_what_the_bound_on_drift_stops_and_what_it_does_not(server, capfd, monkeypatch, on_outlier, attack, stopped):
    """The others' changes are 1 and 3 everywhere; with a larger one the bound of 10 medians is 30. docs/flower.md has the table."""
    monkeypatch.setattr(server.strategy.uploads, "shorten", on_outlier == "clip")
    torch.manual_seed(0)
    planted = attack(server.first, torch.full_like(server.first, 2), server.first + 1)
    content = RecordDict({"model": ArrayRecord({"model": Array(planted.numpy())}), "turn": ConfigRecord(TURN)})
    row = server.make_round(server.good[0], reply_of(101, content), server.good[2])
    said, moved = capfd.readouterr().err, (server.strategy.server.model - server.first).abs().mean().item()
    assert ("client 1 moved" in said) == stopped and row["outliers"] == [1] * stopped
    if stopped and on_outlier == "drop":
        assert row["clients"] == [0, 2] and moved == pytest.approx(2, rel=1e-4) and server.strategy.clients[1].last_round is None
    elif stopped:
        assert row["clients"] == [0, 1, 2] and "and was shortened" in said
        assert moved == pytest.approx(
            (3 + 1 + 30) / 3 if planted[0] > 0 else (30 - 3 - 1) / 3, rel=1e-3
        )  # the median of 1, 3 and this is 3
    else:
        assert row["clients"] == [0, 1, 2]


def test_rounds_without_any_good_answer_are_skipped_and_the_fifth_in_a_row_ends_the_run(server, capfd):
    strategy_ = server.strategy
    row = server.make_round(*(reply_of(100 + k, RecordDict()) for k in range(3)))
    assert row["clients"] == [] and row["dropped"] == [0, 1, 2] and strategy_.server.model.equal(server.first)
    assert "round 1 was skipped, and the model stays" in capfd.readouterr().err
    for _ in range(3):
        strategy_.aggregate_train(2, [])
    with pytest.raises(InputError, match="round 1 cannot be made: client 0: its node was lost, or did not answer in time; client 1"):
        strategy_.aggregate_train(2, [])
    strategy_.skipped = 0


# ----------------------------------------------------------------------------------------------------- at a party


SENT = {name: getattr(OPTIONS, name) for name in SENT_OPTIONS}
ASKED = {"options": json.dumps(SENT), "run": RUN, "image-size": 16}
ORDERED = ASKED | {"round": 1, "last-round": 0}
RIGHT = {"options": lambda value: False, "run": lambda value: False, "image-size": whole_in(8, 1024), "round": whole_in(1, 2)}
RIGHT |= {"last-round": whole_in(-1, 0)}
LOCAL = json.dumps(SENT | {"statistics": "local"})
LAST = ASKED | {"options": LOCAL, "last-round": 0}
paths = st.sampled_from(
    ["", ".", "..", "../x", "/abs", "a/b", "~", f"../{RUN}", f"{RUN}/", f"{RUN}\n", RUN.upper(), RUN[:-1], f"{RUN}0", "\0"]
)
values = st.none() | single.filter(lambda value: type(value) is not bytes) | st.lists(whole, max_size=2) | st.just({"jitter": [1]})
wrong_values = st.sampled_from([None, -1, math.nan, "", "3", [], {"x": 1}, True, 1e400, "../x", "./mine.py"])
files = st.sampled_from(["init", "labels", "data_root", "save_partition", "dataset", "device", "log", "no_cache", "image_size", "unheard"])
options = st.one_of(
    st.text(max_size=50),
    st.sampled_from(["[" * 10**5, "1" * 10**5, "{}", "null", json.dumps(SENT)[:-1], json.dumps(SENT | {"aggregate": "target"})]),
    files.flatmap(lambda name: values.map(lambda value: json.dumps(SENT | {name: value}))),
    st.sampled_from(SENT_OPTIONS).map(lambda name: json.dumps({key: value for key, value in SENT.items() if key != name})),
    st.sampled_from(["clients", "rounds", "batch_size", "encoder", "method", "settings", "seed"]).flatmap(
        lambda name: wrong_values.map(lambda value: json.dumps(SENT | {name: value}))
    ),
)  # fmt: skip


class Party:
    """A party's folder with its images, outside of which nothing may be written; every file that is opened meanwhile is noted."""

    def __init__(self, folder: Path):
        self.folder, self.opened, self.watched = folder, [], False
        np.savez(folder / "scans.npz", x_train=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
        (folder / "secret").write_text("not for the server")
        node = {"client": 0, "data": str(folder / "scans.npz"), "state": str(folder / "state"), "device": "cpu"}
        self.context = Context(1, 100, node, RecordDict(), {})
        objective = assemble(OPTIONS, [[]], torch.empty(1, 3, 16, 16, dtype=torch.uint8), torch.empty(0)).networks
        self.network = objective.online.vector.numpy().copy()
        self.sent = np.delete(np.arange(len(self.network)), batchnorm_places(objective.online).numpy())  # with --statistics local
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.watched and event == "open" and isinstance(arguments[0], str | os.PathLike) and not str(arguments[0]).endswith(".py"):
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self.opened.append((Path(os.path.abspath(arguments[0])), writes))

    def answer(self, kind: str, content: RecordDict) -> Message:
        self.opened.clear()
        self.watched = True
        try:
            with command_line():
                return client_app.app(Message(content, dst_node_id=100, message_type=kind), self.context)
        finally:
            self.watched = False

    def everything(self) -> dict[Path, tuple[int, int]]:
        """The size and the time of the last change of every file and folder."""
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def party(tmp_path_factory) -> Party:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    party = Party(tmp_path_factory.mktemp("party"))
    reply = party.answer(MessageType.TRAIN, order(party))
    assert reply.has_content() and {"loss", "divergence", "own-share"} == reply.content["turn"].keys()
    written = {path for path, writes in party.opened if writes}
    assert written and all(path.is_relative_to(party.folder / "state") for path in written), written
    assert (party.folder / "state").stat().st_mode & 0o077 == 0
    return party


def order(party: Party, fields: dict = ORDERED) -> RecordDict:
    return RecordDict({"config": ConfigRecord(fields), "model": ArrayRecord({"model": Array(party.network)})})


def last(party: Party, fields: dict = LAST) -> RecordDict:
    """The message after the last round."""
    return RecordDict({"config": ConfigRecord(fields), "model": ArrayRecord({"model": Array(party.network[party.sent])})})


def is_refused(party: Party, kind: str, content: RecordDict) -> None:
    """By an error that names nothing of the party's, without a change to any file, and without a look at any but its images."""
    before = party.everything()
    reply = party.answer(kind, content)
    assert reply.has_error() and "\n" not in reply.error.reason and str(party.folder) not in reply.error.reason
    assert {path for path, _ in party.opened} <= {party.folder / "scans.npz"}
    assert party.everything() == before


@many(1000)
@given(st.data())
def test_a_question_is_refused_by_the_party(party, data):
    wrong = changed(ASKED, RIGHT) | paths.map(lambda run: ASKED | {"run": run}) | options.map(lambda text: ASKED | {"options": text})
    contents = wrong.map(lambda fields: RecordDict({"config": ConfigRecord(fields)})) | wrong_records({"config": ConfigRecord(ASKED)})
    is_refused(party, MessageType.QUERY, data.draw(contents))


@many(1000)
@given(st.data())
def test_an_order_is_refused_by_the_party(party, data):
    wrong = changed(ORDERED, RIGHT) | paths.map(lambda run: ORDERED | {"run": run}) | options.map(lambda text: ORDERED | {"options": text})
    contents = wrong.map(lambda fields: order(party, fields)) | wrong_records(dict(order(party)))
    is_refused(party, MessageType.TRAIN, data.draw(contents))


@many(200)
@given(st.data())
def test_a_network_is_refused_by_the_party(party, data):
    content = order(party)
    content["model"] = data.draw(wrong_networks(len(party.network)))
    is_refused(party, MessageType.TRAIN, content)


@many(400)
@given(st.data())
def test_a_last_model_is_refused_by_the_party(party, data):
    """Also of a run whose parties do not keep their BatchNorm."""
    right = RIGHT | {"last-round": whole_in(0, 2)}
    wrong = changed(LAST, right) | paths.map(lambda run: LAST | {"run": run}) | options.map(lambda text: LAST | {"options": text})
    contents = wrong.map(lambda fields: last(party, fields)) | wrong_records(dict(last(party)))
    networks = wrong_networks(len(party.sent)).map(lambda network: RecordDict(dict(last(party)) | {"model": network}))
    shared = st.just(order(party, ASKED | {"last-round": 0}))
    is_refused(party, f"{MessageType.QUERY}.{FINAL}", data.draw(contents | networks | shared))


def test_a_question_whether_a_node_is_alive_is_answered_whatever_it_holds(party):
    reply = party.answer(strategy.ALIVE, RecordDict({"config": ConfigRecord({"run": "../x"})}))
    assert reply.has_content() and not reply.content
