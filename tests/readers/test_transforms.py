"""The study's transforms beside torchvision, SciPy and exact arithmetic."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from trees import random_image

from readers import transforms


@pytest.mark.parametrize("shape", [(3, 40, 61), (1, 61, 40), (1, 1, 1), (3, 1, 9)])
@pytest.mark.parametrize("size", [16, 50])
def test_resizes_are_pillows(rng, shape, size):
    """To one of 255 steps."""
    image = random_image(rng, *shape)
    cropped = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    for resize, reference in (
        (transforms.resize_shorter, v2.Resize(size)),
        (transforms.resize_square, v2.Resize((size, size))),
        (transforms.resize_center_crop, cropped),
    ):
        expected = v2.functional.pil_to_tensor(reference(v2.functional.to_pil_image(image)))
        torch.testing.assert_close(resize(image, size), expected, rtol=0, atol=1)


def exact_area(pixels, size):
    """Every pixel repeated until the areas hold whole pixels; then their means."""
    channels, side, _ = pixels.shape
    repeats = size // math.gcd(side, size)
    for axis in (1, 2):
        wide = np.repeat(pixels, repeats, axis)
        shape = (channels, size, -1, side) if axis == 1 else (channels, size, size, -1)
        pixels = wide.reshape(shape).sum(axis + 1, dtype=np.int64)
    return pixels / (repeats * side // size) ** 2


@pytest.mark.parametrize(
    "side, size",
    [(7, 3), (10, 4), (9, 9), (5, 1), (256, 224), (225, 224), (300, 224), (1024, 224)],
)
def test_xray_square_is_the_exact_mean_of_areas(rng, side, size):
    image = random_image(rng, 2 if side < 500 else 1, side, side)
    before = image.clone()
    small = transforms.xray_square(image, size)
    assert small.dtype == torch.uint8 and small.shape == (len(image), size, size)
    np.testing.assert_array_equal(small, np.rint(exact_area(image.numpy(), size)))
    assert torch.equal(image, before)


def test_xray_square_extremes(rng):
    for side, value in ((1024, 255), (3000, 255), (31, 0)):  # sums that would leave 32 bits
        flat = torch.full((1, side, side), value, dtype=torch.uint8)
        assert (transforms.xray_square(flat, 7) == value).all()
    small = random_image(rng, 1, 5, 5)
    assert torch.equal(transforms.xray_square(small, 8), transforms.resize_square(small, 8))


def test_xray_square_takes_the_centre():
    image = torch.zeros(1, 20, 32, dtype=torch.uint8)
    image[..., 6:26] = 200
    assert (transforms.xray_square(image, 10) == 200).all()
    assert (transforms.xray_square(image.transpose(1, 2), 10) == 200).all()
    assert transforms.xray_square(image[:, :1, :1], 10).shape == (1, 10, 10)


def window(image, rng):
    """(top, left, height, width) of what random_resized_crop_flip takes of an image."""
    places = torch.arange(image[0].numel()).view(1, *image.shape[1:])
    whole = dict.fromkeys(("resize_square", "random_flip"), lambda crop, _: crop)
    with mock.patch.multiple(transforms, **whole):
        crop = transforms.random_resized_crop_flip(places, rng, None)[0]
    return *divmod(crop[0, 0].item(), image.shape[2]), *crop.shape


def test_resized_crop_is_torchvisions(rng):
    """The same distribution of area, aspect ratio and place in the room there is."""
    torch.manual_seed(0)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    image, elongated = torch.empty(1, 300, 400), torch.empty(1, 2, 90)  # whose centre it takes
    assert window(elongated, rng) == draw(elongated, (0.08, 1.0), (3 / 4, 4 / 3))
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    ours = np.array([window(image, rng) for _ in range(3000)])

    def properties(boxes):
        top, left, h, w = boxes.T
        return h * w, w / h, top / (301 - h), left / (401 - w)

    for mine, reference in zip(properties(ours), properties(theirs)):
        assert ks_2samp(mine, reference).pvalue > 0.01


def test_resized_crop_pixels(rng):
    image, seen = random_image(rng, 3, 50, 40), set()
    for seed in range(8):
        crop = transforms.random_resized_crop_flip(image, np.random.default_rng(seed), 16)
        top, left, h, w = window(image, np.random.default_rng(seed))
        expected = v2.Resize((16, 16))(image[:, top : top + h, left : left + w])
        flipped = torch.equal(crop, expected.flip(-1))
        assert flipped or torch.equal(crop, expected)
        seen.add(flipped)
    assert seen == {True, False}


def views(image, size):
    """The bytes of every size x size window of (1,H,W), and of its mirror image."""
    windows = image[0].unfold(0, size, 1).unfold(1, size, 1).flatten(0, 1)
    return [view.numpy().tobytes() for window in windows for view in (window, window.flip(-1))]


def test_crop_and_flip_windows(rng):
    image = torch.arange(42, dtype=torch.uint8).reshape(1, 6, 7)
    drawn = [transforms.random_crop_flip(image, rng, 4).numpy().tobytes() for _ in range(2400)]
    counts = [drawn.count(view) for view in views(image, 4)]
    assert len(counts) == 24 and sum(counts) == 2400 and chisquare(counts).pvalue > 0.001


def test_shift_flip_windows(rng):
    image = random_image(rng, 1, 16, 16)
    framed = torch.zeros(1, 18, 18, dtype=torch.uint8)
    framed[:, 1:17, 1:17] = image
    drawn = {transforms.random_shift_flip(image, rng).numpy().tobytes() for _ in range(400)}
    assert drawn == {*views(framed, 16)}  # a sixteenth of the side, here one pixel, each way


def test_affine_draws(rng):
    bounds = []

    def middle(low, high):  # neither turned nor shifted nor scaled
        bounds.append((low, high))
        return (low + high) / 2

    image = random_image(rng, 1, 40, 60)
    draws = SimpleNamespace(uniform=middle, random=rng.random)
    found = [transforms.random_affine_flip(image, draws) for _ in range(1000)]
    assert {*bounds} == {(-45, 45), (0.9, 1.1), (-0.25, 0.25)} and len(bounds) == 4000
    flips = sum(torch.equal(view, image.flip(-1)) for view in found)
    assert flips + sum(torch.equal(view, image) for view in found) == 1000 and 430 < flips < 570


def mapped(image, angle, shift, scale):
    """The affine map in the plane by scipy, mirrored at the centres of the border's pixels."""
    height, width = image.shape
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rows, columns = np.mgrid[:height, :width].astype(float)
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    points = np.stack([columns.ravel(), rows.ravel()]) - (center + shift)[:, None]
    x, y = turn @ points / scale + center[:, None]
    return scipy.ndimage.map_coordinates(image.astype(float), [y, x], order=1, mode="mirror")


@pytest.mark.parametrize("height, width", [(40, 60), (33, 33)])
@pytest.mark.parametrize("degrees, shift, scale", [(30, (7.5, -4), 1.1), (-45, (0, 9), 0.9)])
def test_affine_mirrors_beyond_the_border(rng, height, width, degrees, shift, scale):
    image = random_image(rng, 1, height, width)
    expected = mapped(image[0].numpy(), math.radians(degrees), np.array(shift), scale)
    draws = iter((degrees, scale, shift[0] / width, shift[1] / height))
    rng = SimpleNamespace(uniform=lambda low, high: next(draws), random=lambda: 1)  # not flipped
    found = transforms.random_affine_flip(image, rng)
    assert found.dtype == torch.uint8 and found.shape == image.shape
    np.testing.assert_allclose(found.numpy().ravel(), expected, atol=0.51)


def test_random_augment_is_torchvisions_and_leaves_its_generator_alone(rng):
    image = random_image(rng, 3, 40, 30)
    state = torch.random.get_rng_state()
    augment, crop = transforms.AUGMENTATIONS["randaugment"], transforms.AUGMENTATIONS["crop"]
    found = [augment(image, np.random.default_rng(seed), 16) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    drawn = np.random.default_rng(1)
    torch.manual_seed(int(drawn.integers(2**63)))
    assert torch.equal(found[0], crop(v2.RandAugment(2, 9)(image), drawn, 16))  # before the crop
    torch.random.set_rng_state(state)
