"""What a notebook gets of a run, and what other programs get of its encoder."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import fedu
from data import load_images
from models import build_backbone, extract_features, load_encoders
from report.export import export_encoders, model_card
from runtime.cli import InputError


@pytest.fixture(scope="module")
def trained(finished) -> fedu.Run:
    return fedu.load(finished / "runs/run")


def test_the_encoder_is_read_once_in_eval_mode_and_needs_no_gradient(trained, npz):
    assert trained.encoder is trained.encoder and trained.encoders == [trained.encoder]
    assert not trained.encoder.training and not any(p.requires_grad for p in trained.encoder.parameters())
    images = load_images(str(npz)).x_test.float() / 255
    together = trained.encoder(images)
    assert together.shape == (16, 256)  # the backbone's features, not projections
    one_by_one = torch.cat([trained.encoder(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)


def test_features_are_those_that_are_evaluated_whatever_the_batch(trained, npz, finished):
    images = load_images(str(npz))
    (encoder,) = load_encoders(finished / "runs/run")
    expected = extract_features(encoder.backbone, images.x_test)
    for batch_size in (1, 5, 500):
        torch.testing.assert_close(trained.features(images.x_test, batch_size), expected, rtol=1e-4, atol=1e-5)
    last = images.x_test.permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(trained.features(last), expected, rtol=1e-4, atol=1e-5)
    grey = trained.features(last[..., 0])
    torch.testing.assert_close(grey, trained.features(np.repeat(last[..., :1], 3, axis=3)))


def test_features_of_files(trained, npz, tmp_path):
    images = load_images(str(npz))
    torch.testing.assert_close(trained.features(str(npz)), trained.features(images.x_train), rtol=1e-4, atol=1e-5)
    for k, image in enumerate(images.x_test[:3].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    torch.testing.assert_close(trained.features(tmp_path), trained.features(images.x_test[:3]), rtol=1e-4, atol=1e-5)


def test_features_of_every_client_of_single(tiny, tmp_path, npz):
    run(tmp_path / "run", *tiny, "--method", "single", "--rounds", "1")
    single, images = fedu.load(str(tmp_path / "run")), load_images(str(npz)).x_test
    features = single.features(images)
    assert features.shape == (2, 16, 256) and not torch.equal(features[0], features[1])
    torch.testing.assert_close(features[1], extract_features(single.encoders[1], images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 16, 16), np.zeros((2, 16, 12, 3), np.uint8)[:0, 0], np.zeros((2, 5, 16, 16), np.uint8), "absent"]
)
def test_wrong_images_are_one_sentence(trained, images):
    with pytest.raises(InputError) as error:
        trained.features(images)
    assert "\n" not in str(error.value) and ("needs" in str(error.value) or "absent" in str(error.value))


def test_plot_is_shown_by_a_notebook(trained, finished):
    assert trained.plot()._repr_png_() == (finished / "runs/run/divergence.png").read_bytes()


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        fedu.load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(InputError, match="x.safetensors is not a readable"):
        fedu.load(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------------------------- exported


def test_an_exported_encoder_says_what_it_is_and_loads_again(trained, finished, tmp_path, npz):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert "holds the backbone" in export_encoders(finished / "runs/run", tmp_path / "b.safetensors")
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        about = file.metadata()
    assert about["encoder"] == "small" and about["features"] == "256" and about["image_size"] == "16" and about["version"] == "1.0.0"
    assert about["input"] == "float32 [N, 3, S, S], RGB in 0..1, no mean and deviation subtracted" and about["method"] == "fedu"
    again, images = fedu.load(tmp_path / "b.safetensors"), load_images(str(npz)).x_test
    assert torch.equal(again.features(images), trained.features(images)) and again.metrics == []


@pytest.mark.parametrize("encoder, norm", [("tiny", "batch"), ("small", "batch"), ("resnet18-narrow", "batch"), ("small", "group")])
def test_every_small_encoder_loads_by_its_file(encoder, norm, tmp_path, tiny):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    run(tmp_path / "run", *tiny, "--method", "untrained", "--encoder", encoder, "--norm", norm)
    export_encoders(tmp_path / "run", tmp_path / "b.safetensors")
    state = fedu.load(tmp_path / "b.safetensors").encoder.state_dict()
    build_backbone(encoder, norm).load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fedu.load(tmp_path / "run").encoder.state_dict().items())


def test_a_folder_in_hugging_faces_layout(finished, trained, tmp_path, npz, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    copy = tmp_path / "runs/run"
    shutil.copytree(finished / "runs/run", copy)
    line = {"evaluation": "linear", "features": "backbone", "epochs": 200, "dataset": str(npz), "seed": 0, "accuracy": 0.625}
    (copy / "eval.jsonl").write_text(json.dumps(line) + "\n")
    export_encoders(copy, tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["encoder"] == "small" and config["image_size"] == 16 and config["features"] == 256
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith("---\n") and "| linear | 62.50 |" in card and "2 clients" in card and "## Limits" in card
    images = load_images(str(npz)).x_test
    assert torch.equal(fedu.load(tmp_path / "hub/model.safetensors").features(images), trained.features(images))
    with pytest.raises(InputError, match="hub is a folder that is not empty"):
        export_encoders(copy, tmp_path / "hub")
    assert not list(tmp_path.glob(".hub*"))


@pytest.mark.parametrize(
    "given, more, said",
    [
        ({}, {}, "no differential privacy was used"),
        ({"dp_clip": 10.0}, {}, "each upload was clipped to 10 and not noised, which is no differential privacy"),
        ({"dp_clip": 10.0, "dp_noise": 0.5}, {}, "each upload was clipped to 10, with a noise of 0.5 times that (differential privacy)"),
        ({}, {"run": "as between parties"}, "each party decided itself about differential privacy"),
    ],
)
def test_a_model_card_says_how_private_the_uploads_were(finished, tmp_path, given, more, said):
    config = json.loads((finished / "runs/run/config.json").read_text()) | more
    config["options"] |= given | {"statistics": "local"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = model_card(tmp_path, load_encoders(finished / "runs/run")[0])
    assert f"\nParameters were averaged over clients; {said}.\n" in card


def test_onnx_gives_the_same_features(finished, trained, tmp_path, npz):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    export_encoders(finished / "runs/run", tmp_path / "b.onnx")
    session, images = runtime.InferenceSession(tmp_path / "b.onnx"), load_images(str(npz)).x_test
    for count in (1, 7):
        (features,) = session.run(["features"], {"images": (images[:count].float() / 255).numpy()})
        torch.testing.assert_close(torch.from_numpy(features), trained.features(images[:count]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package, name", [("safetensors.torch", "b.safetensors"), ("onnxscript", "b.onnx"), ("safetensors.torch", "hub")])
def test_a_missing_package_is_one_sentence(finished, tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"export .*{name} needs the package.*pip install -r requirements-optional.txt"):
        export_encoders(finished / "runs/run", tmp_path / name)
    assert not list(tmp_path.iterdir())
