import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from torch import nn

import eval as evaluation
from data import Images, balanced_subset, load_npz
from models import Encoder, build_backbone
from options import parse_evaluation
from runtime.cli import InputError


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


def test_output_that_nobody_reads_ends_silently(finished):
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "eval.py"), "--table", "runs/run"]
    done = subprocess.run(line, cwd=finished, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_representations_are_exported(runs, npz, command):
    assert refused(command("eval.py", "--export", "f.npz", "runs", cwd=runs), "--export got 3 runs, needs one")
    done = command("eval.py", "--export", "f.npz", "runs/s0", cwd=runs)
    assert done.returncode == 0 and "train [64, 256]" in done.stdout
    (encoder,) = evaluation.load_encoders(runs / "runs/s0")
    images = load_npz(npz)
    with np.load(runs / "f.npz") as arrays:
        np.testing.assert_allclose(arrays["test"], evaluation.extract_features(encoder.backbone, images.x_test), rtol=1e-5, atol=1e-6)
        assert (arrays["y_train"] == images.y_train.numpy()).all()
    done = command("eval.py", "--export", "p.npz", "runs/single", "--features", "projector", cwd=runs)
    assert "test [2, 16, 256]" in done.stdout


def save_encoders(run: Path, name: str, count: int, counters: bool) -> None:
    """encoder.pt of `count` encoders whose BatchNorm statistics are not the initial ones, with or without its batch counters."""
    encoders = []
    for _ in range(count):
        encoder = Encoder(name, (8,))
        encoder(torch.rand(4, 3, 16, 16))
        states = {part: module.state_dict() for part, module in encoder.named_children()}
        encoders.append({p: {k: v for k, v in s.items() if counters or "num_batches" not in k} for p, s in states.items()})
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"options": {"method": "fedu"}}))
    torch.save({"encoder": name, "head": [8], "encoders": encoders}, run / "encoder.pt")


@pytest.mark.parametrize("counters", [False, True])
def test_exported_weights_are_those_of_torchvisions_resnet(images, tmp_path, monkeypatch, capsys, counters):
    """They load with strict=True, whether or not the run's encoder.pt has BatchNorm's batch counters, as those of old runs have."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "resnet18", 1, counters)
    evaluation.main(parse_evaluation(["--export", "backbone.safetensors", "run"]))
    assert capsys.readouterr().out == "backbone.safetensors holds the backbone of run\n"
    backbone = torchvision.models.resnet18()
    backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.maxpool = backbone.fc = nn.Identity()
    backbone.load_state_dict(safetensors.load_file("backbone.safetensors"), strict=True)
    (encoder,) = evaluation.load_encoders(Path("run"))
    with torch.inference_mode():
        features = backbone.eval()(images.x_test / 255)
    torch.testing.assert_close(features, evaluation.extract_features(encoder.backbone, images.x_test), rtol=1e-4, atol=1e-6)
    assert features.std(0).mean() > 1e-3


def test_exported_weights_of_the_narrow_resnet_load_into_build_backbone(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "resnet18-narrow", 1, counters=False)
    evaluation.main(parse_evaluation(["--export", "b.safetensors", "run"]))
    build_backbone("resnet18-narrow").load_state_dict(safetensors.load_file("b.safetensors"), strict=True)


def test_exported_weights_of_single_are_a_file_a_client(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    save_encoders(Path("run"), "tiny", 2, counters=False)
    evaluation.main(parse_evaluation(["--export", "b.safetensors", "run"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-0.safetensors", "b-1.safetensors", "run"]
    for k, encoder in enumerate(evaluation.load_encoders(Path("run"))):
        saved = safetensors.load_file(f"b-{k}.safetensors")
        assert torch.equal(saved["0.weight"], encoder.backbone[0].weight)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--semi", "1.5"], ["--semi", "'1.5'", "at most 1"]),
        (["--semi", "0"], ["--semi", "above 0"]),
        (["runs/none"], ["runs/none", "no config.json"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--head", "mlp"], ["--head goes with --semi", "--linear"]),
        (["--knn", "--linear"], ["--linear", "--knn"]),
        (["--transfer", "mnist"], ["--transfer got 'mnist'"]),
        (["--plot", "--transfer", "fashion"], ["--transfer"]),
        (["--plot", "--out", "none/x.png"], ["cannot write none/x.png"]),
        (["--plot", "--out", "x.xyz"], ["--out got x.xyz", ".png"]),
        (["--seed", "18446744073709551616"], ["--seed", "at most"]),
        (["--knn", "--seed", "1"], ["--seed goes with --linear or --semi, not with --knn"]),
        (["--export", "f.txt"], ["--export got f.txt", ".npz, .safetensors or .onnx"]),
        (["--export", "f.safetensors", "--features", "projector"], ["--features goes with", "not with --export FOLDER"]),
    ],
)
def test_bad_options_are_one_sentence(finished, command, options, words):
    assert refused(command("eval.py", *options, cwd=finished), *words)


def test_no_run_and_damaged_runs_are_one_sentence(finished, command, tmp_path):
    assert refused(command("eval.py", cwd=tmp_path), "no finished run under runs/")
    run = tmp_path / "run"
    shutil.copytree(finished / "runs/run", run)
    whole = (run / "encoder.pt").read_bytes()
    (run / "encoder.pt").write_bytes(whole[: len(whole) // 2])
    assert refused(command("eval.py", "run", cwd=tmp_path), "run/encoder.pt is not a readable encoder")
    (run / "encoder.pt").unlink()
    assert refused(command("eval.py", "run", cwd=tmp_path), "no encoder.pt", "not finished", "--resume run", "weights were not kept")
    (run / "eval.jsonl").write_text('{"evaluation": "lin')
    assert refused(command("eval.py", "--table", "run", cwd=tmp_path), "eval.jsonl is not readable")
    (run / "metrics.jsonl").write_text('{"round": 0, "lo')
    assert refused(command("eval.py", "--plot", "run", cwd=tmp_path), "metrics.jsonl is not readable")
    (run / "config.json").write_text("{}")
    assert refused(command("eval.py", "run", cwd=tmp_path), "config.json is not readable")


def test_parallel_evaluations_are_all_recorded(tmp_path):
    """Ten processes at once: without the lock each would write what it had read, and its own line."""
    (tmp_path / "config.json").write_text("{}")
    script = "import sys, pathlib, eval; eval.record(pathlib.Path(sys.argv[1]), {'evaluation': sys.argv[2], 'dataset': 'x'}, [0.5])"
    line = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen([*line, str(k)], cwd=ROOT) for k in range(6)]
    assert [process.wait(timeout=300) for process in processes] == [0] * 6
    rows = [json.loads(row) for row in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert sorted(row["evaluation"] for row in rows) == [str(k) for k in range(6)]


def test_an_accuracy_that_cannot_be_recorded_is_shown(tmp_path, monkeypatch, capsys):
    def refuse(path, write):
        raise InputError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(evaluation, "write_atomic", refuse)
    line = evaluation.record(tmp_path, {"evaluation": "knn", "dataset": "x", "labels": 4}, [0.25, 0.75])
    assert line.endswith("knn on x, 4 labels: 50.00%  (mean of 25.00, 75.00)")
    assert capsys.readouterr().err == f"cannot write {tmp_path}/eval.jsonl: Read-only file system: the next line is recorded nowhere\n"
