"""A run's backbone for other programs: safetensors, a folder in Hugging Face's layout with a model card, ONNX."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from models import VERSION, Encoder, feature_dim, load_encoders
from report.tables import describe_scale, read_evaluations, read_options
from runtime.cli import InputError, os_errors, write_atomic


def export_encoders(run: Path, path: Path) -> str:
    """Write the run's backbone as `path`, whose ending says how; returns a line about it.

    With several encoders, as of `single`, NAME-k has that of client k. Raises InputError if a package is missing or the path cannot be
    written.
    """
    encoders = load_encoders(run)
    paths = [path] if len(encoders) == 1 else [path.with_stem(f"{path.stem}-{k}") for k in range(len(encoders))]
    for encoder, target in zip(encoders, paths):
        if path.suffix == ".onnx":
            write_onnx(encoder, target)
        elif path.suffix == ".safetensors":
            content = as_safetensors(run, encoder, path)
            write_atomic(target, lambda file, content=content: file.write(content))
        else:
            write_folder(run, encoder, target)
    return f"{', '.join(map(str, paths))} {'holds the backbone' if len(paths) == 1 else 'hold the backbones'} of {run}"


def describe(run: Path, encoder: Encoder) -> dict[str, Any]:
    """What a reader of the weights needs to know: how to build the backbone, and what goes in."""
    options = read_options(run)
    return {
        "library": "fedu",
        "version": VERSION,
        "encoder": encoder.name,
        "norm": encoder.norm,
        "features": feature_dim(encoder.backbone),
        "image_size": encoder.image_size,
        "input": "float32 [N, 3, S, S], RGB in 0..1, no mean and deviation subtracted",
        "method": options["method"],
        "dataset": Path(options["dataset"]).name,
    }


def as_safetensors(run: Path, encoder: Encoder, path: Path) -> bytes:
    """The backbone's state_dict in the format of safetensors, with `describe` in its metadata."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise InputError(f"--export {path} needs the package safetensors: `pip install -r requirements-optional.txt`") from None
    tensors = {name: tensor.contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    return save(tensors, {"format": "pt"} | {name: str(value) for name, value in describe(run, encoder).items()})


def write_onnx(encoder: Encoder, path: Path) -> None:
    """The backbone as an ONNX graph: `images` `[N, 3, S, S]` -> `features` `[N, d]`, for any N."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError(f"--export {path} needs the packages onnx and onnxscript: `pip install -r requirements-optional.txt`") from None
    size = encoder.image_size
    any_number = {0: torch.export.Dim("N")}
    program = torch.onnx.export(
        encoder.backbone, (torch.zeros(2, 3, size, size),), input_names=["images"], output_names=["features"],
        dynamic_shapes=(any_number,), dynamo=True, verbose=False,
    )  # fmt: skip
    content = io.BytesIO()
    onnx.save_model(program.model_proto, content)
    write_atomic(path, lambda file: file.write(content.getvalue()))


def write_folder(run: Path, encoder: Encoder, path: Path) -> None:
    """config.json, model.safetensors and README.md, Hugging Face's layout; the folder appears whole or not at all."""
    weights = as_safetensors(run, encoder, path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"--export {path} is a folder that is not empty: choose another name")
    with os_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            (made / "model.safetensors").write_bytes(weights)
            (made / "config.json").write_text(json.dumps({"model_type": "fedu"} | describe(run, encoder), indent=1) + "\n")
            (made / "README.md").write_text(model_card(run, encoder))
            made.chmod(0o755)
            made.replace(path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def model_card(run: Path, encoder: Encoder) -> str:
    """A model card in Markdown: data, method, accuracies and limits, all from the run."""
    options, about, evaluations = read_options(run), describe(run, encoder), read_evaluations(run)
    rows = "\n".join(f"| {name} | {100 * accuracy:.2f} |" for name, accuracy in evaluations.items())
    measured = f"| evaluation | % of the test images |\n|---|---|\n{rows}" if rows else "It was not evaluated (`python eval.py RUN`)."
    averaged = options["statistics"] != "local" and any("running_mean" in name for name in encoder.backbone.state_dict())
    statistics = " and BatchNorm's statistics" * averaged
    return f"""---
library_name: fedu
tags: [federated-learning, self-supervised-learning, feature-extraction]
---

# {options["method"]} on {about["dataset"]}: a {about["encoder"]} backbone

An image encoder trained without labels by {options["clients"]} clients that never exchanged their images, with the method
`{options["method"]}`: {describe_scale([options])}.

## Input and output

{about["input"].capitalize()}, S = {about["image_size"]} in training. The output is {about["features"]} features an image.

```python
import fedu

run = fedu.load("model.safetensors")
features = run.features("a folder of images")  # [N, {about["features"]}]
```

## Accuracies

{measured}

## Limits

It saw only the images of `{about["dataset"]}`, at {about["image_size"]} pixels, and is measured on that data set's own test images.
Parameters{statistics} were averaged over clients; {privacy_of(options)}.
Seed {options["seed"]}, one run.
"""


def privacy_of(options: dict) -> str:
    """How private the uploads of a run were, by its options."""
    if options["partition"] == "own":  # between parties, whose privacy the run does not know
        return "each party decided itself about differential privacy"
    if options["dp_clip"] is None:
        return "no differential privacy was used"
    if options["dp_noise"] is None:
        return f"each upload was clipped to {options['dp_clip']:g} and not noised, which is no differential privacy"
    return f"each upload was clipped to {options['dp_clip']:g}, with a noise of {options['dp_noise']:g} times that (differential privacy)"
