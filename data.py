"""Data: image sets held as uint8 tensors, their partition over the clients, and BYOL's two random views.

A whole image set is one uint8 tensor `[N, 3, S, S]` on the training device and a batch is an index into it: no worker
processes, and nothing is decoded inside a loop. Files are named by the user, so every mistake in them is an `InputError`.
"""

from __future__ import annotations

import hashlib
import urllib.error
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import InputError, first_line

ASSETS = Path(__file__).parent / "assets"
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator | None:
    """A random generator on `device` seeded by its key, (seed, purpose, round, client): no draw depends on what was drawn before.

    None on the meta device, which has no generators and computes nothing.
    """
    if device.type == "meta":
        return None
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------- image sets


class Images(NamedTuple):
    """Train and test images, uint8 `[N, 3, S, S]`, and labels, int64 `[N]` in 0..num_classes-1."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int

    def to(self, device: torch.device) -> Images:
        return Images(*(t.to(device) for t in self[:4]), self.num_classes)


def load_images(name: str, root: Path = Path("~/.cache/fedu"), image_size: int = 32) -> Images:
    """Load `fashion` (embedded), `cifar10`, `cifar100`, a file PATH.npz or a folder PATH/{train,test}/CLASS/*.

    CIFAR is taken from `root`: first `<name>.npz`, else torchvision's verified archive, downloaded if it is not there.
    `image_size` is the side to which a folder's images are resized; the other sources keep theirs.
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
        return load_folder(Path(name).expanduser(), image_size)
    raise InputError(f"--dataset got {name!r}; it wants fashion, cifar10, cifar100, a file PATH.npz or an image folder")


def load_npz(path: Path) -> Images:
    """Load x_train, y_train, x_test, y_test from an .npz: uint8 `[N, S, S, 3]` or grey `[N, S, S]`, and integer labels `[N]`."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[key] for key in keys]
    except FileNotFoundError:
        raise InputError(f"data set {path} does not exist") from None
    except KeyError as error:
        raise InputError(f"{path} has no array {error.args[0].split()[0]}; it wants {', '.join(keys)}") from None
    # a damaged archive surfaces as any of these, by where the damage lies
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable .npz of plain arrays ({first_line(error)})") from None
    for split, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        grey = x.ndim == 3
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or not (grey or x.shape[3] == 3) or x.shape[1] != x.shape[2] or x.size == 0:
            raise InputError(f"{path}: x_{split} is {x.dtype} {list(x.shape)}, it wants uint8 [N, S, S, 3] or [N, S, S]")
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1] or y.min() < 0:
            raise InputError(f"{path}: y_{split} is {y.dtype} {list(y.shape)}, it wants one class 0, 1, ... for each of {len(x)} images")
    if arrays[0].shape[1:3] != arrays[2].shape[1:3] or arrays[2].max() < 0:
        raise InputError(f"{path}: x_train is {arrays[0].shape[1]} pixels wide and x_test {arrays[2].shape[1]}, they want the same")
    if set(np.unique(arrays[1])) != set(range(arrays[1].max() + 1)) or arrays[3].max() > arrays[1].max():
        raise InputError(f"{path}: y_train must hold every class 0..C-1 and y_test no other")
    return to_images(*arrays)


def load_cifar(name: str, root: Path) -> Images:
    """Load CIFAR-10 or -100 through torchvision, whose archive is verified by checksum before it is opened."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        train, test = (cifar(root, train=split, download=True) for split in (True, False))
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise InputError(
            f"{name} is not in {root} and cannot be downloaded ({first_line(error)}): put {name}.npz there, or choose --data-root"
        ) from None
    return to_images(train.data, np.array(train.targets), test.data, np.array(test.targets))


def load_folder(path: Path, size: int) -> Images:
    """Load PATH/{train,test}/CLASS/*.png|jpg, the shorter side resized to `size` pixels and the centre cut out."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize

    fit = Compose([Resize(size), CenterCrop(size)])
    try:
        train, test = (ImageFolder(path / split, fit) for split in ("train", "test"))
        if train.classes != test.classes:
            raise InputError(f"{path}: train holds the classes {train.classes} and test {test.classes}, they want the same")
        arrays = []
        for split in (train, test):
            arrays += [np.stack([np.asarray(image) for image, _ in split]), np.array(split.targets)]
    except (OSError, ValueError, SyntaxError) as error:  # PIL reports a broken PNG as a SyntaxError
        raise InputError(f"{path} is not an image folder of the form {{train,test}}/CLASS/*.png|jpg: {error}") from None
    return to_images(*arrays)


def to_images(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Images:
    def images(x: np.ndarray) -> Tensor:
        x = x if x.ndim == 4 else np.repeat(x[..., None], 3, axis=3)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    labels = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    return Images(images(x_train), next(labels), images(x_test), next(labels), int(y_train.max()) + 1)


# ------------------------------------------------------------------------------------------------------ partition


def partition(
    labels: np.ndarray, clients: int, kind: str, seed: int, classes_per_client: int | None = None, alpha: float = 0.5, at_least: int = 1
) -> list[np.ndarray]:
    """Deal the images to the clients: disjoint index arrays that together hold every image once.

    kind `iid`: equal shares of a permutation. `classes`: client k holds `classes_per_client` classes (default 1/K of them, rounded
    up), every class shared equally among its holders. `dirichlet`: each class in proportions drawn from Dir(alpha), redrawn until
    every client has `at_least` images (Hsu et al. 2019). Raises InputError if a client cannot have `at_least` images.
    """
    rng = np.random.default_rng([seed, *b"partition"])
    num_classes = int(labels.max()) + 1
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
    if clients * at_least > len(labels):
        raise InputError(f"{clients} clients want {at_least} images each, there are {len(labels)}: lower --clients or --batch-size")

    def deal(shares: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """Cut each class at the cumulative `shares(class)` of the K clients."""
        parts = [np.split(m, np.round(np.cumsum(shares(c))[:-1] * len(m)).astype(int)) for c, m in enumerate(members)]
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
        result = deal(lambda c: holds[c] / holds[c].sum())
    else:
        for _ in range(100):
            result = deal(lambda c: rng.dirichlet(np.full(clients, alpha)))
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
# Images are float `[B, 3, H, W]` in [0, 1]; per-sample arguments are `[B]`. Everything is batched with fixed shapes, so a GPU
# never waits for the host.


def two_views(images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two independent random views of each image, by the recipe of METHOD section 3 (SimCLR's, without blur).

    images: uint8 `[B, 3, H, W]`. Returns two float32 `[B, 3, H, W]` in [0, 1] on the same device. `generator` lives there too.
    """
    return augment(torch.cat([images, images]), generator).chunk(2)


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One random view of each image: crop and resize, flip, colour jitter (p 0.8), greyscale (p 0.2)."""
    x = images.float() / 255
    n, device = len(x), x.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device) * (high - low) + low

    x = resized_crop(x, *random_box(*x.shape[2:], uniform), flip=uniform(0, 1) < 0.5)
    jittered = uniform(0, 1) < 0.8
    factors = torch.where(jittered[:, None], uniform(0.2, 1.8, 3), 1.0)  # a factor of 1 and a shift of 0 change nothing
    shift = torch.where(jittered, uniform(-0.2, 0.2), 0.0)
    x = color_jitter(x, factors, shift, order=uniform(0, 1, 3).argsort(1), hue_at=uniform(0, 4).floor())
    return blend(x, grey(x), torch.where(uniform(0, 1) < 0.2, 0.0, 1.0))


def random_box(height: int, width: int, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomResizedCrop's box (top, left, height, width): scale 0.08-1, ratio 3/4-4/3; the whole image after 10 misses."""
    area = uniform(0.08, 1, 10) * (height * width)
    ratio = torch.exp(uniform(-1, 1, 10) * np.log(4 / 3))
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    h = torch.where(none, float(height), h.gather(1, first)[:, 0])
    w = torch.where(none, float(width), w.gather(1, first)[:, 0])
    top, left = (uniform(0, 1) * (height - h + 1)).floor(), (uniform(0, 1) * (width - w + 1)).floor()
    return top, left, h, w


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """Cut out each sample's box, enlarge it bilinearly to the whole image, and mirror it where `flip`.

    Interpolation is linear in the pixels of a row and of a column, so it is one small matrix on each side of the image.
    """
    rows, columns = hat_weights(x.shape[2], top, height), hat_weights(x.shape[3], left, width)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return torch.matmul(torch.matmul(rows[:, None], x), columns[:, None].mT)


def hat_weights(size: int, begin: Tensor, length: Tensor) -> Tensor:
    """Bilinear weights `[B, size, size]` (output pixel, input pixel) that stretch [begin, begin + length) over `size` pixels."""
    pixel = torch.arange(size, device=begin.device, dtype=torch.float32)
    source = (pixel + 0.5) * (length / size)[:, None] - 0.5  # pixel centres, as torchvision's interpolation has them
    source = begin[:, None] + torch.minimum(source.clamp(min=0), length[:, None] - 1)  # never looks beyond the box
    return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)


def color_jitter(x: Tensor, factors: Tensor, shift: Tensor, order: Tensor, hue_at: Tensor) -> Tensor:
    """ColorJitter in each sample's own order.

    factors: `[B, 3]` of brightness, contrast and saturation (1 = unchanged); shift: hue, in turns, `[B]`; order: `[B, 3]`, the
    sequence of the three blends; hue_at: `[B]`, how many of them come before hue. Hue is by far the dearest operation, so it is
    done once for the whole batch, with each sample's earlier blends before it and its later ones after it.
    """
    factors = factors.gather(1, order)
    for earlier in (True, False):
        for slot in range(3):
            kind, factor = order[:, slot, None, None, None], factors[:, slot]
            base = torch.where(kind == 0, 0.0, torch.where(kind == 1, (g := grey(x)).mean((2, 3), keepdim=True), g))
            x = blend(x, base, torch.where((slot < hue_at) == earlier, factor, 1.0))
        x = adjust_hue(x, shift) if earlier else x
    return x


def blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """`factor x + (1 - factor) base`, clamped to [0, 1]: brightness, contrast, saturation and greyscale differ only in `base`."""
    factor = factor[:, None, None, None]
    return torch.addcmul(base * (1 - factor), x, factor).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma `[B, 1, H, W]` by ITU-R 601-2, as PIL and torchvision compute it."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns in HSV space; value and chroma stay, so the way back is one formula for the three channels."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    turned = sixths + 6 * shift[:, None, None]
    k = torch.stack([turned + 5, turned + 3, turned + 1], 1).remainder(6)  # red, green, blue
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
