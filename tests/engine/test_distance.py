"""Distances of a target from a source: SciPy's values, and what they must not depend on."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from interruption import CPU
from scipy.linalg import sqrtm

import data
import models
import pretrain
from engine import distance
from engine.distance import DIMENSIONS, SAMPLE, compare, project, projection, sample
from readers.transforms import NORMALIZATION

MEASURES = ("frechet_relative", "energy")


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_sample_is_fixed_sorted_and_without_repeats():
    chosen = sample(100_000)
    assert chosen.dtype == np.int64 and chosen.shape == (SAMPLE,)
    assert (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] < 100_000
    np.testing.assert_array_equal(chosen, sample(100_000))
    np.testing.assert_array_equal(sample(1000, 5), [269, 307, 510, 635, 847])
    # From all over: a quarter of the images gives about a quarter.
    assert abs((chosen < 25_000).mean() - 0.25) < 0.06
    for few in (0, 1, 5, SAMPLE):
        np.testing.assert_array_equal(sample(few), np.arange(few))


def test_projection_is_orthonormal_and_depends_on_the_width_alone():
    for width in (DIMENSIONS, 1024):
        columns = projection(width).double()
        assert columns.shape == (width, DIMENSIONS)
        unit = torch.eye(DIMENSIONS).double()
        torch.testing.assert_close(columns.T @ columns, unit, atol=1e-6, rtol=0)
    first = projection(1024).clone()
    projection.cache_clear()
    torch.manual_seed(5), np.random.seed(5)
    assert torch.equal(projection(1024), first)
    corner = torch.tensor([[-0.0143, -0.0047, 0.0749], [0.0383, -0.0181, 0.0364]])
    torch.testing.assert_close(first[:2, :3], corner, atol=1e-4, rtol=0)
    # Householder's reflections leave signs open; here the triangle's diagonal is positive.
    gaussian = torch.from_numpy(np.random.default_rng(1024).standard_normal((1024, DIMENSIONS)))
    assert (gaussian.T @ first.double()).diagonal().min() > 20
    x = normal(0, 3, 1024)
    assert project(x).dtype == torch.float32
    torch.testing.assert_close(project(x), x.float() @ first)
    refuses(ValueError, lambda: project(normal(0, 3, 64)), "64 dimensions", DIMENSIONS)


def scipy_frechet(x):
    """Dowson & Landau's distance from the standard Gaussian, with SciPy's matrix root."""
    covariance = np.cov(x, rowvar=False)
    spread = np.trace(covariance) + x.shape[1] - 2 * np.trace(sqrtm(covariance).real)
    return np.sum(x.mean(0) ** 2) + spread


def test_frechet_is_the_closed_form_of_gaussians():
    x = normal(3, 50, 4)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exact moments
    assert distance.frechet(x) == pytest.approx(0, abs=1e-12)
    mean, deviation = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([0.5, 1.0, 3.0, 0.0])
    expected = 5.25 + 0.25 + 0 + 4 + 1  # |m|^2 + sum (s - 1)^2
    assert distance.frechet(x * deviation + mean) == pytest.approx(expected, rel=1e-9)


def double_loop_energy(x, y):
    def mean(pairs):
        return np.mean([math.dist(a, b) for a, b in pairs])

    between = mean(itertools.product(x, y))
    within = sum(mean(itertools.permutations(z, 2)) for z in (x, y))
    return (2 * between - within) / (2 * between)


def plain(source, target):
    """compare once more, from its description, with NumPy and SciPy."""
    half, rows = len(source) // 2, []
    count = min(half, len(target))
    for seed in range(distance.ROUNDS):
        rng = np.random.default_rng(seed)
        order, drawn = rng.permutation(len(source)), rng.permutation(len(target))[:count]
        first, second = source[order[:half]], source[order[half : 2 * half]]
        covariance = np.cov(first, rowvar=False)
        covariance += 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        inverse_root = np.linalg.inv(sqrtm(covariance).real)
        near, far = ((x - first.mean(0)) @ inverse_root for x in (second, target[drawn]))
        values = [scipy_frechet(x) for x in (near, near[:count], far)]
        rows.append([*values, double_loop_energy(near, far)])
    unit, near, far, coefficient = np.mean(rows, 0)
    return {"frechet": far, "frechet_relative": 1 + (far - near) / unit, "energy": coefficient}


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("images", ((80, 40), (81, 60), (80, 12), (20, 40), (4, 2)))
def test_compare_is_what_it_says(images):
    source, target = normal(10, images[0], 12) @ normal(11, 12, 12), normal(12, images[1], 12) + 1
    result = compare(source.float(), target.float())
    assert result.pop("images") == images[1]
    expected = plain(source.float().double().numpy(), target.float().double().numpy())
    assert result == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in result.values())


def test_compare_with_the_source_itself_is_one_and_zero():
    """On average over draws; as many as a half, fewer, and fewer than dimensions."""
    scales = torch.logspace(0, -2, 16).double()
    for images, tolerance in ((64, 0.02), (20, 0.05), (6, 0.1)):
        results = [
            compare(normal(i, 128, 16) * scales, normal(i + 1000, images, 16) * scales)
            for i in range(50)
        ]
        relative, coefficient = (np.array([r[key] for r in results]) for key in MEASURES)
        assert abs(relative.mean() - 1) < tolerance
        assert abs(coefficient.mean()) < 0.003 and coefficient.min() < 0


def test_compare_does_not_depend_on_order_rotation_scale_or_place():
    source, target = normal(13, 200, 16) * torch.arange(1, 17), normal(14, 60, 16) * 3 + 1
    expected = compare(source, target)
    rotation = torch.linalg.qr(normal(15, 16, 16))[0]
    for change in (lambda x: x @ rotation, lambda x: 1e-3 * x, lambda x: 1e3 * x + 5e3):
        assert compare(change(source), change(target)) == pytest.approx(expected, rel=1e-6)
    assert compare(source, target.flip(0)) == pytest.approx(expected, rel=1e-9)
    other = compare(source.flip(0), target)  # the order of the source chooses the halves
    for key in MEASURES:
        assert other[key] == pytest.approx(expected[key], rel=0.15)


def test_appearance_counts_more_than_the_mix_of_classes():
    """The reason for the source's coordinates: classes lie far apart, appearance moves quietly."""
    rng = np.random.default_rng(17)
    centres = np.zeros((10, 16))
    centres[:, :8] = 10 * rng.standard_normal((10, 8))

    def images(count, classes, shift=0.0):
        features = centres[rng.integers(classes, size=count)] + rng.standard_normal((count, 16))
        return torch.from_numpy(features + shift * (np.arange(16) >= 8))

    source, own = images(512, 10), images(256, 10)
    fewer_classes, other_look = compare(source, images(256, 6)), compare(source, images(256, 10, 1))
    for key in MEASURES:
        assert compare(source, own)[key] < fewer_classes[key] < other_look[key]


def test_compare_refuses_what_has_no_distance():
    good, said = normal(18, 20, 8), "4 images of the source, 2 of the target, not"
    for source, target in ((good[:3], good), (good, good[:1])):
        refuses(ValueError, partial(compare, source, target), said)
    for bad in (math.nan, math.inf):
        for source, target in ((good, good * bad), (good * bad, good)):
            refuses(ValueError, partial(compare, source, target), "finite")
    one = torch.ones(20, 8)
    for constant in (one, torch.cat([one[1:], 2 * one[:1]])):  # also in one half of two
        unknown = {"frechet": None, "frechet_relative": None, "energy": None, "images": 20}
        assert compare(constant, good) == unknown
    assert compare(good, torch.ones(20, 8))["frechet_relative"] > 1
    assert distance.energy(torch.ones(4, 3), torch.ones(5, 3)) == 0


def test_the_sample_is_the_networks_features():
    """Of a tenth of a source and a network that has learnt nothing, at 16 pixels."""
    torch.manual_seed(0)
    model, (mean, std) = models.create_model("R14x0.5", 36), NORMALIZATION["natural"]
    train_set = data.load_dataset("synthetic-natural", size=16, fraction=0.1, fraction_seed=3)
    found = pretrain.sample_features(model, train_set, 16, (mean, std), 0, CPU)
    assert found.shape == (SAMPLE, DIMENSIONS)
    pixels = torch.stack([train_set.read(i) for i in sample(800)[[0, 300, 511]]]) / 255
    inputs = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        expected = project(model.eval().features(inputs))
    torch.testing.assert_close(found[[0, 300, 511]], expected, rtol=1e-3, atol=1e-4)
