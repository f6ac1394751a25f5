import math

import pytest
import torch

import ops
from runtime.cli import InputError
from runtime.uploads import MEMORY, Outlier, Uploads


def collect(
    vectors: list[torch.Tensor], num_examples: list[int], received: torch.Tensor, segments: torch.Tensor, rows: int | None = None
) -> tuple[Uploads, torch.Tensor, list[torch.Tensor]]:
    """What takes the uploads, their mean, and the drift of each; all clients received the same vector. rows: of the matrix."""
    uploads = Uploads(received, len(vectors), segments, memory=MEMORY if rows is None else rows * received.nbytes)
    for vector, n in zip(vectors, num_examples, strict=True):
        uploads.next_row().copy_(vector)
        uploads.add(n / sum(num_examples), received)
    return uploads, uploads.sum().clone(), uploads.close()


def test_two_clients_by_hand():
    """n = 1 and 3: the mean is (1 x_1 + 3 x_2) / 4; drift is the distance from what was received, on each of two segments."""
    vectors = [torch.tensor([4.0, 8.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])]
    _, mean, drifts = collect(vectors, [1, 3], torch.tensor([0.0, 4.0, 0.0]), torch.tensor([[0, 2], [2, 3]]))
    assert mean.tolist() == [1.0, 5.0, 9.0]
    assert drifts[0].tolist() == pytest.approx([32**0.5, 0.0]) and drifts[1].tolist() == [0.0, 12.0]


@pytest.mark.parametrize("rows", [2, 3, 7, 19, 20])
def test_tiles_give_the_bits_of_one_matrix(rows):
    """Twenty uploads through fewer rows: the sum so far is one more row, of weight 1."""
    torch.manual_seed(0)
    vectors, received = [torch.randn(10_000) for _ in range(20)], torch.randn(10_000)
    n, segments = torch.randint(1, 50, (20,)).tolist(), torch.tensor([[3, 300], [401, 9_999]])
    (_, whole, drifts), (uploads, tiled, tiled_drifts) = (collect(vectors, n, received, segments, r) for r in (None, rows))
    assert torch.equal(whole, tiled) and len(uploads.matrix) == rows
    assert all(map(torch.equal, drifts, tiled_drifts)) and len(drifts) == 20
    weights = (torch.tensor(n, dtype=torch.float64) / sum(n)).float()
    assert torch.equal(whole, ops.weighted_mean(torch.stack(vectors), weights))


@pytest.mark.parametrize("rows", [2, 5])
def test_each_client_may_have_received_a_vector_of_its_own(rows):
    """Its drift is measured from that one, in tiles too; and from another vector than the upload if one is given."""
    torch.manual_seed(0)
    vectors, own, segments = torch.randn(5, 100), torch.randn(5, 100), torch.tensor([[0, 40], [50, 100]])
    uploads = Uploads(vectors[0], 5, segments, own_received=True, memory=2 * rows * vectors[0].nbytes)
    for k in range(5):
        uploads.next_row().copy_(vectors[k])
        uploads.add(1 / 5, own[k], online=vectors[0] if k == 3 else None)
    torch.testing.assert_close(uploads.sum(), vectors.mean(0))
    for k, drift in enumerate(uploads.close()):
        moved = (vectors[0 if k == 3 else k] - own[k]).double()
        assert drift.tolist() == pytest.approx([moved[:40].norm().item(), moved[50:].norm().item()], rel=1e-5)


def test_an_upload_that_is_not_accepted_leaves_its_row_and_its_weight_to_the_others():
    uploads = Uploads(torch.zeros(2), 3, torch.tensor([[0, 2]]))
    for weight, values in ((0.5, [2.0, 4.0]), (None, [9.0, 9.0]), (0.25, [8.0, 1.0])):
        uploads.next_row().copy_(torch.tensor(values))
        if weight:
            uploads.add(weight, torch.zeros(2))
    assert uploads.sum().tolist() == [4.0, 3.0]  # (2 x_1 + x_3) / 3


def test_a_second_server_begins_anew():
    uploads = Uploads(torch.zeros(1), 2, torch.tensor([[0, 1]]))
    for value in (3.0, 5.0):
        uploads.next_row().fill_(value)
        uploads.add(1.0, torch.zeros(1))
        assert uploads.sum().item() == value and [norms.item() for norms in uploads.close()] == [value]


def test_one_client_is_the_identity():
    x = torch.tensor([0.1, -0.7, 3.3])
    assert torch.equal(collect([x], [17], torch.zeros(3), torch.tensor([[0, 3]]))[1], x)


def test_identical_clients_are_a_fixed_point():
    x = torch.randn(1000)
    _, mean, drifts = collect([x, x, x], [5, 1, 2], x, torch.tensor([[0, 1000]]))
    torch.testing.assert_close(mean, x, rtol=3e-7, atol=0)
    assert [drift.item() for drift in drifts] == [0, 0, 0]


def test_a_rule_sees_all_rows_or_one_sentence():
    """Also, the drifts do not depend on whether the rule has asked for the mean."""
    vectors, segments = torch.randn(3, 10), torch.tensor([[0, 10]])
    for memory in (MEMORY, 2 * vectors[0].nbytes):
        uploads = Uploads(vectors[0], 3, segments, memory=memory)
        for vector in vectors:
            uploads.next_row().copy_(vector)
            uploads.add(1 / 3, torch.zeros(10))
        if memory == MEMORY:
            assert torch.equal(uploads.rows(), vectors)
        else:
            with pytest.raises(InputError, match="lower clients_per_round"):
                uploads.rows()
        assert [norms.item() for norms in uploads.close()] == pytest.approx(vectors.norm(dim=1).tolist())


# ------------------------------------------------------------------------------------------------------ outliers


def judged(vectors: list[list[float]], max_drift: float = 2, shorten: bool = False, rows: int = 9, own: list | None = None) -> Uploads:
    """Uploads of equal weights from a start at 0, or at a vector of their own, with a drift that is measured on the first float."""
    uploads = Uploads(
        torch.zeros(len(vectors[0])), len(vectors), torch.tensor([[0, 1]]), own is not None, memory=rows * 4 * len(vectors[0]),
        max_drift=max_drift, shorten=shorten,
    )  # fmt: skip
    for k, vector in enumerate(vectors):
        uploads.next_row().copy_(torch.tensor(vector))
        uploads.add(1 / len(vectors), torch.tensor(own[k]) if own else torch.zeros(len(vector)))
    return uploads


def test_an_outlier_by_hand():
    """Of norms 5, 10 and 15 the median is 10, which 15 exceeds by half; and it lies outside the segment that drift is measured on."""
    vectors = [[3.0, 4.0], [0.0, 10.0], [0.0, 15.0]]
    assert judged(vectors, 1.5).judge() == {}  # not further than the bound
    assert judged(vectors, 1.499).judge().keys() == {2}
    uploads = judged(vectors, 1.25)
    assert uploads.judge() == {2: Outlier(1.5, False)} and uploads.rows().tolist() == vectors[:2]
    assert uploads.sum().tolist() == pytest.approx([1.5, 7]) and [drift.item() for drift in uploads.close()] == [3, 0, 0]
    uploads = judged(vectors, 1.25, shorten=True)
    assert uploads.judge() == {2: Outlier(1.5, True)} and uploads.rows()[2].tolist() == [0, 12.5]
    assert uploads.sum().tolist() == pytest.approx([1, 26.5 / 3]) and [drift.item() for drift in uploads.close()] == [3, 0, 0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_mean_without_an_outlier_is_that_of_the_others(place):
    torch.manual_seed(0)
    vectors = [torch.randn(500).tolist() for _ in range(4)]
    uploads = judged([*vectors[:place], [1e4] * 500, *vectors[place:]], max_drift=10)
    torch.testing.assert_close(uploads.sum(), torch.tensor(vectors).mean(0))
    assert uploads.outliers.keys() == {place}


@pytest.mark.parametrize("shorten", [False, True])
@pytest.mark.parametrize("huge", [1e30, -3e38])
def test_a_norm_that_float32_cannot_square_is_an_outlier_among_any_number(shorten, huge):
    """Shortened, it has the bound's length, once there is one."""
    assert judged([[huge, 1.0]], shorten=shorten).judge() == {0: Outlier(math.inf, False)}
    uploads = judged([[huge, 1.0], [3.0, 4.0]], shorten=shorten)
    assert uploads.judge().keys() == {0} and uploads.sum().tolist() == pytest.approx([3, 4])
    uploads = judged([[huge, 1.0], [3.0, 4.0], [4.0, 3.0]], shorten=shorten)
    assert uploads.judge() == {0: Outlier(pytest.approx(abs(huge) / 5), shorten)}
    assert not shorten or uploads.rows()[0].norm().item() == pytest.approx(10)
    uploads = judged([[huge, 1.0], [huge, 1.0], [huge, 1.0]], shorten=shorten)  # and nothing is left
    assert uploads.judge().keys() == {0, 1, 2} and not any(outlier.shortened for outlier in uploads.outliers.values())
    assert uploads.sum().tolist() == [0, 0]


def test_no_upload_is_an_outlier_among_two_nor_where_half_did_not_move_nor_with_a_bound_of_infinity():
    assert judged([[1.0], [1000.0]]).judge() == {}
    assert judged([[0.0], [0.0], [1.0]]).judge() == {}
    uploads = judged([[1.0], [1.0], [1e30]], math.inf)
    assert uploads.judge() == {} and uploads.sum().item() > 1e29


def test_drift_is_measured_from_what_each_client_received():
    uploads = judged([[101.0], [52.0], [9.0]], max_drift=4, own=[[100.0], [50.0], [0.0]])
    assert uploads.judge() == {2: Outlier(4.5, False)} and uploads.sum().item() == pytest.approx(76.5)


def test_an_outlier_in_a_tile_leaves_the_sum_of_the_others():
    """The uploads that came so far are the measure: with three rows, two of them in the first tile, and two more in each other."""
    torch.manual_seed(0)
    vectors = [torch.randn(500).tolist() for _ in range(6)]
    uploads = judged([*vectors[:4], [1e30] * 500, *vectors[4:], [1e3] * 500], max_drift=10, rows=3)
    torch.testing.assert_close(uploads.sum(), torch.tensor(vectors).mean(0))
    assert uploads.outliers.keys() == {4, 7} and len(uploads.close()) == 8


def test_a_round_without_outliers_takes_one_pass(monkeypatch):
    passes = []
    for name in ("aggregate", "weighted_mean", "layer_norms"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **how: passes.append(name) or op(*a, **how))
    uploads = judged([[3.0, 4.0], [0.0, 10.0], [0.0, 15.0]])
    uploads.judge(), uploads.rows(), uploads.sum(), uploads.close()
    assert passes == ["aggregate"]
