"""FedU: collaborative unsupervised visual representation learning from decentralized data (Zhuang et al., ICCV 2021).

Clients hold unlabelled images that never leave them. In each round every selected client trains BYOL on its own images and uploads its
online encoder and predictor, and the server averages them. A client then takes the averaged encoder, and the averaged predictor only if
its last divergence was below mu (DAPU). One process, or several under torchrun, simulate the whole federation.

    python fedu.py                                    five clients on the embedded images, a minute on two cores
    python fedu.py --dataset cifar100 --clients 5     the paper's run

| word           | paper (FedU, section 3)                                                                                  |
|----------------|----------------------------------------------------------------------------------------------------------|
| model `[P]`    | theta: online encoder and predictor as one vector, BatchNorm's statistics included; the server's is phi  |
| received `[P]` | the online network that a client begins its round with                                                   |
| divergence     | d_k: how far the online encoder moved from the received one in local training                            |
| mu             | the threshold of the divergence-aware predictor update (DAPU)                                            |
"""

from __future__ import annotations

from options import METHODS, Command, Exchange, Options, Training, parse

if __name__ == "__main__":
    COMMAND = parse(description=__doc__.split("\n\n")[0])  # before torch is imported: --help and mistakes are answered at once

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ops
from data import load_images, seed_of, two_views
from eval import extract_features
from federation import Client, Federation, Server, Turn, Update, build, draw_turns, most_uploads
from models import Objective, SimCLR
from report import tensorboard_log
from runtime import ranks
from runtime.bank import Bank
from runtime.cli import RANK, InputError, user_errors
from runtime.device import GRAPHS_ON, StepGraph, choose_device, keep_memory, release_memory
from runtime.run import Progress, holds_run, open_run, reopen_run, resumable, run_folder
from simulation import Announce, Run, describe_round, load_kernels, run_rounds, stored_options

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
UPLOAD_MEMORY = 2 << 30  # bytes for a round's uploads; larger rounds are aggregated in tiles


# ------------------------------------------------------------------------------------------------------------ a round


def run_round(
    options: Options, federation: Federation, bank: Bank, uploads: Uploads, round_: int, announce: Announce = None
) -> dict:  # fmt: skip
    """The paper's figure 2: download, train and upload for each client, then aggregate. Returns the round's metrics.

    Changes servers and clients. announce: takes an estimate of the round's seconds after its first steps. Raises InputError if no upload
    is finite, or if one is not and `on_nonfinite` is `error`.
    """
    clock, objective = time.perf_counter(), federation.objective
    turns, dropped = draw_turns(federation.servers, options, round_)
    last_turn = {id(turn.server): turn for turn in turns}
    sent = num_exchanged(objective, options) * objective.online.vector.itemsize
    download_bytes = sum(sent + turn.server.dictionary.nbytes for turn in turns if exchanges(turn))
    reported: list[Turn] = []

    def download(turn: Turn) -> tuple[int, int, bool]:
        client, joins = turn.client, turn.client.last_round is None
        kept = bank.read(client.row) if client.row else {}
        turn.update = model_update(client, kept, turn.server.model, objective, options, federation.segments, round_)
        turn.received = objective.online.vector.clone() if starts_from_own_encoder(options) else turn.server.model
        objective.shared = turn.server.dictionary
        return round_, client.id, joins

    steps = sum(num_steps(turn.client, options) for turn in turns)
    with Progress(f"round {round_}", steps // min(ranks.COUNT, len(turns) or 1), announce) as progress:
        train = partial(train_client, options, federation, progress)
        for turn, loss, share in ranks.train_all(turns, download, train, objective):
            client, upload = turn.client, model_upload(objective, options.aggregate, out=uploads.next_row(turn.server))
            if math.isfinite(loss) and upload.isfinite().all():
                turn.loss, turn.representations = loss, share[: METHODS[options.method].dictionary // len(turns)]
                uploads.add(turn)
                if kept := kept_parts(objective, options):
                    client.row = bank.write(kept)
                client.last_round = round_
                reported.append(turn)
            if turn is last_turn[id(turn.server)]:
                uploads.finish(turn.server)
    reported.sort(key=lambda turn: turn.client.id)
    nonfinite = sorted({turn.client.id for turn in turns} - {turn.client.id for turn in reported})
    if nonfinite and (options.on_nonfinite == "error" or not reported):
        who = f"the upload of client {nonfinite[0]} is not" if reported else "no upload is"
        raise InputError(f"round {round_}: {who} finite; lower --lr, or check the images")
    for k in nonfinite:
        print(f"round {round_}: the upload of client {k} is not finite and was left out", file=sys.stderr)
    row = describe_round(round_, cosine(options.lr, round_, options.rounds), reported, dropped, nonfinite)
    upload_bytes = sum(sent + turn.representations.nbytes for turn in reported if exchanges(turn))
    row |= {"upload_bytes": upload_bytes, "download_bytes": download_bytes}
    return row | {"seconds": round(time.perf_counter() - clock, 2)}


def exchanges(turn: Turn) -> bool:
    """Whether models travel in this turn: a server with one client has none to exchange."""
    return len(turn.server.clients) > 1


def num_exchanged(objective: Objective, exchange: Exchange) -> int:
    """How many numbers of a model travel: with `predictor=local` the predictor's, which come last, do not."""
    return len(objective.online.vector) if exchange.predictor != "local" else len(objective.parts["encoder"])


def starts_from_own_encoder(exchange: Exchange) -> bool:
    """Whether each client starts a round from an online network of its own, and not from the server's model."""
    return exchange.update in ("target", "ema")


# ------------------------------------------------------------------------ the four stages of a round (paper, figure 2)


class Step:
    """A step of local training: two views of a batch, the gradient of their loss, and the update of the networks.

    images: uint8 `[N, 3, S, S]`; a batch is an index into them, and `views` draws its two views from `generator`. `lr` and `loss`, the
    sum of the losses so far, are scalars on the device. What a step reads and changes stays where it is from client to client, so that
    on a GPU one graph serves them all.
    """

    def __init__(
        self, objective: Objective, images: Tensor, precision: str = "fp32", views: Callable[..., tuple[Tensor, Tensor]] = two_views
    ):  # fmt: skip
        self.objective, self.images, self.precision, self.views = objective, images, precision, views
        device = images.device
        self.generator = None if device.type == "meta" else torch.Generator(device)  # the meta device has none, and draws nothing
        self.lr, self.loss = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device)
        self.ema_decay = 0.99
        self.graph: StepGraph | None = None
        self.captured: tuple = ()  # what the graph was captured with

    def __call__(self, batch: Tensor) -> None:
        view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in self.views(self.images[batch], self.generator))
        with self.in_bf16():  # around all terms, so that a weight is cast once for them
            for term in self.objective.terms(view1, view2, batch):
                loss = term()
                with self.in_bf16(False):
                    loss.backward()
                self.loss.add_(loss.detach())
        self.objective.update(self.lr, MOMENTUM, WEIGHT_DECAY, self.ema_decay)

    def in_bf16(self, enabled: bool = True) -> AbstractContextManager:
        """A block that computes in bf16 if that is the precision; not enabled, an exception inside such a block."""
        bf16 = self.precision == "bf16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled) if bf16 else nullcontext()

    def launcher(self) -> AbstractContextManager[Callable[[Tensor], None]]:
        """What takes the batches: on a GPU a graph of the step, which is captured again only when what it holds has changed."""
        if self.images.device.type != GRAPHS_ON:
            return nullcontext(self)
        holds = (self.ema_decay, self.objective.shared.data_ptr(), self.objective.shared.shape)
        if self.captured != holds:
            self.graph, self.captured = StepGraph(self, self.generator), holds
        return self.graph


def local_training(step: Step, batches: Iterable[Tensor], lr: float, ema_decay: float = 0.99, progress: Progress | None = None) -> Tensor:
    """Stage 1: train the objective's networks on a client's batches; returns the mean loss, `[]`, still on the device.

    SGD with momentum 0.9, which starts from zero every round, and weight decay 5e-4 on everything. No step makes the host wait for the
    device.
    """
    step.objective.check_views()
    step.lr.fill_(lr)
    step.loss.zero_()
    step.ema_decay, steps = ema_decay, 0
    for weight in step.objective.trained:  # backward() adds to this: momentum and gradient are one vector
        torch.mul(weight.detach(), WEIGHT_DECAY, out=weight.grad)
    with step.launcher() as run_step:
        for batch in batches:
            run_step(batch)
            steps += 1
            if progress is not None:
                progress.update()
    return step.loss / steps


def local_batches(indices: Tensor, epochs: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The batches of `epochs` shuffled passes over a client's images, as indices `[B]`; the last partial one of a pass is dropped."""
    for _ in range(epochs):
        order = indices[torch.randperm(len(indices), generator=generator, device=indices.device)]
        yield from order[: len(order) // batch_size * batch_size].split(batch_size)


def train_client(
    options: Options, federation: Federation, progress: Progress | None, round_: int, client_id: int, joins: bool
) -> tuple[float, Tensor]:  # fmt: skip
    """Train the client whose networks the objective holds; returns its loss and the representations that it shares.

    joins: whether this is the client's first round. Random numbers are keyed by (seed, round, client): the result is the same on any rank.
    """
    objective = federation.objective
    if federation.step is None:
        federation.step = Step(objective, federation.images, options.precision, partial(two_views, jitter=objective.jitter))
    step, indices = federation.step, next(client.indices for client in federation.clients if client.id == client_id)
    step.generator.manual_seed(seed_of(options.seed, "training", round_, client_id))
    batches = local_batches(indices, options.local_epochs, options.batch_size, step.generator)
    ema_decay = 0.0 if options.first_target == "shared" and joins else options.ema_decay
    loss = local_training(step, batches, cosine(options.lr, round_, options.rounds), ema_decay, progress).item()
    share = objective.newest_representations(METHODS[options.method].dictionary)
    release_memory()
    return loss, share


def num_steps(client: Client, training: Training) -> int:
    """Of a client's local training in one round."""
    return client.num_examples // training.batch_size * training.local_epochs


def cosine(lr0: float, round_: int, rounds: int) -> float:
    """`lr0 (1 + cos(pi r / R)) / 2`: cosine over rounds, constant inside a round."""
    return lr0 * (1 + math.cos(math.pi * round_ / rounds)) / 2


def model_upload(objective: Objective, aggregate: str, out: Tensor | None = None) -> Tensor:
    """Stage 2: what a client uploads, `[P]`: the encoder that the server averages, online or target, and the predictor."""
    encoder = objective.parts["encoder" if aggregate == "online" else "target"]
    return torch.cat([encoder, objective.parts["predictor"]], out=out)


def kept_parts(objective: Objective, exchange: Exchange) -> dict[str, Tensor]:
    """The parts that a client keeps from round to round: those that `model_update` does not replace by the server's, or mixes in."""
    kept = {name: True for name in objective.own}
    kept["target"] = "target" in kept and exchange.update in ("online", "ema")
    kept["encoder"] = starts_from_own_encoder(exchange) or exchange.divergence_from == "global"
    kept["predictor"] = exchange.predictor != "global"
    return {name: objective.parts[name] for name, needed in kept.items() if needed}


class Uploads:
    """Stage 3: the uploads of a round as rows of one matrix `[rows, P]`. The server's mean and every drift come from one pass over it.

    The mean is `phi = sum_k (n_k / n) theta_k`, of encoder, predictor and BatchNorm's statistics alike. Where `memory`, in bytes, has
    room for fewer rows than there are uploads, these are aggregated in tiles: the sum so far is then one more row, of weight 1. The
    results are the same bits.
    """

    def __init__(self, federation: Federation, options: Options, memory: int = UPLOAD_MEMORY):
        self.objective, self.exchange, self.segments = federation.objective, options, federation.segments
        like, matrices = self.objective.online.vector, 1 + starts_from_own_encoder(options)
        most = most_uploads(federation.servers, options.clients_per_round)
        rows = min(most, max(2, memory // (matrices * like.nbytes)))
        self.matrix = like.new_empty(rows, len(like))
        self.received = torch.empty_like(self.matrix) if starts_from_own_encoder(options) else None
        self.mean = torch.empty_like(like)
        self.summed: list[Turn] = []  # whose uploads are in the sum so far
        self.waiting: list[Turn] = []  # whose uploads are in the matrix

    @property
    def filled(self) -> int:
        return bool(self.summed) + len(self.waiting)

    def next_row(self, server: Server) -> Tensor:
        """The row for the next upload to this server; when all are taken, their uploads are aggregated first."""
        if self.filled == len(self.matrix):
            self.aggregate(server)
            self.matrix[0] = self.mean
        return self.matrix[self.filled]

    def add(self, turn: Turn) -> None:
        """Accept the upload in the next row. turn: whose trained networks the objective holds."""
        if self.exchange.aggregate == "target":  # the divergence is the online encoder's, whichever is uploaded
            self.measure(turn, ops.layer_norms(self.objective.online.vector, turn.received, self.segments))
        if self.received is not None:
            self.received[self.filled] = turn.received
        turn.received = None  # its memory may go
        self.waiting.append(turn)

    def aggregate(self, server: Server) -> None:
        """Take the waiting uploads into the mean, and measure each one's drift from what its client received."""
        sums = self.filled - len(self.waiting)
        weights = torch.tensor([1.0] * sums + [turn.weight for turn in self.waiting]).to(self.matrix)
        received = server.model if self.received is None else self.received[: self.filled]
        _, drift, _ = ops.aggregate(self.matrix[: self.filled], weights, received, self.segments, out=self.mean)
        if self.exchange.aggregate == "online":
            for turn, norms in zip(self.waiting, drift[sums:], strict=True):
                self.measure(turn, norms)
        self.summed += self.waiting
        self.waiting = []

    def finish(self, server: Server) -> None:
        """Make the mean of the uploads the server's model, after its last turn, if anybody reported."""
        if self.waiting:
            self.aggregate(server)
        if not self.summed:
            return
        reported = sum(turn.client.num_examples for turn in self.summed)
        expected = self.summed[0].total
        if reported < expected:  # some uploads were not finite
            self.mean.mul_(expected / reported)
        server.model, self.mean = self.mean, server.model
        server.dictionary = torch.cat([turn.representations for turn in sorted(self.summed, key=lambda turn: turn.client.id)])
        self.summed = []

    def measure(self, turn: Turn, norms: Tensor) -> None:
        turn.client.divergence = divergence(norms, self.exchange.divergence)
        if self.exchange.divergence_from == "received":
            turn.client.fix_ema_scale(turn.client.divergence, self.exchange.tau)


def model_update(
    client: Client, kept: dict[str, Tensor], model: Tensor, objective: Objective, exchange: Exchange, segments: Tensor, round_: int
) -> Update:  # fmt: skip
    """Stage 4: load what the client trains from into the objective's networks. kept: what it has of `kept_parts`. model: the server's.

    FedU: the online encoder is the server's, the target the client's own, and by DAPU the predictor is the server's if the client's
    divergence is below mu, else its own. FedEMA mixes its own online encoder and predictor in, by `own_share`. The options `update` and
    `predictor` select the other rules. A client that takes part for the first time has everything from the server; so has one of
    FedEMA's that was not in the last round.
    """
    parts = objective.parts
    starts_anew = client.last_round is None or (exchange.update == "ema" and client.last_round != round_ - 1)
    objective.online.vector.copy_(model)
    for name, start in objective.own.items():
        parts[name].copy_(start if starts_anew else kept.get(name, start))
    from_server = "global" if len(parts["predictor"]) else "-"
    if starts_anew:
        return Update(from_server, 0.0, None)
    d = client.divergence
    if exchange.divergence_from == "global":
        d = divergence(ops.layer_norms(kept["encoder"], parts["encoder"], segments), exchange.divergence)
        client.fix_ema_scale(d, exchange.tau)
    mixed = min(1.0, client.ema_scale * d) if client.ema_scale else 0.0
    if exchange.update in ("target", "both"):
        parts["target"].copy_(parts["encoder"])
    if exchange.update == "target":
        parts["encoder"].copy_(kept["encoder"])
    if exchange.update == "ema":
        mix(objective, "encoder", kept["encoder"], mixed)
    own_share = {"global": 0.0, "local": 1.0, "dapu": float(d >= exchange.mu), "ema": mixed}[exchange.predictor]
    if exchange.predictor == "ema":
        mix(objective, "predictor", kept["predictor"], mixed)
    elif own_share:
        parts["predictor"].copy_(kept["predictor"])
    return Update({0.0: from_server, 1.0: "local"}.get(own_share, "mixed"), own_share, d)


def mix(objective: Objective, name: str, own: Tensor, own_share: float) -> None:
    """`received <- own_share own + (1 - own_share) received`, over parameters: BatchNorm's statistics stay those received."""
    weights = objective.weights[name]
    ops.ema_(objective.parts[name][weights], own[weights], 1 - own_share)


def divergence(norms: Tensor, kind: str) -> float:
    """d_k from a client's drift `[L]` on these segments: its mean for `layer-mean`, the sum of its squares for `squared`."""
    return (norms.mean() if kind == "layer-mean" else norms.square().sum()).item()


# ------------------------------------------------------------------------------------------------------ the whole run


def train(options: Options, out: Path | None = None, overwrite: bool = False) -> Run:
    """Train as the options say, in a new run folder, by default `runs/DATASET-METHOD-Kclients-sSEED`.

    Raises InputError if the folder is not empty, or if the images do not fit the options.
    """
    name = f"{Path(options.dataset).stem}-{options.method}-{options.clients}clients-s{options.seed}"
    out = Path(out or Path("runs") / name)
    holds_run(out, overwrite)  # refuses a folder that must not be replaced, before anything slow
    return simulate(options, out, resumed=False, overwrite=overwrite)


def resume(out: Path, **given: object) -> Run:
    """Continue the run in a folder. given: options that may differ from the run's, such as `device`; others raise InputError."""
    return simulate(stored_options(out, given), out, resumed=True)


def simulate(options: Options, out: Path, resumed: bool, overwrite: bool = False) -> Run:
    """Load images and networks, then make the rounds. Wrong input is refused before the run folder is made."""
    load_kernels()
    keep_memory()
    log = tensorboard_log(out / "tensorboard") if options.log == "tensorboard" else lambda row: None
    device = choose_device(options.device)
    with ranks.process_group(device):
        images = load_images(options.dataset, Path(options.data_root), options.image_size).to(device)
        federation = build(options, images)
        if len(federation.public):
            align_with_base(federation, options)
        if RANK:
            ranks.serve(partial(train_client, options, federation, None), federation.objective)
            return Run(out, [])
        with run_folder(out), resumable(out):
            config = reopen_run(out) if resumed else open_run(out, asdict(options), device, overwrite)
            bank = Bank(kept_parts(federation.objective, options), out / "bank.bin")
            make_round = partial(run_round, options, federation, bank, Uploads(federation, options))
            return run_rounds(options, out, config, federation, images, bank, make_round, resumed, log)


def align_with_base(federation: Federation, options: Options) -> None:
    """FedCA: train the base model by SimCLR on the public images, for as many epochs as a client trains in the run."""
    objective, public = federation.objective, federation.images[federation.public]
    device, epochs = public.device, options.rounds * options.local_epochs
    base = SimCLR(copy.deepcopy(objective.online.module.encoder), device)
    step, everything = Step(base, public, options.precision), torch.arange(len(public), device=device)
    step.generator.manual_seed(seed_of(options.seed, "public"))
    local_training(step, local_batches(everything, epochs, options.batch_size, step.generator), options.lr)
    objective.align(public, extract_features(base.online.module, public).clone())


def main(command: Command) -> Run:
    """The command line's work."""
    if command.resume:
        return resume(command.resume, **command.given)
    return train(Options(**command.given), command.out, command.overwrite)


if __name__ == "__main__":
    with user_errors("fedu.py"):
        main(COMMAND)
