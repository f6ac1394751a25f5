import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from torch import nn

import eval as evaluation
from data import Images, balanced_subset, load_npz
from models import build_backbone


@pytest.fixture
def images(npz) -> Images:
    return load_npz(npz)


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("small")


class Means(nn.Module):
    """Features that can be worked out by hand: the mean red, green and blue."""

    def forward(self, images):
        return images.mean((2, 3))


def one_colour(*colours: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)


# --------------------------------------------------------------------------------------------------- evaluations


def test_knn_by_hand():
    """One red neighbour outvotes two blue ones by weight, exp(cos / 0.1); with k = 1 only the nearest votes."""
    red, blue, purple, violet = (200, 0, 0), (0, 0, 200), (200, 0, 100), (100, 0, 200)
    train, labels = one_colour(red, blue, blue), torch.tensor([0, 1, 1])
    images = Images(train, labels, one_colour(purple, violet), torch.tensor([0, 1]), 2)
    assert evaluation.knn(Means(), images) == 1.0
    assert evaluation.knn(Means(), images, k=1) == 1.0
    assert evaluation.knn(Means(), images, temperature=1e3) == 0.5  # without weights the two blue ones win both


def test_features_are_those_of_eval_mode(backbone, images):
    backbone(torch.rand(8, 3, 16, 16))  # so that the running statistics are not the initial ones
    before = copy.deepcopy(backbone.state_dict())
    features = evaluation.extract_features(backbone, images.x_train, batch_size=10)
    assert features.shape == (64, 256) and backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    torch.testing.assert_close(features, evaluation.extract_features(backbone, images.x_train))


def test_linear_learns_and_leaves_the_backbone_alone(backbone, images, monkeypatch):
    assert evaluation.linear(backbone, images, epochs=200) > 0.8  # the four classes have four colours
    shuffled = images._replace(y_train=images.y_train[torch.randperm(64, generator=torch.Generator().manual_seed(0))])
    assert evaluation.linear(backbone, shuffled, epochs=200) < 0.7

    def careless(module, x):  # in train mode: moves BatchNorm's running statistics
        return module(x.float() / 255).detach()

    monkeypatch.setattr(evaluation, "extract_features", careless)
    with pytest.raises(AssertionError, match="changed the frozen module"):
        evaluation.linear(backbone, images, epochs=1)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_semi_supervised_trains_backbone_and_head(backbone, images, monkeypatch, head):
    seen = {}
    train = evaluation.train_classifier

    def spy(model, x, y, *args, **kwargs):
        seen.update(before=copy.deepcopy(model.state_dict()), labels=y)
        train(model, x, y, *args, **kwargs)
        seen["after"] = model.state_dict()

    monkeypatch.setattr(evaluation, "train_classifier", spy)
    original = copy.deepcopy(backbone.state_dict())
    labelled = balanced_subset(images.y_train, 0.25, seed=0)
    assert evaluation.fine_tune(backbone, images, labelled, head, epochs=30) > 0.7
    assert seen["labels"].bincount().tolist() == [4] * 4
    weights = [k for k in seen["before"] if k.endswith("weight")]
    assert len(weights) > 8 and not any(torch.equal(seen["before"][k], seen["after"][k]) for k in weights)
    assert all(torch.equal(v, original[k]) for k, v in backbone.state_dict().items())


# -------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def runs(finished, tmp_path):
    """A working folder with two seeds of one setting and a run of `single`, made from the finished run's files."""
    for name, seed, method in (("s0", 0, "fedu"), ("s1", 1, "fedu"), ("single", 0, "single")):
        shutil.copytree(finished / "runs/run", tmp_path / "runs" / name)
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        config["options"] |= {"seed": seed, "method": method, "predictor": "dapu" if method == "fedu" else "global"}
        if seed:
            del config["options"]["dropout"]  # as a run has it from before the option existed
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    saved = torch.load(tmp_path / "runs/single/encoder.pt", weights_only=True)
    saved["encoders"] *= 2
    torch.save(saved, tmp_path / "runs/single/encoder.pt")
    for age, name in enumerate(("s1", "single", "s0")):
        os.utime(tmp_path / "runs" / name / "encoder.pt", (1e9 - age, 1e9 - age))
    return tmp_path


def test_commands_on_the_newest_run(runs, npz, command):
    for arguments, words in (
        ([], "linear on"),
        (["--knn"], "knn on"),
        (["--knn", "--features", "projector"], "projector features"),
        (["--features", "pixels", "--epochs", "5"], "linear on {npz}, pixels features, 5 epochs, 64 labels"),
        (["--semi", "0.25", "--epochs", "2"], "semi 0.25 on"),
        (["--semi", "0.25", "--epochs", "2", "--head", "mlp"], "mlp head, 2 epochs, 16 labels"),
        (["--transfer", "fashion", "--knn"], "knn on fashion, backbone features, 6000 labels"),
    ):
        done = command("eval.py", *arguments, cwd=runs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("runs/s1: ") and words.format(npz=npz) in done.stdout
    rows = [json.loads(line) for line in (runs / "runs/s1/eval.jsonl").read_text().splitlines()]
    assert [row["evaluation"] for row in rows] == ["linear", "knn", "knn", "linear", "semi 0.25", "semi 0.25", "knn"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[0]["epochs"] == 200 and rows[0]["labels"] == 64 and rows[4]["labels"] == 16


def test_single_reports_the_mean_over_its_clients(runs, command):
    done = command("eval.py", "runs/single", "--knn", cwd=runs)
    row = json.loads((runs / "runs/single/eval.jsonl").read_text())
    assert len(row["accuracies"]) == 2 and row["accuracy"] == sum(row["accuracies"]) / 2
    assert "(mean of" in done.stdout


def test_table_has_a_row_a_setting_with_mean_and_deviation(runs, command):
    for run, accuracies in (("s0", (0.1, 0.5)), ("s1", (0.6,)), ("single", (0.4,))):
        lines = [json.dumps({"evaluation": "linear", "features": "backbone", "dataset": "x", "accuracy": a}) for a in accuracies]
        lines += [json.dumps({"evaluation": "linear", "features": "pixels", "dataset": "x", "accuracy": 0.3})] * (run == "s0")
        lines += [json.dumps({"evaluation": "linear", "epochs": 1, "dataset": "x", "accuracy": 0.2})] * (run == "single")
        (runs / "runs" / run / "eval.jsonl").write_text("\n".join(lines) + "\n")
        config = json.loads((runs / "runs" / run / "config.json").read_text())
        config["options"]["dataset"] = "x"
        (runs / "runs" / run / "config.json").write_text(json.dumps(config))
    done = command("eval.py", "--table", cwd=runs)
    assert done.returncode == 0, done.stderr
    caption, _, *lines = done.stdout.splitlines()
    assert caption.startswith("On x, small, 3 rounds of 1 local epoch, B = 8, lr 0.05, 2 clients, 1/K of the classes each")
    row = json.loads((runs / "runs/s0/metrics.jsonl").read_text().splitlines()[0])
    sent = f"{row['upload_bytes'] / 1e6:.1f} + {row['download_bytes'] / 1e6:.1f}"
    assert lines == [
        "| method | seeds | up and down, MB a round | linear | linear, epochs 1 |",
        "| --- | --- | --- | --- | --- |",
        f"| fedu | 2 | {sent} | 55.00 ± 7.07 | - |",  # the latest linear result counts
        f"| single | 1 | {sent} | 40.00 | 20.00 |",
        "| raw pixels | - | - | 30.00 | - |",
    ]


def test_output_that_nobody_reads_ends_silently(finished):
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "eval.py"), "--table", "runs/run"]
    done = subprocess.run(line, cwd=finished, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_table_shows_the_options_that_differ(runs, command):
    """And the published accuracies beside runs of the papers' setting."""
    for run, changes in (("s0", {"partition": "iid"}), ("s1", {"partition": "classes"})):
        config = json.loads((runs / "runs" / run / "config.json").read_text())
        config["options"] |= {"dataset": "cifar10", "clients": 5, "predictor": "dapu", "method": "fedu", **changes}
        (runs / "runs" / run / "config.json").write_text(json.dumps(config))
    done = command("eval.py", "--table", "runs/s0", "runs/s1", cwd=runs)
    header, _, iid, classes = done.stdout.splitlines()[2:]
    assert header.startswith("| method | partition | seeds |") and "linear, published" in header
    assert iid.startswith("| fedu | iid | 1 |") and iid.endswith("| 83.96 |")
    assert classes.startswith("| fedu | 1/K of the classes each | 1 |") and classes.endswith("| 80.52 |")
    for run, changes in (("s0", {"ema_decay": 1}), ("s1", {"classes_per_client": 4})):  # which the papers' runs do not have
        (runs / "runs" / run / "config.json").write_text(json.dumps(config | {"options": config["options"] | changes}))
        assert "published" not in command("eval.py", "--table", f"runs/{run}", cwd=runs).stdout
    for run, changes in (("s0", {"update": "both"}), ("s1", {"update": "target", "predictor": "local"})):
        config["options"] |= {"method": "fedbyol", "aggregate": "online", "predictor": "global", **changes}
        (runs / "runs" / run / "config.json").write_text(json.dumps(config))
    done = command("eval.py", "--table", "runs/s0", "runs/s1", cwd=runs)
    header, _, both, target = done.stdout.splitlines()[2:]
    assert header.startswith("| method | update | predictor | seeds |")
    assert both.startswith("| fedbyol | both | global | 1 |") and both.endswith("| 81.24 |") and target.endswith("| 19.22 |")


def test_plots(runs, command):
    rows = [json.loads(line) for line in (runs / "runs/single/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["own_share"]  # as a run has it from before it was told
    (runs / "runs/single/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments, out in ((["runs/s0"], "runs/s0/divergence.png"), (["runs/s0", "runs/single"], "comparison.png")):
        (runs / out).unlink(missing_ok=True)
        done = command("eval.py", "--plot", *arguments, cwd=runs)
        assert done.returncode == 0 and out in done.stdout
        assert (runs / out).read_bytes().startswith(b"\x89PNG")


def test_accuracies_against_rounds_options_and_the_ablation(runs, command):
    shutil.copytree(runs / "runs/single", runs / "runs/untrained")
    for run, mu, method in (("s0", 0.4, "fedu"), ("s1", float("inf"), "fedu"), ("single", 0.4, "single"), ("untrained", 0.4, "untrained")):
        (runs / "runs" / run / "eval.jsonl").write_text(json.dumps({"evaluation": "linear", "accuracy": 0.5}) + "\n")
        config = json.loads((runs / "runs" / run / "config.json").read_text())
        config["options"] |= {"mu": mu, "method": method}
        (runs / "runs" / run / "config.json").write_text(json.dumps(config))
    for option in ("round", "mu", "clients_per_round", "ablation"):
        done = command("eval.py", "--against", option, "runs/s0", "runs/s1", "runs/single", "runs/untrained", cwd=runs)
        assert done.returncode == 0, done.stderr
        assert (runs / f"{option}.png").read_bytes().startswith(b"\x89PNG")
    assert refused(command("eval.py", "--against", "beta", "runs/s0", cwd=runs), "--against got 'beta'")
    assert refused(command("eval.py", "--against", "ablation", "runs/untrained", cwd=runs), "runs/untrained has no rounds to draw")
    (runs / "runs/s0/eval.jsonl").unlink()
    assert refused(command("eval.py", "--against", "mu", "runs/s0", cwd=runs), "runs/s0", "--linear")


def test_representations_are_exported(runs, npz, command):
    assert refused(command("eval.py", "--export", "f.npz", "runs", cwd=runs), "--export got 3 runs, wants one")
    done = command("eval.py", "--export", "f.npz", "runs/s0", cwd=runs)
    assert done.returncode == 0 and "train [64, 256]" in done.stdout
    (encoder,) = evaluation.load_encoders(runs / "runs/s0")
    images = load_npz(npz)
    with np.load(runs / "f.npz") as arrays:
        np.testing.assert_allclose(arrays["test"], evaluation.extract_features(encoder.backbone, images.x_test), rtol=1e-5, atol=1e-6)
        assert (arrays["y_train"] == images.y_train.numpy()).all()
    done = command("eval.py", "--export", "p.npz", "runs/single", "--features", "projector", cwd=runs)
    assert "test [2, 16, 256]" in done.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (["--semi", "1.5"], ["--semi", "'1.5'", "at most 1"]),
        (["--semi", "0"], ["--semi", "above 0"]),
        (["runs/none"], ["runs/none", "no config.json"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--head", "mlp"], ["--head goes with --semi", "--linear"]),
        (["--knn", "--linear"], ["--linear", "--knn"]),
        (["--transfer", "mnist"], ["'mnist'"]),
        (["--plot", "--transfer", "fashion"], ["--transfer"]),
        (["--plot", "--out", "none/x.png"], ["cannot write none/x.png"]),
        (["--plot", "--out", "x.xyz"], ["--out got x.xyz", ".png"]),
        (["--seed", "18446744073709551616"], ["--seed", "at most"]),
    ],
)
def test_bad_options_are_one_sentence(finished, command, options, words):
    assert refused(command("eval.py", *options, cwd=finished), *words)


def test_runs_are_named_by_themselves_or_by_a_folder_of_them(runs, command):
    (runs / "figures").mkdir()
    (runs / "notes.txt").write_text("")
    whole = command("eval.py", "--table", "runs", cwd=runs)
    some = command("eval.py", "--table", "runs/s1", "figures", "notes.txt", "runs", cwd=runs)
    assert whole.returncode == some.returncode == 0 and whole.stdout.splitlines() == some.stdout.splitlines()
    assert some.stderr == "figures holds no run and was passed over\n"
    assert refused(command("eval.py", "--table", "runs", "absent", cwd=runs), "absent is not a run folder")
    assert refused(command("eval.py", "--table", "figures", cwd=runs), "figures is not a run folder")
    (runs / "runs").rename(runs / "figures/runs")
    (runs / "figures").rename(runs / "runs")  # a folder deeper, as those of results/experiments.py
    assert sorted(command("eval.py", "--table", cwd=runs).stdout.splitlines()) == sorted(whole.stdout.splitlines())


def test_no_run_and_damaged_runs_are_one_sentence(finished, command, tmp_path):
    assert refused(command("eval.py", cwd=tmp_path), "no finished run under runs/")
    run = tmp_path / "run"
    shutil.copytree(finished / "runs/run", run)
    whole = (run / "encoder.pt").read_bytes()
    (run / "encoder.pt").write_bytes(whole[: len(whole) // 2])
    assert refused(command("eval.py", "run", cwd=tmp_path), "run/encoder.pt is not a readable encoder")
    (run / "encoder.pt").unlink()
    assert refused(command("eval.py", "run", cwd=tmp_path), "not finished", "--resume run")
    (run / "eval.jsonl").write_text('{"evaluation": "lin')
    assert refused(command("eval.py", "--table", "run", cwd=tmp_path), "eval.jsonl is not readable")
    (run / "metrics.jsonl").write_text('{"round": 0, "lo')
    assert refused(command("eval.py", "--plot", "run", cwd=tmp_path), "metrics.jsonl is not readable")
    (run / "config.json").write_text("{}")
    assert refused(command("eval.py", "run", cwd=tmp_path), "config.json is not readable")
