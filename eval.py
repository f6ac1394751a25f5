"""Read a finished encoder: kNN, linear, semi-supervised and transfer evaluation (README: options of `eval.py`), figures and tables.

    python eval.py [RUN]              linear evaluation of the newest run under runs/, or of RUN
    python eval.py --semi 0.1         fine-tune backbone and a new head on a tenth of the labels, class-balanced
    python eval.py --plot [RUN ...]   divergence, loss and kNN curves
    python eval.py --against mu RUN ...   linear accuracy against an option, kNN accuracy against `round`, bars of the `ablation`
    python eval.py --export FILE.npz  the representations of all images
    python eval.py --table [RUN ...]  one Markdown row a setting, seeds as mean and deviation

A run of `single` has one encoder a client: each is evaluated, and the mean reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from cli import InputError, Parser, first_line, number, user_errors, write_atomic
from methods import COLUMNS, HOST_OPTIONS, defaults

EPOCHS = {"linear": 200, "semi": 100}
GOES_WITH = {
    "features": ("linear", "knn", "export"),
    "head": ("semi",),
    "epochs": ("linear", "semi"),
    "transfer": ("linear", "knn", "semi", "export"),
    "out": ("plot", "against"),
}


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", default=[],
        help="run folders, or folders of them  [under runs/ the newest; for --table and --against all]")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--linear", action="store_true", help="train one linear layer on the frozen backbone's features (the default)")
    what.add_argument("--knn", action="store_true", help="weighted vote of the 200 nearest training images")
    what.add_argument("--semi", type=number(float, 0, 1, open_low=True), metavar="F", help="fine-tune on a fraction F of the labels")
    what.add_argument("--plot", action="store_true", help="draw the runs' curves")
    what.add_argument("--against", metavar="OPTION", help="draw accuracies against an option of fedu.py, or `round`, or `ablation`")
    what.add_argument("--export", type=Path, metavar="NPZ", help="write train and test representations and labels")
    what.add_argument("--table", action="store_true", help="print the runs' evaluations as Markdown")
    add("--transfer", metavar="DATASET", help="evaluate on another data set than the run was trained on")
    add("--features", choices=("backbone", "projector", "pixels"), help="what represents an image  [backbone]")
    add("--head", choices=("linear", "mlp"), help="for --semi: Linear, or Linear-BN-ReLU-Linear of hidden width 4096  [linear]")
    add("--epochs", type=number(int, 1), help="of --linear or --semi  [200, 100]")
    add("--seed", type=number(int, 0, 2**63 - 1), help="of the head's initialisation, the batches and the labelled subset  [0]")
    add("--data-root", help="where CIFAR lies or is downloaded to  [the run's]")
    add("--device", choices=("auto", "cpu", "cuda"), help="[auto]")
    add("--out", type=Path, help="the figure  [RUN/divergence.png; comparison.png for several runs; OPTION.png]")
    options = parser.parse_args(argv)
    chosen = next((name for name in ("knn", "semi", "plot", "against", "export", "table") if name in options), "linear")
    for name, owners in GOES_WITH.items():
        if name in options and chosen not in owners:
            parser.error(f"--{name} goes with {' or '.join(f'--{owner}' for owner in owners)}, not with --{chosen}")
    return options


OPTIONS = parse_options() if __name__ == "__main__" else None  # before the heavy imports: mistakes are answered at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy, normalize, one_hot  # noqa: E402
from tqdm import trange  # noqa: E402

from data import Images, balanced_subset, keyed_generator, load_images  # noqa: E402
from models import Encoder, build_head, feature_dim  # noqa: E402


def main(options: argparse.Namespace) -> None:
    several = "table" in options or "against" in options
    runs = runs_among(options.runs) if options.runs else find_runs()[: None if several else 1]
    if "table" in options:
        return print(table(runs))
    if "plot" in options:
        out = getattr(options, "out", runs[0] / "divergence.png" if len(runs) == 1 else Path("comparison.png"))
        plot(runs, out)
        return print(f"{out} shows {', '.join(map(str, runs))}")
    if "against" in options:
        out = getattr(options, "out", Path(f"{options.against}.png"))
        plot_against(options.against, runs, out)
        return print(f"{out} shows {', '.join(map(str, runs))}")
    if "export" in options and len(runs) > 1:
        raise InputError(f"--export got {len(runs)} runs, wants one for its file")
    for run in runs:
        evaluate(run, options)


def evaluate(run: Path, options: argparse.Namespace) -> None:
    """Evaluate a run's encoders as the options say, print the accuracy and append it to RUN/eval.jsonl."""
    trained_on = read_config(run)["options"]
    dataset, root = getattr(options, "transfer", trained_on["dataset"]), getattr(options, "data_root", trained_on["data_root"])
    seed, device = getattr(options, "seed", 0), choose_device(getattr(options, "device", "auto"))
    encoders = [encoder.to(device) for encoder in load_encoders(run)]
    images = load_images(dataset, Path(root), trained_on["image_size"]).to(device)
    result = {"dataset": dataset, "seed": seed}
    features = getattr(options, "features", "backbone")
    modules = [{"backbone": e.backbone, "projector": e, "pixels": nn.Flatten()}[features] for e in encoders]
    if "export" in options:
        return export(modules, images, options.export)
    if "knn" in options:
        result |= {"evaluation": "knn", "features": features, "labels": len(images.y_train)}
        accuracies = [knn(module, images) for module in modules]
    elif "semi" in options:
        head, epochs = getattr(options, "head", "linear"), getattr(options, "epochs", EPOCHS["semi"])
        labelled = balanced_subset(images.y_train, options.semi, seed).to(device)
        result |= {"evaluation": f"semi {options.semi:g}", "head": head, "epochs": epochs, "labels": len(labelled)}
        accuracies = [fine_tune(e.backbone, images, labelled, head, epochs, seed) for e in encoders]
    else:
        epochs = getattr(options, "epochs", EPOCHS["linear"])
        result |= {"evaluation": "linear", "features": features, "epochs": epochs, "labels": len(images.y_train)}
        accuracies = [linear(module, images, epochs, seed) for module in modules]
    result |= {"accuracy": mean(accuracies), "accuracies": accuracies}
    log = run / "eval.jsonl"
    former = log.read_bytes() if log.exists() else b""
    write_atomic(log, lambda f: f.write(former + json.dumps(result).encode() + b"\n"))
    how = ", ".join(f"{result[k]} {k}" for k in ("features", "head", "epochs", "labels") if k in result)
    each = f"  (mean of {', '.join(f'{100 * a:.2f}' for a in accuracies)})" if len(accuracies) > 1 else ""
    print(f"{run}: {result['evaluation']} on {dataset}, {how}: {100 * result['accuracy']:.2f}%{each}")


# --------------------------------------------------------------------------------------------------- evaluations
# Accuracies are fractions of the test images, top-1.


@torch.inference_mode()
def extract_features(module: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features `[N, d]` of uint8 images `[N, 3, S, S]`, unaugmented, in eval mode; the module's mode is restored."""
    training = module.training
    module.eval()
    batches = (batch.float().div_(255).contiguous(memory_format=torch.channels_last) for batch in images.split(batch_size))
    features = torch.cat([module(batch) for batch in batches])
    module.train(training)
    return features


@torch.inference_mode()
def knn(module: nn.Module, images: Images, k: int = 200, temperature: float = 0.1) -> float:
    """Weighted vote of the k most cosine-similar training images, weight `exp(cos / temperature)` (Wu et al. 2018)."""
    train, test = (normalize(extract_features(module, x)) for x in (images.x_train, images.x_test))
    votes = one_hot(images.y_train, images.num_classes).float()
    correct = 0
    for queries, labels in zip(test.split(500), images.y_test.split(500)):
        similarity, neighbours = (queries @ train.T).topk(min(k, len(train)))
        scores = ((similarity / temperature).exp()[:, :, None] * votes[neighbours]).sum(1)
        correct += (scores.argmax(1) == labels).sum()
    return int(correct) / len(images.y_test)


def linear(module: nn.Module, images: Images, epochs: int = EPOCHS["linear"], seed: int = 0) -> float:
    """Linear evaluation: one Linear on a frozen module's features, Adam 3e-3, batch 512, shuffled.

    Features are standardised by the training set's mean and deviation, an affine map that the layer could express itself: without
    it the fixed learning rate under-rates encoders whose features are small, the untrained one above all.
    """
    before = copy.deepcopy(module.state_dict())
    train, test = (extract_features(module, x).clone() for x in (images.x_train, images.x_test))
    deviation, centre = torch.std_mean(train, 0)
    train, test = ((x - centre) / (deviation + 1e-8 * deviation.max()) for x in (train, test))
    head = new_head(nn.Linear, train.shape[1], images.num_classes, seed=seed).to(train.device)
    train_classifier(head, train, images.y_train, epochs, lr=3e-3, batch_size=512, seed=seed, what="linear")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "linear evaluation changed the frozen module"
    with torch.inference_mode():
        return (head(test).argmax(1) == images.y_test).float().mean().item()


def fine_tune(backbone: nn.Module, images: Images, labelled: Tensor, head: str, epochs: int = EPOCHS["semi"], seed: int = 0) -> float:
    """Semi-supervised evaluation: backbone and a new head trained on the `labelled` images, Adam 1e-3, batch 128.

    The accuracy is that after the last epoch, never the best on the test set.
    """
    width = feature_dim(backbone)
    if head == "linear":
        top = new_head(nn.Linear, width, images.num_classes, seed=seed)
    else:
        top = new_head(build_head, width, 4096, images.num_classes, seed=seed)
    model = nn.Sequential(copy.deepcopy(backbone), top).to(images.x_train.device).requires_grad_()
    x = images.x_train[labelled].float().div_(255).contiguous(memory_format=torch.channels_last)
    train_classifier(model, x, images.y_train[labelled], epochs, lr=1e-3, batch_size=128, seed=seed, what="fine-tuning")
    predicted = extract_features(model, images.x_test).argmax(1)
    return (predicted == images.y_test).float().mean().item()


def new_head(kind: Callable[..., nn.Module], *sizes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind(*sizes)


def train_classifier(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, batch_size: int, seed: int, what: str) -> None:
    """Minimise cross-entropy with Adam over shuffled batches; a last batch of one sample is left out, as BatchNorm needs two."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = keyed_generator(x.device, seed, what)
    model.train()
    for _ in trange(epochs, desc=what, leave=False, disable=None):
        for batch in torch.randperm(len(x), generator=generator, device=x.device).split(batch_size):
            if len(batch) > 1:
                loss = cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def export(modules: list[nn.Module], images: Images, path: Path) -> None:
    """Write `train` and `test` `[N, d]`, float32, and `y_train`, `y_test`; with several encoders, as of `single`, `[encoders, N, d]`."""
    arrays = {}
    for split, x, y in (("train", images.x_train, images.y_train), ("test", images.x_test, images.y_test)):
        features = torch.stack([extract_features(module, x).cpu() for module in modules])
        arrays |= {split: features[0].numpy() if len(modules) == 1 else features.numpy(), f"y_{split}": y.cpu().numpy()}
    write_atomic(path, lambda file: np.savez(file, **arrays))
    print(f"{path} holds " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


# --------------------------------------------------------------------------------------------------- run folders


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device got cuda, but torch finds no usable CUDA GPU here; it wants cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def find_runs(root: Path = Path("runs")) -> list[Path]:
    """The finished runs under `root`, newest first."""
    runs = sorted((p.parent for p in root.rglob("encoder.pt")), key=lambda run: (run / "encoder.pt").stat().st_mtime, reverse=True)
    if not runs:
        raise InputError(f"there is no finished run under {root}/: train one with `python fedu.py`, or name its folder")
    return runs


def runs_among(paths: list[Path]) -> list[Path]:
    """The run folders that are named, or lie in folders that are, each once. Passes over what else a shell's `*` names, and says so of
    folders. Raises InputError if a path does not exist, or none holds a run.
    """
    found = {path: sorted(config.parent for config in path.rglob("config.json")) for path in paths}
    for path in paths:
        if not found[path] and (not path.exists() or not any(found.values())):
            raise InputError(f"{path} is not a run folder: it has no config.json")
        if not found[path] and path.is_dir():
            print(f"{path} holds no run and was passed over", file=sys.stderr)
    return list(dict.fromkeys(run for path in paths for run in found[path]))


def read_config(run: Path) -> dict:
    try:
        config = json.loads((run / "config.json").read_text())
        config["options"]["method"]
        return config
    except FileNotFoundError:
        raise InputError(f"{run} is not a run folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}/config.json is not readable ({first_line(error)})") from None


def read_options(run: Path) -> dict:
    """A run's options; those that it is too old to know have their default."""
    options = read_config(run)["options"]
    return defaults(options["method"]) | options


def read_metrics(run: Path) -> list[dict]:
    """The rounds of a run, one dict each; see the README for their keys."""
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run}/metrics.jsonl is not readable ({first_line(error)})") from None


def load_encoders(run: Path) -> list[Encoder]:
    """A run's encoders: that of the global model, or for `single` one a client."""
    path = run / "encoder.pt"
    if not path.exists():
        raise InputError(f"{run} has no encoder.pt: the run is not finished; continue it with `python fedu.py --resume {run}`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        encoders = []
        for state in saved["encoders"]:
            encoder = Encoder(saved["encoder"], saved["head"])
            encoder.backbone.load_state_dict(state["backbone"])
            encoder.projector.load_state_dict(state["projector"])
            encoders.append(encoder)
        return encoders
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise InputError(f"{path} is not a readable encoder ({first_line(error)})") from None


# ----------------------------------------------------------------------------------------------- figures and tables
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = [(colour, dashes) for dashes in ("-", "--", ":") for colour in COLOURS]


def pyplot():
    """matplotlib.pyplot without a display, imported by those who draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure, out: Path) -> None:
    kind, known = out.suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"--out got {out}, wants a name that ends in one of .{', .'.join(known)}")
    write_atomic(out, lambda file: figure.savefig(file, dpi=150, format=kind))
    pyplot().close(figure)


def plot(runs: list[Path], out: Path) -> None:
    """Draw divergence, the own predictors' share, loss and kNN accuracy against rounds: one colour a run, thin a client, thick the mean."""
    from matplotlib.ticker import MaxNLocator

    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, 1, figsize=(9, 11), height_ratios=(2, 0.8, 1, 1), sharex=True, layout="constrained")
        top, own, loss, knn_ = axes
        settings = [read_options(run) for run in runs]
        for colour, run, options in zip(COLOURS * len(runs), runs, settings):
            rows = [row for row in read_metrics(run) if row["clients"]]
            if not rows:
                raise InputError(f"{run} has no rounds to draw")
            label = run.name if len(runs) > 1 else f"{options['method']}: mean of the clients"
            draw_clients(top, rows, "divergence", colour, label)
            # an older run tells only whose predictor it was
            shares = [(r["round"], 100 * mean(r.get("own_share", [p == "local" for p in r["predictor"]]))) for r in rows]
            own.plot(*zip(*shares), color=colour, marker="o", markersize=3.5)
            draw_clients(loss, rows, "loss", colour)
            measured = [(r["round"], 100 * r["knn"]) for r in rows if r["knn"] is not None]
            knn_.plot(*zip(*measured), color=colour, marker="o", markersize=4) if measured else None
            local = [(r["round"], d) for r in rows for d, p in zip(r["divergence"], r["predictor"]) if p == "local"]
            if local:
                top.scatter(
                    *zip(*local), s=42, facecolors="none", edgecolors=colour, label="a client that began the round with its own predictor"
                )
            if options["predictor"] == "dapu":
                top.axhline(options["mu"], color=colour, linestyle="--", linewidth=1.2, label=f"$\\mu$ = {options['mu']:g}")
        kind = {options["divergence"] for options in settings}
        unit = {"layer-mean": "mean L2 norm per convolution", "squared": "squared L2 norm of the encoder"}
        top.set(ylabel="divergence in a round\n(" + " / ".join(unit[k] for k in sorted(kind)) + ")", ylim=(0, None))
        own.set(ylabel="predictor: the\nclient's own (%)", ylim=(-6, 106))
        loss.set(ylabel="loss")
        knn_.set(ylabel="kNN accuracy (%)", xlabel="round")
        knn_.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(run_title(runs))
        handles = {label: handle for handle, label in zip(*top.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
        save_figure(figure, out)


def plot_against(option: str, runs: list[Path], out: Path) -> None:
    """Draw accuracies with their deviation over seeds.

    option: `round` draws the kNN accuracy of each setting against rounds, `ablation` bars of linear accuracy by aggregate, update and
    predictor, any option of fedu.py the linear accuracy against its values, a line a method; in the last two an untrained encoder is a
    dashed line. Raises InputError if runs lack the option.
    """
    plt = pyplot()
    groups = by_setting(runs)
    if option not in ("round", "ablation") and any(option not in setting for setting, _ in groups):
        raise InputError(f"--against got {option!r}, wants round, ablation or an option of fedu.py as it is in config.json")
    trained = [group for group in groups if is_trained(group[0])]
    if not trained:
        raise InputError(f"{runs[0]} has no rounds to draw")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
        figure.suptitle(scale([setting for setting, _ in groups]), fontsize=9)
        if option == "round":
            draw_knn(axis, trained)
        else:
            accuracies = [[100 * linear_accuracy(run) for run in members] for _, members in trained]
            (draw_bars if option == "ablation" else partial(draw_sweep, option=option))(axis, trained, accuracies)
            for _, members in (group for group in groups if not is_trained(group[0])):
                line = axis.axvline if option == "ablation" else axis.axhline
                level = 100 * mean(linear_accuracy(run) for run in members)
                line(level, color=COLOURS[-1], linestyle="--", linewidth=1.2, label="untrained encoder")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        save_figure(figure, out)


def draw_knn(axis, groups: list[tuple[dict, list[Path]]]) -> None:
    differ = differing([setting for setting, _ in groups])
    for (colour, dashes), (setting, members) in zip(LOOKS * len(groups), groups):
        curves = [{r["round"] + 1: 100 * r["knn"] for r in read_metrics(run) if r["knn"] is not None} for run in members]
        rounds = sorted(set.intersection(*map(set, curves)))
        centre = np.array([mean(curve[r] for curve in curves) for r in rounds])
        spread = np.array([deviation([curve[r] for curve in curves]) for r in rounds])
        axis.plot(rounds, centre, color=colour, linestyle=dashes, marker="o", markersize=3.5, label=name_setting(setting, differ))
        axis.fill_between(rounds, centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="rounds", ylabel="kNN accuracy of the backbone (%)")


def draw_bars(axis, groups: list[tuple[dict, list[Path]]], accuracies: list[list[float]]) -> None:
    settings = [setting for setting, _ in groups]
    differ = [k for k in differing(settings) if k not in COLUMNS]
    more = differ or len({s["method"] for s in settings}) > 1
    names = [f"{name_setting(s, differ)}: " * bool(more) + f"{s['aggregate']} to {s['update']}, {s['predictor']}" for s in settings]
    places, spread = range(len(names)), [deviation(a) for a in accuracies]
    bars = axis.barh(places, [mean(a) for a in accuracies], xerr=spread, color=COLOURS[0], label="trained")
    axis.bar_label(bars, fmt="%.1f", padding=4)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    axis.set(xlabel="linear accuracy (%)", ylabel="aggregated encoder to updated encoder, predictor")


def draw_sweep(axis, groups: list[tuple[dict, list[Path]]], accuracies: list[list[float]], option: str) -> None:
    """A place for each value that occurs, at equal distances, so that 0 and infinity have theirs."""
    values = sorted({s[option] for s, _ in groups}, key=lambda v: (v is not None, v))
    for colour, method in zip(COLOURS * len(groups), dict.fromkeys(s["method"] for s, _ in groups)):
        points = sorted((values.index(s[option]), mean(a), deviation(a)) for (s, _), a in zip(groups, accuracies) if s["method"] == method)
        x, y, error = zip(*points)
        axis.errorbar(x, y, error, color=colour, marker="o", capsize=4, label=method)
    axis.set_xticks(range(len(values)), [describe_option({option: v}, option) for v in values])
    axis.set(xlabel=option.replace("_", " "), ylabel="linear accuracy (%)")


def draw_clients(axis, rows: list[dict], key: str, colour: str, label: str | None = None) -> None:
    for client in sorted({c for row in rows for c in row["clients"]}):
        points = [(row["round"], dict(zip(row["clients"], row[key])).get(client)) for row in rows]
        axis.plot(*zip(*((r, v) for r, v in points if v is not None)), color=colour, linewidth=0.8, alpha=0.45)
    axis.plot([row["round"] for row in rows], [mean(row[key]) for row in rows], color=colour, linewidth=2.4, label=label)


def run_title(runs: list[Path]) -> str:
    first = read_config(runs[0])["options"]
    return f"{Path(first['dataset']).stem}, {first['clients']} clients, {describe_partition(first)}" if len(runs) == 1 else "Runs compared"


def describe_partition(options: dict) -> str:
    classes = "1/K of the" if options["classes_per_client"] is None else options["classes_per_client"]
    return {"classes": f"{classes} classes each", "iid": "iid"}.get(options["partition"], f"dirichlet {options['alpha']}")


# Linear evaluation, top-1 %, of ResNet-18 after 100 rounds of 5 local epochs on CIFAR-10: non-IID (2 classes each of 5 clients), IID.
# FedEMA's paper (Zhuang et al. 2022), table 1 and appendix; with another encoder FedU's (Zhuang et al. 2021)
PUBLISHED = {
    "single": ("74.95", "82.42"),
    "fedsimclr": ("78.09", "-"),
    "fedmoco-v1": ("78.21", "-"),
    "fedmoco-v2": ("79.14", "-"),
    "fedsimsiam": ("76.27", "-"),
    "fedbyol": ("79.44", "84.29"),
    "fedu": ("80.52", "83.96"),
    "fedema": ("83.34", "86.26"),
    "fedca": ("68.01 (ResNet-50)", "71.25 (ResNet-50)"),
    "fedavg-supervised": ("67.74 (ResNet-50)", "91.51 (ResNet-50)"),
    "central": ("90.46", "90.46"),
}
# FedU's paper: the averaged encoder, what it becomes at the clients, and the averaged or the client's own predictor
PUBLISHED_ABLATION = {
    "online online global": "84.07", "online online local": "82.18",
    "online both global": "81.24", "online both local": "18.23",
    "online target global": "9.99", "online target local": "19.22",
    "target online global": "82.10", "target online local": "78.06",
    "target target global": "9.99", "target target local": "25.02",
    "target both global": "82.32", "target both local": "29.03",
}  # fmt: skip


def table(runs: list[Path]) -> str:
    """Markdown: one row a setting, with the options in which the settings differ, and a last row for raw pixels if a run has them.

    Each evaluation is the mean and, over several seeds, the sample deviation, in % of the test images. Up and down: of all clients.
    """
    groups = by_setting(runs)
    settings = [setting for setting, _ in groups]
    differ = differing(settings)
    found = {run: read_evaluations(run) for run in runs}
    columns = sorted({name for evaluations in found.values() for name in evaluations} - {PIXELS}, key=lambda n: ("linear" not in n, n))
    lines = [["method", *differ, "seeds", "up and down, MB a round", *columns]]
    for setting, members in groups:
        rounds = read_metrics(members[0])
        cells = [setting["method"], *(describe_option(setting, k) for k in differ), str(len(members))]
        megabytes = (f"{mean(row[way] for row in rounds) / 1e6:.1f}" for way in ("upload_bytes", "download_bytes") if rounds)
        cells.append(" + ".join(megabytes) or "-")
        for column in columns:
            values = [100 * found[run][column] for run in members if column in found[run]]
            cells.append("-" if not values else f"{mean(values):.2f}" + (f" ± {deviation(values):.2f}" if len(values) > 1 else ""))
        lines.append(cells)
    for line, cell in zip(lines, published(settings, differ)):
        line.append(cell)
    for accuracy in {evaluations[PIXELS] for evaluations in found.values() if PIXELS in evaluations}:
        row = {"method": "raw pixels", "linear": f"{100 * accuracy:.2f}"}
        lines.append([row.get(column, "-") for column in lines[0]])
    lines.insert(1, ["---"] * len(lines[0]))
    return scale(settings) + "; accuracies in % of the test images.\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def published(settings: list[dict], differ: list[str]) -> list[str]:
    """The papers' column: a title and a cell a setting, `-` where their run differs in more than its scale; nothing if all do."""
    ablation = any(k in COLUMNS for k in differ)

    def cell(setting: dict) -> str:
        changed = {k for k, usual in defaults(setting["method"]).items() if setting.get(k, usual) != usual}
        changed -= {"method", "dataset", "partition", "classes_per_client", *(COLUMNS if ablation else ())}
        column = {("classes", None): 0, ("classes", 2): 0, ("iid", None): 1}.get((setting["partition"], setting["classes_per_client"]))
        if Path(setting["dataset"]).stem != "cifar10" or column is None or changed:
            return "-"
        if not ablation:
            return PUBLISHED.get(setting["method"], ("-", "-"))[column]
        return PUBLISHED_ABLATION.get(" ".join(setting[k] for k in COLUMNS), "-") if setting["method"] == "fedbyol" and not column else "-"

    cells = [cell(setting) for setting in settings]
    title = "linear, published: " + ("at a scale that the paper does not state" if ablation else "ResNet-18, 100 rounds of 5 epochs")
    return [title, *cells] if set(cells) != {"-"} else []


def differing(settings: list[dict]) -> list[str]:
    """The options in which settings differ, but for what their methods differ in, and for an untrained encoder's, which change nothing."""
    trained = list(filter(is_trained, settings)) or settings
    names = [k for k in trained[0] if len({json.dumps(s.get(k)) for s in trained}) > 1 and k not in ("method", *COLUMNS)]
    return names + [k for k in COLUMNS if any(s[k] != defaults(s["method"])[k] for s in trained)]


def is_trained(setting: dict) -> bool:
    return setting["method"] != "untrained"


def name_setting(setting: dict, differ: list[str]) -> str:
    """Its method, and the options in which it may differ from others."""
    options = (describe_option(setting, k) if k == "partition" else f"{k.replace('_', ' ')} {describe_option(setting, k)}" for k in differ)
    return ", ".join([setting["method"], *options])


def describe_option(setting: dict, name: str) -> str:
    value = setting.get(name)
    if name == "partition":
        return describe_partition(setting)
    if value is None:
        return {"clients_per_round": "all", "classes_per_client": "1/K"}.get(name, "-")
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_setting(runs: list[Path]) -> list[tuple[dict, list[Path]]]:
    """The runs grouped by their options, but for the seed, the host, and how often kNN was measured."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        setting = {k: v for k, v in read_options(run).items() if k not in ("seed", "knn_every", *HOST_OPTIONS)}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(run)
    return [(json.loads(setting), members) for setting, members in groups.items()]


def deviation(values: list[float]) -> float:
    """The sample deviation; of one value not a number, which is not drawn."""
    return stdev(values) if len(values) > 1 else float("nan")


def scale(settings: list[dict]) -> str:
    """What runs of these settings have in common, in words."""
    trained = list(filter(is_trained, settings)) or settings
    first = trained[0]
    words = {
        ("dataset",): f"on {Path(first['dataset']).stem}",
        ("encoder",): first["encoder"],
        ("rounds", "local_epochs"): f"{first['rounds']} rounds of {first['local_epochs']} local epoch" + "s" * (first["local_epochs"] > 1),
        ("batch_size",): f"B = {first['batch_size']}",
        ("lr",): f"lr {first['lr']:g}",
        ("clients",): f"{first['clients']} clients",
        ("partition", "classes_per_client", "alpha"): describe_partition(first),
    }
    common = ", ".join(text for names, text in words.items() if all(s[k] == first[k] for s in trained for k in names))
    return common[:1].upper() + common[1:]


def linear_accuracy(run: Path) -> float:
    try:
        return read_evaluations(run)["linear"]
    except KeyError:
        raise InputError(f"{run} has no linear accuracy: measure it with `python eval.py --linear {run}`") from None


PIXELS = "linear, pixels"  # an evaluation without any encoder


def read_evaluations(run: Path) -> dict[str, float]:
    """The latest accuracy of each evaluation that RUN/eval.jsonl holds, under a name that tells unlike ones apart."""
    path = run / "eval.jsonl"
    trained_on = read_config(run)["options"]["dataset"]
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            epochs = EPOCHS.get(row["evaluation"].split()[0])
            usual = {"features": "backbone", "head": "linear", "dataset": trained_on, "seed": 0, "epochs": epochs}
            unusual = [row[k] if isinstance(row[k], str) else f"{k} {row[k]}" for k in usual if row.get(k, usual[k]) != usual[k]]
            results[", ".join([row["evaluation"], *unusual])] = row["accuracy"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not readable ({first_line(error)})") from None
    return results


if __name__ == "__main__":
    with user_errors("eval.py"):
        main(OPTIONS)
