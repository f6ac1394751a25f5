"""The forms in which users have image sets: folders, .npz files, CIFAR's archive, tables. Each becomes two splits, training and test.

docs/data.md shows every form with its command. Every mistake in a user's files is an `InputError`. The part of its sentence before brackets
may leave a party's machine (see flower/), so a file's name, which may be a patient's, stands in the brackets.
"""

from __future__ import annotations

import csv
import json
import urllib.error
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from images import Embedded, Found, decode, decode_once, find_images, is_image, is_leftover, listing, note
from options import checked
from runtime.cli import InputError, first_line, locked

SPLITS = ("train", "test")
INSTEAD_OF_TEST = ("val", "valid", "validation")  # these images are the test images where there are no others


class Split(NamedTuple):
    """The training or the test images of a source: files, or uint8 `[N, 3, S, S]`; each one's label, file name and party, if any."""

    images: list[Path] | list[Embedded] | Tensor
    labels: Sequence[str] | np.ndarray | None = None
    names: Sequence[str] = ()
    owners: Sequence[str] | np.ndarray | None = None

    def take(self, indices: Sequence[int]) -> Split:
        """The split of some of its images."""

        def chosen(values: Sequence | np.ndarray | Tensor | None) -> Sequence | np.ndarray | Tensor | None:
            return values[np.asarray(indices)] if isinstance(values, np.ndarray | Tensor) else values and [values[k] for k in indices]

        return Split(*map(chosen, self))


def name_of_test(source: Path, there: Collection[str]) -> str:
    """Which of the splits that a source has holds its test images: `test`, or if that is missing a validation split, as a line says."""
    name = next((name for name in ("test", *INSTEAD_OF_TEST) if name in there), "test")
    if name != "test":
        note(f"{source}: the {name} images are taken as test images, since it has none")
    return name


def some(values: Sequence[object], most: int = 10) -> str:
    """At most so many values in words."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} others" if len(values) > most else "")


# ----------------------------------------------------------------------------------------------------------- folders


def find_splits(path: Path, base: Path | None = None) -> list[Split]:
    """The training and test images of a folder; says on one line what was passed over.

    The training images are those under PATH/train if that is there, else all; the test images are those under PATH/test, or PATH/val if
    there is none. Where all of them lie in sub-folders, of which there are several, these are the classes. base: names are relative to it.
    Raises InputError if there is no image.
    """
    train, test = split_folders(path)
    if test and not train:
        raise InputError(f"{path} has a folder {test.name} and no folder train")
    passed_over, splits = Counter(), []
    for folder in (train or path, test):
        found = find_images(folder) if folder and folder.is_dir() else Found([], Counter())
        passed_over += found.passed_over
        names = [image.relative_to(base or path).as_posix() for image in found.paths]
        splits.append(Split(found.paths, classes_of(folder, found.paths), names))
    if train:
        outside = [path / name for name in listing(path) if path / name not in (train, test) and not is_leftover(name)]
        passed_over["images beside train and test"] = sum(len(find_images(p).paths) if p.is_dir() else is_image(p) for p in outside)
    if counts := [f"{count} {kind}" for kind, count in sorted(passed_over.items()) if count]:
        note(f"{path}: passed over {', '.join(counts)}")
    if not splits[0].images:
        raise InputError(f"{train or path} is neither a file PATH.npz nor a folder with images in it")
    return splits


def find_source(path: Path, partition: str = "") -> list[Split]:
    """The training and test images of a folder: of parties, of parquet files, or of images. Its files are not yet decoded."""
    if partition == "folders":
        return find_parties(path)
    return read_parquet(path) if any(path.rglob("*.parquet")) else find_splits(path)


def split_folders(path: Path) -> tuple[Path | None, Path | None]:
    """The folders of the training and of the test images in a folder, if it has them."""
    folders = {name.lower(): path / name for name in listing(path) if (path / name).is_dir()} if path.is_dir() else {}
    train = folders.get("train")
    return train, folders.get(name_of_test(path, folders) if train else "test")


def find_parties(path: Path) -> list[Split]:
    """The training and test images of a folder that has a folder for each party, each as in `find_splits`.

    The parties' folders are those in PATH/train if that is there, else in PATH; the test images are those under PATH/test, and of the
    parties. Raises InputError if images lie beside the parties' folders, or in several.
    """
    train, test = split_folders(path)
    base = train or path
    entries = [base / name for name in listing(base) if not is_leftover(name) and base / name != test]
    parties = [entry for entry in entries if entry.is_dir()]
    if loose := [entry for entry in entries if not entry.is_dir() and is_image(entry)]:
        raise InputError(f"{base}: {len(loose)} images lie beside the parties' folders ({loose[0].name}), so that no party has them")
    if not parties:
        raise InputError(f"{base} has no folders of parties")
    found = [find_splits(party, path) for party in parties]
    owner: dict[Path, Path] = {}
    for party, (images, _) in zip(parties, found):
        for image in images.images:
            if (other := owner.setdefault(image.resolve(), party)) != party:
                raise InputError(f"{base}: the folders of {other.name} and {party.name} lead to the same image ({image})")
    train_splits, test_splits = zip(*found)
    if test:
        images = find_images(test).paths
        test_splits = (*test_splits, Split(images, classes_of(test, images), [image.relative_to(path).as_posix() for image in images]))
    joined = join(train_splits)._replace(owners=[party.name for party, split in zip(parties, train_splits) for _ in split.images])
    return [joined, join(test_splits)]


def join(splits: Sequence[Split]) -> Split:
    """Splits of files one after the other, without labels if any of them has none."""
    splits = [split for split in splits if len(split.images)]
    images, labels, names = ([value for split in splits for value in split[k] or [None]] for k in range(3))
    return Split(images, None if None in labels else labels, names)


def classes_of(folder: Path, paths: list[Path]) -> list[str] | None:
    """The class of each image: the name of the sub-folder that it lies in; None unless all lie in one."""
    places = [path.relative_to(folder).parts for path in paths]
    loose = [path for path, parts in zip(paths, places) if len(parts) == 1]
    if 0 < len(loose) < len(paths):
        note(f"{folder}: read without labels, since {len(loose)} images lie beside its sub-folders ({loose[0].name})")
    return None if loose else [parts[0] for parts in places]


def decode_splits(
    path: Path, splits: Sequence[Split], size: int, pixel_range: str | None = None, skip_broken: bool = False, cache: Path | None = None
) -> list[Split]:  # fmt: skip
    """Decode the files of all splits, so that the same range of values becomes 0..255 in each. path: their place, for errors.

    pixel_range: LOW,HIGH, of images above 8 bits the values that become 0 and 255. skip_broken: leave out images that cannot be read.
    cache: a folder for the decoded images, which are then mapped, not read, into memory. Raises InputError for images that cannot be read,
    unless `skip_broken`, and if no training image is left.
    """
    paths = [image for split in splits for image in split.images]
    limits = pixel_range and tuple(map(float, checked("pixel_range", pixel_range).split(",")))
    x, report = (decode if cache is None else partial(decode_once, cache))(path, paths, size, limits, skip_broken)
    for line in report.notes:
        note(line)
    broken, decoded, first, row = set(report.broken), [], 0, 0
    for split in splits:
        kept = [k for k in range(len(split.images)) if first + k not in broken]
        decoded.append(split.take(kept)._replace(images=as_tensor(x[row : row + len(kept)])))
        first, row = first + len(split.images), row + len(kept)
    if not len(decoded[0].images):
        raise InputError(f"{path} has no training image that can be read")
    return decoded


def as_tensor(x: np.ndarray) -> Tensor:
    """An array as a tensor on the same memory, of which torch would warn if it is a file's, since nothing may write there."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return torch.from_numpy(x)


# ------------------------------------------------------------------------------------------------- arrays and tables


def read_npz(path: Path, splits: Sequence[str] = SPLITS) -> list[Split]:
    """The training and the test images of an .npz: x_train, y_train, x_test, y_test, or train_images, train_labels and so on.

    Images are uint8 `[N, S, S, 3]`, or grey `[N, S, S]` or `[N, S, S, 1]`; labels are whole numbers or text, `[N]` or `[N, 1]`, and may be
    missing; so may test images, in whose place those of `val` or `valid` are taken. splits: which are read. Raises InputError for an array
    of another form.
    """
    keys = {name: (f"x_{name}", f"{name}_images", f"y_{name}", f"{name}_labels") for name in (*SPLITS, *INSTEAD_OF_TEST)}
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: [k for k in names if k in archive.files] for name, names in keys.items()}
            if not any(key in keys["train"][:2] for key in found["train"]):
                raise InputError(f"{path} has no array x_train or train_images; it has {some(archive.files) or 'none'}")
            chosen = ["train"]
            if "test" in splits:
                chosen.append(name_of_test(path, [name for name in keys if found[name]]))
            if "client_train" in archive.files and "test" in splits:
                found["train"].append("client_train")
            arrays = {key: archive[key] for name in chosen for key in found[name]}
            unread = sorted(set(archive.files) - set(arrays))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"data set {path} does not exist") from None
    except Exception as error:  # a damaged archive makes numpy raise errors of many types, even a tokenizer's
        hint = "; text needs `.astype(str)` before it is saved" * ("Object arrays" in str(error))
        raise InputError(f"{path} is not a readable .npz of plain arrays ({first_line(error)}){hint}") from None
    if unread:
        note(f"{path}: arrays that are not read: {some(unread)}")
    return [as_split(path, {key: arrays[key] for key in found[name]}, name) for name in chosen]


def as_split(path: Path, arrays: dict[str, np.ndarray], name: str) -> Split:
    """A split from its arrays, by their names: images, labels, parties, of which all but the images may be missing."""
    x = next((key for key in arrays if "x_" in key or "_images" in key), None)
    y = next((key for key in arrays if key not in (x, "client_train")), None)
    if x is None:
        if y:
            raise InputError(f"{path} has the labels {y} and no images x_{name} or {name}_images")
        return Split([])
    images = as_images(path, x, arrays[x])
    labels, owners = (
        key and as_labels(path, key, arrays[key], len(images)) for key in (y, "client_train" if "client_train" in arrays else None)
    )
    return Split(images, labels, owners=owners)


def as_images(path: Path | str, name: str, x: np.ndarray) -> Tensor:
    """Images of an array as uint8 `[N, 3, S, S]`. path, name: what an error calls it.

    Raises InputError if it is of another form, with the expression that converts it.
    """
    if x.dtype == np.uint8 and x.size and x.ndim in (3, 4) and x.shape[3:] in ((), (1,), (3,)) and x.shape[1] == x.shape[2]:
        return channels_first(x)
    if x.dtype != np.uint8 and x.size:
        whole, low, high = x.dtype.kind in "biu", x.min(), x.max()
        scaled = "(255 * x).round()" if low >= 0 and high <= 1 and not whole else "numpy.interp(x, (x.min(), x.max()), (0, 255)).round()"
        how = f"`{'255 * x' if x.dtype == bool else 'x.round()' if low >= 0 and 1 < high <= 255 else scaled}`, then `.astype(numpy.uint8)`"
    elif x.ndim == 4 and x.shape[1] in (1, 3):
        how = "`x.transpose(0, 2, 3, 1)`"
    elif x.ndim == 4 and x.shape[3] in (2, 4):
        how = "`x[..., :-1]`, without the transparency"
    elif x.ndim == 5:
        how = "a volume's slices are images, `x.reshape(-1, *x.shape[2:])`"
    else:
        how = "cut or resize each image to a square"
    need = "needs uint8 [N, S, S, 3], [N, S, S, 1] or [N, S, S]"
    raise InputError(f"{path}: {name} is {x.dtype} {list(x.shape)}, it {need}" + f": {how}" * (x.size > 0))


def as_labels(path: Path, name: str, y: np.ndarray, count: int) -> np.ndarray:
    """Labels of an array, `[N]`. Raises InputError unless there is one whole number from 0, or one text, for each of `count` images."""
    if y.ndim == 2 and y.shape[1] > 1:
        raise InputError(
            f"{path}: {name} is {y.dtype} {list(y.shape)}, several labels for an image (multi-label), where one is needed: "
            "`y.argmax(1)` if each row has a single 1, else leave the labels out"
        )
    y = y.reshape(len(y)) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind not in "biuSU" or y.shape != (count,):
        raise InputError(
            f"{path}: {name} is {y.dtype} {list(y.shape)}, it needs one label, a whole number or text, for each of {count} images"
        )
    if y.dtype.kind == "i" and y.min() < 0:
        raise InputError(f"{path}: {name} holds {some(np.unique(y))}; a label below 0 often says that there is none: leave such images out")
    return np.char.decode(y) if y.dtype.kind == "S" else y.astype(int) if y.dtype == bool else y


def channels_first(x: np.ndarray) -> Tensor:
    """uint8 `[N, S, S, 3]`, or grey `[N, S, S]` or `[N, S, S, 1]` -> `[N, 3, S, S]`."""
    x = x if x.shape[3:] == (3,) else np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def read_parquet(path: Path) -> list[Split]:
    """The images of a folder of Hugging Face's parquet files, whose names begin with the split: columns image and, if labelled, label.

    Raises InputError where pyarrow is missing, and for files of another form.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: parquet files need the package pyarrow: `pip install -r requirements-optional.txt`") from None
    found: dict[str, Split] = {}
    for file in sorted(path.rglob("*.parquet")):
        try:
            table = parquet.read_table(file)
            images, info = table.column("image").to_pylist(), (table.schema.metadata or {}).get(b"huggingface", b"{}")
            classes = json.loads(info).get("info", {}).get("features", {}).get("label", {}).get("names")
            labels = table.column("label").to_pylist() if "label" in table.column_names else [None] * len(images)
            content = [Embedded(image["bytes"]) for image in images]
        except Exception as error:  # pyarrow raises errors of many types
            raise InputError(f"{path} holds a parquet file without images ({file}: {first_line(error)})") from None
        for row, (image, given) in enumerate(zip(content, images)):
            image.name = given.get("path") or f"{file.relative_to(path)}:{row}"
        if None in labels:
            split = Split(content, None, [image.name for image in content])
        else:
            split = Split(content, [classes[k] if classes else str(k) for k in labels], [image.name for image in content])
        known = next((name for name in (*SPLITS, *INSTEAD_OF_TEST) if file.name.lower().startswith(name)), "train")
        found[known] = join([found[known], split]) if known in found else split
    if "train" not in found:
        raise InputError(f"{path} holds no parquet file whose name begins with train")
    test = name_of_test(path, found)
    for name in found.keys() - {"train", test}:
        note(f"{path}: the {name} images are not read")
    return [found["train"], found.get(test, Split([]))]


def read_cifar(name: str, root: Path) -> list[Split]:
    """CIFAR-10 or -100 through torchvision, whose archive is verified by checksum before it is opened."""
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
    return [Split(channels_first(split.data), np.array(split.targets)) for split in (train, test)]


def label_files(folder: Path, found: Sequence[Split], table: Path) -> list[Split]:
    """The splits of a folder as a CSV says: columns file (relative to the folder) and label, and if they are there party and split.

    Without the column split the folders say it. Images that are not in the table are left out with a count. Raises InputError for rows
    without an image, for an image with several rows, as several labels make, and for an unknown split.
    """
    rows = read_table(table, "--labels", "file", "label")
    paths = {name: (path, default) for split, default in zip(found, SPLITS) for name, path in zip(split.names, split.images)}
    if unknown := [row["file"] for row in rows if row["file"] not in paths]:
        raise InputError(f"--labels {table} names {len(unknown)} files that are no images of {folder} ({unknown[0]})")
    if repeated := [name for name, count in Counter(row["file"] for row in rows).items() if count > 1]:
        raise InputError(f"--labels {table} has several rows for an image ({repeated[0]}), which needs one label (not multi-label)")
    if len(rows) < len(paths):
        note(f"{table}: {len(paths) - len(rows)} of {len(paths)} images have no label there and are left out")
    known, chosen = (*SPLITS, *INSTEAD_OF_TEST), {}
    for row in rows:
        split = (row.get("split") or paths[row["file"]][1]).lower()
        if split not in known:
            raise InputError(f"--labels {table} has the split {split}; it needs one of {', '.join(known)}")
        chosen.setdefault(split, []).append(row)
    if "train" not in chosen:
        raise InputError(f"--labels {table} has no training image")
    test = name_of_test(table, chosen)
    for name in chosen.keys() - {"train", test}:
        note(f"{table}: {len(chosen[name])} {name} images are not read")
    return [rows_as_split(sorted(chosen.get(name, []), key=lambda row: row["file"]), paths) for name in ("train", test)]


def rows_as_split(rows: list[dict[str, str]], paths: dict[str, tuple[Path, str]]) -> Split:
    """The split of some rows of a table. paths: the file of each name."""
    labels, names, owners = ([row.get(column) for row in rows] for column in ("label", "file", "party"))
    return Split([paths[name][0] for name in names], labels, names, None if None in owners else owners)


def read_table(path: Path, option: str, *needed: str) -> list[dict[str, str]]:
    """The rows of a CSV with a header, of which commas or semicolons separate the columns. Raises InputError if it lacks a column."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path} cannot be read ({first_line(error)})") from None
    header = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter=";" if ";" in header and "," not in header else ","))
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise InputError(f"{option} {path} has no column {missing[0]}; it needs a first line with {', '.join(needed)}")
    if holes := [k for k, row in enumerate(rows) if None in row or any(not row[name] for name in needed)]:
        raise InputError(f"{option} {path}: line {holes[0] + 2} has not one value for each column")
    return rows
