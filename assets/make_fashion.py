"""Write Fashion-MNIST, padded from 28x28 to 32x32, as a file that --dataset takes.

    python assets/make_fashion.py FOLDER            assets/fashion.npz, the embedded data set
    python assets/make_fashion.py FOLDER FILE.npz   all 60,000 training and 10,000 test images

FOLDER has the four *-ubyte.gz files, as published or as in Debian's dataset-fashion-mnist. The embedded data set has the first 600 training
and the first 100 test images of each class, in the files' order.
"""

import gzip
import sys
import zlib
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: a magic number whose last byte is the number of dimensions, their big-endian sizes, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def main(folder: Path, out: Path | None = None) -> None:
    arrays = {}
    for split, prefix, count in (("train", "train", 600), ("test", "t10k", 100)):  # count of a class
        images, labels = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: None if out else count] for c in range(10)]))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = np.pad(images[chosen], ((0, 0), (2, 2), (2, 2))), labels[chosen]
    np.savez_compressed(out or Path(__file__).with_name("fashion.npz"), **arrays)


if __name__ == "__main__":
    try:
        if len(sys.argv) not in (2, 3):
            raise ValueError(f"got {len(sys.argv) - 1} arguments, wants FOLDER, and FILE.npz for all images")
        main(*map(Path, sys.argv[1:]))
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:  # the last four: a damaged file
        print(f"make_fashion.py: error: {error}", file=sys.stderr)
        sys.exit(2)
