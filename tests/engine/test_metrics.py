"""Metrics beside scikit-learn, and the loss by hand."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuses
from sklearn import metrics as peer

from engine.metrics import Diverged, average_precision, compute_metrics, loss_sum, roc_auc

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
        assert average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)
    for one_class in ([0, 0, 0], [1, 1, 1], []):
        for metric in (roc_auc, average_precision):
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
    metrics = partial(compute_metrics, [[value, 0.0], [0.0, 1.0]], [0, 1], ("a", "b"))
    refuses(Diverged, metrics, "not finite")


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
