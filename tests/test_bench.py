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


def test_each_way_of_an_epoch_runs_in_a_process_of_its_own():
    assert 0 < bench.ours("tiny", 64, 32)() < 8
    ways = [bench.core, bench.floor, bench.authors]
    if importlib.util.find_spec("lightly"):
        ways.append(bench.lightly)
    for way in ways:
        way("tiny", 64, 32)()
    worker = bench.Worker(bench.ours, "tiny", 64, 32)
    worker()
    worker.stop()
    assert 1e8 < worker.peak_bytes < 1e11


def test_operations_by_hand():
    """The tiny encoder on 32 x 32: four convolutions of stride 2 and the heads, a multiplication and an addition each, two views."""
    convolutions = [3 * 16 * 16**2, 16 * 32 * 8**2, 32 * 64 * 4**2, 64 * 128 * 2**2]
    projector, predictor = 128 * 512 + 512 * 256, 256 * 512 + 512 * 256
    encoder = 9 * sum(convolutions) + projector
    counted = bench.operations("tiny")
    assert counted["target"] == 2 * 2 * encoder and counted["forward"] == 2 * 2 * (encoder + predictor)
    # backwards: the gradients of weights and of inputs, the first convolution's excepted
    assert counted["backward"] == 2 * 2 * (2 * (encoder + predictor) - 9 * convolutions[0])


def test_growth_is_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "timed", lambda ways, repeats: {way: 0.5 * int(way[2:]) ** 2 for way in ways})
    bench.bench_growth(3, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("slope 2.00") == 4


def test_a_simulated_round_trains_on_its_images(tmp_path):
    images = load_images("fashion")
    round_ = bench.simulation(images, tmp_path, per_client=64, encoder="tiny", batch_size=32, local_epochs=1, partition="iid")
    round_()
    assert (tmp_path / "checkpoint.pt").exists()


def test_ops_are_timed_and_their_errors_shown(tmp_path):
    command = [sys.executable, "-m", "ops.bench", "--only", "small", "--repeats", "3", "--budget", "0", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [row for row in rows(done.stdout) if row[:3] == ["small", "5", "aggregate"] and row[3] == "ours"]
    assert len(ours) == 1 and float(ours[0][-1]) < 1e-6


def test_bad_options_are_one_sentence(command, tmp_path):
    assert refused(command("bench.py", "speed", cwd=tmp_path), "speed", "views, start, server, epoch, memory, growth, clients, ranks")
    assert refused(command("bench.py", "--peak-tflops", "0", cwd=tmp_path), "--peak-tflops", "above 0")
    assert refused(command("bench.py", "--repeats", "2", cwd=tmp_path), "--repeats", "at least 3")
