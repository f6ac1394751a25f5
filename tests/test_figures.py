"""Figures that cannot mislead, and fit a paper."""

import json
import math

import pytest
from conftest import refused, run
from test_report import drawn, linear, metrics, write_run  # noqa: F401
from test_tables import spectrum

from report import figures
from runtime.cli import InputError


def lines_of(axis) -> dict[str, list[tuple]]:
    """The points of each line with error bars, by its label; a place on the axis is told by its tick's label."""
    ticks = {place: text.get_text() for place, text in zip(axis.get_xticks(), axis.get_xticklabels())}
    return {bars.get_label(): [(ticks.get(x, x), y) for x, y in zip(*bars.lines[0].get_data()) if y == y] for bars in axis.containers}


def test_against_has_a_line_for_each_setting_of_the_other_options(tmp_path, drawn):  # noqa: F811
    runs = [
        write_run(tmp_path / f"{mu}-{lr}", [linear(mu / 2 + lr)], mu=mu, lr=lr) for mu in (0.4, 0.8) for lr in (0.125, 0.25)
    ]  # fmt: skip
    figures.plot_against("mu", runs, tmp_path / "x.png")
    (axis,) = drawn[0].axes
    assert lines_of(axis) == {
        "fedu, lr 0.125": [("0.4", pytest.approx(32.5)), ("0.8", pytest.approx(52.5))],
        "fedu, lr 0.25": [("0.4", pytest.approx(45)), ("0.8", pytest.approx(65))],
    }


def test_against_local_epochs_compares_what_cost_the_same(tmp_path, drawn):  # noqa: F811
    """With as many epochs in all, the rounds differ too, and yet it is one line; with as many rounds it is the rounds that stay."""
    same_epochs = [write_run(tmp_path / f"a{e}", [linear(0.5)], rounds=3, local_epochs=e) for e in (2, 4)]
    figures.plot_against("local_epochs", same_epochs, tmp_path / "x.png")
    other = write_run(tmp_path / "b", [linear(0.75)], local_epochs=1)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rounds": 3', '"rounds": 12'))
    figures.plot_against("local_epochs", [same_epochs[1], other], tmp_path / "x.png")
    assert [list(lines_of(figure.axes[0])) for figure in drawn] == [["fedu"], ["fedu"]]
    assert [[x for x, _ in lines_of(figure.axes[0])["fedu"]] for figure in drawn] == [["2", "4"], ["1", "4"]]


def test_against_clients_with_an_equal_share_of_the_classes_is_one_line(tmp_path, drawn):  # noqa: F811
    shares = ((2, 5), (5, None), (10, 1), (20, 1))
    runs = [write_run(tmp_path / f"{k}", [linear(0.5)], clients=k, classes_per_client=classes) for k, classes in shares]
    figures.plot_against("clients", runs, tmp_path / "x.png")
    assert lines_of(drawn[0].axes[0]) == {"fedu": [("2", 50), ("5", 50), ("10", 50), ("20", 50)]}


def test_against_an_option_that_is_text(tmp_path, drawn):  # noqa: F811
    runs = [
        write_run(tmp_path / "iid", [linear(0.75)], partition="iid"),
        write_run(tmp_path / "classes", [linear(0.5)]),
        write_run(tmp_path / "alpha", [linear(0.625)], partition="dirichlet", alpha=0.1),
    ]
    figures.plot_against("partition", runs, tmp_path / "x.png")
    assert set(lines_of(drawn[0].axes[0])["fedu"]) == {("1/K of the\nclasses each", 50), ("iid", 75), ("dirichlet 0.1", 62.5)}
    figures.plot_against(
        "settings", [runs[0], write_run(tmp_path / "jitter", [linear(0.5)], partition="iid", settings={"jitter": 0.5})], "x.png"
    )
    assert lines_of(drawn[1].axes[0]) == {"fedu": [("-", 75), ("jitter=0.5", 50)]}


def test_against_has_a_panel_for_each_evaluation_that_exists(tmp_path, drawn, capsys):  # noqa: F811
    knn = {"evaluation": "knn", "features": "backbone", "dataset": "cifar10", "accuracy": 0.25}
    semi = {"evaluation": "semi 0.1", "head": "linear", "dataset": "cifar10", "epochs": 100, "accuracy": 0.375}
    one, two = (
        write_run(tmp_path / "one", [linear(0.5, epochs=1), knn, semi]),
        write_run(tmp_path / "two", [knn, linear(0.5, epochs=1)], mu=1),
    )
    untrained = write_run(tmp_path / "untrained", [knn], rounds=0, method="untrained")
    figures.plot_against("mu", [one, two, untrained], tmp_path / "x.png")
    panels = {axis.get_ylabel(): lines_of(axis) for axis in drawn[0].axes}
    assert panels == {
        "linear, epochs 1 accuracy (%)": {"fedu": [("0.4", 50), ("1", 50)]},
        "kNN accuracy (%)": {"fedu": [("0.4", 25), ("1", 25)]},
        "semi 0.1 accuracy (%)": {"fedu": [("0.4", 37.5)]},
    }
    assert capsys.readouterr().err == ""
    figures.plot_against("ablation", [one, two], tmp_path / "x.png")
    assert [[bar.get_width() for bar in axis.patches] for axis in drawn[1].axes] == [[50, 50], [25, 25], [37.5]]
    figures.plot_against("mu", [one, two, write_run(tmp_path / "three", [knn], mu=2)], tmp_path / "x.png")
    assert [axis.get_ylabel()[:6] for axis in drawn[2].axes] == ["linear", "kNN ac"]
    assert capsys.readouterr().err == "semi 0.1 is not drawn: 1 of 3 settings have it\n"
    with pytest.raises(InputError, match="needs round, ablation or an option"):
        figures.plot_against("seed", [one, two], tmp_path / "x.png")


def test_a_figure_needs_no_backend(tmp_path, command):
    write_run(tmp_path / "run")
    done = command("eval.py", "--plot", "run", cwd=tmp_path, variables={"MPLBACKEND": "module://of.a.notebook"})
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run/divergence.png").exists(), done.stderr


@pytest.mark.draws
def test_a_failing_figure_does_not_fail_its_run(tmp_path, tiny, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(figures, "new_figure", fail)
    run(tmp_path / "run", *tiny)
    printed = capsys.readouterr()
    assert "run holds the run. Next:" in printed.out and (tmp_path / "run/encoder.pt").exists()
    assert printed.err.splitlines() == [
        f"{tmp_path}/run/{name}.png is not drawn (RuntimeError: no font), and the run is complete without it"
        for name in ("partition", "divergence")
    ]


def test_a_circle_stands_at_the_divergence_that_decided(tmp_path, drawn):  # noqa: F811
    """In the client's last round before the one that it begins with its own predictor, and so never below mu."""
    run_folder = write_run(tmp_path / "run")
    clients, divergences = ([0, 1], [0], [0, 1], [0, 1]), ([0.5, 0.3], [0.2], [0.1, 0.05], [0.1, 0.05])
    decided = ([None, None], [0.5], [0.2, 0.45], [0.1, 0.05])  # of client 1 in its round 0, but measured against the next average
    taken = (["global"] * 2, ["local"], ["global", "local"], ["global"] * 2)
    rows = zip(clients, divergences, decided, taken)
    lines = [
        json.dumps(
            metrics(1)[0]
            | {"round": r, "clients": c, "divergence": d, "loss": d, "decided_on": on, "predictor": p, "own_share": [0.0] * len(c)}
        )
        for r, (c, d, on, p) in enumerate(rows)
    ]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines))
    figures.plot([run_folder], tmp_path / "x.png")
    (circles,) = drawn[0].axes[0].collections
    assert sorted(circles.get_offsets().tolist()) == [[0, 0.45], [0, 0.5]]
    assert circles.get_label() == "at or above $\\mu$: keeps its own predictor in its next round"


# ----------------------------------------------------------------------------------------------------- for a paper


def test_seeds_of_a_setting_become_one_line_with_a_band(tmp_path, drawn):  # noqa: F811
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1)] + [write_run(tmp_path / "single", method="single")]
    rows = [row | {"divergence": [2.5, 3.5], "knn": 0.75} for row in metrics(3)]
    (runs[1] / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figures.plot(runs, tmp_path / "x.png")
    divergence, _, _, accuracy = drawn[0].axes
    assert [line.get_ydata()[0] for line in divergence.lines] == [1.75, 0.5, 0.4]  # the mean of 0.5 and 3, single, mu
    band = divergence.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1.75 - 2.5 / 2**0.5, 1.75 + 2.5 / 2**0.5))
    assert accuracy.lines[0].get_ydata().tolist() == [50, 56.25, 62.5]
    labels = [text.get_text() for text in drawn[0].legends[0].texts]
    assert labels == ["fedu (2 seeds)", "single (1 seed)", "$\\mu$ = 0.4", "deviation over seeds"]


def test_a_legend_fits_whatever_the_number_of_runs(tmp_path, drawn):  # noqa: F811
    runs = [write_run(tmp_path / f"{k}", mu=k / 8, lr=0.25) for k in range(1, 33)] + [write_run(tmp_path / "x", lr=0.5)]
    for size in (None, (3.3, 6)):
        figures.plot(runs, tmp_path / "x.png", size)
        (figure,) = drawn[-1:]
        (legend,) = figure.legends
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert len(legend.texts) == 35 and box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0
        assert box.y1 < min(axis.get_window_extent().y0 for axis in figure.axes)
        assert figure.axes[0].get_window_extent().height > (1 if size else 3) * figure.dpi
    assert drawn[1].get_size_inches().tolist() == [3.3, 6]


def test_numbers_have_their_place_on_a_number_axis(tmp_path, drawn):  # noqa: F811
    for values in ([0, 0.5, 0.75, 1.5, math.inf], [0, 0.01, 0.1, 10, math.inf]):
        runs = [write_run(tmp_path / f"{values[2]}-{mu}", [linear(0.5)], mu=mu) for mu in values]
        figures.plot_against("mu", runs, tmp_path / "x.png")
    near, wide = ([label.get_position()[0] for label in figure.axes[0].get_xticklabels()] for figure in drawn)
    assert near[:4] == [0, 0.5, 0.75, 1.5] and near[4] > 1.5
    assert wide[1:4] == pytest.approx([-2, -1, 1]) and wide[0] < -2 and wide[4] > 1
    assert [figure.axes[0].get_xlabel() for figure in drawn] == ["mu", "mu (log scale)"]
    broken = [[y != y for y in figure.axes[0].containers[0].lines[0].get_ydata()] for figure in drawn]
    assert broken == [[False] * 4 + [True, False], [False, True] + [False] * 3 + [True, False]]  # no line leads to what stands apart
    runs = [write_run(tmp_path / f"k{k}", [linear(0.5)], clients=8, clients_per_round=k) for k in (2, 4, None)]
    figures.plot_against("clients_per_round", runs, tmp_path / "x.png")
    assert [label.get_text() for label in drawn[2].axes[0].get_xticklabels()] == ["2", "4", "all"]


def test_a_method_has_one_colour_and_its_settings_differ(tmp_path, drawn):  # noqa: F811
    fedu, ema = write_run(tmp_path / "fedu", [linear(0.5)]), write_run(tmp_path / "ema", [linear(0.5)], method="fedema")
    figures.plot([ema, fedu], tmp_path / "x.png")
    figures.plot_against("round", [fedu, ema], tmp_path / "x.png")
    figures.plot_against("lr", [fedu, write_run(tmp_path / "lr", [linear(0.5)], lr=1)], tmp_path / "x.png")
    figures.plot([fedu], tmp_path / "x.png")
    of_fedu = [figure.axes[0].lines[k].get_color() for figure, k in zip(drawn, (1, 0, 0, 0))]
    assert len(set(of_fedu)) == 1 and drawn[0].axes[0].lines[0].get_color() == drawn[1].axes[0].lines[1].get_color() != of_fedu[0]
    mus = [write_run(tmp_path / f"mu{k}", mu=k) for k in range(1, 7)]
    figures.plot(mus, tmp_path / "x.png")
    lines = drawn[-1].axes[3].lines
    assert len({(str(line.get_color()), line.get_marker()) for line in lines}) == len(lines) == 6


def test_losses_of_different_objectives_have_axes_of_their_own(tmp_path, drawn):  # noqa: F811
    methods = ("fedu", "fedsimclr", "fedbyol")
    figures.plot([write_run(tmp_path / method, method=method) for method in methods], tmp_path / "x.png")
    panels = {axis.get_ylabel(): len(axis.lines) for axis in drawn[0].axes}
    assert panels["loss\n(BYOL)"] == 2 and panels["loss\n(SimCLR)"] == 1


def test_a_client_has_its_number_at_its_line(tmp_path, drawn):  # noqa: F811
    figures.plot([write_run(tmp_path / "run")], tmp_path / "x.png")
    for axis, heights in ((drawn[0].axes[0], {"0": 0.25, "1": 0.75}), (drawn[0].axes[2], {"0": 1, "1": 3})):
        assert {text.get_text(): text.xy[1] for text in axis.texts} == heights


def test_files_for_a_paper(tmp_path, evaluates):
    write_run(tmp_path / "run", [linear(0.5)])
    for out in ("x.pdf", "x.svg", "x.png"):
        done = evaluates("--plot", "run", "--size", "3.3,4", "--no-title", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    pdf, svg, png = ((tmp_path / f"x.{kind}").read_bytes() for kind in ("pdf", "svg", "png"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # fonts are TrueType and not drawn letter by letter
    assert b"mean of the clients</text>" in svg and b"classes each" not in svg
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (495, 600)
    assert refused(
        evaluates("--table", "run", "--size", "3,3", cwd=tmp_path), "--size goes with --spectrum or --plot or --against, not with --table"
    )
    assert refused(evaluates("--plot", "run", "--size", "3", cwd=tmp_path), "--size: got '3', needs W,H in inches from 1 to 100")


def test_a_spectrum_has_a_line_for_each_run_and_shows_a_collapse(tmp_path, drawn):  # noqa: F811
    spectra = {
        write_run(tmp_path / "untrained", method="untrained"): spectrum(2.5, 0.25, -0.5, [0.5, 0.25, 0.125]),
        write_run(tmp_path / "s0", no_stop_gradient=True, method="fedbyol"): spectrum(1.04, 0.125, -0.25, [0.5, 1e-9, 0]),
        write_run(tmp_path / "fedu"): spectrum(3.0),
        write_run(tmp_path / "s1", seed=1): spectrum(2.0),
    }
    figures.plot_spectra(spectra, tmp_path / "x.png")
    values, spread = drawn[0].axes
    lines = {line.get_label(): line for line in values.lines}
    assert list(lines) == [
        "untrained: rank 2.5 of 3",
        "fedbyol, no stop gradient: rank 1.0 of 3",
        "fedu, seed 0: rank 3.0 of 3",
        "fedu, seed 1: rank 2.0 of 3",
    ]
    assert values.get_yscale() == "log" and [*lines["fedbyol, no stop gradient: rank 1.0 of 3"].get_ydata()[:2]] == [0.5, 1e-9]
    assert math.isnan(lines["fedbyol, no stop gradient: rank 1.0 of 3"].get_ydata()[2])  # 0 has no place on a log scale
    assert len({(str(line.get_color()), line.get_marker()) for line in values.lines}) == 4
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in spread.lines] == [(-0.5, 0.25), (-0.25, 0.125), (-2, 0.5), (-2, 0.5)]
    assert [line.get_color() for line in spread.lines] == [line.get_color() for line in values.lines]
    assert (
        drawn[0].get_suptitle().replace("\n", " ").endswith("; backbone features of 1,000 test images")
        and len(drawn[0].legends[0].texts) == 4
    )
    figures.plot_spectra({run: spectrum(2.0, dataset="x.npz") for run in spectra}, tmp_path / "x.png", (3.3, 2.5), title=False)
    assert not drawn[1].get_suptitle() and drawn[1].get_figheight() == 2.5
