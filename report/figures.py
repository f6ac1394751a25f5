"""Figures of runs: curves over the rounds, and accuracies against an option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from options import ABLATED
from report.tables import (
    Group,
    by_setting,
    capitalized,
    describe_option,
    describe_scale,
    deviation,
    differing,
    is_trained,
    linear_accuracy,
    mean,
    name_setting,
    read_options,
)
from runtime.cli import InputError, write_atomic
from runtime.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = [(colour, dashes) for dashes in ("-", "--", ":") for colour in COLOURS]
UNITS = {"layer-mean": "mean L2 norm per convolution", "squared": "squared L2 norm of the encoder"}


def pyplot():
    """matplotlib.pyplot without a display, imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure in the format that the name of `out` ends in. Raises InputError if there is no such format."""
    kind, known = out.suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"--out got {out}, needs a name that ends in one of .{', .'.join(known)}")
    write_atomic(out, lambda file: figure.savefig(file, dpi=150, format=kind))
    pyplot().close(figure)


def plot(runs: list[Path], out: Path) -> None:
    """Draw divergence, the share of clients' own predictors, loss and kNN accuracy against rounds, a colour for each run.

    A thick line is the mean of the clients. Of one run, a thin line is a client; of several, a band reaches from the smallest client to the
    largest. Raises InputError if a run has no rounds.
    """
    from matplotlib.ticker import MaxNLocator

    plt = pyplot()
    settings = [read_options(run) for run in runs]
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else list(map(str, runs))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, 1, figsize=(9, 11), height_ratios=(2, 0.8, 1, 1), sharex=True, layout="constrained")
        divergence, own, loss, accuracy = axes
        for place, (run, name, colour) in enumerate(zip(runs, names, COLOURS * len(runs))):
            rows = [row for row in read_metrics(run) if row["clients"]]
            if not rows:
                raise InputError(f"{run} has no rounds to draw")
            rounds = [row["round"] for row in rows]
            for axis, key in ((divergence, "divergence"), (loss, "loss")):
                label, width = (name, 1.8) if len(runs) > 1 else ("mean of the clients", 2.4)
                axis.plot(rounds, [mean(row[key]) for row in rows], color=colour, linewidth=width, label=label, zorder=3)
                (draw_clients if len(runs) == 1 else draw_band)(axis, rows, key, colour)
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
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
        scale = describe_scale(settings)
        figure.suptitle(f"{settings[0]['method']} {scale}" if len(runs) == 1 else capitalized(scale), fontsize=10)
        handles = {label: handle for handle, label in zip(*divergence.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if len(runs) == 1 else 3, frameon=False)
        save_figure(figure, out)


def draw_clients(axis: Axes, rows: list[dict], key: str, colour: str) -> None:
    """A thin line for each client through its rounds, with a circle where it began a round with its own predictor."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for client, value in zip(row["clients"], row[key]):
            lines.setdefault(client, []).append((row["round"], value))
    for line in lines.values():
        axis.plot(*zip(*line), color=colour, linewidth=0.8, alpha=0.45, label="one client")
    own = [(row["round"], value) for row in rows for value, taken in zip(row[key], row["predictor"]) if taken == "local"]
    if own and key == "divergence":
        axis.scatter(*zip(*own), s=42, facecolors="none", edgecolors=colour, label="began the round with its own predictor")


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
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
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

    option: `round` draws the kNN accuracy of each setting against rounds, `ablation` bars of linear accuracy by aggregate, update and
    predictor, any option of fedu.py the linear accuracy against its values, a line for each method. In the last two, a dashed line is an
    untrained encoder. Raises InputError for another option, and if no run has rounds.
    """
    plt = pyplot()
    groups = by_setting(runs)
    if option not in ("round", "ablation") and any(option not in setting for setting, _ in groups):
        raise InputError(f"--against got {option!r}, needs round, ablation or an option of fedu.py as it is in config.json")
    trained = [group for group in groups if is_trained(group[0])]
    if not trained:
        raise InputError(f"{runs[0]} has no rounds to draw")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
        figure.suptitle(capitalized(describe_scale([setting for setting, _ in groups])), fontsize=9)
        if option == "round":
            draw_knn(axis, trained)
        else:
            accuracies = [[linear_accuracy(run) for run in members] for _, members in trained]
            (draw_bars if option == "ablation" else partial(draw_sweep, option=option))(axis, trained, accuracies)
            for _, members in (group for group in groups if not is_trained(group[0])):
                line = axis.axvline if option == "ablation" else axis.axhline
                level = mean([linear_accuracy(run) for run in members])
                line(level, color=COLOURS[-1], linestyle="--", linewidth=1.2, label="untrained encoder")
        longest = max(len(label) for label in axis.get_legend_handles_labels()[1])
        figure.legend(loc="outside lower center", ncols=max(1, min(4, 108 // (longest + 8))), frameon=False)
        save_figure(figure, out)


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


def draw_bars(axis: Axes, groups: list[Group], accuracies: list[list[float]]) -> None:
    """A bar for each setting. accuracies: of each setting's seeds, in %."""
    settings = [setting for setting, _ in groups]
    differ = [name for name in differing(settings) if name not in ABLATED]
    with_setting = differ or len({s["method"] for s in settings}) > 1
    names = [f"{name_setting(s, differ)}: " * bool(with_setting) + f"{s['aggregate']} to {s['update']}, {s['predictor']}" for s in settings]
    places, spread = range(len(names)), [deviation(values) for values in accuracies]
    bars = axis.barh(places, [mean(values) for values in accuracies], xerr=spread, color=COLOURS[0], label="trained")
    axis.bar_label(bars, fmt="%.1f", padding=4)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    axis.set(xlabel="linear accuracy (%)", ylabel="aggregated encoder to updated encoder, predictor")


def draw_sweep(axis: Axes, groups: list[Group], accuracies: list[list[float]], option: str) -> None:
    """A point for each setting, at equal distances for the option's values that occur, so that 0 and infinity have a place."""
    values = sorted({setting[option] for setting, _ in groups}, key=lambda value: (value is not None, value))
    for colour, method in zip(COLOURS * len(groups), dict.fromkeys(setting["method"] for setting, _ in groups)):
        measured = [(setting[option], reached) for (setting, _), reached in zip(groups, accuracies) if setting["method"] == method]
        points = sorted((values.index(value), mean(reached), deviation(reached)) for value, reached in measured)
        places, centre, spread = zip(*points)
        axis.errorbar(places, centre, spread, color=colour, marker="o", capsize=4, label=method)
    axis.set_xticks(range(len(values)), [describe_option({option: value}, option) for value in values])
    axis.set(xlabel=option.replace("_", " "), ylabel="linear accuracy (%)")
