"""The methods, a row each, and what their options are where nobody gives them."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A method is a row: what a client minimises, who averages with whom, and what a client takes when the average arrives.

    `aggregate`, `update` and `predictor` are options too, which make the ablations.
    """

    objective: str = "byol"  # a key of models.OBJECTIVES
    federation: str = "all"  # all: one server; each: every client alone; pooled: one client that holds the union of the data
    aggregate: str = "online"  # the encoder that is uploaded and averaged: online, or target
    update: str = "online"  # what the average becomes: the online encoder, the target, both, or ema: mixed into the client's own online
    predictor: str = "global"  # the average, the client's own (local), dapu: global if the divergence < mu, else local; or ema: mixed
    trains: bool = True
    public: float = 0.0  # share of the training images that no client has, for a base model and the alignment with it
    dictionary: int = 0  # representations that clients share through the server


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
    "single": Method(federation="each"),
    "central": Method(federation="pooled"),
    "untrained": Method(trains=False),
}
COLUMNS = ("aggregate", "update", "predictor")  # options too, which make the ablations

DEFAULTS = {
    "dataset": "fashion", "data_root": "~/.cache/fedu", "image_size": 32,
    "method": "fedu", "mu": 0.4, "tau": 0.7, "divergence": "layer-mean", "divergence_from": "received",
    "first_target": "copy", "ema_decay": 0.99, "no_stop_gradient": False, "no_predictor": False,
    "clients": 5, "clients_per_round": None, "dropout": 0.0, "on_nonfinite": "skip",
    "partition": "classes", "classes_per_client": None, "alpha": 0.5,
    "seed": 0, "device": "auto", "precision": "fp32", "bank_memory": 0,
}  # fmt: skip
PAPER = {"encoder": "resnet18", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "knn_every": 10}
RECIPES = {"fashion": {"encoder": "tiny", "rounds": 12, "local_epochs": 2, "batch_size": 32, "lr": 0.032, "knn_every": 2}}
HOST_OPTIONS = ("data_root", "device", "bank_memory")  # where a run computes, not what: these may change on --resume


def defaults(method: str) -> dict:
    """The options of a method's row, and those that no recipe sets."""
    return DEFAULTS | {name: getattr(METHODS[method], name) for name in COLUMNS}
