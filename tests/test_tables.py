"""Tables that cannot mislead: which runs count, and what a cell says about them."""

import csv
import shutil
import subprocess

import pytest
from conftest import refused
from test_report import linear, set_options, write_run

import eval as evaluation
from options import parse_evaluation
from report import tables
from runtime.cli import InputError
from runtime.run import read_config


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its caption and header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]


def test_a_seed_counts_once_and_an_unfinished_run_not_at_all(tmp_path, capsys):
    first = write_run(tmp_path / "first", [linear(0.5)])
    other = write_run(tmp_path / "other", [linear(0.6)], seed=1)
    copied = shutil.copytree(first, tmp_path / "copied")
    again = write_run(tmp_path / "again", [linear(0.9)], knn_every=1)  # how often kNN was measured changes nothing in the training
    unfinished = write_run(tmp_path / "unfinished", [linear(0.1)], rounds=2, seed=2)
    (unfinished / "encoder.pt").unlink()
    without_weights = write_run(tmp_path / "without-weights", [linear(0.7)], seed=3)
    (without_weights / "encoder.pt").unlink()
    (row,) = rows_of(tables.table([first, other, copied, again, unfinished, without_weights]))
    assert row[1] == "3" and row[3] == "60.00 ± 10.00"
    assert capsys.readouterr().err.splitlines() == [
        f"{copied} is left out: it has the same setting and seed as {first}",
        f"{again} is left out: it has the same setting and seed as {first}",
        f"{unfinished} is left out: it is unfinished, with 2 of 3 rounds",
    ]
    with pytest.raises(InputError, match="no run is finished among .*unfinished"):
        tables.table([unfinished])


def test_a_table_of_all_runs_names_those_that_it_leaves_out(tmp_path, monkeypatch, capsys):
    """With nothing named, as where they are: runs without weights count, and what a run that is begun replaces is not a run."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/finished", [linear(0.5)])
    write_run(tmp_path / "runs/far/without-weights", [linear(0.75)], seed=1)
    (tmp_path / "runs/far/without-weights/encoder.pt").unlink()
    unfinished = write_run(tmp_path / "runs/unfinished", [linear(0.1)], rounds=2, seed=2)
    (unfinished / "encoder.pt").unlink()
    write_run(unfinished / ".replaced", [linear(0.9)], seed=3)
    write_run(tmp_path / ".mine", [linear(0.5)])
    evaluation.main(parse_evaluation(["--table", ".mine"]))  # hidden, but named
    assert rows_of(capsys.readouterr().out)[0][1] == "1"
    for line in (["--table"], ["--table", "runs"]):
        evaluation.main(parse_evaluation(line))
        said = capsys.readouterr()
        (row,) = rows_of(said.out)
        assert (row[1], row[3]) == ("2", "62.50 ± 17.68")
        assert said.err == "runs/unfinished is left out: it is unfinished, with 2 of 3 rounds\n"


def test_a_run_from_before_a_setting_of_the_objective_has_its_default(tmp_path):
    now, before = write_run(tmp_path / "now", [linear(0.5)]), write_run(tmp_path / "before", [linear(0.7)], seed=1)
    options = read_config(before)["options"]
    set_options(before, options | {"settings": {"jitter": options["settings"]["jitter"]}})
    (row,) = rows_of(tables.table([now, before]))
    assert row[1] == "2" and row[3] == "60.00 ± 14.14"


def test_a_cell_with_fewer_seeds_than_its_row_says_so(tmp_path):
    knn = {"evaluation": "knn", "features": "backbone", "dataset": "cifar10"}
    evaluated = [[linear(0.5), knn | {"accuracy": 0.25}], [linear(0.5), knn | {"accuracy": 0.25}], [linear(0.5)]]
    runs = [write_run(tmp_path / f"s{seed}", rows, seed=seed) for seed, rows in enumerate(evaluated)]
    assert rows_of(tables.table(runs))[0][3:5] == ["50.00 ± 0.00", "25.00 ± 0.00 (2 seeds)"]
    assert rows_of(tables.table(runs[1:]))[0][3:5] == ["50.00 ± 0.00", "25.00 (1 seed)"]


def spectrum(
    rank: float, alignment: float = 0.5, uniformity: float = -2.0, singular_values: list[float] = (0.5, 0.25, 0), **settings
) -> dict:
    numbers = {"rank": rank, "alignment": alignment, "uniformity": uniformity, "singular_values": [*singular_values], "width": 3}
    return {"evaluation": "spectrum", "features": "backbone", "dataset": "cifar10", "split": "test", "images": 1000, **numbers, **settings}


def test_a_spectrum_adds_columns_where_a_run_has_one(tmp_path):
    """Neither in % nor among the accuracies; of features of other kinds and widths apart."""
    runs = [
        write_run(tmp_path / "s0", [linear(0.5), spectrum(2.0), spectrum(2.5), spectrum(1.25, features="projector")]),
        write_run(tmp_path / "s1", [linear(0.5), spectrum(1.5)], seed=1),
        write_run(tmp_path / "wide", [linear(0.5), spectrum(9, width=128)], encoder="tiny"),
    ]
    assert "rank" not in tables.table([write_run(tmp_path / "none", [linear(0.5)])])
    lines = tables.table(runs).splitlines()
    assert lines[0].endswith("accuracies in % of the test images; a higher rank is better, and a lower alignment and uniformity.")
    names = ["rank of 3", "alignment", "uniformity"]
    columns = [*names, *(f"{name}, projector" for name in names), "rank of 128"]
    assert [cell.strip() for cell in lines[2].split("|")[6:-2]] == columns
    (first, second) = rows_of("\n".join(lines))
    assert first[5:12] == ["2.00 ± 0.71", "0.500 ± 0.000", "-2.000 ± 0.000", "1.25 (1 seed)", "0.500 (1 seed)", "-2.000 (1 seed)", "-"]
    assert second[5:12] == ["-", "0.500", "-2.000", "-", "-", "-", "9.00"]


def test_tables_for_a_paper_and_for_a_program(tmp_path, evaluates):
    knn = {"evaluation": "knn", "features": "backbone", "dataset": "cifar10", "accuracy": 0.25}
    for seed, rows in enumerate([[linear(0.5), knn], [linear(0.75)]]):
        write_run(tmp_path / f"runs/s{seed}", rows, seed=seed)
    write_run(tmp_path / "runs/e1", [linear(0.5)], local_epochs=1)
    printed = evaluates("--table", "runs", cwd=tmp_path).stdout
    for kind in ("md", "tex", "csv"):
        done = evaluates("--table", "runs", "--out", f"x.{kind}", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f"x.{kind} holds the table of "), done.stderr
    assert (tmp_path / "x.md").read_text() == printed
    with (tmp_path / "x.csv").open() as file:
        one, two = csv.DictReader(file)
    assert (one["local_epochs"], one["linear"], one["linear deviation"], one["linear seeds"]) == ("1", "50.00", "", "1")
    assert (two["linear"], two["linear deviation"], two["knn"], two["knn deviation"], two["knn seeds"]) == (
        "62.50",
        "17.68",
        "25.00",
        "",
        "1",
    )
    tex = (tmp_path / "x.tex").read_text()
    assert r"method & local\_epochs & seeds &" in tex and r"& 2 & 1.0 + 2.0 & 62.50 $\pm$ 17.68 & 25.00 (1 seed) & 80.52 \\" in tex
    assert refused(evaluates("--table", "runs", "--out", "x.txt", cwd=tmp_path), "x.txt, needs a name that ends in .md, .tex or .csv")


def test_latex_text_has_no_special_characters_left():
    assert tables.escaped("a_b 50% of {x} & #1 $2 ~^\\ < ± é") == (
        r"a\_b 50\% of \{x\} \& \#1 \$2 \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{} $\pm$ é"
    )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX")
def test_latex_compiles(tmp_path):
    tex = tables.as_latex("A caption, 50%", [["method", "local_epochs", "linear"], ["a_b^c~{d}\\ <&#$>", "-", "50.00 ± 1.00"]])
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{tex}" + "\n\\end{document}\n"
    (tmp_path / "x.tex").write_text(document)
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
