import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench import bounds, others, peers, timing, training
from data import load_images


def module(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`python -m name ...`, as from the repository's root, but in a folder for what it writes."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", name, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_views_are_timed_against_each_other(capsys):
    training.main(["views"], [], 3, None, None, None)
    ways = [row[-4] for row in rows(capsys.readouterr().out) if row[0] == "views,"]
    assert ways[:3] == ["ours", "reference", "PIL"]


def test_each_way_of_an_epoch_runs_in_a_process_of_its_own(capsys):
    assert 0 < training.ours("tiny", 64, 32)() < 8
    ways = [partial(training.ours, core=True), bounds.floor, others.authors]
    if importlib.util.find_spec("lightly"):
        ways.append(others.lightly)
    for way in ways:
        way("tiny", 64, 32)()
    ways = {"ours": partial(training.ours, "tiny", 64, 32)}
    seconds, peaks = training.compare("epoch", ways, 64, apart=True, operations=1e9, repeats=3, peak_tflops=100.0)
    printed = rows(capsys.readouterr().out)
    assert [row[:2] for row in printed] == [["epoch", "ours"]] and printed[0][3] == printed[0][-1] == "1.00"
    for row, s, peak in zip(printed, seconds.values(), peaks.values()):
        assert 100 < peak < 1e5 and row[-2] == "MiB" and float(row[-3]) == round(peak)
        assert float(row[4]) == pytest.approx(64 / s, abs=1) and float(row[5]) == pytest.approx(0.064 / s, abs=0.01) and row[7] == "MFU"


def test_operations_by_hand():
    """The tiny encoder on 32 x 32: four convolutions of stride 2 and the heads, a multiplication and an addition each, two views."""
    convolutions = [3 * 16 * 16**2, 16 * 32 * 8**2, 32 * 64 * 4**2, 64 * 128 * 2**2]
    projector, predictor = 128 * 512 + 512 * 256, 256 * 512 + 512 * 256
    encoder = 9 * sum(convolutions) + projector
    counted = bounds.operations("tiny")
    assert counted["target"] == 2 * 2 * encoder and counted["forward"] == 2 * 2 * (encoder + predictor)
    # backwards: the gradients of weights and of inputs, the first convolution's excepted
    assert counted["backward"] == 2 * 2 * (2 * (encoder + predictor) - 9 * convolutions[0])


def test_traffic_by_hand():
    """A product of [2, 3] by [3, 4], its transposed view left out, and a ReLU in place."""
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with bounds.Traffic() as counted:
        torch.relu_(x @ weight.T)
    assert (counted.count, counted.bytes) == (2, 4 * (6 + 12 + 8) + 4 * (8 + 8))
    step = bounds.traffic("tiny", 8)
    assert step.count > 100 and bounds.traffic("tiny", 16).bytes > 1.2 * step.bytes


def test_growth_is_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training, "time_ways", lambda ways, *_: {way: 0.5 * int(way[2:]) ** 2 for way in ways})
    training.main(["growth"], [], 3, None, None, tmp_path)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("slope 2.00") == 4


def test_seconds_and_memory_of_many_clients_are_drawn(tmp_path, monkeypatch):
    def compare(what: str, ways: dict, apart: bool):
        assert apart and list(ways) == ["10, 10", "100, 10", "1000, 10", "10000, 10", "10000, 50"]
        return dict(zip(ways, (1.0, 1.1, 1.0, 1.2, 5.0))), dict.fromkeys(ways, 300.0)

    monkeypatch.chdir(tmp_path)
    training.compare_clients(compare, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clients.png"]
    assert (tmp_path / "clients.png").read_bytes().startswith(b"\x89PNG")


def test_commands_are_timed_without_a_call_before():
    """They return their own seconds, or are timed from outside."""
    calls = []
    seconds = timing.time_ways({"own": lambda: calls.append(1) or float(len(calls)), "none": lambda: None}, 3, 1.0, "cpu", commands=True)
    assert len(calls) == 3 and seconds["own"] == 2 and 0 < seconds["none"] < 0.1


def test_whole_runs_are_timed_idle_and_beside_a_busy_loop(monkeypatch, capsys, tmp_path):
    seconds = {"auto": 30.0, "1": 40.0, "former 1": 60.0, "auto busy": 45.0}
    monkeypatch.setattr(training, "time_ways", lambda ways, *_: {way: seconds.get(way, 1.0) for way in ways})
    for against, ratio in ((None, "auto over 1, idle            0.75"), (tmp_path, "auto over former 1, idle     0.50")):
        training.main(["start"], [], 3, None, against, None)
        assert {ratio, "auto, busy over idle         1.50"} < {*capsys.readouterr().out.splitlines()}


def test_a_command_is_timed_to_its_end_or_to_what_it_prints(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 0 < training.seconds_of("--help", busy=True) < 60
    assert training.seconds_of(*tiny, "--out", "first", until="predictor taken") > 0
    assert not (tmp_path / "first" / "encoder.pt").exists()
    for options, until in (["--bad"], None), (["--help"], "not there"):
        with pytest.raises(AssertionError):
            training.seconds_of(*options, until=until, busy=True)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not any(b"while True" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_a_simulated_round_trains_on_its_images(tmp_path):
    images = load_images("fashion")
    round_ = training.rounds_of_fedu(images, tmp_path, per_client=64, encoder="tiny", batch_size=32, local_epochs=1, partition="iid")
    round_()
    assert (tmp_path / "checkpoint.pt").exists()


def test_rounds_of_many_clients_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "SIZE", peers.SIZE | {"clients": 20, "clients_per_round": 2, "local_epochs": 1})
    images = training.as_large_as_cifar10()
    monkeypatch.setattr(peers, "as_large_as_cifar10", lambda: images._replace(x_train=images.x_train[:1000], y_train=images.y_train[:1000]))
    peers.main("ours", 2, 1)
    times = json.loads(capsys.readouterr().out)
    assert len(times) == 2 and all(0 < seconds < 60 for seconds in times) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def ops_timed() -> list[list[str]]:
    done = module("bench.ops", "--only", "small", "--repeats", "3", "--budget", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return rows(done.stdout)


def test_ops_say_what_made_their_figures_and_hold_all_against_a_plain_read(ops_timed):
    assert ops_timed[0][:4] == ["$", "python", "-m", "bench.ops"] and "commit" in ops_timed[1]
    title = ops_timed[2]
    assert title[:4] == ["network", "K", "op", "way"] and title[-2:] == ["read", "error"]
    timed = [row for row in ops_timed[3:] if row[:2] == ["small", "5"] and row[2] not in ("copy_", "read")]
    assert timed and all(row[8].endswith("%") for row in timed)


def test_ops_are_timed_and_their_errors_shown(ops_timed):
    ours = [row for row in ops_timed if row[:3] == ["small", "5", "aggregate"] and row[3] == "ours"]
    assert len(ours) == 1 and float(ours[0][-1]) < 1e-6


def test_ops_are_held_against_a_plain_read_and_the_present_ways(ops_timed):
    ways = {row[2]: [other[3] for other in ops_timed if other[:3] == row[:3]] for row in ops_timed if row[:2] == ["small", "5"]}
    assert ways["aggregate"][:2] == ways["weighted_mean"][:2] == ["ours", "out="] and ways["sgd_ema_"] == ["ours", "reference", "separate"]
    bytes_moved = {row[3]: float(row[-2]) for row in ops_timed if row[2] == "round"}
    assert set(bytes_moved) == {"matrix", "folded"} and bytes_moved["folded"] > 2 * bytes_moved["matrix"]


@pytest.mark.parametrize(
    "line, words",
    [("speed", ["speed", *training.PARTS]), ("--peak-tflops 0", ["--peak-tflops", "above 0"]), ("--repeats 2", ["at least 3"])],
)
def test_bad_options_are_one_sentence(refuses, monkeypatch, line, words):
    monkeypatch.setattr(sys, "argv", ["bench.training", *line.split()])
    assert refuses(training.parse_options, *words)
