"""What one wrong party of five does to a run, and what stops it.

    PYTHONPATH=. python results/flower/attacks.py "--max-drift inf" "--on-outlier drop" "--on-outlier clip" > results/flower/attacks.log
    PYTHONPATH=. OMP_NUM_THREADS=1 python results/flower/attacks.py "median, inf" "trimmed, inf" >> results/flower/attacks.log

Client 4 follows the protocol, but from the second round on it uploads something else. Runs of five rounds on the embedded images, with
uploads that are judged in no way, with outliers left out, with outliers shortened, and by the server's other rules without a bound.
Arguments choose some of the settings.
"""

import io
import re
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

import fedu
from options import Options
from runtime.cli import InputError
from runtime.uploads import Uploads

ATTACKER = 4
INF = {"max_drift": float("inf")}
SETTINGS = {
    "--max-drift inf": INF,
    "--on-outlier drop": {},
    "--on-outlier clip": {"on_outlier": "clip"},
    "median, inf": {"server_rule": "median"} | INF,
    "trimmed, inf": {"server_rule": "trimmed"} | INF,
}


def noise(change: Tensor) -> Tensor:
    drawn = torch.randn(change.shape, generator=torch.Generator().manual_seed(0))
    return drawn * (change.norm() / drawn.norm())


# "one weight" is the last number of the upload, a running statistic of the predictor, which training does not read
ATTACKS = {  # what is uploaded, of what was received, the honest change, and the upload of client 0
    "none": lambda received, change, other: received + change,
    "1e30 everywhere": lambda received, change, other: torch.full_like(received, 1e30),
    "one weight of 1e30": lambda received, change, other: torch.cat([(received + change)[:-1], torch.tensor([1e30])]),
    "change times 100": lambda received, change, other: received + 100 * change,
    "change with its sign flipped": lambda received, change, other: received - change,
    "noise of the change's norm": lambda received, change, other: received + noise(change),
    "a copy of client 0's upload": lambda received, change, other: other,
}


def measure(attack: str, setting: str) -> str:
    """The kNN accuracy of the last round, and in how many of the four attacked rounds the attacker was named."""
    turns, first = [], []
    start, upload, round_ = fedu.start_turn, fedu.model_upload, [0]

    def note(options, federation, bank, number, clients, turn):
        job = start(options, federation, bank, number, clients, turn)
        turns.append((turn.client.id, turn.received))
        round_[0] = number
        return job

    def plant(networks, aggregate, out):
        made = upload(networks, aggregate, out=out)
        client, received = turns[-1]
        if client == 0:
            first[:] = [made.clone()]
        if client == ATTACKER and round_[0]:
            made.copy_(ATTACKS[attack](received, made - received, first[0]))
        return made

    fedu.start_turn, fedu.model_upload = note, plant
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            run = fedu.train(Options(rounds=5, knn_every=1, device="cpu", processes=1, **SETTINGS[setting]), Path(folder) / "run")
    except InputError as error:
        return f"ends: {re.match('round [0-9]+', str(error))[0]}"
    finally:
        fedu.start_turn, fedu.model_upload = start, upload
    named = [client for row in run.metrics for client in row["outliers"]]
    assert set(named) <= {ATTACKER}, said.getvalue()
    return f"{100 * run.metrics[-1]['knn']:.1f}, {len(named)} of 4"


def largest_honest() -> float:
    """How many times as far as the median the client that moves furthest has moved, in a run without an attack."""
    ratios, exclude = [], Uploads.exclude

    def note(self, moved):
        ratios.append(max(moved) / sorted(moved)[len(moved) // 2])
        exclude(self, moved)

    Uploads.exclude = note
    try:
        measure("none", "--on-outlier drop")
    finally:
        Uploads.exclude = exclude
    return max(ratios)


settings = sys.argv[1:] or list(SETTINGS)
print(f"kNN accuracy after 5 rounds, and in how many rounds client {ATTACKER} was named; torch {torch.__version__}")
print(f"| {'client 4 uploads':30} | {' | '.join(f'{setting:17}' for setting in settings)} |")
print("|---" * (1 + len(settings)) + "|")
for attack in ATTACKS:
    cells = [measure(attack, setting) for setting in settings]
    print(f"| {attack:30} | {' | '.join(f'{cell:17}' for cell in cells)} |", flush=True)
if "--on-outlier drop" in settings:
    print(f"without an attack, the furthest client of a round moves at most {largest_honest():.2f} times as far as the median")
