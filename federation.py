"""The parties of a run, servers and clients: made from the seed, sampled for a round, stored in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import Images, keyed_generator, partition
from models import OBJECTIVES, Objective, Segment, conv_segments
from options import METHODS, Options
from runtime.bank import Row
from runtime.cli import write_atomic
from runtime.run import Checkpoint


@dataclass
class Client:
    """One party: its images, and what it keeps between its rounds, apart from its networks, which lie in the bank."""

    id: int
    indices: Tensor  # its images, as indices into the data set
    row: Row | None = None  # where its networks lie in the bank; None before its first round
    divergence: float | None = None  # d_k of its last round
    ema_scale: float | None = None  # lambda_k of FedEMA
    last_round: int | None = None

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    def fix_ema_scale(self, divergence: float, tau: float) -> None:
        """`lambda_k = tau / d_k` by the first divergence that was measured; later ones change nothing."""
        if self.ema_scale is None and divergence:
            self.ema_scale = tau / divergence


REMEMBERED = ("divergence", "ema_scale", "last_round")  # of a client, in a checkpoint


@dataclass
class Server:
    """The global model `[P]`, the clients that it averages, and the representations `[N, d]` that these shared in the last round."""

    model: Tensor
    dictionary: Tensor
    clients: list[Client]


class Update(NamedTuple):
    """What a client received: whose predictor (global, local, mixed, - for none), the share of its own in it, what divergence decided."""

    predictor: str
    own_share: float
    divergence: float | None


@dataclass
class Turn:
    """A client's part in one round."""

    client: Client
    server: Server
    total: int  # n: the images of all clients that train for this server in the round
    update: Update | None = None
    received: Tensor | None = None
    loss: float = math.nan
    representations: Tensor | None = None  # that it shares besides its networks, `[N, d]`

    @property
    def weight(self) -> float:
        """n_k / n."""
        return self.client.num_examples / self.total


@dataclass
class Federation:
    """The servers with their clients, the networks that all of these train in turn, and the images that they train on."""

    servers: list[Server]
    objective: Objective
    images: Tensor  # uint8 `[N, 3, S, S]`
    segments: Tensor  # what divergence is measured on, `[L, 2]`
    public: Tensor  # the images that no client has, as indices
    step: Callable[[Tensor], None] | None = None  # of local training, from the first client on: it keeps its CUDA graph

    @property
    def clients(self) -> list[Client]:
        return [client for server in self.servers for client in server.clients]

    def load(self, server: Server) -> nn.Module:
        """Load a server's model into the networks; returns their backbone."""
        self.objective.online.vector.copy_(server.model)
        return self.objective.online.module.encoder.backbone

    def describe(self) -> str:
        """How many clients there are, and how many images they have."""
        sizes = sorted(client.num_examples for client in self.clients)
        spread = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
        return f"{len(sizes)} client{'s' * (len(sizes) > 1)} of {spread}"


# ------------------------------------------------------------------------------------------------- made from the seed


def build(options: Options, images: Images) -> Federation:
    """The servers of a method with their clients; all start from the same network, which the seed initialises."""
    method, device = METHODS[options.method], images.x_train.device
    order = np.random.default_rng([options.seed, *b"public"]).permutation(len(images.y_train))
    count = max(options.batch_size, round(method.public * len(order))) if method.public else 0
    public, private = np.sort(order[:count]), np.sort(order[count:])
    clients_and_kind = (1, "iid") if method.servers == "pooled" else (options.clients, options.partition)
    parts = partition(
        images.y_train.cpu().numpy()[private], *clients_and_kind, options.seed,
        options.classes_per_client, options.alpha, at_least=options.batch_size,
    )  # fmt: skip
    clients = [Client(k, torch.from_numpy(private[part]).to(device)) for k, part in enumerate(parts)]
    groups = [[client] for client in clients] if method.servers == "each" else [clients]
    return assemble(options, groups, images.x_train, images.y_train, torch.from_numpy(public).to(device))


def assemble(options: Options, groups: list[list[Client]], images: Tensor, labels: Tensor, public: Tensor | None = None) -> Federation:
    """A federation of a server for each group of clients. images: uint8 `[N, 3, S, S]` on the device to train on. labels: `[N]`."""
    objective = build_objective(options, labels, images.device)
    servers = [Server(objective.online.vector.clone(), objective.shared, group) for group in groups]
    segments = divergence_segments(objective, options.divergence)
    return Federation(servers, objective, images, segments, torch.empty(0) if public is None else public)


def build_objective(options: Options, labels: Tensor, device: torch.device) -> Objective:
    """The method's objective with its networks, initialised by the seed."""
    torch.manual_seed(options.seed)
    ablation = {name: False for name in ("predictor", "stop_gradient") if getattr(options, f"no_{name}")}
    objective = OBJECTIVES[METHODS[options.method].objective](options.encoder, device, labels, **ablation)
    if options.compile:
        objective.compile()
    return objective


def divergence_segments(objective: Objective, kind: str) -> Tensor:
    """What d_k is measured on, `[L, 2]`: each convolution for `layer-mean` (authors' code), the whole encoder for `squared` (paper)."""
    weights = objective.weights["encoder"]
    segments = conv_segments(objective.online) if kind == "layer-mean" else [Segment("encoder", weights.start, weights.stop)]
    return torch.tensor([[begin, end] for _, begin, end in segments])


# ------------------------------------------------------------------------------------------------ sampled for a round


def draw_turns(servers: list[Server], options: Options, round_: int) -> tuple[list[Turn], set[int]]:
    """The turns of a round and the clients that drop out. Turns with the most images come first, so that neighbours take about as long."""
    selected = sample_clients(sum(len(server.clients) for server in servers), options.clients_per_round, options.seed, round_)
    dropped = {k for k in selected if drops_out(k, options.dropout, options.seed, round_)}
    turns = []
    for server in servers:
        members = [client for client in server.clients if client.id in selected - dropped]
        total = sum(client.num_examples for client in members)
        turns += [Turn(client, server, total) for client in members]
    return sorted(turns, key=lambda turn: (-turn.client.num_examples, turn.client.id)), dropped


def most_uploads(servers: list[Server], per_round: int | None) -> int:
    """The most uploads that one server can get in a round. per_round: clients drawn for a round, of all servers together."""
    members = max(len(server.clients) for server in servers)
    return min(members, per_round or members)


def sample_clients(clients: int, per_round: int | None, seed: int, round_: int) -> set[int]:
    """The ids of the clients that take part in a round: drawn without replacement, by (seed, round)."""
    generator = keyed_generator(torch.device("cpu"), seed, "clients", round_)
    return set(torch.randperm(clients, generator=generator)[:per_round].tolist())


def drops_out(client: int, probability: float, seed: int, round_: int) -> bool:
    """Whether a selected client fails to report."""
    return torch.rand((), generator=keyed_generator(torch.device("cpu"), seed, "dropout", round_, client)).item() < probability


# ---------------------------------------------------------------------------------------------- stored in checkpoints


def checkpoint(federation: Federation, rounds: int, seconds: float) -> Checkpoint:
    """All that the next round depends on."""
    tensors = [tensor for server in federation.servers for tensor in (server.model, server.dictionary)]
    remembered = {name: [getattr(client, name) for client in federation.clients] for name in REMEMBERED}
    rows = [client.row for client in federation.clients]
    return Checkpoint(tensors, rows, {"round": rounds, "seconds": seconds, "clients": remembered})


def restore(federation: Federation, saved: Checkpoint | None) -> tuple[int, float]:
    """Put a checkpoint's content back in place; returns the rounds that are done and the seconds that they took."""
    if saved is None:
        return 0, 0.0
    for server, model, dictionary in zip(federation.servers, saved.tensors[::2], saved.tensors[1::2], strict=True):
        server.model, server.dictionary = model, dictionary
    for k, client in enumerate(federation.clients):
        client.row = saved.rows[k]
        for name in REMEMBERED:
            setattr(client, name, saved.values["clients"][name][k])
    return saved.values["round"], saved.values["seconds"]


def save_encoders(out: Path, name: str, federation: Federation) -> None:
    """encoder.pt: `{"encoder": name, "head": projector's widths, "encoders": [{"backbone", "projector"}, ...]}`, one for each server."""
    encoder, encoders = federation.objective.online.module.encoder, []
    for server in federation.servers:
        federation.load(server)
        encoders.append({part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in encoder.named_children()})
    content = {"encoder": name, "head": list(encoder.head), "encoders": encoders}
    write_atomic(out / "encoder.pt", lambda file: torch.save(content, file))
