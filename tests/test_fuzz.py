"""Damaged files are answered with one sentence: `FEDU_FUZZ=10000 python -m pytest tests/test_fuzz.py -s` is the long form."""

import collections
import io
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import fedu
from data import load_images
from federation import build
from options import Options
from runtime.bank import Bank
from runtime.cli import InputError
from runtime.run import read_checkpoint, read_config, read_metrics

CPU = torch.device("cpu")
COUNT = int(os.environ.get("FEDU_FUZZ", 200))  # mutated files in all


def mutate(whole: bytes, dice: random.Random) -> bytes:
    """Up to three of: bits flipped, a piece cut out, doubled, overwritten by zeros or noise, the end cut off."""
    data = bytearray(whole)
    for _ in range(dice.randint(1, 3)):
        # half of all places near the begin or the end, where formats have their headers and directories
        begin = dice.choice(
            [dice.randrange(len(data)), dice.randrange(min(len(data), 200)), len(data) - 1 - dice.randrange(min(len(data), 200))]
        )
        end = min(len(data), begin + dice.choice([1, 4, 50, 1000]))
        how = dice.choice(["flip", "cut", "double", "zeros", "noise", "truncate"])
        piece = {
            "flip": lambda b=begin, e=end: bytes(x ^ 1 << dice.randrange(8) for x in data[b:e]),
            "cut": lambda b=begin, e=end: b"",
            "double": lambda b=begin, e=end: data[b:e] * 2,
            "zeros": lambda b=begin, e=end: bytes(e - b),
            "noise": lambda b=begin, e=end: dice.randbytes(e - b),
            "truncate": lambda b=begin, e=end: data[b:e],
        }[how]()
        data[begin : len(data) if how == "truncate" else end] = piece
        if not data:
            return b"\0"
    return bytes(data)


def image_file(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def readers(npz, finished, tmp_path):
    """For each kind of file: an intact one, where it is read, and what reads it."""
    with np.load(npz) as arrays:
        np.savez_compressed(tmp_path / "packed.npz", **arrays)
    folder, run = tmp_path / "images", tmp_path / "run"
    for split in ("train", "test"):
        for c in "ab":
            (folder / split / c).mkdir(parents=True)
            for kind in ("png", "jpeg"):
                (folder / split / c / f"0.{kind}").write_bytes(image_file(kind))
    shutil.copytree(finished / "runs/run", run)

    def resume() -> None:
        options = Options(**read_config(run)["options"])
        federation = build(options, load_images(str(npz)))
        bank = Bank(fedu.kept_parts(federation.networks, options), run / "bank.bin")
        federation.restore(read_checkpoint(run / "checkpoint.pt", bank, CPU))

    places = {
        "npz": (tmp_path / "plain.npz", npz.read_bytes(), lambda: load_images(str(tmp_path / "plain.npz"))),
        "packed npz": (tmp_path / "packed.npz", None, lambda: load_images(str(tmp_path / "packed.npz"))),
        "png": (folder / "train/a/0.png", None, lambda: load_images(str(folder), image_size=12)),
        "jpeg": (folder / "test/b/0.jpeg", None, lambda: load_images(str(folder), image_size=12)),
        "checkpoint": (run / "checkpoint.pt", None, resume),
        "bank": (run / "bank.bin", None, resume),
        "config": (run / "config.json", None, lambda: Options(**read_config(run)["options"])),
        "metrics": (run / "metrics.jsonl", None, lambda: read_metrics(run)),
        "encoder": (run / "encoder.pt", None, lambda: evaluation.load_encoders(run)),
    }
    return {name: (path, whole or path.read_bytes(), read) for name, (path, whole, read) in places.items()}


def test_mutated_files_are_read_or_refused(readers, capsys):
    outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for number in range(COUNT):
        name = list(readers)[number % len(readers)]
        path, whole, read = readers[name]
        path.write_bytes(mutate(whole, random.Random(number)))
        try:
            read()
            outcomes[name]["read"] += 1
        except InputError as error:
            assert "\n" not in str(error), f"{name} {number}: {error}"
            outcomes[name]["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}, mutation {number}: {error!r}") from error
        finally:
            path.write_bytes(whole)
    with capsys.disabled():
        if COUNT > 1000:
            print("\n" + "\n".join(f"{name:12} {dict(counts)}" for name, counts in outcomes.items()))
    assert sum(counts["refused"] for counts in outcomes.values()) > COUNT / 4
    for name, (_, _, read) in readers.items():  # which are whole again
        read(), name


class Harmful:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["npz", "checkpoint", "encoder"])
def test_no_pickle_is_ever_run(readers, tmp_path, monkeypatch, name):
    path, _, read = readers[name]
    monkeypatch.chdir(tmp_path)
    if name == "npz":
        np.savez(path, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([Harmful()], dtype=object)))
    else:
        torch.save({"servers": [Harmful()], "encoders": [Harmful()]}, path)
    with pytest.raises(InputError):
        read()
    assert not (tmp_path / "harm").exists()
