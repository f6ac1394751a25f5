"""Write fashion.npz, the embedded data set: a class-balanced subset of Fashion-MNIST, padded from 28x28 to 32x32.

    python assets/make_fashion.py FOLDER      the folder of the four *-ubyte.gz files, as published or as in Debian's dataset-fashion-mnist

The first 600 training and the first 100 test images of each class, in the files' order; 6,000 and 1,000 grey images.
"""

import gzip
import sys
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: a magic number whose last byte is the number of dimensions, their big-endian sizes, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def main(folder: Path) -> None:
    arrays = {}
    for split, prefix, count in (("train", "train", 600), ("test", "t10k", 100)):
        images, labels = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = np.pad(images[chosen], ((0, 0), (2, 2), (2, 2))), labels[chosen]
    np.savez_compressed(Path(__file__).with_name("fashion.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
