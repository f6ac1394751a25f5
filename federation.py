"""The parties of a run, servers and clients: made from the seed, drawn for a round, stored in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Images, client_indices, keyed_generator, require
from methods import find, refuse_networks
from models import Encoder, Objective, Segment, batchnorm_places, initialise, layer_segments
from options import Options, row_of
from runtime.bank import Bank, Row
from runtime.cli import user_path
from runtime.run import Checkpoint
from runtime.uploads import Outlier


@dataclass
class Client:
    """One party: its images, and what it keeps between its rounds. The networks that it keeps lie in the bank."""

    id: int
    indices: Tensor  # its images, as indices into the data set
    row: Row | None = None  # where its networks lie in the bank; None before its first round
    divergence: float | None = None  # d_k of its last round
    ema_scale: float | None = None  # lambda_k of FedEMA
    last_round: int | None = None

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    def set_ema_scale_once(self, divergence: float, tau: float) -> None:
        """`lambda_k = tau / d_k`, set from the first measured divergence, and kept."""
        if self.ema_scale is None and divergence:
            self.ema_scale = tau / divergence


REMEMBERED = ("divergence", "ema_scale", "last_round")  # what a checkpoint stores of each client


@dataclass(eq=False)
class Server:
    """The global model `[P]`, the clients whose uploads it averages, and what its rule keeps from round to round, by name.

    If `state` has an entry `shared`, `[N, d]`, clients get it with the model.
    """

    model: Tensor
    clients: list[Client]
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def communicates(self) -> bool:
        """False if the server has a single client: then nothing is sent."""
        return len(self.clients) > 1

    def take(self, model: Tensor, unsent: Tensor) -> None:
        """Let this be the next model, except in the places that no client sends, which stay without an average's rounding."""
        kept = self.model[unsent]
        self.model.copy_(model)
        self.model[unsent] = kept


class Start(NamedTuple):
    """What a client starts a round with: the share of its own, 0 to 1, in each network; the rest is the server's.

    divergence: the one that decided; None if the client took everything from the server. predictor: None if a client does not tell it.
    """

    encoder: float = 0.0
    predictor: float | None = 0.0
    target: float = 0.0
    divergence: float | None = None


@dataclass
class Turn:
    """One client's participation in one round."""

    client: Client
    server: Server
    total: int  # n: the images of all clients that train for this server in the round
    start: Start = Start()
    received: Tensor | None = None  # the online network that it began with, `[P]`
    loss: float = math.nan
    shared: Tensor | None = None  # what it shares besides its networks, `[N, d]`
    row: Row | None = None  # where the bank has what the client keeps if its upload is taken
    outlier: Outlier | None = None

    @property
    def taken(self) -> bool:
        """Whether its upload, once accepted, is in the mean: it is, unless it was left out as an outlier."""
        return self.outlier is None or self.outlier.shortened

    @property
    def fraction(self) -> float:
        """n_k / n."""
        return self.client.num_examples / self.total


@dataclass
class Federation:
    """The servers with their clients, the workspace in which these train in turn, and the images that they train on."""

    servers: list[Server]
    networks: Objective  # the workspace: while a client trains, it holds that client's networks
    images: Tensor  # uint8 `[N, 3, S, S]`
    segments: Tensor  # what divergence is measured on, `[L, 2]`
    public: Tensor  # indices of the images that no client has
    step: Callable[[Tensor], None] | None = None  # the step of local training: built once and reused, since it owns the CUDA graph

    @property
    def clients(self) -> list[Client]:
        return [client for server in self.servers for client in server.clients]

    def load(self, server: Server) -> Encoder:
        """Load a server's model into the workspace; returns its encoder."""
        self.networks.online.vector.copy_(server.model)
        return self.networks.online.module.encoder

    def encoders(self, bank: Bank) -> Iterator[Encoder]:
        """Each trained encoder, in the workspace until the next is asked for: one for each server.

        If clients keep BatchNorm for themselves, one for each client that took part: the server's with the client's BatchNorm.
        """
        for server in self.servers:
            rows = [client.row for client in server.clients if client.row] if len(self.networks.private) else []
            for row in rows or [None]:
                encoder = self.load(server)
                if row:
                    self.networks.online.vector[self.networks.private] = bank.read(row)["private"]
                yield encoder

    def describe(self) -> str:
        """How many clients there are, and how many images they have."""
        sizes = sorted(client.num_examples for client in self.clients)
        spread = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
        return f"{len(sizes)} client{'s' * (len(sizes) > 1)} of {spread}"

    # ---- as a checkpoint

    def checkpoint(self, rounds: int, seconds: float) -> Checkpoint:
        """Everything that the next round depends on. rounds: how many are done. seconds: how long they took."""
        tensors = [{"model": server.model, **server.state} for server in self.servers]
        remembered = {name: [getattr(client, name) for client in self.clients] for name in REMEMBERED}
        rows = [client.row for client in self.clients]
        return Checkpoint(tensors, rows, {"round": rounds, "seconds": seconds, "clients": remembered})

    def restore(self, saved: Checkpoint) -> None:
        """Put a checkpoint's content back in place."""
        for server, named in zip(self.servers, saved.tensors, strict=True):
            server.model, server.state = named["model"], {name: tensor for name, tensor in named.items() if name != "model"}
        for k, client in enumerate(self.clients):
            client.row = saved.rows[k]
            for name in REMEMBERED:
                setattr(client, name, saved.values["clients"][name][k])


# ------------------------------------------------------------------------------------------------- made from the seed


def build(options: Options, images: Images) -> Federation:
    """The federation of a method: its servers with their clients. All start from the same network, which the seed initialises."""
    method, device = row_of(options.method), images.x_train.device
    if method.uses_labels:
        require(images, f"--method {options.method}", test=False)
    order = np.random.default_rng([options.seed, *b"public"]).permutation(len(images.x_train))
    if len(images.owners):
        order = order[images.owners.numpy()[order] >= 0]
    count = max(options.batch_size, round(method.public * len(order))) if method.public else 0
    public, private = np.sort(order[:count]), np.sort(order[count:])
    num_clients, kind = (1, "iid") if method.servers == "pooled" else (options.clients, options.partition)
    parts = client_indices(
        images, private, num_clients, kind, options.seed, options.classes_per_client, options.alpha, at_least=options.batch_size
    )
    clients = [Client(k, torch.from_numpy(part).to(device)) for k, part in enumerate(parts)]
    groups = [[client] for client in clients] if method.servers == "each" else [clients]
    return assemble(options, groups, images.x_train, images.y_train, torch.from_numpy(public).to(device))


def assemble(options: Options, groups: list[list[Client]], images: Tensor, labels: Tensor, public: Tensor | None = None) -> Federation:
    """A federation of a server for each group of clients. images: uint8 `[N, 3, S, S]` on the device to train on. labels: `[N]`."""
    networks = build_networks(options, labels, images.device, images.shape[-1])
    servers = [Server(networks.online.vector.clone(), group) for group in groups]
    segments = divergence_segments(networks, options.divergence)
    return Federation(servers, networks, images, segments, torch.empty(0) if public is None else public)


def build_networks(options: Options, labels: Tensor, device: torch.device, image_size: int = 32) -> Objective:
    """The method's objective with its networks, initialised by the seed. image_size: of the images, in pixels."""
    row = row_of(options.method)
    torch.manual_seed(options.seed)
    how: dict[str, Any] = {name: options.settings[name] for name in row.settings}
    how |= {name: False for name in ("predictor", "stop_gradient") if getattr(options, f"no_{name}")}
    how |= {"labels": labels} if row.uses_labels else {}
    head = (int(labels.max()) + 1,) if row.uses_labels else row.head
    networks = find(row.objective)(Encoder(options.encoder, head, options.norm, image_size), device, **how)
    refuse_networks(networks, options)
    if options.statistics == "local":
        networks.private = batchnorm_places(networks.online)
    networks.unsent = networks.private
    if options.predictor == "local":  # nothing that begins with the predictor is sent
        start, end = len(networks.parts["encoder"]), len(networks.online.vector)
        networks.unsent = torch.cat([networks.private[networks.private < start], torch.arange(start, end, device=device)])
    networks.decorrelation = options.settings["decorrelation"]
    if options.init:
        initialise(networks.online.module.encoder, user_path(options.init))
    if options.compile:
        networks.compile()
    return networks


def divergence_segments(networks: Objective, kind: str) -> Tensor:
    """What d_k is measured on, `[L, 2]`: the backbone's layers for `layer-mean` (authors' code), the encoder for `squared` (paper)."""
    parameters = networks.param_slices["encoder"]
    segments = layer_segments(networks.online) if kind == "layer-mean" else [Segment("encoder", parameters.start, parameters.stop)]
    return torch.tensor([[begin, end] for _, begin, end in segments])


# ------------------------------------------------------------------------------------------------ sampled for a round


def draw_turns(servers: list[Server], options: Options, round_: int) -> tuple[list[Turn], set[int]]:
    """The turns of a round, and the ids of the clients that drop out.

    A server's turns lie side by side, those with the most images first, so that clients trained side by side take about equally long.
    """
    selected = sample_clients(sum(len(server.clients) for server in servers), options.clients_per_round, options.seed, round_)
    dropped = {k for k in selected if drops_out(k, options.dropout, options.seed, round_)}
    groups = []
    for server in servers:
        members = [client for client in server.clients if client.id in selected - dropped]
        total = sum(client.num_examples for client in members)
        turns = [Turn(client, server, total) for client in members]
        groups.append(sorted(turns, key=lambda turn: (-turn.client.num_examples, turn.client.id)))
    groups.sort(key=lambda turns: -turns[0].client.num_examples if turns else 0)
    return [turn for turns in groups for turn in turns], dropped


def most_uploads(servers: list[Server], per_round: int | None) -> int:
    """The most uploads that one server can get in a round. per_round: how many clients are drawn, of all servers together."""
    members = max(len(server.clients) for server in servers)
    return min(members, per_round or members)


def sample_clients(clients: int, per_round: int | None, seed: int, round_: int) -> set[int]:
    """The ids of the clients that take part in a round: drawn without replacement, by (seed, round)."""
    generator = keyed_generator(torch.device("cpu"), seed, "clients", round_)
    return set(torch.randperm(clients, generator=generator)[:per_round].tolist())


def drops_out(client: int, probability: float, seed: int, round_: int) -> bool:
    """Whether a selected client fails to report."""
    return torch.rand((), generator=keyed_generator(torch.device("cpu"), seed, "dropout", round_, client)).item() < probability
