from dataclasses import asdict, replace

import pytest
from conftest import ROOT

from docs.options import documentation
from options import METHODS, PAPER, Options, parse
from runtime.cli import InputError


def test_the_options_page_is_what_the_options_say():
    """`python -m docs.options > docs/options.md` makes it again."""
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
        ({"clients": 2.5}, "--clients got '2.5', wants a whole number of at least 1"),
        ({"method": "fedsgd"}, "--method got 'fedsgd', wants one of fedu"),
        ({"no_predictor": "yes"}, "--no-predictor got 'yes', wants one of True, False"),
        ({"mu": 0.5, "method": "fedbyol"}, "--mu 0.5 changes nothing in --method fedbyol"),
        ({"divergence": "squared"}, "--divergence squared wants a --mu"),
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
