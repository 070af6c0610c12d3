"""Classifiers on frozen features, against scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from conftest import refuses
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import NearestCentroid

from engine import linear


def blobs(rng, counts, width, apart=1.0):
    """Features (N,D) float32 far from 0, of uneven spread, and labels."""
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = apart * rng.normal(size=(len(counts), width)) / np.sqrt(width) * 4
    features = centres[labels] + rng.normal(size=(len(labels), width))
    features = 3 * features / np.sqrt(1 + np.arange(width)) + 5
    return torch.from_numpy(features.astype(np.float32)), labels


def findings(rng, images, width, classes=4):
    features, _ = blobs(rng, [images], width)
    scores = features.double().numpy() @ rng.normal(size=(width, classes))
    labels = (scores > np.quantile(scores, 0.7, axis=0)).astype(np.float32)
    labels[rng.random(labels.shape) < 0.05] = 1
    labels[rng.random(labels.shape) < 0.2] = np.nan
    return features, labels


def scale_of(features):
    features = features.double().numpy()
    return np.sqrt(((features - features.mean(0)) ** 2).sum(1).mean())


def peer(features, labels, l2, scale=None, tol=1e-10):
    """scikit-learn's weights and bias for our objective, on centred features of unit scale."""
    x = features.double().numpy()
    mean, own = x.mean(0), scale_of(features)
    l2 = l2 * (scale / own) ** 2 if scale else l2
    model = LogisticRegression(C=1 / (len(x) * l2), tol=tol, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for more precision than floats have
        model.fit((x - mean) / own, labels)
    weights = model.coef_ / own
    return weights, model.intercept_ - weights @ mean


def fitted(features, labels, classes, l2):
    """linear's weights and bias, as arrays: by its answers to 0 and to the unit vectors."""
    asked = torch.eye(features.shape[1] + 1)[:, 1:]
    logits = linear.linear(features, labels, asked, classes, l2)[0].double().numpy()
    return (logits[1:] - logits[0]).T, logits[0]


def centred(logits):
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("counts, width", [((9, 14, 7), 200), ((30, 40), 100), ((60, 90, 50), 12)])
def test_fit_is_scikit_learns(rng, counts, width):
    features, labels = blobs(rng, counts, width)
    if width == 200:
        features = features * 0.95 ** torch.arange(width)  # the smallest axes count too
    x = features.double().numpy()
    for l2 in (0.3, 1e-2, 1e-3):
        weights, bias = fitted(features, labels, len(counts), l2)
        expected, intercept = peer(features, labels, l2)
        if len(counts) == 2:  # theirs is one logit, the difference of ours
            expected, intercept = (part / 2 for part in peer(features, labels, l2 / 2))
            expected, intercept = (np.concatenate([-t, t]) for t in (expected, intercept))
        logits, theirs = centred(x @ weights.T + bias), centred(x @ expected.T + intercept)
        assert np.abs(weights - expected).max() < 1e-3 * np.abs(expected).max()
        assert np.abs(logits - theirs).max() < 1e-3 * np.abs(theirs).max()
        assert (logits.argmax(1) == theirs.argmax(1)).all()


@pytest.mark.parametrize("l2", (0.3, 1e-3, 1e-6))
def test_fit_of_findings_is_scikit_learns(rng, l2):
    """Each label's regression on the images where it is known."""
    features, labels = findings(rng, 180, 12, 3)
    weights, bias = fitted(features, labels, 3, l2)
    scale = scale_of(features)
    for c, own in enumerate(labels.T):
        known = ~np.isnan(own)
        expected, intercept = peer(features[known], own[known], l2, scale)
        assert np.abs(weights[c] - expected).max() < 1e-3 * np.abs(expected).max()
        assert bias[c] == pytest.approx(intercept[0], rel=1e-3)


def test_labels_of_one_value_are_constant(rng):
    features, labels = findings(rng, 60, 30, 5)
    labels[:, 1], labels[:, 2], labels[:, 3] = 1, 0, np.nan
    labels[:5, 1] = np.nan
    constants = [np.log(55.5 / 0.5), np.log(0.5 / 60.5), 0]
    nearest = linear.nearest_mean(features, labels, features[:7], 5)
    for answers in (linear.linear(features, labels, features[:7], 5)[0], nearest):
        assert answers.dtype == torch.float32 and answers.shape == (7, 5)
        np.testing.assert_allclose(answers[:, 1:4], [constants] * 7, rtol=1e-6, atol=1e-6)
        assert answers.isfinite().all() and answers[:, 0].std() > 0.01
    assert linear.linear(features, labels[:, :1], features[:7], 1)[0].isfinite().all()
    nothing = np.full((60, 2), np.nan, np.float32)
    assert (linear.linear(features, nothing, features, 2)[0] == 0).all()


def test_held_out_folds(rng):
    labels = rng.permutation(np.repeat(np.arange(3), (7, 12, 4)))
    folds = linear.held_out_folds(labels, 3)
    assert folds.shape == (5, 23) and (folds.sum(0) == 1).all()
    for fold in folds:
        counts = np.bincount(labels[fold], minlength=3)
        assert (np.abs(counts - np.array([7, 12, 4]) / 5) < 1).all()
    assert (folds == linear.held_out_folds(labels, 3)).all()
    assert (folds != linear.held_out_folds(labels, 4)).any()
    for shots in (2, 3, 4, 9):
        labels = np.repeat(np.arange(6), shots)
        folds = linear.held_out_folds(labels)
        assert folds.shape == (min(shots, 5), 6 * shots)
        assert all(set(labels[~fold]) == set(range(6)) for fold in folds)
    assert linear.held_out_folds(np.arange(9)) is None
    single = linear.held_out_folds(np.repeat(np.arange(4), (1, 9, 9, 9)))
    assert single.shape == (5, 28) and not single[:, 0].any() and (single.sum(0)[1:] == 1).all()
    large = linear.held_out_folds(np.arange(20_000) % 7)
    assert large.shape == (1, 20_000) and large.sum() == 4000


def test_held_out_folds_of_findings(rng):
    for _ in range(20):
        labels = (rng.random((50, 6)) < [0.5, 0.1, 0.2, 0.1, 0, 0]).astype(np.float32)
        labels[rng.random(labels.shape) < 0.1] = np.nan
        labels[:4, 3] = labels[7, 4] = 1  # of the fifth there is one image alone
        folds = linear.held_out_folds(labels)
        assert len(folds) >= 2 and not folds[:, 7].any()
        assert (folds.sum(0)[np.arange(50) != 7] == 1).all()
        assert all(((labels[~fold] == 1).sum(0)[:5] > 0).all() for fold in folds)
    assert linear.held_out_folds(np.eye(5, dtype=np.float32)) is None


def losses_by_hand(features, labels):
    """Held-out loss of every strength, by scikit-learn on the same folds."""
    scale, x, losses = scale_of(features), features.double().numpy(), []
    columns = labels[:, None] if labels.ndim == 1 else labels
    for l2 in linear.STRENGTHS:
        total, count = 0, 0
        for fold in linear.held_out_folds(labels):
            for own in columns.T:
                known = ~np.isnan(own)
                fitted, tested = ~fold & known, fold & known
                weights, bias = peer(features[fitted], own[fitted], l2, scale, 1e-6)
                logits = x[tested] @ weights.T + bias
                if logits.shape[1] == 1:
                    logits = np.concatenate([0 * logits, logits], 1)
                answers = torch.from_numpy(logits).softmax(1).numpy()
                values = np.arange(logits.shape[1])
                total += log_loss(own[tested], answers, normalize=False, labels=values)
                count += tested.sum()
        losses.append(total / count)
    return np.array(losses)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("images, width", [(30, 100), (120, 20)])
def test_strength_is_the_best_of_the_held_out(rng, task, images, width):
    if task == "multiclass":
        features, labels, classes = *blobs(rng, [images // 3] * 3, width, 0.5), 3
    else:
        features, labels, classes = *findings(rng, images, width, 2), 2
    logits, chosen = linear.linear(features, labels, features, classes)
    expected = losses_by_hand(features, labels)
    assert chosen["l2"] == linear.STRENGTHS[expected.argmin()] and chosen["folds"] == 5
    assert abs(chosen["held_out"] - expected.min()) < 2e-4
    assert 1e-6 < chosen["l2"] < 1  # inside of the grid: the test tells something
    assert 0 < chosen["gradient"] <= linear.GRADIENT and chosen["iterations"] > 0
    again, given = linear.linear(features, labels, features, classes, chosen["l2"])
    assert (given["l2"], given["folds"], given["held_out"]) == (chosen["l2"], 0, None)
    if task == "multiclass":
        logits, again = (t - t.mean(1, keepdim=True) for t in (logits, again))
    torch.testing.assert_close(logits, again, rtol=1e-3, atol=1e-3)
    other, same = linear.linear(features, labels, features[3:], classes)
    assert same == chosen and other.shape == (len(features) - 3, classes)


def test_shift_scale_and_order_change_nothing(rng):
    features, labels = blobs(rng, [20, 25, 15], 40)
    test = blobs(rng, [50], 40)[0]
    features, test = ((1024 * t).round() / 1024 for t in (features, test))  # shifts are exact
    logits, chosen = linear.linear(features, labels, test, 3)
    for factor, shift in ((1, 64), (32, -7), (1 / 64, 0), (1, 0)):
        moved, moved_test = (factor * t + shift for t in (features, test))
        again, same = linear.linear(moved, labels, moved_test, 3)
        assert same["l2"] == chosen["l2"]
        torch.testing.assert_close(again, logits, rtol=1e-3, atol=2e-3)
    assert same == chosen  # the last: the same once more
    order = rng.permutation(60)
    for l2 in (0.1, 1e-4):
        weights, _ = fitted(features, labels, 3, l2)
        permuted, _ = fitted(features[order], labels[order], 3, l2)
        assert np.abs(weights - permuted).max() < 1e-3 * np.abs(weights).max()


def test_odd_features(rng):
    features, labels = blobs(rng, [1] * 4, 50)
    _, chosen = linear.linear(features, labels, features, 4)
    assert chosen["l2"] == linear.ONE_SHOT_STRENGTH == 0.01
    assert chosen["folds"] == 0 and chosen["held_out"] is None
    features, labels = blobs(rng, [3, 3], 10)
    equal = torch.ones_like(features)
    nearest = linear.nearest_mean(equal, labels, equal, 2)
    for answer in (linear.linear(equal, labels, equal, 2)[0], nearest):
        assert answer.isfinite().all() and (answer[:, 0] - answer[:, 1]).abs().max() < 1e-6
    twice = torch.cat([features, features])  # more images than directions
    assert linear.linear(twice, np.tile(labels, 2), features, 2)[0].isfinite().all()
    absent = linear.linear(features, labels, features, 3)[0]
    assert absent.isfinite().all() and (absent.argmax(1) < 2).all()
    absent = linear.nearest_mean(features, labels, features, 3)
    assert (absent.argmax(1) < 2).all() and (absent[:, 2] == -8).all()  # the other end of a ball
    features[2, 3] = torch.nan
    refuses(ValueError, lambda: linear.linear(features, labels, features, 2), "not finite")


def normalised(train, test):
    """SimpleShot's CL2N by hand."""
    both = (t.double().numpy() - train.double().numpy().mean(0) for t in (train, test))
    return [t / np.linalg.norm(t, axis=1, keepdims=True) for t in both]


def test_nearest_mean_is_the_nearest_centroid(rng):
    features, labels = blobs(rng, [20, 1, 15, 30], 40, 0.7)
    test = blobs(rng, [100, 100], 40, 0.7)[0]
    logits = linear.nearest_mean(features, labels, test, 4)
    assert logits.dtype == torch.float32
    x, t = normalised(features, test)
    model = NearestCentroid().fit(x, labels)
    squares = ((t[:, None] - model.centroids_) ** 2).sum(2)
    np.testing.assert_allclose(logits, -2 * squares, rtol=1e-5)
    assert (logits.argmax(1).numpy() == model.predict(t)).all()
    features, labels = findings(rng, 60, 40)
    logits = linear.nearest_mean(features, labels, test, 4)
    x, t = normalised(features, test)
    for c in range(4):
        known = ~np.isnan(labels[:, c])
        model = NearestCentroid().fit(x[known], labels[known, c])
        without, with_it = (((t[:, None] - model.centroids_) ** 2).sum(2)).T
        np.testing.assert_allclose(logits[:, c], 2 * (without - with_it), rtol=1e-4, atol=1e-5)
        assert ((logits[:, c] > 0).numpy() == model.predict(t)).all()
