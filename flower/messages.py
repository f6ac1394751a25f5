"""What server and parties send each other, checked where it arrives by one function for each kind of message.

Each function looks at the presence, type, range, finiteness and length of every field, and at fields that nobody expects. What is wrong
raises an InputError of one sentence, so that the receiver refuses this message and goes on. A question of the type "alive" has no fields.
"""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

import fedu
from federation import Start
from options import Clients, Exchange, Options, Training
from runtime.cli import InputError, first_line

FLOWER_METHODS = ("fedu", "fedbyol", "fedema")
# the options that a party needs. No other is sent, and none of these names a file: a party reads its own images, and nothing else; its
# privacy it decides itself
NOT_SENT = {"init", "views", "dp_clip", "dp_noise", "dp_delta"}
SENT_OPTIONS = sorted({f.name for group in (Exchange, Clients, Training) for f in fields(group)} - NOT_SENT | {"seed"})
FINAL = "final"  # the type of the question that brings the last model to a party that keeps its BatchNorm
MOST_IMAGES = 10**9  # that a party can have; the largest public sets have a tenth of them
SIDES = (8, 1024)  # pixels of an image's side
REQUEST = {"options", "run", "image-size"}  # the fields of a question who a party is


class NotFinite(InputError):
    """A loss or a network has a NaN or an infinity."""


class Answer(NamedTuple):
    """A party's round. divergence: d_k as the party measured it. upload: float32, `[num_floats]`, finite.

    A party whose upload is clipped tells nothing else: loss, divergence and what its start says are then None.
    """

    loss: float | None
    divergence: float | None
    start: Start
    upload: Tensor


class Request(NamedTuple):
    """What the server asks of a party. run: the run's name, 16 hexadecimal digits. image_size: in pixels."""

    options: Options
    run: str
    image_size: int


class Order(NamedTuple):
    """A round that a party is to make. last_round: the last one whose upload the server has, -1 for none. received: the server's model."""

    request: Request
    round_: int
    last_round: int
    received: Tensor


class Final(NamedTuple):
    """The server's last model, for a party's own encoder. last_round: the last one whose upload the server has. received: of the model."""

    request: Request
    last_round: int
    received: Tensor


# ------------------------------------------------------------------------------------------------------ at the server


def read_introduction(reply: Message, options: Options) -> tuple[int, int]:
    """Who a node is: its client's number, 0 to K - 1, and how many images it has, a batch at least."""
    record = records(reply, client=ConfigRecord)[0]
    expect_fields(record, {"id", "num-examples"})
    client = number_in(record, "id", int, 0, options.clients - 1)
    return client, number_in(record, "num-examples", int, options.batch_size, MOST_IMAGES)


def read_answer(reply: Message, options: Options, num_floats: int) -> Answer:
    """A party's answer to an `Order`. Raises NotFinite if its training went wrong, else InputError for a field that is wrong."""
    model, report = records(reply, model=ArrayRecord, turn=ConfigRecord)
    if report:
        expect_fields(report, {"loss", "divergence", "own-share"}, {"decided-on"})
    upload, loss = read_network(model), report.get("loss")
    if len(upload) != num_floats:
        raise InputError(f"it uploaded a network of {len(upload)} numbers, that of --encoder {options.encoder} has {num_floats}")
    if not upload.isfinite().all() or (type(loss) is float and not np.isfinite(loss)):
        raise NotFinite("its upload is not finite")
    if not report:
        return Answer(None, None, Start(predictor=None), upload)
    # BYOL's loss lies in [0, 8], and FedDecorr's term of its two passes is below 2 B; bf16 rounds both
    loss = number_in(report, "loss", float, -0.1, 8.1 + 2.1 * options.settings["decorrelation"] * options.batch_size)
    most = sys.float_info.max
    divergence = number_in(report, "divergence", float, 0, most)
    own = number_in(report, "own-share", float, 0, 1)
    decided = number_in(report, "decided-on", float, 0, most) if "decided-on" in report else None
    if not takes(own, decided, options):
        when = "no divergence" if decided is None else f"the divergence {decided:g}"
        raise InputError(f"its own-share is {own:g}, which --predictor {options.predictor} does not give for {when}")
    return Answer(loss, divergence, Start(predictor=own, divergence=decided), upload)


def takes(own: float, decided: float | None, options: Options) -> bool:
    """Whether a party can begin a round with this share of its own predictor. decided: its divergence, None in its first round."""
    if decided is None:
        return own == 0
    shares = {"global": 0, "local": 1, "dapu": fedu.dapu(decided, options.mu)}
    return own == shares.get(options.predictor, own)


def read_receipt(reply: Message) -> None:
    """A party's answer to `Final`, which has no fields."""
    records(reply)


# ------------------------------------------------------------------------------------------------------- at a party


def read_question(message: Message) -> Request:
    """The server's question who a party is."""
    config = records(message, config=ConfigRecord)[0]
    expect_fields(config, REQUEST)
    return read_request(config)


def read_order(message: Message) -> Order:
    """The server's message that begins a party's round. The network's length is for the caller to check, who has one to compare with."""
    request, config, received = read_model(message, {"round", "last-round"})
    round_ = number_in(config, "round", int, 0, request.options.rounds - 1)
    return Order(request, round_, number_in(config, "last-round", int, -1, round_ - 1), received)


def read_final(message: Message) -> Final:
    """The server's message after the last round, to a party that keeps its BatchNorm; the network's length as in `read_order`."""
    request, config, received = read_model(message, {"last-round"})
    if request.options.statistics != "local":
        raise InputError("it has the last model, which only a party with --statistics local gets")
    return Final(request, number_in(config, "last-round", int, 0, request.options.rounds - 1), received)


def read_model(message: Message, further: set[str]) -> tuple[Request, ConfigRecord, Tensor]:
    """What both kinds of messages with a model have. further: the fields that a request does not have."""
    model, config = records(message, model=ArrayRecord, config=ConfigRecord)
    expect_fields(config, REQUEST | further)
    request, received = read_request(config), read_network(model)
    if not received.isfinite().all():
        raise NotFinite("its network is not finite")
    return request, config, received


def read_request(config: ConfigRecord) -> Request:
    """The fields that all kinds of the server's messages have. The run's name becomes a folder's, so that it can be no path."""
    run = config["run"]
    if type(run) is not str or not re.fullmatch("[0-9a-f]{16}", run):
        raise InputError(f"its run is {brief(run)}, needs 16 hexadecimal digits")
    return Request(read_options(config["options"]), run, number_in(config, "image-size", int, *SIDES))


def read_options(text: object) -> Options:
    """The options that a party needs, from JSON. Raises InputError for others, and for those that would let private networks leave."""
    try:
        given = json.loads(text) if type(text) is str else None
        known = type(given) is dict and sorted(given) == SENT_OPTIONS
        # before anything looks at it: a method may be a file, which would be run
        if known and (given["method"] not in FLOWER_METHODS or given["aggregate"] != "online"):
            asked = f"--method {brief(given['method'])} --aggregate {brief(given['aggregate'])}"
            raise InputError(f"it asks for {asked}, which no party uploads")
        options = Options(**given) if known else None
        known = known and given == {name: getattr(options, name) for name in SENT_OPTIONS}  # each is said, as a value of its own type
    except InputError as error:
        raise InputError(f"its options are wrong: {error}") from None
    except Exception as error:  # whatever JSON, or a value of another kind, makes the lines above raise
        raise InputError(f"its options cannot be read ({first_line(error)})") from None
    if not known:
        raise InputError(f"its options are {brief(text)}, and not those that are known here: its code is of another version")
    return options


# ------------------------------------------------------------------------------------------------- records and fields


def records(message: Message, **kinds: type) -> list:
    """The records of a message, which has one of each of these kinds by name, and no others."""
    if not message.has_content():
        raise InputError(printable(message.error.reason or "an error without a reason"))
    if wrong := message.content.keys() ^ kinds.keys():
        name = min(wrong)
        raise InputError(f"it {'lacks' if name in kinds else 'has'} the record {brief(name)}, perhaps by code of another version")
    for name, kind in kinds.items():
        if type(message.content[name]) is not kind:
            raise InputError(f"its record {name} is of the kind {type(message.content[name]).__name__}, needs {kind.__name__}")
    return [message.content[name] for name in kinds]


def expect_fields(record: ConfigRecord, names: set[str], optional: set[str] = frozenset()) -> None:
    """Raise InputError if a field is missing, or if there is one that nobody expects."""
    if missing := names - record.keys():
        raise InputError(f"it lacks the field {min(missing)}, perhaps by code of another version")
    if further := record.keys() - names - optional:
        raise InputError(f"it has the field {brief(min(further))}, which is unknown here, perhaps by code of another version")


def number_in(record: ConfigRecord, name: str, kind: type, low: float, high: float) -> float:
    """A field that is exactly of this kind, int or float, and lies in [low, high]; neither a NaN nor a bool is."""
    value = record[name]
    if type(value) is not kind or not low <= value <= high:
        article = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"its {name} is {brief(value)}, needs {article} from {low:.10g} to {high:.10g}")
    return value


def read_network(record: ArrayRecord) -> Tensor:
    """The single array of a record, `model`: float32 `[P]`. Its header is parsed, and its bytes are copied: nothing is unpickled."""
    if record.keys() != {"model"}:
        raise InputError(f"its record model holds the arrays {brief(sorted(record))}, needs one of the name model")
    array = record["model"]
    if array.stype != "numpy.ndarray":
        raise InputError(f"its network is stored as {brief(array.stype)}, needs numpy.ndarray")
    try:
        file = io.BytesIO(array.data)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin = file.tell()
    except Exception as error:  # whatever bytes that are no array's make numpy raise
        raise InputError(f"its network cannot be read ({printable(first_line(error))})") from None
    if dtype != np.float32 or len(shape) != 1:
        raise InputError(f"its network is {printable(str(dtype))} {brief(list(shape))}, needs a vector of float32")
    if len(array.data) - begin != 4 * shape[0]:
        raise InputError(f"its network has {len(array.data) - begin} bytes, {brief(shape[0])} numbers need {brief(4 * shape[0])}")
    return torch.from_numpy(np.frombuffer(array.data, np.float32, offset=begin).copy())


def brief(value: object) -> str:
    """A value that somebody else sent, for use in a sentence: its Python form, at most 60 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """A sentence that somebody else sent, fit for a line of a log: at most 500 characters, none of which moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text[:500])
