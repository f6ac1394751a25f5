"""The options of a run: their types and defaults, the table of methods, recipes, and the command lines of fedu.py and eval.py.

Only the standard library is imported here, so that `--help` and a mistyped option are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from methods import Own, load, of_notebook
from runtime.cli import InputError, Parser, command_line, first_line, nearest, number, user_path

# ------------------------------------------------------------------------------------------------ methods and recipes


class Setting(NamedTuple):
    """A number of an objective that `--set NAME=VALUE` changes. type: checks and converts a value, given as text."""

    default: float
    help: str
    type: Callable[[str], float]


class Method(NamedTuple):
    """A method is a row: what a client minimises, who averages with whom, and what a client takes when the average arrives.

    `aggregate`, `update` and `predictor` are options too: giving one of them makes an ablation.
    """

    objective: Any = "byol:BYOL"  # its class, or FILE:CLASS of the folder methods/
    servers: str = "one"  # one: all clients share a server; each: every client has its own; pooled: one client holds all images
    aggregate: str = "online"
    update: str = "online"
    predictor: str = "global"
    has_predictor: bool = True  # whether a predictor stands on the online encoder, which ablations can leave out
    has_target: bool = True  # whether there is a target encoder, a moving average of the online one
    uses_labels: bool = False
    ablations: bool = True  # whether the objective can do without its predictor, and without its stop-gradient
    head: tuple[int | str, ...] = ()  # the projector's layers, see models.build_head, 0 for the features' width; by default the encoder's
    settings: Mapping[str, Setting] = {}  # of the objective, in addition to those that all have: of the views, and `decorrelation`
    jitter: float = 1.0  # default of the setting of this name
    rule: Any = ""  # what the server makes of a round's uploads: a function, or FILE:FUNCTION of methods/; by default FedAvg's mean
    public: float = 0.0  # fraction of the training images that are public: no client has them, and the objective may prepare itself on them
    trains: bool = True


COUNT, PROBABILITY, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 0, open_low=True)


def temperature(default: float) -> Setting:
    return Setting(default, "cosine similarities are divided by it", POSITIVE)


QUEUE = Setting(4096, "keys that a client keeps as negatives", COUNT)
DICTIONARY = Setting(4096, "projections that the clients of a round share as negatives of the next", COUNT)
VIEWS = {  # settings of the built-in views; beyond 1.25, the jitter's factors would be negative
    "jitter": Setting(1.0, "strength of the colour jitter: 1 is ColorJitter(0.8, 0.8, 0.8, 0.2)", number(float, 0, 1.25)),
    "crop_scale": Setting(0.08, "smallest share of an image that a view shows", number(float, 0, 1, open_low=True)),
    "greyscale": Setting(0.2, "probability that a view is grey", PROBABILITY),
}
DECORRELATION = Setting(0.0, "weight of FedDecorr's term, which decorrelates the features of the backbone", number(float, 0))
UNIFORMITY = Setting(0.01, "weight of the regulariser FUR", number(float, 0))
SERVER_LR = Setting(0.1, "a round moves the server's parameters by at most twice this length", POSITIVE)
TARGET_TEMPERATURE = Setting(0.1, "temperature of the relations that both views are drawn to", POSITIVE)
CLUSTERS = {
    "clusters": Setting(128, "the server's centroids", COUNT),
    "local_clusters": Setting(16, "centroids that a client sends", COUNT),
    "memory": Setting(128, "newest projections that a client makes its centroids of", COUNT),
    "target_decay": Setting(0.996, "share of the target that stays in a step", PROBABILITY),
}
REDUNDANCY = Setting(0.005, "weight of correlations between different features (lambda)", number(float, 0))
SPREAD = Setting(1.0, "weight of the uniformity (w)", number(float, 0))
WITHOUT_PREDICTOR = {"has_predictor": False, "has_target": False}

METHODS = {
    "fedu": Method(predictor="dapu"),
    "fedbyol": Method(),
    "fedema": Method(update="ema", predictor="ema"),
    "fedsimsiam": Method("simsiam:SimSiam", has_target=False),
    "fedsimclr": Method("simclr:SimCLR", **WITHOUT_PREDICTOR, settings={"temperature": temperature(0.07)}),
    "fedmoco-v1": Method(
        "moco:MoCo", has_predictor=False, head=(128,), settings={"temperature": temperature(0.07), "queue": QUEUE}, jitter=0.5
    ),
    "fedmoco-v2": Method("moco:MoCo", has_predictor=False, head=(0, 128), settings={"temperature": temperature(0.2), "queue": QUEUE}),
    "fedca": Method(
        "fedca:FedCA", **WITHOUT_PREDICTOR, settings={"temperature": temperature(0.07), "dictionary": DICTIONARY},
        rule="fedca:share_dictionary", public=0.02,
    ),
    "fedx": Method(
        "fedx:FedX", has_target=False, ablations=False, head=(256, "relu", 256),
        settings={"temperature": temperature(0.1), "target_temperature": TARGET_TEMPERATURE},
    ),
    "orchestra": Method(
        "orchestra:Orchestra", **WITHOUT_PREDICTOR, head=(512, 512, "standardise"), rule="orchestra:cluster",
        settings={"temperature": temperature(0.1), **CLUSTERS},
    ),
    "fedbarlow": Method("barlow:BarlowTwins", **WITHOUT_PREDICTOR, settings={"redundancy": REDUNDANCY}),
    "fedalignuniform": Method("alignuniform:AlignUniform", **WITHOUT_PREDICTOR, settings={"uniformity": SPREAD}),
    "fedavg-supervised": Method("supervised:Supervised", **WITHOUT_PREDICTOR, uses_labels=True),
    "fedu2": Method("fedu2:FedU2", settings={"uniformity": UNIFORMITY, "server_lr": SERVER_LR}, rule="fedu2:move_in_unison"),
    "ldawa": Method(rule="ldawa:weigh_by_angle"),
    "single": Method(servers="each"),
    "central": Method(servers="pooled"),
    "untrained": Method(trains=False),
}  # fmt: skip
SERVER_RULES = {"mean": "", "median": "robust:median", "trimmed": "robust:trimmed"}  # where a method has no rule of its own


def row_of(method: str) -> Method:
    """A method's row: in the table, or its own."""
    return method.content if isinstance(method, Own) else METHODS[method]


ABLATED = ("aggregate", "update", "predictor")  # the columns of a method's row that are options too

PAPER = {"encoder": "resnet18", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "knn_every": 10}
RECIPES = {"fashion": {"encoder": "tiny", "rounds": 8, "local_epochs": 2, "batch_size": 32, "lr": 0.1, "knn_every": 2}}
FOLDER_OPTIONS = ("image_size", "pixel_range", "skip_broken", "labels", "no_cache")  # they say how a folder's images are read
ENCODERS = ("tiny", "small", "resnet18-narrow", "resnet18", "resnet50")
DIRICHLET = ("dirichlet", "dirichlet-balanced")
PARTITIONS = ("classes", "iid", *DIRICHLET, "folders", "parties")
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}


# ------------------------------------------------------------------------------------------------------- the options


def option(
    default: object, help: str, choices: Collection[str] = (), type: Callable[[str], Any] = str, shown: str = "", host: bool = False
) -> Any:
    """A field of Options. choices: looked up when a value is checked. type: checks and converts a value, given as text.

    shown: the default in words, if it depends on other options.

    host: whether the option says where a run computes and not what, so that it may change when the run is resumed.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "type": type, "shown": shown, "host": host})


def value_range(text: str) -> str:
    """An argparse type: two numbers LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0, 0
    if not -math.inf < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs two numbers LOW,HIGH, the lower one first")
    return text


def process_count(text: str) -> int | str:
    """An argparse type: a number of processes, or auto."""
    try:
        return text if text == "auto" else COUNT(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def path_text(text: str) -> str:
    """An argparse type: a path as it was typed, which a run stores so."""
    user_path(text)
    return text


def partition_kind(text: str) -> str:
    """An argparse type: a way to partition the images, or a file that says it."""
    if text not in PARTITIONS and not text.endswith((".json", ".csv")):
        files = f"a file FILE.json or FILE.csv{nearest(text, PARTITIONS)}"
        raise argparse.ArgumentTypeError(f"got {text!r}, needs one of {', '.join(PARTITIONS)}, or {files}")
    return text


def encoder_name(text: str) -> str:
    """An argparse type: a backbone of this project, or one of timm's, which models.py looks up."""
    if text not in ENCODERS and not (text.startswith("timm:") and text[5:]):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs one of {', '.join(ENCODERS)}, or timm:NAME{nearest(text, ENCODERS)}")
    return text


def method_name(text: str) -> str:
    """An argparse type: a method of the table, or the file of another."""
    if text not in METHODS and not text.endswith(".py"):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs one of {', '.join(METHODS)}, or a file PATH.py{nearest(text, METHODS)}")
    return text


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and their partition over the clients."""

    dataset: str = option(
        "fashion", "fashion (embedded), cifar10, cifar100, a file PATH.npz or a folder of images, see docs/data.md", type=path_text,
    )  # fmt: skip
    data_root: str = option("~/.cache/fedu", "folder with CIFAR: NAME.npz, or torchvision's archive, downloaded if need be", host=True)
    image_size: int = option(32, "side in pixels to which a folder's images are resized and cropped", type=number(int, 8))
    pixel_range: str | None = option(
        None, "of a folder's images above 8 bits: the values that become 0 and 255, as --pixel-range=LOW,HIGH", type=value_range,
        shown="0,65535 if whole numbers use its upper half, else the set's lowest and highest",
    )  # fmt: skip
    skip_broken: bool = option(False, "leave out a folder's images that cannot be read")
    labels: str | None = option(None, "a CSV of a folder's images with the columns file,label and perhaps party and split", type=path_text)
    no_cache: bool = option(False, "decode a folder's images into memory, not once into a file under --data-root", host=True)
    holdout: float = option(
        0.0, "fraction of the labelled training images, the same of each class, that become test images where there are none",
        type=number(float, 0, 0.9),
    )  # fmt: skip
    partition: str = option(
        "classes", "how the clients share the images: classes, iid; dirichlet: sizes and shares of the classes differ; "
        "dirichlet-balanced: only the shares of the classes differ; folders: each client has one in the data set; "
        "parties: the array client_train or the column party says it; FILE.json: a list of indices for each client; FILE.csv: file,party",
        type=partition_kind,
    )  # fmt: skip
    save_partition: str | None = option(
        None, "write each client's images to this file, for --partition FILE.json", type=path_text, host=True
    )  # fmt: skip
    dry_run: bool = option(False, "print each client's number of images, draw them in partition.png, and do not train", host=True)
    classes_per_client: int | None = option(None, "classes of each client, for --partition classes", type=COUNT, shown="1/K of the classes")
    alpha: float = option(0.5, "concentration of both Dirichlet partitions; smaller: clients differ more", type=number(float, 1e-3, 1e6))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The method: what passes between clients and server, and what a client takes from it."""

    method: str = option(
        "fedu", f"one of {', '.join(METHODS)}; or a file PATH.py of your own, see docs/extending.md; it sets the next three",
        METHODS,
    )  # fmt: skip
    aggregate: str = option(None, "the encoder that clients upload", ("online", "target"), shown="by method")
    update: str = option(
        None, "the encoder of a client that the average replaces; ema: the average is mixed into the online encoder",
        ("online", "target", "both", "ema"), shown="by method",
    )  # fmt: skip
    predictor: str = option(
        None, "the predictor that a client takes; global: the average, local: its own, dapu: the average if its divergence is below mu, "
        "ema: a mixture of both",
        ("global", "local", "dapu", "ema"), shown="by method",
    )  # fmt: skip
    mu: float = option(None, "DAPU's threshold; inf: always the average, 0: in a first round only", type=number(float, 0), shown="0.4")
    tau: float = option(0.7, "FedEMA: weight of a client's own model at its first measured divergence", type=PROBABILITY)
    divergence: str = option(
        "layer-mean", "layer-mean: mean over the backbone's layers of the L2 norm of the change (authors' code); "
        "squared: squared L2 norm of the whole encoder's change (paper; needs its own --mu)", ("layer-mean", "squared"),
    )  # fmt: skip
    divergence_from: str = option(
        "received", "received: how far training moved the encoder; global: distance of the client's encoder from the next average",
        ("received", "global"),
    )  # fmt: skip
    first_target: str = option("copy", "shared: no EMA in a client's first round, as in the authors' code", ("copy", "shared"))
    server_rule: str = option(
        "mean", "what the server makes of the uploads: their mean weighted by images; or of each number the median, or the mean without "
        "the smallest and the largest fifth (at least one each)", SERVER_RULES,
    )  # fmt: skip
    statistics: str = option(
        "shared", "BatchNorm's running statistics, weights and biases: averaged like all else, or kept by each client (FedBN), whose "
        "encoders are then evaluated one by one", ("shared", "local"),
    )  # fmt: skip
    no_predictor: bool = option(False, "BYOL and SimSiam without a predictor")
    no_stop_gradient: bool = option(False, "BYOL and SimSiam with gradients through the target's projections")
    settings: dict[str, float] = option(None, "numbers of the method's objective, by name", shown="by method")


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The federation: how many clients there are, who takes part in a round, and what happens when one fails."""

    clients: int = option(5, "number of clients (K)", type=COUNT)
    clients_per_round: int | None = option(None, "clients drawn for each round", type=COUNT, shown="all")
    dropout: float = option(0.0, "probability that a drawn client fails to report", type=PROBABILITY)
    on_nonfinite: str = option("skip", "what to do if an upload is not finite: leave it out, or stop", ("skip", "error"))
    max_drift: float = option(
        10.0, "an upload that moved more than this many times as far as the median of its round is an outlier, if the round has three or "
        "more; inf: none is", type=number(float, 1),
    )  # fmt: skip
    on_outlier: str = option("drop", "what to do with an outlier: leave it out, or shorten its change to --max-drift", ("drop", "clip"))
    dp_clip: float | None = option(
        None, "differential privacy at each client: the change that it uploads, of everything together, is shortened to this L2 norm",
        type=number(float, 1e-6, 1e6), shown="no bound",
    )  # fmt: skip
    dp_noise: float | None = option(
        None, "and each number of it gets Gaussian noise of this many times --dp-clip as its deviation", type=number(float, 1e-3, 1e3),
        shown="none",
    )  # fmt: skip
    dp_delta: float = option(1e-5, "delta of the epsilon that is printed for --dp-noise", type=number(float, 1e-15, 0.1), host=True)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Local training: networks, rounds and steps."""

    encoder: str = option(
        None, f"backbone: one of {', '.join(ENCODERS)}, or timm:NAME, a model of the package timm", type=encoder_name,
        shown="resnet18; fashion: tiny",
    )  # fmt: skip
    norm: str = option(
        "batch", "normalisation in the backbone: BatchNorm, or GroupNorm, which has no running statistics", ("batch", "group"),
    )  # fmt: skip
    init: str | None = option(
        None, "begin with the trained encoder of this run, or the backbone's weights in FILE.safetensors or FILE.pth, also ImageNet's of "
        "torchvision or timm", type=path_text, shown="random weights",
    )  # fmt: skip
    views: str | None = option(
        None, "draw views by the function view(images, generator) in this file PATH.py, see docs/extending.md",
        shown="random crop, flip, colours",
    )  # fmt: skip
    rounds: int = option(None, "number of rounds (R)", type=COUNT, shown="100; fashion: 8")
    local_epochs: int = option(None, "epochs of a client in a round (E)", type=COUNT, shown="5; fashion: 2")
    batch_size: int = option(None, "B; the last partial batch of an epoch is dropped", type=number(int, 2), shown="128; fashion: 32")
    lr: float = option(None, "learning rate of round 0; cosine over rounds", type=POSITIVE, shown="0.032; fashion: 0.1")
    momentum: float = option(0.9, "of SGD, which begins each round with none; 0: plain SGD", type=number(float, 0, 0.999))
    weight_decay: float = option(5e-4, "of SGD, on all parameters", type=number(float, 0, 1))
    ema_decay: float = option(0.99, "m of the target's moving average; 1: the target does not move", type=PROBABILITY)
    precision: str = option("fp32", "number format of the networks' arithmetic", ("fp32", "bf16"))
    compile: bool = option(False, "let torch.compile fuse what lies between convolutions, which takes it a minute at first")


@dataclass(frozen=True, kw_only=True)
class Host:
    """The run: its seed, its device, and what it logs."""

    seed: int = option(0, "random numbers are keyed by (seed, purpose, round, client)", type=number(int, 0, 2**63 - 1))
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), host=True)
    processes: int | str = option(
        "auto", "on a CPU: processes that train the clients of a round side by side, and share out torch's threads; auto: as many as end a "
        "round first", type=process_count, host=True,
    )  # fmt: skip
    knn_every: int = option(None, "rounds between kNN measurements, 0 for none", type=number(int, 0), shown="10; fashion: 2")
    log: str = option("none", "also log the rounds to RUN/tensorboard", ("none", "tensorboard"), host=True)


class Ineffective(InputError):
    """An option, or a setting of the objective, that changes nothing together with the other options. name: its name."""

    def __init__(self, name: str, sentence: str):
        super().__init__(sentence)
        self.name = name


GROUPS = {"data": Data, "method": Exchange, "federation": Clients, "training": Training, "run": Host}


@dataclass(frozen=True, kw_only=True)
class Options(Host, Training, Clients, Exchange, Data):
    """All options of a run; what is None, or not given, takes its value from the method's row and the data set's recipe.

    Raises InputError for a value out of its range, and Ineffective for an option that changes nothing together with the others.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is not f.default:
                object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name)))
        object.__setattr__(self, "settings", resolved_settings(self.method, self.settings or {}))
        if self.divergence == "squared" and self.mu is None and (self.predictor or row_of(self.method).predictor) == "dapu":
            raise InputError("--divergence squared needs a --mu of its own, since 0.4 belongs to layer-mean")
        default = self.resolved_defaults()
        for name, value in default.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.refuse_ineffective(name for name, value in default.items() if getattr(self, name) != value)
        for name, usual in default["settings"].items() if self.views else ():
            if name in VIEWS and self.settings[name] != usual:
                raise Ineffective(name, f"--set {name}={self.settings[name]:g} changes nothing: --views {self.views} draws the views")
        if (self.clients_per_round or 1) > self.clients:
            raise InputError(f"--clients-per-round got {self.clients_per_round}, there are {self.clients} clients")
        if self.server_rule == "trimmed" and (uploads := self.clients_per_round or self.clients) < 3:
            raise InputError(f"--server-rule trimmed needs at least 3 clients a round, and there are {uploads}: use median")

    def resolved_defaults(self) -> dict[str, object]:
        """The default of each option, for this method and data set."""
        row = row_of(self.method)
        default = {f.name: f.default for f in fields(self)} | {name: getattr(row, name) for name in ABLATED} | {"mu": 0.4}
        default |= RECIPES.get(self.dataset, PAPER) | {"settings": resolved_settings(self.method, {})}
        return default | ({"predictor": "global"} if self.no_predictor else {})

    def refuse_ineffective(self, given: Iterable[str]) -> None:
        """Raises Ineffective if an option among `given` changes nothing because of the other options."""
        row = row_of(self.method)
        is_folder = not (self.dataset in ("fashion", *CIFAR_CLASSES) or self.dataset.endswith(".npz"))
        with_predictor = "a method that has a predictor" + " and one server" * row.has_predictor
        with_target = "a method that has a target encoder"
        goes_with = {  # of each option that changes nothing here, what it goes with
            "predictor": (not row.has_predictor or self.no_predictor or row.servers != "one", with_predictor),
            **dict.fromkeys(("no_predictor", "no_stop_gradient"), (not (row.has_predictor and row.ablations), "BYOL or SimSiam")),
            "server_rule": (bool(row.rule) or row.servers != "one", "a method whose server takes the mean of several clients"),
            "statistics": (row.servers != "one", "a method with one server"),
            "aggregate": (self.aggregate == "target" and not row.has_target, with_target),
            "update": (self.update in ("target", "both") and not row.has_target, with_target),
            "mu": (self.predictor != "dapu", "--predictor dapu"),
            "tau": ("ema" not in (self.update, self.predictor), "--update ema or --predictor ema"),
            "divergence_from": (not {"dapu", "ema"} & {self.update, self.predictor}, "--predictor dapu, or --update or --predictor ema"),
            "ema_decay": (not row.has_target, with_target),
            "first_target": (not row.has_target, with_target),
            "classes_per_client": (self.partition != "classes", "--partition classes"),
            "alpha": (self.partition not in DIRICHLET, "--partition dirichlet or dirichlet-balanced"),
            "norm": (self.encoder.startswith("timm:"), "an encoder that is not timm's, whose names say their normalisation"),
            "max_drift": (row.servers != "one", "a method whose clients share a server"),
            "on_outlier": (row.servers != "one" or self.max_drift == math.inf, "a finite --max-drift, and clients that share a server"),
            "dp_clip": (row.servers != "one", "a method whose clients share a server"),
            "dp_noise": (self.dp_clip is None, "--dp-clip"),
            "dp_delta": (self.dp_noise is None, "--dp-noise"),
            "clients_per_round": (row.servers == "pooled", "a method with more than one client"),
            **dict.fromkeys(FOLDER_OPTIONS, (not is_folder, "a folder of images")),
        }
        for name in given:
            changes_nothing, where = goes_with.get(name, (False, ""))
            if changes_nothing:
                value = getattr(self, name)
                got = flag(name) + ("" if value is True else f" {value}")
                raise Ineffective(name, f"{got} changes nothing in --method {self.method} with its other options: it goes with {where}")


OPTIONS = {f.name: f for f in fields(Options)}
MOVABLE = ("dataset", "labels")  # these may be named anew when a run is resumed or evaluated, and a hash says whether they hold the same
HOST_OPTIONS = tuple(name for name, f in OPTIONS.items() if f.metadata["host"])


def run_name(options: Options) -> str:
    """The default name of a run: DATASET-METHOD-Kclients-sSEED, then each option that differs from its default, as in `-mu0.2-rounds20`.

    Runs that differ in an option have different names, unless it is one of HOST_OPTIONS. A name of more than 60 characters is cut and ends
    in a hash of the whole name. So does the name of a run on a file or folder of images, with a path in an option, which it lacks, or with
    a method that is not in the table.
    """
    stem = f"{Path(options.dataset).stem}-{Path(options.method).stem}-{options.clients}clients-s{options.seed}"
    values, default = asdict(options), options.resolved_defaults()
    values, default = values | values.pop("settings"), default | default.pop("settings")
    told = ("dataset", "method", "clients", "seed", *HOST_OPTIONS)
    name = stem + "".join(changed_in_name(k, v) for k, v in values.items() if k not in told and v != default[k])
    own = "".join(value.digest for value in (options.method, options.views) if isinstance(value, Own))
    if len(name) <= 60 and os.sep not in name and Path(options.dataset).stem == options.dataset and not own:
        return name
    return f"{name.replace(os.sep, '-')[:49]}-{hashlib.sha256(os.fsencode(f'{options.dataset} {name}{own}')).hexdigest()[:10]}"


def changed_in_name(name: str, value: object) -> str:
    """An option as part of a run's name: `-mu0.2`, `-encoder-small`, or for a flag `-no-predictor`."""
    text = "" if value is True else str(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        text = f"{value:g}"
    return f"-{name.replace('_', '-')}" + ("" if text[:1].isdigit() else "-" * bool(text)) + text


def flag(name: str) -> str:
    """The flag of an option on the command line."""
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


def in_words(value: object) -> str:
    """An option's value as it is typed."""
    return " ".join(f"{k}={v:g}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def checked(name: str, value: object) -> object:
    """An option's value after its conversion; raises InputError if it is none of the choices, or out of range."""
    f = OPTIONS[name]
    if name == "settings":  # checked by resolved_settings, which knows the method
        return value
    if name in ("method", "views"):
        return {"method": method_of, "views": views_of}[name](value)
    choices = (True, False) if isinstance(f.default, bool) else f.metadata["choices"]
    if choices and value not in choices:
        meant = "" if isinstance(f.default, bool) else nearest(str(value), choices)
        raise InputError(f"{flag(name)} got {value!r}, needs one of {', '.join(map(str, choices))}{meant}")
    if choices:
        return value
    try:
        return f.metadata["type"](str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{flag(name)} {error}") from None


def method_of(value: str | Method) -> str:
    """A method by its name, its file or its row. Raises InputError for what is none."""
    if isinstance(value, Own):
        return value
    if isinstance(value, Method):
        return of_notebook(value)
    try:
        name = method_name(str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--method {error}") from None
    return name if name in METHODS else load(user_path(name, "--method"), name, "method")


def views_of(value: str | Callable) -> str:
    """Views by their file, or by their function. Raises InputError for what is neither."""
    if isinstance(value, Own):
        return value
    return of_notebook(value) if callable(value) else load(user_path(value, "--views"), str(value), "views")


def settings_of(method: str) -> dict[str, Setting]:
    """The settings that a method has."""
    row = row_of(method)
    jitter = VIEWS["jitter"]._replace(default=row.jitter)
    return {**VIEWS, "jitter": jitter, "decorrelation": DECORRELATION, **row.settings}


def resolved_settings(method: str, given: Mapping[str, object]) -> dict[str, float]:
    """A method's settings, given ones in place of the defaults. Raises Ineffective for an unknown name, InputError for a wrong value."""
    known = settings_of(method)
    if unknown := given.keys() - known.keys():
        raise Ineffective(min(unknown), f"--set got {min(unknown)!r}; --method {method} has the settings {', '.join(known)}")
    values = {}
    for name, setting in known.items():
        values[name] = setting_value(name, setting, str(given[name])) if name in given else setting.default
    return values


def setting_value(name: str, setting: Setting, text: str) -> float:
    """A setting's value. Raises InputError if its type, which may be the user's own function, refuses the text or gives no number."""
    try:
        value = setting.type(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--set {name} {error}") from None
    except Exception as error:
        raise InputError(f"--set {name} got {text!r} ({first_line(error)})") from None
    if not isinstance(value, int | float):
        raise InputError(f"--set {name} got {text!r}, of which its type makes {value!r:.60} and no number")
    return value


def defaults(method: str) -> dict[str, object]:
    """The defaults of a method, without the options that a recipe sets."""
    return {name: value for name, value in asdict(Options(method=method)).items() if name not in PAPER}


# ------------------------------------------------------------------------------------------ the command line of fedu.py


class Command(NamedTuple):
    """A command line of fedu.py: the options that were given, and the run folder."""

    given: dict[str, Any]
    out: Path | None
    resume: Path | None
    overwrite: bool


@command_line()
def parse(argv: Sequence[str] | None = None, description: str | None = None) -> Command:
    """Read the command line of fedu.py. A mistake ends the process with one sentence and exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    named = [name for option, name in pairwise(words) if option == "--method" and name.endswith(".py")]
    try:
        shown = [method_of(name) for name in named] if {"-h", "--help"} & {*words} else []
    except InputError as error:
        Parser(description).error(str(error))
    parser = training_parser(description, shown)
    given = vars(parser.parse_args(argv))
    out, resume, overwrite = given.pop("out", None), given.pop("resume", None), given.pop("overwrite", False)
    if resume and (out or overwrite):
        parser.error("--resume continues a run in its own folder; it goes with neither --out nor --overwrite")
    if not resume:
        try:
            Options(**given).refuse_ineffective(given)
        except InputError as error:
            parser.error(str(error))
    return Command(given, out, resume, overwrite)


def training_parser(description: str | None = None, own: Sequence[str] = ()) -> Parser:
    """The parser of fedu.py: the fields of Options in their groups, and the run folder. own: methods whose settings its help names too."""
    parser = Parser(description)
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title, group.__doc__)
        for f in fields(group):
            if f.name == "settings":
                section.add_argument("--set", action=SetAction, dest="settings", metavar="NAME=VALUE", help=settings_help([*METHODS, *own]))
            elif isinstance(f.default, bool):
                section.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            else:
                values = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"type": f.metadata["type"]}
                values = {"type": method_name} if f.name == "method" else values
                section.add_argument(flag(f.name), help=f"{f.metadata['help']}  [{f.metadata['shown'] or f.default}]", **values)
    section.add_argument("--out", type=user_path,
        help="run folder  [runs/DATASET-METHOD-Kclients-sSEED, and each option that differs from its default]")  # fmt: skip
    section.add_argument("--resume", type=user_path, metavar="RUN", help="continue the run in this folder")
    section.add_argument("--overwrite", action="store_true", help="replace the run in an existing folder")
    return parser


class SetAction(argparse.Action):
    """Collects every `--set NAME=VALUE` in one dict; of a name that is given twice, the last value counts."""

    def __call__(self, parser, namespace, text, option_string=None) -> None:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            parser.error(f"--set got {text!r}, needs NAME=VALUE, as temperature=0.1")
        namespace.settings = getattr(namespace, "settings", {}) | {name: value}


def settings_help(names: Sequence[str]) -> str:
    """What `--set` can change: each setting with the methods that have it and its defaults there."""
    settings: dict[str, dict[str, Setting]] = {}
    for method in names:
        for name, setting in settings_of(method).items():
            settings.setdefault(name, {})[method] = setting
    texts = []
    for name, rows in settings.items():
        defaults = [setting.default for setting in rows.values()]
        common = max(defaults, key=defaults.count)
        others = [f"{method} {setting.default:g}" for method, setting in rows.items() if setting.default != common]
        methods = "all methods" if len(rows) == len(names) else ", ".join(rows)
        texts.append(f"{name} ({methods}: {', '.join([f'{common:g}', *others])}): {next(iter(rows.values())).help}")
    return "change a number of the method's objective; may be repeated. " + "; ".join(texts) + "  [by method]"


# ------------------------------------------------------------------------------------------ the command line of eval.py

EVALUATION_EPOCHS = {"linear": 200, "semi": 100}
# the tasks of eval.py, of which a command line has one
TASKS = {
    "linear": "--linear",
    "knn": "--knn",
    "semi": "--semi",
    "export": "--export FILE.npz",
    "weights": "--export FOLDER, FILE.safetensors or FILE.onnx",
    "spectrum": "--spectrum",
    "table": "--table",
    "plot": "--plot",
    "against": "--against",
    "report": "--report",
}
EVALUATIONS = ("linear", "knn", "semi")
# each further option of eval.py: its default, and the tasks in which it changes something
TASK_OPTIONS = {
    "features": ("backbone", ("linear", "knn", "spectrum", "export")),
    "head": ("linear", ("semi",)),
    "epochs": (None, ("linear", "semi")),
    **dict.fromkeys(("transfer", "dataset", "data_root"), (None, (*EVALUATIONS, "spectrum", "export"))),
    "seed": (0, ("linear", "semi", "spectrum")),
    "device": ("auto", (*EVALUATIONS, "spectrum", "export")),
    "out": (None, ("spectrum", "table", "plot", "against", "report")),
    "size": (None, ("spectrum", "plot", "against")),
    "no_title": (False, ("spectrum", "plot", "against")),
}


def inches(text: str) -> tuple[float, float]:
    """An argparse type: width and height in inches, as W,H."""
    try:
        width, height = map(float, text.split(","))
    except ValueError:
        width = height = 0
    if not (1 <= width <= 100 and 1 <= height <= 100):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs W,H in inches from 1 to 100, as 3.3,2.5")
    return width, height


def evaluation_parser(description: str | None = None) -> Parser:
    """The parser of eval.py, whose namespace holds only what was given."""
    parser = Parser(description)
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", nargs="*", type=user_path, metavar="RUN", default=[],
        help="run folders, or folders of them  [the newest run under runs/; for --table and --against all of them]")  # fmt: skip
    group = parser.add_argument_group("tasks", "What to do with the runs: one of these.")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--linear", action="store_true",
        help="train one linear layer on the frozen encoder's standardised features: Adam 3e-3, batches of 512 (the default)")  # fmt: skip
    task.add_argument("--knn", action="store_true", help="vote of the 200 nearest training images, weighted by exp(cosine / 0.1)")
    task.add_argument("--semi", type=number(float, 0, 1, open_low=True), metavar="F",
        help="fine-tune backbone and a new head on a class-balanced fraction F of the labels: Adam 1e-3, batches of 128")  # fmt: skip
    task.add_argument("--spectrum", action="store_true",
        help="measure effective rank, alignment and uniformity of the features, which needs no labels, and draw the singular values of "
        "their covariance")  # fmt: skip
    task.add_argument("--table", action="store_true", help="print the runs' evaluations as Markdown, a row for each setting")
    task.add_argument("--plot", action="store_true", help="draw divergence, predictors, loss and kNN accuracy of every round")
    task.add_argument("--against", metavar="OPTION",
        help="draw accuracies against an option of fedu.py, as `mu`, a panel for each evaluation; `round`: kNN accuracy by round; "
        "`ablation`: bars")  # fmt: skip
    task.add_argument("--report", action="store_true",
        help="write a web page: accuracies beside published ones, limits, figures, options, commands; it loads nothing")  # fmt: skip
    task.add_argument("--export", type=user_path, metavar="PATH",
        help="PATH.npz: representations and labels of all images, as train, test, y_train and y_test; PATH.safetensors or PATH.onnx: the "
        "backbone; a folder: Hugging Face's layout with a model card; for `single` of each client k as PATH-k")  # fmt: skip
    how = parser.add_argument_group("settings", "How the task is done; an option that changes nothing in it is refused.")
    how.add_argument("--features", choices=("backbone", "projector", "pixels"),
        help="what represents an image; pixels: no encoder  [backbone]")  # fmt: skip
    how.add_argument("--head", choices=("linear", "mlp"), help="for --semi; mlp: Linear-BN-ReLU-Linear of hidden width 4096  [linear]")
    how.add_argument("--epochs", type=number(int, 1), help="of --linear and --semi  [200 and 100]")
    how.add_argument("--dataset", type=path_text, metavar="DATASET", help="where the run's data set lies now  [the run's]")
    how.add_argument("--transfer", type=path_text, metavar="DATASET", help="evaluate on another data set than the run was trained on")
    how.add_argument("--seed", type=number(int, 0, 2**63 - 1), help="of the head, the batches, the labelled subset and the views  [0]")
    how.add_argument("--data-root", help="folder with CIFAR  [the run's]")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute  [auto]")
    how.add_argument("--out", type=user_path,
        help="file of a figure, as .png, .pdf or .svg, of a table, .md, .csv or .tex (with booktabs), or of --report  "
        "[RUN/divergence.png or RUN/spectrum.png; of several runs comparison.png or spectrum.png; OPTION.png; a table is printed; "
        "report.html]")  # fmt: skip
    how.add_argument("--size", type=inches, metavar="W,H", help="of a figure, in inches; its letters get smaller with its width")
    how.add_argument("--no-title", action="store_true", help="leave out a figure's title, for a caption in a paper")
    return parser


def parse_evaluation(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line of eval.py: its `task`, a key of TASKS, and a value of each option.

    A mistake ends the process with one sentence and exit status 2.
    """
    parser = evaluation_parser(description)
    given = vars(parser.parse_args(argv))
    task = next((name for name in TASKS if name in given), "linear")
    if task == "export" and given["export"].suffix in ("", ".safetensors", ".onnx"):
        task = "weights"
    elif task == "export" and given["export"].suffix != ".npz":
        parser.error(
            f"--export got {given['export']}, needs a name that ends in .npz, .safetensors or .onnx, or a folder's without an ending"
        )
    for name, (_, tasks) in TASK_OPTIONS.items():
        if name in given and task not in tasks:
            parser.error(f"{flag(name)} goes with {' or '.join(TASKS[t] for t in tasks)}, not with {TASKS[task]}")
    if {"transfer", "dataset"} <= given.keys():
        parser.error("--dataset names the run's own data set, and --transfer another one: give one of them")
    default = {name: value for name, (value, _) in TASK_OPTIONS.items()} | {"epochs": EVALUATION_EPOCHS.get(task)}
    return argparse.Namespace(task=task, **default | given)
