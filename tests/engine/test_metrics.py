"""Metrics beside scikit-learn, loss by hand; intervals beside double sums, SciPy, bootstraps."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from scipy import special, stats
from sklearn import metrics as peer

from engine import metrics
from engine.metrics import compute_metrics, loss_sum, roc_auc

nan = math.nan


def test_auc_and_ap_equal_scikit_learn():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(2, 60))
        scores = rng.integers(0, rng.integers(2, 12), count)  # few values: most scores are tied
        targets = rng.integers(0, 2, count)
        targets[:2] = 0, 1
        expected = peer.roc_auc_score(targets, scores)
        assert roc_auc(scores, targets) == pytest.approx(expected, abs=1e-12)
        expected = peer.average_precision_score(targets, scores)
        assert metrics.average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)
    for one_class in ([0, 0, 0], [1, 1, 1], []):
        for metric in (roc_auc, metrics.average_precision):
            assert math.isnan(metric(range(len(one_class)), one_class))


def check_classes(found, names, columns):
    """per_class of these names, and the means. columns: (truth, scores, predicted) of each."""
    for name, (truth, scores, predicted) in zip(names, columns, strict=True):
        expected = {
            "auc": peer.roc_auc_score(truth, scores),
            "ap": peer.average_precision_score(truth, scores),
            "f1": peer.f1_score(truth, predicted),
            "precision": peer.precision_score(truth, predicted),
            "recall": peer.recall_score(truth, predicted),
            "positives": truth.sum(),
            "negatives": (~truth).sum(),
        }
        values = {k: v for k, v in found["per_class"][name].items() if k != "auc_interval"}
        assert values == pytest.approx(expected, abs=1e-12)
    for metric in ("auc", "ap"):
        mean = np.mean([found["per_class"][name][metric] for name in names])
        assert found[f"mean_{metric}"] == pytest.approx(mean, abs=1e-12)


def test_multiclass_metrics():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 7)).astype(np.float32)
    labels = rng.integers(0, 6, 200)  # class "6" is absent
    found = compute_metrics(torch.from_numpy(logits), labels, tuple("0123456"))
    probability, predicted = torch.from_numpy(logits).double().softmax(1).numpy(), logits.argmax(1)
    top5 = peer.top_k_accuracy_score(labels, logits, k=5, labels=range(7))
    assert found["accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-12)
    assert found["top5"] == pytest.approx(top5, abs=1e-12)
    loss = peer.log_loss(labels, probability, labels=range(7))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    columns = [(labels == c, probability[:, c], predicted == c) for c in range(6)]
    check_classes(found, "012345", columns)
    assert found["per_class"]["6"]["auc"] is None and found["per_class"]["6"]["ap"] is None


def test_multilabel_metrics_leave_out_what_is_not_annotated():
    rng = np.random.default_rng(1)
    logits = rng.integers(-3, 4, (150, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (150, 4)).astype(np.float32)
    labels[rng.random((150, 4)) < 0.3] = nan
    labels[:, 2] = np.where(np.isnan(labels[:, 2]), nan, 0)  # no positive
    labels[:, 3] = nan  # nobody annotated it
    found = compute_metrics(logits, labels, ("a", "b", "c", "d"))
    valid, right = ~np.isnan(labels), (logits > 0) == (labels == 1)
    assert found["accuracy"] == pytest.approx(right[valid].mean(), abs=1e-12)
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -np.where(labels == 1, np.log(chance), np.log(1 - chance))
    assert found["loss"] == pytest.approx(losses[valid].mean(), rel=1e-5)
    columns = [(labels[v, c] == 1, logits[v, c], logits[v, c] > 0) for c, v in enumerate(valid.T)]
    check_classes(found, "ab", columns[:2])
    undefined = dict.fromkeys(("auc", "auc_interval", "ap", "f1", "precision", "recall"))
    assert found["per_class"]["d"] == undefined | {"positives": 0, "negatives": 0}
    assert found["per_class"]["c"]["auc"] is None and found["top5"] is None


def test_undefined_metrics_are_none_in_strict_json():
    for labels in ([2, 2, 2], [[0, nan, 1], [nan, nan, 1], [0, nan, 1]]):
        found = compute_metrics(torch.eye(3), labels, ("a", "b", "c"))
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert (found["top5"], found["mean_auc"]) == (None, None)


@pytest.mark.parametrize("value", (nan, math.inf, -math.inf))
def test_outputs_that_are_not_finite_are_refused(value):
    call = partial(compute_metrics, [[value, 0.0], [0.0, 1.0]], [0, 1], ("a", "b"))
    refuses(metrics.Diverged, call, "not finite")


def test_multiclass_loss_is_a_sum_in_fp32():
    logits, labels = torch.randn(9, 4).bfloat16(), torch.arange(9) % 4
    found = loss_sum(logits, labels, "multiclass")
    expected = F.cross_entropy(logits.double(), labels) * 9
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_multilabel_loss_and_its_gradient_pass_over_nan():
    logits = torch.tensor([[0.5, -2.0, 3.0], [1.0, 40.0, -40.0]], requires_grad=True)
    labels = torch.tensor([[1, nan, 0], [0, nan, nan]])
    found = loss_sum(logits, labels, "multilabel")
    expected = math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3.0)) + math.log1p(math.e)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    found.backward()
    sigmoid = torch.sigmoid(logits.detach())
    by_hand = [[sigmoid[0, 0] - 1, 0, sigmoid[0, 2]], [sigmoid[1, 0], 0, 0]]
    torch.testing.assert_close(logits.grad, torch.tensor(by_hand))


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
    """Of tied scores; images of a patient are alike."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        patients = rng.integers(0, clusters, 90) if clusters else np.arange(90)
        common = rng.normal(size=90)[patients]
        truth = common + rng.normal(size=90) > 0.3
        scores = np.round(2 * (common + rng.normal(size=90)))
        influence = metrics.auc_influence(scores, truth, patients)
        found = np.sum(np.bincount(patients, influence) ** 2)
        assert found == pytest.approx(naive_variance(scores, truth, patients), rel=1e-10)


def test_variance_of_delong_by_hand():
    # 1 and 3 against 0 and 2: three of four pairs won; placements 1/2, 1 and 1/2, 1.
    truth = np.array([1, 1, 0, 0]) == 1
    influence = metrics.auc_influence(np.array([1, 3, 0, 2]), truth, np.arange(4))
    assert influence == pytest.approx(np.array([-0.25, 0.25, 0.25, -0.25]) / 2**0.5)
    half = special.ndtri(0.975) * 0.125**0.5 / (0.75 * 0.25)
    expected = special.expit([math.log(3) - half, math.log(3) + half])
    assert metrics.auc_interval(0.75, influence, np.arange(4)) == pytest.approx(expected, abs=1e-6)


def test_one_positive_or_one_class_has_no_interval():
    for truth in ([1, 0, 0], [1, 1, 1], [0, 0, 0]):
        influence = metrics.auc_influence(np.array([1, 2, 0]), np.array(truth) == 1, np.arange(3))
        assert metrics.auc_interval(0.5, influence, np.arange(3)) is None
    assert metrics.auc_interval(1.0, np.ones(3), np.arange(3)) is None


@pytest.mark.parametrize(("right", "count"), [(0, 10), (81, 121), (10, 10)])
def test_wilson_is_that_of_scipy(right, count):
    every = np.arange(count)
    answers = every < right
    expected = list(stats.binomtest(right, count).proportion_ci(method="wilson"))
    assert metrics.wilson(answers, np.ones(count), every) == pytest.approx(expected, abs=1e-6)
    # Every image twice: as many patients, the same interval.
    twice, patients = np.repeat(answers, 2), np.repeat(every, 2)
    assert metrics.wilson(twice, np.ones(2 * count), patients) == pytest.approx(expected, abs=1e-6)
    assert metrics.wilson(np.zeros(3), np.zeros(3), np.arange(3)) is None


@pytest.mark.parametrize("task", ("multiclass", "multilabel", "patients"))
def test_intervals_of_metrics_are_as_wide_as_those_of_a_bootstrap(task):
    rng, count = np.random.default_rng(0), 300
    groups = rng.integers(0, 100, count).astype("S") if task == "patients" else None
    units = np.unique(range(count) if groups is None else groups, return_inverse=True)[1]
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
