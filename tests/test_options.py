"""The command lines: the paper's recipe and each method's row in literal numbers, each range at its ends, and each refusal both ways."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import CPU, ROOT

from federation import build_networks
from options import HOST_OPTIONS, METHODS, Options, evaluation_parser, parse, parse_evaluation, run_name, training_parser
from report.reference import as_markdown, documentation
from runtime.cli import InputError


def options_of(line: str) -> Options:
    """The options of a command line of fedu.py."""
    return Options(**parse(line.split()).given)


# ------------------------------------------------------------------------------------------------------------- defaults

PAPER = {
    "method": "fedu", "clients": 5, "clients_per_round": None, "dropout": 0, "partition": "classes", "classes_per_client": None,
    "encoder": "resnet18", "norm": "batch", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "ema_decay": 0.99,
    "momentum": 0.9, "weight_decay": 5e-4,
    "precision": "fp32", "aggregate": "online", "update": "online", "predictor": "dapu", "mu": 0.4, "divergence": "layer-mean",
    "divergence_from": "received", "first_target": "copy", "server_rule": "mean", "statistics": "shared", "no_predictor": False,
    "no_stop_gradient": False, "compile": False, "tau": 0.7, "alpha": 0.5, "seed": 0, "knn_every": 10,
    "on_nonfinite": "skip", "max_drift": 10.0, "on_outlier": "drop", "dp_clip": None, "dp_noise": None, "dp_delta": 1e-5,
    "device": "auto", "processes": "auto", "log": "none", "image_size": 32, "data_root": "~/.cache/fedu",
    "settings": {"jitter": 1, "crop_scale": 0.08, "greyscale": 0.2, "decorrelation": 0},
    "labels": None, "holdout": 0, "pixel_range": None, "skip_broken": False,
    "no_cache": False, "save_partition": None, "dry_run": False, "init": None, "views": None,
}  # fmt: skip
FASHION = {"encoder": "tiny", "rounds": 8, "local_epochs": 2, "batch_size": 32, "lr": 0.1, "knn_every": 2}
ALL = {"jitter": 1, "crop_scale": 0.08, "greyscale": 0.2, "decorrelation": 0}  # settings of every method
# aggregate, update, predictor; the servers; what a client minimises, and its numbers
ROWS = {
    "fedu": ("online", "online", "dapu", "one", "BYOL", ALL),
    "fedbyol": ("online", "online", "global", "one", "BYOL", ALL),
    "fedema": ("online", "ema", "ema", "one", "BYOL", ALL),
    "fedsimsiam": ("online", "online", "global", "one", "SimSiam", ALL),
    "fedsimclr": ("online", "online", "global", "one", "SimCLR", {**ALL, "temperature": 0.07}),
    "fedmoco-v1": ("online", "online", "global", "one", "MoCo", {**ALL, "jitter": 0.5, "temperature": 0.07, "queue": 4096}),
    "fedmoco-v2": ("online", "online", "global", "one", "MoCo", {**ALL, "temperature": 0.2, "queue": 4096}),
    "fedca": ("online", "online", "global", "one", "FedCA", {**ALL, "temperature": 0.07, "dictionary": 4096}),
    "fedx": ("online", "online", "global", "one", "FedX", {**ALL, "temperature": 0.1, "target_temperature": 0.1}),
    "orchestra": (
        "online", "online", "global", "one", "Orchestra",
        {**ALL, "temperature": 0.1, "clusters": 128, "local_clusters": 16, "memory": 128, "target_decay": 0.996},
    ),
    "fedbarlow": ("online", "online", "global", "one", "BarlowTwins", {**ALL, "redundancy": 0.005}),
    "fedalignuniform": ("online", "online", "global", "one", "AlignUniform", {**ALL, "uniformity": 1}),
    "fedavg-supervised": ("online", "online", "global", "one", "Supervised", ALL),
    "fedu2": ("online", "online", "global", "one", "FedU2", {**ALL, "uniformity": 0.01, "server_lr": 0.1}),
    "ldawa": ("online", "online", "global", "one", "BYOL", ALL),
    "single": ("online", "online", "global", "each", "BYOL", ALL),
    "central": ("online", "online", "global", "pooled", "BYOL", ALL),
    "untrained": ("online", "online", "global", "one", "BYOL", ALL),
}  # fmt: skip


def test_without_options_a_run_is_fedu_by_the_papers_recipe():
    for dataset in ("cifar10", "cifar100", "x.npz", "folder"):
        assert asdict(options_of(f"--dataset {dataset}")) == {**PAPER, "dataset": dataset}


def test_the_embedded_images_have_a_recipe_of_their_own():
    assert asdict(options_of("")) == {**PAPER, **FASHION, "dataset": "fashion"}


@pytest.mark.parametrize("method", ROWS)
def test_each_methods_row(method):
    aggregate, update, predictor, servers, objective, settings = ROWS[method]
    row = {"method": method, "encoder": "tiny", "aggregate": aggregate, "update": update, "predictor": predictor, "settings": settings}
    options = options_of(f"--dataset cifar10 --method {method} --encoder tiny")
    assert asdict(options) == PAPER | {"dataset": "cifar10"} | row
    assert Options(**asdict(options)) == options  # as it is stored and read again
    assert METHODS[method].servers == servers and METHODS[method].trains == (method != "untrained")
    networks = build_networks(options, torch.arange(10), CPU)
    assert type(networks).__name__ == objective and getattr(networks, "temperature", None) == settings.get("temperature")
    assert len(getattr(networks, "queue", ())) == settings.get("queue", 0)


def test_there_is_no_other_method_and_only_fedca_has_public_images():
    assert list(METHODS) == list(ROWS)
    assert {name: row.public for name, row in METHODS.items() if row.public} == {"fedca": 0.02}


@pytest.mark.parametrize(
    "line, differs",
    [
        ("--lr 0.5", {**FASHION, "dataset": "fashion", "lr": 0.5}),
        ("--rounds 100 --encoder resnet18", {**FASHION, "dataset": "fashion", "rounds": 100, "encoder": "resnet18"}),
        ("--dataset cifar10 --batch-size 32 --knn-every 0", {"batch_size": 32, "knn_every": 0}),
        ("--dataset cifar10 --mu inf", {"mu": float("inf")}),
        ("--dataset cifar10 --predictor global", {"predictor": "global"}),
        ("--dataset cifar10 --no-predictor", {"no_predictor": True, "predictor": "global"}),
        ("--dataset cifar10 --method fedema --update online", {"method": "fedema", "predictor": "ema"}),
        ("--dataset cifar10 --method fedema --predictor dapu --mu 2", {"method": "fedema", "update": "ema", "mu": 2}),
        ("--dataset cifar10 --method fedbyol --aggregate target --update both --predictor local",
         {"method": "fedbyol", "aggregate": "target", "update": "both", "predictor": "local"}),
        ("--dataset cifar10 --divergence squared --mu 7 --clients 3 --clients-per-round 3",
         {"divergence": "squared", "mu": 7, "clients": 3, "clients_per_round": 3}),
    ],
)  # fmt: skip
def test_what_is_given_wins_over_recipe_and_row(line, differs):
    assert asdict(options_of(line)) == {**PAPER, "dataset": "cifar10", **differs}


def test_only_where_a_run_computes_may_change_when_it_is_resumed():
    assert set(HOST_OPTIONS) == {"data_root", "device", "processes", "log", "no_cache", "save_partition", "dry_run", "dp_delta"}


# --------------------------------------------------------------------------------------------------------------- ranges

PROBABILITIES = ("-0.1 1.1 nan many", "0 1 0.3")
# option: texts that are refused and texts that are taken, and the options beside which it changes something
RANGES = {
    "--clients": ("0 -1 2.5 many", "1 100", ""),
    "--processes": ("0 -2 1.5 many", "auto 1 64", ""),
    "--clients-per-round": ("0 6", "1 5", ""),
    "--classes-per-client": ("0 0.5", "1 9", ""),
    "--rounds": ("0 1.5", "1 1000", ""),
    "--local-epochs": ("0", "1", ""),
    "--batch-size": ("1 0", "2", ""),
    "--image-size": ("7", "8", "--dataset folder"),
    "--knn-every": ("-1", "0 1", ""),
    "--seed": ("-1 9223372036854775808", "0 9223372036854775807", ""),
    "--lr": ("0 -1 nan", "1e-9 100", ""),
    "--mu": ("-0.1 nan", "0 inf", ""),
    "--alpha": ("0 0.0009 1000001 inf", "0.001 1000000", "--partition dirichlet"),
    "--momentum": ("-0.1 1 nan", "0 0.999", ""),
    "--weight-decay": ("-0.1 1.1 nan", "0 1", ""),
    "--dropout": (*PROBABILITIES, ""),
    "--ema-decay": (*PROBABILITIES, ""),
    "--tau": (*PROBABILITIES, "--method fedema"),
    "--method": ("fedsgd FedU", " ".join(ROWS), ""),
    "--partition": ("none", "classes iid dirichlet dirichlet-balanced", ""),
    "--aggregate": ("both ema", "online target", ""),
    "--update": ("local", "online target both ema", ""),
    "--predictor": ("online", "global local dapu ema", ""),
    "--divergence": ("l2", "layer-mean squared", "--mu 1"),
    "--divergence-from": ("sent", "received global", ""),
    "--first-target": ("own", "copy shared", ""),
    "--server-rule": ("krum", "mean median trimmed", ""),
    "--on-nonfinite": ("warn", "skip error", ""),
    "--encoder": ("vgg timm:", "tiny small resnet18-narrow resnet18 resnet50 timm:vit_tiny_patch16_224", ""),
    "--dp-clip": ("0 -1 nan inf 1e7 much", "1e-6 1 1e6", ""),
    "--dp-noise": ("0 -1 nan inf 1e4 much", "1e-3 1 1e3", "--dp-clip 1"),
    "--dp-delta": ("0 -1 nan 1 much", "1e-15 0.1", "--dp-clip 1 --dp-noise 1"),
    "--statistics": ("own", "shared local", ""),
    "--norm": ("layer", "batch group", ""),
    "--precision": ("fp16", "fp32 bf16", ""),
    "--device": ("tpu", "auto cpu cuda", ""),
    "--log": ("wandb", "none tensorboard", ""),
}


@pytest.mark.parametrize("option", RANGES)
def test_values_inside_a_range_are_taken_and_outside_refused(refuses, option):
    outside, inside, beside = RANGES[option]
    name = option[2:].replace("-", "_")
    for text in inside.split():
        value = getattr(options_of(f"{beside} {option} {text}"), name)
        assert value == type(value)(text)
    for text in outside.split():
        assert refuses(lambda text=text: parse(f"{beside} {option} {text}".split()), option, text)
        with pytest.raises(InputError, match=f"^{name} "):
            Options(**{**parse(beside.split()).given, name: text})


@pytest.mark.parametrize(
    "given, words",
    [
        ({"clients": 2.5}, "^clients got '2.5'.*whole number of at least 1"),
        ({"method": "fedsgd"}, "^method got 'fedsgd'.*fedu, fedbyol"),
        ({"no_predictor": "yes"}, "^no_predictor got 'yes'"),
        ({"mu": 0.5, "method": "fedbyol"}, "^mu 0.5 changes nothing in method fedbyol"),
        ({"max_drift": float("inf"), "on_outlier": "clip"}, "^on_outlier clip changes nothing .*finite max_drift"),
        ({"max_drift": 5, "method": "single"}, "^max_drift 5.0 changes nothing"),
        ({"max_drift": 0.5}, "^max_drift got '0.5'.*at least 1"),
        ({"divergence": "squared"}, "^divergence squared .* mu "),
        ({"clients_per_round": 9}, "^clients_per_round got 9.* 5 clients"),
        ({"clients_per_round": 2, "server_rule": "trimmed"}, "^server_rule trimmed needs at least 3 clients a round, and there are 2"),
    ],
)
def test_options_from_a_notebook_are_checked_like_those_of_a_command(given, words):
    with pytest.raises(InputError, match=words):
        Options(**given)


def test_settings_belong_to_a_method():
    line = "--method fedmoco-v2 --set queue=64 --set temperature=0.1 --set queue=128"
    assert options_of(line).settings == {**ALL, "temperature": 0.1, "queue": 128}
    assert options_of("--set jitter=0.25 --set decorrelation=2").settings == {**ALL, "jitter": 0.25, "decorrelation": 2}


@pytest.mark.parametrize(
    "line, words",
    [
        ("--set queue=8", ["--set got 'queue'", "fedu", "jitter"]),
        ("--method fedmoco-v1 --set queue=0.5", ["--set queue got '0.5'", "whole number of at least 1"]),
        ("--method fedca --set dictionary=0", ["--set dictionary got '0'", "at least 1"]),
        ("--method fedsimclr --set temperature=0", ["--set temperature got '0'", "above 0"]),
        ("--method fedbarlow --set redundancy=-1", ["--set redundancy got '-1'", "at least 0"]),
        ("--method fedalignuniform --set uniformity=nan", ["--set uniformity got 'nan'", "at least 0"]),
        ("--method orchestra --set target_decay=1.1", ["--set target_decay got '1.1'", "at most 1"]),
        ("--method orchestra --set memory=0", ["--set memory got '0'", "at least 1"]),
        ("--processes 0", ["--processes", "got '0', needs a whole number of at least 1, or auto"]),
        ("--set jitter=1.3", ["--set jitter got '1.3'", "at least 0 and at most 1.25"]),
        ("--set decorrelation=-1", ["--set decorrelation got '-1'", "at least 0"]),
        ("--set crop_scale=0", ["--set crop_scale got '0'", "above 0 and at most 1"]),
        ("--set greyscale=1.1", ["--set greyscale got '1.1'", "at most 1"]),
        ("--set jitter=-0.1", ["--set jitter got '-0.1'"]),
        ("--set jitter", ["--set got 'jitter'", "NAME=VALUE"]),
        ("--set jitter=", ["--set got 'jitter='", "NAME=VALUE"]),
    ],
)
def test_wrong_settings_are_one_sentence(refuses, line, words):
    assert refuses(lambda: parse(line.split()), *words)


# --------------------------------------------------------------------------------------------- options that change nothing

NO_TARGET = ["fedsimsiam", "fedsimclr", "fedca", "fedx", "orchestra", "fedbarlow", "fedalignuniform", "fedavg-supervised"]
NO_PREDICTOR = ["fedsimclr", "fedmoco-v1", "fedmoco-v2", "fedca", "orchestra", "fedbarlow", "fedalignuniform", "fedavg-supervised"]
NO_ABLATION = [*NO_PREDICTOR, "fedx"]
NOT_EXCHANGED = ["single", "central"]


def methods(*names: str) -> list[str]:
    return [f"--method {name}" for name in names]


# an option, the command lines in which it changes something, and those in which it is refused
EFFECTIVE = [
    ("--predictor local", ["", *methods("fedbyol", "fedema", "fedsimsiam", "fedx")],
     ["--no-predictor", *methods(*NO_PREDICTOR, *NOT_EXCHANGED)]),
    ("--predictor global", ["", *methods("fedbyol", "fedsimsiam")], ["--no-predictor", *methods(*NO_PREDICTOR, *NOT_EXCHANGED)]),
    ("--no-predictor", ["", *methods("fedbyol", "fedsimsiam", "single", "central")], methods(*NO_ABLATION)),
    ("--no-stop-gradient", ["", *methods("fedema", "fedsimsiam", "single", "central")], methods(*NO_ABLATION)),
    ("--aggregate target", ["", *methods("fedema", "fedmoco-v1", "fedmoco-v2")], methods(*NO_TARGET)),
    ("--aggregate online", ["", *methods(*NO_TARGET)], []),
    ("--update target", ["", *methods("fedbyol", "fedmoco-v1", "fedmoco-v2")], methods(*NO_TARGET)),
    ("--update both", ["", *methods("fedbyol", "fedmoco-v1", "fedmoco-v2")], methods(*NO_TARGET)),
    ("--update online", ["", *methods("fedema", *NO_TARGET)], []),
    ("--update ema", ["", *methods("fedbyol", "fedsimclr")], []),
    ("--ema-decay 0.9", ["", *methods("fedema", "fedmoco-v1", "fedmoco-v2", "single", "central")], methods(*NO_TARGET)),
    ("--first-target shared", ["", *methods("fedema", "fedmoco-v1", "fedmoco-v2", "single", "central")], methods(*NO_TARGET)),
    ("--mu 0.4", ["", "--method fedbyol --predictor dapu", "--method fedema --predictor dapu", "--divergence squared"],
     ["--predictor global", "--predictor local", "--no-predictor", *methods("fedbyol", "fedema", "fedsimclr", "single")]),
    ("--tau 0.7", ["--method fedema", "--update ema", "--predictor ema", "--method fedema --update online",
     "--method fedema --predictor global"], ["", "--method fedbyol", "--method fedema --update online --predictor global"]),
    ("--divergence-from global", ["", "--method fedema", "--update ema --predictor global", "--method fedbyol --predictor ema"],
     ["--predictor local", "--method fedbyol", "--method fedema --update online --predictor local"]),
    ("--divergence squared", ["--mu 1", "--predictor global", *methods("fedbyol", "fedema", "single", "central")],
     ["", "--method fedbyol --predictor dapu"]),
    ("--server-rule median", ["", *methods("fedema", "fedsimclr", "untrained")], methods("fedca", "fedu2", "ldawa", *NOT_EXCHANGED)),
    ("--statistics local", ["", "--norm group", *methods("fedema", "fedca", "ldawa", "untrained")], methods(*NOT_EXCHANGED)),
    ("--dp-clip 1", ["", *methods("fedema", "fedbarlow")], methods(*NOT_EXCHANGED)),
    ("--dp-noise 1", ["--dp-clip 1"], [""]),
    ("--dp-delta 1e-6", ["--dp-clip 1 --dp-noise 1"], ["", "--dp-clip 1"]),
    ("--classes-per-client 2", ["", "--partition classes"], ["--partition iid", "--partition dirichlet"]),
    ("--alpha 0.5", ["--partition dirichlet", "--partition dirichlet-balanced"], ["", "--partition classes", "--partition iid"]),
    ("--clients-per-round 5", ["", "--method single"], ["--method central"]),
    ("--image-size 32", ["--dataset folder"], [f"--dataset {name}" for name in ("fashion", "cifar10", "cifar100", "x.npz")]),
]  # fmt: skip


@pytest.mark.parametrize("option, beside, against", EFFECTIVE, ids=[option for option, *_ in EFFECTIVE])
def test_an_option_is_refused_only_where_it_changes_nothing(refuses, option, beside, against):
    """Also with its usual value, when it is given."""
    for others in beside:
        options_of(f"{others} {option}")
    for others in against:
        assert refuses(lambda line=f"{others} {option}": parse(line.split()), option.split()[0])


def test_a_default_that_changes_nothing_is_no_mistake_in_a_notebook():
    assert replace(Options(method="fedbyol"), seed=3, mu=0.4).mu == 0.4


# ------------------------------------------------------------------------------------------------- the command of fedu.py


def test_the_run_folder_is_new_or_continued(refuses):
    command = parse(["--out", "x", "--overwrite", "--clients", "3"])
    assert (command.given, str(command.out), command.resume, command.overwrite) == ({"clients": 3}, "x", None, True)
    command = parse(["--resume", "x", "--device", "cpu"])
    assert (command.given, command.out, str(command.resume), command.overwrite) == ({"device": "cpu"}, None, "x", False)
    for other in ("--out y", "--overwrite"):
        assert refuses(lambda other=other: parse(["--resume", "x", *other.split()]), "--resume", other.split()[0])
    assert refuses(lambda: parse(["--bogus"]), "--bogus")


# ------------------------------------------------------------------------------------------------- the command of eval.py

TASKS = {
    "linear": ["", "--linear"],
    "knn": ["--knn"],
    "semi": ["--semi 0.1"],
    "export": ["--export f.npz"],
    "weights": ["--export f.safetensors", "--export f.onnx", "--export folder"],
    "spectrum": ["--spectrum"],
    "table": ["--table"],
    "plot": ["--plot"],
    "against": ["--against mu"],
    "report": ["--report"],
}
GOES_WITH = {
    "--features projector": ["linear", "knn", "spectrum", "export"],
    "--features pixels": ["linear", "knn", "spectrum", "export"],
    "--head mlp": ["semi"],
    "--epochs 3": ["linear", "semi"],
    "--transfer cifar10": ["linear", "knn", "semi", "spectrum", "export"],
    "--dataset x.npz": ["linear", "knn", "semi", "spectrum", "export"],
    "--seed 1": ["linear", "semi", "spectrum"],
    "--data-root x": ["linear", "knn", "semi", "spectrum", "export"],
    "--device cpu": ["linear", "knn", "semi", "spectrum", "export"],
    "--out x.png": ["spectrum", "table", "plot", "against", "report"],
    "--size 3,2.5": ["spectrum", "plot", "against"],
    "--no-title": ["spectrum", "plot", "against"],
}


def test_defaults_of_an_evaluation():
    for task, lines in TASKS.items():
        for line in lines:
            options = parse_evaluation(line.split())
            assert (options.task, options.runs) == (task, [])
            assert options.epochs == {"linear": 200, "semi": 100}.get(task)
            assert (options.features, options.head, options.seed, options.device) == ("backbone", "linear", 0, "auto")
            assert (options.transfer, options.dataset, options.data_root, options.out, options.size) == (None,) * 5
            assert not options.no_title
    assert parse_evaluation(["--semi", "0.1"]).semi == 0.1 and parse_evaluation(["--against", "mu"]).against == "mu"


@pytest.mark.parametrize("option", GOES_WITH)
def test_an_evaluations_option_is_refused_where_it_changes_nothing(refuses, option):
    name, _, text = option[2:].replace("-", "_").partition(" ")
    value = {"3,2.5": (3.0, 2.5), "": True}.get(text, text)
    for task, lines in TASKS.items():
        for line in lines:
            given = f"{line} {option}".split()
            if task in GOES_WITH[option]:
                assert getattr(parse_evaluation(given), name) == value or str(getattr(parse_evaluation(given), name)) == value
            else:
                assert refuses(lambda given=given: parse_evaluation(given), option.split()[0], lines[-1].split()[0])


@pytest.mark.parametrize(
    "outside, inside",
    [
        ("--semi 0|--semi -0.1|--semi 1.5|--semi nan", "--semi 1|--semi 1e-9"),
        ("--epochs 0|--epochs 1.5", "--epochs 1"),
        ("--seed -1|--seed 9223372036854775808", "--seed 0|--seed 9223372036854775807"),
        ("--features image|--head cosine --semi 1|--device tpu", "--head linear --semi 1|--features backbone"),
        ("--plot --size 3|--plot --size 0.5,3|--plot --size 3,101|--plot --size a,b", "--plot --size 1,100"),
        ("--transfer cifar10 --dataset x.npz", "--transfer cifar10|--dataset x.npz"),
        ("--export f.txt|--export f.pt", "--export f.npz|--export f.safetensors|--export f.onnx|--export folder"),
        ("--knn --linear|--semi 0.1 --knn|--table --plot|--bogus", "run1 run2 --knn"),
    ],
)
def test_values_of_an_evaluation(refuses, outside, inside):
    for line in inside.split("|"):
        parse_evaluation(line.split())
    for line in outside.split("|"):
        assert refuses(lambda line=line: parse_evaluation(line.split()), line.removeprefix("--plot ").split()[0])


# ------------------------------------------------------------------------------------------------ the name of a run


@pytest.mark.parametrize(
    "given, name",
    [
        ({}, "fashion-fedu-5clients-s0"),
        ({"dataset": "cifar10", "method": "single", "clients": 3, "seed": 7}, "cifar10-single-3clients-s7"),
        ({"mu": 0.4, "rounds": 8, "device": "cpu", "data_root": "/x", "log": "tensorboard"}, "fashion-fedu-5clients-s0"),
        ({"mu": 0.2, "rounds": 20}, "fashion-fedu-5clients-s0-mu0.2-rounds20"),
        ({"dataset": "cifar10", "rounds": 8}, "cifar10-fedu-5clients-s0-rounds8"),
        ({"mu": float("inf"), "encoder": "small"}, "fashion-fedu-5clients-s0-mu-inf-encoder-small"),
        ({"no_predictor": True, "lr": 0.123456789}, "fashion-fedu-5clients-s0-no-predictor-lr0.123456789"),
        ({"method": "fedsimclr", "settings": {"temperature": 0.1}}, "fashion-fedsimclr-5clients-s0-temperature0.1"),
        ({"dataset": "mine/x.npz"}, "x-fedu-5clients-s0-2a7b14b74a"),
        ({"rounds": 2, "local_epochs": 1, "knn_every": 1, "lr": 0.05}, "fashion-fedu-5clients-s0-rounds2-local-epochs1-lr-f25083dd67"),
    ],
)
def test_a_run_is_named_by_its_options(given, name):
    assert run_name(Options(**given)) == name


# ------------------------------------------------------------------------------------------------ the page of options


def test_the_options_page_is_what_the_options_say():
    """`python -m report.reference > docs/options.md` makes it again."""
    assert (ROOT / "docs/options.md").read_text() == documentation() + "\n"


def test_each_method_has_a_row_that_compares_it_with_its_paper_and_its_code():
    tables = (ROOT / "docs/methods.md").read_text().split("| | paper | authors' code | here |\n")[1:]
    rows = [line for table in tables for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert len(tables) == 2 and {row.count("|") for row in rows} == {5}
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])} >= {*METHODS} - {"untrained"}


def test_the_page_has_a_line_for_each_option_of_both_commands():
    for parser in (training_parser(), evaluation_parser()):
        options = [action.option_strings[-1] for action in parser._actions if action.option_strings and action.dest != "help"]
        lines = [line for line in as_markdown(parser).splitlines() if line.startswith("| `--")]
        assert [line.split("`")[1].split()[0] for line in lines] == options
    assert "| `--features` | backbone | `backbone`, `projector`, `pixels`: " in as_markdown(evaluation_parser())
    assert "| `--mu` | 0.4 | " in as_markdown(training_parser())
