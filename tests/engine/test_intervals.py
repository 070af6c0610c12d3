"""engine.intervals beside plain double sums, scipy and bootstraps."""

import math

import numpy as np
import pytest
from scipy import special, stats

from engine.intervals import auc_influence, auc_interval, unit_numbers, wilson
from engine.metrics import compute_metrics, roc_auc

nan = math.nan


def drawn(seed, count=90, clusters=None):
    """Tied scores, truth, and a patient of each image; images of a patient are alike."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, clusters, count) if clusters else np.arange(count)
    common = rng.normal(size=count)[patients]
    truth = common + rng.normal(size=count) > 0.3
    return np.round(2 * (common + rng.normal(size=count))), truth, patients


def naive_variance(scores, truth, patients):
    """Of an AUC, by the pairs of images: DeLong 1988, Obuchowski 1997 (its S11 as here)."""
    pairs = scores[truth][:, None] - scores[~truth][None]
    wins = (pairs > 0) + 0.5 * (pairs == 0)
    sums = []
    for part, values in ((truth, wins.mean(1)), (~truth, wins.mean(0))):
        units = np.unique(patients[part])
        sums.append(np.zeros(patients.max() + 1))
        for patient in units:
            mine = values[patients[part] == patient] - wins.mean()
            sums[-1][patient] = mine.sum() * math.sqrt(len(units) / (len(units) - 1)) / part.sum()
    return np.sum(sums[0] ** 2) + np.sum(sums[1] ** 2) + 2 * np.sum(sums[0] * sums[1])


@pytest.mark.parametrize("clusters", (None, 30))
def test_influences_sum_to_the_variance_of_the_pairs(clusters):
    for seed in range(20):
        scores, truth, patients = drawn(seed, clusters=clusters)
        influence = auc_influence(scores, truth, patients)
        found = np.sum(np.bincount(patients, influence) ** 2)
        assert found == pytest.approx(naive_variance(scores, truth, patients), rel=1e-10)


def test_variance_of_delong_by_hand():
    # 1 and 3 against 0 and 2: three of four pairs won; placements 1/2, 1 and 1/2, 1.
    influence = auc_influence(np.array([1, 3, 0, 2]), np.array([1, 1, 0, 0]) == 1, np.arange(4))
    assert influence == pytest.approx(np.array([-0.25, 0.25, 0.25, -0.25]) / 2**0.5)
    half = special.ndtri(0.975) * 0.125**0.5 / (0.75 * 0.25)
    expected = special.expit([math.log(3) - half, math.log(3) + half])
    assert auc_interval(0.75, influence, np.arange(4)) == pytest.approx(expected, abs=1e-6)


def test_one_positive_or_one_class_has_no_interval():
    for truth in ([1, 0, 0], [1, 1, 1], [0, 0, 0]):
        influence = auc_influence(np.array([1, 2, 0]), np.array(truth) == 1, np.arange(3))
        assert auc_interval(0.5, influence, np.arange(3)) is None
    assert auc_interval(1.0, np.ones(3), np.arange(3)) is None


@pytest.mark.parametrize(("right", "count"), [(0, 10), (81, 121), (10, 10)])
def test_wilson_is_that_of_scipy(right, count):
    answers = np.arange(count) < right
    expected = list(stats.binomtest(right, count).proportion_ci(method="wilson"))
    assert wilson(answers, np.ones(count), np.arange(count)) == pytest.approx(expected, abs=1e-6)
    # Every image twice: as many patients, the same interval.
    twice, patients = np.repeat(answers, 2), np.repeat(np.arange(count), 2)
    assert wilson(twice, np.ones(2 * count), patients) == pytest.approx(expected, abs=1e-6)
    assert wilson(np.zeros(3), np.zeros(3), np.arange(3)) is None


@pytest.mark.parametrize("task", ("multiclass", "multilabel", "patients"))
def test_intervals_of_metrics_are_as_wide_as_those_of_a_bootstrap(task):
    rng, count = np.random.default_rng(0), 300
    groups = rng.integers(0, 100, count).astype("S") if task == "patients" else None
    units = unit_numbers(groups, count)
    common = rng.normal(size=(count, 3))[units]
    if task == "multiclass":
        labels = (common + rng.normal(size=common.shape)).argmax(1)
    else:
        labels = (common + rng.normal(size=common.shape) > 0).astype(np.float32)
        labels[rng.random(labels.shape) < 0.2] = nan
    logits = np.round(3 * (0.6 * common + rng.normal(size=common.shape)))
    found = compute_metrics(logits, labels, "abc", groups=groups)
    members, draws = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)], []
    for _ in range(2000):
        numbers = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[unit] for unit in numbers])
        draws.append(quick(logits[rows], labels[rows]))
    for name, values in zip(("accuracy", "mean_auc", "a"), np.transpose(draws)):
        interval = found["intervals"].get(name) or found["per_class"]["a"]["auc_interval"]
        assert interval[0] < (found.get(name) or found["per_class"]["a"]["auc"]) < interval[1]
        width = np.diff(np.quantile(values, [0.025, 0.975]))
        assert np.diff(interval) == pytest.approx(width, rel=0.1)


def quick(logits, labels):
    """Accuracy, mean AUC and AUC of the first class."""
    if labels.ndim == 1:
        right = logits.argmax(1) == labels
        scores, truths = np.exp(logits) / np.exp(logits).sum(1, keepdims=True), np.eye(3)[labels]
    else:
        right, scores, truths = ((logits > 0) == labels)[~np.isnan(labels)], logits, labels
    valid = ~np.isnan(truths)
    aucs = [roc_auc(scores[v, c], truths[v, c]) for c, v in enumerate(valid.T)]
    return right.mean(), np.mean(aucs), aucs[0]
