"""Figures of runs: curves over the rounds, and accuracies against an option."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from options import ABLATED, METHODS, OPTIONS
from report.canvas import COLOURS, MARKERS, METHOD_COLOURS, OTHER, finish, looks, new_figure, number_axis, save_figure, style
from report.tables import (
    Group,
    capitalized,
    count_seeds,
    describe_option,
    describe_scale,
    deviation,
    differing,
    distinct_seeds,
    evaluation_names,
    is_trained,
    line_names,
    mean,
    name_setting,
    read_evaluations,
    read_options,
)
from runtime.cli import InputError, first_line
from runtime.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {"layer-mean": "mean L2 norm per convolution", "squared": "squared L2 norm of the encoder"}
Size = tuple[float, float] | None  # width and height in inches, or None for the figure's own


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


def plot(runs: list[Path], out: Path | BytesIO, size: Size = None, title: bool = True) -> None:
    """Draw divergence, the share of clients' own predictors, loss and kNN accuracy against rounds; losses of each objective have a panel.

    Of one run, thin lines are clients and a thick one is their mean. Of several, each setting has a line, the mean over clients and seeds,
    with a band of the deviation over seeds; if no setting has several seeds, from the smallest client to the largest. Raises InputError if
    a run has no rounds.
    """
    groups = [(setting, [read_rounds(run) for run in members]) for setting, members in distinct_seeds(runs, finished=False)]
    settings = [setting for setting, _ in groups]
    objectives = list(dict.fromkeys(map(objective_of, settings)))
    single, seeds = len(groups) == 1 and len(groups[0][1]) == 1, max(len(members) for _, members in groups)
    ratios = (2, 0.8, *[1] * len(objectives), 1)
    width, height = size or (9, 2 * sum(ratios))
    with style(width):
        figure = new_figure(width, height)
        divergence, own, *losses, accuracy = figure.subplots(len(ratios), 1, height_ratios=ratios, sharex=True)
        names = [f"{name_setting(setting, differing(settings))} ({count_seeds(members)})" for setting, members in groups]
        names = ["mean of the clients"] if single else names
        for (setting, members), name, look in zip(groups, names, looks(setting["method"] for setting in settings)):
            loss = losses[objectives.index(objective_of(setting))]
            for axis, key in ((divergence, "divergence"), (loss, "loss")):
                curves = [{row["round"]: mean(row[key]) for row in rows} for rows in members]
                draw_seeds(axis, curves, look | {"label": name} | ({"marker": ""} if single else {}))
                if single:
                    kept = "at or above $\\mu$: " * (setting["predictor"] == "dapu") + "keeps its own predictor in its next round"
                    draw_clients(axis, members[0], key, look["color"], kept if key == "divergence" else "")
                elif seeds == 1:
                    draw_band(axis, members[0], key, look["color"], alpha=0.3 / len(groups))
            draw_seeds(own, [{row["round"]: 100 * own_share(row) for row in rows} for rows in members], look)
            draw_seeds(accuracy, [{row["round"]: 100 * row["knn"] for row in rows if row["knn"] is not None} for rows in members], look)
        draw_thresholds(divergence, settings)
        if not single:
            what = "from the smallest client to the largest" if seeds == 1 else "deviation over seeds"
            divergence.fill_between([], [], color="0.5", alpha=0.3, linewidth=0, label=what)
        units = " / ".join(sorted({UNITS[setting["divergence"]] for setting in settings}))
        divergence.set(ylabel=f"divergence\n({units})", ylim=(0, None))
        own.set(ylabel="own\npredictor (%)", ylim=(-8, 108))
        for axis, objective in zip(losses, objectives):
            axis.set(ylabel=f"loss\n({objective})" if len(losses) > 1 else "loss")
        accuracy.set(ylabel="kNN (%)", xlabel="round")
        accuracy.xaxis.get_major_locator().set_params(integer=True)
        scale = describe_scale(settings)
        finish(figure, (f"{settings[0]['method']} {scale}" if len(groups) == 1 else capitalized(scale)) if title else "", fixed=bool(size))
        if single:
            number_lines(divergence, groups[0][1][0], "divergence")
            number_lines(losses[0], groups[0][1][0], "loss")
        save_figure(figure, out)


def read_rounds(run: Path) -> list[dict]:
    """The rounds of a run in which a client reported. Raises InputError if there is none."""
    rows = [row for row in read_metrics(run) if row["clients"]]
    if not rows:
        raise InputError(f"{run} has no rounds to draw")
    return rows


def objective_of(setting: dict) -> str:
    """The objective whose loss a run has, by the name of its class."""
    return METHODS[setting["method"]].objective.split(":")[-1] if setting["method"] in METHODS else setting["method"]


def own_share(row: dict) -> float:
    """The share of their own predictors that the clients began a round with; a run of an earlier version does not have it as a number."""
    return mean(row.get("own_share", [taken == "local" for taken in row["predictor"]]))


def draw_seeds(axis: Axes, curves: list[dict[float, float]], look: dict[str, Any]) -> None:
    """A line through the means over seeds, with a band of their deviation, at the places that all of the seeds have."""
    places = sorted(set.intersection(*map(set, curves)))
    centre, spread = (np.array([of([curve[place] for curve in curves]) for place in places]) for of in (mean, deviation))
    axis.plot(places, centre, markevery=-(-len(places) // 12) or 1, markerfacecolor="none", zorder=3, **look)
    if len(curves) > 1:
        axis.fill_between(places, centre - spread, centre + spread, color=look["color"], alpha=0.2, linewidth=0)


def draw_clients(axis: Axes, rows: list[dict], key: str, colour: str, own: str = "") -> None:
    """A thin line for each client, with its number. own: label of circles around divergences by which it kept its predictor."""
    for line in client_lines(rows, key).values():
        width = 0.07 * axis.yaxis.label.get_fontsize()
        axis.plot(*zip(*line), color=colour, linewidth=width, alpha=0.45, label="one client, with its number")
    last: dict[int, tuple[int, float]] = {}
    circles = []
    for row in rows:
        decided_on = row.get("decided_on") or [None] * len(row["clients"])  # a run of an earlier version has none
        for client, value, taken, decided in zip(row["clients"], row[key], row["predictor"], decided_on):
            if taken == "local" and client in last:
                circles.append((last[client][0], last[client][1] if decided is None else decided))
            last[client] = row["round"], value
    if own and circles:
        axis.scatter(*zip(*circles), s=0.36 * axis.yaxis.label.get_fontsize() ** 2, facecolors="none", edgecolors=colour, label=own)


def number_lines(axis: Axes, rows: list[dict], key: str) -> None:
    """Write each client's number beside that end of the lines where they lie further apart; a number that finds no room is left out."""
    lines = client_lines(rows, key)
    if not lines:
        return
    end = max((0, -1), key=lambda end: np.ptp([line[end][1] for line in lines.values()]))
    font = 0.65 * axis.yaxis.label.get_fontsize()
    free: dict[float, float] = {}  # the lowest free height, in points, at each round
    for client, (x, y) in sorted(((client, line[end]) for client, line in lines.items()), key=lambda item: item[1][1]):
        height = axis.transData.transform((x, y))[1] * 72 / axis.figure.dpi
        place = max(height, free.get(x, -math.inf))
        if place < height + 3 * font:
            free[x] = place + font
            offset, side = (4 if end else -4, place - height), "left" if end else "right"
            text = axis.annotate(str(client), (x, y), offset, textcoords="offset points", ha=side, va="center", fontsize=font)
            text.set_in_layout(False)


def client_lines(rows: list[dict], key: str) -> dict[int, list[tuple[int, float]]]:
    """Each client's rounds with its values, of those that a client told."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for client, value in zip(row["clients"], row[key]):
            if value is not None:
                lines.setdefault(client, []).append((row["round"], value))
    return lines


def draw_band(axis: Axes, rows: list[dict], key: str, colour: str, alpha: float) -> None:
    """A band from the smallest client to the largest."""
    low, high = ([extreme((v for v in row[key] if v is not None), default=math.nan) for row in rows] for extreme in (min, max))
    axis.fill_between([row["round"] for row in rows], low, high, color=colour, alpha=alpha, linewidth=0.8)


def draw_thresholds(axis: Axes, settings: list[dict]) -> None:
    """A dotted line for each mu of DAPU, in the colour of its setting, or grey if several settings have the same."""
    of_value: dict[float, list] = {}
    for setting, look in zip(settings, looks(setting["method"] for setting in settings)):
        if setting["predictor"] == "dapu" and 0 < setting["mu"] < math.inf:
            of_value.setdefault(setting["mu"], []).append(look["color"])
    for mu, colours in of_value.items():
        label = f"$\\mu$ = {mu:g}" if len(of_value) == 1 else "$\\mu$ of the line in its colour"
        axis.axhline(mu, color=colours[0] if len(colours) == 1 else "0.3", linestyle=":", label=label)


def plot_spectra(spectra: dict[Path, dict], out: Path, size: Size = None, title: bool = True) -> None:
    """Draw the singular values of the features' covariance, a line for each run, and beside them its alignment against its uniformity.

    spectra: a row of eval.jsonl for each run, all of the same kind of features and of the same images. A singular value of 0, which has no
    place on the log scale, ends a line.
    """
    groups, row = distinct_seeds(list(spectra)), next(iter(spectra.values()))
    settings = [setting for setting, members in groups for _ in members]
    runs = [run for _, members in groups for run in members]
    width, height = size or (9, 4.4)
    with style(width):
        figure = new_figure(width, height)
        values, spread = figure.subplots(1, 2, width_ratios=(1.6, 1))
        for run, setting, look, marker in zip(runs, settings, looks(s["method"] for s in settings), cycle(MARKERS)):
            found, look["marker"] = spectra[run], marker  # points that lie on each other stay apart by their form
            drawn = [value or math.nan for value in found["singular_values"]]
            name = name_spectrum(setting, settings) + f", seed {read_options(run)['seed']}" * (settings.count(setting) > 1)
            label = f"{name}: rank {found['rank']:.1f} of {found['width']}"
            values.plot(range(1, len(drawn) + 1), drawn, markevery=-(-len(drawn) // 8), markerfacecolor="none", label=label, **look)
            hollow = {"markersize": 10, "markeredgewidth": 2, "markerfacecolor": "none", "linestyle": ""}
            spread.plot(found["uniformity"], found["alignment"], **look | hollow)
        values.set(yscale="log", xlabel="index of the singular value", ylabel="singular value of the covariance")
        spread.set(xlabel="uniformity (less is better)", ylabel="alignment (less is better)")
        what = f"{row['features']} features of {row['images']:,} {row['split']} images"
        what += f" of {Path(row['dataset']).stem}" * (row["dataset"] != settings[0]["dataset"])
        finish(figure, f"{capitalized(describe_scale(settings))}; {what}" if title else "", fixed=bool(size))
        save_figure(figure, out)


def name_spectrum(setting: dict, settings: list[dict]) -> str:
    """The name of a setting's line. For an untrained encoder, only options of the encoder mean something."""
    differ = differing(settings)
    return name_setting(setting, differ if is_trained(setting) else [k for k in differ if k in ("dataset", "encoder", "norm", "init")])


def plot_partition(counts: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """Draw how many images each client has, `[K, C]`: as a bar, or of each class as a shade where there are several."""
    with style(9):
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


def plot_against(option: str, runs: list[Path], out: Path | BytesIO, size: Size = None, title: bool = True) -> None:
    """Draw accuracies with their deviation over seeds.

    option: `round` draws the kNN accuracy of each setting against rounds, `ablation` bars by aggregate, update and predictor, any option of
    fedu.py the accuracies against its values, a line for each setting of the other options. The last two have a panel for each evaluation
    that most settings have, and a dashed line for an untrained encoder. Raises InputError for another option, and if nothing is to draw.
    """
    groups = distinct_seeds(runs)
    if option not in ("round", "ablation", *groups[0][0]):
        raise InputError(f"--against got {option!r}, needs round, ablation or an option of fedu.py other than the seed, as in config.json")
    trained = [group for group in groups if is_trained(group[0])]
    if not trained:
        raise InputError(f"{runs[0]} has no rounds to draw")
    names, bars = [""] if option == "round" else drawn_evaluations(trained), option == "ablation"
    rows, columns = (1, len(names)) if bars or len(names) == 1 else (math.ceil(len(names) / 2), 2)
    width, height = size or (
        (4 + 2.4 * columns, 1.2 + 0.3 * len(trained)) if bars else (8, 4.3) if rows == columns == 1 else (8, 2.8 * rows)
    )
    with style(width):
        figure = new_figure(width, height)
        axes = figure.subplots(rows, columns, sharey=bars, squeeze=False)
        for axis in axes.flat[len(names) :]:
            axis.remove()
        for name, axis in zip(names, axes.flat):
            if option == "round":
                draw_knn(axis, trained)
            else:
                draw_evaluation(axis, name, groups, option)
        if not bars:
            for axis in axes.flat[: max(0, len(names) - columns)]:
                axis.set(xlabel="")  # which only the lowest of a column needs
        finish(figure, capitalized(describe_scale([setting for setting, _ in groups])) if title else "", fixed=bool(size))
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
        line(mean(values), color=OTHER, linestyle="--", linewidth=1.2, label="untrained encoder")


def draw_knn(axis: Axes, groups: list[Group]) -> None:
    """A line for each setting: kNN accuracy in the rounds that all of its seeds measured, with a band of the deviation over seeds.

    Where the local epochs differ, it is drawn against epochs, which cost the same in all settings.
    """
    differ = differing([setting for setting, _ in groups])
    in_epochs = "local_epochs" in differ
    for (setting, members), look in zip(groups, looks(setting["method"] for setting, _ in groups)):
        step = setting["local_epochs"] if in_epochs else 1
        curves = [{(row["round"] + 1) * step: 100 * row["knn"] for row in read_metrics(run) if row["knn"] is not None} for run in members]
        draw_seeds(axis, curves, look | {"label": f"{name_setting(setting, differ)} ({count_seeds(members)})"})
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epochs over each client's images" if in_epochs else "rounds", ylabel="kNN accuracy of the backbone (%)")


def draw_bars(axis: Axes, measured: list[tuple[dict, list[float]]]) -> None:
    """A bar for each setting. measured: settings with the accuracies of their seeds, in %."""
    settings = [setting for setting, _ in measured]
    differ = [name for name in differing(settings) if name not in ABLATED]
    with_setting = differ or len({s["method"] for s in settings}) > 1
    names = [f"{name_setting(s, differ)}: " * bool(with_setting) + f"{s['aggregate']} to {s['update']}, {s['predictor']}" for s in settings]
    centre, spread = ([of(values) for _, values in measured] for of in (mean, deviation))
    bars = axis.barh(
        names, centre, xerr=spread, color=[METHOD_COLOURS.get(s["method"], OTHER) for s in settings], label=[s["method"] for s in settings]
    )
    axis.bar_label(bars, fmt="%.1f", padding=4)
    axis.yaxis.set_inverted(True)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.1)
    if axis.get_subplotspec().is_first_col():
        axis.set(ylabel="aggregated encoder to updated encoder, predictor")


def draw_sweep(axis: Axes, measured: list[tuple[dict, list[float]]], option: str, settings: list[dict]) -> None:
    """A line for each setting of the other options, through the values that are numbers with a place among each other.

    measured: settings with the accuracies of their seeds, in %. settings: all that the figure has, so that its panels have the same lines.
    """
    words = {describe_option(setting, option): setting for setting in sorted(settings, key=lambda setting: place_of(setting, option))}
    values = [setting[option] for setting in words.values()]
    if any(isinstance(value, str | bool | dict) for value in values):
        axis.set_xticks(range(len(words)), [textwrap.fill(word, 14) for word in words])
        axis.set(xlabel=option.replace("_", " "))
        places, apart = list(range(len(words))), set(range(len(words)))
    else:
        places, apart = number_axis(axis, values, list(words), option.replace("_", " "))
    place = dict(zip(words, places))
    name_of = line_names(settings, option)
    methods = {name_of(setting): setting["method"] for setting in settings}
    for name, look in zip(methods, looks(methods.values())):
        points = []
        for x, values in sorted((place[describe_option(s, option)], values) for s, values in measured if name_of(s) == name):
            if points and {x, points[-1][0]} & apart:
                points.append((x, math.nan, math.nan))  # which breaks the line
            points.append((x, mean(values), deviation(values)))
        if points:
            axis.errorbar(*zip(*points), capsize=4, markerfacecolor="none", label=name, **look)


def place_of(setting: dict, option: str) -> tuple:
    """A key that sorts an option's values: numbers by size, with no limit at the end; text in the order of its choices."""
    value, choices = setting[option], list(OPTIONS[option].metadata["choices"])
    if isinstance(value, int | float):
        return 0, value
    return 1, value is None, choices.index(value) if value in choices else len(choices), describe_option(setting, option)
