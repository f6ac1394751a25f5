"""Tables that cannot mislead: which runs count, and what a cell says about them."""

import shutil

import pytest
from test_report import linear, write_run

from report import tables
from runtime.cli import InputError


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


def test_a_cell_with_fewer_seeds_than_its_row_says_so(tmp_path):
    knn = {"evaluation": "knn", "features": "backbone", "dataset": "cifar10"}
    evaluated = [[linear(0.5), knn | {"accuracy": 0.25}], [linear(0.5), knn | {"accuracy": 0.25}], [linear(0.5)]]
    runs = [write_run(tmp_path / f"s{seed}", rows, seed=seed) for seed, rows in enumerate(evaluated)]
    assert rows_of(tables.table(runs))[0][3:5] == ["50.00 ± 0.00", "25.00 ± 0.00 (2 seeds)"]
    assert rows_of(tables.table(runs[1:]))[0][3:5] == ["50.00 ± 0.00", "25.00 (1 seed)"]
