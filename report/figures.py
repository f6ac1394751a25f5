"""Figures of runs: curves over the rounds, and accuracies against an option."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from options import ABLATED, CIFAR_CLASSES, OPTIONS
from report.tables import (
    Group,
    capitalized,
    describe_option,
    describe_scale,
    deviation,
    differing,
    distinct_seeds,
    evaluation_names,
    is_trained,
    mean,
    name_setting,
    read_evaluations,
    read_options,
)
from runtime.cli import InputError, first_line, write_atomic
from runtime.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = [(colour, dashes) for dashes in ("-", "--", ":") for colour in COLOURS]
UNITS = {"layer-mean": "mean L2 norm per convolution", "squared": "squared L2 norm of the encoder"}


def plotting():
    """matplotlib, imported only when something is drawn."""
    backend = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    import matplotlib

    if backend:  # of a notebook, perhaps, and unknown here: matplotlib's import would raise. Figures are files and need none
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that Agg draws whatever MPLBACKEND says. pyplot, and so a notebook's own figures, are left alone."""
    plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure in the format that the name of `out` ends in. Raises InputError if there is no such format."""
    kind, known = out.suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"--out got {out}, needs a name that ends in one of .{', .'.join(known)}")
    write_atomic(out, lambda file: figure.savefig(file, dpi=150, format=kind))


@contextmanager
def optional(out: Path) -> Iterator[None]:
    """Make a warning on stderr of whatever keeps a run's figure from being drawn: the run is complete without it."""
    try:
        yield
    except Exception as error:
        print(f"{out} is not drawn ({first_line(error)}), and the run is complete without it", file=sys.stderr)


def draw_run(run: Path) -> None:
    """Draw RUN/divergence.png, if that is possible."""
    with optional(run / "divergence.png"):
        plot([run], run / "divergence.png")


def plot(runs: list[Path], out: Path) -> None:
    """Draw divergence, the share of clients' own predictors, loss and kNN accuracy against rounds, a colour for each run.

    A thick line is the mean of the clients. Of one run, a thin line is a client; of several, a band reaches from the smallest client to the
    largest. Raises InputError if a run has no rounds.
    """
    settings = [read_options(run) for run in runs]
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else list(map(str, runs))
    with plotting().rc_context(STYLE):
        figure = new_figure(9, 11)
        axes = figure.subplots(4, 1, height_ratios=(2, 0.8, 1, 1), sharex=True)
        divergence, own, loss, accuracy = axes
        for place, (run, name, colour) in enumerate(zip(runs, names, COLOURS * len(runs))):
            rows = [row for row in read_metrics(run) if row["clients"]]
            if not rows:
                raise InputError(f"{run} has no rounds to draw")
            rounds = [row["round"] for row in rows]
            for axis, key in ((divergence, "divergence"), (loss, "loss")):
                label, width = (name, 1.8) if len(runs) > 1 else ("mean of the clients", 2.4)
                axis.plot(rounds, [mean(row[key]) for row in rows], color=colour, linewidth=width, label=label, zorder=3)
                if len(runs) == 1:
                    kept = "at or above $\\mu$: " * (settings[0]["predictor"] == "dapu") + "keeps its own predictor in its next round"
                    draw_clients(axis, rows, key, colour, kept if key == "divergence" else "")
                else:
                    draw_band(axis, rows, key, colour)
            # a run of an earlier version has no own_share
            shares = [100 * mean(row.get("own_share", [taken == "local" for taken in row["predictor"]])) for row in rows]
            size = 4 + 1.5 * min(len(runs) - 1 - place, 5)  # markers at the same place show around each other
            own.plot(rounds, shares, color=colour, marker="o", markersize=size)
            measured = [(row["round"], 100 * row["knn"]) for row in rows if row["knn"] is not None]
            accuracy.plot([round_ for round_, _ in measured], [knn for _, knn in measured], color=colour, marker="o", markersize=size)
        if len(runs) > 1:
            divergence.fill_between([], [], color="0.5", alpha=0.3, linewidth=0, label="from the smallest client to the largest")
        draw_thresholds(divergence, settings)
        units = " / ".join(sorted({UNITS[setting["divergence"]] for setting in settings}))
        divergence.set(ylabel=f"divergence in a round\n({units})", ylim=(0, None))
        own.set(ylabel="predictor: the\nclient's own (%)", ylim=(-6, 106))
        loss.set(ylabel="loss")
        accuracy.set(ylabel="kNN accuracy (%)", xlabel="round")
        accuracy.xaxis.get_major_locator().set_params(integer=True)
        scale = describe_scale(settings)
        figure.suptitle(f"{settings[0]['method']} {scale}" if len(runs) == 1 else capitalized(scale), fontsize=10)
        handles = {label: handle for handle, label in zip(*divergence.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if len(runs) == 1 else 3, frameon=False)
        save_figure(figure, out)


def draw_clients(axis: Axes, rows: list[dict], key: str, colour: str, own: str = "") -> None:
    """A thin line for each client through its rounds. own: label of circles around divergences by which it kept its predictor."""
    lines: dict[int, list[tuple[int, float]]] = {}
    circles = []
    for row in rows:
        decided_on = row.get("decided_on") or [None] * len(row["clients"])  # a run of an earlier version has none
        for client, value, taken, decided in zip(row["clients"], row[key], row["predictor"], decided_on):
            line = lines.setdefault(client, [])
            if taken == "local" and line:
                before, last = line[-1]
                circles.append((before, last if decided is None else decided))
            line.append((row["round"], value))
    for line in lines.values():
        axis.plot(*zip(*line), color=colour, linewidth=0.8, alpha=0.45, label="one client")
    if own and circles:
        axis.scatter(*zip(*circles), s=42, facecolors="none", edgecolors=colour, label=own)


def draw_band(axis: Axes, rows: list[dict], key: str, colour: str) -> None:
    """A band from the smallest client to the largest."""
    low, high = ([extreme(row[key]) for row in rows] for extreme in (min, max))
    axis.fill_between([row["round"] for row in rows], low, high, color=colour, alpha=0.15, linewidth=0.8)


def draw_thresholds(axis: Axes, settings: list[dict]) -> None:
    """A dashed line for each mu of DAPU, in the colour of its run, or grey if several runs have the same."""
    of_value: dict[float, list[str]] = {}
    for setting, colour in zip(settings, COLOURS * len(settings)):
        if setting["predictor"] == "dapu" and 0 < setting["mu"] < math.inf:
            of_value.setdefault(setting["mu"], []).append(colour)
    for mu, colours in of_value.items():
        colour = colours[0] if len(colours) == 1 else "0.3"
        axis.axhline(mu, color=colour, linestyle="--", linewidth=1.2, label=f"$\\mu$ = {mu:g}")


def plot_partition(counts: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """Draw how many images each client has, `[K, C]`: as a bar, or of each class as a shade where there are several."""
    with plotting().rc_context(STYLE):
        figure = new_figure(9, 5)
        axis = figure.subplots()
        if counts.shape[1] == 1:
            axis.bar(range(len(counts)), counts[:, 0], color=COLOURS[0])
            axis.set(xlabel="client", ylabel="images")
        else:
            shades = axis.imshow(counts.T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
            figure.colorbar(shades, label="images")
            axis.set(xlabel="client", ylabel="class")
            axis.grid(False)
            if len(classes) <= 30:
                axis.set_yticks(range(len(classes)), classes)
        axis.xaxis.get_major_locator().set_params(integer=True)
        save_figure(figure, out)


def plot_against(option: str, runs: list[Path], out: Path) -> None:
    """Draw accuracies with their deviation over seeds.

    option: `round` draws the kNN accuracy of each setting against rounds, `ablation` bars by aggregate, update and predictor, any option of
    fedu.py the accuracies against its values, a line for each setting of the other options. The last two have a panel for each evaluation
    that a run has, and a dashed line for an untrained encoder. Raises InputError for another option, and if there is nothing to draw.
    """
    groups = distinct_seeds(runs)
    if option not in ("round", "ablation", *groups[0][0]):
        raise InputError(f"--against got {option!r}, needs round, ablation or an option of fedu.py other than the seed, as in config.json")
    trained = [group for group in groups if is_trained(group[0])]
    if not trained:
        raise InputError(f"{runs[0]} has no rounds to draw")
    with plotting().rc_context(STYLE):
        if option == "round":
            figure = new_figure(8, 5)
            draw_knn(figure.subplots(), trained)
        else:
            names = drawn_evaluations(trained)
            bars = option == "ablation"
            rows, columns = (1, len(names)) if bars or len(names) == 1 else (math.ceil(len(names) / 2), 2)
            size = (4 + 2.4 * columns, 5) if bars else (4.6 * columns, 3.4 * rows) if rows > 1 else (8, 5)
            figure = new_figure(*size)
            axes = figure.subplots(rows, columns, sharey=bars, squeeze=False)
            for name, axis in zip(names, axes.flat):
                draw_evaluation(axis, name, groups, option)
            for axis in axes.flat[len(names) :]:
                axis.remove()
            if not bars:
                for axis in axes.flat[max(0, len(names) - columns) : len(names)]:  # the lowest of each column
                    axis.set(xlabel=option.replace("_", " "))
        figure.suptitle(capitalized(describe_scale([setting for setting, _ in groups])), fontsize=9)
        handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
        ncols = max(1, min(4, 108 // (max(map(len, handles)) + 8)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)
        save_figure(figure, out)


def drawn_evaluations(groups: list[Group]) -> list[str]:
    """The evaluations that at least half of these settings have; names the others on stderr. Raises InputError if there is none at all."""
    found = [{name for run in members for name in read_evaluations(run)} for _, members in groups]
    count = {name: sum(name in names for names in found) for name in evaluation_names(map(dict.fromkeys, found))}
    if not count:
        raise InputError(f"no run has an accuracy to draw: measure it with `python eval.py {groups[0][1][0]}`")
    least = min(len(groups) / 2, max(count.values()))
    for name in (name for name in count if count[name] < least):
        print(f"{name} is not drawn: {count[name]} of {len(groups)} settings have it", file=sys.stderr)
    return [name for name in count if count[name] >= least]


def draw_evaluation(axis: Axes, name: str, groups: list[Group], option: str) -> None:
    """A panel: the accuracies of one evaluation, against an option or as bars of the ablation."""
    measured = []
    for setting, members in groups:
        values = [100 * found[name] for found in map(read_evaluations, members) if name in found]
        measured += [(setting, values)] if values else []
    label = f"{name.replace('knn', 'kNN')} accuracy (%)"
    trained = [(setting, values) for setting, values in measured if is_trained(setting)]
    if option == "ablation":
        draw_bars(axis, trained)
        axis.set(xlabel=label)
    else:
        draw_sweep(axis, trained, option, [setting for setting, _ in groups if is_trained(setting)])
        axis.set(ylabel=label)
    for _, values in (group for group in measured if not is_trained(group[0])):
        line = axis.axvline if option == "ablation" else axis.axhline
        line(mean(values), color=COLOURS[-1], linestyle="--", linewidth=1.2, label="untrained encoder")


def draw_knn(axis: Axes, groups: list[Group]) -> None:
    """A line for each setting: kNN accuracy in the rounds that all of its seeds measured, with a band of the deviation over seeds.

    Where the local epochs differ, it is drawn against epochs, which cost the same in all settings.
    """
    differ = differing([setting for setting, _ in groups])
    in_epochs = "local_epochs" in differ
    for (colour, dashes), (setting, members) in zip(LOOKS * len(groups), groups):
        curves = [{row["round"] + 1: 100 * row["knn"] for row in read_metrics(run) if row["knn"] is not None} for run in members]
        rounds = sorted(set.intersection(*map(set, curves)))
        centre = np.array([mean([curve[round_] for curve in curves]) for round_ in rounds])
        spread = np.array([deviation([curve[round_] for curve in curves]) for round_ in rounds])
        places = [round_ * setting["local_epochs"] for round_ in rounds] if in_epochs else rounds
        axis.plot(places, centre, color=colour, linestyle=dashes, marker="o", markersize=3.5, label=name_setting(setting, differ))
        axis.fill_between(places, centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epochs over each client's images" if in_epochs else "rounds", ylabel="kNN accuracy of the backbone (%)")


def draw_bars(axis: Axes, measured: list[tuple[dict, list[float]]]) -> None:
    """A bar for each setting. measured: settings with the accuracies of their seeds, in %."""
    settings = [setting for setting, _ in measured]
    differ = [name for name in differing(settings) if name not in ABLATED]
    with_setting = differ or len({s["method"] for s in settings}) > 1
    names = [f"{name_setting(s, differ)}: " * bool(with_setting) + f"{s['aggregate']} to {s['update']}, {s['predictor']}" for s in settings]
    centre, spread = ([of(values) for _, values in measured] for of in (mean, deviation))
    bars = axis.barh(names, centre, xerr=spread, color=COLOURS[0], label="trained")
    axis.bar_label(bars, fmt="%.1f", padding=4)
    axis.yaxis.set_inverted(True)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    if axis.get_subplotspec().is_first_col():
        axis.set(ylabel="aggregated encoder to updated encoder, predictor")


def draw_sweep(axis: Axes, measured: list[tuple[dict, list[float]]], option: str, settings: list[dict]) -> None:
    """A line for each setting of the other options, at equal distances for the option's values.

    measured: settings with the accuracies of their seeds, in %. settings: all that the figure has, so that its panels have the same lines.
    """
    values = [describe_option(setting, option) for setting in sorted(settings, key=lambda setting: place_of(setting, option))]
    values = list(dict.fromkeys(values))
    lines: dict[str, dict[int, list[float]]] = {}
    name_of = line_names(settings, option)
    for setting, reached in measured:
        lines.setdefault(name_of(setting), {})[values.index(describe_option(setting, option))] = reached
    for colour, name in zip(COLOURS * len(settings), dict.fromkeys(map(name_of, settings))):
        if points := sorted(lines.get(name, {}).items()):
            places, reached = zip(*points)
            axis.errorbar(places, list(map(mean, reached)), list(map(deviation, reached)), color=colour, marker="o", capsize=4, label=name)
    axis.set_xticks(range(len(values)), values)


def place_of(setting: dict, option: str) -> tuple:
    """A key that sorts an option's values: numbers by size, with no limit at the end; text in the order of its choices."""
    value, choices = setting[option], list(OPTIONS[option].metadata["choices"])
    if isinstance(value, int | float):
        return 0, value
    return 1, value is None, choices.index(value) if value in choices else len(choices), describe_option(setting, option)


def line_names(settings: list[dict], option: str) -> Callable[[dict], str]:
    """A function that names a setting's line: its method and its values of the options in which the settings differ, except `option`.

    Local epochs are compared at the same number of rounds or, if that makes fewer lines, of epochs in all; and rounds likewise.
    """
    drawn = {"partition": ("partition", "classes_per_client", "alpha")}.get(option, (option,))
    differ = [k for k in differing(list(map(comparable, settings))) if k not in drawn]
    pair = ("rounds", "local_epochs")
    kinds = [[k for k in differ if k != "epochs"], *([[k for k in differ if k not in pair]] if option in pair else [])]

    def name(setting: dict, names: list[str]) -> str:
        return name_setting(comparable(setting) | ({"method": "trained"} if option == "method" else {}), names)

    names = min(kinds, key=lambda names: len({name(setting, names) for setting in settings}))
    return lambda setting: name(setting, names)


def comparable(setting: dict) -> dict:
    """A setting with its epochs in all, and without its classes per client if they are the default, 1/K of CIFAR's classes."""
    share = -(-CIFAR_CLASSES.get(setting["dataset"], 0) // setting["clients"])
    classes = setting["classes_per_client"] if setting["classes_per_client"] != share else None
    return setting | {"epochs": setting["rounds"] * setting["local_epochs"], "classes_per_client": classes}
