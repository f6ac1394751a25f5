"""Runs the experiments below, as many at once as there are cores: `python results/experiments.py [NAME ...]`, all of them by default.

Each is `fedu.py` with the options of its row, once a seed, and then its evaluations. A run that was interrupted is resumed, what is
finished is not repeated. Runs, with their weights, are made under runs/, and what a reader needs of them is copied to results/cifar10/;
where runs/ has none, as on a fresh clone, a run is made again and replaces that.

    python results/experiments.py --list
    python results/experiments.py fedu single
    python eval.py --table results/cifar10/{fedu,single}-s[0-9]
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from runtime.cli import InputError, Parser, number, user_errors
from sweep import Run, in_shell, make

ROOT = Path(__file__).parent.parent

# What all runs of a table have in common. Beside the paper's recipe: a smaller encoder, batches of 32, fewer rounds of one epoch.
SCALE = "--dataset cifar10 --encoder small --local-epochs 1 --batch-size 32"
LONG, SHORT = f"{SCALE} --rounds 20 --knn-every 2", f"{SCALE} --rounds 8 --knn-every 2 --classes-per-client"
# as eval.jsonl names them, with their options; runs of other than 20 rounds have the first two
EVALUATIONS = {"linear": "--linear", "knn": "--knn", "semi 0.01": "--semi 0.01", "semi 0.1": "--semi 0.1"}
KEPT = ("config.json", "metrics.jsonl", "eval.jsonl")

# name: options, number of seeds
EXPERIMENTS = {
    "untrained": (f"{LONG} --method untrained", 1),
    "fedu": (f"{LONG} --method fedu", 3),
    "single": (f"{LONG} --method single", 3),
    "fedbyol": (f"{LONG} --method fedbyol", 3),
    "fedema": (f"{LONG} --method fedema", 3),
    "central": (f"{LONG} --method central", 1),
    "fedsimclr": (f"{LONG} --method fedsimclr", 1),
    "fedsimsiam": (f"{LONG} --method fedsimsiam", 1),
    "fedmoco-v1": (f"{LONG} --method fedmoco-v1", 1),
    "fedmoco-v2": (f"{LONG} --method fedmoco-v2", 1),
    "fedca": (f"{LONG} --method fedca", 1),
    "fedavg-supervised": (f"{LONG} --method fedavg-supervised", 1),
    "fedu-iid": (f"{LONG} --method fedu --partition iid", 1),
    "single-iid": (f"{LONG} --method single --partition iid", 1),
}
for method in ("ldawa", "fedalignuniform", "fedbarlow", "fedu2", "fedx", "orchestra"):  # after FedU
    EXPERIMENTS[method] = (f"{LONG} --method {method}", 1)
# its authors' rate; at the recipe's, ten times as high, the loss ends at that of chance
EXPERIMENTS["orchestra-lr-0.003"] = (f"{LONG} --method orchestra --lr 0.003", 1)
# many clients of one size, of whom few take part in a round: the setting of Orchestra and FedU2
devices = f"{SCALE} --rounds 40 --knn-every 10 --clients 20 --clients-per-round 5 --partition dirichlet-balanced --alpha 0.1"
for method in ("fedbyol", "fedu", "fedema", "fedx", "orchestra", "fedu2"):
    rate = " --lr 0.003" if method == "orchestra" else ""
    EXPERIMENTS[f"devices-{method}"] = (f"{devices} --method {method}{rate}", 1)
# which encoder is averaged, what it becomes, and whose predictor
for aggregate in ("online", "target"):
    for update in ("online", "target", "both"):
        for predictor in ("global", "local"):
            columns = f"--aggregate {aggregate} --update {update} --predictor {predictor}"
            EXPERIMENTS[f"ablation-{aggregate}-{update}-{predictor}"] = (f"{SHORT} 2 --method fedbyol {columns}", 1)
# FedU with one thing changed, `short-2` with nothing; the papers give each of K clients 1/K of the classes
for classes in (2, 4, 6, 8, 10):
    EXPERIMENTS[f"short-{classes}"] = (f"{SHORT} {classes}", 1)
for clients, classes in ((2, 5), (10, 1), (20, 1)):
    EXPERIMENTS[f"clients-{clients}"] = (f"{SHORT} {classes} --clients {clients}", 1)
# the same 20 epochs in fewer rounds
EXPERIMENTS["epochs-5"] = (f"{LONG} --local-epochs 5 --rounds 4", 2)
EXPERIMENTS["epochs-10"] = (f"{LONG} --local-epochs 10 --rounds 2", 1)
# is FedU's lead greater with the paper's E?
EXPERIMENTS["single-epochs-5"] = (f"{LONG} --local-epochs 5 --rounds 4 --method single", 2)
# and with as many rounds as the runs of E = 1, so five times their epochs?
for method in ("single", "fedu", "fedbyol", "fedema"):
    EXPERIMENTS[f"e5-{method}"] = (f"{LONG} --local-epochs 5 --method {method}", 2)
for method in ("central", "fedalignuniform", "fedx"):  # the last two are the best of those after FedU
    EXPERIMENTS[f"e5-{method}"] = (f"{LONG} --local-epochs 5 --method {method}", 1)
# does the lead depend on the encoder? What `epochs-5` and `single-epochs-5` are for `small`, in bf16, since it takes two thirds of the time
narrow = f"{LONG} --encoder resnet18-narrow --precision bf16 --local-epochs 5 --rounds 4"
for method in ("untrained", "single", "fedu", "fedema"):
    EXPERIMENTS[f"narrow-{method}"] = (f"{narrow} --method {method}", 1)
# does updating the target alone collapse, as in the paper, with more rounds than the ablation's?
EXPERIMENTS["longer-online-target-global"] = (f"{LONG} --method fedbyol --update target", 1)
# 0.42, 0.76 and 1.29 are the quartiles of the divergences that decided in short-2
for mu in ("0", "0.42", "0.76", "1.29", "inf"):
    EXPERIMENTS[f"mu-{mu}"] = (f"{SHORT} 2 --mu {mu}", 1)
EXPERIMENTS |= {
    "no-ema": (f"{SHORT} 2 --ema-decay 1", 1),
    "no-stop-gradient": (f"{SHORT} 2 --no-stop-gradient", 1),
    "no-predictor": (f"{SHORT} 2 --no-predictor", 1),
    "first-target-shared": (f"{SHORT} 2 --first-target shared", 1),
    "squared-inf": (f"{SHORT} 2 --divergence squared --mu inf", 1),
    "squared": (f"{SHORT} 2 --divergence squared --mu 4.57", 1),  # the median that `squared-inf` found, as 0.76 is for layer-mean
}


def parse_options() -> dict:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the experiments  [all]")
    parser.add_argument("--seed", type=number(int, 0), action="append", help="only these seeds, may be repeated  [all]")
    parser.add_argument("--jobs", type=number(int, 1), help="runs side by side, which share the cores  [one a core]")
    parser.add_argument("--list", action="store_true", help="print the commands, and run nothing")
    given = {"names": list(EXPERIMENTS), "seed": None, "jobs": os.cpu_count(), "list": False} | vars(parser.parse_args())
    given["names"] = given["names"] or list(EXPERIMENTS)
    for name in given["names"]:
        if name not in EXPERIMENTS:
            parser.error(f"got {name!r}, needs one of {', '.join(EXPERIMENTS)}")
    return given


def main(names: list[str], seed: list[int] | None, jobs: int, list: bool) -> None:
    # seed by seed, so that every row has a first number before any has a second
    runs = [(name, s) for s in range(max(n for _, n in EXPERIMENTS.values())) for name in names if s < EXPERIMENTS[name][1]]
    runs = [experiment(name, s) for name, s in runs if seed is None or s in seed]
    if list:
        return print("\n".join(in_shell(["fedu.py", *run.training, "--out", str(run.folder)]) for run in runs))
    if failed := make(runs, jobs, keep):
        raise InputError(f"these did not end well, their log.txt says why: {', '.join(run.folder.name for run in failed)}")


def experiment(name: str, seed: int) -> Run:
    options, run = EXPERIMENTS[name][0], f"{name}-s{seed}"
    whole = options.startswith(LONG) and options.count("--rounds") == 1
    wanted = {what: arguments.split() for what, arguments in EVALUATIONS.items() if whole or not what.startswith("semi")}
    training = [*options.split(), "--seed", str(seed)]
    return Run(Path("runs/cifar10") / run, ROOT / "results/cifar10" / run / "log.txt", training, wanted)


def keep(run: Run) -> None:
    """Copy what a reader needs of a run to its results."""
    for kept in KEPT:
        if (run.folder / kept).exists():
            shutil.copyfile(run.folder / kept, run.log.parent / kept)


if __name__ == "__main__":
    with user_errors("experiments.py"):
        main(**parse_options())
