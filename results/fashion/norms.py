"""How far the uploads of each round move from the server's model, for the choice of --dp-clip.

    PYTHONPATH=. python results/fashion/norms.py > results/fashion/norms.log

It makes the run of `python fedu.py`.
"""

import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import fedu
from options import Options
from runtime.uploads import Uploads

moved: list[list[float]] = []
exclude = Uploads.exclude
Uploads.exclude = lambda self, lengths: (moved.append(lengths), exclude(self, lengths))[1]
with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
    fedu.train(Options(), Path(folder) / "run")
for round_, lengths in enumerate(moved):
    print(f"round {round_}: median {statistics.median(lengths):.2f}, {min(lengths):.2f} to {max(lengths):.2f}")
