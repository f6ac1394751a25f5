import importlib.util
import json
import os
import shutil
import sys

import pytest
from conftest import ROOT

import sweep
from options import Options, parse
from runtime.cli import InputError

spec = importlib.util.spec_from_file_location("experiments", ROOT / "results/experiments.py")
experiments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)


def test_every_command_is_one_that_fedu_takes(refuses, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "--list"])
    experiments.main(**experiments.parse_options())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == sum(seeds for _, seeds in experiments.EXPERIMENTS.values())
    for line in lines:
        Options(**parse(line[2:]).given)
    assert [line[line.index("--seed") + 1] for line in lines] == sorted(line[line.index("--seed") + 1] for line in lines)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fedprox"])
    assert refuses(experiments.parse_options, "'fedprox'", "fedbyol")


def test_a_run_is_made_once_and_then_continued(tiny, tmp_path, monkeypatch, forks):
    forks(sweep)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "EVALUATIONS", {"knn": "--knn", "linear, epochs 1": "--linear --epochs 1"})
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"a": (" ".join(tiny), 2), "bad": (" ".join([*tiny, "--lr", "1e30"]), 1)})
    experiments.main(["a"], [1], os.cpu_count(), False)  # so each run has one thread
    results = tmp_path / "results/cifar10/a-s1"
    assert {p.name for p in results.iterdir()} == {*experiments.KEPT, "log.txt"}
    assert [json.loads(line)["evaluation"] for line in (results / "eval.jsonl").read_text().splitlines()] == ["knn", "linear"]
    log = (results / "log.txt").read_text()
    experiments.main(["a"], [1], os.cpu_count(), False)  # so each run has one thread
    assert (results / "log.txt").read_text() == log

    run = tmp_path / "runs/cifar10/a-s1"  # as if interrupted before its end
    (run / "encoder.pt").unlink()
    shutil.copyfile(run / "eval.jsonl", tmp_path / "kept")
    (run / "eval.jsonl").write_text((run / "eval.jsonl").read_text().splitlines(keepends=True)[0])
    experiments.main(["a"], [1], os.cpu_count(), False)  # so each run has one thread
    assert "continuing after 3 of 3 rounds" in (results / "log.txt").read_text()
    assert (results / "eval.jsonl").read_text() == (tmp_path / "kept").read_text()
    with pytest.raises(InputError, match="bad-s0"):
        experiments.main(["bad"], None, 1, False)
