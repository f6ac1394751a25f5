import pytest
import torch

import ops
from runtime.cli import InputError
from runtime.uploads import MEMORY, Uploads


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
