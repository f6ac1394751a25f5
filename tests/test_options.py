from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, refused

import training
from options import METHODS, PAPER, Options, parse
from report.reference import documentation
from runtime.cli import InputError


def test_the_options_page_is_what_the_options_say():
    """`python -m report.reference > docs/options.md` makes it again."""
    assert (ROOT / "docs/options.md").read_text() == documentation() + "\n"


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_options_can_be_stored_and_read_again(method):
    options = Options(method=method, dataset="cifar100")
    assert Options(**asdict(options)) == options and {k: getattr(options, k) for k in PAPER} == PAPER
    row = METHODS[method]
    assert (options.aggregate, options.update, options.predictor) == (row.aggregate, row.update, row.predictor)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"clients": 2.5}, "--clients got '2.5', needs a whole number of at least 1"),
        ({"method": "fedsgd"}, "--method got 'fedsgd', needs one of fedu"),
        ({"no_predictor": "yes"}, "--no-predictor got 'yes', needs one of True, False"),
        ({"mu": 0.5, "method": "fedbyol"}, "--mu 0.5 changes nothing in --method fedbyol"),
        ({"divergence": "squared"}, "--divergence squared needs a --mu"),
        ({"clients_per_round": 9}, "--clients-per-round got 9, there are 5 clients"),
    ],
)
def test_options_from_a_notebook_are_checked_like_those_of_a_command(given, words):
    with pytest.raises(InputError, match=words):
        Options(**given)


def test_a_given_option_that_changes_nothing_is_refused_even_with_its_usual_value(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "fedbyol", "--mu", "0.4"])
    assert "--mu 0.4 changes nothing in --method fedbyol" in capsys.readouterr().err
    assert replace(Options(method="fedbyol"), seed=3).mu == 0.4


def test_paper_recipe():
    for dataset in ("cifar10", "cifar100"):
        options = asdict(Options(dataset=dataset))
        paper = {"encoder": "resnet18", "rounds": 100, "local_epochs": 5, "batch_size": 128, "lr": 0.032, "ema_decay": 0.99, "mu": 0.4}
        paper |= {"clients": 5, "clients_per_round": None, "partition": "classes", "divergence": "layer-mean", "method": "fedu"}
        assert {k: options[k] for k in paper} == paper
    assert (training.MOMENTUM, training.WEIGHT_DECAY) == (0.9, 5e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset", "mnist"], ["--dataset", "'mnist'"]),
        (["--dataset", "none.npz"], ["none.npz does not exist"]),
        (["--clients", "65"], ["65 clients", "--clients"]),
        (["--method", "single", "--predictor", "dapu"], ["--predictor dapu changes nothing"]),
        (["--clients", "0"], ["--clients", "'0'", "at least 1"]),
        (["--clients", "many"], ["--clients", "'many'"]),
        (["--clients-per-round", "3"], ["--clients-per-round got 3", "2 clients"]),
        (["--classes-per-client", "5"], ["--classes-per-client got 5", "4 classes"]),
        (["--batch-size", "33"], ["--batch-size"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2"]),
        (["--lr", "-1"], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "1e30"], ["round 0: no upload is finite", "--lr"]),
        (["--dropout", "1.5"], ["--dropout", "at most 1"]),
        (["--ema-decay", "1.5"], ["--ema-decay", "at most 1"]),
        (["--rounds", "1.5"], ["--rounds", "whole number"]),
        (["--partition", "dirichlet", "--alpha", "0"], ["--alpha", "at least 0.001"]),
        (["--partition", "dirichlet", "--alpha", "inf"], ["--alpha", "at most 1e+06"]),
        (["--seed", "18446744073709551616"], ["--seed", "at most"]),
        (["--method", "fedca", "--batch-size", "64"], ["2 clients want 64 images each, there are 0"]),
        (["--divergence", "squared"], ["--divergence squared needs a --mu"]),
        (["--method", "fedsimclr", "--predictor", "local"], ["--predictor local changes nothing in --method fedsimclr"]),
        (["--method", "fedsimsiam", "--update", "both"], ["--update both changes nothing"]),
        (["--method", "fedmoco-v1", "--no-predictor"], ["--no-predictor changes nothing"]),
        (["--method", "fedbyol", "--mu", "1"], ["--mu 1.0 changes nothing"]),
        (["--tau", "0.5"], ["--tau 0.5 changes nothing in --method fedu"]),
        (["--no-predictor", "--mu", "1"], ["--mu 1.0 changes nothing"]),
        (["--no-predictor", "--predictor", "local"], ["--predictor local changes nothing"]),
        (["--alpha", "0.1"], ["--alpha 0.1 changes nothing"]),
        (["--partition", "iid", "--classes-per-client", "2"], ["--classes-per-client 2 changes nothing"]),
        (["--method", "fedsimclr", "--ema-decay", "1"], ["--ema-decay 1.0 changes nothing"]),
        (["--method", "fedbyol", "--divergence-from", "global"], ["--divergence-from global changes nothing"]),
        (["--method", "central", "--clients-per-round", "1"], ["--clients-per-round 1 changes nothing"]),
        (["--image-size", "64"], ["--image-size 64 changes nothing"]),
        (["--method", "fedsgd"], ["--method", "fedsgd"]),
        (["--resume", "runs/none"], ["runs/none", "no config.json"]),
        (["--resume", "x", "--out", "y"], ["--resume", "--out"]),
        (["--out", "/proc/fedu"], ["--out /proc/fedu"]),
        (["--bogus"], ["--bogus"]),
    ],
)
def test_bad_options_are_one_sentence(tiny, command, tmp_path, options, words):
    base = [] if "--resume" in options else tiny
    assert refused(command("fedu.py", *base, *options, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("runs/*/encoder.pt")) and not list(tmp_path.glob("runs/*/.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_cuda_where_there_is_none(tiny, command, tmp_path):
    assert refused(command("fedu.py", *tiny, "--device", "cuda", cwd=tmp_path), "--device got cuda")
    assert not (tmp_path / "runs").exists()


def test_settings_are_typed_and_belong_to_a_method():
    assert Options().settings == {"jitter": 1.0}
    assert Options(method="fedmoco-v1").settings == {"jitter": 0.5, "temperature": 0.07, "queue": 4096}
    assert Options(method="fedmoco-v2").settings == {"jitter": 1.0, "temperature": 0.2, "queue": 4096}
    assert Options(method="fedsimclr").settings == {"jitter": 1.0, "temperature": 0.07}
    assert Options(method="fedca").settings == {"jitter": 1.0, "temperature": 0.07, "dictionary": 4096}
    given = parse(["--method", "fedmoco-v2", "--set", "queue=64", "--set", "temperature=0.1", "--set", "queue=128"]).given
    assert Options(**given).settings == {"jitter": 1.0, "temperature": 0.1, "queue": 128}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "queue=8"], "--set got 'queue'; --method fedu has the settings jitter"),
        (["--method", "fedmoco-v1", "--set", "queue=0.5"], "--set queue got '0.5', needs a whole number of at least 1"),
        (["--method", "fedsimclr", "--set", "temperature=0"], "--set temperature got '0', needs a number above 0"),
        (["--set", "jitter=1.3"], "--set jitter got '1.3', needs a number of at least 0 and at most 1.25"),
        (["--set", "jitter"], "--set got 'jitter', needs NAME=VALUE"),
        (["--set", "jitter="], "--set got 'jitter=', needs NAME=VALUE"),
    ],
)
def test_wrong_settings_are_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert words in capsys.readouterr().err
