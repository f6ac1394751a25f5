"""Splits a file into pieces and joins them again, each checked by its SHA-256, where only small files can be copied.

    python results/pieces.py split ~/.cache/fedu/cifar10.npz pieces
    python results/pieces.py join pieces/cifar10.npz.sha256 ~/.cache/fedu/cifar10.npz

`split` writes pieces/cifar10.npz.000, .001, ... of 45 MiB, and cifar10.npz.sha256, which lists them as `sha256sum` does.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).parent.parent))

from runtime.cli import InputError, Parser, number, os_errors, user_errors, user_path, write_atomic


def split(path: Path, folder: Path, mib: int = 45) -> Path:
    """Write a file's pieces of at most `mib` MiB to a folder; returns the list of them, `folder/NAME.sha256`."""
    lines, listing = [], folder / f"{path.name}.sha256"
    with os_errors(f"cannot split {path} into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            while content := file.read(mib << 20):
                piece = folder / f"{path.name}.{len(lines):03}"
                write_atomic(piece, lambda file, content=content: file.write(content))
                lines.append(f"{sha256(content).hexdigest()}  {piece.name}\n")
    write_atomic(listing, lambda file: file.write("".join(lines).encode()))
    return listing


def join(listing: Path, path: Path) -> None:
    """Put the pieces that a list names together again. Raises InputError if one is missing or damaged; `path` then stays as it was."""
    with os_errors(f"cannot read {listing}"):
        lines = listing.read_bytes().decode(errors="replace").splitlines()

    def write(file: BinaryIO) -> None:
        for line in lines:
            digest, _, name = line.partition("  ")
            if not name.startswith(f"{listing.stem}."):
                raise InputError(f"{listing} is not a list of pieces as `pieces.py split` writes it")
            piece = listing.parent / name
            with os_errors(f"cannot read {piece}"):
                content = piece.read_bytes()
            if sha256(content).hexdigest() != digest:
                raise InputError(f"{piece} is damaged: it does not have the checksum in {listing}")
            file.write(content)

    write_atomic(path, write)


def main() -> None:
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("split", "join"))
    parser.add_argument("source", type=user_path, help="the file to split; the .sha256 beside the pieces to join")
    parser.add_argument("target", type=user_path, help="the folder for the pieces; the joined file")
    parser.add_argument("--mib", type=number(int, 1), help="the most MiB of a piece  [45]")
    options = parser.parse_args()
    if options.what == "split":
        print(split(options.source, options.target, getattr(options, "mib", 45)), "lists the pieces")
    else:
        join(options.source, options.target)
        print(options.target, "is whole")


if __name__ == "__main__":
    with user_errors("pieces.py"):
        main()
