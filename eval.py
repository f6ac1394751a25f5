"""Evaluate the encoders of finished runs by kNN, linear, semi-supervised and transfer evaluation; draw, tabulate and export them.

    python eval.py [RUN]                    linear evaluation of the newest run under runs/, or of RUN
    python eval.py --semi 0.1               fine-tune backbone and a new head on a tenth of the labels, class-balanced
    python eval.py --plot [RUN ...]         divergence, loss and kNN curves
    python eval.py --against mu RUN ...     accuracies against an option, kNN accuracy against `round`, bars of the `ablation`
    python eval.py --table [RUN ...]        a Markdown row for each setting, seeds as mean and deviation
    python eval.py --report [RUN ...]       a web page of them, report.html
    python eval.py --export FILE.npz        the representations of all images
    python eval.py --export FILE.safetensors    the backbone's weights; those of resnet18 and resnet50 load into torchvision's

A run of `single`, or with `--statistics local`, has one encoder for each client: all are evaluated, and the mean is reported.
docs/options.md has all options.
"""

from __future__ import annotations

from options import EVALUATION_EPOCHS, Data, parse_evaluation
from runtime.cli import InputError, command_line, locked, user_errors, write_atomic

if __name__ == "__main__":  # before torch is loaded, so that --help and mistakes are answered at once
    OPTIONS = parse_evaluation(description=__doc__.split("\n\n")[0])

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from tqdm import trange

from data import Images, balanced_subset, keyed_generator, load_dataset, refuse_other_data, require
from models import build_head, extract_features, feature_dim, load_encoders
from report.export import export_encoders
from report.figures import plot, plot_against
from report.page import write_page
from report.tables import read_options, table, table_kind
from runtime.device import choose_device
from runtime.run import read_config


@command_line()
def main(options: argparse.Namespace) -> None:
    """Do a task with the named runs. options: of `options.parse_evaluation`."""
    all_by_default = options.task in ("table", "against")
    runs = runs_among(options.runs) if options.runs else find_runs()[: None if all_by_default else 1]
    if options.task == "table":
        if not options.out:
            return print(table(runs))
        content = table(runs, table_kind(options.out)).encode() + b"\n"
        write_atomic(options.out, lambda file: file.write(content))
        return print(f"{options.out} holds the table of {', '.join(map(str, runs))}")
    if options.task == "plot":
        out = options.out or (runs[0] / "divergence.png" if len(runs) == 1 else Path("comparison.png"))
        plot(runs, out, options.size, not options.no_title)
        return print(f"{out} shows {', '.join(map(str, runs))}")
    if options.task == "against":
        out = options.out or Path(f"{options.against}.png")
        plot_against(options.against, runs, out, options.size, not options.no_title)
        return print(f"{out} shows {', '.join(map(str, runs))}")
    if options.task == "report":
        out = options.out or Path("report.html")
        write_page(runs, out)
        return print(f"{out} shows {', '.join(map(str, runs))}")
    if options.task in ("export", "weights") and len(runs) > 1:
        raise InputError(f"--export got {len(runs)} runs, needs one for its file")
    if options.task == "weights":
        return print(export_encoders(runs[0], options.export))

    device = choose_device(options.device)
    for run in runs:
        trained_on = read_options(run)
        dataset, root = options.transfer or options.dataset or trained_on["dataset"], options.data_root or trained_on["data_root"]
        same = ("image_size", "skip_broken", "no_cache") if options.transfer else (f.name for f in fields(Data))
        source = {name: trained_on[name] for name in same} | {"dataset": dataset, "data_root": root}
        if source.get("partition") != "folders":  # which says where the classes are
            source["partition"] = "iid"
        encoders = [encoder.to(device) for encoder in load_encoders(run)]
        images = load_dataset(Data(**source), "--transfer" if options.transfer else "--dataset")
        if not options.transfer:
            refuse_other_data(run, read_config(run).get("data", {}), {"images": images.digest}, dataset, moved=bool(options.dataset))
        images = images.to(device)
        modules = [{"backbone": e.backbone, "projector": e, "pixels": nn.Flatten()}[options.features] for e in encoders]
        if options.task != "export":
            require(images, f"--{options.task}")
        if options.task == "export":
            return print(export_features(modules, images, options.export))
        result = {"dataset": options.transfer or trained_on["dataset"], "seed": options.seed}
        if options.task == "knn":
            result |= {"evaluation": "knn", "features": options.features, "labels": len(images.y_train)}
            accuracies = [knn(module, images) for module in modules]
        elif options.task == "linear":
            result |= {"evaluation": "linear", "features": options.features, "epochs": options.epochs, "labels": len(images.y_train)}
            accuracies = [linear(module, images, options.epochs, options.seed) for module in modules]
        else:
            labelled = balanced_subset(images.y_train, options.semi, options.seed).to(device)
            result |= {"evaluation": f"semi {options.semi:g}", "head": options.head, "epochs": options.epochs, "labels": len(labelled)}
            accuracies = [fine_tune(e.backbone, images, labelled, options.head, options.epochs, options.seed) for e in encoders]
        print(record(run, result, accuracies))


def find_runs(root: Path = Path("runs")) -> list[Path]:
    """The finished runs under `root`, newest first."""
    runs = sorted((p.parent for p in root.rglob("encoder.pt")), key=lambda run: (run / "encoder.pt").stat().st_mtime, reverse=True)
    if not runs:
        raise InputError(f"there is no finished run under {root}/: train one with `python fedu.py`, or name its folder")
    return runs


def runs_among(paths: list[Path]) -> list[Path]:
    """The run folders among the paths and inside them, each once.

    Files are ignored, as a shell's `*` may name them; a folder without a run is reported on stderr. Raises InputError if a path does not
    exist, or if there is no run at all.
    """
    found = {path: sorted(config.parent for config in path.rglob("config.json")) for path in paths}
    for path in paths:
        if not found[path] and (not path.exists() or not any(found.values())):
            raise InputError(f"{path} is not a run folder: it has no config.json")
        if not found[path] and path.is_dir():
            print(f"{path} holds no run and is left out", file=sys.stderr)
    return list(dict.fromkeys(run for path in paths for run in found[path]))


def record(run: Path, result: dict, accuracies: list[float]) -> str:
    """Append an evaluation to RUN/eval.jsonl; returns a line about it. accuracies: of each encoder, in [0, 1]."""
    result = result | {"accuracy": mean(accuracies), "accuracies": accuracies}
    log = run / "eval.jsonl"
    try:
        with locked(run):  # against other evaluations of this run
            former = log.read_bytes() if log.exists() else b""
            write_atomic(log, lambda file: file.write(former + json.dumps(result).encode() + b"\n"))
    except InputError as error:
        print(f"{error}: the next line is recorded nowhere", file=sys.stderr)
    how = ", ".join(f"{result[key]} {key}" for key in ("features", "head", "epochs", "labels") if key in result)
    several = f"  (mean of {', '.join(f'{100 * a:.2f}' for a in accuracies)})" if len(accuracies) > 1 else ""
    return f"{run}: {result['evaluation']} on {result['dataset']}, {how}: {100 * result['accuracy']:.2f}%{several}"


# -------------------------------------------------------------------------------------------------------- evaluations
# Accuracies are fractions of the test images, top-1.


@torch.inference_mode()
def knn(module: nn.Module, images: Images, k: int = 200, temperature: float = 0.1) -> float:
    """Accuracy of a vote of the k most cosine-similar training images, of weight `exp(cos / temperature)` (Wu et al. 2018)."""
    train, test = (normalize(extract_features(module, x)) for x in (images.x_train, images.x_test))
    votes = one_hot(images.y_train, images.num_classes).float()
    correct = 0
    for queries, labels in zip(test.split(500), images.y_test.split(500)):
        similarity, neighbours = (queries @ train.T).topk(min(k, len(train)))
        scores = ((similarity / temperature).exp()[:, :, None] * votes[neighbours]).sum(1)
        correct += (scores.argmax(1) == labels).sum()
    return int(correct) / len(images.y_test)


def linear(module: nn.Module, images: Images, epochs: int = EVALUATION_EPOCHS["linear"], seed: int = 0) -> float:
    """Accuracy of one linear layer on a frozen module's features, trained by Adam at 3e-3 in shuffled batches of 512.

    Features are standardised by the training set's mean and deviation. The layer could learn that map itself, but without it the fixed
    learning rate underrates encoders with small features, above all the untrained one.
    """
    before = copy.deepcopy(module.state_dict())
    train, test = (extract_features(module, x).clone() for x in (images.x_train, images.x_test))
    deviation, centre = torch.std_mean(train, 0)
    train, test = ((x - centre) / (deviation + 1e-8 * deviation.max()) for x in (train, test))
    head = new_head(nn.Linear, train.shape[1], images.num_classes, seed=seed).to(train.device)
    train_classifier(head, train, images.y_train, epochs, lr=3e-3, batch_size=512, seed=seed, name="linear")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "linear evaluation changed the frozen module"
    with torch.inference_mode():
        return (head(test).argmax(1) == images.y_test).float().mean().item()


def fine_tune(
    backbone: nn.Module, images: Images, labelled: Tensor, head: str, epochs: int = EVALUATION_EPOCHS["semi"], seed: int = 0
) -> float:  # fmt: skip
    """Semi-supervised evaluation: accuracy of a copy of the backbone and a new head, trained by Adam at 1e-3 in batches of 128.

    labelled: indices of the training images whose labels are used. head: `linear` or `mlp`. The accuracy is that after the last epoch,
    never the best on the test set.
    """
    width = feature_dim(backbone)
    if head == "linear":
        top = new_head(nn.Linear, width, images.num_classes, seed=seed)
    else:
        top = new_head(build_head, width, 4096, images.num_classes, seed=seed)
    model = nn.Sequential(copy.deepcopy(backbone), top).to(images.x_train.device).requires_grad_()
    x = images.x_train[labelled].float().div_(255).contiguous(memory_format=torch.channels_last)
    train_classifier(model, x, images.y_train[labelled], epochs, lr=1e-3, batch_size=128, seed=seed, name="fine-tuning")
    predicted = extract_features(model, images.x_test).argmax(1)
    return (predicted == images.y_test).float().mean().item()


def new_head(build: Callable[..., nn.Module], *widths: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(*widths)


def train_classifier(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, batch_size: int, seed: int, name: str) -> None:
    """Minimise cross-entropy with Adam over shuffled batches; a last batch of one sample is left out, as BatchNorm needs two.

    x: the model's inputs `[N, ...]`. y: classes `[N]`. name: the title of the progress bar, and the purpose in the random numbers' key.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = keyed_generator(x.device, seed, name)
    model.train()
    for _ in trange(epochs, desc=name, leave=False, disable=None):
        for batch in torch.randperm(len(x), generator=generator, device=x.device).split(batch_size):
            if len(batch) > 1:
                loss = cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


# ------------------------------------------------------------------------------------------------------------- export


def export_features(modules: list[nn.Module], images: Images, path: Path) -> str:
    """Write `train` and `test` `[N, d]`, float32, with `y_train` and `y_test` of labelled images and `names_train`, `names_test` of files.

    With several modules, as of `single`, the features are `[modules, N, d]`. Returns a line about the file.
    """
    arrays = {}
    for split, x, y, names in (("train", images.x_train, images.y_train, 0), ("test", images.x_test, images.y_test, 1)):
        if len(x):
            features = torch.stack([extract_features(module, x).cpu() for module in modules])
            arrays[split] = features[0].numpy() if len(modules) == 1 else features.numpy()
        arrays |= {f"y_{split}": y.cpu().numpy()} if len(y) else {}
        arrays |= {f"names_{split}": np.array(images.names[names])} if len(images.names[names]) else {}
    write_atomic(path, lambda file: np.savez(file, **arrays))
    return f"{path} holds " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


if __name__ == "__main__":
    with user_errors("eval.py"):
        main(OPTIONS)
