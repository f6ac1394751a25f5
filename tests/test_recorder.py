import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import load, objective, run

import fedu
from options import Options
from report.progress import Progress, announce_time
from runtime import recorder
from runtime.run import RUN_FILES


def test_run_folder(finished):
    folder = finished / "runs/run"
    assert {p.name for p in folder.iterdir()} == set(RUN_FILES) - {"spectrum.png", "eval.jsonl", "method.py", "views.py"}
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["clients"] == 2 and config["options"]["ema_decay"] == 0.99 and config["seconds"] > 0
    assert {"command", "versions", "device", "source", "commit"} <= config.keys()
    metrics = load(folder)["metrics"]
    assert [row["round"] for row in metrics] == [0, 1, 2]
    keys = {"round", "lr", "loss", "divergence", "decided_on", "predictor", "own_share", "num_examples", "clients"}
    keys |= {"dropped", "nonfinite", "outliers", "upload_bytes", "download_bytes", "knn", "seconds"}
    assert all(row.keys() == keys for row in metrics)
    assert metrics[0]["decided_on"] == [None, None] and metrics[1]["decided_on"] == metrics[0]["divergence"]
    net = objective()
    assert metrics[0]["upload_bytes"] == metrics[0]["download_bytes"] == 2 * net.online.vector.nbytes
    assert metrics[0]["num_examples"] == [32, 32] and 0 < metrics[0]["knn"] <= 1
    assert (folder / "divergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebook_trains_and_gets_the_run(npz, finished, tmp_path):
    options = Options(
        dataset=str(npz), encoder="small", clients=2, rounds=3, local_epochs=1, batch_size=8, lr=0.05, knn_every=1, device="cpu"
    )
    done = fedu.train(options, tmp_path / "run")
    assert done.folder == tmp_path / "run" and [row["round"] for row in done.metrics] == [0, 1, 2]
    assert torch.equal(load(done.folder)["encoders"][0], load(finished / "runs/run")["encoders"][0])
    assert done.encoder(torch.rand(2, 3, 16, 16)).shape == (2, 256)


def test_the_time_of_a_run_is_estimated_once_from_its_first_steps(monkeypatch, capsys):
    """After the first step, which warms up, each takes 600 s; a round has 100 steps and the run 100 rounds."""
    clock = iter([0, 0, 600, 1200, 1800, 2400])
    monkeypatch.setattr("report.progress.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with Progress("round 0", 100, partial(announce_time, 100)) as progress:
        for _ in range(5):
            progress.update()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a round will take about 17 h here, and the run 69 days; --encoder small ")


def test_one_seed_one_answer(tiny, finished, tmp_path):
    again, other = run(tmp_path / "a", *tiny), run(tmp_path / "b", *tiny, "--seed", "1")
    first = load(finished / "runs/run")["encoders"][0]
    assert torch.equal(first, again["encoders"][0]) and not torch.equal(first, other["encoders"][0])


SHORT = ["--encoder", "tiny", "--clients", "3", "--rounds", "2"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--method", "single"],
        ["--method", "fedema"],
        ["--method", "fedmoco-v2"],
        ["--method", "fedca"],
        ["--method", "fedx"],
        ["--method", "orchestra", "--clients", "4", "--clients-per-round", "2"],
        ["--method", "fedbarlow"],
        [*SHORT, "--method", "fedalignuniform", "--dropout", "0.3"],
        ["--clients", "4", "--clients-per-round", "2", "--mu", "0.05"],
        [*SHORT, "--method", "ldawa", "--momentum", "0.5", "--weight-decay", "0.01"],
        [*SHORT, "--method", "fedu2", "--partition", "dirichlet-balanced", "--set", "crop_scale=0.5"],
        [*SHORT, "--server-rule", "median"],
        [*SHORT, "--server-rule", "trimmed"],
    ],
)
def test_resume_is_bit_identical(tiny, tmp_path, monkeypatch, more):
    monkeypatch.setattr("methods.orchestra.ITERATIONS", 20)
    straight = run(tmp_path / "straight", *tiny, *more)
    save = recorder.save_checkpoint

    def stop_after_round_1(out, checkpoint, bank):
        save(out, checkpoint, bank)
        if checkpoint.values["round"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recorder, "save_checkpoint", stop_after_round_1)
        run(tmp_path / "stopped", *tiny, *more)
    assert not (tmp_path / "stopped/encoder.pt").exists()
    fedu.resume(tmp_path / "stopped")
    resumed = load(tmp_path / "stopped")
    assert all(map(torch.equal, straight["encoders"], resumed["encoders"]))
    for a, b in zip(straight["metrics"], resumed["metrics"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_run_begun_before_an_option_existed_has_its_default(finished, stopped):
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "metrics.jsonl").unlink()  # and stopped right after it had begun
    (stopped / "checkpoint.pt").unlink()
    (stopped / "checkpoint-previous.pt").unlink()
    for name in ("update", "dropout"):
        del config["options"][name]
    (stopped / "config.json").write_text(json.dumps(config))
    fedu.resume(stopped)
    assert torch.equal(load(stopped)["encoders"][0], load(finished / "runs/run")["encoders"][0])
