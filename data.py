"""Data: image sets as uint8 tensors, their partition over the clients, and BYOL's two random views.

A whole image set is one uint8 tensor `[N, 3, S, S]` on the training device and a batch is an index into it: no worker
processes, and nothing is decoded inside a loop. The files are the user's, so every mistake in them is an `InputError`.
"""

from __future__ import annotations

import hashlib
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from images import Split, decode_splits, find_splits
from options import CIFAR_CLASSES, Data
from runtime.cli import InputError, first_line, locked

ASSETS = Path(__file__).parent / "assets"


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A random generator on `device` seeded by its key, such as (seed, purpose, round, client): no draw depends on earlier draws."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """The seed that belongs to a key, in 0..2^63-1."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------- image sets


class Images(NamedTuple):
    """Train and test images, uint8 `[N, 3, S, S]`, and labels, int64 `[N]` in 0..num_classes-1.

    Without labels y_train and y_test are empty, and without test images x_test and y_test are; `lacks` says so in words.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    classes: Sequence[str] = ()  # their names, where the source has them
    names: tuple[Sequence[str], Sequence[str]] = ((), ())  # the files of the training and the test images, where the source has them

    def to(self, device: torch.device) -> Images:
        return self._replace(**{name: getattr(self, name).to(device) for name in ("x_train", "y_train", "x_test", "y_test")})


def load_images(
    name: str, root: Path = Path("~/.cache/fedu"), image_size: int = 32, option: str = "--dataset",
    pixel_range: str | None = None, skip_broken: bool = False,
) -> Images:  # fmt: skip
    """Load `fashion` (embedded), `cifar10`, `cifar100`, a file PATH.npz or a folder PATH/{train,test}/CLASS/*.

    CIFAR is taken from `root`: first `<name>.npz`, else torchvision's verified archive, downloaded if it is not there. image_size,
    pixel_range, skip_broken: how a folder's images are read, see `load_folder`. option: that named the source, for an error.
    Raises InputError if the source is missing, unreadable or of another form.
    """
    root = root.expanduser()
    if name == "fashion":
        return load_npz(ASSETS / "fashion.npz")
    if name in CIFAR_CLASSES:
        images = load_npz(root / f"{name}.npz") if (root / f"{name}.npz").exists() else load_cifar(name, root)
        if images.num_classes != CIFAR_CLASSES[name]:
            raise InputError(f"{root / name}.npz holds {images.num_classes} classes, {name} has {CIFAR_CLASSES[name]}")
        return images
    if name.endswith(".npz"):
        return load_npz(Path(name).expanduser())
    if Path(name).expanduser().is_dir():
        return load_folder(Path(name).expanduser(), image_size, pixel_range, skip_broken)
    raise InputError(f"{option} got {name!r}; it needs fashion, cifar10, cifar100, a file PATH.npz or an image folder")


def load_dataset(options: Data, option: str = "--dataset") -> Images:
    """Load the images that the options name, on the CPU, see `load_images`. option: that named them, for an error."""
    return load_images(
        options.dataset, Path(options.data_root), options.image_size, option, options.pixel_range, options.skip_broken
    )  # fmt: skip


def load_npz(path: Path) -> Images:
    """Load x_train, y_train, x_test, y_test from an .npz: uint8 `[N, S, S, 3]` or grey `[N, S, S]`, and integer labels `[N]`."""
    arrays = read_arrays(path, "x_train", "y_train", "x_test", "y_test")
    for split, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        check_images(path, f"x_{split}", x)
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1] or y.min() < 0:
            raise InputError(f"{path}: y_{split} is {y.dtype} {list(y.shape)}, it wants one class 0, 1, ... for each of {len(x)} images")
    if arrays[0].shape[1:3] != arrays[2].shape[1:3]:
        raise InputError(f"{path}: x_train is {arrays[0].shape[1]} pixels wide and x_test {arrays[2].shape[1]}, they want the same")
    if set(np.unique(arrays[1])) != set(range(int(arrays[1].max()) + 1)) or arrays[3].max() > arrays[1].max():
        raise InputError(f"{path}: y_train must hold every class 0..C-1 and y_test no other")
    return to_images(path, Split(channels_first(arrays[0]), arrays[1]), Split(channels_first(arrays[2]), arrays[3]))


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """The arrays of these names in an .npz."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return [archive[key] for key in keys]
    except FileNotFoundError:
        raise InputError(f"data set {path} does not exist") from None
    except KeyError as error:
        raise InputError(f"{path} has no array {error.args[0].split()[0]}; it wants {', '.join(keys)}") from None
    except Exception as error:  # a damaged archive makes numpy raise errors of many types, even a tokenizer's
        raise InputError(f"{path} is not a readable .npz of plain arrays ({first_line(error)})") from None


def check_images(path: Path, name: str, x: np.ndarray) -> None:
    grey = x.ndim == 3
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not (grey or x.shape[3] == 3) or x.shape[1] != x.shape[2] or x.size == 0:
        raise InputError(f"{path}: {name} is {x.dtype} {list(x.shape)}, it wants uint8 [N, S, S, 3] or [N, S, S]")


def load_unlabelled(path: Path, size: int, pixel_range: str | None = None, skip_broken: bool = False) -> Tensor:
    """A party's own training images, uint8 `[N, 3, S, S]`: x_train of an .npz, or all images under PATH/train, or under PATH.

    Neither labels nor test images need to be there. A folder's images are resized to `size` pixels; those of an .npz must have it.
    Raises InputError if they are missing, unreadable or of another form.
    """
    if path.suffix != ".npz":
        return decode_splits(path, find_splits(path)[:1], size, pixel_range, skip_broken)[0].images
    (x,) = read_arrays(path, "x_train")
    check_images(path, "x_train", x)
    if x.shape[1] != size:
        raise InputError(f"{path}: x_train is {x.shape[1]} pixels wide, the federation's images are {size}")
    return channels_first(x)


def load_cifar(name: str, root: Path) -> Images:
    """Load CIFAR-10 or -100 through torchvision, whose archive is verified by checksum before it is opened."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            train, test = (cifar(root, train=split) for split in (True, False))
        except RuntimeError:  # it is not there
            with locked(root):  # one of several processes downloads it, and the others then find it
                train, test = (cifar(root, train=split, download=True) for split in (True, False))
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise InputError(
            f"{name} is not in {root} and cannot be downloaded ({first_line(error)}): put {name}.npz there, or choose --data-root"
        ) from None
    return to_images(root, *(Split(channels_first(split.data), np.array(split.targets)) for split in (train, test)))._replace(
        classes=train.classes
    )


def load_folder(path: Path, size: int, pixel_range: str | None = None, skip_broken: bool = False) -> Images:
    """Load a folder of image files, see `images.find_splits` for its forms and `images.decode_splits` for its pixels."""
    train, test = decode_splits(path, find_splits(path), size, pixel_range, skip_broken)
    return to_images(path, train, test)


def channels_first(x: np.ndarray) -> Tensor:
    """uint8 `[N, S, S, 3]` or grey `[N, S, S]` -> `[N, 3, S, S]`."""
    x = x if x.ndim == 4 else np.repeat(x[..., None], 3, axis=3)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def to_images(source: Path, train: Split, test: Split) -> Images:
    """The image set of two splits, whose classes are the sorted labels of the training images.

    Raises InputError if a test image has another.
    """
    classes, numbers = number_labels(source, train.labels, test.labels)
    return Images(train.images, numbers[0], test.images, numbers[1], len(classes), classes, (train.names, test.names))


def number_labels(source: Path, *labels: Sequence[str] | np.ndarray | None) -> tuple[list[str], list[Tensor]]:
    """The classes, and the number of each image's class, int64 `[N]`, for the labels of the training and the test images."""
    train, test = (np.array([] if split is None else split) for split in labels)
    classes, y_train = np.unique(train, return_inverse=True)
    if unknown := sorted(set(test) - set(classes)) if len(train) else []:
        raise InputError(f"{source}: the test images have the labels {some(unknown)}, which no training image has")
    y_test = np.searchsorted(classes, test) if len(train) else np.array([])
    return [str(c) for c in classes], [torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test)]


def some(values: Sequence[object], most: int = 10) -> str:
    """At most so many values in words."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} others" if len(values) > most else "")


# ------------------------------------------------------------------------------------------------------ partition


def partition(
    labels: np.ndarray, clients: int, kind: str, seed: int, classes_per_client: int | None = None, alpha: float = 0.5, at_least: int = 1
) -> list[np.ndarray]:
    """Partition the images over the clients: disjoint index arrays that together hold every image once.

    kind `iid`: equal shares of a permutation. `classes`: client k holds `classes_per_client` classes (default 1/K of them, rounded
    up), every class divided equally among its clients. `dirichlet`: each class in proportions drawn from Dir(alpha), redrawn until
    every client has `at_least` images (Yurochkin et al. 2019). Raises InputError if a client has fewer than `at_least` images.
    """
    if clients * at_least > len(labels):
        raise InputError(f"{clients} clients want {at_least} images each, there are {len(labels)}: lower --clients or --batch-size")
    rng = np.random.default_rng([seed, *b"partition"])
    num_classes = int(labels.max()) + 1
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]

    def divide(proportions: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """Divide each class over the K clients by `proportions(class)`, `[K]`, which add up to 1."""
        parts = [np.split(m, np.round(np.cumsum(proportions(c))[:-1] * len(m)).astype(int)) for c, m in enumerate(members)]
        return [np.sort(np.concatenate([part[k] for part in parts])) for k in range(clients)]

    if kind == "iid":
        result = [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    elif kind == "classes":
        per_client = classes_per_client or -(-num_classes // clients)
        if per_client > num_classes:
            raise InputError(f"--classes-per-client got {per_client}, the data set has {num_classes} classes")
        if per_client * clients < num_classes:
            raise InputError(f"--classes-per-client got {per_client}: {clients} clients then leave some of {num_classes} classes to nobody")
        slots = np.resize(rng.permutation(num_classes), clients * per_client).reshape(clients, per_client)
        holds = np.stack([(slots == c).any(1) for c in range(num_classes)])
        result = divide(lambda c: holds[c] / holds[c].sum())
    else:
        for _ in range(100):
            result = divide(lambda c: rng.dirichlet(np.full(clients, alpha)))
            if min(map(len, result)) >= at_least:
                break
    smallest = min(range(clients), key=lambda k: len(result[k]))
    if len(result[smallest]) < at_least:
        raise InputError(f"client {smallest} has {len(result[smallest])} images, a batch wants {at_least}: lower --batch-size or --clients")
    return result


def balanced_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the images, the same number of each class (at least 1), for semi-supervised evaluation."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    count = max(1, round(fraction * len(labels) / len(classes)))
    members = [torch.nonzero(labels.cpu() == c).flatten() for c in classes]
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:count]] for m in members]).sort().values


# ------------------------------------------------------------------------------------------------------ two views


def two_views(images: Tensor, generator: torch.Generator | None = None, jitter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two independent random views of each image, by the recipe of the authors' code (SimCLR's, without blur).

    images: uint8 `[B, 3, H, W]`. Returns two float32 `[B, 3, H, W]` in [0, 1] on the same device. `generator` lives there too. jitter: the
    strength of the colour jitter, `ColorJitter(0.8 jitter, 0.8 jitter, 0.8 jitter, 0.2 jitter)`.
    """
    draws = draw_views(2 * len(images), *images.shape[2:], images.device, generator, jitter)
    return ops.augment(images, draws).chunk(2)


def draw_views(
    n: int, height: int, width: int, device: torch.device, generator: torch.Generator | None = None, jitter: float = 1.0
) -> Tensor:  # fmt: skip
    """The random numbers of n views for `ops.augment`, `[n, len(ops.VIEW)]`: crop, flip (p 0.5), colour jitter (p 0.8), greyscale (p 0.2).

    With jitter = 1, brightness, contrast and saturation are factors in 0.2-1.8 and hue is a shift of -0.2 to 0.2 turns, in random order.
    All have fixed shapes, so that a GPU never waits for the host.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device) * (high - low) + low

    box = random_box(height, width, uniform)
    flip, jittered, grey = uniform(0, 1, 3).split(1, dim=1)
    amounts = torch.where(jittered < 0.8, uniform(-1, 1, 4), 0.0)
    factors, shift = 1 + 0.8 * jitter * amounts[:, :3], 0.2 * jitter * amounts[:, 3:]
    return torch.cat([box, flip < 0.5, factors, shift, uniform(0, 1, 4).argsort(1), grey < 0.2], 1)


def random_box(height: int, width: int, uniform: Callable[..., Tensor]) -> Tensor:
    """RandomResizedCrop's box (top, left, height, width): scale 0.08-1, ratio 3/4-4/3; the whole image after 10 misses. `[n, 4]`."""
    area = uniform(0.08, 1, 10) * (height * width)
    ratio = torch.exp(uniform(-1, 1, 10) * np.log(4 / 3))
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    h = torch.where(none, float(height), h.gather(1, first)[:, 0])
    w = torch.where(none, float(width), w.gather(1, first)[:, 0])
    top, left = (uniform(0, 1) * (height - h + 1)).floor(), (uniform(0, 1) * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], 1)
