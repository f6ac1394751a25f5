"""Coordinate-wise median and trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498): servers' rules where some uploads may be faulty.

Each number of the model becomes the median of its K values, of an even K the mean of the two in the middle; or their mean without the
smallest and the largest fifth, `K // 5` on either side and at least one. As in the paper, the clients count equally, whatever their number
of images.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.uploads import COLUMNS

if TYPE_CHECKING:
    from federation import Server
    from models import Objective
    from runtime.uploads import Uploads


def median(server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """The coordinate-wise median, `[P]`. Raises InputError if the uploads were aggregated in tiles."""
    rows = uploads.rows()
    return mean_of_the_middle(rows, (len(rows) - 1) // 2)


def trimmed(server: Server, uploads: Uploads, networks: Objective, shared: list[Tensor]) -> Tensor:
    """The coordinate-wise trimmed mean, `[P]`; of fewer than three uploads, which leave nothing, the model as it was.

    Raises InputError if the uploads were aggregated in tiles.
    """
    rows = uploads.rows()
    if len(rows) < 3:
        print(f"--server-rule trimmed needs 3 uploads, and got {len(rows)}: the server's model stays as it is", file=sys.stderr)
        return server.model
    return mean_of_the_middle(rows, max(1, len(rows) // 5))


def mean_of_the_middle(rows: Tensor, cut: int) -> Tensor:
    """The mean of each column of `[K, P]` without its `cut` smallest and largest numbers: `[P]`."""
    return torch.cat([piece.sort(0).values[cut : len(rows) - cut].mean(0) for piece in rows.split(COLUMNS, 1)])
