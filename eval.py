"""Evaluate the encoders of finished runs, with labels or by the spectrum of their features; draw, tabulate and export them.

    python eval.py [RUN]                    linear evaluation of the newest run under runs/, or of RUN
    python eval.py --semi 0.1               fine-tune backbone and a new head on a tenth of the labels, class-balanced
    python eval.py --spectrum [RUN ...]     singular values, effective rank, alignment and uniformity of the features, without labels
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
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from tqdm import trange

from data import Images, balanced_subset, keyed_generator, load_dataset, refuse_other_data, require
from methods import explained, own_of
from models import build_head, extract_features, feature_dim, load_encoders
from report.export import export_encoders
from report.figures import plot, plot_against, plot_spectra
from report.page import write_page
from report.tables import SPECTRUM, evaluation_name, read_options, read_rows, table, table_kind
from runtime.device import choose_device
from runtime.run import read_config
from training import views_of


@command_line()
def main(options: argparse.Namespace) -> None:
    """Do a task with the named runs. options: of `options.parse_evaluation`."""
    if options.runs:
        runs = runs_among(options.runs)
    else:  # tables and figures name the unfinished runs that they leave out
        runs = find_runs("metrics.jsonl") if options.task in ("table", "against") else find_runs("encoder.pt")[:1]
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

    device, spectra = choose_device(options.device), {}
    for run in runs:
        trained_on = read_options(run)
        result = {"dataset": options.transfer or trained_on["dataset"], "seed": options.seed}
        if options.task == "spectrum":
            result |= {"evaluation": "spectrum", "features": options.features}
            recorded = read_rows(run).get(evaluation_name(result, trained_on["dataset"]))
            if recorded and not (run / "encoder.pt").exists():  # results may be kept without weights
                spectra[run] = recorded
                print(describe_spectrum(run, recorded))
                continue
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
        if options.task not in ("export", "spectrum"):
            require(images, f"--{options.task}")
        if options.task == "export":
            return print(export_features(modules, images, options.export))
        if options.task == "spectrum":
            spectra[run] = result | spectrum(run, modules, images, options.seed)
            append(run, spectra[run])
            print(describe_spectrum(run, spectra[run]))
            continue
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
    if spectra:
        out = options.out or (runs[0] if len(runs) == 1 else Path()) / "spectrum.png"
        plot_spectra(spectra, out, options.size, not options.no_title)
        print(f"{out} shows {', '.join(map(str, runs))}")


def find_runs(file: str) -> list[Path]:
    """The runs under runs/ that have this file, newest first: `encoder.pt` if they are finished."""
    runs = sorted(folders_with(file, Path("runs")), key=lambda run: (run / file).stat().st_mtime, reverse=True)
    if not runs:
        raise InputError("there is no finished run under runs/: train one with `python fedu.py`, or name its folder")
    return runs


def folders_with(file: str, root: Path) -> list[Path]:
    """`root` and the folders in it that have this file, sorted; not hidden ones, which are no runs, as that of a run being replaced."""
    found = sorted(path.parent for path in root.rglob(file))
    return [folder for folder in found if not any(part.startswith(".") for part in folder.relative_to(root).parts)]


def runs_among(paths: list[Path]) -> list[Path]:
    """The run folders among the paths and inside them, each once.

    Files are ignored, as a shell's `*` may name them; a folder without a run is reported on stderr. Raises InputError if a path does not
    exist, or if there is no run at all.
    """
    found = {path: folders_with("config.json", path) for path in paths}
    for path in paths:
        if not found[path] and (not path.exists() or not any(found.values())):
            raise InputError(f"{path} is not a run folder: it has no config.json")
        if not found[path] and path.is_dir():
            print(f"{path} holds no run and is left out", file=sys.stderr)
    return list(dict.fromkeys(run for path in paths for run in found[path]))


def record(run: Path, result: dict, accuracies: list[float]) -> str:
    """Append an evaluation to RUN/eval.jsonl; returns a line about it. accuracies: of each encoder, in [0, 1]."""
    result = result | {"accuracy": mean(accuracies), "accuracies": accuracies}
    append(run, result)
    how = ", ".join(f"{result[key]} {key}" for key in ("features", "head", "epochs", "labels") if key in result)
    several = f"  (mean of {', '.join(f'{100 * a:.2f}' for a in accuracies)})" if len(accuracies) > 1 else ""
    return f"{run}: {result['evaluation']} on {result['dataset']}, {how}: {100 * result['accuracy']:.2f}%{several}"


def append(run: Path, result: dict) -> None:
    """Append an evaluation to RUN/eval.jsonl, or say on stderr why that cannot be done."""
    log = run / "eval.jsonl"
    try:
        with locked(run):  # against other evaluations of this run
            former = log.read_bytes() if log.exists() else b""
            write_atomic(log, lambda file: file.write(former + json.dumps(result).encode() + b"\n"))
    except InputError as error:
        print(f"{error}: the next line is recorded nowhere", file=sys.stderr)


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


# ----------------------------------------------------------------------------------------------------------- spectrum

SPECTRUM_IMAGES = 10_000  # at most, drawn from a larger set
ROUNDING = 1e-15  # of a covariance's singular values: below it they are what float32 has rounded


@torch.inference_mode()
def spectrum(run: Path, modules: list[nn.Module], images: Images, seed: int = 0) -> dict:
    """Effective rank, alignment, uniformity and singular values of frozen features `[N, d]`, as an evaluation's row; it needs no labels.

    They are of the test images, or of the training images where there are no test images. Of several modules, as of `single`, each number
    is the mean, and `encoders` has those of each. seed: of the views, and of the images that are drawn from a larger set. Raises InputError
    if there are fewer than two images, or the features are not finite or all 0.
    """
    split, x = ("test", images.x_test) if len(images.x_test) else ("train", images.x_train)
    if len(x) < 2:
        raise InputError(f"--spectrum needs at least two images, and the data set of {run} has one {split} image")
    if len(x) > SPECTRUM_IMAGES:
        x = x[torch.randperm(len(x), generator=keyed_generator(x.device, seed, "spectrum's images"), device=x.device)[:SPECTRUM_IMAGES]]
    views, found, values = training_views(run), [], []
    for module in modules:
        features = extract_features(module, x).double()
        if not features.isfinite().all() or not features.any():
            what = "are all 0" if features.isfinite().all() else "are not finite"
            raise InputError(f"the features of {run} {what}, so they have no spectrum")
        aligned = alignment(module, x, views, keyed_generator(x.device, seed, "spectrum"))
        found.append(dict(zip(SPECTRUM, (effective_rank(features), aligned, uniformity(features)))))
        values.append(covariance_spectrum(features))
    result = {"split": split, "images": len(x), "width": len(values[0])} | {key: mean(f[key] for f in found) for key in SPECTRUM}
    result |= {"encoders": found} if len(found) > 1 else {}
    means = torch.stack(values).mean(0).tolist()
    return result | {"singular_values": [float(f"{value:.4g}") if value > ROUNDING else 0.0 for value in means]}


def singular_values(z: Tensor) -> Tensor:
    """The singular values of `[N, d]`, `[d]`, the largest first: roots of the eigenvalues of `z^T z`. With N < d the last are about 0."""
    return torch.linalg.eigvalsh(z.T @ z).clamp(min=0).sqrt().flip(0)


def covariance_spectrum(z: Tensor) -> Tensor:
    """The singular values of the covariance of `[N, d]`, `[d]`, the largest first (Jing et al. 2022, arXiv 2110.09348): that with 1 / N.

    z is scaled to `E |z|^2 = 1`, so that they sum to `1 - |E z|^2` whatever the size of an encoder's features: to 0 if all are the same.
    """
    return singular_values((z - z.mean(0)) / z.norm()).square()


def effective_rank(z: Tensor) -> float:
    """RankMe of features `[N, d]` (Garrido et al. 2023, arXiv 2210.02885, eq. 1): `exp(-sum_k p_k log p_k)`, from 1 to min(N, d).

    `p_k = s_k / sum_j s_j + 1e-7`, where s are the min(N, d) singular values of z itself, as in the paper: no mean is subtracted.
    """
    s = singular_values(z)[: min(z.shape)]
    p = s / s.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def alignment(module: nn.Module, x: Tensor, views: Callable[..., Sequence[Tensor]], generator: torch.Generator) -> float:
    """`E |f(v) - f(v')|^2` over two random views v, v' of each image (Wang and Isola 2020, arXiv 2005.10242), f at unit length; 0 to 4.

    x: uint8 `[N, 3, S, S]`. views: see `random_views`.
    """
    total = 0.0
    for batch in x.split(500):
        one, two = (normalize(module(v.contiguous(memory_format=torch.channels_last))) for v in views(batch, generator))
        total += (one - two).double().square().sum().item()
    return total / len(x)


def uniformity(z: Tensor, block: int = 1000) -> float:
    """`log E exp(-2 |f(x) - f(y)|^2)` over all pairs of different images x, y (Wang and Isola 2020), f at unit length; -8 to 0.

    z: features `[N, d]`. It computes a block of rows against all later ones at a time, by `|a - b|^2 = 2 - 2 <a, b>`.
    """
    z, n = normalize(z), len(z)
    total = sum((4 * (z[k : k + block] @ z[k:].T) - 4).exp().triu(1).sum() for k in range(0, n, block))
    return (total / (n * (n - 1) / 2)).log().item()


def training_views(run: Path) -> Callable[..., Sequence[Tensor]]:
    """The views that a run was trained with, see `random_views`. Raises InputError if they are a notebook's, which the run lacks."""
    config = read_config(run)
    if "views" not in config.get("data", {}):
        return views_of(read_options(run)["settings"])
    if not (run / "views.py").exists():
        raise InputError(f"--spectrum needs the views that {run} was trained with, which only the notebook that began it has")
    own = own_of(run, "views", config["options"]["views"], config["data"]["views"], None)
    return explained(own.file)(views_of({}, own.content))


def describe_spectrum(run: Path, row: dict) -> str:
    """A line about a spectrum."""
    ranks = ", ".join(f"{encoder['rank']:.1f}" for encoder in row.get("encoders", ()))
    several = f"  (means; the ranks are {ranks})" if ranks else ""
    numbers = f"rank {row['rank']:.1f} of {row['width']}, alignment {row['alignment']:.3f}, uniformity {row['uniformity']:.3f}"
    return f"{run}: spectrum on {row['dataset']}, {row['features']} features, {row['images']} {row['split']} images: {numbers}{several}"


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
