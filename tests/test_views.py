"""The two views, held by torchvision: what each drawn number does, and with which probabilities and ranges it is drawn."""

import math

import pytest
import slow_fedu
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import ops
from data import draw_views, random_views, seed_of

CPU = torch.device("cpu")
N, S = 100_000, 32
COLUMN = {name: i for i, name in enumerate(ops.VIEW)}
NEUTRAL = torch.tensor([0, 0, S, S, 0, 1, 1, 1, 0, 0, 1, 2, 3, 0.0])


@pytest.fixture(scope="module")
def draws():
    return dict(zip(ops.VIEW, draw_views(N, S, S, CPU, torch.Generator().manual_seed(0)).unbind(1), strict=True))


@pytest.fixture(scope="module")
def images():
    """Smooth colours with noise: flat and grey regions, saturated ones, and all hues."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (40, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (S, S), mode="bilinear")
    images = (smooth * 1.5 - 60 + 20 * torch.randn(40, 3, S, S, generator=generator)).clamp(0, 255).to(torch.uint8)
    images[0], images[1], images[2, 1:] = 128, images[1, :1], 0
    return images


def share(condition, expected):
    """Whether so many of N draws are true, within five standard deviations."""
    return abs(condition.float().mean().item() - expected) < 5 * (expected * (1 - expected) / N) ** 0.5


def uniform(x, low, high):
    """Whether draws are uniform between two numbers: their range, mean and deviation, within five standard deviations."""
    n, width = len(x), high - low
    assert low - 1e-5 <= x.min() < low + 20 * width / n and high - 20 * width / n < x.max() <= high + 1e-5
    assert abs(x.double().mean().item() - (low + high) / 2) < 5 * width / (12 * n) ** 0.5
    assert abs(x.double().var().item() / (width**2 / 12) - 1) < 5 * (0.8 / n) ** 0.5
    return True


# ---------------------------------------------------------------------------------------------- what is drawn, how often


def test_probabilities(draws):
    """Flip 0.5, jitter 0.8, greyscale 0.2, each drawn apart from the others."""
    flip, grey, jitter = draws["flip"] == 1, draws["greyscale"] == 1, draws["hue"] != 0
    for drawn, probability in ((flip, 0.5), (grey, 0.2), (jitter, 0.8)):
        assert share(drawn, probability)
    for first, second, both in ((flip, grey, 0.1), (flip, jitter, 0.4), (grey, jitter, 0.16)):
        assert share(first & second, both)
    assert {*draws["flip"].tolist(), *draws["greyscale"].tolist()} == {0.0, 1.0}


@pytest.mark.parametrize("jitter", [1.0, 0.5])
def test_ranges_of_the_colour_jitter(jitter):
    """ColorJitter(0.8, 0.8, 0.8, 0.2), for MoCo v1 (0.4, 0.4, 0.4, 0.1): factors around 1 and a shift around 0, or all of them neutral."""
    drawn = draw_views(N, S, S, CPU, torch.Generator().manual_seed(1), jitter)[:, 5:9]
    jittered = drawn[:, 3] != 0
    assert (drawn[~jittered] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    columns = drawn[jittered].unbind(1)
    for amounts in columns[:3]:
        assert uniform(amounts, 1 - 0.8 * jitter, 1 + 0.8 * jitter)
    assert uniform(columns[3], -0.2 * jitter, 0.2 * jitter)
    assert (torch.corrcoef(torch.stack(columns)) - torch.eye(4)).abs().max() < 0.02


def test_the_four_operations_come_in_any_order(draws):
    order = torch.stack([draws[name] for name in ("first", "second", "third", "fourth")], 1)
    orders, counts = order.unique(dim=0, return_counts=True)
    assert len(orders) == math.factorial(4) and (orders.sort(1).values == torch.arange(4.0)).all()
    assert (counts / N - 1 / 24).abs().max() < 5 * (1 / 24 / N) ** 0.5


@pytest.mark.parametrize("scale", [0.08, 0.5])
def test_boxes_are_torchvisions(scale):
    """RandomResizedCrop(scale=(scale, 1), ratio=(3/4, 4/3)): as many boxes of each height and width, and as many at each place."""
    n = 10_000
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(S, scale=(scale, 1), ratio=(3 / 4, 4 / 3)), torch.empty(3, S, S)
    theirs = torch.tensor([list(crop.make_params([image]).values())[:4] for _ in range(n)])
    ours = draw_views(n, S, S, CPU, torch.Generator().manual_seed(0), crop_scale=scale)[:, :4]
    assert (ours == ours.round()).all()
    for moment in (
        lambda top, left, height, width: height,
        lambda top, left, height, width: width,
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: (height * width).square(),
        lambda top, left, height, width: (height / width).log().abs(),
        lambda top, left, height, width: top / (S - height).clamp(min=1),
        lambda top, left, height, width: left / (S - width).clamp(min=1),
        lambda top, left, height, width: (height * width < (scale + 0.08) * S * S).double(),
        lambda top, left, height, width: ((height == S) & (width == S)).double(),
    ):
        a, b = moment(*ours.double().unbind(1)), moment(*theirs.double().unbind(1))
        assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n).sqrt()


def test_of_scale_1_every_view_shows_the_whole_image():
    assert (draw_views(100, 33, 33, CPU, crop_scale=1)[:, :4] == torch.tensor([0, 0, 33, 33])).all()


def test_the_probability_of_greyscale():
    """The other numbers stay as they are."""
    never, some, always = (draw_views(N, S, S, CPU, torch.Generator().manual_seed(0), greyscale=p) for p in (0, 0.6, 1))
    assert torch.equal(never[:, :-1], some[:, :-1]) and torch.equal(never[:, :-1], always[:, :-1])
    assert not never[:, -1].any() and share(some[:, -1] == 1, 0.6) and always[:, -1].all()


def test_areas_and_ratios_of_boxes():
    """Areas are uniform in 0.08 to 1 of the image, ratios in 3/4 to 4/3 by their logarithm; in so large an image rounding is nothing."""
    side = 100_000
    height, width = draw_views(N, side, side, CPU, torch.Generator().manual_seed(0))[:, 2:4].double().unbind(1)
    area, ratio = height * width / side**2, (width / height).log()
    small = area < 0.5  # these fit at any ratio
    assert uniform(area[small], 0.08, 0.5) and uniform(ratio[small], math.log(3 / 4), math.log(4 / 3))
    assert 0.99 < area.max() <= 1


# ------------------------------------------------------------------------------------------- what the drawn numbers do


def drawn(column, amounts):
    """Views for which only one number is not neutral."""
    draws = NEUTRAL.repeat(len(amounts), 1)
    draws[:, COLUMN[column]] = amounts
    return draws


@pytest.mark.parametrize("augment", [ops.augment, ops.reference.augment])
class TestAugment:
    def test_boxes_are_enlarged_bilinearly(self, augment, images):
        draws = NEUTRAL.repeat(40, 1)
        draws[:, :4] = draw_views(40, S, S, CPU, torch.Generator().manual_seed(2))[:, :4]
        expected = [tv.resized_crop(x / 255, *map(int, d[:4]), [S, S], v2.InterpolationMode.BILINEAR) for x, d in zip(images, draws)]
        torch.testing.assert_close(augment(images, draws), torch.stack(expected), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "column, operation, amounts",
        [
            ("flip", lambda x, amount: tv.horizontal_flip(x), torch.ones(40)),
            ("brightness", tv.adjust_brightness, torch.linspace(0.2, 1.8, 40)),
            ("contrast", tv.adjust_contrast, torch.linspace(0.2, 1.8, 40)),
            ("saturation", tv.adjust_saturation, torch.linspace(0.2, 1.8, 40)),
            ("hue", tv.adjust_hue, torch.linspace(-0.2, 0.2, 40)),
            ("greyscale", lambda x, amount: tv.rgb_to_grayscale(x, 3), torch.ones(40)),
        ],
    )
    def test_each_operation_is_torchvisions(self, augment, images, column, operation, amounts):
        expected = [operation(x / 255, amount.item()) for x, amount in zip(images, amounts)]
        torch.testing.assert_close(augment(images, drawn(column, amounts)), torch.stack(expected), rtol=0, atol=1e-5)

    def test_all_operations_together(self, augment, images):
        """Crop, flip, the four of the jitter in the drawn order, greyscale; nothing else, so neither a blur nor a normalisation."""
        draws = draw_views(2 * len(images), S, S, CPU, torch.Generator().manual_seed(3))
        expected = torch.stack([slow_fedu.view(images[i % 40], draw) for i, draw in enumerate(draws)])
        torch.testing.assert_close(augment(images, draws), expected, rtol=0, atol=1e-5)

    def test_neutral_numbers_change_nothing(self, augment, images):
        torch.testing.assert_close(augment(images, NEUTRAL.repeat(40, 1)), images / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("jitter", [1.0, 0.5])
def test_two_views_of_each_image_have_numbers_of_their_own(images, jitter):
    views = random_views(images, torch.Generator().manual_seed(4), jitter=jitter)
    draws = draw_views(80, S, S, CPU, torch.Generator().manual_seed(4), jitter).chunk(2)
    for view, numbers in zip(views, draws):
        expected = torch.stack([slow_fedu.view(image, draw) for image, draw in zip(images, numbers)])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    assert (draws[0] != draws[1]).any(1).all()


def test_draws_are_by_the_generator_alone():
    key = (0, "training", 0, 0)
    torch.manual_seed(0)
    first = draw_views(8, S, S, CPU, torch.Generator().manual_seed(seed_of(*key)))
    torch.manual_seed(1)
    assert torch.equal(draw_views(8, S, S, CPU, torch.Generator().manual_seed(seed_of(*key))), first)
    for other in ((1, "training", 0, 0), (0, "training", 1, 0), (0, "training", 0, 1)):
        assert not torch.equal(draw_views(8, S, S, CPU, torch.Generator().manual_seed(seed_of(*other))), first)
