"""Differential privacy at a client: what leaves it is clipped and noised, and epsilon is computed from how often that was done.

The privacy is local: an observer who sees all that left the client, as the server does, learns little about which images it has. Two sets
of images, however different, give changes that are at most `2 clip` apart.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.cli import InputError, first_line, locked, write_atomic

BLOCK = 1 << 20  # numbers that are drawn at a time


def release(upload: Tensor, received: Tensor, clip: float, noise: float, normal: Callable[[int], Tensor]) -> Tensor:
    """What leaves in place of an upload, `[P]`: `received + change min(1, clip / |change|) + noise clip z`.

    A change that is not finite counts as no change, because leaving the upload out would tell something about the images. noise: 0 for
    none. normal: draws z, so many standard normal numbers.
    """
    change = upload.double() - received.double()
    length = change.norm().item()
    change = change * min(1.0, clip / length) if 0 < length < math.inf else torch.zeros_like(change)
    if noise:
        change += (noise * clip) * normal(len(change)).to(change)
    return (received.double() + change).to(received.dtype)


def system_normal(count: int) -> Tensor:
    """Standard normal numbers from the operating system's randomness, float64 `[count]`, by Box and Muller (1958).

    Nobody can compute them from a seed, nor from some of them the others.
    """
    numbers = torch.empty(count, dtype=torch.float64)
    for piece in numbers.split(BLOCK):
        words = np.frombuffer(os.urandom(16 * -(-len(piece) // 2)), np.uint64).reshape(2, -1)
        uniform = ((words >> 11) + 0.5) * 2.0**-53  # above 0
        radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * math.pi * uniform[1]
        piece.copy_(torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]))[: len(piece)])
    return numbers


def epsilon(uploads: Mapping[float, int], delta: float) -> float:
    """Epsilon of all uploads together, for any two sets of images. uploads: how many had each `noise`; one of noise 0 makes it infinite.

    Each is a Gaussian mechanism of sensitivity `2 clip` and deviation `noise clip`. Several of them, also if each depends on those before,
    are together one of deviation `1 / sqrt(sum_i (2 / noise_i)^2)` for the sensitivity 1 (Dong, Roth and Su 2019, corollary 2), whose
    epsilon is exact (Balle and Wang 2018, theorem 8). Raises InputError if the package that computes it is not installed.
    """
    if 0 in uploads:
        return math.inf
    try:
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian  # takes seconds, and only noise needs it
    except ImportError:
        raise InputError("noise needs the package dp-accounting, which computes epsilon: `pip install 'dp-accounting>=0.6'`") from None
    return float(get_epsilon_gaussian(sum(count * (2 / noise) ** 2 for noise, count in uploads.items()) ** -0.5, delta))


def count_upload(ledger: Path, run: str, noise: float, delta: float) -> str:
    """Count an upload that is about to leave; returns a sentence with epsilon, of this run and of all runs in the ledger.

    ledger: a JSON file that has the run and the noise of each upload. Raises InputError if it cannot be read or written.
    """
    with locked(ledger.parent):
        uploads = [*read_ledger(ledger), (run, noise)]
        mine, whole = Counter(noise for name, noise in uploads if name == run), Counter(noise for _, noise in uploads)
        told = (
            f"{mine.total()} of this run is {epsilon(mine, delta):.4g}, after upload {len(uploads)} of all runs {epsilon(whole, delta):.4g}"
        )
        write_atomic(ledger, lambda file: file.write(json.dumps(uploads).encode() + b"\n"))
    return f"epsilon after upload {told}, at delta {delta:g}"


def read_ledger(ledger: Path) -> list[tuple[str, float]]:
    """The run and the noise of each upload. Raises InputError if the file is damaged, since a new one would forget them."""
    try:
        uploads = [(run, float(noise)) for run, noise in json.loads(ledger.read_text())]
        if not all(0 <= noise < math.inf for _, noise in uploads):
            raise ValueError("a noise in it is no number from 0")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{ledger}, which counts the uploads, cannot be read ({first_line(error)}): mend it, or nothing leaves") from None
    return uploads
