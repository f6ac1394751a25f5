import importlib.util
import subprocess
import sys

from conftest import ROOT, refused

import bench
from data import load_images


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_views_are_timed_against_each_other(command, tmp_path):
    done = command("bench.py", "views", "--repeats", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ways = [row[-4] for row in rows(done.stdout) if row[0] == "views,"]
    assert ways[:3] == ["ours", "reference", "PIL"]


def test_each_way_of_an_epoch_runs():
    images = load_images("fashion").x_train[:64].contiguous()
    assert 0 < bench.ours("tiny", images, 32)() < 8
    bench.authors("tiny", images, 32)()
    bench.products("tiny", 32)()
    if importlib.util.find_spec("lightly"):
        bench.lightly("tiny", images, 32)()


def test_ops_are_timed_and_their_errors_shown(tmp_path):
    command = [sys.executable, "-m", "ops.bench", "--only", "small", "--repeats", "3", "--budget", "0", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [row for row in rows(done.stdout) if row[:3] == ["small", "5", "aggregate"] and row[3] == "ours"]
    assert len(ours) == 1 and float(ours[0][-1]) < 1e-6


def test_bad_options_are_one_sentence(command, tmp_path):
    assert refused(command("bench.py", "speed", cwd=tmp_path), "speed", "views, epoch, server, start")
    assert refused(command("bench.py", "--repeats", "2", cwd=tmp_path), "--repeats", "at least 3")
