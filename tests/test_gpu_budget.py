"""results/gpu.py on the CPU: what it does with its time, and what it leaves."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from eval import load_encoders
from models import Encoder, build_backbone
from results.pieces import join
from runtime.cli import InputError

spec = importlib.util.spec_from_file_location("gpu", ROOT / "results/gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def rounds_done(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.draws
def test_a_run_is_cut_off_in_time_and_the_next_call_ends_it(tiny, tmp_path, monkeypatch, forks):
    """The clock jumps to the deadline when two rounds are done."""
    forks(gpu)
    monkeypatch.chdir(tmp_path)
    run, out = gpu.WORK / "single", Path("out")
    clock = SimpleNamespace(monotonic=lambda: 1e9 * (rounds_done(run) >= 2), sleep=lambda seconds: time.sleep(0.02))
    monkeypatch.setattr(gpu, "time", clock)
    options = [*tiny, "--encoder", "tiny", "--rounds", "15", "--knn-every", "0", "--precision", "fp32"]
    gpu.main(["single"], 5, out, options)
    done = rounds_done(run)
    assert 2 <= done < 15 and not (run / "encoder.pt").exists()
    assert f"| single | {done} of 15 |" in (out / "table.md").read_text()
    log = (out / "single.log").read_text()
    assert "continue with `python fedu.py --resume runs/gpu/single`" in log and "# ended since its time was up" in log

    monkeypatch.setattr(gpu, "time", time)
    gpu.main(["single"], 5, out, options)
    log = (out / "single.log").read_text()
    begun_at = int(re.search(r"continuing after (\d+) of 15 rounds", log)[1])
    assert begun_at in (done - 1, done) and log.count("# ended with status 0") == 2  # cut off before or after the round's checkpoint
    linear = json.loads((out / "single/eval.jsonl").read_text())
    cells = (out / "table.md").read_text().splitlines()[-1].split(" | ")
    assert cells[1] == "15 of 15" and cells[3:] == ["-", f"{100 * linear['accuracy']:.2f} |"] and len(linear["accuracies"]) == 2
    assert {"config.json", "metrics.jsonl", "divergence.png", "backbone-0.pt.000", "backbone-1.pt.sha256"} <= set(
        os.listdir(out / "single")
    )
    gpu.main(["single"], 5, out, options)
    assert (out / "single.log").read_text() == log


def test_an_interrupt_ends_the_run_too(tiny, tmp_path):
    line = [sys.executable, str(ROOT / "results/gpu.py"), "--minutes", "9", "--out", "out", "fedu", "--", *tiny, "--rounds", "5000"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not rounds_done(tmp_path / "runs/gpu/fedu"):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "gpu.py: interrupted" in error, error
    assert "| fedu | " in output and "continue with" in (tmp_path / "out/fedu.log").read_text()


def test_checks_have_a_time_of_their_own_and_are_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    children = "import subprocess; subprocess.run(['sleep', '600'])"
    monkeypatch.setattr(gpu, "CHECKS", {"tests": (["-c", children], 2), "epoch": (["-c", "print(7); exit(3)"], 60)})
    with pytest.raises(InputError, match="did not end well.*: epoch$"):
        gpu.main(["tests", "epoch"], 5, Path("out"), [])
    assert "# ended since its time was up, after 2 seconds" in Path("out/tests.log").read_text()
    assert Path("out/epoch.log").read_text().endswith("7\n# ended with status 3, after 0 seconds\n")
    assert capsys.readouterr().out.count("$ python") == 2
    gpu.main(["tests", "epoch"], 5, Path("out"), [])
    assert "$ python" not in capsys.readouterr().out


def test_backbones_come_in_small_pieces_and_load_again(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", (8,))
    state = {part: module.state_dict() for part, module in encoder.named_children()}
    torch.save({"encoder": "resnet18", "head": [8], "encoders": [state]}, tmp_path / "encoder.pt")
    gpu.save_backbones(tmp_path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["backbone-0.pt.000", "backbone-0.pt.001", "backbone-0.pt.sha256"]
    assert all(path.stat().st_size < 16 << 20 for path in (tmp_path / "out").iterdir())

    join(tmp_path / "out/backbone-0.pt.sha256", tmp_path / "backbone.pt")
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)
    backbone = build_backbone(saved["encoder"])
    backbone.load_state_dict(saved["backbone"])
    (before,) = load_encoders(tmp_path)
    for mine, theirs in zip(backbone.parameters(), before.backbone.parameters(), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=5e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options, words",
    [("--out out", "--minutes"), ("--minutes 0.5 --out out", "at least 1"), ("fedprox --minutes 5 --out out", "'fedprox'.*fedema")],
)
def test_bad_options_are_one_sentence(options, words, capsys):
    with pytest.raises(SystemExit) as failure:
        gpu.parse_options(options.split())
    error = capsys.readouterr().err
    assert failure.value.code == 2 and error.count("\n") == 1 and re.search(words, error)


def test_what_follows_two_dashes_is_passed_on():
    options = gpu.parse_options(["fedu", "--minutes", "5", "--out", "x", "--", "--encoder", "tiny", "--", "--rounds", "2"])
    assert options == {"parts": ["fedu"], "minutes": 5.0, "out": Path("x"), "options": ["--encoder", "tiny", "--", "--rounds", "2"]}
    assert gpu.parse_options(["--minutes", "5", "--out", "x"])["parts"] == ["tests", "epoch", "single", "fedu", "fedema"]
