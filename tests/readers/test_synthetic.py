"""The procedural worlds: pure functions of their arguments, honest labels, and no short cuts."""

import itertools
from functools import cache
from unittest import mock

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from readers import scenes, synthetic
from readers.scenes import FINDINGS
from readers.synthetic import WORLDS, labels, render

NAMES = tuple(WORLDS)
MULTICLASS = tuple(name for name in NAMES if WORLDS[name].task == "multiclass")


@cache
def images(name, gap=0, count=1200, size=16):
    return np.stack([render(name, "train", i, size, gap=gap) for i in range(count)])


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_names_another_image(name):
    cases = [*itertools.product(("train", "test"), (0, 1, 2**33), (0, 1), (0, 0.4, 1))]
    drawn = [render(name, split, i, 24, seed, gap).tobytes() for split, i, seed, gap in cases]
    assert len(set(drawn)) == len(drawn)
    assert render(name, "train", 0, 24).tobytes() == drawn[0]  # earlier calls do not matter


# Of the first four training images at 32 pixels: mean and standard deviation.
PINNED = [
    ("synthetic-natural", 0, [151.6, 120.3, 106.1, 131.5], [63.0, 39.6, 39.1, 45.5]),
    ("synthetic-natural", 0.4, [135.7, 129.4, 104.1, 126.2], [60.6, 38.5, 49.7, 46.0]),
    ("synthetic-xray", 0, [121.9, 152.5, 150.1, 155.4], [47.9, 40.5, 56.5, 54.9]),
    ("synthetic-xray", 0.4, [129.7, 161.2, 154.4, 162.0], [29.1, 26.4, 35.0, 31.0]),
    ("synthetic-natural-target", 0, [107.9, 161.3, 125.2, 134.4], [48.1, 49.6, 46.3, 56.1]),
    ("synthetic-natural-target", 0.4, [123.4, 140.6, 134.7, 137.8], [46.8, 43.7, 44.2, 57.9]),
    ("synthetic-xray-target", 0, [137.3, 144.1, 160.2, 114.3], [58.4, 63.9, 47.9, 59.3]),
    ("synthetic-xray-target", 0.4, [152.8, 135.9, 156.3, 121.9], [39.9, 33.1, 30.7, 29.1]),
    ("synthetic-natural-target2", 0.4, [148.3, 134.5, 112.7, 117.1], [43.2, 47.0, 42.7, 47.4]),
    ("synthetic-natural-target3", 0.4, [151.8, 119.0, 141.2, 124.0], [48.7, 51.3, 35.7, 51.8]),
    ("synthetic-natural-target4", 0.4, [108.2, 151.3, 145.8, 158.8], [42.6, 48.8, 52.1, 52.5]),
    ("synthetic-xray-target2", 0.4, [149.5, 156.5, 123.0, 118.9], [36.6, 39.4, 25.2, 36.7]),
    ("synthetic-xray-target3", 0.4, [113.9, 134.9, 135.1, 141.1], [30.7, 30.6, 35.6, 46.0]),
    ("synthetic-xray-target4", 0.4, [150.4, 138.2, 111.8, 114.5], [42.3, 37.4, 37.9, 34.1]),
]


@pytest.mark.parametrize("name, gap, means, deviations", PINNED)
def test_the_worlds_stay_as_they_were(name, gap, means, deviations):
    """Results on them are compared over years."""
    pictures = images(name, gap, 4, 32)
    np.testing.assert_allclose(pictures.mean((1, 2, 3)), means, atol=0.1)
    np.testing.assert_allclose(pictures.std((1, 2, 3)), deviations, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_same_scene_at_every_size(name):
    def correlation(first, second):
        small = render(name, "train", first, 32).astype(float)
        large = render(name, "train", second, 96).astype(float)
        assert large.shape == (3 if "natural" in name else 1, 96, 96)
        pooled = large.reshape(len(large), 32, 3, 32, 3).mean((2, 4))
        return np.corrcoef(small.ravel(), pooled.ravel())[0, 1]

    same = [correlation(i, i) for i in range(20)]
    other = [correlation(i, i + 1) for i in range(20)]
    assert min(same) > 0.9 and np.mean(same) > 0.95
    assert np.mean(other) < 0.9  # two chests are alike too, though less than that


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_fewer_images_are_a_prefix(name):
    many = labels(name, "train", 500)
    np.testing.assert_array_equal(labels(name, "train", 7), many[:7])
    assert not np.array_equal(many, labels(name, "test", 500))
    assert not np.array_equal(many, labels(name, "train", 500, seed=1))


@pytest.mark.parametrize("name", MULTICLASS)
def test_classes_are_balanced(name):
    world = WORLDS[name]
    y = labels(name, "train", world.train)
    assert y.dtype == np.int64 and y.shape == (world.train,)
    share = np.bincount(y) / world.train * len(world.classes)
    assert len(share) == len(world.classes)
    assert 0.75 < share.min() and share.max() < 1.3
    repeats = (y[1:] == y[:-1]).mean()  # the order tells nothing
    assert abs(repeats - 1 / len(world.classes)) < 0.04


def test_findings_are_independent_and_common():
    y = labels("synthetic-xray", "train", 8000)
    assert y.dtype == np.float32 and y.shape == (8000, 7) and set(np.unique(y)) == {0, 1}
    assert np.all((y.mean(0) > 0.22) & (y.mean(0) < 0.28))
    correlation = np.corrcoef(y.T) - np.eye(7)
    assert np.abs(correlation).max() < 0.05


def test_distractors_are_as_frequent_in_both_target_classes():
    name = "synthetic-xray-target"
    shown = synthetic.present(name, synthetic.label_draws(name, "train", 0, 0, 4000))
    y = labels(name, "train", 4000)
    np.testing.assert_array_equal(shown[:, -1], y == 1)
    rates = shown[y == 0].mean(0), shown[y == 1].mean(0)
    for finding, normal, sick in zip(FINDINGS, *rates):
        if finding in synthetic.DISTRACTORS:
            assert 0.2 < normal < 0.3 and abs(normal - sick) < 0.05
        elif finding != "Tuberculosis":
            assert normal == sick == 0


def test_labels_tell_what_is_painted(monkeypatch):
    paint = mock.Mock(return_value=0.0)
    monkeypatch.setattr(synthetic, "paint_object", paint)
    monkeypatch.setattr(synthetic, "paint_chest", paint)
    for name, world in WORLDS.items():
        paint.reset_mock()
        for i in range(60):
            render(name, "test", i, 16)
        for row, (shown, _) in zip(labels(name, "test", 60), paint.call_args_list):
            if world.domain == "natural":
                assert world.classes[row] == " ".join(shown[:2])
            elif world.task == "multilabel":
                assert [c for c, y in zip(world.classes, row) if y] == shown[0]
            else:
                assert (world.classes[1] in shown[0]) == bool(row)


def test_targets_are_unseen_in_the_source_and_in_each_other():
    source, *targets = map(set, synthetic.OBJECTS.values())
    assert [len(source), *map(len, targets)] == [36, 10, 8, 6, 6]
    assert len(set.union(source, *targets)) == 66
    assert {t for t, _ in set.union(*targets)} - {t for t, _ in source} == {"gridded"}
    new = {s for _, s in set.union(*targets)} - {s for _, s in source}
    assert new == {"hourglass", "square", "ell"}
    findings = [world.classes[1] for world in WORLDS.values() if world.classes[0] == "Normal"]
    assert findings == ["Tuberculosis", "Mass", "Abscess", "Fibrosis"]
    assert not set(findings) & set(WORLDS["synthetic-xray"].classes)


def average_chest(*findings):
    """(32, 32), of 200; another finding changes nothing else."""
    rngs = map(np.random.default_rng, range(200))
    return sum(scenes.paint_chest(findings, 32, rng) for rng in rngs)[0] / 200


# Where the average change is largest: bounds of |x| and y (down) in unit coordinates, and its sign.
REGIONS = {
    "Atelectasis": ((0.1, 0.8), (-0.1, 0.5), 1),
    "Cardiomegaly": ((0.2, 0.8), (-0.1, 0.6), 1),
    "Consolidation": ((0.2, 0.7), (-0.5, 0.4), 1),
    "Edema": ((0.1, 0.5), (-0.3, 0.2), 1),
    "Effusion": ((0.3, 0.8), (0.0, 0.6), 1),
    "Nodule": ((0.2, 0.65), (-0.6, 0.4), 1),
    "Pneumothorax": ((0.3, 0.8), (-0.7, 0.3), -1),
    "Tuberculosis": ((0.15, 0.6), (-0.7, -0.1), 1),
    "Mass": ((0.2, 0.7), (-0.6, 0.4), 1),
    "Abscess": ((0.2, 0.7), (-0.1, 0.5), 1),
    "Fibrosis": ((0.1, 0.8), (-0.1, 0.5), 1),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings_change_the_region_that_they_affect(finding):
    (left, right), (top, bottom), sign = REGIONS[finding]
    change = sign * (average_chest(finding) - average_chest())
    x, y = scenes.grid(32)
    region = (np.abs(x) >= left) & (np.abs(x) <= right) & (y >= top) & (y <= bottom)
    assert region.mean() < 0.35
    assert region.flat[change.argmax()] and change.max() > 0.02
    assert np.abs(change[region]).mean() > 4 * np.abs(change[~region]).mean()


@pytest.mark.parametrize("gap", (0, 0.5, 1))
@pytest.mark.parametrize("name", MULTICLASS)
def test_colour_and_brightness_tell_no_class(name, gap):
    pixels, y = images(name, gap).astype(float), labels(name, "train", 1200)
    x = np.concatenate([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x[:800], y[:800])
    accuracy = (model.predict(x[800:]) == y[800:]).mean()
    # Chance, and room for the spread of 400 draws and, in an X-ray, for the tissue that shows.
    assert accuracy < 1 / len(WORLDS[name].classes) + (0.07 if "natural" in name else 0.12)


@pytest.mark.parametrize("gap", (0, 0.4, 1))
def test_pixels_do_tell_tuberculosis(gap):
    """The label is in the picture: with many images, even a linear model sees some of it."""
    name = "synthetic-xray-target"
    x, y = images(name, gap), labels(name, "train", 1200)
    x = (x - x.mean((1, 2, 3), keepdims=True)).mean(1).reshape(1200, -1) / 64.0
    model = LogisticRegression(C=0.01, max_iter=300).fit(x[:800], y[:800])
    assert roc_auc_score(y[800:], model.decision_function(x[800:])) > 0.65


@pytest.mark.parametrize("name", NAMES)
def test_images_move_in_a_straight_line(name):
    power = {"natural": 0.65, "medical": 0.5}[WORLDS[name].domain]
    for i in range(10):
        first, last = (render(name, "train", i, 32, gap=gap).astype(float) for gap in (0, 1))
        for gap in (0.2, 0.6):
            image = render(name, "train", i, 32, gap=gap)
            assert image.shape == (3, 32, 32) and image.dtype == np.uint8
            expected = first + gap**power * (last - first)
            whole = (first > 0) & (first < 255) & (last > 0) & (last < 255)  # nothing was clipped
            assert whole.mean() > 0.5 and np.abs(image - expected)[whole].max() <= 1.01


def test_the_other_world_has_its_colours():
    grey = images("synthetic-natural-target", 1, 60).astype(float)
    colour = images("synthetic-xray-target", 1, 60).astype(float)
    assert np.ptp(grey, axis=1).max() <= 1
    natural = images("synthetic-natural-target", 0, 60).astype(float)
    spread = np.ptp(colour, axis=1).mean(), np.ptp(natural, axis=1).mean()
    assert 0.6 < spread[0] / spread[1] < 1.4
