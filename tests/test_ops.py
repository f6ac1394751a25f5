"""The fused ops and their twins: numbers worked by hand, a float64 oracle, torchvision, bits, refusals, and torch's own checks."""

import itertools
import mmap
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

import ops
from data import draw_views
from ops import reference

NORM_ERROR = 6e-7  # the docstrings' promise
SIZES = [0, 1, 3, 31, 32, 33, 1023, 1024, 4099, 2**17 + 3]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(scope="module", autouse=True)
def library():
    if os.environ.get("FEDU_OPS") == "reference":
        pytest.skip("FEDU_OPS=reference: the library is not to be built")
    assert ops.load(), "the library did not build: the warning says why"


@pytest.fixture(params=["fused", "reference"])
def implementation(request):
    """The public functions, with the library and without."""
    with nullcontext() if request.param == "fused" else without_library():
        yield ops


@contextmanager
def without_library():
    ops._fused = False
    try:
        yield
    finally:
        ops._fused = True


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def random(*shape: int, seed: int = 0, dtype=torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


def layers(size: int) -> Tensor:
    """Segments with gaps, one of them empty and one of a single float, where the vector has room for them."""
    if size < 31:
        return torch.tensor([[0, size]])
    return torch.tensor([[1, size // 3], [size // 3, size // 3], [size // 3 + 1, size // 3 + 2], [size // 2 + 1, size - 3]])


def exact_norms(a: Tensor, b: Tensor, segments: Tensor) -> Tensor:
    return torch.tensor([(a[begin:end].double() - b[begin:end].double()).square().sum().sqrt() for begin, end in segments.tolist()])


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Equal to the last bit, NaN to NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# ---- Results ------------------------------------------------------------------------------------------------------------------


def test_by_hand(implementation, device):
    clients = torch.tensor([[0.0, 0, 1, 5], [4.0, 8, 1, 7]], device=device)
    weights = torch.tensor([0.25, 0.75], device=device)
    received = torch.tensor([0.0, 5, 1, 100], device=device)
    segments = torch.tensor([[0, 2], [2, 3]])
    mean, drift, spread = implementation.aggregate(clients, weights, received, segments)
    assert mean.tolist() == [3, 6, 1, 6.5]
    assert drift.tolist() == [[5, 0], [5, 0]]
    assert spread.tolist() == [[45**0.5, 0], [5**0.5, 0]]
    assert implementation.weighted_mean(clients, weights).tolist() == [3, 6, 1, 6.5]
    assert implementation.layer_norms(clients[0], received, segments).tolist() == [5, 0]
    target = torch.tensor([1.0, 2, 3, 4], device=device)
    assert implementation.ema_(target, clients[1], 0.5) is target
    assert target.tolist() == [2.5, 5, 2, 5.5]


@pytest.mark.parametrize("num_clients", [1, 2, 5, 17, 33, 100])
@pytest.mark.parametrize("size", SIZES)
def test_aggregate_against_float64(size, num_clients, device):
    clients, segments = random(num_clients, size, device=device), layers(size)
    weights = random(num_clients, seed=1).softmax(0).to(device)
    received = random(*((num_clients, size) if num_clients % 2 else (size,)), seed=2, device=device)
    mean, drift, spread = ops.aggregate(clients, weights, received, segments)
    torch.testing.assert_close(mean.double(), weights.double() @ clients.double(), rtol=1e-5, atol=1e-6)
    assert_bits(ops.weighted_mean(clients, weights), mean)
    starts = received.expand_as(clients)
    for k in range(num_clients):
        torch.testing.assert_close(drift[k].cpu(), exact_norms(clients[k].cpu(), starts[k].cpu(), segments), rtol=NORM_ERROR, atol=0)
        torch.testing.assert_close(spread[k].cpu(), exact_norms(clients[k].cpu(), mean.cpu(), segments), rtol=NORM_ERROR, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_library_agrees_with_the_reference(size, dtype, device):
    """Mean and average to the last bit, so that training does not depend on who computes; norms but for the order of their sums."""
    clients, weights = random(7, size, dtype=dtype, device=device), random(7, seed=1, dtype=dtype).softmax(0).to(device)
    received, segments = random(size, seed=1, dtype=dtype, device=device), layers(size)
    mean, *norms = ops.aggregate(clients, weights, received, segments)
    with without_library():
        want_mean, *want_norms = ops.aggregate(clients, weights, received, segments)
    assert_bits(mean, want_mean)
    assert_bits(ops.weighted_mean(clients, weights), want_mean)
    for got, want in zip(norms, want_norms, strict=True):
        torch.testing.assert_close(got, want, rtol=NORM_ERROR, atol=0)
    torch.testing.assert_close(
        ops.layer_norms(mean, received, segments), reference.layer_norms(mean, received, segments), rtol=NORM_ERROR, atol=0
    )
    for target, online in ((mean, received), (clients, clients + 1)):
        assert_bits(ops.ema_(target.clone(), online, 0.99), reference.ema_(target.clone(), online, 0.99))


@pytest.mark.parametrize("rows", [2, 3, 7, 19])
def test_tiles_give_the_bits_of_all_rows_at_once(implementation, rows, device):
    size = 13_001
    segments = torch.tensor([[1, 4098], [4099, 4100], [4101, 4101], [4777, 12_999]])
    clients, received = random(20, size, device=device), random(size, seed=1, device=device)
    clients[3, 4777:] = received[4777:]  # a layer that did not change: its norm is taken in double
    clients[7, 1:4098] = 1e-12 + received[1:4098]
    weights = random(20, seed=2).softmax(0).to(device)
    want_mean, want_drift, want_spread = implementation.aggregate(clients, weights, received, segments)
    matrix, ones = torch.zeros(rows + 1, size, device=device), torch.ones(1, device=device)
    mean, drifts = torch.zeros(size, device=device), []
    for at in range(0, 20, rows):
        tile, share = clients[at : at + rows], weights[at : at + rows]
        first = 0 if at == 0 else 1  # the mean so far is the first row of all tiles but the first
        matrix[:first] = mean
        matrix[first : first + len(tile)] = tile
        share = torch.cat([ones[:first], share])
        _, drift, _ = implementation.aggregate(matrix[: len(share)], share, received, segments, out=mean)
        drifts.append(drift[first:])
    assert_bits(mean, want_mean)
    assert_bits(torch.cat(drifts), want_drift)
    for k in range(20):
        assert_bits(implementation.layer_norms(clients[k], received, segments), want_drift[k])
        assert_bits(implementation.layer_norms(clients[k], mean, segments), want_spread[k])


def test_out_is_written_and_returned(implementation, device):
    clients, weights, received, segments = (
        random(3, 5000, device=device),
        random(3, device=device),
        random(5000, device=device),
        layers(5000),
    )
    want = implementation.aggregate(clients, weights, received, segments)
    for offset in (0, 1):
        memory = torch.full((5003,), 7.0, device=device)
        out = memory[1 + offset : 5001 + offset]
        results = implementation.aggregate(clients, weights, received, segments, out=out)
        assert results[0] is out
        for got, expected in zip(results, want, strict=True):
            assert_bits(got, expected)
        out.zero_()
        assert implementation.weighted_mean(clients, weights, out=out) is out
        assert_bits(out, want[0])
        assert (memory == 7).sum() == 3  # nothing beside it


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_vectors_that_start_unaligned(offset, device):
    memory = random(3 * 5000 + 8, device=device)
    clients = memory[offset : offset + 15000].view(3, 5000)
    weights, received, segments = torch.full((3,), 1 / 3, device=device), random(5003, device=device)[3:], layers(5000)
    aligned = ops.aggregate(clients.clone(), weights, received.clone(), segments)
    for got, want in zip(ops.aggregate(clients, weights, received, segments), aligned, strict=True):
        assert_bits(got, want)
    before, target = memory.clone(), clients[1]
    assert_bits(ops.ema_(target, received, 0.9), ops.ema_(before[offset + 5000 : offset + 10000].clone(), received, 0.9))
    target.copy_(before[offset + 5000 : offset + 10000])
    assert_bits(memory, before)  # nothing beside the target was written


def test_sum_over_clients_is_in_their_order(implementation, device):
    clients = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    assert implementation.weighted_mean(clients, torch.ones(3, device=device)).item() == 0  # (1e8 + 1) - 1e8 in float32
    assert implementation.weighted_mean(clients[[0, 2, 1]].clone(), torch.ones(3, device=device)).item() == 1


def test_same_bits_on_any_number_of_threads():
    clients, weights, segments = random(7, 300_001), random(7, seed=1), layers(300_001)
    received, threads, results = random(300_001, seed=2), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8, 1):
            torch.set_num_threads(count)
            norms = ops.layer_norms(clients[0], received, segments)
            results.append((*ops.aggregate(clients, weights, received, segments), norms, ops.ema_(clients[0].clone(), received, 0.99)))
            x = random(4000, 70).requires_grad_()
            normalised = ops.batch_norm(x, None, None, None, None, views=2)
            normalised.backward(random(4000, 70, seed=1))
            results[-1] += (normalised.detach(), x.grad)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_bits(got, want)


def test_decay_0_and_1_are_exact(implementation, device):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 0.1], device=device)
    assert_bits(implementation.ema_(odd.clone(), odd.flip(0), 1), odd)
    assert_bits(implementation.ema_(odd.clone(), odd.flip(0), 0), odd.flip(0))
    assert_bits(implementation.ema_(odd.clone(), odd.flip(0), 1.0), odd)


def test_a_step_by_hand(implementation, device):
    weight, gradient = torch.tensor([1.0, 2, 4], device=device), torch.tensor([2.0, -4, 8], device=device)
    target = torch.tensor([3.0, 8], device=device)
    implementation.sgd_ema_(weight, gradient, target, 0.5, momentum=0.25, weight_decay=2, ema_decay=0.5)
    assert weight.tolist() == [0, 4, 0]
    assert target.tolist() == [1.5, 6]
    assert gradient.tolist() == [0.5, 7, 2]
    implementation.sgd_ema_(
        weight, gradient, None, torch.tensor(2.0, dtype=torch.float64, device=device), momentum=0, weight_decay=0, ema_decay=0
    )
    assert weight.tolist() == [-1, -10, -4] and not gradient.any() and target.tolist() == [1.5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_steps_are_those_of_plain_torch(implementation, size, dtype):
    """To the last bit: SGD's momentum in the gradient, torch's fused SGD, and the average of the first weights; alike on two threads."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("there, plain torch rounds product and sum each")
    lr, momentum, weight_decay, ema_decay, covered = 0.317, 0.9, 0.05, 0.99, size * 2 // 3
    start, offset = random(2 * size, dtype=dtype), 3  # a target that lies elsewhere in memory than aligned
    weight, target = torch.nn.Parameter(start[:size].clone()), start[size : size + covered].clone()
    my_weight, my_target = start[:size].clone(), torch.cat([target[:0].new_zeros(offset), target])[offset:]
    weight.grad = torch.zeros_like(weight)
    my_gradient = my_weight * weight_decay
    optimizer, threads = torch.optim.SGD([weight], lr, fused=True), torch.get_num_threads()
    for step in range(4):
        gradient = random(size, seed=step, dtype=dtype)
        with torch.no_grad():
            weight.grad.mul_(momentum).add_(weight.detach(), alpha=weight_decay)
            weight.grad.add_(gradient)  # backward()
            optimizer.step()
            ops.ema_(target, weight[:covered].detach(), ema_decay)
        my_gradient.add_(gradient)
        torch.set_num_threads(1 + step % 2)
        implementation.sgd_ema_(my_weight, my_gradient, my_target, lr, momentum=momentum, weight_decay=weight_decay, ema_decay=ema_decay)
        torch.set_num_threads(threads)
        assert_bits(my_weight, weight.detach())
        assert_bits(my_target, target)
    assert_bits(my_gradient, weight.grad.mul_(momentum).add_(weight.detach(), alpha=weight_decay))


def test_a_step_with_decay_0_and_1_is_exact(implementation, device):
    odd = torch.tensor([float("nan"), float("inf"), 0.1], device=device)
    for decay, want in ((0, torch.ones(3, device=device)), (1, odd)):
        target = odd.clone()
        implementation.sgd_ema_(
            torch.ones(4, device=device), torch.zeros(4, device=device), target, 0.1, momentum=0.9, weight_decay=0, ema_decay=decay
        )
        assert_bits(target, want)


def test_ema_of_itself(implementation, device):
    target = random(10_000, device=device)
    want = target.clone()
    implementation.ema_(target, target, 0.9)
    torch.testing.assert_close(target, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_what_they_touch_and_no_more(implementation, value, device):
    clients, received = random(3, 9000, device=device), random(9000, seed=1, device=device)
    segments = torch.tensor([[0, 3000], [3000, 3001], [5000, 9000]])
    clients[1, 3000] = value
    clients[2, 4000] = value  # in no segment
    mean, drift, spread = implementation.aggregate(clients, torch.full((3,), 1 / 3, device=device), received, segments)
    assert (~mean.isfinite()).nonzero().flatten().tolist() == [3000, 4000]
    assert (~drift.isfinite()).nonzero().tolist() == [[1, 1]]
    assert (~spread.isfinite()).nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
    assert (~implementation.layer_norms(clients[1], received, segments).isfinite()).nonzero().flatten().tolist() == [1]
    assert (~implementation.ema_(received, clients[1], 0.5).isfinite()).nonzero().flatten().tolist() == [3000]


@pytest.mark.parametrize("value", [3e38, 1e19, 1e-12, 1e-18, 1e-22, 1e-44])
def test_squares_beyond_float32_do_not_spoil_the_norms(implementation, value):
    vector = torch.full((5000,), value)
    want = vector[0].double().item() * 5000**0.5
    assert implementation.layer_norms(vector, torch.zeros(5000), torch.tensor([[0, 5000]])).item() == pytest.approx(want, rel=NORM_ERROR)


SHAPES = [
    (64, 16, 5, 7),
    (16, 64, 2, 2),
    (64, 512),
    (6, 7),
    (10, 3, 5, 3),
    (8, 100, 3, 3),
    (12, 65),
    (4, 130, 1, 1),
    (2, 48, 9, 9),
    (300, 1),
]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("relu, affine, tracked", [(True, True, True), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_is_torchs_view_by_view(shape, views, relu, affine, tracked):
    """In float64, the result, all gradients and the running statistics, for rows that fill the kernel's lines and others that do not."""
    channels, results = shape[1], []
    for batch_norm in (ops.batch_norm, lambda *args, **given: reference.batch_norm(*args, *given.values())):
        x = (
            3 * random(*shape, dtype=torch.float64) + random(channels, *[1] * (len(shape) - 2), seed=1, dtype=torch.float64)
        ).requires_grad_()
        vectors = [random(channels, seed=seed, dtype=torch.float64) for seed in (2, 3)] if affine else [None, None]
        running = [random(channels, seed=seed, dtype=torch.float64) for seed in (4, 5)] if tracked else [None, None]
        leaves = [x, *(vector.requires_grad_() for vector in vectors if affine)]
        y = batch_norm(x, *vectors, *running, views=views, momentum=0.3, eps=1e-5, relu=relu)
        y.backward(random(*shape, seed=6, dtype=torch.float64))
        results.append([y.detach(), *(leaf.grad for leaf in leaves), *(r for r in running if tracked)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_batch_norm_in_float32():
    """Near to float64, also where the mean is a hundred times the deviation."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x = (random(64, 16, 8, 8) + 100).to(dtype).requires_grad_()
        y = ops.batch_norm(x, None, None, None, None, views=2)
        y.backward(random(64, 16, 8, 8, seed=1).to(dtype))
        results.append((y.detach().double(), x.grad.double()))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_batch_norm_by_hand(implementation):
    """Two views of two rows: each has the mean of its own rows, and the statistics follow the first and then the second."""
    x, mean, variance = torch.tensor([[1.0], [3.0], [10.0], [14.0]]), torch.zeros(1), torch.zeros(1)
    y = implementation.batch_norm(x, torch.ones(1), torch.zeros(1), mean, variance, views=2, momentum=0.5, eps=0, relu=True)
    assert y.tolist() == [[0.0], [1.0], [0.0], [1.0]]
    assert mean.item() == 0.5 * (0.5 * 2) + 0.5 * 12 and variance.item() == 0.5 * (0.5 * 2) + 0.5 * 8


def test_batch_norm_lets_nan_through(implementation):
    x = random(8, 3)
    x[5, 1] = float("nan")
    y = implementation.batch_norm(x, None, None, None, None, views=2, relu=True)
    assert y.isnan().nonzero().tolist() == [[row, 1] for row in range(4, 8)]


@pytest.mark.parametrize("x, views, words", [
    (torch.zeros(5, 3), 2, "x must hold 2 views of one size"), (torch.zeros(2, 3), 2, "more than one value for each channel"),
    (torch.zeros(4, 3, 2), 2, r"x must be \[N, C\]"),
])  # fmt: skip
def test_refusals_of_batch_norm(x, views, words):
    with pytest.raises(ValueError, match=words):
        ops.batch_norm(x, None, None, None, None, views=views)
    with pytest.raises(ValueError, match="must have shape"):
        ops.batch_norm(torch.rand(4, 3), torch.ones(2), None, None, None)


def test_no_segments(implementation, device):
    clients = random(2, 100, device=device)
    mean, drift, spread = implementation.aggregate(clients, torch.ones(2, device=device), clients[0], torch.empty(0, 2, dtype=torch.int64))
    assert mean.shape == (100,) and drift.shape == spread.shape == (2, 0) and drift.dtype == torch.float64
    assert implementation.layer_norms(clients[0], clients[1], torch.empty(0, 2, dtype=torch.int64)).shape == (0,)


def test_more_layers_than_one_launch_holds(device):
    clients, segments = random(2, 5000, device=device), torch.tensor([[20 * i + 3, 20 * i + 17] for i in range(200)])
    _, drift, _ = ops.aggregate(clients, torch.full((2,), 0.5, device=device), clients[1], segments)
    torch.testing.assert_close(drift[0].cpu(), exact_norms(clients[0].cpu(), clients[1].cpu(), segments), rtol=NORM_ERROR, atol=0)


@pytest.mark.slow
def test_norms_of_22_million_floats():
    a, b = random(22_000_000), random(22_000_000, seed=1)
    segments = torch.tensor([[0, 22_000_000]])
    want = exact_norms(a, b, segments).item()
    assert ops.layer_norms(a, b, segments).item() == pytest.approx(want, rel=NORM_ERROR)
    _, drift, _ = ops.aggregate(a[None], torch.ones(1), b, segments)
    assert drift.item() == pytest.approx(want, rel=NORM_ERROR)


def zeros_without_memory(count: int) -> Tensor:
    """A vector of float32 zeros, of which only the pages that are written take memory."""
    no_reserve = 0x4000
    return torch.frombuffer(mmap.mmap(-1, count * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), dtype=torch.float32)


def test_layers_beyond_2_to_the_31():
    far = 2**31
    a, b = zeros_without_memory(far + 9000), zeros_without_memory(far + 9000)
    a[5], b[far + 100], b[far + 8999] = 3, 4, 12
    assert ops.layer_norms(a, b, torch.tensor([[4, 7], [far + 3, far + 101], [far + 101, far + 9000]])).tolist() == [3, 4, 12]


@pytest.mark.slow
def test_clients_beyond_2_to_the_31():
    size = 2**25 + 5
    clients = zeros_without_memory(65 * size).view(65, size)  # client 64 begins beyond float 2^31
    clients[64, size - 2] = 2
    mean, drift, spread = ops.aggregate(clients, torch.full((65,), 0.5), torch.zeros(size), torch.tensor([[0, 8], [size - 3, size]]))
    assert mean.nonzero().flatten().tolist() == [size - 2] and mean[size - 2] == 1
    assert drift.nonzero().tolist() == [[64, 1]] and drift[64, 1] == 2
    assert spread[:, 1].tolist() == [1.0] * 65 and not spread[:, 0].any()


# ---- Views --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(device) -> Tensor:
    """24 images of noise, with a grey and a black patch, where hue has no meaning; higher than wide."""
    x = torch.randint(0, 256, (24, 3, 32, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[:, :, 4:8, 4:8], x[:, :, 10:12, 3:9] = 128, 0
    return x.to(device)


def draws(images: Tensor, **columns) -> Tensor:
    """Rows of draws that change nothing but what the columns say."""
    _, _, height, width = images.shape
    rows = torch.tensor([0.0, 0, height, width, 0, 1, 1, 1, 0, 0, 1, 2, 3, 0]).repeat(24, 1)
    for name, values in columns.items():
        rows[:, ops.VIEW.index(name)] = torch.as_tensor(values).float()
    return rows.to(images.device)


def assert_views(views: Tensor, images: Tensor, *changes) -> None:
    """The views are what each sample's torchvision calls make of its image in [0, 1], to 1e-5, far below one step of uint8."""
    expected = torch.stack([change(x) for change, x in zip(changes, images.cpu().float() / 255, strict=True)])
    torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=1e-5)


def test_a_neutral_view_is_the_image(implementation, images):
    assert_views(implementation.augment(images, draws(images)), images, *[lambda x: x] * 24)


def test_crop_and_flip_are_torchvisions(implementation, images):
    top, left, height, width = boxes = draw_views(24, 32, 28, torch.device("cpu"), torch.Generator().manual_seed(1))[:, :4].unbind(1)
    flip = torch.arange(24) % 2
    views = implementation.augment(images, draws(images, top=top, left=left, height=height, width=width, flip=flip))
    crops = [lambda x, box=box: tv.resized_crop(x, *box, [32, 28], antialias=True) for box in torch.stack(boxes, 1).int().tolist()]
    assert_views(views, images, *[(lambda x, crop=crop: tv.hflip(crop(x))) if f else crop for crop, f in zip(crops, flip, strict=True)])


@pytest.mark.parametrize(
    "name, adjust, low, high",
    [
        ("brightness", tv.adjust_brightness, 0.2, 1.8),
        ("contrast", tv.adjust_contrast, 0.2, 1.8),
        ("saturation", tv.adjust_saturation, 0.2, 1.8),
        ("hue", tv.adjust_hue, -0.5, 0.5),
        ("greyscale", lambda x, amount: tv.rgb_to_grayscale(x, 3) if amount else x, 0, 1),
    ],
)
def test_each_operation_is_torchvisions(implementation, images, name, adjust, low, high):
    amounts = torch.linspace(low, high, 24).round() if name == "greyscale" else torch.linspace(low, high, 24)
    views = implementation.augment(images, draws(images, **{name: amounts}))
    assert_views(views, images, *[lambda x, a=a: adjust(x, a) for a in amounts.tolist()])


def test_jitter_is_torchvisions_in_each_of_the_24_orders(implementation, images):
    orders = list(itertools.permutations(range(4)))
    rows = draw_views(24, 32, 28, torch.device("cpu"), torch.Generator().manual_seed(2))
    amounts = dict(brightness=rows[:, 5] * 0.9, contrast=rows[:, 6] * 0.8, saturation=rows[:, 7] * 1.1, hue=rows[:, 8] + 0.05)
    places = dict(zip(("first", "second", "third", "fourth"), torch.tensor(orders).unbind(1), strict=True))
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)

    def in_order(x, order, amount):
        for op in order:
            x = adjust[op](x, amount[op])
        return x

    each = zip(orders, torch.stack(list(amounts.values()), 1).tolist(), strict=True)
    assert_views(
        implementation.augment(images, draws(images, **amounts, **places)), images, *[lambda x, e=e: in_order(x, *e) for e in each]
    )


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (8, 8), (33, 31), (100, 64)])
def test_library_and_reference_make_the_same_views(height, width, device):
    images = torch.randint(0, 256, (50, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    rows = draw_views(150, height, width, images.device, torch.Generator(device).manual_seed(1))
    made = ops.augment(images, rows)
    # by the CPU: on a GPU, plain torch rounds otherwise and is off by up to 4e-5 itself
    torch.testing.assert_close(made.cpu(), reference.augment(images.cpu(), rows.cpu()), rtol=0, atol=1e-5)
    assert_bits(made.cpu(), ops.augment(images.cpu(), rows.cpu()))
    assert_bits(made[50:100], ops.augment(images, rows[50:100].clone()))  # view n is of image n mod B


def test_no_images_make_no_views(implementation, device):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8, device=device)
    assert implementation.augment(none, torch.zeros(0, 14, device=device)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 1e30, -3.5, 3.5])
def test_impossible_draws_read_no_other_memory(value, device):
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8, device=device)
    rows = torch.full((1, 14), value, device=device)
    views = ops.augment(images, rows)
    assert (views >= 0).all() and (views <= 1).all()


# ---- Refusals -----------------------------------------------------------------------------------------------------------------

INSIDE = "after the one before and inside the vector"
X, D = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 14)
V, C, W, S = torch.zeros(6), torch.zeros(2, 6), torch.ones(2), torch.tensor([[0, 2], [2, 6]])
REFUSALS = [
    ("weighted_mean", (C.int(), W), "clients must be float32 or float64, got int32"),
    ("weighted_mean", (C.bfloat16(), W), "clients must be float32 or float64, got bfloat16"),
    ("weighted_mean", (V, W), "clients must have shape [K, P] with K >= 1, got [6]"),
    ("weighted_mean", (C[:0], W[:0]), "clients must have shape [K, P] with K >= 1, got [0, 6]"),
    ("weighted_mean", (C.t(), W), "clients must be contiguous, got strides [1, 6] for shape [6, 2]"),
    ("weighted_mean", (V.expand(2, 6), W), "clients must be contiguous, got strides [0, 1] for shape [2, 6]"),
    ("weighted_mean", (C, W.double()), "weights must be float32 on cpu like clients, got float64 on cpu"),
    ("weighted_mean", (C, torch.ones(3)), "weights must have shape [2], got [3]"),
    ("weighted_mean", (C, W[None]), "weights must have shape [2], got [1, 2]"),
    ("weighted_mean", (C.clone().requires_grad_(), W), "clients must not require grad, pass clients.detach()"),
    ("aggregate", (C, W, V.double(), S), "received must be float32 on cpu like clients, got float64 on cpu"),
    ("aggregate", (C, W, V[:5], S), "received must have shape [6] or [2, 6], got [5]"),
    ("aggregate", (C, W, torch.zeros(3, 6), S), "received must have shape [6] or [2, 6], got [3, 6]"),
    ("aggregate", (C, W, V, S.int()), "segments must be int64 of shape [L, 2], got int32 of shape [2, 2]"),
    ("aggregate", (C, W, V, S.flatten()), "segments must be int64 of shape [L, 2], got int64 of shape [4]"),
    ("aggregate", (C, W, V, S.flip(0)), f"segment 1 must lie in [6, 6], {INSIDE}, got [0, 2]"),
    ("layer_norms", (V, V, torch.tensor([[0, 3], [2, 6]])), f"segment 1 must lie in [3, 6], {INSIDE}, got [2, 6]"),
    ("layer_norms", (V, V, torch.tensor([[0, 7]])), f"segment 0 must lie in [0, 6], {INSIDE}, got [0, 7]"),
    ("layer_norms", (V, V, torch.tensor([[-1, 2]])), f"segment 0 must lie in [0, 6], {INSIDE}, got [-1, 2]"),
    ("layer_norms", (V, V, torch.tensor([[4, 3]])), f"segment 0 must lie in [0, 6], {INSIDE}, got [4, 3]"),
    ("layer_norms", (C, C, S), "a must have shape [P], got [2, 6]"),
    ("layer_norms", (V, V[:5], S), "b must have shape [6], got [5]"),
    ("layer_norms", (V, V.double(), S), "b must be float32 on cpu like a, got float64 on cpu"),
    ("ema_", (V, V.double(), 0.9), "online must be float32 on cpu like target, got float64 on cpu"),
    ("ema_", (V, V[None].clone(), 0.9), "online must have shape [6], got [1, 6]"),
    ("ema_", (V[0], V[0], 0.9), "target must have shape [P] or [K, P], got []"),
    ("ema_", (torch.zeros(12)[::2], V, 0.9), "target must be contiguous, got strides [2] for shape [6]"),
    ("ema_", (V, V.clone(), 1.5), "decay must lie in [0, 1], got 1.5"),
    ("ema_", (V, V.clone(), -0.1), "decay must lie in [0, 1], got -0.1"),
    ("ema_", (V, V.clone(), float("nan")), "decay must lie in [0, 1], got nan"),
    ("ema_", (V, V.clone().requires_grad_(), 0.9), "online must not require grad, pass online.detach()"),
    ("augment", (X.int(), D), "images must be uint8 of shape [B, 3, H, W], got int32 of shape [2, 3, 4, 4]"),
    ("augment", (X[:, :1], D), "images must be uint8 of shape [B, 3, H, W], got uint8 of shape [2, 1, 4, 4]"),
    ("augment", (X.mT, D), "images must be contiguous, got strides [48, 16, 1, 4] for shape [2, 3, 4, 4]"),
    ("augment", (X, D.double()), "draws must be float32 on cpu like images, got float64 on cpu"),
    ("augment", (X, D[:, :9].clone()), "draws must have shape [N, 14] with N a multiple of 2 images, got [4, 9]"),
    ("augment", (torch.zeros(0, 3, 2**15, 2**14, dtype=torch.uint8), D[:0]), "images must have at most 2^28 pixels, got 32768 x 16384"),
    ("augment", (X[:0], D), "draws must have shape [N, 14] with N a multiple of 0 images, got [4, 14]"),
    ("augment", (X, D[:3]), "draws must have shape [N, 14] with N a multiple of 2 images, got [3, 14]"),
    ("ema_", (V[:5], V[1:], 0.9), "online must be target's own memory or share none with it, got one that begins 4 bytes after it"),
    ("ema_", (V[1:], V[:5], 0.9), "online must be target's own memory or share none with it, got one that begins -4 bytes after it"),
]


STEP = dict(momentum=0.9, weight_decay=0.1, ema_decay=0.5)
STEP_REFUSALS = [
    ((V.bfloat16(), V, None, 0.1), {}, "weight must be float32 or float64, got bfloat16"),
    ((C, V, None, 0.1), {}, "weight must have shape [P], got [2, 6]"),
    ((V, V.double(), None, 0.1), {}, "gradient must be float32 on cpu like weight, got float64 on cpu"),
    ((V, V[:5].clone(), None, 0.1), {}, "gradient must have shape [6], got [5]"),
    ((V, V, None, 0.1), {}, "gradient must share no memory with weight, got one that begins 0 bytes after it"),
    ((V, V + 1, V[:4].double(), 0.1), {}, "target must be float32 on cpu like weight, got float64 on cpu"),
    ((V, V + 1, torch.zeros(7), 0.1), {}, "target must have shape [T] with T <= 6, got [7]"),
    ((V, V + 1, C, 0.1), {}, "target must have shape [T] with T <= 6, got [2, 6]"),
    ((V, V + 1, V[4:], 0.1), {}, "target must share no memory with weight, got one that begins 16 bytes after it"),
    ((V, C[1], C.view(-1)[4:8], 0.1), {}, "target must share no memory with gradient, got one that begins -8 bytes after it"),
    ((V, V + 1, None, torch.tensor(0.1)), {}, "lr must be a float64 scalar on cpu like weight, got float32 of shape [] on cpu"),
    ((V, V + 1, None, torch.zeros(1).double()), {}, "lr must be a float64 scalar on cpu like weight, got float64 of shape [1] on cpu"),
    ((V, V + 1, None, 0.1), dict(ema_decay=1.5), "ema_decay must lie in [0, 1], got 1.5"),
    ((V.clone().requires_grad_(), V, None, 0.1), {}, "weight must not require grad, pass weight.detach()"),
]


@pytest.mark.parametrize(("arguments", "more", "sentence"), STEP_REFUSALS, ids=[sentence for *_, sentence in STEP_REFUSALS])
def test_refusals_of_a_step(implementation, arguments, more, sentence):
    with pytest.raises(ValueError) as refusal:
        implementation.sgd_ema_(*arguments, **STEP | more)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(("op", "arguments", "sentence"), REFUSALS, ids=[f"{op}: {sentence}" for op, _, sentence in REFUSALS])
def test_refusals(implementation, op, arguments, sentence):
    with pytest.raises(ValueError) as refusal:
        getattr(implementation, op)(*arguments)
    assert str(refusal.value) == sentence


M = torch.arange(40.0)  # clients, weights, received, and an out of its own
IN_M = M[:12].view(2, 6), M[12:14], M[14:20]
OUT_REFUSALS = [
    (M[20:26].double(), "out must be float32 on cpu like clients, got float64 on cpu"),
    (M[20:25], "out must have shape [6], got [5]"),
    (M[20:32].view(2, 6), "out must have shape [6], got [2, 6]"),
    (M[20:32:2], "out must be contiguous, got strides [2] for shape [6]"),
    (M[20:26].clone().requires_grad_(), "out must not require grad, pass out.detach()"),
    (M[:6], "out must share no memory with clients, got one that begins 0 bytes after it"),
    (M[11:17], "out must share no memory with clients, got one that begins 44 bytes after it"),
    (M[13:19], "out must share no memory with weights, got one that begins 4 bytes after it"),
    (M[19:25], "out must share no memory with received, got one that begins 20 bytes after it"),
]


@pytest.mark.parametrize(("out", "sentence"), OUT_REFUSALS, ids=[sentence for _, sentence in OUT_REFUSALS])
def test_refusals_of_out(implementation, out, sentence):
    clients, weights, received = IN_M
    want = M.clone()
    with pytest.raises(ValueError) as refusal:
        implementation.aggregate(clients, weights, received, S, out=out)
    assert str(refusal.value) == sentence
    if "received" not in sentence:
        with pytest.raises(ValueError) as refusal:
            implementation.weighted_mean(clients, weights, out=out)
        assert str(refusal.value) == sentence
    assert torch.equal(M, want)


@needs_gpu
def test_refuses_another_device(implementation):
    with pytest.raises(ValueError, match="online must be float32 on cuda:0 like target, got float64 on cpu"):
        implementation.ema_(V.cuda(), V.double(), 0.9)


def test_neighbours_in_memory_do_not_overlap(implementation):
    memory = random(10)
    want = 0.5 * memory[:5] + 0.5 * memory[5:]
    torch.testing.assert_close(implementation.ema_(memory[:5], memory[5:], 0.5), want)


def test_no_grad_lets_parameters_in(implementation):
    with torch.no_grad():
        assert implementation.weighted_mean(C.clone().requires_grad_(), W).tolist() == [0] * 6


# ---- torch's own checks, compiler, other devices ------------------------------------------------------------------------------


def test_opcheck(device):
    clients, weights, received = random(3, 100, device=device), torch.ones(3, device=device), random(100, device=device)
    segments, fedu = layers(100), torch.ops.fedu
    out = torch.empty_like(received)
    torch.library.opcheck(fedu.weighted_mean.default, (clients, weights, out))
    torch.library.opcheck(fedu.aggregate.default, (clients, weights, received, segments, out))
    torch.library.opcheck(fedu.aggregate.default, (clients, weights, clients.clone(), segments, out))
    torch.library.opcheck(fedu.layer_norms.default, (clients[0].clone(), received, segments))
    torch.library.opcheck(fedu.ema_.default, (clients, clients.clone(), 0.9))
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    for target in (clients[0, :50].clone(), None):
        torch.library.opcheck(fedu.sgd_ema_.default, (received, received.clone(), target, lr, 0.9, 5e-4, 0.99))
    torch.library.opcheck(fedu.augment.default, (X.to(device), D.to(device)))


def test_opcheck_of_batch_norm():
    fedu, x, vectors = torch.ops.fedu, random(6, 5), [random(5, seed=seed) for seed in range(4)]
    torch.library.opcheck(fedu.batch_norm.default, (x, *vectors, 2, 0.1, 1e-5, True))
    y, *statistics = fedu.batch_norm(x, None, None, None, None, 2, 0.1, 1e-5, False)
    torch.library.opcheck(fedu.batch_norm_backward.default, (y, x, *vectors[:2], *statistics, 2, True))


def test_schema_marks_the_mutation():
    fedu = torch.ops.fedu
    for op, written in (
        (fedu.ema_, {"target"}),
        (fedu.sgd_ema_, {"weight", "gradient", "target"}),
        (fedu.aggregate, {"out"}),
        (fedu.weighted_mean, {"out"}),
        (fedu.layer_norms, set()),
        (fedu.batch_norm, {"running_mean", "running_var"}),
    ):
        assert {argument.name for argument in op.default._schema.arguments if argument.is_write} == written


def test_compile_without_a_graph_break(device):
    def round_(clients, weights, received, target, segments, out):
        mean, drift, spread = ops.aggregate(clients * 2, weights, received, segments, out=out)
        ops.ema_(target, mean, 0.5)
        ops.sgd_ema_(mean, weights.new_ones(50), target, 0.1, **STEP)
        return ops.layer_norms(target, mean, segments) + drift[0] + spread[0], ops.weighted_mean(clients, weights)

    arguments = random(3, 50, device=device), torch.full((3,), 1 / 3, device=device), random(50, seed=1, device=device), layers(50)
    targets, outs = torch.ones(2, 50, device=device), torch.zeros(2, 50, device=device)
    compiled = torch.compile(round_, fullgraph=True, backend="aot_eager")
    clients, weights, received, segments = arguments
    results = [f(clients, weights, received, t, segments, out) for f, t, out in zip((compiled, round_), targets, outs, strict=True)]
    for got, want in zip(*results, strict=True):
        assert_bits(got, want)
    assert_bits(*targets)
    assert_bits(*outs)


def test_meta_tensors_give_shapes(implementation):
    clients, weights, vector = C.to("meta"), W.to("meta"), V.to("meta")
    for segments in (S, S.to("meta")):
        mean, drift, spread = implementation.aggregate(clients, weights, vector, segments)
        assert mean.shape == (6,) and drift.shape == spread.shape == (2, 2) and mean.is_meta and drift.dtype == torch.float64
        assert implementation.aggregate(clients, weights, vector, segments, out=mean)[0] is mean
        assert implementation.layer_norms(vector, vector, segments).shape == (2,)
    assert implementation.weighted_mean(clients, weights).shape == (6,)
    assert implementation.augment(X.to("meta"), D.to("meta")).shape == (4, 3, 4, 4)
    assert implementation.ema_(vector, vector.clone(), 0.9) is vector
    implementation.sgd_ema_(vector, vector.clone(), vector[:3].clone(), 0.1, **STEP)


def test_fake_tensors_give_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        clients, vector, segments = torch.empty(2, 6), torch.empty(6), torch.empty(3, 2, dtype=torch.int64)
        mean, drift, spread = ops.aggregate(clients, torch.empty(2), vector, segments)
        assert mean.shape == (6,) and drift.shape == spread.shape == (2, 3)
        assert ops.layer_norms(vector, vector, segments).dtype == torch.float64
        assert ops.augment(torch.empty(2, 3, 5, 6, dtype=torch.uint8), torch.empty(4, 14)).shape == (4, 3, 5, 6)
        assert ops.ema_(vector, mean, 0.9) is vector
        ops.sgd_ema_(vector, mean, torch.empty(3), 0.1, **STEP)


@needs_gpu
def test_a_replayed_step_reads_its_learning_rate_anew():
    weight, gradient, lr = torch.ones(5, device="cuda"), torch.ones(5, device="cuda"), torch.zeros((), dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sgd_ema_(weight, gradient, None, lr, momentum=1, weight_decay=0, ema_decay=0)
    for rate, want in ((0.5, 0.5), (0.25, 0.25)):
        lr.fill_(rate)
        graph.replay()
        assert weight.tolist() == [want] * 5


@needs_gpu
def test_capturable_in_a_cuda_graph():
    clients, weights, received = random(3, 5000, device="cuda"), torch.full((3,), 1 / 3, device="cuda"), random(5000, device="cuda")
    segments, out = layers(5000), torch.empty(5000, device="cuda")
    want, graph = ops.aggregate(clients, weights, received, segments), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.aggregate(clients, weights, received, segments, out=out)
        ops.ema_(received, results[0], 1 - 1e-9)
    graph.replay()
    for got, expected in zip(results, want, strict=True):
        assert_bits(got, expected)
