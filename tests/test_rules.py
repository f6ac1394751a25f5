"""The servers' rules other than FedAvg's mean, each by hand; test_method.py compares runs with a second, slow implementation."""

from types import SimpleNamespace

import pytest
import torch
from conftest import run

import fedu
from federation import Client, Server
from methods.fedu2 import min_norm_weights, move_in_unison
from methods.ldawa import weigh_by_angle
from methods.robust import median, trimmed
from models import Segment
from options import Options
from runtime.cli import InputError
from runtime.uploads import Uploads

# two running statistics, parameters of two and of one number, and one statistic of the predictor
NETWORKS = SimpleNamespace(online=SimpleNamespace(param_slice=slice(2, 5), segments=[Segment("a", 2, 4), Segment("b", 4, 5)]))


def apply(rule, model: list[float], rows: list[list[float]], num_examples: list[int], networks=NETWORKS, **judged) -> list[float]:
    """What a rule makes of these uploads and the server's model. judged: how outliers are found, see Uploads."""
    server = Server(torch.tensor(model, dtype=torch.float32), [Client(k, torch.empty(n)) for k, n in enumerate(num_examples)])
    uploads = Uploads(server.model, len(rows), torch.tensor([[0, len(model)]]), **judged)
    for row, n in zip(rows, num_examples, strict=True):
        uploads.next_row().copy_(torch.tensor(row))
        uploads.add(n / sum(num_examples), server.model)
    return rule(server, uploads, networks, []).tolist()


def test_ldawa_by_hand():
    """Cosines 3/5 and 1 in the first tensor, -1 and 1 in the second; statistics count equally, whatever the clients' sizes."""
    rows = [[2, 4, 3, 4, -1, 8], [4, 0, 2, 0, 3, 2]]
    expected = [3, 2, (0.6 * 3 + 2) / 2, 0.6 * 4 / 2, (1 + 3) / 2, 5]
    assert apply(weigh_by_angle, [9, 9, 7, 0, 5, 9], rows, [1, 30]) == pytest.approx(expected)


def test_ldawa_averages_a_tensor_of_norm_0_plainly():
    """In the server's model, as BatchNorm's shift at first, or in one client's."""
    rows = [[0, 0, 3, 4, 0, 0], [0, 0, 1, 0, 4, 0]]
    assert apply(weigh_by_angle, [0, 0, 0, 0, 2, 0], rows, [1, 1]) == [0, 0, 2, 2, 2, 0]


def weights_of(*vectors: list[float], start: list[float]) -> torch.Tensor:
    points = torch.tensor(vectors, dtype=torch.float64)
    return min_norm_weights(points @ points.T, torch.tensor(start, dtype=torch.float64))


def test_the_weights_of_least_norm_by_hand():
    """Two at right angles share it; one inside the hull of the others, where these start, gets nothing; opposite ones meet at zero."""
    assert weights_of([2, 0], [0, 2], start=[0.9, 0.1]).tolist() == pytest.approx([0.5, 0.5])
    assert weights_of([1, 1], [1, -1], [4, 0], [1.5, 0], start=[0.25] * 4).tolist() == pytest.approx([0.5, 0.5, 0, 0], abs=2e-3)
    assert weights_of([1, 0], [3, 0.1], start=[0.5, 0.5]).tolist() == [1, 0]
    assert weights_of([3, 0], [-1, 0], start=[0.5, 0.5]).tolist() == pytest.approx([0.25, 0.75])
    assert weights_of([5, 7], start=[1]).tolist() == [1]


def test_the_weights_of_least_norm_are_those_of_a_fine_grid():
    """Up to what 250 steps of Frank-Wolfe leave, which near the middle of a side is some hundredths."""
    torch.manual_seed(0)
    steps = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    for vectors in torch.randn(20, 3, 5, dtype=torch.float64):
        best = (grid[grid[:, 2] >= 0] @ vectors).square().sum(1).min()
        mine = (weights_of(*vectors.tolist(), start=[0.2, 0.3, 0.5]) @ vectors).square().sum()
        assert best - 2e-3 < mine < 1.05 * best


def test_fedu2_by_hand(monkeypatch):
    """The model moves by 2 lr_g along one client's delta, and by both halves of two at right angles, however far the clients went."""
    monkeypatch.setattr("methods.fedu2.COLUMNS", 2)
    networks = SimpleNamespace(**vars(NETWORKS), server_lr=0.5)
    assert apply(move_in_unison, [0, 0, 1, 1, 1, 0], [[5, 6, 1, 5, -2, 7]], [4], networks) == pytest.approx([5, 6, 1, 1.8, 0.4, 7])
    rows = [[4, 0, 1, 9, 1, 8], [0, 4, 3, 1, 1, 0]]
    assert apply(move_in_unison, [0, 0, 1, 1, 1, 0], rows, [1, 3], networks) == pytest.approx([1, 3, 1.5, 1.5, 1, 2])
    unmoved = [[0, 0, 1, 1, 1, 0], [0, 0, 3, 1, 1, 0]]
    assert apply(move_in_unison, [0, 0, 1, 1, 1, 0], unmoved, [1, 1], networks) == pytest.approx([0, 0, 1, 1, 1, 0])


@pytest.mark.parametrize("rule", [fedu.fedavg, weigh_by_angle, move_in_unison, median, trimmed])
def test_a_rule_sees_an_outlier_as_little_as_an_absent_client(rule):
    networks = SimpleNamespace(**vars(NETWORKS), server_lr=0.5)
    model, rows = [1.0] * 6, [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [2, 2, 3, 3, 1, 1], [1e6] * 6]
    with_outlier = apply(rule, model, rows, [4, 2, 3, 9], networks, max_drift=10.0)
    assert with_outlier == pytest.approx(apply(rule, model, rows[:3], [4, 2, 3], networks))


def test_median_and_trimmed_mean_by_hand(monkeypatch):
    """One of five clients is faulty, with most of the images; of four, the median lies between two. In pieces of two numbers."""
    monkeypatch.setattr("methods.robust.COLUMNS", 2)
    rows = [[1, 5, 0], [2, 6, 0], [4, 7, 3], [9, 8, 3], [-1e30, 1e30, 3]]
    assert apply(median, [0, 0, 0], rows, [1, 1, 1, 1, 99]) == [2, 7, 3]
    assert apply(median, [0, 0, 0], rows[:4], [1, 2, 3, 4]) == [3, 6.5, 1.5]
    assert apply(trimmed, [0, 0, 0], rows, [1, 1, 1, 1, 99]) == pytest.approx([7 / 3, 7, 2])
    assert apply(trimmed, [0, 0, 0], 2 * rows, [1] * 10) == pytest.approx([7 / 3, 7, 2])  # two of ten on either side
    assert apply(trimmed, [0, 0, 0], [[k * k, k, 0] for k in range(9)], [1] * 9) == pytest.approx([20, 4, 0])  # and one of nine


def test_fewer_than_three_uploads_cannot_be_trimmed(capsys):
    assert apply(trimmed, [7, 8], [[1, 2], [3, 4]], [1, 1]) == [7, 8]
    assert "needs 3 uploads, and got 2" in capsys.readouterr().err


def test_a_faulty_client_moves_the_mean_and_not_the_median(tiny, tmp_path, monkeypatch):
    """It uploads its model a thousand times too large; the divergences are measured all the same."""
    upload, found = fedu.model_upload, {}

    def faulty(networks, aggregate, out):
        count["uploads"] += 1
        return upload(networks, aggregate, out=out).mul_(1000 if count["uploads"] % 3 == 0 else 1)

    for rule in ("mean", "median", "trimmed"):
        count = {"uploads": 0}
        monkeypatch.setattr(fedu, "model_upload", faulty)
        result = run(tmp_path / rule, *tiny, "--clients", "3", "--rounds", "1", "--server-rule", rule, "--max-drift", "inf")
        found[rule] = result["encoders"][0].abs().max().item()
        first, second, third = sorted(result["metrics"][0]["divergence"])
        assert 0 < first < second < 10 and third > 100
    assert found["mean"] > 100 and found["median"] < 10 and found["trimmed"] < 10, found


@pytest.mark.parametrize("more", [{"method": "fedu2"}, {"method": "ldawa"}, {"server_rule": "median"}, {"server_rule": "trimmed"}])
def test_a_rule_that_needs_all_rows_is_refused_in_tiles(npz, tmp_path, monkeypatch, more):
    monkeypatch.setattr(Uploads.__init__, "__defaults__", (False, 1, float("inf"), False))
    options = Options(dataset=str(npz), encoder="tiny", clients=3, batch_size=8, rounds=1, local_epochs=1, device="cpu", **more)
    with pytest.raises(InputError, match="a round's uploads exceed the memory for them, .*: lower clients_per_round"):
        fedu.train(options, tmp_path / "run")
