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
| networks       | the workspace in which the clients of this process train in turn                                         |
"""

from __future__ import annotations

from options import HOST_OPTIONS, MOVABLE, OPTIONS, SERVER_RULES, Command, Exchange, Options, flag, in_words, parse, row_of, run_name

if __name__ == "__main__":
    COMMAND = parse(description=__doc__.split("\n\n")[0])  # before torch is imported: --help and mistakes are answered at once

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import ops
from data import Images, count_classes, digest_of, keyed_generator, lacks, load_dataset, refuse_other_data, save_partition
from eval import knn
from federation import Client, Federation, Server, Start, Turn, build, draw_turns, most_uploads
from methods import WANTED, Own, explained, find, of_run, refuse_model
from models import Objective, batchnorm_places, save_encoders
from report.figures import draw_run, optional, plot_partition
from report.progress import TABLE_HEADER, Progress, announce_time, dapu_notice, round_line, tensorboard_log
from report.round import describe_round, name_outliers, num_bytes_sent, refuse_nonfinite
from report.runs import Run, load  # noqa: F401  # load is for notebooks
from report.tables import mean
from runtime import privacy, ranks
from runtime.bank import Bank
from runtime.cli import RANK, InputError, command_line, unbreakable_output, user_errors, user_path, write_atomic
from runtime.device import choose_device, describe_device, keep_memory, limited_threads
from runtime.recorder import Recorder
from runtime.run import begun, holds_run, open_run, read_config, reopen_run, resumable, run_folder
from runtime.uploads import Uploads
from training import num_steps, prepare, train_client

Announce = Callable[[float], None] | None  # called once, after the first steps, with the estimated seconds of a round


# ------------------------------------------------------------------------------------------------------------ a round


def run_round(
    options: Options, federation: Federation, bank: Bank, uploads: Uploads, round_: int, announce: Announce = None
) -> dict:  # fmt: skip
    """One round, the paper's figure 2: every client trains and uploads, and its server averages. Returns the round's metrics.

    Stage 4, the model update, opens a client's next round: what a server averages here, its clients take when they start again. Changes
    servers and clients. Raises InputError if no upload is finite, or if any is not while `on_nonfinite` is `error`.
    """
    clock, networks, unsent = time.perf_counter(), federation.networks, federation.networks.unsent
    num_floats = len(networks.online.vector) - len(unsent)
    turns, dropped = draw_turns(federation.servers, options, round_)
    download_bytes = sum(num_bytes_sent(turn.server, num_floats, turn.server.state.get("shared")) for turn in turns)
    uploaded: list[Turn] = []
    with Progress(f"round {round_}", steps_per_rank(turns, options), announce) as progress:
        start = partial(start_turn, options, federation, bank, round_, len(turns))  # stage 4
        train = partial(train_client, options, federation, progress)  # stage 1
        for server, results in groupby(ranks.train_all(turns, start, train, networks), key=lambda result: result[0].server):
            accepted = []
            for turn, loss, shared in results:  # the workspace holds what this client has trained
                upload = model_upload(networks, options.aggregate, out=uploads.next_row())  # stage 2
                if not (math.isfinite(loss) and upload.isfinite().all()):
                    continue  # the client keeps what it had, and the next upload takes this row
                upload[unsent] = server.model[unsent]
                if options.dp_clip:
                    normal = repeatable_normal(options.seed, round_, turn.client.id)
                    privatise_(upload, server.model, networks, options.dp_clip, options.dp_noise or 0.0, normal)
                whole = options.aggregate == "online" and not len(networks.private) and not options.dp_clip
                own = len(unsent) and turn.received is not server.model
                judged = turn.received.index_copy(0, unsent, server.model[unsent]) if own else None
                uploads.add(turn.fraction, turn.received, None if whole else networks.online.vector, judged)
                turn.loss, turn.shared, turn.received = loss, shared, None  # which frees what it received
                if kept := kept_parts(networks, options):
                    turn.row = bank.write(kept)
                accepted.append(turn)
            if accepted:
                aggregate(server, accepted, uploads, networks, options)  # stage 3
                uploaded += accepted
    uploaded.sort(key=lambda turn: turn.client.id)
    reported = [turn for turn in uploaded if turn.taken]
    for turn in reported:
        turn.client.row, turn.client.last_round = turn.row, round_
    nonfinite = sorted({turn.client.id for turn in turns} - {turn.client.id for turn in uploaded})
    refuse_nonfinite(round_, nonfinite, len(reported), options.on_nonfinite)
    row = describe_round(options, round_, reported, dropped, nonfinite, name_outliers(round_, uploaded, options.max_drift))
    row |= {"upload_bytes": sum(num_bytes_sent(turn.server, num_floats, turn.shared) for turn in reported)}
    return row | {"download_bytes": download_bytes, "seconds": round(time.perf_counter() - clock, 2)}


def steps_per_rank(turns: list[Turn], options: Options) -> int:
    """The steps of a round, of which ranks make equal shares."""
    steps = sum(num_steps(turn.client.num_examples, options.batch_size, options.local_epochs) for turn in turns)
    return steps // min(ranks.count(), len(turns) or 1)


# --------------------------------------------------------------- the four stages (paper, figure 2), the first in training.py


def model_upload(networks: Objective, aggregate: str, out: Tensor | None = None) -> Tensor:
    """Stage 2: what a client uploads, `[P]`: the encoder that the server averages, online or target, and the predictor."""
    encoder = networks.parts["encoder" if aggregate == "online" else "target"]
    return torch.cat([encoder, networks.parts["predictor"]], out=out)


def privatise_(upload: Tensor, model: Tensor, networks: Objective, clip: float, noise: float, normal: Callable[[int], Tensor]) -> None:
    """Clip and noise what a client uploads, `[P]`, in place (see `runtime.privacy.release`). model: what the server sent it, `[P]`.

    The change is that against the server's model, even where the client began with networks of its own, which nobody else knows. Noised
    variances below 0 become 0, because BatchNorm takes their square root. What the client does not send becomes the server's.
    """
    sent = networks.sent
    made = privacy.release(upload[sent], model[sent], clip, noise, normal)
    upload.copy_(model)
    upload[sent] = made
    if noise:
        places = batchnorm_places(networks.online, ("running_var",))
        places = places[sent[places]]
        upload[places] = upload[places].clamp(min=0)


def repeatable_normal(seed: int, round_: int, client: int) -> Callable[[int], Tensor]:
    """What draws the noise of a simulated client: standard normal numbers by (seed, round, client), float64, the same on any device."""
    generator = keyed_generator(torch.device("cpu"), seed, "noise", round_, client)
    return lambda count: torch.randn(count, dtype=torch.float64, generator=generator)


def aggregate(server: Server, accepted: list[Turn], uploads: Uploads, networks: Objective, options: Options) -> None:
    """Stage 3: the server's rule makes its next model of the accepted uploads, and each client's divergence is measured.

    An outlier that is left out changes nothing, and its client keeps what it had, as after an upload that is not finite.
    """
    for k, outlier in uploads.judge().items():
        accepted[k].outlier = outlier
    taken = [turn for turn in accepted if turn.taken]
    if taken:
        shared = [turn.shared for turn in sorted(taken, key=lambda turn: turn.client.id)]
        server.take(next_model(options, server, uploads, networks, shared), networks.unsent)
    for turn, norms in zip(accepted, uploads.close(), strict=True):
        if turn.taken:
            record_divergence(turn.client, norms, options)


def next_model(options: Options, server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """What the server makes of a round's uploads, `[P]`, by the method's own rule or that of `server_rule`.

    Raises InputError if the rule, which may be the user's own, gives no model, or keeps what a checkpoint cannot store.
    """
    name = row_of(options.method).rule or SERVER_RULES[options.server_rule]
    rule = find(name) if name else fedavg
    model = rule(server, uploads, networks, shared)
    refuse_model(rule, model, server)
    return model


def fedavg(server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """`phi = sum_k (n_k / n) theta_k`, `[P]`, of encoder, predictor and BatchNorm's statistics alike.

    A server's rule may use all of its arguments. shared: what each client shares besides its networks, in the order of their ids.
    """
    return uploads.sum()


def start_turn(options: Options, federation: Federation, bank: Bank, round_: int, num_clients: int, turn: Turn) -> tuple[int, ...]:
    """Stage 4, model update: fill the workspace with what a client starts its round with. Returns the job for `train_client`."""
    client, server, networks = turn.client, turn.server, federation.networks
    everything = takes_all(client, options, round_)
    kept = bank.read(client.row) if client.row and (len(networks.private) or not everything) else {}
    if everything:
        kept = {name: kept[name] for name in kept if name == "private"}
    else:
        d = client.divergence
        if options.divergence_from == "global":
            own = kept["encoder"]
            d = divergence(ops.layer_norms(own, server.model[: len(own)], federation.segments), options.divergence)
            client.set_ema_scale_once(d, options.tau)
        turn.start = start_of(d, client.ema_scale, options)
    load_networks(networks, server.model, kept, turn.start, options)
    networks.shared = server.state.get("shared", networks.shared[:0])
    own = keeps_own_encoder(options) or len(networks.private)
    turn.received = networks.online.vector.clone() if own else server.model
    return round_, client.id, client.last_round is None, num_clients


def takes_all(client: Client, exchange: Exchange, round_: int) -> bool:
    """Whether a client takes everything from the server: in its first round, and under FedEMA also after a round that it missed."""
    return client.last_round is None or (exchange.update == "ema" and client.last_round != round_ - 1)


def dapu(divergence: float, mu: float) -> float:
    """FedU's divergence-aware predictor update: the share of its own predictor that a client keeps.

    All of it if its online encoder moved by mu or more in its last training, else nothing: then it takes the averaged predictor.
    """
    return float(divergence >= mu)


def start_of(divergence: float, ema_scale: float | None, exchange: Exchange) -> Start:
    """What a client that took part before starts with, by the columns `update` and `predictor` of its method.

    FedU: the server's online encoder, its own target, and the predictor by DAPU. FedEMA mixes `mu_k = min(1, lambda_k d_k)` of its own
    online encoder and predictor in. divergence: d_k. ema_scale: lambda_k, or None if it was never measured.
    """
    mixed = min(1.0, ema_scale * divergence) if ema_scale else 0.0
    encoder = {"online": 0.0, "both": 0.0, "target": 1.0, "ema": mixed}[exchange.update]
    predictor = {"global": 0.0, "local": 1.0, "dapu": dapu(divergence, exchange.mu), "ema": mixed}[exchange.predictor]
    return Start(encoder, predictor, target=float(exchange.update in ("online", "ema")), divergence=divergence)


def load_networks(networks: Objective, model: Tensor, kept: dict[str, Tensor], start: Start, exchange: Exchange) -> None:
    """Fill the networks with what a client starts with. model: the server's, `[P]`. kept: the client's stored parts, see `kept_parts`.

    A part that an objective adds, such as the target, is the client's own if it is in `kept`, and else as in its first round. A mixture
    is one of parameters: BatchNorm's statistics stay the server's.
    """
    parts = networks.parts
    networks.online.vector.copy_(model)
    if "private" in kept:
        networks.online.vector[networks.private] = kept["private"]
    for name, initial in networks.initial.items():
        parts[name].copy_(kept.get(name, initial))
    for name, share, rule in (("encoder", start.encoder, exchange.update), ("predictor", start.predictor, exchange.predictor)):
        if share:
            where = networks.param_slices[name] if rule == "ema" else slice(None)
            ops.ema_(parts[name][where], kept[name][where], 1 - share)


def keeps_own_encoder(exchange: Exchange) -> bool:
    """Whether each client starts a round from an online encoder of its own, wholly or in part, and not from the server's."""
    return exchange.update in ("target", "ema")


def kept_parts(networks: Objective, exchange: Exchange) -> dict[str, Tensor]:
    """The parts that a client keeps from round to round: those that its next model update uses, wholly or in part."""
    kept = {name: True for name in networks.initial}
    kept["target"] = "target" in kept and exchange.update in ("online", "ema")
    kept["encoder"] = keeps_own_encoder(exchange) or exchange.divergence_from == "global"
    kept["predictor"] = exchange.predictor != "global"
    parts = {name: networks.parts[name] for name, needed in kept.items() if needed}
    return parts | ({"private": networks.online.vector[networks.private]} if len(networks.private) else {})


def record_divergence(client: Client, norms: Tensor, exchange: Exchange) -> None:
    """Note how far a client's encoder moved in its local training. norms: on each segment, `[L]`."""
    client.divergence = divergence(norms, exchange.divergence)
    if exchange.divergence_from == "received":
        client.set_ema_scale_once(client.divergence, exchange.tau)


def divergence(norms: Tensor, kind: str) -> float:
    """d_k from a client's drift `[L]` on these segments: its mean for `layer-mean`, the sum of its squares for `squared`."""
    return (norms.mean() if kind == "layer-mean" else norms.square().sum()).item()


# ------------------------------------------------------------------------------------------------------ the whole run


def train(options: Options, out: Path | str | None = None, overwrite: bool = False) -> Run:
    """Train as the options say, in a new run folder, by default `runs/` and `options.run_name`.

    Raises InputError if the folder is not empty, or if the images do not fit the options.
    """
    out = user_path(Path("runs") / run_name(options) if out is None else out, "--out")
    holds_run(out, overwrite)  # refuses a folder that must not be replaced, before anything slow
    return simulate(options, out, resumed=False, overwrite=overwrite)


def resume(out: Path | str, **given: object) -> Run:
    """Continue the run in a folder. given: options that may differ from the run's, such as `device`; others raise InputError."""
    out = user_path(out)
    return simulate(stored_options(out, given), out, resumed=True)


def stored_options(out: Path, given: dict[str, object]) -> Options:
    """The options of the run in a folder. given: those that may differ from them, such as `device`; others raise InputError."""
    config = read_config(out)
    stored = config["options"]
    if unknown := sorted(stored.keys() - OPTIONS.keys()):
        raise InputError(f"{out} was begun by a version that had the option {flag(unknown[0])}: train it again with --overwrite")
    own = of_run(out, config, given)
    begun, given = Options(**stored | own), {name: value for name, value in given.items() if name not in own}
    given = given | ({"settings": begun.settings | given["settings"]} if "settings" in given else {})
    resumed = replace(begun, **given)
    changed = [name for name in given if getattr(resumed, name) != getattr(begun, name) and name not in (*HOST_OPTIONS, *MOVABLE)]
    if changed:
        names = ", ".join(f"{flag(k)} {in_words(getattr(resumed, k))} (it was {in_words(getattr(begun, k))})" for k in changed)
        reason = f"; the learning rate is a cosine over all rounds: for more of them begin a new run with --init {out}"
        longer = reason * ("rounds" in changed)
        raise InputError(f"--resume {out} got other options than the run has: {names}{longer}")
    return resumed


def simulate(options: Options, out: Path, resumed: bool, overwrite: bool = False) -> Run:
    """Load images and networks, then make the rounds. Wrong input is refused before the run folder is made."""
    with own_files(options):
        return make_rounds(options, out, resumed, overwrite)


@contextmanager
def own_files(options: Options) -> Iterator[None]:
    """Turn errors in the user's own files into InputErrors."""
    with explained(getattr(options.method, "file", "")), explained(getattr(options.views, "file", "")):
        yield


def make_rounds(options: Options, out: Path, resumed: bool, overwrite: bool) -> Run:
    load_kernels()
    keep_memory()
    log = tensorboard_log(out / "tensorboard") if options.log == "tensorboard" else None
    device = choose_device(options.device)
    processes = num_processes(options, device)
    with ranks.process_group(device), limited_threads(max(1, torch.get_num_threads() // processes)):
        images = load_dataset(options).to(device)
        federation = build(options, images)
        parts = [client.indices for client in federation.clients]
        if options.save_partition and not RANK:
            save_partition(user_path(options.save_partition), parts)
        if options.dry_run:
            print("\n".join(f"client {k}: {len(part)} images" for k, part in enumerate(parts)))
            plot_partition(count_classes(images, parts), images.classes, Path("partition.png"))
            return Run(out, [])
        private = describe_privacy(options, federation.networks)
        prepare(federation, options)

        def serve() -> None:
            with own_files(options):  # a copy of this process begins here
                ranks.serve(partial(train_client, options, federation, None), federation.networks)

        if RANK:
            serve()
            return Run(out, [])
        new = begun(out, resumed, overwrite)
        with ranks.forked(processes, serve) as mistakes, run_folder(out), new, mistakes, resumable(out), unbreakable_output():
            data = {"images": images.digest, "clients": digest_of(*parts)}
            own = {name: getattr(options, name) for name in WANTED if isinstance(getattr(options, name), Own)}
            data |= {name: value.digest for name, value in own.items()}
            config = reopen_run(out) if resumed else open_run(out, asdict(options), device, data)
            refuse_other_data(out, config.get("data", {}), data, options.dataset, options.dataset != config["options"]["dataset"])
            for name, value in own.items():
                if value.file and not resumed:
                    write_atomic(out / f"{name}.py", lambda file, value=value: file.write(value.source))
            bank = Bank(kept_parts(federation.networks, options), out / "bank.bin")
            uploads = uploads_of(federation, options)
            record = Recorder(out, config, num_rounds(options), federation, bank, device, partial(show_round, log))
            introduce(options, images, federation, record, resumed, private)
            for round_ in record.rounds_left():
                announce = partial(announce_time, record.rounds - round_) if round_ == record.first and device.type == "cpu" else None
                row = run_round(options, federation, bank, uploads, round_, announce)
                record.write(row | {"knn": measured_knn(options, round_, federation, images, bank)})
            with optional(out / "partition.png"):
                plot_partition(count_classes(images, parts), images.classes, out / "partition.png")
            return finish(options, images, federation, record)


def load_kernels() -> None:
    """Build the fused kernels first, so that a build error leaves no run folder."""
    try:
        ops.load()
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from None


def num_rounds(options: Options) -> int:
    return options.rounds if row_of(options.method).trains else 0


def num_processes(options: Options, device: torch.device) -> int:
    """How many processes of this machine train the clients of a round, apart from those that torchrun starts."""
    given, possible = options.processes, device.type == "cpu" and ranks.TORCHRUN == 1
    if not possible and given not in ("auto", 1):
        raise InputError(f"--processes got {given}, needs a CPU and no torchrun, which itself starts a process for each GPU")
    jobs = 1 if row_of(options.method).servers == "pooled" else options.clients_per_round or options.clients
    if not possible or not num_rounds(options) or multiprocessing.current_process().daemon:  # which may not have children
        return 1
    if given != "auto":
        return min(given, jobs)
    # where there is a GPU, autograd refuses to work in a copy of a process that has used it, as a notebook has
    return 1 if torch.cuda.is_available() else ranks.best_count(torch.get_num_threads(), jobs)


def uploads_of(federation: Federation, options: Options) -> Uploads:
    """What takes the uploads of a round."""
    most = most_uploads(federation.servers, options.clients_per_round)
    judged = {"max_drift": options.max_drift, "shorten": options.on_outlier == "clip"}
    return Uploads(federation.networks.online.vector, most, federation.segments, keeps_own_encoder(options), **judged)


def describe_privacy(options: Options, networks: Objective) -> str:
    """A sentence about the privacy of a client's uploads, empty without `--dp-clip`. Raises InputError if something leaves unclipped."""
    if not options.dp_clip:
        return ""
    if type(networks).take_shared is not Objective.take_shared:
        rows = "whose clients share rows besides their networks, which are not clipped"
        raise InputError(f"--dp-clip got {options.dp_clip:g}, which cannot go with --method {options.method}, {rows}")
    if not options.dp_noise:
        return f"each client's change is clipped to {options.dp_clip:g} and has no noise (--dp-noise), so epsilon is infinite"
    most = privacy.epsilon({options.dp_noise: options.rounds}, options.dp_delta)
    noised = f"each client's change is clipped to {options.dp_clip:g} and noised with {options.dp_noise:g}"
    return f"{noised}: epsilon is {most:.4g} after {options.rounds} uploads, at delta {options.dp_delta:g}"


def introduce(options: Options, images: Images, federation: Federation, record: Recorder, resumed: bool, further: str = "") -> None:
    """Print what is trained, a further sentence, and the header of the rounds' lines."""
    if resumed:
        print(f"{record.out}: continuing after {record.first} of {record.rounds} rounds")
    device = describe_device(images.x_train.device)
    print(f"{options.method} on {options.dataset}: {len(images.x_train)} images, {federation.describe()}, {device}")
    if further:
        print(further)
    if options.knn_every and lacks(images):
        print(f"The kNN column stays empty: {lacks(images)}.")
    print(TABLE_HEADER, flush=True)


def show_round(log: Callable[[dict], None] | None, row: dict, seconds_left: float) -> None:
    """Print a round's line. log: also takes the round, as in metrics.jsonl."""
    if log:
        log(row)
    print(round_line(row, seconds_left), flush=True)


def measured_knn(options: Options, round_: int, federation: Federation, images: Images, bank: Bank) -> float | None:
    """The mean kNN accuracy of the trained backbones, 0 to 1, or None in a round without a measurement."""
    due = options.knn_every and not lacks(images) and ((round_ + 1) % options.knn_every == 0 or round_ + 1 == options.rounds)
    return mean([knn(encoder.backbone, images) for encoder in federation.encoders(bank)]) if due else None


def finish(options: Options, images: Images, federation: Federation, record: Recorder, elsewhere: str = "") -> Run:
    """Write the encoders and the figure, and say what comes next. elsewhere: where the encoders are, if they are not to be written here."""
    out, metrics = record.out, record.metrics
    if not elsewhere:
        save_encoders(out, federation.images.shape[-1], federation.encoders(record.bank))
    record.finish()
    if any(row["clients"] for row in metrics):
        draw_run(out)
        print(dapu_notice(metrics, options.predictor, options.mu), end="")
    use = [] if elsewhere else ["--export features.npz "] if lacks(images) else [""]
    following = [f"\n  python eval.py {task}{out}" for task in [*use, *["--plot "] * bool(metrics)]]
    print(f"\n{out} holds the run{elsewhere}. Next:" + "".join(following))
    return Run(out, metrics)


@command_line()
def main(command: Command) -> Run:
    """Run the parsed command."""
    if command.resume:
        return resume(command.resume, **command.given)
    return train(Options(**command.given), command.out, command.overwrite)


if __name__ == "__main__":
    with user_errors("fedu.py"):
        main(COMMAND)
