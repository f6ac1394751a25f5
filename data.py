"""Data: image sets as uint8 tensors, their partition over the clients, and BYOL's two random views.

A whole image set is one uint8 tensor `[N, 3, S, S]` on the training device and a batch is an index into it: no worker
processes, and nothing is decoded inside a loop. The files are the user's, so every mistake in them is an `InputError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from images import note
from options import CIFAR_CLASSES, DIRICHLET, Data
from runtime.cli import InputError, first_line, nearest, user_path, write_atomic
from sources import Split, decode_splits, find_source, label_files, read_cifar, read_npz, read_table, some

ASSETS = Path(__file__).parent / "assets"


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A random generator on `device` seeded by its key, such as (seed, purpose, round, client): no draw depends on earlier draws."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """The seed that belongs to a key, in 0..2^63-1."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def digest_of(*tensors: Tensor) -> str:
    """A hash of tensors on any device, with their shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        for rows in tensor.split(1 << 14):
            digest.update(rows.cpu().numpy().ravel())
    return digest.hexdigest()[:32]


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
    classes: Sequence[str] = ()  # the name of each
    names: tuple[Sequence[str], Sequence[str]] = ((), ())  # the files of the training and the test images, where these are files
    owners: Tensor = torch.empty(0, dtype=torch.int64)  # where the data say it: the party of each training image `[N]`, -1 for nobody
    parties: Sequence[str] = ()  # their names

    @property
    def digest(self) -> str:
        """A hash of images and labels."""
        return digest_of(self.x_train, self.y_train, self.x_test, self.y_test)

    def to(self, device: torch.device) -> Images:
        """The same on a device. Raises InputError if it is a GPU whose free memory is too small for the images."""
        size, count = self.x_train.nbytes + self.x_test.nbytes, len(self.x_train) + len(self.x_test)
        if device.type == "cuda" and size > (free := torch.cuda.mem_get_info(device)[0]):
            raise InputError(
                f"{count} images of {self.x_train.shape[2]} pixels need {size / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free, "
                f"in which {count * free // size} fit: use --device cpu, a smaller --image-size, or fewer images"
            )
        return self._replace(**{name: getattr(self, name).to(device) for name in ("x_train", "y_train", "x_test", "y_test")})


def lacks(images: Images, test: bool = True) -> str:
    """What the set lacks of training labels and, with `test`, of labelled test images, in words; empty if it has them."""
    if not len(images.y_train):
        return "the data set has no labels"
    if test and not len(images.y_test):
        return "the test images have no labels" if len(images.x_test) else "the data set has no test images (--holdout 0.1 makes some)"
    return ""


def require(images: Images, what: str, test: bool = True) -> None:
    """Raises InputError if the set lacks the labels, or with `test` the labelled test images, that `what` needs."""
    if lack := lacks(images, test):
        raise InputError(f"{what} needs labels{' and test images' * test}, and {lack}")


def refuse_other_data(run: Path, stored: Mapping[str, str], now: Mapping[str, str], dataset: str, moved: bool) -> None:
    """Raises InputError unless the hashes of a run's data, by `images` and `clients`, are those of today. moved: `dataset` is a new place.

    A run of an older version has no hashes: then it is refused only if its data set is named anew.
    """
    if moved and not stored:
        raise InputError(f"{run} has no hash of its images, since an older version began it, so --dataset {dataset} cannot be checked")
    for name, what in (("images", "images or labels"), ("clients", "images of each client")):
        if name in now and stored.get(name, now[name]) != now[name]:
            raise InputError(f"--dataset {dataset} has other {what} than when {run} began: name the data set that it had by --dataset")


def load_dataset(options: Data, option: str = "--dataset") -> Images:
    """Load the images that the options name, on the CPU, see `load_images`. option: that named them, for an error."""
    return load_images(
        options.dataset, Path(options.data_root), options.image_size, option,
        pixel_range=options.pixel_range, skip_broken=options.skip_broken, holdout=options.holdout,
        labels=options.labels, partition=options.partition, cached=not options.no_cache,
    )  # fmt: skip


def load_images(
    name: str, root: Path = Path("~/.cache/fedu"), image_size: int = 32, option: str = "--dataset", *,
    pixel_range: str | None = None, skip_broken: bool = False, holdout: float = 0.0, labels: str | None = None,
    partition: str = "", cached: bool = False,
) -> Images:  # fmt: skip
    """Load `fashion` (embedded), `cifar10`, `cifar100`, a file PATH.npz (see `read_npz`) or a folder of images (see `find_splits`).

    CIFAR is taken from `root`: first `<name>.npz`, else torchvision's verified archive, downloaded if it is not there. Of a folder:
    image_size, pixel_range, skip_broken: see `decode_splits`; labels: a table, see `label_files`; cached: decode only once, into a file
    under `root`. holdout: the fraction of each class that becomes test images. partition: `folders`, if there is one for each party, or a
    file with their images. option: that named the source, for an error. Raises InputError if the source is missing, unreadable or of
    another form.
    """
    root, path = user_path(root, "--data-root"), user_path(name, option)
    if name == "fashion":
        path = ASSETS / "fashion.npz"
    elif name in CIFAR_CLASSES:
        path = root / f"{name}.npz"
    if name in CIFAR_CLASSES and not path.exists():
        splits = read_cifar(name, root)
    elif path.suffix == ".npz":
        splits = read_npz(path)
    elif path.is_dir():
        splits = find_source(path, partition)
    else:
        meant = nearest(name, ("fashion", *CIFAR_CLASSES))
        raise InputError(f"{option} got {name!r}; it needs fashion, cifar10, cifar100, a file PATH.npz or an image folder{meant}")
    if labels:
        splits = label_files(path, splits, user_path(labels, "--labels"))
    if holdout:
        splits = hold_out(path, *splits, holdout)
    if isinstance(splits[0].images, list):
        splits = decode_splits(path, splits, image_size, pixel_range, skip_broken, root if cached else None)
    images = to_images(path, *splits)
    if images.num_classes != CIFAR_CLASSES.get(name, images.num_classes):
        raise InputError(f"{path} holds {images.num_classes} classes, {name} has {CIFAR_CLASSES[name]}")
    return read_partition(user_path(partition, "--partition"), images) if partition.endswith((".json", ".csv")) else images


def hold_out(source: Path, train: Split, test: Split, fraction: float) -> list[Split]:
    """Make a fraction of each class's training images test images, at least one of a class that has several, whatever the seed.

    Raises InputError if there are test images already, or no labels, without which test images measure nothing.
    """
    if len(test.images):
        raise InputError(f"--holdout got {fraction:g}, and {source} has test images of its own")
    if train.labels is None:
        raise InputError(f"--holdout got {fraction:g}, and {source} has no labels, without which test images measure nothing")
    rng, labels = np.random.default_rng([*b"holdout"]), np.array(train.labels)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    counts = [min(len(m) - 1, max(1, round(fraction * len(m)))) for m in members]
    held = np.concatenate([m[:count] for m, count in zip(members, counts)])
    return [train.take(np.setdiff1d(np.arange(len(labels)), held)), train.take(np.sort(held))]


def load_unlabelled(
    path: Path, size: int, pixel_range: str | None = None, skip_broken: bool = False, cache: Path | None = None
) -> Tensor:  # fmt: skip
    """A party's own training images, uint8 `[N, 3, S, S]`, from an .npz or a folder, read as a data set's are.

    Neither labels nor test images need to be there. A folder's images are resized to `size` pixels; those of an .npz must have it.
    Raises InputError if they are missing, unreadable or of another form.
    """
    if path.suffix != ".npz":
        return decode_splits(path, find_source(path)[:1], size, pixel_range, skip_broken, cache)[0].images
    x = read_npz(path, ["train"])[0].images
    if x.shape[2] != size:
        raise InputError(f"{path}: the images are {x.shape[2]} pixels wide, the federation's are {size}")
    return x


def to_images(source: Path, train: Split, test: Split) -> Images:
    """The image set of two splits, whose classes are the sorted labels of the training images.

    Raises InputError if a test image has another label, or another size.
    """
    if not len(test.images):
        test = Split(train.images[:0])
    if train.images.shape[1:] != test.images.shape[1:]:
        widths = train.images.shape[2], test.images.shape[2]
        raise InputError(f"{source}: the training images are {widths[0]} pixels wide and the test images {widths[1]}, they need the same")
    if isinstance(train.labels, list) and len(set(train.labels)) < 2:  # one folder with all images says nothing about them
        train = train._replace(labels=None)
    classes, numbers = number_labels(source, train.labels, test.labels)
    images = Images(train.images, numbers[0], test.images, numbers[1], len(classes), classes, (train.names, test.names))
    if train.owners is None:
        return images
    parties = sorted({str(owner) for owner in train.owners}, key=in_order)
    number = {party: k for k, party in enumerate(parties)}
    return images._replace(owners=torch.tensor([number[str(owner)] for owner in train.owners]), parties=parties)


def number_labels(source: Path, *labels: Sequence[str] | np.ndarray | None) -> tuple[list[str], list[Tensor]]:
    """The classes, and the number of each image's class, int64 `[N]`, for the labels of the training and the test images."""
    train, test = (np.array([] if split is None else split) for split in labels)
    classes, y_train = np.unique(train, return_inverse=True)
    if classes.dtype.kind in "iu" and len(classes) <= classes.max(initial=0):
        note(f"{source}: the labels {some(classes)} are read as the classes 0 to {len(classes) - 1}")
    if unknown := sorted(set(test) - set(classes)) if len(train) else []:
        raise InputError(f"{source}: the test images have the labels {some(unknown)}, which no training image has")
    y_test = np.searchsorted(classes, test) if len(train) else np.array([])
    return [str(c) for c in classes], [torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test)]


# ------------------------------------------------------------------------------------------------------ partition


def client_indices(images: Images, private: np.ndarray, clients: int, kind: str, *how: object, at_least: int) -> list[np.ndarray]:
    """The training images of each client, as indices, disjoint and sorted: as the data say, else by a `partition` of the private images.

    private: indices of the images that clients may have, sorted. Raises InputError if the set lacks the labels or parties that this needs,
    or a client has fewer than `at_least` images.
    """
    if kind in ("classes", *DIRICHLET):
        require(images, f"--partition {kind}, unlike iid,", test=False)
    if kind in ("classes", *DIRICHLET, "iid"):
        labels = images.y_train if len(images.y_train) else torch.zeros(len(images.x_train), dtype=torch.int64)
        return [private[part] for part in partition(labels.cpu().numpy()[private], clients, kind, *how, at_least=at_least)]
    if not len(images.owners):
        needs = "a folder" if kind == "folders" else "the array client_train of an .npz or the column party of --labels"
        raise InputError(f"--partition {kind} needs {needs}, and the data set does not have it")
    if clients != len(images.parties):
        raise InputError(f"--clients got {clients}, and --partition {kind} has {len(images.parties)} parties: {some(images.parties)}")
    parts = [private[images.owners.numpy()[private] == k] for k in range(clients)]
    smallest = min(range(clients), key=lambda k: len(parts[k]))
    if len(parts[smallest]) < at_least:
        who = f"client {smallest} ({images.parties[smallest]})"
        raise InputError(f"{who} has {len(parts[smallest])} images, a batch needs {at_least}: lower --batch-size or leave it out")
    note(f"clients 0 to {clients - 1} are {some(images.parties)}")
    return parts


def count_classes(images: Images, parts: Sequence[Tensor]) -> np.ndarray:
    """The number of images of each class that each client has, `[K, C]`; without labels `[K, 1]`. parts: the clients' indices."""
    if not len(images.y_train):
        return np.array([[len(part)] for part in parts])
    return np.stack([images.y_train[part].bincount(minlength=images.num_classes).cpu().numpy() for part in parts])


def save_partition(path: Path, parts: Sequence[Tensor]) -> None:
    """Write the clients' indices as the JSON that `read_partition` reads."""
    content = json.dumps([part.tolist() for part in parts]).encode()
    write_atomic(path, lambda file: file.write(content))


def read_partition(path: Path, images: Images) -> Images:
    """The images with the parties that a file says: a JSON list with each client's list of indices, or a CSV with columns file and party.

    Says how many training images belong to nobody. Raises InputError if the file is of another form, or an image has several parties.
    """
    total, owners = len(images.x_train), {}
    if path.suffix == ".json":
        try:
            lists = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--partition {path} cannot be read ({first_line(error)})") from None
        if not isinstance(lists, list) or not all(isinstance(k, list) and all(type(i) is int for i in k) for k in lists):
            raise InputError(f"--partition {path} needs a list with one list of whole numbers for each client")
        pairs = [(index, str(k)) for k, indices in enumerate(lists) for index in indices]
        parties = [str(k) for k in range(len(lists))]
    else:
        place = {name: index for index, name in enumerate(images.names[0])}
        rows = read_table(path, "--partition", "file", "party")
        if unknown := [row["file"] for row in rows if row["file"] not in place]:
            raise InputError(f"--partition {path} names {len(unknown)} files that are no training images ({unknown[0]})")
        pairs = [(place[row["file"]], row["party"]) for row in rows]
        parties = sorted({party for _, party in pairs}, key=in_order)
    for index, party in pairs:
        if not 0 <= index < total:
            raise InputError(f"--partition {path} has the index {index}, and there are {total} training images, counted from 0")
        if index in owners:
            raise InputError(f"--partition {path} gives the image {index} to {owners[index]} and to {party}")
        owners[index] = party
    if len(owners) < total:
        note(f"{path}: {total - len(owners)} of {total} training images belong to nobody")
    return images._replace(owners=torch.tensor([parties.index(owners[i]) if i in owners else -1 for i in range(total)]), parties=parties)


def in_order(name: str) -> tuple[int, str]:
    """Sorts names of digits by their value, others by the alphabet."""
    return (len(name), name) if name.isdecimal() else (0, name)


def partition(
    labels: np.ndarray, clients: int, kind: str, seed: int, classes_per_client: int | None = None, alpha: float = 0.5, at_least: int = 1
) -> list[np.ndarray]:
    """Partition the images over the clients: disjoint index arrays that together hold every image once.

    kind `iid`: equal shares of a permutation. `classes`: client k holds `classes_per_client` classes (default 1/K of them, rounded
    up), every class divided equally among its clients. `dirichlet`: each class in proportions drawn from Dir(alpha), redrawn until
    every client has `at_least` images (Yurochkin et al. 2019). `dirichlet-balanced`: as many images for each client, up to one, see
    `balanced_counts`. Raises InputError if a client has fewer than `at_least` images.
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
    elif kind == "dirichlet-balanced":
        ends = balanced_counts(np.array([len(m) for m in members]), clients, alpha, rng).cumsum(0)
        parts = [np.split(m, ends[:-1, c]) for c, m in enumerate(members)]
        result = [np.sort(np.concatenate([part[k] for part in parts])) for k in range(clients)]
    else:
        for _ in range(100):
            result = divide(lambda c: rng.dirichlet(np.full(clients, alpha)))
            if min(map(len, result)) >= at_least:
                break
    smallest = min(range(clients), key=lambda k: len(result[k]))
    if len(result[smallest]) < at_least:
        remedy = "lower --batch-size or --clients, or raise --alpha" if kind == "dirichlet" else "lower --batch-size or --clients"
        raise InputError(f"client {smallest} has {len(result[smallest])} images, a batch wants {at_least}: {remedy}")
    return result


def balanced_counts(sizes: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """The number of images of each class that each client gets, `[K, C]`, if all get as many, up to one. sizes: of the classes, `[C]`.

    As in Orchestra's code, each client's shares of the classes are drawn from Dir(alpha), and then scaled, in turn by client and by class,
    until all clients and all classes are used up alike (Sinkhorn and Knopp 1967). The authors round down and leave out what is left; here
    every client draws classes by its shares, and draws again in place of those that were used up meanwhile.
    """
    shares = rng.dirichlet(np.full(len(sizes), alpha), clients) + 1e-100  # with a small alpha, shares are so small that they become 0
    for _ in range(100):
        shares *= sizes / np.maximum(shares.sum(0), 1e-100)  # a class without images gets 0
        shares /= shares.sum(1, keepdims=True)
    left, counts = sizes.copy(), np.zeros((clients, len(sizes)), int)
    wanted = sizes.sum() // clients + (np.arange(clients) < sizes.sum() % clients)
    while (lacking := wanted - counts.sum(1)).any():  # in each turn but the last a class is used up
        weights = shares * (left > 0)
        weights[weights.sum(1) == 0] = left  # a client whose classes are used up takes the others as they come
        drawn = rng.multinomial(lacking, weights / weights.sum(1, keepdims=True))
        for c in np.flatnonzero(drawn.sum(0) > left):
            drawn[:, c] = rng.multivariate_hypergeometric(drawn[:, c], left[c])
        counts, left = counts + drawn, left - drawn.sum(0)
    return counts


def balanced_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the images, the same number of each class (at least 1), for semi-supervised evaluation."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    count = max(1, round(fraction * len(labels) / len(classes)))
    members = [torch.nonzero(labels.cpu() == c).flatten() for c in classes]
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:count]] for m in members]).sort().values


# ------------------------------------------------------------------------------------------------------ two views


def random_views(
    images: Tensor, generator: torch.Generator | None = None, count: int = 2,
    jitter: float = 1.0, crop_scale: float = 0.08, greyscale: float = 0.2,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`count` independent random views of each image, by the recipe of the authors' code (SimCLR's, without blur).

    images: uint8 `[B, 3, H, W]`. Returns float32 `[B, 3, H, W]` in [0, 1] on the same device, `count` times. `generator` lives there too.
    jitter: the strength of the colour jitter, `ColorJitter(0.8 jitter, 0.8 jitter, 0.8 jitter, 0.2 jitter)`. crop_scale: the smallest share
    of the image that a view shows, in (0, 1]. greyscale: the probability of a grey view.
    """
    draws = draw_views(count * len(images), *images.shape[2:], images.device, generator, jitter, crop_scale, greyscale)
    return ops.augment(images, draws).chunk(count)


def draw_views(
    n: int, height: int, width: int, device: torch.device, generator: torch.Generator | None = None,
    jitter: float = 1.0, crop_scale: float = 0.08, greyscale: float = 0.2,
) -> Tensor:  # fmt: skip
    """The random numbers of n views for `ops.augment`, `[n, len(ops.VIEW)]`: crop, flip (p 0.5), colour jitter (p 0.8), greyscale.

    With jitter = 1, brightness, contrast and saturation are factors in 0.2-1.8 and hue is a shift of -0.2 to 0.2 turns, in random order.
    All have fixed shapes, so that a GPU never waits for the host.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device) * (high - low) + low

    box = random_box(height, width, crop_scale, uniform)
    flip, jittered, grey = uniform(0, 1, 3).split(1, dim=1)
    amounts = torch.where(jittered < 0.8, uniform(-1, 1, 4), 0.0)
    factors, shift = 1 + 0.8 * jitter * amounts[:, :3], 0.2 * jitter * amounts[:, 3:]
    return torch.cat([box, flip < 0.5, factors, shift, uniform(0, 1, 4).argsort(1), grey < greyscale], 1)


def random_box(height: int, width: int, scale: float, uniform: Callable[..., Tensor]) -> Tensor:
    """RandomResizedCrop's box (top, left, height, width): from `scale` to 1, ratio 3/4-4/3; the whole image after 10 misses. `[n, 4]`."""
    area = uniform(scale, 1, 10) * (height * width)
    ratio = torch.exp(uniform(-1, 1, 10) * np.log(4 / 3))
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    h = torch.where(none, float(height), h.gather(1, first)[:, 0])
    w = torch.where(none, float(width), w.gather(1, first)[:, 0])
    top, left = (uniform(0, 1) * (height - h + 1)).floor(), (uniform(0, 1) * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], 1)
