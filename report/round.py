"""What a round reports: its line in metrics.jsonl, its traffic, and the uploads that were left out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from torch import Tensor

from federation import Server, Turn
from options import Options, row_of
from runtime.cli import InputError
from training import cosine


def num_bytes_sent(server: Server, num_floats: int, shared: Tensor | None) -> int:
    """Bytes sent one way for a client of this server: so many floats of the networks, and what is shared besides them."""
    size = num_floats * server.model.itemsize + (0 if shared is None else shared.nbytes)
    return size if server.communicates else 0


def refuse_nonfinite(round_: int, nonfinite: list[int], num_reported: int, on_nonfinite: str) -> None:
    """Name the clients whose uploads are not finite on stderr. Raises InputError if that ends the run."""
    if nonfinite and (on_nonfinite == "error" or not num_reported):
        who = f"the upload of client {nonfinite[0]} is not" if num_reported else "no upload is"
        raise InputError(f"round {round_}: {who} finite; lower --lr, or check the images")
    for k in nonfinite:
        print(f"round {round_}: the upload of client {k} is not finite and was left out", file=sys.stderr)


def name_outliers(round_: int, turns: list[Turn], max_drift: float) -> list[int]:
    """The clients whose uploads moved too far, left out or shortened; each is named on stderr."""
    outliers = [turn for turn in turns if turn.outlier]
    for turn in outliers:
        moved = "moved further than float32 can square"
        if max_drift < turn.outlier.times < math.inf:
            moved = f"moved {turn.outlier.times:.3g} times as far as the round's median, above --max-drift {max_drift:g}"
        done = "shortened" if turn.taken else "left out"
        print(f"round {round_}: the upload of client {turn.client.id} {moved}, and was {done}", file=sys.stderr, flush=True)
    return [turn.client.id for turn in outliers]


def describe_round(
    options: Options, round_: int, reported: list[Turn], dropped: Iterable[int], nonfinite: Iterable[int], outliers: Iterable[int]
) -> dict:  # fmt: skip
    """A round as its line in metrics.jsonl. Traffic, kNN and seconds are for the caller to fill in.

    reported: the turns whose uploads were taken, in the order of their clients' ids.
    """
    names = {0.0: "global", 1.0: "local"} if row_of(options.method).has_predictor and not options.no_predictor else {0.0: "-"}
    names |= {None: None}  # of a client that does not tell it
    return {
        "round": round_,
        "lr": cosine(options.lr, round_, options.rounds),
        "loss": [turn.loss for turn in reported],
        "divergence": [turn.client.divergence for turn in reported],
        "decided_on": [turn.start.divergence for turn in reported],
        "predictor": [names.get(turn.start.predictor, "mixed") for turn in reported],
        "own_share": [turn.start.predictor for turn in reported],
        "num_examples": [turn.client.num_examples for turn in reported],
        "clients": [turn.client.id for turn in reported],
        "dropped": sorted(dropped),
        "nonfinite": sorted(nonfinite),
        "outliers": sorted(outliers),
        "upload_bytes": 0,
        "download_bytes": 0,
        "knn": None,
        "seconds": 0.0,
    }
