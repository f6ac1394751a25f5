"""The run folder: what was run (config.json), what happened (metrics.jsonl), and where to resume from (checkpoint.pt).

Every file appears whole or not at all. docs/run-folder.md describes them for people who read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.bank import Bank, Row, checksum
from runtime.cli import InputError, first_line, locked, os_errors, write_atomic
from runtime.device import describe_device
from runtime.ranks import Ended

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt", "bank.bin", "encoder.pt")
RUN_FILES += ("partition.png", "divergence.png", "spectrum.png", "eval.jsonl", "method.py", "views.py")
REPLACED = ".replaced"  # in a run's folder: the files of the run that it replaces, until its first round is done
TRAINING_SOURCES = ("*.py", "methods/*.py", "runtime/*.py", "ops/*")
AFTER_TRAINING = ("eval.py", "sweep.py")  # which train nothing themselves


def read_config(run: Path) -> dict:
    """The content of config.json. Raises InputError if it is missing or damaged."""
    try:
        config = json.loads((run / "config.json").read_text())
        config["options"]["method"]
        return config
    except FileNotFoundError:
        raise InputError(f"{run} is not a run folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}/config.json is not readable ({first_line(error)})") from None


def read_metrics(run: Path) -> list[dict]:
    """The rounds of a run, one dict each; docs/run-folder.md describes their keys."""
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run}/metrics.jsonl is not readable ({first_line(error)})") from None


# ----------------------------------------------------------------------------------------------------- a run's own folder


@contextmanager
def run_folder(out: Path, mode: int = 0o777) -> Iterator[None]:
    """Make the run folder, and lock it for this process. mode: of a new folder, before the umask."""
    with os_errors(f"--out {out} cannot be made"):
        out.mkdir(mode, parents=True, exist_ok=True)
    with locked(out, f"{out} is in use by another run: wait for it, or choose another --out"):
        for fragment in (path for name in RUN_FILES for path in out.glob(f".{name}.*")):
            fragment.unlink()  # left by a run that was killed while it wrote
        yield


@contextmanager
def begun(out: Path, resumed: bool, overwrite: bool) -> Iterator[None]:
    """If a mistake ends a new run before its first round is done, leave none of it, and the run that it was to replace as it was."""
    if resumed:
        yield
        return
    replaced = out / REPLACED
    if holds_run(out, overwrite):
        with os_errors(f"--out {out} cannot be used"):
            shutil.rmtree(replaced, ignore_errors=True)  # left by a run that was killed in its first round
            move_files(out, replaced)
    try:
        yield
    except BaseException as error:
        mistake = isinstance(error, Exception | SystemExit) and not isinstance(error, Ended)
        if mistake and not (out / "checkpoint.pt").exists():
            remove_files(out)
            move_files(replaced, out)
            with suppress(OSError):  # it holds something else
                out.rmdir()
        shutil.rmtree(replaced, ignore_errors=True)  # not reached where its files could not be put back
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """On Ctrl-C and on SIGTERM, end with the command that continues the run."""
    with interrupts_on_sigterm():
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with `python fedu.py --resume {shlex.quote(str(out))}`") from None


@contextmanager
def interrupts_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt. Does nothing outside the main thread, where Python cannot set a signal's handler."""

    def interrupt(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a parent of several threads can send it once for each that ends
        raise KeyboardInterrupt

    try:
        former = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def open_run(out: Path, options: dict, device: torch.device, data: dict[str, str], overwrite: bool = False) -> dict:
    """Begin a run in its folder; returns its config. data: hashes of what it is trained on.

    A folder that holds a run is refused unless `overwrite`, which removes that run's files and no others.
    """
    config = {
        "options": options,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": describe_device(device),
        **describe_code(),
        "data": data,
        "seconds": 0.0,
    }
    with os_errors(f"--out {out} cannot be used"):
        if holds_run(out, overwrite):
            remove_files(out)
    write_config(out, config)
    write_metrics(out, [])
    return config


def holds_run(out: Path, overwrite: bool) -> bool:
    """Whether the folder holds a run that is to be replaced. Raises InputError if it holds anything that must not be replaced."""
    with os_errors(f"--out {out} cannot be used"):
        found = [name for name in RUN_FILES if out.is_dir() and (out / name).exists()]
    if found and "config.json" not in found:  # not a run's folder, so nothing in it is ours to remove
        raise InputError(f"{out} is not a run folder, since it has no config.json, but it holds {found[0]}: choose another --out")
    if found and not overwrite:
        raise InputError(f"{out} holds a run: choose another --out, or --resume {out}, or --overwrite it")
    if found:
        read_config(out)
    return bool(found)


def move_files(source: Path, target: Path) -> None:
    """Move a run's files to another folder, config.json last, as `remove_files`."""
    target.mkdir(exist_ok=True)
    for name in reversed(RUN_FILES):
        with suppress(FileNotFoundError):
            os.replace(source / name, target / name)


def remove_files(out: Path) -> None:
    """Remove a run's files; config.json last: while it is there, an interrupted removal can be repeated."""
    for name in reversed(RUN_FILES):
        (out / name).unlink(missing_ok=True)


def reopen_run(out: Path, parties: bool = False) -> dict:
    """Config of an existing run; warns on stderr if other code began it. parties: whether it must be a Flower run."""
    config = read_config(out)
    if ("run" in config) != parties:  # "run" is in the config of Flower runs alone
        raise InputError(f"{out} was begun by {'fedu.py' if parties else 'flwr run'}, and only that can go on with it")
    if config.get("source") != describe_code()["source"]:
        print(f"{out} was begun by other code, commit {config.get('commit')}: the rest may differ from what that gave", file=sys.stderr)
    return config


def describe_code() -> dict:
    """The code that runs: a hash over the sources that can change the result of a training, and git's commit if there is one."""
    here = Path(__file__).parent.parent
    sources = sorted(p for pattern in TRAINING_SOURCES for p in here.glob(pattern) if p.is_file() and p.name not in AFTER_TRAINING)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    git = shutil.which("git") and subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    return {"source": hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16], "commit": git or None}


def write_config(out: Path, config: dict) -> None:
    """Write config.json: the options, the code and the device. On --resume it stays as it was at the start, except for the seconds."""
    write_atomic(out / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode() + b"\n"))


def write_metrics(out: Path, metrics: list[dict]) -> None:
    write_atomic(out / "metrics.jsonl", lambda file: file.write("".join(json.dumps(row) + "\n" for row in metrics).encode()))


# ------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoint(NamedTuple):
    """All that the next round depends on. Random generators are keyed by (seed, round, client) and have no state."""

    tensors: list[dict[str, Tensor]]  # of each server, by name
    rows: list[Row | None]  # each client's row in the bank
    values: dict  # numbers, strings, and lists of them

    def checksum(self) -> str:
        """SHA-256 of the whole content."""
        tensors = [(list(named), checksum(named.values())) for named in self.tensors]
        return hashlib.sha256(repr((tensors, self.rows, self.values)).encode()).hexdigest()


def save_checkpoint(out: Path, checkpoint: Checkpoint, bank: Bank) -> None:
    """Write checkpoint.pt with a checksum; the former one becomes checkpoint-previous.pt."""
    content = checkpoint._asdict() | {"rows": [row and tuple(row) for row in checkpoint.rows]}
    content |= {"checksum": checkpoint.checksum(), "rows_before": sorted(bank.named)}
    bank.flush()
    write_atomic(out / "checkpoint.pt", lambda file: torch.save(content, file), keep_as=out / "checkpoint-previous.pt")
    bank.protect(row.index for row in checkpoint.rows if row)
    shutil.rmtree(out / REPLACED, ignore_errors=True)


def load_checkpoint(out: Path, bank: Bank, device: torch.device) -> Checkpoint | None:
    """The last checkpoint, or None if the run was interrupted before its first round's end.

    Falls back to the previous one if the last is missing or damaged, and says so on stderr.
    """
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path, other in zip(paths, [*paths[1:], None]):
        try:
            checkpoint = read_checkpoint(path, bank, device)
        except InputError as error:
            if other is None:
                raise
            print(f"{error}; falling back to {other}", file=sys.stderr)
        else:
            with os_errors(f"cannot replace {out}/checkpoint.pt"):
                os.replace(path, out / "checkpoint.pt")  # so that the next checkpoint replaces the damaged one, and not this one
            return checkpoint
    return None


def read_checkpoint(path: Path, bank: Bank, device: torch.device) -> Checkpoint:
    """A checkpoint whose tensors and rows have the checksums that they were saved with; raises InputError otherwise."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        rows = [None if row is None else Row(*row) for row in content["rows"]]
        checkpoint = Checkpoint(content["tensors"], rows, content["values"])
        intact, rows_before = content["checksum"] == checkpoint.checksum(), content["rows_before"]
    except Exception as error:  # whatever a damaged archive, or a checkpoint of another form, makes torch or the lines above raise
        raise InputError(f"{path} is not a readable checkpoint of this version ({first_line(error)})") from None
    if not intact:
        raise InputError(f"{path} is damaged: it does not have the checksum that it was saved with")
    for row in filter(None, rows):
        bank.verify(row)
    bank.protect(rows_before)
    bank.protect(row.index for row in rows if row)
    return checkpoint
