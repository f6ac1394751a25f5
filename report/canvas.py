"""What all figures share: colours, sizes, legends that fit, axes of numbers, and the files that they are written to."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import InputError, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_COLOURS = dict(zip(("fedu", "fedbyol", "fedema", "fedsimsiam", "single", "fedsimclr", "central"), COLOURS))
METHOD_COLOURS |= {"fedmoco-v1": "#882255", "fedmoco-v2": "#999933", "fedca": "#6A3D9A", "fedavg-supervised": "#8C564B"}
METHOD_COLOURS |= {"fedx": "#117733", "orchestra": "#BBAA33", "fedbarlow": "#AA4499", "fedalignuniform": "#44AA99"}
METHOD_COLOURS |= {"fedu2": "#332288", "ldawa": "#661100"}
OTHER = "#777777"  # of a method that is not in this table
DASHES, MARKERS = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), "os^Dv<>"
FONTS = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}  # TrueType, and text that stays text


def plotting():
    """matplotlib, imported only when something is drawn."""
    backend = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    import matplotlib

    if backend:  # of a notebook, perhaps, and unknown here: matplotlib's import would raise. Figures are files and need none
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def style(width: float):
    """The context in which a figure of this width, in inches, is drawn and saved: a narrow one has smaller letters and thinner lines."""
    font = min(11, max(6, 11 * math.sqrt(width / 8)))
    sizes = {
        "font.size": font,
        "lines.linewidth": font / 6.5,
        "lines.markersize": font / 2,
        "xtick.labelsize": font,
        "ytick.labelsize": font,
    }
    return plotting().rc_context(
        sizes | FONTS | {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.ymargin": 0.1}
    )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that Agg draws whatever MPLBACKEND says. pyplot, and so a notebook's own figures, are left alone."""
    plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save_figure(figure: Figure, out: Path | BytesIO) -> None:
    """Write a figure in the format that the name of `out` ends in; a BytesIO takes SVG. Raises InputError if there is no such format."""
    if isinstance(out, BytesIO):
        return figure.savefig(out, format="svg")
    kind, known = out.suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"--out got {out}, needs a name that ends in one of .{', .'.join(known)}")
    write_atomic(out, lambda file: figure.savefig(file, dpi=150, format=kind))


def looks(methods: Iterable[str]) -> list[dict[str, Any]]:
    """How each line looks: the colour of its method, and among lines of one method another shade, dash and marker."""
    colours = [METHOD_COLOURS.get(method, OTHER) for method in methods]
    total, seen = Counter(colours), Counter()
    found = []
    for colour in colours:
        place = seen[colour]
        shade = 0 if total[colour] == 1 else 0.85 * place / (total[colour] - 1) - 0.5  # from darker to lighter
        rgb = plotting().colors.to_rgb(colour)
        mixed = tuple(value + ((1 if shade > 0 else 0) - value) * abs(shade) for value in rgb)
        found.append({"color": mixed, "linestyle": DASHES[place % len(DASHES)], "marker": MARKERS[place % len(MARKERS)]})
        seen[colour] += 1
    return found


def finish(figure: Figure, title: str, fixed: bool) -> None:
    """Add the title and the legend, and make all texts fit. fixed: whether the height must stay, else it grows by the legend's."""
    plotting()
    renderer, font = figure.canvas.get_renderer(), plotting().rcParams["font.size"]
    if title:
        figure.suptitle(textwrap.fill(title, int(figure.bbox.width * 1.8 / (font * 0.85) / figure.dpi * 72)), fontsize=0.85 * font)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    ways = [(size, ncols) for size in (0.95 * font, 0.8 * font, 0.65 * font, 0.5 * font) for ncols in range(min(6, len(handles)), 0, -1)]
    for size, ncols in ways if handles else []:
        labels = [textwrap.fill(label, 60) for label in handles]
        legend = figure.legend(
            handles.values(), labels, loc="outside lower center", ncols=ncols, fontsize=size, frameon=False, columnspacing=1.2
        )
        box = legend.get_window_extent(renderer)
        if (size, ncols) == ways[-1] or (box.width < figure.bbox.width and not (fixed and box.height > 0.35 * figure.bbox.height)):
            break
        legend.remove()
    if handles and not fixed:
        figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
    figure.draw_without_rendering()
    for axis in figure.axes:
        for label, room in ((axis.yaxis.label, axis.bbox.height), (axis.xaxis.label, axis.bbox.width)):
            box = label.get_window_extent(renderer)
            if (length := box.height if label is axis.yaxis.label else box.width) > room:
                label.set_fontsize(max(4, label.get_fontsize() * room / length))
        thin_ticks(axis, renderer)


def thin_ticks(axis: Axes, renderer) -> None:
    """Leave out labels of a `number_axis` that would overlap; the first and the last stay. Of other axes, nothing overlaps."""
    labels = [label for label in axis.get_xticklabels() if label.get_text()]
    if not labels or axis.xaxis.get_major_locator().__class__.__name__ != "FixedLocator":
        return
    boxes = [label.get_window_extent(renderer) for label in labels]
    end, gap = boxes[0].x1, 0.3 * labels[0].get_fontsize()
    for label, box in zip(labels[1:-1], boxes[1:-1]):
        if box.x0 < end + gap or box.x1 > boxes[-1].x0 - gap:
            label.set_visible(False)
        else:
            end = box.x1


def number_axis(axis: Axes, values: list[float | None], words: list[str], label: str) -> tuple[list[float], set[float]]:
    """Give an x axis a tick for each value; returns the values' places, and those places that stand apart.

    Numbers over a factor of ten or more lie on a log scale. What has no place among the others, which is infinity, no limit (None) and on
    a log scale 0, stands apart at an end, behind a dotted line. values: from the smallest to infinity and None. words: their ticks' texts.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    log = len(positive) > 0 and finite[0] >= 0 and positive[-1] >= 10 * positive[0]
    inner = [math.log10(value) for value in positive] if log else finite
    gap = 0.18 * (max(inner) - min(inner)) if len(inner) > 1 else 1
    before = [min(inner, default=0) - gap] * (len(finite) - len(inner))
    after = [max(inner, default=0) + step * gap for step in range(1, len(values) - len(finite) + 1)]
    for place, side in [*((place, 1) for place in before), *((place, -1) for place in after)]:
        axis.axvline(place + side * gap / 2, color="0.6", linestyle=":", linewidth=1)
    places = [*before, *inner, *after]
    axis.set_xticks(places, words)
    axis.set(xlabel=label + " (log scale)" * log)
    return places, {*before, *after}
