"""Logistic regression on frozen features, beside scikit-learn's."""

import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
from benchmarks.measure import Report, Required, best_speeds, repeat
from engine import linear as classifiers
from engine.console import say

CLASSES, WIDTH = 10, 1024
SAME_LOSS = 1 - 1e-6  # the objective is at most a millionth above the peer's


def linear(args, env):
    """Milliseconds of a logistic regression on 1024 features, ours and scikit-learn's at the L2
    strength that ours chose, and of ours with that choice, which is what a cell takes.

    The features are class means among noise of a falling spectrum, far from 0, as pre-trained
    networks have them; a fifth of the labels is random. scikit-learn gets them less their mean, at
    unit scale and in 64 bits, which helps it. loss: the objective that was reached, with its
    penalty.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    rows, required = [], []
    features, labels = made_features(min(2000, 100 + 13 * max(args.shots)))
    for shots in sorted(args.shots):
        chosen = data.few_shot_indices(labels, shots, seed=0)
        say(env, f"measuring: {len(chosen)} images")
        with threadpool_limits(args.threads):
            found = measure(args, env, features[chosen].to(env.device), labels[chosen])
        rows += [{"images": len(chosen)} | row for row in found]
        (ours, peer, _), what = found, f"{len(chosen)} images, "
        ratios = peer["ms"] / ours["ms"], peer["loss"] / ours["loss"]
        required.append(Required(f"{what}speed of ours", "scikit-learn's", ratios[0], 1.0))
        required.append(Required(f"{what}loss of scikit-learn", "ours", ratios[1], SAME_LOSS))
    return Report(rows, required)


def measure(args, env, features, labels):
    """The rows of ours, scikit-learn, and ours with the strength chosen."""
    from sklearn.linear_model import LogisticRegression

    l2 = classifiers.linear(features, labels, features[:1], CLASSES)[1]["l2"]
    mean = features.mean(0, dtype=torch.float64)
    scale = float((features - mean).square().sum(1).mean().sqrt())
    x = (features - mean) / scale
    peer = LogisticRegression(C=1 / (len(x) * l2), max_iter=20_000, tol=classifiers.GRADIENT)
    choosing = partial(classifiers.linear, features, labels, features[:1], CLASSES)
    arms = {
        "ours": repeat(partial(classifiers.fit, features, labels, CLASSES, l2)),
        "scikit-learn": repeat(partial(peer.fit, x.cpu().numpy(), labels)),
        "ours, strength chosen": repeat(choosing),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it stops short of the gradient
        speeds = best_speeds(arms, args.rounds, 1, 1, env)
    weights, bias = classifiers.fit(features, labels, CLASSES, l2)
    solutions = {
        "ours": (weights * scale, bias + weights @ mean),  # for features of that scale
        "scikit-learn": [torch.from_numpy(v).to(x) for v in (peer.coef_, peer.intercept_)],
    }
    losses, targets = {}, torch.from_numpy(labels).to(x.device)
    for arm, (weights, bias) in solutions.items():
        loss = F.cross_entropy(x @ weights.T + bias, targets)
        losses[arm] = float(loss + l2 / 2 * weights.square().sum())
    return [
        {"arm": arm, "l2": l2, "ms": 1e3 / v, "a minute": 60 * v, "loss": losses.get(arm)}
        for arm, v in speeds.items()
    ]


def made_features(images):
    """(features (N,1024) float32, labels (N,) int64)"""
    rng = np.random.default_rng(0)
    spread = np.arange(1, WIDTH + 1) ** -0.5
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    centres = 0.3 * rng.normal(size=(CLASSES, WIDTH)) * spread
    labels = rng.integers(CLASSES, size=images)
    features = 1 + ((centres[labels] + rng.normal(size=(images, WIDTH)) * spread) @ turn)
    labels = np.where(rng.random(images) < 0.2, rng.integers(CLASSES, size=images), labels)
    return torch.from_numpy(features.astype(np.float32)), labels
