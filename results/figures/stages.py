"""Draws stages.png, the four stages of a round: `python results/figures/stages.py`."""

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.cli import write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

ENCODER, PREDICTOR, TARGET, INK = "#0072B2", "#D55E00", "#009E73", "#222222"  # colour-blind readers can tell them apart


def box(x: float, y: float, width: float, height: float, text: str = "", colour: str = INK, fill: str = "white") -> None:
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", ec=colour, fc=fill, lw=1.4))
    axis.text(x + width / 2, y + height / 2, text, color="white" if fill == colour else INK, ha="center", va="center", linespacing=1.25)


def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = INK, width: float = 1.4, dashes: str = "-") -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width, "ls": dashes, "shrinkA": 0, "shrinkB": 0})


def stage(number: int, x: float, y: float, name: str) -> None:
    axis.text(x, y, str(number), color="white", ha="center", va="center", weight="bold", bbox={"boxstyle": "circle,pad=0.25", "fc": INK})
    axis.text(x + 0.22, y, name, ha="left", va="center", weight="bold")


plt.rcParams |= {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK}
figure = plt.figure(figsize=(9, 4.5))
axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 4.5))
axis.axis("off")

for shift in (0.16, 0.08, 0):  # the other clients lie behind
    box(0.1 + shift, 0.1 + shift, 5.0, 4.1, colour="#777777" if shift else INK)
box(7.0, 0.1, 1.9, 4.26)
axis.text(4.95, 3.98, "client k", ha="right", va="center", weight="bold")
axis.text(7.95, 3.98, "server", ha="center", va="center", weight="bold")

stage(1, 0.35, 3.98, "local training")
for tile in range(9):
    place = (0.3 + tile % 3 * 0.22, 2.75 + tile // 3 * 0.22)
    axis.add_patch(plt.Rectangle(place, 0.19, 0.19, color=str(0.45 + tile * 2 % 5 * 0.1)))
axis.text(0.62, 2.6, "images stay", ha="center", va="center")
box(1.5, 3.2, 1.3, 0.45, "online encoder", ENCODER, ENCODER)
box(3.15, 3.2, 0.9, 0.45, "predictor", PREDICTOR, PREDICTOR)
box(1.5, 2.15, 1.3, 0.55, "target encoder\n(EMA)", TARGET, TARGET)
box(4.35, 2.75, 0.55, 0.4, "loss")
arrow((0.97, 3.15), (1.5, 3.42))
arrow((0.97, 3.0), (1.5, 2.5))
arrow((2.8, 3.42), (3.15, 3.42))
arrow((4.05, 3.42), (4.55, 3.15))
arrow((2.8, 2.42), (4.35, 2.87))
arrow((2.15, 3.2), (2.15, 2.7), TARGET, dashes="--")

axis.plot((0.3, 4.9), (1.92, 1.92), color="#bbbbbb", lw=0.8)
stage(4, 0.35, 1.68, "model update with DAPU")
for y, colour, part, rule in (
    (1.32, ENCODER, "online encoder", "takes the averaged online encoder"),
    (0.88, PREDICTOR, "predictor", "divergence $d_k < \\mu$: takes the averaged predictor,\nelse keeps its own"),
    (0.42, TARGET, "target encoder", "keeps its own"),
):
    axis.text(0.35, y, part, color=colour, va="center", weight="bold")
    axis.text(1.75, y, rule, va="center", linespacing=1.25)

stage(2, 5.5, 3.98, "model upload")
arrow((5.28, 3.42), (6.98, 3.42), width=2)
axis.text(6.12, 3.42, "online encoder,\npredictor, $n_k$", ha="center", va="center", linespacing=2)
arrow((7.0, 0.95), (5.28, 0.95), width=2)
axis.text(6.12, 1.12, "averages", ha="center", va="center")

stage(3, 7.3, 2.85, "aggregation")
axis.text(7.95, 2.38, "average weighted by\n$n_k\\,/\\,n$, the client's\nshare of all images", ha="center", va="center", linespacing=1.25)
box(7.3, 1.3, 1.3, 0.45, "online encoder", ENCODER, ENCODER)
box(7.3, 0.7, 1.3, 0.45, "predictor", PREDICTOR, PREDICTOR)

write_atomic(Path(__file__).with_suffix(".png"), lambda file: figure.savefig(file, dpi=200, format="png", metadata={"Software": None}))
