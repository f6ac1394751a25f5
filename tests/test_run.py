import errno
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, heed, load, load_metrics, refused, run

import fedu
from options import parse
from runtime.cli import InputError, write_atomic
from runtime.ranks import Ended
from runtime.run import begun, holds_run, open_run, resumable


def test_an_existing_folder_is_kept(tiny, refuses, finished, tmp_path, monkeypatch):
    def refused(*words: str, line: list[str]) -> bool:
        return refuses(lambda: fedu.main(parse(line)), *words)

    monkeypatch.chdir(finished)
    before = {p.name: p.read_bytes() for p in (finished / "runs/run").iterdir()}
    assert refused("runs/run holds a run", "--resume", "--overwrite", line=[*tiny, "--out", "runs/run"])
    assert refused("runs/run holds a run", line=["--dataset", "absent.npz", "--out", "runs/run"])
    changed = ["--resume", "runs/run", "--lr", "0.1", "--rounds", "9"]
    assert refused("--lr 0.1 (it was 0.05)", "--rounds 9 (it was 3)", "cosine", line=changed)
    assert refused("99 clients", line=[*tiny, "--clients", "99", "--out", "runs/run", "--overwrite"])
    assert before == {p.name: p.read_bytes() for p in (finished / "runs/run").iterdir()}
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "encoder.pt").write_text("somebody else's")
    assert refused("no config.json", line=[*tiny, "--out", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "mine" and (tmp_path / "encoder.pt").read_text() == "somebody else's"


@pytest.mark.parametrize(
    "line, words",
    [
        ("--dataset mnist", ["--dataset", "'mnist'"]),
        ("--clients 65", ["65 clients", "--clients"]),
        ("--classes-per-client 5", ["--classes-per-client got 5", "4 classes"]),
        ("--batch-size 33", ["--batch-size"]),
        ("--method fedca --batch-size 64", ["64 images", "there are 0"]),
        ("--lr 1e30", ["round 0: no upload is finite", "--lr"]),
        ("--out /proc/fedu", ["--out /proc/fedu"]),
        ("--resume runs/none", ["runs/none", "no config.json"]),
        pytest.param("--device cuda", ["--device got cuda"],
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_sentence_and_leaves_nothing(tiny, refuses, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    base = [] if "--resume" in line else tiny
    assert refuses(lambda: fedu.main(parse([*base, *line.split()])), *words)
    assert not [path.name for path in tmp_path.rglob("*") if path.is_file()]


def test_a_mistake_leaves_the_run_that_was_there_and_what_is_no_run(stopped, tiny, refuses, tmp_path):
    """Resumed before its first round, or with a thesis beside it."""
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (stopped / name).unlink(missing_ok=True)
    with pytest.raises(KeyError), begun(stopped, resumed=True, overwrite=False):
        raise KeyError
    assert (stopped / "config.json").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    assert refuses(lambda: fedu.main(parse([*tiny, "--lr", "1e30", "--out", str(tmp_path)])), "no upload is finite")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]


def test_overwrite_replaces_a_run(tiny, tmp_path):
    run(tmp_path / "run", *tiny, "--rounds", "2")
    assert len(run(tmp_path / "run", *tiny, "--rounds", "1", "--overwrite")["metrics"]) == 1


@pytest.mark.parametrize("error", [InputError, SystemExit, Ended, KeyboardInterrupt])
def test_a_mistake_in_its_first_round_leaves_the_run_that_it_replaces(stopped, tiny, monkeypatch, error):
    """Every byte of it; a run that an interrupt or a lost process ends is there to be resumed, and the former is gone."""
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    line = [*tiny, "--seed", "7", "--out", str(stopped), "--overwrite"]

    def fail(*_):
        raise error("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(fedu, "aggregate", fail)
        with pytest.raises(error):
            fedu.main(parse(line))
    after = {path.name: path.read_bytes() for path in stopped.iterdir()}
    if error in (InputError, SystemExit):
        assert after == before
    else:
        assert after.keys() < before.keys() and json.loads(after["config.json"])["options"]["seed"] == 7
        assert len(fedu.resume(stopped).metrics) == 3


def test_a_replaced_run_that_cannot_be_put_back_stays_where_it_is(stopped, monkeypatch):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}

    def fail(*_):
        raise OSError("on purpose")

    monkeypatch.setattr("runtime.run.remove_files", fail)
    with pytest.raises(OSError, match="on purpose"), begun(stopped, resumed=False, overwrite=True):
        raise InputError("a mistake")
    assert {path.name: path.read_bytes() for path in (stopped / ".replaced").iterdir()} == before


def test_the_run_that_was_replaced_is_gone_after_the_first_round(stopped, tiny, monkeypatch):
    """And what a run that was killed in its first round left of the one before is not taken for it."""
    (stopped / ".replaced").mkdir()
    (stopped / ".replaced/method.py").write_text("of the run before")
    measure, there = fedu.measured_knn, []

    def look(*arguments):
        there.append({path.name for path in (stopped / ".replaced").glob("*")})
        return measure(*arguments)

    former = {path.name for path in stopped.iterdir() if path.is_file()}
    monkeypatch.setattr(fedu, "measured_knn", look)
    run(stopped, *tiny, "--overwrite")
    assert there == [former, set(), set()] and not (stopped / ".replaced").exists()


def test_an_interrupted_overwrite_can_be_repeated(stopped, monkeypatch):
    unlink = Path.unlink

    def interrupt(path, missing_ok):
        if path.name == "bank.bin":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_run(stopped, {}, CPU, overwrite=True, data={})
    monkeypatch.undo()
    assert holds_run(stopped, overwrite=True)


def test_without_git_and_where_folders_cannot_be_locked(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setenv("PATH", "")
    run(tmp_path / "run", *tiny, "--rounds", "1")
    assert json.loads((tmp_path / "run/config.json").read_text())["commit"] is None
    assert "run cannot be locked (Bad file descriptor)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_name_the_command_that_continues(tiny, refuses, tmp_path, monkeypatch, number):
    """While the run goes on, its folder is refused to a second command."""
    monkeypatch.chdir(tmp_path)
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "fedu.py"), *tiny, "--rounds", "999", "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=tmp_path, env=env, preexec_fn=heed, **pipes) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None, process.stderr.read()
        for other, words in (
            ([*line[2:], "--overwrite"], "run is in use by another run"),
            (["--resume", "run"], "run is in use by another run"),
            (line[2:], "run holds a run"),
        ):
            assert refuses(lambda other=other: fedu.main(parse(other)), words)
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr.read().splitlines()[-1] == "fedu.py: interrupted; continue with `python fedu.py --resume run`"
    assert len(load_metrics(tmp_path / "run")) >= 2 and not list((tmp_path / "run").glob(".*"))


def test_a_second_sigterm_does_not_disturb_what_the_first_one_began():
    """A parent that is killed sends one for each of its threads."""
    ended = []
    with pytest.raises(KeyboardInterrupt, match="continue with `python fedu.py --resume run`"), resumable(Path("run")):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(True)
    assert ended


# ---------------------------------------------------------------------------------------------------------- checkpoints


def damage(path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
    if how == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": whole[:middle], "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "foreign"])
def test_damaged_checkpoints_are_refused_and_the_previous_one_continues(finished, stopped, capsys, how):
    damage(stopped / "checkpoint.pt", how)
    fedu.resume(stopped)
    printed = capsys.readouterr()
    assert "run/checkpoint.pt is" in printed.err and "falling back to" in printed.err and "run/checkpoint-previous.pt" in printed.err
    assert "continuing after 2 of 3 rounds" in printed.out
    straight, resumed = load(finished / "runs/run"), load(stopped)
    assert all(map(torch.equal, straight["encoders"], resumed["encoders"])) and len(resumed["metrics"]) == 3
    # the whole one is kept beside the new one, not the damaged one
    assert torch.load(stopped / "checkpoint-previous.pt", weights_only=True)["values"]["round"] == 2


def test_a_damaged_row_of_the_bank_is_refused_and_the_previous_checkpoint_continues(finished, stopped, capsys):
    """Two clients and three rounds: the last checkpoint names rows 4 and 5, the one before it rows 2 and 3."""
    bank = stopped / "bank.bin"
    row_bytes = bank.stat().st_size // 6
    with bank.open("r+b") as file:
        file.seek(5 * row_bytes + 1000)
        file.write(b"\xff\xff")
    fedu.resume(stopped)
    printed = capsys.readouterr().err
    assert "run/bank.bin is damaged: row 5" in printed and "falling back" in printed
    assert all(map(torch.equal, load(finished / "runs/run")["encoders"], load(stopped)["encoders"]))


def test_without_a_whole_checkpoint_nothing_is_resumed(stopped, capsys):
    (stopped / "checkpoint.pt").unlink()  # as if killed between the two renames
    fedu.resume(stopped)
    assert "continuing after 2 of 3 rounds" in capsys.readouterr().out
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        damage(stopped / name, "flipped")
    with pytest.raises(InputError, match="run/checkpoint-previous.pt is"):
        fedu.resume(stopped)


# ------------------------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_in_the_first_round_is_one_sentence_and_leaves_nothing(tiny, command, tmp_path):
    """A file-size limit below the bank's 14 MB stands for the full disk: both make write() fail in the middle."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = command("fedu.py", *tiny, "--out", "run", cwd=tmp_path, preexec_fn=limit)
    assert refused(done, "cannot write run/bank.bin") and not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint(finished, tiny, tmp_path):
    """A tmpfs of 16 MB has room for the first round and not for the second; a copy of the run folder is then resumed elsewhere."""
    script = (
        f"mount -t tmpfs -o size=16m none full && {sys.executable} {ROOT / 'fedu.py'} {' '.join(tiny)} --out full/run; cp -r full/run run"
    )
    (tmp_path / "full").mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    if "full" in done.stderr and "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert re.fullmatch(r"fedu.py: error: cannot write full/run/\S+: No space left on device\n", done.stderr), done
    assert len(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["rows"]) == 2
    fedu.resume(tmp_path / "run")
    assert all(map(torch.equal, load(finished / "runs/run")["encoders"], load(tmp_path / "run")["encoders"]))


@pytest.mark.parametrize("cause, expected", [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), InputError)])
def test_what_keeps_torch_save_from_writing_is_what_is_reported(tmp_path, cause, expected):
    """torch.save raises both causes as a RuntimeError of its archive writer."""

    class Hindered:
        def __init__(self, file):
            self.file, self.turns = file, itertools.count()

        def write(self, piece) -> int:
            if next(self.turns) == 2:
                raise cause
            return self.file.write(piece)

        def flush(self) -> None:
            pass

    with pytest.raises(expected, match="No space left" if expected is InputError else None):
        write_atomic(tmp_path / "x.pt", lambda file: torch.save(torch.zeros(10_000), Hindered(file)))
    assert not list(tmp_path.iterdir())
