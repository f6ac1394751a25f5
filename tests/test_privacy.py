"""Clip, noise and epsilon by hand and by formulas of the papers; and in runs, that nothing leaves a client unclipped."""

import json
import math
import sys

import pytest
import torch
from conftest import CPU, KINDS, networks_of
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from torch import nn

import fedu
from federation import build_networks
from models import batchnorm_places
from options import Options, parse
from runtime.cli import InputError
from runtime.privacy import count_upload, epsilon, read_ledger, release, system_normal

SOURCES = {"system": system_normal, "repeatable": fedu.repeatable_normal(0, 0, 0)}


def test_a_change_is_clipped_and_noised_by_hand():
    """The change (3, 4) of length 5 becomes (0.6, 0.8); noise of twice the clip adds (2, -4) for z = (1, -2)."""
    upload, received = torch.tensor([4.0, 6.0]), torch.tensor([1.0, 2.0])
    z = lambda count: torch.tensor([1.0, -2.0], dtype=torch.float64)[:count]  # noqa: E731
    assert release(upload, received, 1, 0, None).tolist() == pytest.approx([1.6, 2.8])
    assert release(upload, received, 1, 2, z).tolist() == pytest.approx([3.6, -1.2])
    assert release(upload, received, 10, 0, None).equal(upload)  # which is longer than the change
    assert release(received, received, 1, 0, None).equal(received)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_is_none(value):
    received = torch.tensor([1.0, 2.0])
    assert release(torch.tensor([value, 5.0]), received, 1, 0, None).equal(received)
    assert release(torch.tensor([3e38, -3e38]), received, 1, 0, None).sub(received).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("source", SOURCES)
def test_the_noise_has_its_deviation_in_every_number(source):
    received = torch.full((1_000_001,), 0.5)
    noise = release(received, received, 2, 0.25, SOURCES[source]).double() - 0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.01) and abs(noise.mean().item()) < 0.003
    within = [(noise.abs() < 0.5 * k).double().mean().item() for k in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.002)
    half = len(noise) // 2  # in which Box and Muller give their two halves
    assert abs((noise[:half] * noise[half : 2 * half]).mean().item()) < 0.002


def test_no_draw_of_the_system_is_infinite(monkeypatch):
    monkeypatch.setattr("os.urandom", bytes)  # all bits 0, whose logarithm Box and Muller would take
    assert system_normal(9).isfinite().all()


def test_the_system_never_draws_the_same_and_the_simulation_does_by_seed_round_and_client():
    assert not system_normal(9).equal(system_normal(9))
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]
    draws = [fedu.repeatable_normal(*key)(9) for key in keys]
    assert fedu.repeatable_normal(0, 1, 2)(9).equal(draws[0]) and all(not draw.equal(draws[0]) for draw in draws[1:])


# ------------------------------------------------------------------------------------------------------ epsilon


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize("noise", [0.3, 1, 4, 30])
def test_epsilon_of_one_upload_is_that_of_balle_and_wang(noise, delta):
    """Theorem 8: `Phi(D / 2s - e s / D) - exp(e) Phi(-D / 2s - e s / D) = delta`, for D = 2 clip and s = noise clip."""
    e, ratio = epsilon({noise: 1}, delta), 2 / noise
    upper, lower = (math.erfc(-(sign * ratio / 2 - e / ratio) / 2**0.5) / 2 for sign in (1, -1))  # Phi(x) = erfc(-x / sqrt(2)) / 2
    assert upper - math.exp(e) * lower == pytest.approx(delta, rel=1e-6)


def test_epsilon_of_several_uploads_is_that_of_an_accountant():
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(4 / 2), 5).compose(GaussianDpEvent(3 / 2), 2)
    assert epsilon({4.0: 5, 3.0: 2}, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)
    assert epsilon({1e-3: 10**6}, 1e-15) < math.inf and epsilon({4.0: 5, 0: 1}, 1e-5) == math.inf


def test_every_upload_is_counted(tmp_path):
    ledger = tmp_path / "privacy-1.json"
    assert count_upload(ledger, "a", 4.0, 1e-5).startswith("epsilon after upload 1 of this run is ")
    count_upload(ledger, "a", 4.0, 1e-5)
    told = count_upload(ledger, "b", 3.0, 1e-5)
    assert read_ledger(ledger) == [("a", 4.0), ("a", 4.0), ("b", 3.0)]
    first, second = epsilon({3.0: 1}, 1e-5), epsilon({4.0: 2, 3.0: 1}, 1e-5)
    assert told == f"epsilon after upload 1 of this run is {first:.4g}, after upload 3 of all runs {second:.4g}, at delta 1e-05"
    assert "upload 1 of this run is inf, after upload 4 of all runs inf" in count_upload(ledger, "c", 0.0, 1e-5)


@pytest.mark.parametrize("content", ["[", "3", '[["a", "b"]]', '[["a"]]', '[["a", NaN]]', '[["a", -1]]', '[["a", null]]'])
def test_a_damaged_ledger_is_not_replaced(tmp_path, content):
    (ledger := tmp_path / "privacy-1.json").write_text(content)
    with pytest.raises(InputError, match="privacy-1.json, which counts the uploads, cannot be read"):
        count_upload(ledger, "a", 1.0, 1e-5)
    assert ledger.read_text() == content


def test_without_the_package_there_is_no_noise(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.delitem(sys.modules, "dp_accounting.gaussian_mechanism")
    with pytest.raises(InputError, match="needs the package dp-accounting"):
        fedu.train(Options(dp_clip=1, dp_noise=1), tmp_path / "run")
    assert not (tmp_path / "run").exists() and epsilon({0: 1}, 1e-5) == math.inf


# ----------------------------------------------------------------------------------------- what leaves a client


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_of_the_variances(kind):
    """Those that a vector of zeros has after each running variance, and nothing else, was set to 1."""
    online = networks_of(kind, torch.arange(3)).online
    online.vector.zero_()
    modules = [*online.module.modules(), *(online.behind.module.modules() if online.behind else ())]
    for m in modules:
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.fill_(1)
    assert online.vector.nonzero().flatten().tolist() == batchnorm_places(online, ("running_var",)).sort().values.tolist() != []


@pytest.mark.parametrize("text", ["", "--predictor local", "--statistics local", "--method fedema", "--method fedmoco-v2", "--method fedx"])
@pytest.mark.parametrize("spoil", [1.0, 1e4, 1e30, math.nan])
def test_nothing_leaves_unclipped(text, spoil):
    """One bound for all that is sent: weights and BatchNorm's statistics together. What is not sent is the server's."""
    options = Options(**parse(f"{text} --encoder tiny".split()).given)
    networks = build_networks(options, torch.arange(3), CPU)
    model = networks.online.vector.clone()
    torch.manual_seed(0)
    upload = model + spoil * torch.randn(len(model))
    trained = upload.clone()
    fedu.privatise_(upload, model, networks, 0.5, 0.0, None)
    change = (upload - model).double()
    assert change.norm().item() == pytest.approx(0.5 if math.isfinite(spoil) else 0, rel=1e-4)
    assert int((change != 0).sum()) <= int(networks.sent.sum())
    assert not change[networks.private].any()
    if text == "" and spoil == 1e4:
        places = batchnorm_places(networks.online, ("running_var",))
        torch.testing.assert_close(change[places], (trained - model).double()[places] * (0.5 / (trained - model).double().norm()))


def test_noised_variances_are_not_negative():
    options = Options(encoder="tiny")
    networks = build_networks(options, torch.arange(3), CPU)
    model, places = networks.online.vector.clone(), batchnorm_places(networks.online, ("running_var",))
    upload = model.clone()
    fedu.privatise_(upload, model, networks, 1.0, 5.0, fedu.repeatable_normal(0, 0, 0))
    assert (upload[places] >= 0).all() and (upload[places] == 0).any()
    others = torch.ones(len(model), dtype=torch.bool)
    others[places] = False
    assert (upload - model)[others].std().item() == pytest.approx(5, rel=0.02)


NOISED = {"rounds": 2, "dp_clip": 0.5, "dp_noise": 0.01, "dp_delta": 1e-6}


@pytest.fixture
def rounds(tiny, monkeypatch):
    """A run in this process. Returns it, and for each round the lengths of the changes of the uploads."""
    moved = []

    def aggregate(server, accepted, uploads, *more, of=fedu.aggregate):
        moved.append([(row - server.model).double().norm().item() for row in uploads.matrix[: uploads.filled]])
        of(server, accepted, uploads, *more)

    monkeypatch.setattr(fedu, "aggregate", aggregate)

    def run(out, **given):
        moved.clear()
        return fedu.train(Options(**parse(tiny).given | {"processes": 1} | given), out), moved

    return run


def test_a_run_clips_every_upload_and_measures_as_without(rounds, tmp_path):
    """The clients' own networks, loss and divergence have neither bound nor noise: the first round's are those of a run without privacy."""
    plain = rounds(tmp_path / "plain", method="fedema", rounds=1)[0].metrics[0]
    run, moved = rounds(tmp_path / "run", method="fedema", rounds=2, dp_clip=0.5)
    assert moved == [[pytest.approx(0.5, rel=1e-4)] * 2] * 2
    assert {key: run.metrics[0][key] for key in ("loss", "divergence")} == {key: plain[key] for key in ("loss", "divergence")}


def test_a_noised_run_repeats_on_any_number_of_processes_and_when_it_is_resumed(rounds, tmp_path, capsys, monkeypatch):
    run, moved = rounds(tmp_path / "run", **NOISED)
    said = f"each client's change is clipped to 0.5 and noised with 0.01: epsilon is {epsilon({0.01: 2}, 1e-6):.4g} after 2 uploads"
    assert said in capsys.readouterr().out
    assert min(map(min, moved)) > 0.5
    rounds(tmp_path / "two", processes=2, **NOISED)
    draw = fedu.repeatable_normal
    with monkeypatch.context() as patch:
        patch.setattr(fedu, "repeatable_normal", lambda seed, round_, client: 1 / 0 if round_ == 1 else draw(seed, round_, client))
        with pytest.raises(ZeroDivisionError):
            rounds(tmp_path / "resumed", **NOISED)
    fedu.resume(tmp_path / "resumed")
    encoders = [torch.load(tmp_path / name / "encoder.pt", weights_only=True)["encoders"][0] for name in ("run", "two", "resumed")]
    for part, state in encoders[0].items():
        assert all(tensor.equal(other[part][name]) for name, tensor in state.items() for other in encoders[1:])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"].items() >= NOISED.items()


@pytest.mark.parametrize("method", ["fedca", "orchestra"])
def test_methods_that_share_more_than_networks_are_refused(tiny, tmp_path, method):
    given = parse([*tiny, "--method", method]).given
    with pytest.raises(InputError, match=f"^dp_clip got 1, which cannot go with method {method}, whose clients share rows"):
        fedu.train(Options(**given, dp_clip=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
