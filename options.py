"""The options of a run: their types and defaults, the table of methods, recipes, and the command line that is made from them.

Only the standard library is imported here, so that `--help` and a mistyped option are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from runtime.cli import InputError, Parser, number

# ------------------------------------------------------------------------------------------------ methods and recipes


class Method(NamedTuple):
    """A method is a row: what a client minimises, who averages with whom, and what a client takes when the average arrives.

    `aggregate`, `update` and `predictor` are options too: giving one of them makes an ablation.
    """

    objective: str = "byol"  # a key of models.OBJECTIVES
    servers: str = "one"  # one: all clients share a server; each: every client has its own; pooled: one client holds all images
    aggregate: str = "online"
    update: str = "online"
    predictor: str = "global"
    trains: bool = True
    public: float = 0.0  # FedCA: fraction of the training images that are public; its base model is trained on them, and no client has them
    dictionary: int = 0  # FedCA: how many representations the clients share through the server


METHODS = {
    "fedu": Method(predictor="dapu"),
    "fedbyol": Method(),
    "fedema": Method(update="ema", predictor="ema"),
    "fedsimsiam": Method("simsiam"),
    "fedsimclr": Method("simclr"),
    "fedmoco-v1": Method("moco-v1"),
    "fedmoco-v2": Method("moco-v2"),
    "fedca": Method("fedca", public=0.02, dictionary=4096),
    "fedavg-supervised": Method("supervised"),
    "single": Method(servers="each"),
    "central": Method(servers="pooled"),
    "untrained": Method(trains=False),
}
ABLATED = ("aggregate", "update", "predictor")  # the columns of a method's row that are options too

PAPER = {"encoder": "resnet18", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "knn_every": 10}
RECIPES = {"fashion": {"encoder": "tiny", "rounds": 8, "local_epochs": 2, "batch_size": 32, "lr": 0.1, "knn_every": 2}}
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}


# ------------------------------------------------------------------------------------------------------- the options


def option(
    default: object, help: str, choices: Sequence[str] = (), type: Callable[[str], Any] = str, shown: str = "", host: bool = False
) -> Any:
    """A field of Options. type: checks and converts a value, given as text. shown: the default in words, if it depends on other options.

    host: whether the option says where a run computes and not what, so that it may change when the run is resumed.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "type": type, "shown": shown, "host": host})


COUNT, PROBABILITY, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and their partition over the clients."""

    dataset: str = option("fashion", "fashion (embedded), cifar10, cifar100, a file PATH.npz or a folder PATH/{train,test}/CLASS/*")
    data_root: str = option("~/.cache/fedu", "folder with CIFAR: NAME.npz, or torchvision's archive, downloaded if need be", host=True)
    image_size: int = option(32, "side in pixels to which a folder's images are resized and cropped", type=number(int, 8))
    partition: str = option("classes", "how the images are partitioned over the clients", ("classes", "iid", "dirichlet"))
    classes_per_client: int | None = option(None, "classes of each client, for --partition classes", type=COUNT, shown="1/K of the classes")
    alpha: float = option(0.5, "concentration of --partition dirichlet; smaller: clients differ more", type=number(float, 1e-3, 1e6))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The method: what passes between clients and server, and what a client takes from it."""

    method: str = option("fedu", "a row of the table of methods; it sets the next three", tuple(METHODS))
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
    divergence: str = option("layer-mean", "the authors' code's, or the paper's, which needs its own --mu", ("layer-mean", "squared"))
    divergence_from: str = option("received", "a client's distance from the encoder it received, or from the next", ("received", "global"))
    first_target: str = option("copy", "shared: no EMA in a client's first round, as in the authors' code", ("copy", "shared"))
    no_predictor: bool = option(False, "BYOL and SimSiam without a predictor")
    no_stop_gradient: bool = option(False, "BYOL and SimSiam with gradients through the target's projections")


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The federation: how many clients there are, who takes part in a round, and what happens when one fails."""

    clients: int = option(5, "number of clients (K)", type=COUNT)
    clients_per_round: int | None = option(None, "clients drawn for each round", type=COUNT, shown="all")
    dropout: float = option(0.0, "probability that a drawn client fails to report", type=PROBABILITY)
    on_nonfinite: str = option("skip", "what to do if an upload is not finite: leave it out, or stop", ("skip", "error"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Local training: networks, rounds and steps."""

    encoder: str = option(None, "backbone", ("tiny", "small", "resnet18-narrow", "resnet18", "resnet50"), shown="resnet18; fashion: tiny")
    rounds: int = option(None, "number of rounds (R)", type=COUNT, shown="100; fashion: 8")
    local_epochs: int = option(None, "epochs of a client in a round (E)", type=COUNT, shown="5; fashion: 2")
    batch_size: int = option(None, "B; the last partial batch of an epoch is dropped", type=number(int, 2), shown="128; fashion: 32")
    lr: float = option(None, "learning rate of round 0; cosine over rounds", type=POSITIVE, shown="0.032; fashion: 0.1")
    ema_decay: float = option(0.99, "m of the target's moving average; 1: the target does not move", type=PROBABILITY)
    precision: str = option("fp32", "number format of the networks' arithmetic", ("fp32", "bf16"))
    compile: bool = option(False, "let torch.compile fuse what lies between convolutions, which takes it a minute at first")


@dataclass(frozen=True, kw_only=True)
class Host:
    """The run: its seed, its device, and what it logs."""

    seed: int = option(0, "random numbers are keyed by (seed, purpose, round, client)", type=number(int, 0, 2**63 - 1))
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), host=True)
    knn_every: int = option(None, "rounds between kNN measurements, 0 for none", type=number(int, 0), shown="10; fashion: 2")
    log: str = option("none", "also log the rounds to RUN/tensorboard", ("none", "tensorboard"), host=True)


GROUPS = {"data": Data, "method": Exchange, "federation": Clients, "training": Training, "run": Host}


@dataclass(frozen=True, kw_only=True)
class Options(Host, Training, Clients, Exchange, Data):
    """All options of a run; what is None, or not given, takes its value from the method's row and the data set's recipe.

    Raises InputError for a value out of its range, and for an option that changes nothing together with the others.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is not f.default:
                object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name)))
        if self.divergence == "squared" and self.mu is None and (self.predictor or METHODS[self.method].predictor) == "dapu":
            raise InputError("--divergence squared wants a --mu of its own, since 0.4 belongs to layer-mean")
        default = self.own_defaults()
        for name, value in default.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.refuse_ineffective(name for name, value in default.items() if getattr(self, name) != value)
        if (self.clients_per_round or 1) > self.clients:
            raise InputError(f"--clients-per-round got {self.clients_per_round}, there are {self.clients} clients")

    def own_defaults(self) -> dict[str, object]:
        """The default of each option, for this method and data set."""
        row = METHODS[self.method]
        default = {f.name: f.default for f in fields(self)} | {name: getattr(row, name) for name in ABLATED} | {"mu": 0.4}
        default |= RECIPES.get(self.dataset, PAPER)
        return default | ({"predictor": "global"} if self.no_predictor else {})

    def refuse_ineffective(self, given: Iterable[str]) -> None:
        """Raises InputError if an option among `given` changes nothing because of the other options."""
        row = METHODS[self.method]
        has_predictor, has_target = row.objective in ("byol", "simsiam"), row.objective in ("byol", "moco-v1", "moco-v2")
        ineffective = {
            "predictor": not has_predictor or self.no_predictor or row.servers != "one",
            "no_predictor": not has_predictor,
            "no_stop_gradient": not has_predictor,
            "aggregate": self.aggregate == "target" and not has_target,
            "update": self.update in ("target", "both") and not has_target,
            "mu": self.predictor != "dapu",
            "tau": "ema" not in (self.update, self.predictor),
            "divergence_from": not {"dapu", "ema"} & {self.update, self.predictor},
            "ema_decay": not has_target,
            "first_target": not has_target,
            "classes_per_client": self.partition != "classes",
            "alpha": self.partition != "dirichlet",
            "clients_per_round": row.servers == "pooled",
            "image_size": self.dataset in ("fashion", *CIFAR_CLASSES) or self.dataset.endswith(".npz"),
        }
        for name in given:
            if ineffective.get(name):
                value = getattr(self, name)
                got = flag(name) + ("" if value is True else f" {value}")
                raise InputError(f"{got} changes nothing in --method {self.method} with its other options")


OPTIONS = {f.name: f for f in fields(Options)}
HOST_OPTIONS = tuple(name for name, f in OPTIONS.items() if f.metadata["host"])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def checked(name: str, value: object) -> object:
    """An option's value after its conversion; raises InputError if it is none of the choices, or out of range."""
    f = OPTIONS[name]
    choices = (True, False) if isinstance(f.default, bool) else f.metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{flag(name)} got {value!r}, wants one of {', '.join(map(str, choices))}")
    if choices:
        return value
    try:
        return f.metadata["type"](str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{flag(name)} {error}") from None


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


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> Command:
    """Read the command line of fedu.py. A mistake ends the process with one sentence and exit status 2."""
    parser = training_parser(description)
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


def training_parser(description: str | None = None) -> Parser:
    """The parser of fedu.py: the fields of Options in their groups, and the run folder."""
    parser = Parser(description)
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title, group.__doc__)
        for f in fields(group):
            if isinstance(f.default, bool):
                section.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            else:
                values = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"type": f.metadata["type"]}
                section.add_argument(flag(f.name), help=f"{f.metadata['help']}  [{f.metadata['shown'] or f.default}]", **values)
    section.add_argument("--out", type=Path, help="run folder  [runs/DATASET-METHOD-Kclients-sSEED]")
    section.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    section.add_argument("--overwrite", action="store_true", help="replace the run in an existing folder")
    return parser
