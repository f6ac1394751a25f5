from pathlib import Path

import pytest
import torch

from runtime.bank import Bank, Row
from runtime.cli import InputError


def state(value: float) -> dict[str, torch.Tensor]:
    return {"target": torch.full((1010,), float(value)), "queue": torch.full((5,), -float(value))}


def holds(bank: Bank, row: Row, value: float) -> bool:
    return all(torch.equal(tensor, state(value)[name]) for name, tensor in bank.read(row).items())


def test_what_a_row_was_given_it_gives_back(tmp_path):
    bank = Bank(state(0), tmp_path / "bank.bin")
    rows = [bank.write(state(value)) for value in (1, 2, float("nan"))]
    assert [row.index for row in rows] == [0, 1, 2]
    assert holds(bank, rows[0], 1) and holds(bank, rows[1], 2) and bank.read(rows[2])["target"].isnan().all()
    bank.flush()
    assert (tmp_path / "bank.bin").stat().st_size == 3 * bank.row_bytes
    assert holds(Bank(state(0), tmp_path / "bank.bin"), rows[1], 2)


def test_rows_of_the_last_two_checkpoints_are_not_touched():
    """Three clients, all of them in every round, for a hundred rounds: nine rows, for both checkpoints and the round at work."""
    bank = Bank(state(0))
    checkpoints: list[list[Row]] = [[], []]
    for round_ in range(100):
        rows = []
        for client in range(3):
            rows.append(bank.write(state(10 * round_ + client)))
            for age, checkpoint in enumerate(checkpoints, 1):
                assert all(holds(bank, row, 10 * (round_ - age) + k) for k, row in enumerate(checkpoint))
        bank.protect(row.index for row in rows)
        checkpoints = [rows, checkpoints[0]]
    assert bank.count == 9


def test_one_who_is_absent_keeps_his_row_and_adds_none():
    bank = Bank(state(0))
    first = [bank.write(state(k)) for k in range(50)]
    rows = dict(enumerate(first))
    for round_ in range(20):
        bank.protect(row.index for row in rows.values())
        rows[round_] = bank.write(state(100 + round_))
    assert all(holds(bank, rows[k], k + 100 if k < 20 else k) for k in range(50)) and bank.count <= 52


def test_damage_and_absence_are_one_sentence(tmp_path):
    path = tmp_path / "bank.bin"
    bank = Bank(state(0), path)
    row = bank.write(state(3))
    bank.flush()
    with pytest.raises(InputError, match="bank.bin is damaged: row 1 "):
        bank.read(Row(1, row.digest))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="bank.bin is damaged: row 0 "):
        Bank(state(0), path).read(row)
    full = Bank(state(0), Path("/dev/full"))
    row = full.write(state(3))  # so little that it is still in a buffer
    with pytest.raises(InputError, match="cannot read or write /dev/full: No space left on device"):
        full.read(row)
    with pytest.raises(InputError, match="cannot open .*: No such file or directory"):
        Bank(state(0), tmp_path / "absent/bank.bin")


def test_without_anything_to_keep_there_is_no_file(tmp_path):
    Bank({}, tmp_path / "bank.bin")
    assert not (tmp_path / "bank.bin").exists()
