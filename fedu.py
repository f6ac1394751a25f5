"""FedU: collaborative unsupervised visual representation learning from decentralized data (Zhuang et al., ICCV 2021).

Clients hold unlabelled images that never leave them. In each round every selected client trains BYOL on its own images, uploads
its online encoder and predictor, and the server averages them; a client then takes the averaged encoder, and the averaged
predictor only if its last divergence lay below mu (DAPU). One process, or several under torchrun, simulate the whole federation.

    python fedu.py                                    five clients on the embedded images, one to three minutes on two cores
    python fedu.py --dataset cifar100 --clients 5     the paper's run
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cli import RANK, InputError, Parser, first_line, locked, number, os_errors, user_errors, write_atomic
from methods import DEFAULTS, HOST_OPTIONS, METHODS, PAPER, RECIPES, Method, defaults

ABLATIONS = ("predictor", "stop_gradient")  # --no-predictor, --no-stop-gradient

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt", "bank.bin", "encoder.pt")
RUN_FILES += ("divergence.png", "eval.jsonl")


def parse_options(argv: list[str] | None = None) -> dict:
    """Read the command line; returns only what was given, so that recipes and --resume can supply the rest."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    count, positive = number(int, 1), number(float, 0, open_low=True)
    add = parser.add_argument
    add("--dataset", help="fashion (embedded), cifar10, cifar100, a file PATH.npz or a folder PATH/{train,test}/CLASS/*  [fashion]")
    add("--data-root", help="where CIFAR lies or is downloaded to  [~/.cache/fedu]")
    add("--image-size", type=number(int, 8), help="side in pixels to which a folder's images are resized  [32]")
    add("--method", choices=METHODS, help="what clients share  [fedu]")
    add("--aggregate", choices=("online", "target"), help="the encoder that clients upload  [online]")
    add("--update", choices=("online", "target", "both", "ema"), help="what the averaged encoder becomes at a client  [by method]")
    add("--predictor", choices=("global", "local", "dapu", "ema"), help="which predictor a client takes  [by method]")
    add("--no-predictor", action="store_true", help="BYOL and SimSiam without one")
    add("--no-stop-gradient", action="store_true", help="BYOL and SimSiam with the gradient of the target's projections too")
    add("--mu", type=number(float, 0), help="DAPU's threshold: the averaged predictor is taken below it  [0.4]")
    add("--tau", type=number(float, 0, 1), help="FedEMA's share of its own model after a client's first measured divergence  [0.7]")
    add("--divergence", choices=("layer-mean", "squared"), help="the authors' code's, or the paper's, which wants a --mu  [layer-mean]")
    add("--divergence-from", choices=("received", "global"), help="of a trained encoder: what it began as, or the next average  [received]")
    add("--first-target", choices=("copy", "shared"), help="shared: no EMA in a client's first round, as in the authors' code  [copy]")
    add("--ema-decay", type=number(float, 0, 1), help="m of the target's moving average  [0.99]")
    add("--clients", type=count, help="K  [5]")
    add("--clients-per-round", type=count, help="clients drawn for each round  [all]")
    add("--dropout", type=number(float, 0, 1), help="probability that a selected client fails to report  [0]")
    add("--on-nonfinite", choices=("skip", "error"), help="a client whose upload has a number that is not finite  [skip]")
    add("--partition", choices=("classes", "iid", "dirichlet"), help="how images are dealt to the clients  [classes]")
    add("--classes-per-client", type=count, help="for --partition classes  [1/K of the classes]")
    add("--alpha", type=number(float, 1e-3, 1e6), help="concentration, for --partition dirichlet  [0.5]")
    add("--encoder", choices=("tiny", "small", "resnet18", "resnet50"), help="backbone  [by data set]")
    add("--rounds", type=count, help="R  [by data set]")
    add("--local-epochs", type=count, help="E  [by data set]")
    add("--batch-size", type=number(int, 2), help="B  [by data set]")
    add("--lr", type=positive, help="learning rate of round 0, cosine over rounds  [by data set]")
    add("--knn-every", type=number(int, 0), help="rounds between kNN measurements, 0 for none  [by data set]")
    add("--seed", type=number(int, 0, 2**63 - 1), help="one seed, one answer  [0]")
    add("--device", choices=("auto", "cpu", "cuda"), help="[auto]")
    add("--precision", choices=("fp32", "bf16"), help="of the networks' arithmetic  [fp32]")
    add("--bank-memory", type=number(int, 0), help="MiB in which what clients keep stays, beside its file  [0]")
    add("--out", type=Path, help="run folder  [runs/DATASET-METHOD-Kclients-sSEED]")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    add("--overwrite", action="store_true", help="replace the run in an existing folder")
    given = vars(parser.parse_args(argv))
    if "resume" in given and ({"out", "overwrite"} & given.keys()):
        parser.error("--resume continues a run in its own folder; it goes with neither --out nor --overwrite")
    return given


GIVEN = parse_options() if __name__ == "__main__" else {}  # before the heavy imports: mistakes are answered at once

import copy  # noqa: E402
import ctypes  # noqa: E402
import hashlib  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import eval as evaluation  # noqa: E402
import ops  # noqa: E402
import ranks  # noqa: E402
from bank import Bank, checksum  # noqa: E402
from data import CIFAR_CLASSES, Images, keyed_generator, load_images, partition, two_views  # noqa: E402
from models import OBJECTIVES, FedCA, Objective, Part, Segment, SimCLR, conv_segments  # noqa: E402


@dataclass
class Client:
    """What one party holds between its rounds: its images, and the networks that are not the server's."""

    id: int
    indices: Tensor  # its images, as indices into the data set
    state: dict[str, Part] = field(default_factory=dict)  # what it keeps of Objective.parts, during its turn
    row: int | None = None  # where the bank has that between its turns, and with which checksum
    digest: str | None = None
    divergence: float | None = None  # d_k of its last participation
    scale: float | None = None  # lambda_k of FedEMA
    last_round: int | None = None  # its last participation

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    def fix_scale(self, divergence: float, tau: float) -> None:
        """`lambda_k = tau / d_k` by the first divergence that was measured; later ones change nothing."""
        if self.scale is None and divergence:
            self.scale = tau / divergence


CLIENT_FIELDS = ("row", "digest", "divergence", "scale", "last_round")


@dataclass
class Federation:
    """A server's global model, encoder and predictor, what clients shared in the last round, and the clients that it averages."""

    server: Part
    shared: Tensor
    clients: list[Client]


# ----------------------------------------------------------------------------------------------------- the rounds


def main(given: dict) -> None:
    out, options = prepare(given)
    if "resume" not in given:
        holds_run(out, "overwrite" in given)  # before anything that takes its time
    load_ops()
    keep_memory()
    device = evaluation.choose_device(options["device"])
    with ranks.together(device):
        images = load_images(options["dataset"], Path(options["data_root"]), options["image_size"]).to(device)
        federations, objective = build(options, images, device)
        if RANK == 0:
            with run_folder(out, make="resume" not in given):
                simulate(given, out, options, federations, objective, images)
        else:
            clients = {client.id: client for federation in federations for client in federation.clients}
            ranks.serve(objective, lambda round_, k, fresh: train_client(round_, clients[k], fresh, options, objective, images.x_train))


def simulate(given: dict, out: Path, options: dict, federations: list[Federation], objective: Objective, images: Images) -> None:
    """All rounds, from the first or from a checkpoint, with what the run folder holds afterwards."""
    device = images.x_train.device
    rounds = options["rounds"] if METHODS[options["method"]].trains else 0
    segments = divergence_segments(objective, options["divergence"])
    config = resume(out) if "resume" in given else open_run(out, options, device, "overwrite" in given)
    bank = Bank(kept_parts(objective, options), out / "bank.bin", options["bank_memory"] << 20)
    start, seconds = load_checkpoint(out, federations, bank)
    metrics, begun = evaluation.read_metrics(out)[:start] if start else [], time.perf_counter() - seconds
    if "resume" in given:
        print(f"{out}: continuing after {start} of {rounds} rounds")
    clients = [client for federation in federations for client in federation.clients]
    print(f"{options['method']} on {options['dataset']}: {len(images.x_train)} images, {describe(clients, device)}")
    print(f"{'round':>7}{'lr':>10}{'loss':>9}{'divergence':>12}{'kNN %':>8}{'seconds':>9}  predictor taken (global, local, mixed, -)")
    for round_ in range(start, rounds):
        row = run_round(round_, options, federations, objective, images.x_train, segments, bank)
        if options["knn_every"] and ((round_ + 1) % options["knn_every"] == 0 or round_ + 1 == rounds):
            row["knn"] = mean([evaluation.knn(backbone, images) for backbone in backbones(objective, federations)])
        metrics.append(row)
        write_metrics(out, metrics)
        save_checkpoint(out, round_ + 1, federations, bank, time.perf_counter() - begun)
        print(round_line(row), flush=True)

    save_encoder(out, options["encoder"], objective, federations)
    write_config(out, config | {"seconds": round(time.perf_counter() - begun, 1)})
    if any(row["clients"] for row in metrics):
        evaluation.plot([out], out / "divergence.png")
        print(dapu_notice(metrics, options["predictor"], options["mu"]), end="")
    print(f"\n{out} holds the run. Next:\n  python eval.py {out}" + f"\n  python eval.py --plot {out}" * bool(metrics))


class Report(NamedTuple):
    """What became of a client's round."""

    client: Client
    update: Update
    loss: float
    share: Tensor  # what it shares besides its networks


def run_round(
    round_: int, options: dict, federations: list[Federation], objective: Objective, images: Tensor, segments: Tensor, bank: Bank
) -> dict:  # fmt: skip
    """The four stages for each client that reports; changes the federations and returns the round's metrics.

    Raises InputError if an upload is not finite and the options do not let it be left out, or if none is.
    """
    clock = time.perf_counter()
    selected = sample_clients(sum(len(f.clients) for f in federations), options["clients_per_round"], options["seed"], round_)
    dropped = {k for k in selected if drops_out(k, options["dropout"], options["seed"], round_)}
    reporting = selected - dropped
    means = [Mean(f, members) for f in federations if (members := [c for c in f.clients if c.id in reporting])]
    sent = objective.parts["encoder"].nbytes + (objective.parts["predictor"].nbytes if options["predictor"] != "local" else 0)
    # a client alone has nobody to exchange anything with
    download_bytes = sum(len(m.members) * (sent + m.federation.shared.nbytes) for m in means if len(m.federation.clients) > 1)
    train_in_waves(round_, options, means, objective, images, segments, bank)
    reports = sorted((report for m in means for report in m.reports), key=lambda report: report.client.id)
    nonfinite = sorted(reporting - {report.client.id for report in reports})
    if nonfinite and (options["on_nonfinite"] == "error" or not reports):
        who = f"the upload of client {nonfinite[0]} is not" if reports else "no upload is"
        raise InputError(f"round {round_}: {who} finite; lower --lr, or check the images")
    for k in nonfinite:
        print(f"round {round_}: the upload of client {k} is not finite and was left out", file=sys.stderr)
    return {
        "round": round_,
        "lr": cosine(options["lr"], round_, options["rounds"]),
        "loss": [report.loss for report in reports],
        "divergence": [report.client.divergence for report in reports],
        "decided_on": [report.update.divergence for report in reports],
        "predictor": [report.update.predictor for report in reports],
        "own_share": [report.update.own_share for report in reports],
        "num_examples": [report.client.num_examples for report in reports],
        "clients": [report.client.id for report in reports],
        "dropped": sorted(dropped),
        "nonfinite": nonfinite,
        "upload_bytes": sum(sent + r.share.nbytes for m in means if len(m.federation.clients) > 1 for r in m.reports),
        "download_bytes": download_bytes,
        "knn": None,
        "seconds": round(time.perf_counter() - clock, 2),
    }


class Mean:
    """One server's round: the mean of its members' uploads, each folded in as it arrives, so that one is held at a time."""

    def __init__(self, federation: Federation, members: list[Client]):
        self.federation, self.members = federation, members
        self.expected, self.waiting = sum(client.num_examples for client in members), len(members)
        self.total: Part | None = None
        self.reports: list[Report] = []

    def add(self, report: Report, upload: Part, began: Part, segments: Tensor) -> Tensor:
        """Take a client's upload in; returns its drift on the segments from what it began with, `[L]`."""
        self.total = self.total or self.federation.server.zeros()
        self.reports.append(report)
        return aggregate(self.total, upload, report.client.num_examples / self.expected, began, segments)

    def settle(self) -> None:
        """After each member's turn; when all had theirs, the mean becomes the server's model, if anybody reported."""
        self.waiting -= 1
        if self.waiting or not self.reports:
            return
        averaged = sum(report.client.num_examples for report in self.reports)
        if averaged < self.expected:
            self.total.vector.mul_(self.expected / averaged)
            self.total.buffers.mul_(self.expected / averaged)
        self.federation.server, self.total = self.total, None
        self.federation.shared = torch.cat([report.share for report in sorted(self.reports, key=lambda report: report.client.id)])


def train_in_waves(
    round_: int, options: dict, means: list[Mean], objective: Objective, images: Tensor, segments: Tensor, bank: Bank
) -> None:  # fmt: skip
    """The members' turns, those with the most images first: a client for each rank, then the next.

    Uploads are folded in this order on any number of ranks, and neighbours in it have about as much to do. A client whose upload is not
    finite keeps what it had.
    """
    turns = sorted(
        ((running, client) for running in means for client in running.members), key=lambda turn: (-turn[1].num_examples, turn[1].id)
    )
    dictionary, steps = METHODS[options["method"]].dictionary, [num_steps(client, options) for _, client in turns]
    with tqdm(total=sum(steps), desc=f"round {round_}", unit="step", leave=False, disable=not sys.stderr.isatty()) as progress:
        for first in range(0, len(turns), ranks.COUNT):
            wave, begun = turns[first : first + ranks.COUNT], {}
            for rank, (running, client) in reversed(list(enumerate(wave))):  # this rank's own client last: the networks then are its
                client.state = bank.read(client.row, client.digest) if client.row is not None else {}
                update = model_update(client, running.federation.server, objective, options, segments, round_)
                client.state.clear()
                began = running.federation.server if options["update"] in ("online", "both") else objective.online.state.clone()
                begun[client.id] = update, began
                objective.shared = running.federation.shared
                if rank:
                    ranks.send_client(rank, round_, client.id, client.last_round is None, objective)
            for rank, (running, client) in enumerate(wave):
                if rank:
                    loss, share = ranks.receive_client(rank, objective)
                    progress.update(num_steps(client, options))
                else:
                    loss, share = train_client(round_, client, client.last_round is None, options, objective, images, progress)
                update, began = begun.pop(client.id)
                if math.isfinite(loss) and is_finite(uploadable(objective, options["aggregate"])):
                    upload = model_upload(client, objective, options, round_)
                    report = Report(client, update, loss, share[: dictionary // len(running.members)])
                    drift = running.add(report, upload, began, segments)
                    if options["aggregate"] == "target":  # the divergence is the online encoder's, whichever is uploaded
                        drift = ops.layer_norms(objective.online.state.vector, began.vector, segments)
                    client.divergence = divergence(drift, options["divergence"])
                    if options["divergence_from"] == "received":
                        client.fix_scale(client.divergence, options["tau"])
                    if client.state:
                        client.row, client.digest = bank.write(client.state)
                        client.state.clear()
                running.settle()


def num_steps(client: Client, options: dict) -> int:
    return client.num_examples // options["batch_size"] * options["local_epochs"]


def train_client(
    round_: int, client: Client, fresh: bool, options: dict, objective: Objective, images: Tensor, progress: tqdm | None = None
) -> tuple[float, Tensor]:  # fmt: skip
    """A client's local training, the same on any rank; returns its loss and what it shares besides its networks."""
    ema_decay = 0.0 if options["first_target"] == "shared" and fresh else options["ema_decay"]
    generator = keyed_generator(images.device, options["seed"], "training", round_, client.id)
    batches = local_batches(client.indices, options["local_epochs"], options["batch_size"], generator)
    lr = cosine(options["lr"], round_, options["rounds"])
    loss = local_training(objective, images, batches, generator, lr, options["precision"], ema_decay, progress=progress).item()
    share = objective.share(METHODS[options["method"]].dictionary)
    release_memory()
    return loss, share


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc; asked once, since the answer is read from the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_memory() -> None:
    """Let the C library keep what tensors free, instead of handing it back to the kernel and faulting it in again at every step.

    A fifth of a ResNet-18's step on the CPU went there. Vectors of whole networks, 64 MB or more, are still mapped and unmapped as they
    come and go, else they would leave holes. Does nothing where the library is not glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    if libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Hand back what `keep_memory` kept: local training's activations, before the server's vectors need room."""
    if libc := glibc():
        libc.malloc_trim(0)


def load_ops() -> None:
    """Build the fused kernels now, where the first step would: whatever keeps them from it is said before a run folder is made."""
    try:
        ops.load()
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from None


def build(options: dict, images: Images, device: torch.device) -> tuple[list[Federation], Objective]:
    """The federations of a method with their clients, all starting from the one network that the seed initialises."""
    method = METHODS[options["method"]]
    order = np.random.default_rng([options["seed"], *b"public"]).permutation(len(images.y_train))
    count = max(options["batch_size"], round(method.public * len(order))) if method.public else 0
    public, private = np.sort(order[:count]), np.sort(order[count:])
    dealt = (1, "iid") if method.federation == "pooled" else (options["clients"], options["partition"])
    parts = partition(
        images.y_train.cpu().numpy()[private], *dealt, options["seed"],
        options["classes_per_client"], options["alpha"], at_least=options["batch_size"],
    )  # fmt: skip
    indices = [torch.from_numpy(private[part]).to(device) for part in parts]
    torch.manual_seed(options["seed"])
    ablation = {name: False for name in ABLATIONS if options[f"no_{name}"]}
    objective = OBJECTIVES[method.objective](options["encoder"], device, images.y_train, **ablation)
    if count:
        align_with_base(objective, images.x_train[torch.from_numpy(public).to(device)], options)
    clients = [Client(k, index) for k, index in enumerate(indices)]
    groups = [[client] for client in clients] if method.federation == "each" else [clients]
    return [Federation(objective.online.state.clone(), objective.shared, group) for group in groups], objective


def align_with_base(objective: FedCA, public: Tensor, options: dict) -> None:
    """Train a base model by SimCLR on the public images, as many epochs as a client will make in the run, and align with it."""
    device, epochs = public.device, options["rounds"] * options["local_epochs"]
    base = SimCLR(copy.deepcopy(objective.online.module.encoder), device)
    generator = keyed_generator(device, options["seed"], "public")
    everything = torch.arange(len(public), device=device)
    batches = local_batches(everything, epochs, options["batch_size"], generator)
    local_training(base, public, batches, generator, options["lr"], options["precision"])
    objective.align(public, evaluation.extract_features(base.online.module, public).clone())


def cosine(lr0: float, round_: int, rounds: int) -> float:
    """`lr0 (1 + cos(pi r / R)) / 2`: cosine over rounds, constant inside a round."""
    return lr0 * (1 + math.cos(math.pi * round_ / rounds)) / 2


def sample_clients(clients: int, per_round: int | None, seed: int, round_: int) -> set[int]:
    """The ids of the clients that take part in a round: drawn without replacement, by (seed, round)."""
    generator = keyed_generator(torch.device("cpu"), seed, "clients", round_)
    return set(torch.randperm(clients, generator=generator)[:per_round].tolist())


def drops_out(client: int, probability: float, seed: int, round_: int) -> bool:
    """Whether a selected client fails to report."""
    return torch.rand((), generator=keyed_generator(torch.device("cpu"), seed, "dropout", round_, client)).item() < probability


def is_finite(part: Part) -> bool:
    return bool(part.vector.isfinite().all() and part.buffers.isfinite().all())


# ------------------------------------------------------------------------------- the four stages of a round (paper, figure 2)


def local_batches(indices: Tensor, epochs: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The batches of `epochs` shuffled passes over a client's images, as indices `[B]`; the last partial one of a pass is dropped."""
    for _ in range(epochs):
        order = indices[torch.randperm(len(indices), generator=generator, device=indices.device)]
        yield from order[: len(order) // batch_size * batch_size].split(batch_size)


def local_training(
    objective: Objective, images: Tensor, batches: Iterable[Tensor], generator: torch.Generator | None, lr: float,
    precision: str = "fp32", ema_decay: float = 0.99, views: Callable[..., tuple[Tensor, Tensor]] = two_views, progress: tqdm | None = None,
) -> Tensor:  # fmt: skip
    """Stage 1: train the objective's networks on a client's batches; returns the mean loss, `[]`, still on the device.

    images: uint8 `[N, 3, S, S]`; a batch is an index into them, and `views` draws its two views from the generator. SGD with momentum
    0.9, which starts from zero every round, and weight decay 5e-4 on everything. No step makes the host wait for the device.
    """
    objective.check_views()
    device = images.device
    optimizer = torch.optim.SGD(objective.trained, lr, fused=device.type in ("cpu", "cuda"))
    total, steps = torch.zeros((), device=device), 0
    for weight in objective.trained:
        weight.grad.zero_()

    def step(batch: Tensor) -> None:
        view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in views(images[batch], generator))
        for weight in objective.trained:  # backward() adds to this: momentum and gradient are one vector, where SGD's own would be two
            weight.grad.mul_(MOMENTUM).add_(weight.detach(), alpha=WEIGHT_DECAY)
        for term in objective.terms(view1, view2, batch):
            with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
                loss = term()
            loss.backward()
            total.add_(loss.detach())
        optimizer.step()
        objective.update_target(ema_decay)

    with as_graph(step, generator) if device.type == "cuda" else nullcontext(step) as run:
        for batch in batches:
            run(batch)
            steps += 1
            if progress is not None:
                progress.update()
    return total / steps


@contextmanager
def as_graph(step: Callable[[Tensor], None], generator: torch.Generator) -> Iterator[Callable[[Tensor], None]]:
    """A training step as a CUDA graph: one launch for the host instead of some 400, for which a GPU would wait.

    The first three steps run as they are, on the stream that the graph is captured on: PyTorch wants its libraries, the gradients and
    the momentum to be there by then. Gives what takes a batch, always of the same size, in place of `step`.
    """
    stream, graph, first = torch.cuda.Stream(), torch.cuda.CUDAGraph(), iter(range(3))
    captured: Tensor | None = None

    def run(batch: Tensor) -> None:
        nonlocal captured
        if next(first, None) is not None:
            return step(batch)
        if captured is None:
            captured = batch.clone()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=stream):
                step(captured)
        captured.copy_(batch)
        graph.replay()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield run
    torch.cuda.current_stream().wait_stream(stream)


def uploadable(objective: Objective, aggregate: str) -> Part:
    """What a client would upload now: the encoder that the server averages, online or target, and the predictor. A view, or a copy."""
    if aggregate == "online":
        return objective.online.state
    return Part(*map(torch.cat, zip(objective.parts["target"], objective.parts["predictor"])))


def model_upload(client: Client, objective: Objective, options: dict, round_: int) -> Part:
    """Stage 2: encoder and predictor, for the server to take in before the next client trains; what the client will need stays with it."""
    client.state = {name: part.clone() for name, part in kept_parts(objective, options).items()}
    client.last_round = round_
    return uploadable(objective, options["aggregate"])


def kept_parts(objective: Objective, options: dict) -> dict[str, Part]:
    """The parts that a client keeps from round to round: those that `model_update` does not replace by the server's, or mixes in."""
    kept = {name: True for name in objective.own}
    kept["target"] = "target" in kept and options["update"] in ("online", "ema")
    kept["encoder"] = options["update"] in ("target", "ema") or options["divergence_from"] == "global"
    kept["predictor"] = options["predictor"] != "global"
    return {name: objective.parts[name] for name, needed in kept.items() if needed}


def aggregate(total: Part, upload: Part, weight: float, received: Part, segments: Tensor) -> Tensor:
    """Stage 3: fold an upload into the mean as it arrives, `phi <- phi + (n_k / n) theta_k`: the server never holds them all.

    So for encoder, predictor and BatchNorm's statistics; its integer counters are copied. total: the sum so far, zeros at first, changed
    in place. received: what the client had begun with. Returns its drift `[L]`, `norm2(theta_k - received)` on each of the segments
    `[L, 2]`. The sum so far is taken as one more client, of weight 1.
    """
    weights = torch.tensor([1, weight]).to(upload.vector)
    vector, drift, _ = ops.aggregate(torch.stack([total.vector, upload.vector]), weights, received.vector, segments)
    buffers = ops.weighted_mean(torch.stack([total.buffers, upload.buffers]), weights)
    total.copy_(Part(vector, buffers, upload.counters))
    return drift[1]


class Update(NamedTuple):
    """What a client took: whose predictor (global, local, mixed; - without any), its own one's share, and the divergence that decided."""

    predictor: str
    own_share: float
    divergence: float | None


def model_update(client: Client, server: Part, objective: Objective, options: dict, segments: Tensor, round_: int) -> Update:
    """Stage 4: load what the client trains from into the objective's networks.

    FedU: the online encoder is the server's, the target the client's own, and by DAPU the predictor is the server's if the client's
    divergence is below mu, else its own. FedEMA mixes its own online encoder and predictor in, by `own_share`. The options `update` and
    `predictor` give the other columns. A client that takes part for the first time has everything from the server; so has one of
    FedEMA's that was not in the last round.
    """
    fresh = client.last_round is None or (options["update"] == "ema" and client.last_round != round_ - 1)
    objective.online.state.copy_(server)
    for name, start in objective.own.items():
        objective.parts[name].copy_(start if fresh else client.state.get(name, start))
    servers = "global" if objective.parts["predictor"].nbytes else "-"
    if fresh:
        return Update(servers, 0.0, None)
    d = client.divergence
    if options["divergence_from"] == "global":
        norms = ops.layer_norms(client.state["encoder"].vector, objective.parts["encoder"].vector, segments)
        d = divergence(norms, options["divergence"])
    client.fix_scale(d, options["tau"])
    mixed = min(1.0, client.scale * d) if client.scale else 0.0
    if options["update"] in ("target", "both"):
        objective.parts["target"].copy_(objective.parts["encoder"])
    if options["update"] == "target":
        objective.parts["encoder"].copy_(client.state["encoder"])
    if options["update"] == "ema":
        mix(objective.parts["encoder"], client.state["encoder"], mixed)
    own_share = {"global": 0.0, "local": 1.0, "dapu": float(d >= options["mu"]), "ema": mixed}[options["predictor"]]
    if options["predictor"] == "ema":
        mix(objective.parts["predictor"], client.state["predictor"], mixed)
    elif own_share:
        objective.parts["predictor"].copy_(client.state["predictor"])
    return Update({0.0: servers, 1.0: "local"}.get(own_share, "mixed"), own_share, d)


def mix(received: Part, own: Part, own_share: float) -> None:
    """`received <- own_share own + (1 - own_share) received`, over parameters: BatchNorm's statistics stay those received."""
    ops.ema_(received.vector, own.vector, 1 - own_share)


def divergence_segments(objective: Objective, kind: str) -> Tensor:
    """What d_k is measured on, `[L, 2]`: each convolution for `layer-mean` (authors' code), the whole encoder for `squared` (paper)."""
    whole = Segment("encoder", 0, len(objective.parts["encoder"].vector))
    return torch.tensor([[begin, end] for _, begin, end in (conv_segments(objective.online) if kind == "layer-mean" else [whole])])


def divergence(norms: Tensor, kind: str) -> float:
    """d_k from a client's drift `[L]` on these segments: its mean for `layer-mean`, the sum of its squares for `squared`."""
    return (norms.mean() if kind == "layer-mean" else norms.square().sum()).item()


def dapu_notice(metrics: list[dict], predictor: str, mu: float) -> str:
    """A sentence for the case that every DAPU decision of the run was the same, else nothing."""
    decided = [(taken, d) for row in metrics for taken, d in zip(row["predictor"], row["decided_on"]) if d is not None]
    decisions, divergences = {taken for taken, _ in decided}, [d for _, d in decided]
    if predictor != "dapu" or len(decisions) != 1:
        return ""
    consequence = "predictors were as in FedBYOL" if decisions == {"global"} else "clients shared a predictor in their first round only"
    span = f"divergences {min(divergences):.3g} to {max(divergences):.3g}"
    return f"\nmu = {mu:g} never bound: every DAPU decision was {decisions.pop()} ({span}), so {consequence}.\n"


# ------------------------------------------------------------------------------------------------- the run folder


def prepare(given: dict) -> tuple[Path, dict]:
    """The run folder and the resolved options: those given, then the run's own on --resume, else the data set's recipe."""
    given = dict(given)
    run, out = given.pop("resume", None), given.pop("out", None)
    given.pop("overwrite", None)
    if run is not None:
        stored = parse_options(as_arguments(evaluation.read_config(run)["options"]))
        stored = defaults(stored["method"]) | stored  # an older run knows fewer options
        changed = [k for k in given if given[k] != stored[k] and k not in HOST_OPTIONS]
        if changed:
            names = ", ".join(f"--{k.replace('_', '-')} {given[k]} (it was {stored[k]})" for k in changed)
            raise InputError(f"--resume {run} got other options than the run has: {names}")
        return run, stored | given
    method = METHODS[given.get("method", DEFAULTS["method"])]
    options = defaults(given.get("method", DEFAULTS["method"])) | RECIPES.get(given.get("dataset", DEFAULTS["dataset"]), PAPER) | given
    if "no_predictor" in given and "predictor" not in given:
        options["predictor"] = "global"
    check_given(method, given, options)
    if options["divergence"] == "squared" and options["predictor"] == "dapu" and "mu" not in given:
        raise InputError("--divergence squared wants a --mu of its own, since 0.4 belongs to layer-mean")
    if (options["clients_per_round"] or 1) > options["clients"]:
        raise InputError(f"--clients-per-round got {options['clients_per_round']}, there are {options['clients']} clients")
    name = f"{Path(options['dataset']).stem}-{options['method']}-{options['clients']}clients-s{options['seed']}"
    return out or Path("runs") / name, options


def as_arguments(options: dict) -> list[str]:
    """A run's options as its command line would have them, whose parser then checks what a config.json says."""
    names = {name: f"--{str(name).replace('_', '-')}" for name in options}
    return [names[k] if v is True else f"{names[k]}={v}" for k, v in options.items() if v is not None and v is not False]


def check_given(method: Method, given: dict, options: dict) -> None:
    """Refuse an option that would change nothing: raises InputError."""
    has_predictor, has_target = method.objective in ("byol", "simsiam"), method.objective in ("byol", "moco-v1", "moco-v2")
    senseless = {
        "predictor": not has_predictor or options["no_predictor"] or method.federation != "all",
        "no_predictor": not has_predictor,
        "no_stop_gradient": not has_predictor,
        "aggregate": options["aggregate"] == "target" and not has_target,
        "update": options["update"] in ("target", "both") and not has_target,
        "mu": options["predictor"] != "dapu",
        "tau": "ema" not in (options["update"], options["predictor"]),
        "divergence_from": not {"dapu", "ema"} & {options["update"], options["predictor"]},
        "ema_decay": not has_target,
        "first_target": not has_target,
        "classes_per_client": options["partition"] != "classes",
        "alpha": options["partition"] != "dirichlet",
        "clients_per_round": method.federation == "pooled",
        "image_size": options["dataset"] in ("fashion", *CIFAR_CLASSES) or options["dataset"].endswith(".npz"),
    }
    for name, changes_nothing in senseless.items():
        if name in given and changes_nothing:
            got = "" if given[name] is True else f" {given[name]}"
            raise InputError(f"--{name.replace('_', '-')}{got} changes nothing in --method {options['method']} with its other options")


@contextmanager
def run_folder(out: Path, make: bool) -> Iterator[None]:
    """Hold the run folder for this process alone, and end on SIGTERM as on Ctrl-C: with the command that continues the run."""
    with os_errors(f"--out {out} cannot be made"):
        if make:
            out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"{out} is in use by another fedu.py: wait for it, or choose another --out"):
        for fragment in (path for name in RUN_FILES for path in out.glob(f".{name}.*")):
            fragment.unlink()  # of a run that was killed while it wrote
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with `python fedu.py --resume {shlex.quote(str(out))}`") from None
        finally:
            signal.signal(signal.SIGTERM, former)


def open_run(out: Path, options: dict, device: torch.device, overwrite: bool) -> dict:
    """Begin a run in its folder; returns its config.

    A folder in use is refused unless `overwrite`, which removes a former run's files and no others.
    """
    config = {
        "options": options,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": describe_device(device),
        **describe_code(),
        "seconds": 0.0,
    }
    with os_errors(f"--out {out} cannot be used"):
        if holds_run(out, overwrite):
            for name in reversed(RUN_FILES):  # config.json last, by which an interrupted removal can be repeated
                (out / name).unlink(missing_ok=True)
    write_config(out, config)
    write_metrics(out, [])
    return config


def holds_run(out: Path, overwrite: bool) -> bool:
    """Whether a former run is there, to be replaced. Raises InputError if something is that must not be."""
    with os_errors(f"--out {out} cannot be used"):
        if not out.is_dir() or not any(out.iterdir()):
            return False
    if not overwrite:
        raise InputError(f"{out} is not empty: choose another --out, or --resume {out}, or --overwrite it")
    evaluation.read_config(out)  # not a run folder? then nothing in it is ours to remove
    return True


def resume(out: Path) -> dict:
    """The config of a run that was begun; says so if it was by other code."""
    config = evaluation.read_config(out)
    if config.get("source") != describe_code()["source"]:
        print(f"{out} was begun by other code, commit {config.get('commit')}: the rest may differ from what that gave", file=sys.stderr)
    return config


def describe_code() -> dict:
    """What the program is: a hash over its sources, and git's commit where there is one."""
    here = Path(__file__).parent
    sources = sorted(p for p in (*here.glob("*.py"), *here.glob("ops/*")) if p.suffix in (".py", ".h", ".cpp", ".cu"))
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    git = shutil.which("git") and subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    return {"source": hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16], "commit": git or None}


def write_config(out: Path, config: dict) -> None:
    """config.json: what was run, by which code, on what; on --resume it stays that of the start, but for the seconds."""
    write_atomic(out / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode() + b"\n"))


def write_metrics(out: Path, metrics: list[dict]) -> None:
    write_atomic(out / "metrics.jsonl", lambda file: file.write("".join(json.dumps(row) + "\n" for row in metrics).encode()))


def save_checkpoint(out: Path, rounds_done: int, federations: list[Federation], bank: Bank, seconds: float) -> None:
    """checkpoint.pt: all that the next round depends on, but for the clients' networks, whose rows in the bank it names.

    Random generators are keyed by (seed, round, client) and have no state.
    """
    servers = [[*f.server, f.shared] for f in federations]
    fields = {name: [getattr(c, name) for f in federations for c in f.clients] for name in CLIENT_FIELDS}
    content = {"round": rounds_done, "seconds": seconds, "servers": servers, "clients": fields, "rows_before": sorted(bank.named)}
    content["checksum"] = checksum(t for server in servers for t in server)
    bank.flush()
    write_atomic(out / "checkpoint.pt", lambda file: torch.save(content, file), keep_as=out / "checkpoint-previous.pt")
    bank.protect(row for row in fields["row"] if row is not None)


def load_checkpoint(out: Path, federations: list[Federation], bank: Bank) -> tuple[int, float]:
    """Restore the federations in place; returns the number of rounds done and the seconds that they took, 0 without a checkpoint.

    Falls back to the previous checkpoint if the last one is damaged, and says so, or missing.
    """
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path, other in zip(paths, [*paths[1:], None]):
        try:
            done = read_checkpoint(path, federations, bank)
        except InputError as error:
            if other is None:
                raise
            print(f"{error}; falling back to {other}", file=sys.stderr)
        else:
            with os_errors(f"cannot replace {out}/checkpoint.pt"):
                os.replace(path, out / "checkpoint.pt")  # else the next one would put the damaged one in the place of this
            return done
    return 0, 0.0  # not begun, or interrupted before the first round's end


def read_checkpoint(path: Path, federations: list[Federation], bank: Bank) -> tuple[int, float]:
    clients = [client for federation in federations for client in federation.clients]
    try:
        content = torch.load(path, map_location=federations[0].server.vector.device, weights_only=True)
        for federation, (*server, shared) in zip(federations, content["servers"], strict=True):
            federation.server, federation.shared = Part(*server), shared
        for name in CLIENT_FIELDS:
            for client, value in zip(clients, content["clients"][name], strict=True):
                setattr(client, name, value)
        intact = content["checksum"] == checksum(t for server in content["servers"] for t in server)
        rounds_done, seconds, rows_before = content["round"], content["seconds"], content["rows_before"]
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise InputError(f"{path} is not a readable checkpoint ({first_line(error)})") from None
    if not intact:
        raise InputError(f"{path} is damaged: its tensors do not have the checksum that they were saved with")
    rows = {client.row: client.digest for client in clients if client.row is not None}
    for row, digest in rows.items():
        bank.verify(row, digest)
    bank.protect(rows_before)
    bank.protect(rows)
    return rounds_done, seconds


def save_encoder(out: Path, name: str, objective: Objective, federations: list[Federation]) -> None:
    """encoder.pt: `{"encoder": name, "head": projector's widths, "encoders": [{"backbone", "projector"}, ...]}`, one for each server."""
    head = list(objective.online.module.encoder.head)
    encoders = []
    for _ in backbones(objective, federations):
        modules = objective.online.module.encoder.named_children()
        encoders.append({part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in modules})
    write_atomic(out / "encoder.pt", lambda file: torch.save({"encoder": name, "head": head, "encoders": encoders}, file))


def backbones(objective: Objective, federations: list[Federation]) -> Iterator[torch.nn.Module]:
    """The objective's backbone, holding each server's global model in turn."""
    for federation in federations:
        objective.online.state.copy_(federation.server)
        yield objective.online.module.encoder.backbone


# ------------------------------------------------------------------------------------------------------- the log


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def describe(clients: list[Client], device: torch.device) -> str:
    sizes = sorted(c.num_examples for c in clients)
    spread = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    return f"{len(clients)} client{'s' * (len(clients) > 1)} of {spread}, {describe_device(device)}"


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def round_line(row: dict) -> str:
    taken = "".join(p[0] for p in row["predictor"]) or "nobody reported: the global model stays as it was"
    knn = "" if row["knn"] is None else f"{100 * row['knn']:.2f}"
    return (
        f"{row['round']:>7}{row['lr']:>10.5f}{mean(row['loss']):>9.4f}{mean(row['divergence']):>12.4f}{knn:>8}{row['seconds']:>9.1f}  "
        + (taken if len(row["clients"]) <= 20 else ", ".join(f"{taken.count(p)} {p}" for p in "glm-" if p in taken))
    )


if __name__ == "__main__":
    with user_errors("fedu.py"):
        main(GIVEN)
