"""A party's side of FedU on Flower: it trains on its own images, and keeps target encoder, predictor and local BatchNorm on its own disk.

A SuperNode starts it for each message. Its `--node-config` says which client it is (`client`, from 0), where its images lie (`data`, a file
PATH.npz or a folder; labels are not needed), and, if need be, the folder for what it keeps (`state`) and the `device`. What it sends is
what `fedu.py` counts as upload_bytes, who it is, how many images it has, and its loss, its divergence and the share of its own predictor.
With `dp-clip` these last three stay, and what it uploads is clipped, and with `dp-noise` noised, whatever the server's options say.
"""

import math
import sys
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from messages import FINAL, Request, read_final, read_order, read_question
from torch import Tensor

import fedu
import ops
from data import load_unlabelled
from federation import Client, Federation, Turn, assemble
from models import save_encoders
from options import OPTIONS, Options
from runtime.bank import Bank
from runtime.cli import InputError, command_line, locked, os_errors, user_path
from runtime.device import choose_device, keep_memory
from runtime.privacy import count_upload, epsilon, system_normal
from runtime.run import load_checkpoint, save_checkpoint, write_config, write_metrics
from training import train_client

NODE_CONFIG = {"client", "data", "pixel-range", "skip-broken", "no-cache", "state", "device", "statistics"}
NODE_CONFIG |= {"dp-clip", "dp-noise", "dp-delta"}


class Privacy(NamedTuple):
    """The differential privacy of what this party uploads, as the options of `fedu.py` have it. noise: 0 for none."""

    clip: float
    noise: float
    delta: float


class ReportedError(InputError):
    """An error whose text is sent to the server; `__cause__`, if set, is the version with file names, printed only here."""


@command_line()
def answer(message: Message, context: Context, call_next) -> Message:
    """Print here what is wrong. The server goes on without this client; of the error it gets the text of a `ReportedError` only."""
    try:
        return call_next(message, context)
    except ReportedError as error:
        here, there = error.__cause__ or error, str(error)
    except InputError as error:
        here, there = error, "its own log says why"
    except Exception:  # whose text may hold anything
        here, there = traceback.format_exc(), "its own log says why"
    print(f"client {context.node_config.get('client')}: error: {here}", file=sys.stderr, flush=True)
    return Message(Error(code=2, reason=there), reply_to=message)


app = ClientApp(mods=[answer])


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Answer the server's first question: which client this is, and how many images it has."""
    with reported("the server's question is refused"):
        request = read_question(message)
    client = open_client(context, request)[0]
    read_privacy(context)
    return Message(RecordDict({"client": ConfigRecord({"id": client.id, "num-examples": client.num_examples})}), reply_to=message)


@app.query("alive")
def alive(message: Message, context: Context) -> Message:
    """Reply to a liveness query: a node that replies holds no unfinished training message (see `strategy.exchange`)."""
    return Message(RecordDict(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: take what the server sends, train, and upload the online encoder, and the predictor unless it is local."""
    begun = time.perf_counter()
    with reported("the server's message is refused"):
        request, round_, last_round, received = read_order(message)
    client, images = open_client(context, request)
    privacy, state = read_privacy(context), state_folder(context)
    turn, upload = take_turn(client, images, received, request.options, round_, last_round, client_folder(context, request), privacy)
    if privacy:
        told = count_upload(state / f"privacy-{client.id}.json", request.run, privacy.noise, privacy.delta)
        print(f"client {client.id}, round {round_}: {told}", flush=True)
        report = {}
    else:
        divergence = math.nan if client.divergence is None else client.divergence  # of an upload that is not finite
        report = {"loss": turn.loss, "divergence": divergence, "own-share": turn.start.predictor}
        if turn.start.divergence is not None:
            report["decided-on"] = turn.start.divergence
    model = ArrayRecord({"model": Array(upload.cpu().numpy())})
    print(round_line(client, turn, round_, request.options.rounds, upload.nbytes, time.perf_counter() - begun), flush=True)
    return Message(RecordDict({"model": model, "turn": ConfigRecord(report)}), reply_to=message)


@app.query(FINAL)
def keep_encoder(message: Message, context: Context) -> Message:
    """After the last round, if BatchNorm is local: write this client's own encoder, with which its folder is one that `eval.py` reads."""
    with reported("the server's message is refused"):
        request, last_round, received = read_final(message)
    client, images = open_client(context, request)
    folder, options = client_folder(context, request), request.options
    data = user_path(str(context.node_config["data"])).resolve()
    own = {"dataset": str(data)} | ({"image_size": request.image_size} if data.is_dir() else {})
    with restored(client, images, received, options, last_round, folder) as (federation, bank):
        if client.row is None:
            raise ReportedError(f"it has no encoder, since what it kept after round {last_round} is lost, its BatchNorm with it")
        write_config(folder, {"options": asdict(options) | own, "run": request.run})
        write_metrics(folder, [])
        save_encoders(folder, request.image_size, federation.encoders(bank))
    print(f"client {client.id}: {folder}/encoder.pt is its encoder, the server's last model with its own BatchNorm", flush=True)
    return Message(RecordDict(), reply_to=message)


def round_line(client: Client, turn: Turn, round_: int, rounds: int, size: int, seconds: float) -> str:
    """What a party's log says about a round. size: bytes of the network that leaves."""
    predictor = {0.0: "the server's predictor", 1.0: "its own predictor"}.get(turn.start.predictor, "a mixed predictor")
    divergence = "" if client.divergence is None else f", divergence {client.divergence:.4f}"
    trained = f"client {client.id}, round {round_} of 0 to {rounds - 1}: loss {turn.loss:.4f}{divergence}, began with {predictor}"
    return f"{trained}, sends {size / 1e6:.2f} MB after {seconds:.1f} s"


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Let the server read an InputError about what it sent."""
    try:
        yield
    except InputError as error:
        raise ReportedError(f"{what}: {error}") from None


def take_turn(
    client: Client, images: Tensor, received: Tensor, options: Options, round_: int, last_round: int, folder: Path,
    privacy: Privacy | None = None,
) -> tuple[Turn, Tensor]:  # fmt: skip
    """A client's part in a round, as that of a federation with this one client, whose checkpoint lies in `folder`.

    received: what is sent of the server's model. last_round: the last one of which the server has this
    client's upload, -1 for none; what the client kept after a later one is not used. Returns its turn and its upload, which has the
    privacy that is asked for, while what the client keeps has neither bound nor noise.
    """
    with restored(client, images, received, options, last_round, folder) as (federation, bank):
        (server,), networks = federation.servers, federation.networks
        turn = Turn(client, server, client.num_examples)
        job = fedu.start_turn(options, federation, bank, round_, 1, turn)
        turn.loss, turn.shared = train_client(options, federation, None, *job)
        upload = fedu.model_upload(networks, options.aggregate)
        finite = math.isfinite(turn.loss) and bool(upload.isfinite().all())
        leaves = upload if finite else torch.full_like(upload, math.nan)  # also if only what is not sent is not finite
        if privacy:
            leaves = upload.clone()
            fedu.privatise_(leaves, server.model, networks, privacy.clip, privacy.noise, system_normal)
        if finite:  # else it keeps what it had, and the server refuses the upload
            fedu.record_divergence(client, ops.layer_norms(networks.online.vector, turn.received, federation.segments), options)
            server.model.copy_(upload)  # with what the server does not send, such as a local predictor
            client.row, client.last_round = bank.write(fedu.kept_parts(networks, options)), round_
            save_checkpoint(folder, federation.checkpoint(round_ + 1, 0.0), bank)
        return turn, leaves[networks.sent]


@contextmanager
def restored(
    client: Client, images: Tensor, received: Tensor, options: Options, last_round: int, folder: Path
) -> Iterator[tuple[Federation, Bank]]:  # fmt: skip
    """A federation of this client as its checkpoint in `folder` has it, with what the server sent in its server's model, and its bank."""
    federation = assemble(options, [[client]], images, torch.empty(0))  # labels are looked at by no method that runs here
    (server,), networks = federation.servers, federation.networks
    sent = networks.sent
    if len(received) != (count := int(sent.sum())):
        raise ReportedError(f"the server sent a network of {len(received)} numbers, that of --encoder {options.encoder} has {count} here")
    with os_errors(f"the state folder {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"{folder} is in use by another SuperNode: give each client a folder of its own"):
        bank = Bank(fedu.kept_parts(networks, options), folder / "bank.bin")
        recall(federation, bank, folder, last_round)
        server.model[sent] = received.to(images.device)
        yield federation, bank


def recall(federation: Federation, bank: Bank, folder: Path, last_round: int) -> None:
    """Restore what the client kept after `last_round`; without it, or with -1, this is its first round."""
    client = federation.clients[0]
    for _ in range(2):  # the last checkpoint and the one before
        try:
            saved = load_checkpoint(folder, bank, federation.images.device)
        except InputError as error:  # both are damaged: what they held is lost, and the party goes on
            print(f"client {client.id}: {error}", file=sys.stderr, flush=True)
            break
        if saved and saved.values["clients"]["last_round"][0] == last_round:
            federation.restore(saved)
            return
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # its upload never reached the server
    if last_round >= 0:
        print(
            f"client {client.id}: {folder} does not hold what it kept after round {last_round}; it starts as in its first round",
            file=sys.stderr,
            flush=True,
        )


def state_folder(context: Context) -> Path:
    """The folder for all that this client writes, which nobody else may read; made if need be."""
    folder = user_path(str(context.node_config.get("state", "fedu-state")), "--node-config state")
    with os_errors(f"the state folder {folder} cannot be made, or closed to other users"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:  # made by somebody else
            folder.chmod(0o700)
    return folder


def client_folder(context: Context, request: Request) -> Path:
    """The folder for what this client keeps of a run."""
    return state_folder(context) / request.run / f"client-{context.node_config['client']}"


def read_privacy(context: Context) -> Privacy | None:
    """What `--node-config` says about privacy, None without `dp-clip`. Raises ReportedError for what is wrong, so that nothing leaves."""
    given = {}
    for name in ("dp-clip", "dp-noise", "dp-delta"):
        if name in context.node_config:
            try:
                given[name] = OPTIONS[name.replace("-", "_")].metadata["type"](str(context.node_config[name]))
            except ArgumentTypeError as error:
                raise ReportedError(f"--node-config {name} {error}") from None
    for name, other in (("dp-noise", "dp-clip"), ("dp-delta", "dp-noise")):
        if name in given and other not in given:
            raise ReportedError(f"--node-config {name} changes nothing without {other}")
    if not given:
        return None
    privacy = Privacy(given["dp-clip"], given.get("dp-noise", 0.0), given.get("dp-delta", OPTIONS["dp_delta"].default))
    with reported("--node-config dp-noise cannot be used"):
        epsilon({privacy.noise: 1}, privacy.delta)  # so that what computes it is here before anything leaves
    return privacy


def open_client(context: Context, request: Request) -> tuple[Client, Tensor]:
    """This client and its images `[N, 3, S, S]`. Raises InputError for what the party has to mend."""
    keep_memory()
    node, options = context.node_config, request.options
    if missing := {"client", "data"} - node.keys():
        raise ReportedError(f"--node-config has no {min(missing)}; it needs at least 'client=0 data=\"PATH\"'")
    if unknown := node.keys() - NODE_CONFIG:
        raise ReportedError(f"--node-config has the unknown key {min(unknown)}; it knows {', '.join(sorted(NODE_CONFIG))}")
    if type(node["client"]) is not int or not 0 <= node["client"] < options.clients:
        raise ReportedError(f"--node-config got client={node['client']}; the federation has the clients 0 to {options.clients - 1}")
    if (own := node.get("statistics", options.statistics)) != options.statistics:
        raise ReportedError(f"--node-config got statistics={own}, and the run has --statistics {options.statistics}")
    data, state = user_path(str(node["data"]), "--node-config data"), state_folder(context)
    try:
        images = load_unlabelled(
            data, request.image_size, node.get("pixel-range"), bool(node.get("skip-broken")),
            None if node.get("no-cache") else state,
        )  # fmt: skip
        if len(images) < options.batch_size:
            raise InputError(f"{data} has {len(images)} images, a batch needs {options.batch_size}")
    except InputError as error:  # a file's name may be a patient's; what the system says, in brackets, may name one
        raise ReportedError(str(error).replace(str(data), "DATA").partition(" (")[0]) from error
    images = images.to(choose_device(node.get("device", "auto")))
    return Client(node["client"], torch.arange(len(images), device=images.device)), images
