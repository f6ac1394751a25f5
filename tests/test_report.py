import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer

import eval as evaluation
from options import Options, parse_evaluation
from report import figures, progress, tables
from runtime.cli import InputError


def metrics(rounds: int) -> list[dict]:
    """Rounds of two clients, of which the first has the smaller loss and divergence; it keeps its own predictor in round 1."""
    return [
        {
            "round": round_, "lr": 0.5, "loss": [1.0, 3.0], "divergence": [0.25, 0.75], "clients": [0, 1],
            "decided_on": [None, None] if round_ == 0 else [0.5, 0.3],
            "predictor": ["global", "global"] if round_ != 1 else ["local", "global"], "own_share": [float(round_ == 1), 0.0],
            "upload_bytes": 5e5 * (round_ + 1), "download_bytes": 1e6 * (round_ + 1), "knn": 0.25 + 0.125 * round_, "seconds": 1.25,
        }
        for round_ in range(rounds)
    ]  # fmt: skip


def write_run(run: Path, evaluations: list[dict] = (), rounds: int = 3, **options) -> Path:
    """A run folder as far as tables and figures read it, which is all but the encoder."""
    run.mkdir(parents=True, exist_ok=True)
    set_options(run, asdict(Options(**{"dataset": "cifar10", "rounds": 3, **options})))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(rounds)))
    (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    (run / "encoder.pt").touch()
    return run


def set_options(run: Path, options: dict) -> None:
    (run / "config.json").write_text(json.dumps({"options": options}))


def linear(accuracy: float, **settings) -> dict:
    return {"evaluation": "linear", "features": "backbone", "epochs": 200, "dataset": "cifar10", "accuracy": accuracy, **settings}


# ------------------------------------------------------------------------------------------------- while a run trains


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (0.42, "0.4 s"), (9.97, "10 s"), (59.4, "59 s"), (59.6, "1.0 min"), (204, "3.4 min"), (3599, "1.0 h"), (9720, "2.7 h")]
    + [(47 * 3600, "47 h"), (48 * 3600, "2.0 days"), (11 * 86400, "11 days"), (400 * 86400, "400 days")],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words


def test_a_rounds_line_has_its_numbers_in_the_order_of_the_header():
    first, second = metrics(2)
    assert progress.TABLE_HEADER.split()[:8] == ["round", "lr", "loss", "divergence", "kNN", "%", "seconds", "left"]
    *numbers, left, unit, taken = progress.round_line(second, 204).split()
    assert [float(text) for text in numbers] == pytest.approx([1, 0.5, 2, 0.5, 37.5, 1.25], abs=0.06) and (left, unit) == ("3.4", "min")
    assert taken == "lg"
    assert len(progress.round_line(first | {"knn": None}, None).split()) == 6
    nobody = progress.round_line(first | {"loss": [], "divergence": [], "predictor": [], "clients": []}, 1)
    assert "nan" in nobody and "nobody reported" in nobody
    many = progress.round_line(second | {"clients": list(range(30)), "predictor": ["local"] * 10 + ["global"] * 20}, 1)
    assert many.endswith("20 g, 10 l")


@pytest.mark.parametrize(
    "taken, predictor, words",
    [
        (["global", "local"], "dapu", []),
        (["global", "global"], "dapu", ["mu = 1 ", "every DAPU decision was global", "0.3 to 0.9", "FedBYOL"]),
        (["local", "local"], "dapu", ["mu = 1 ", "every DAPU decision was local", "0.3 to 0.9", "first round only"]),
        (["global", "global"], "global", []),
        ([], "dapu", []),
    ],
)
def test_notice_of_a_mu_that_made_no_difference(taken, predictor, words):
    """The first round's predictors, which are the server's whatever mu is, do not count."""
    rows = [{"predictor": [t], "decided_on": [d]} for t, d in zip(("global", *taken), (None, 0.9, 0.3))]
    notice = progress.dapu_notice(rows, predictor, 1.0)
    assert all(word in notice for word in words) and bool(notice) == bool(words)


def test_tensorboard_log_has_each_value_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    rows = metrics(3)
    rows[1]["knn"] = None
    for begin in (0, 1):  # the second time as a resumed run
        log = progress.tensorboard_log(tmp_path / "tensorboard")
        for row in rows[begin:]:
            log(row)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert sorted(values) == [
        "divergence/client 0", "divergence/client 1", "knn/accuracy (%)", "loss/client 0", "loss/client 1", "loss/mean",
        "own_share/client 0", "own_share/client 1",
    ]  # fmt: skip
    assert values["loss/mean"] == [(0, 2.0), (1, 2.0), (2, 2.0)] and values["divergence/client 1"] == [(0, 0.75), (1, 0.75), (2, 0.75)]
    assert values["knn/accuracy (%)"] == [(0, 25.0), (2, 50.0)] and values["own_share/client 0"] == [(0, 0.0), (1, 1.0), (2, 0.0)]


def test_missing_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install -r requirements-optional.txt"):
        progress.tensorboard_log(tmp_path / "tensorboard")


# ------------------------------------------------------------------------------------------------------------- tables


def test_table_has_a_row_a_setting_with_mean_and_deviation(tmp_path):
    pixels = linear(0.3, features="pixels")
    runs = [
        write_run(tmp_path / "s0", [linear(0.1), linear(0.5), pixels], dataset="x", encoder="small"),
        write_run(tmp_path / "s1", [linear(0.6)], dataset="x", encoder="small", seed=1, knn_every=1, device="cpu"),
        write_run(tmp_path / "single", [linear(0.4), linear(0.2, epochs=1)], dataset="x", encoder="small", method="single"),
    ]
    for run in runs:
        (run / "eval.jsonl").write_text((run / "eval.jsonl").read_text().replace("cifar10", "x"))
    older = json.loads((runs[1] / "config.json").read_text())["options"]
    del older["dropout"], older["log"]  # a run does not have the options that are newer than it,
    set_options(runs[1], older | {"bank_memory": 64})  # and may have one that is gone
    caption, _, *lines = tables.table(runs).splitlines()
    assert caption.startswith("On x, small, 3 rounds of 5 local epochs, B = 128, lr 0.032, 5 clients, 1/K of the classes each; accur")
    assert lines == [
        "| method | seeds | up and down, MB a round | linear | linear, epochs 1 |",
        "| --- | --- | --- | --- | --- |",
        "| fedu | 2 | 1.0 + 2.0 | 55.00 ± 7.07 | - |",  # the latest linear result counts
        "| single | 1 | 1.0 + 2.0 | 40.00 | 20.00 |",
        "| raw pixels | - | - | 30.00 | - |",
    ]


def test_a_run_between_parties_has_no_partition_that_somebody_dealt(tmp_path):
    run = write_run(tmp_path / "hospitals")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"run": "0123"}))
    assert "5 clients, with images of their own; accuracies" in tables.table([run])
    assert "published" not in tables.table([run])


def test_an_evaluation_is_named_by_what_differs_from_the_usual(tmp_path):
    settings = [{}, {"features": "projector"}, {"dataset": "cifar100"}, {"seed": 1}, {"epochs": 7}]
    rows = [linear(0.1 * k, **setting) for k, setting in enumerate(settings)]
    rows += [{"evaluation": "semi 0.1", "dataset": "cifar10", "accuracy": 0.6, "seed": 0, **more} for more in (
        {"head": "linear", "epochs": 100}, {"head": "mlp", "epochs": 100})]  # fmt: skip
    rows += [{"evaluation": "knn", "features": "backbone", "dataset": "cifar10", "accuracy": 0.7}]
    names = ["linear", "linear, projector", "linear, cifar100", "linear, seed 1", "linear, epochs 7", "semi 0.1", "semi 0.1, mlp", "knn"]
    found = tables.read_evaluations(write_run(tmp_path / "run", rows))
    assert list(found) == names and list(found.values()) == [row["accuracy"] for row in rows]
    header = tables.table([tmp_path / "run"]).splitlines()[2]
    assert header.index("| linear |") < header.index("linear, cifar100") < header.index("| knn |") < header.index("| semi 0.1 |")


# FedEMA's table 1 and appendix, with ResNet-18: CIFAR-10 with two classes a client, and IID; in brackets FedU's, with ResNet-50
PUBLISHED = {
    "single": ("74.95", "82.42"), "fedsimclr": ("78.09", "-"), "fedmoco-v1": ("78.21", "-"), "fedmoco-v2": ("79.14", "-"),
    "fedsimsiam": ("76.27", "-"), "fedbyol": ("79.44", "84.29"), "fedu": ("80.52", "83.96"), "fedema": ("83.34", "86.26"),
    "central": ("90.46", "90.46"), "fedca": ("68.01 (", "71.25 ("), "fedavg-supervised": ("67.74 (", "91.51 ("),
}  # fmt: skip
# FedU's encoder ablation, with the global and with each client's own predictor: what is averaged, and what it becomes
ABLATION = {
    ("online", "online"): ("84.07", "82.18"), ("online", "both"): ("81.24", "18.23"), ("online", "target"): ("9.99", "19.22"),
    ("target", "online"): ("82.10", "78.06"), ("target", "target"): ("9.99", "25.02"), ("target", "both"): ("82.32", "29.03"),
}  # fmt: skip


def last_cells(runs: list[Path]) -> list[str]:
    return [line.split(" | ")[-1].removesuffix(" |") for line in tables.table(runs).splitlines()[4:]]


def test_published_accuracies_stand_beside_their_settings(tmp_path):
    runs = [write_run(tmp_path / f"{m}-{p}", method=m, partition=p) for m in PUBLISHED for p in ("classes", "iid")]
    for cell, expected in zip(last_cells(runs), [number for pair in PUBLISHED.values() for number in pair], strict=True):
        assert cell.startswith(expected) and (expected.endswith("(")) == ("ResNet-50" in cell)
    ablation = [
        write_run(tmp_path / f"{aggregate}-{update}-{predictor}", method="fedbyol", aggregate=aggregate, update=update, predictor=predictor)
        for aggregate, update in ABLATION for predictor in ("global", "local")
    ]  # fmt: skip
    of_fedu = [write_run(tmp_path / f"fedu-{p}", update="target", predictor=p) for p in ("dapu", "global")]
    iid = write_run(tmp_path / "iid", method="fedbyol", update="target", partition="iid")
    assert last_cells([*ablation, *of_fedu, iid]) == [number for pair in ABLATION.values() for number in pair] + ["-"] * 3


@pytest.mark.parametrize(
    "options", [{"ema_decay": 1}, {"classes_per_client": 4}, {"dataset": "cifar100"}, {"partition": "dirichlet"}, {"clients_per_round": 2}]
)
def test_other_settings_than_the_papers_have_no_published_accuracy(tmp_path, options):
    assert "published" not in tables.table([write_run(tmp_path / "run", **options)])
    two_classes = write_run(tmp_path / "two", classes_per_client=2)
    assert last_cells([two_classes]) == ["80.52"]


def test_a_table_shows_the_options_that_differ(tmp_path):
    iid, classes = write_run(tmp_path / "iid", partition="iid"), write_run(tmp_path / "classes")
    header, _, *rows = tables.table([iid, classes]).splitlines()[2:]
    assert header.startswith("| method | partition | seeds |")
    assert rows[0].startswith("| fedu | iid | 1 |") and rows[1].startswith("| fedu | 1/K of the classes each | 1 |")
    both = write_run(tmp_path / "both", method="fedbyol", update="both")
    drawn = write_run(tmp_path / "drawn", method="fedbyol", clients_per_round=2, mu=None)
    header, _, *rows = tables.table([both, drawn]).splitlines()[2:]
    assert header.startswith("| method | clients_per_round | update | seeds |")
    assert rows[0].startswith("| fedbyol | all | both | 1 |") and rows[1].startswith("| fedbyol | 2 | online | 1 |")


@pytest.mark.parametrize(
    "option, words",
    [("clients", "5 clients"), ("batch_size", "B = 128"), ("lr", "lr 0.032"), ("local_epochs", "3 rounds of 5 local epochs")],
)
def test_the_caption_says_what_all_settings_have_in_common(tmp_path, option, words):
    usual, other = write_run(tmp_path / "usual"), write_run(tmp_path / "other", **{option: 2})
    captions = [tables.table(runs).splitlines()[0] for runs in ([usual], [usual, other])]
    assert words in captions[0] and words not in captions[1] and all("resnet18" in caption for caption in captions)


def test_an_untrained_encoder_has_no_options_that_differ(tmp_path):
    runs = [write_run(tmp_path / "untrained", [linear(0.1)], rounds=0, method="untrained", clients=2), write_run(tmp_path / "fedu")]
    header, _, untrained, _ = tables.table(runs).splitlines()[2:]
    assert header.startswith("| method | seeds |") and untrained.startswith("| untrained | 1 | - | 10.00 |")


# ------------------------------------------------------------------------------------------------------------ figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: drawn.append(figure))
    return drawn


def test_one_run_is_drawn_with_a_line_for_each_client(tmp_path, drawn):
    figures.plot([write_run(tmp_path / "run")], tmp_path / "x.png")
    divergence, own, loss, accuracy = drawn[0].axes
    assert [line.get_ydata()[0] for line in divergence.lines] == [0.5, 0.25, 0.75, 0.4]  # mean, clients, mu
    assert [line.get_ydata()[0] for line in loss.lines] == [2, 1, 3]
    (circles,) = divergence.collections
    assert not loss.collections and circles.get_offsets().tolist() == [[0, 0.5]]
    assert own.lines[0].get_ydata().tolist() == [0, 50, 0] and accuracy.lines[0].get_ydata().tolist() == [25, 37.5, 50]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == [
        "mean of the clients", "one client, with its number", "at or above $\\mu$: keeps its own predictor in its next round",
        "$\\mu$ = 0.4",
    ]  # fmt: skip


def test_several_runs_are_drawn_with_a_band_over_the_clients(tmp_path, drawn):
    runs = [write_run(tmp_path / "run"), write_run(tmp_path / "fedbyol", method="fedbyol"), write_run(tmp_path / "lr", lr=0.5)]
    older = metrics(3)
    for row in older:
        del row["own_share"]  # as a run has it from before it was told
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    figures.plot(runs, tmp_path / "x.png")
    for axis, key in zip((drawn[0].axes[0], drawn[0].axes[2]), ("divergence", "loss")):
        low, high = metrics(1)[0][key]
        bands = [c for c in axis.collections if isinstance(c, PolyCollection) and len(c.get_paths())]
        extents = [(v[:, 1].min(), v[:, 1].max()) for v in (band.get_paths()[0].vertices for band in bands) if len(v)]
        assert extents == [(low, high)] * 3
    assert [line.get_ydata().tolist() for line in drawn[0].axes[1].lines] == [[0, 50, 0]] * 3
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == [
        "fedu, lr 0.032 (1 seed)", "fedbyol, lr 0.032 (1 seed)", "fedu, lr 0.5 (1 seed)", "$\\mu$ = 0.4",
        "from the smallest client to the largest",
    ]  # fmt: skip


def test_figures_go_to_the_file_that_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/one"))
    write_run(Path("runs/other"), [linear(0.5)], method="fedema")
    for line, out in (
        ("--plot runs/one", "runs/one/divergence.png"),
        ("--plot runs/one runs/other", "comparison.png"),
        ("--plot runs --out all.svg", "all.svg"),
        ("--against round runs", "round.png"),
        ("--against tau runs/other", "tau.png"),
    ):
        evaluation.main(parse_evaluation(line.split()))
        assert out in capsys.readouterr().out
        assert Path(out).read_bytes().startswith(b"<?xml" if out.endswith("svg") else b"\x89PNG")
    with pytest.raises(InputError, match="has no rounds to draw"):
        figures.plot([write_run(tmp_path / "untrained", rounds=0, method="untrained")], tmp_path / "x.png")


@pytest.fixture
def sweep(tmp_path) -> list[Path]:
    """FedU with mu 0.4, with mu inf by two seeds, `single`, and an untrained encoder by two seeds; their linear accuracies."""
    inf = {"mu": math.inf}
    return [
        write_run(tmp_path / "mu", [linear(0.5)]),
        write_run(tmp_path / "inf", [linear(0.75)], **inf),
        write_run(tmp_path / "seed", [linear(1.0)], **inf, seed=1),
        write_run(tmp_path / "single", [linear(0.4)], method="single"),
        write_run(tmp_path / "untrained", [linear(0.25)], rounds=0, method="untrained"),
        write_run(tmp_path / "untrained1", [linear(0.35)], rounds=0, method="untrained", seed=1),
    ]


DEVIATION = 25 / math.sqrt(2)  # of 75 and 100%, by n - 1


def error_bars(container: ErrorbarContainer, axis: int) -> list[list[float]]:
    """From where to where they reach along an axis, 0 or 1, without those of a single seed."""
    (lines,) = container.lines[2]
    return [segment[:, axis].tolist() for segment in lines.get_segments() if len(segment)]


def test_linear_accuracy_against_an_option(tmp_path, sweep, drawn):
    figures.plot_against("mu", sweep, tmp_path / "x.png")
    (axis,) = drawn[-1].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.4", "inf"]
    heights = {bars.get_label(): [y for y in bars.lines[0].get_ydata() if y == y] for bars in axis.containers}
    assert heights == {"fedu": [50, 87.5], "single": [40]}
    assert error_bars(axis.containers[0], 1) == [pytest.approx([87.5 - DEVIATION, 87.5 + DEVIATION])]
    assert [line.get_ydata() for line in axis.lines if line.get_label() == "untrained encoder"] == [pytest.approx([30, 30])]
    figures.plot_against("clients_per_round", sweep, tmp_path / "x.png")
    assert [label.get_text() for label in drawn[-1].axes[0].get_xticklabels()] == ["all"]
    with pytest.raises(InputError, match="against got 'beta'"):
        figures.plot_against("beta", sweep, tmp_path / "x.png")
    with pytest.raises(InputError, match="untrained has no rounds to draw"):
        figures.plot_against("ablation", sweep[-2:], tmp_path / "x.png")
    for run in sweep:
        (run / "eval.jsonl").unlink()
    with pytest.raises(InputError, match="no run has an accuracy to draw: measure it with"):
        figures.plot_against("mu", sweep, tmp_path / "x.png")


def test_the_ablation_as_bars(tmp_path, sweep, drawn):
    figures.plot_against("ablation", sweep, tmp_path / "x.png")
    (axis,) = drawn[-1].axes
    assert [bar.get_width() for bar in axis.patches] == [50, 87.5, 40]
    (errors,) = (container for container in axis.containers if isinstance(container, ErrorbarContainer))
    assert error_bars(errors, 0) == [pytest.approx([87.5 - DEVIATION, 87.5 + DEVIATION])]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert [name.split(": ")[1] for name in names] == ["online to online, dapu"] * 2 + ["online to online, global"]
    assert "mu inf" in names[1] and names[2].startswith("single")


def test_knn_accuracy_against_rounds_over_the_seeds(tmp_path, drawn):
    """kNN accuracies of 25, 37.5 and 50%; the second seed's are 25 points higher, and its first round was not measured."""
    runs = [write_run(tmp_path / "s0"), write_run(tmp_path / "s1", seed=1), write_run(tmp_path / "e1", local_epochs=1)]
    higher = [row | {"knn": row["knn"] + 0.25 if row["round"] else None} for row in metrics(3)]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in higher))
    figures.plot_against("round", runs[:2], tmp_path / "x.png")
    (axis,) = drawn[-1].axes
    (line,) = axis.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 3], [50, 62.5])
    edges = sorted({round(y, 6) for x, y in axis.collections[0].get_paths()[0].vertices if x == 2})
    assert edges == pytest.approx([50 - DEVIATION, 50 + DEVIATION])

    figures.plot_against("round", [runs[0], runs[2]], tmp_path / "x.png")  # against epochs, which cost the same in both
    assert [line.get_xdata().tolist() for line in drawn[-1].axes[0].lines] == [[5, 10, 15], [1, 2, 3]]
    figures.plot_against("round", [runs[0], write_run(tmp_path / "untrained", rounds=0, method="untrained")], tmp_path / "x.png")
    assert len(drawn[-1].axes[0].lines) == 1


@pytest.mark.parametrize(
    "options, levels", [({}, [0.4]), ({"mu": 0.7}, [0.7]), ({"mu": math.inf}, []), ({"mu": 0}, []), ({"method": "fedbyol"}, [])]
)
def test_a_threshold_is_drawn_where_dapu_has_one(tmp_path, drawn, options, levels):
    figures.plot([write_run(tmp_path / "run", **options)], tmp_path / "x.png")
    dotted = [line.get_ydata()[0] for line in drawn[-1].axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == levels


# --------------------------------------------------------------------------------------------------------- run folders


def test_runs_are_named_by_themselves_or_by_a_folder_of_them(tmp_path, refuses, monkeypatch, capsys):
    def table(line: str) -> tuple[list[str], str]:
        """The table's lines, in any order, and what is said on stderr."""
        evaluation.main(parse_evaluation(["--table", *line.split()]))
        printed = capsys.readouterr()
        return sorted(printed.out.splitlines()), printed.err

    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("s1", "single", "s0")):
        run = write_run(Path("runs", name), method="single" if name == "single" else "fedu", seed=int(name == "s1"))
        os.utime(run / "encoder.pt", (1e9 - age, 1e9 - age))
    Path("figures").mkdir()
    Path("notes.txt").write_text("")
    whole, silent = table("runs")
    assert sum("| fedu | 2 |" in line or "| single | 1 |" in line for line in whole) == 2 and not silent
    some, said = table("runs/s1 figures notes.txt runs")
    assert some == whole and "figures" in said and said.count("\n") == 1
    assert refuses(lambda: table("runs absent"), "absent is not a run folder")
    assert refuses(lambda: table("figures"), "figures is not a run folder")
    shutil.move("runs", "figures/runs")
    shutil.move("figures", "runs")  # a folder deeper, as those of results/experiments.py
    assert table("")[0] == whole
