import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import refused
from matplotlib.collections import PolyCollection

from options import Options, evaluation_parser, training_parser
from report import figures, progress, tables
from report.progress import dapu_notice
from report.reference import as_markdown
from runtime.cli import InputError


def metrics(rounds: int) -> list[dict]:
    """Rounds of two clients, of which the first has the smaller loss and divergence; it keeps its own predictor in round 1."""
    return [
        {
            "round": round_, "lr": 0.5, "loss": [1.0, 3.0], "divergence": [0.25, 0.75], "clients": [0, 1],
            "decided_on": [None, None] if round_ == 0 else [0.5, 0.3],
            "predictor": ["global", "global"] if round_ != 1 else ["local", "global"], "own_share": [float(round_ == 1), 0.0],
            "upload_bytes": 1e6, "download_bytes": 2e6, "knn": 0.25 + 0.125 * round_, "seconds": 1.25,
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


def test_lines_of_rounds_are_under_their_header():
    first, second = metrics(2)
    assert progress.TABLE_HEADER.split()[:8] == ["round", "lr", "loss", "divergence", "kNN", "%", "seconds", "left"]
    assert progress.round_line(second, 204).split() == ["1", "0.50000", "2.0000", "0.5000", "37.50", "1.2", "3.4", "min", "lg"]
    ends = [progress.TABLE_HEADER.index(word) + len(word) for word in ("round", "loss", "seconds", "left")]
    line = progress.round_line(second, 11 * 86400)
    assert [line[:end].split()[-1] for end in ends] == ["1", "2.0000", "1.2", "days"]
    assert progress.round_line(first | {"knn": None}, None).split() == ["0", "0.50000", "2.0000", "0.5000", "1.2", "gg"]
    nobody = progress.round_line(first | {"loss": [], "divergence": [], "predictor": [], "clients": []}, 1)
    assert "nan" in nobody and nobody.endswith("nobody reported: the global model stays as it was")
    many = progress.round_line(second | {"clients": list(range(30)), "predictor": ["local"] * 10 + ["global"] * 20}, 1)
    assert many.endswith("20 g, 10 l")


def test_notice_of_a_mu_that_made_no_difference():
    rows = metrics(3)
    assert progress.dapu_notice(rows, "dapu", 0.4) == ""  # one client took its own predictor, the other the average
    rows[1]["predictor"] = ["global", "global"]
    assert "every DAPU decision was global (divergences 0.3 to 0.5), so predictors were as in FedBYOL" in progress.dapu_notice(
        rows, "dapu", 2
    )
    assert progress.dapu_notice(rows, "global", 2) == ""


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


def test_table_shows_the_options_that_differ_and_published_accuracies(tmp_path):
    iid, classes = write_run(tmp_path / "iid", partition="iid"), write_run(tmp_path / "classes")
    header, _, *rows = tables.table([iid, classes]).splitlines()[2:]
    assert header.startswith("| method | partition | seeds |") and "linear, published" in header
    assert rows[0].startswith("| fedu | iid | 1 |") and rows[0].endswith("| 83.96 |")
    assert rows[1].startswith("| fedu | 1/K of the classes each | 1 |") and rows[1].endswith("| 80.52 |")
    for changed in ({"ema_decay": 1}, {"classes_per_client": 4}):  # which the papers' runs do not have
        assert "published" not in tables.table([write_run(tmp_path / "changed", **changed)])
    both = write_run(tmp_path / "both", method="fedbyol", update="both")
    target = write_run(tmp_path / "target", method="fedbyol", update="target", predictor="local")
    header, _, *rows = tables.table([both, target]).splitlines()[2:]
    assert header.startswith("| method | update | predictor | seeds |")
    assert rows[0].startswith("| fedbyol | both | global | 1 |") and rows[0].endswith("| 81.24 |")
    assert rows[1].endswith("| 19.22 |")


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
    yield drawn
    for figure in drawn:
        figures.pyplot().close(figure)


def test_one_run_is_drawn_with_a_line_for_each_client(tmp_path, drawn):
    figures.plot([write_run(tmp_path / "run")], tmp_path / "x.png")
    divergence, own, loss, accuracy = drawn[0].axes
    heights = [line.get_ydata()[0] for line in divergence.lines]
    assert heights == [0.5, 0.25, 0.75, 0.4]  # mean, clients, mu
    assert [line.get_ydata()[0] for line in loss.lines] == [2, 1, 3]
    (circles,) = divergence.collections
    assert circles.get_offsets().tolist() == [[1, 0.25]]
    assert own.lines[0].get_ydata().tolist() == [0, 50, 0] and accuracy.lines[0].get_ydata().tolist() == [25, 37.5, 50]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == [
        "mean of the clients", "one client", "began the round with its own predictor", "$\\mu$ = 0.4",
    ]  # fmt: skip


def test_several_runs_are_drawn_with_a_band_over_the_clients(tmp_path, drawn):
    runs = [write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run", method="fedbyol"), write_run(tmp_path / "c/run", seed=1)]
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
    labels = [text.get_text() for text in legend.texts]  # of folders with one name the whole path
    assert labels == [*map(str, runs), "from the smallest client to the largest", "$\\mu$ = 0.4"]


def test_figures_go_to_the_file_that_is_named(tmp_path, command):
    one, other = write_run(tmp_path / "runs/one"), write_run(tmp_path / "runs/other", method="fedema")
    for arguments, out in (([one], "runs/one/divergence.png"), ([one, other], "comparison.png")):
        done = command("eval.py", "--plot", *arguments, cwd=tmp_path)
        assert done.returncode == 0 and out in done.stdout, done.stderr
        assert (tmp_path / out).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="needs a name that ends in one of"):
        figures.plot([one], tmp_path / "x.xyz")
    with pytest.raises(InputError, match="cannot write"):
        figures.plot([one], tmp_path / "none/x.png")
    with pytest.raises(InputError, match="has no rounds to draw"):
        figures.plot([write_run(tmp_path / "untrained", rounds=0, method="untrained")], tmp_path / "x.png")


def test_accuracies_against_rounds_options_and_the_ablation(tmp_path, drawn):
    half = [linear(0.5)]
    runs = [write_run(tmp_path / "mu", half), write_run(tmp_path / "inf", [linear(0.75)], mu=math.inf)]
    runs += [write_run(tmp_path / "seed", [linear(1.0)], mu=math.inf, seed=1), write_run(tmp_path / "single", half, method="single")]
    runs += [write_run(tmp_path / "untrained", [linear(0.25)], rounds=0, method="untrained")]
    figures.plot_against("mu", runs, tmp_path / "x.png")
    (axis,) = drawn[-1].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.4", "inf"]
    assert {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axis.containers} == {"fedu": [50, 87.5], "single": [50]}
    assert [line.get_ydata() for line in axis.lines if line.get_label() == "untrained encoder"] == [[25, 25]]
    figures.plot_against("clients_per_round", runs, tmp_path / "x.png")
    assert [label.get_text() for label in drawn[-1].axes[0].get_xticklabels()] == ["all"]
    figures.plot_against("ablation", runs, tmp_path / "x.png")
    assert [bar.get_width() for bar in drawn[-1].axes[0].patches] == [50, 87.5, 50]
    figures.plot_against("round", runs, tmp_path / "x.png")
    assert {tuple(line.get_xdata()) for line in drawn[-1].axes[0].lines} == {(1, 2, 3)}
    figures.plot_against("round", [runs[0], write_run(tmp_path / "e1", local_epochs=1)], tmp_path / "x.png")
    assert {tuple(line.get_xdata()) for line in drawn[-1].axes[0].lines} == {(1, 2, 3), (5, 10, 15)}
    with pytest.raises(InputError, match="--against got 'beta'"):
        figures.plot_against("beta", runs, tmp_path / "x.png")
    with pytest.raises(InputError, match="untrained has no rounds to draw"):
        figures.plot_against("ablation", runs[-1:], tmp_path / "x.png")
    (runs[0] / "eval.jsonl").unlink()
    with pytest.raises(InputError, match="mu has no linear accuracy: measure it with"):
        figures.plot_against("mu", runs, tmp_path / "x.png")


# --------------------------------------------------------------------------------------------------------- run folders


def test_runs_are_named_by_themselves_or_by_a_folder_of_them(tmp_path, command):
    for age, name in enumerate(("s1", "single", "s0")):
        run = write_run(tmp_path / "runs" / name, method="single" if name == "single" else "fedu", seed=int(name == "s1"))
        os.utime(run / "encoder.pt", (1e9 - age, 1e9 - age))
    (tmp_path / "figures").mkdir()
    (tmp_path / "notes.txt").write_text("")
    whole = command("eval.py", "--table", "runs", cwd=tmp_path)
    some = command("eval.py", "--table", "runs/s1", "figures", "notes.txt", "runs", cwd=tmp_path)
    assert whole.returncode == some.returncode == 0 and sorted(whole.stdout.splitlines()) == sorted(some.stdout.splitlines())
    assert some.stderr == "figures holds no run and is left out\n"
    assert refused(command("eval.py", "--table", "runs", "absent", cwd=tmp_path), "absent is not a run folder")
    assert refused(command("eval.py", "--table", "figures", cwd=tmp_path), "figures is not a run folder")
    shutil.move(tmp_path / "runs", tmp_path / "figures/runs")
    shutil.move(tmp_path / "figures", tmp_path / "runs")  # a folder deeper, as those of results/experiments.py
    assert sorted(command("eval.py", "--table", cwd=tmp_path).stdout.splitlines()) == sorted(whole.stdout.splitlines())


# ------------------------------------------------------------------------------------------------------ documentation


def test_options_as_markdown():
    """Every option of both commands has a line with its default."""
    for parser in (training_parser(), evaluation_parser()):
        text = as_markdown(parser)
        options = [action.option_strings[-1] for action in parser._actions if action.option_strings and action.dest != "help"]
        assert [line.split("`")[1].split()[0] for line in text.splitlines() if line.startswith("| `--")] == options
    assert "| `--features` | backbone | `backbone`, `projector`, `pixels`: what represents an image" in as_markdown(evaluation_parser())
    assert "| `--mu` | 0.4 | DAPU's threshold" in as_markdown(training_parser())


def test_notice_when_mu_never_bound():
    def metrics(*taken):
        return [{"predictor": [t], "decided_on": [d]} for t, d in zip(("global", *taken), (None, 0.9, 0.3))]

    notice = dapu_notice(metrics("global", "global"), "dapu", 1.0)
    assert "mu = 1 never bound" in notice and "0.3 to 0.9" in notice and "FedBYOL" in notice
    assert "every DAPU decision was local" in dapu_notice(metrics("local", "local"), "dapu", 0.1)
    assert dapu_notice(metrics("local", "global"), "dapu", 0.4) == ""
    assert dapu_notice(metrics("global", "global"), "global", 0.4) == ""
