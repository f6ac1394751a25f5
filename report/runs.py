"""A finished run, or an exported encoder, in Python: `fedu.load(PATH)`, and what `fedu.train` returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import load_unlabelled
from models import extract_features, load_backbone, load_encoders
from report.figures import plot
from runtime.cli import bars_are_hidden, user_path
from runtime.device import choose_device
from runtime.run import read_config, read_metrics
from sources import as_images as read_images


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its rounds as in metrics.jsonl. Of an exported encoder: its file, and no rounds."""

    folder: Path
    metrics: list[dict]

    @cached_property
    def encoders(self) -> list[nn.Module]:
        """The trained encoders: one for each client of `single` or with `statistics="local"`, else one in all.

        Each takes images, float32 `[N, 3, S, S]`, RGB in 0..1 without mean and deviation subtracted, and returns the backbone's features
        `[N, d]`. They are read once, in eval mode, on the CPU, and need no gradient. Raises InputError if they are missing or damaged.
        """
        if self.folder.suffix == ".safetensors":
            return [load_backbone(self.folder)]
        return [encoder.backbone for encoder in load_encoders(self.folder)]

    @property
    def encoder(self) -> nn.Module:
        """The trained encoder, see `encoders`; of `single`, client 0's."""
        return self.encoders[0]

    def features(self, images: Tensor | np.ndarray | Path | str, batch_size: int = 500) -> Tensor:
        """The features of images, float32 `[N, d]` on the CPU; with several encoders, as of `single`, `[encoders, N, d]`.

        images: uint8 `[N, 3, S, S]`, `[N, S, S, 3]` or grey `[N, S, S]`, or a path: a folder of images, which are resized to the run's
        image size, or a file PATH.npz with x_train. Raises InputError for anything else.
        """
        images = as_images(images, self.encoder.image_size)
        device = self.device
        features = []
        for encoder in self.encoders:
            encoder.to(device)
            batches = tqdm(images.split(batch_size), desc="features", leave=False, disable=bars_are_hidden())
            features.append(torch.cat([extract_features(encoder, batch.to(device)).cpu() for batch in batches]))
            encoder.cpu()
        return (features[0] if len(features) == 1 else torch.stack(features)).clone()  # a plain tensor, not one of inference mode

    @property
    def device(self) -> torch.device:
        """Where the run computed, or the CPU if this machine has no such device."""
        wanted = "auto" if self.folder.suffix == ".safetensors" else read_config(self.folder)["options"].get("device", "auto")
        return choose_device(wanted if torch.cuda.is_available() else "cpu")

    def plot(self) -> Picture:
        """Draw the curves anew as RUN/divergence.png; a notebook shows what is returned."""
        plot([self.folder], self.folder / "divergence.png")
        return Picture(self.folder / "divergence.png")


@dataclass(frozen=True)
class Picture:
    """A picture's file, which a notebook shows."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


def load(path: Path | str) -> Run:
    """The finished run in a folder, or the encoder in a file that `eval.py --export FILE.safetensors` wrote.

    Raises InputError if there is none.
    """
    path = user_path(path)
    if path.suffix == ".safetensors":
        run = Run(path, [])
    else:
        read_config(path)  # refuses what is not a run folder
        run = Run(path, read_metrics(path))
    run.encoders  # noqa: B018  # reads them now, so that a damaged one is noticed here
    return run


def as_images(images: Tensor | np.ndarray | Path | str, image_size: int) -> Tensor:
    """Images as uint8 `[N, 3, S, S]`; see `Run.features`."""
    if isinstance(images, str | Path):
        return load_unlabelled(user_path(images), image_size)
    array = np.asarray(images)
    if array.ndim == 4 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    return read_images("images", "the array", array)
