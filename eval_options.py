"""The command line of eval.py: its tasks, and the options that go with each.

Only the standard library is imported here, so that `--help` and a mistyped option are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from options import flag
from runtime.cli import Parser, number

EVALUATION_EPOCHS = {"linear": 200, "semi": 100}
# the tasks of eval.py, of which a command line has one
TASKS = {
    "linear": "--linear",
    "knn": "--knn",
    "semi": "--semi",
    "export": "--export FILE.npz",
    "weights": "--export FILE.safetensors",
    "table": "--table",
    "plot": "--plot",
    "against": "--against",
}
EVALUATIONS = ("linear", "knn", "semi")
# each further option of eval.py: its default, and the tasks in which it changes something
TASK_OPTIONS = {
    "features": ("backbone", ("linear", "knn", "export")),
    "head": ("linear", ("semi",)),
    "epochs": (None, ("linear", "semi")),
    "transfer": (None, (*EVALUATIONS, "export")),
    "seed": (0, ("linear", "semi")),
    "data_root": (None, (*EVALUATIONS, "export")),
    "device": ("auto", (*EVALUATIONS, "export")),
    "out": (None, ("plot", "against")),
}


def evaluation_parser(description: str | None = None) -> Parser:
    """The parser of eval.py, whose namespace holds only what was given."""
    parser = Parser(description)
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", nargs="*", type=Path, metavar="RUN", default=[],
        help="run folders, or folders of them  [the newest run under runs/; for --table and --against all of them]")  # fmt: skip
    group = parser.add_argument_group("tasks", "What to do with the runs: one of these.")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--linear", action="store_true",
        help="train one linear layer on the frozen encoder's standardised features: Adam 3e-3, batches of 512 (the default)")  # fmt: skip
    task.add_argument("--knn", action="store_true", help="vote of the 200 nearest training images, weighted by exp(cosine / 0.1)")
    task.add_argument("--semi", type=number(float, 0, 1, open_low=True), metavar="F",
        help="fine-tune backbone and a new head on a class-balanced fraction F of the labels: Adam 1e-3, batches of 128")  # fmt: skip
    task.add_argument("--table", action="store_true", help="print the runs' evaluations as Markdown, a row for each setting")
    task.add_argument("--plot", action="store_true", help="draw divergence, predictors, loss and kNN accuracy of every round")
    task.add_argument("--against", metavar="OPTION",
        help="draw linear accuracy against an option of fedu.py, as `mu`; `round`: kNN accuracy by round; `ablation`: bars")  # fmt: skip
    task.add_argument("--export", type=Path, metavar="FILE",
        help=".npz: representations and labels of all images, as train, test, y_train and y_test; .safetensors: the backbone's weights, "
        "for `single` of each client k in a file NAME-k.safetensors")  # fmt: skip
    how = parser.add_argument_group("settings", "How the task is done; an option that changes nothing in it is refused.")
    how.add_argument("--features", choices=("backbone", "projector", "pixels"),
        help="what represents an image; pixels: no encoder  [backbone]")  # fmt: skip
    how.add_argument("--head", choices=("linear", "mlp"), help="for --semi; mlp: Linear-BN-ReLU-Linear of hidden width 4096  [linear]")
    how.add_argument("--epochs", type=number(int, 1), help="of --linear and --semi  [200 and 100]")
    how.add_argument("--transfer", metavar="DATASET", help="evaluate on another data set than the run was trained on")
    how.add_argument("--seed", type=number(int, 0, 2**63 - 1), help="of the head, the batches and the labelled subset  [0]")
    how.add_argument("--data-root", help="folder with CIFAR  [the run's]")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute  [auto]")
    how.add_argument("--out", type=Path, help="the figure's file  [RUN/divergence.png; of several runs comparison.png; OPTION.png]")
    return parser


def parse_evaluation(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line of eval.py: its `task`, a key of TASKS, and a value of each option.

    A mistake ends the process with one sentence and exit status 2.
    """
    parser = evaluation_parser(description)
    given = vars(parser.parse_args(argv))
    task = next((name for name in TASKS if name in given), "linear")
    if task == "export" and given["export"].suffix == ".safetensors":
        task = "weights"
    elif task == "export" and given["export"].suffix != ".npz":
        parser.error(f"--export got {given['export']}, wants a name that ends in .npz or .safetensors")
    for name, (_, tasks) in TASK_OPTIONS.items():
        if name in given and task not in tasks:
            parser.error(f"{flag(name)} goes with {' or '.join(TASKS[t] for t in tasks)}, not with {TASKS[task]}")
    default = {name: value for name, (value, _) in TASK_OPTIONS.items()} | {"epochs": EVALUATION_EPOCHS.get(task)}
    return argparse.Namespace(task=task, **default | given)
