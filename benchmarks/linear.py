"""Logistic regression on frozen features, beside scikit-learn's."""

import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
from benchmarks.measure import Report, Required, best_speeds, import_peer, repeat
from engine import linear as classifiers
from engine.console import say
from engine.evaluate import predict
from readers.transforms import NORMALIZATION, Pipeline, keep
from readers.workers import in_order

CLASSES, WIDTH, TEST_IMAGES = 10, 1024, 500
OURS, CHOICE = "ours", "ours, strength chosen"
PEERS = {"scikit-learn": False, "scikit-learn, centred": True}
# Accuracy at most 0.002 from the peer's; the objective at most a millionth above it.
SAME_ACCURACY, SAME_LOSS = 0.998, 1 - 1e-6


def linear(args, env):
    """Milliseconds of a logistic regression on 1024 features, ours and scikit-learn's at the L2
    strength that ours chose, and of ours with that choice, which is what a cell takes.

    Features "network": of R14x0.5 with random weights on the synthetic natural-like target.
    "made": class means among noise of a falling spectrum, far from 0, as pre-trained networks have
    them; a fifth of the labels is random.
    scikit-learn gets them in 64 bits: as they are, and less their mean at unit scale ("centred").
    loss: the objective with its penalty; gradient: the norm of its gradient, for features of that
    scale; accuracy: on 500 test images.
    """
    measured, required, pairs = [], [], []
    for kind, features in (("network", network_features), ("made", made_features)):
        train, labels, *test = features(env, min(2000, 100 + 13 * max(args.shots)))
        for shots in sorted(args.shots):
            chosen = data.few_shot_indices(labels, shots, seed=0)
            say(env, f"measuring: {kind}, {len(chosen)} images")
            setting = {"features": kind, "images": len(chosen)}
            for rows in measure(args, env, train[chosen], labels[chosen], *test):
                measured += [setting | row for row in rows.values()]
                ours, peer = rows[OURS], min((rows[name] for name in PEERS), key=lambda r: r["ms"])
                pairs.append((ours, peer))
                what = f"{kind} {len(chosen)}, {ours['threads']} threads: ours"
                required.append(Required(what, peer["arm"], peer["ms"] / ours["ms"], 1.0))
    # Over all settings: the accuracy and the objective reached.
    accuracy = min(1 - abs(ours["accuracy"] - peer["accuracy"]) for ours, peer in pairs)
    loss = min(peer["loss"] / ours["loss"] for ours, peer in pairs)
    required.append(Required("accuracy, 1 - the largest difference", "1", accuracy, SAME_ACCURACY))
    required.append(Required("least objective of scikit-learn", "ours", loss, SAME_LOSS))
    return Report({"measured": measured}, measured, required)


def measure(args, env, train, labels, test, test_labels):
    """Yields {arm: its row} for each number of threads."""
    l2 = classifiers.linear(train, labels, train[:1], CLASSES)[1]["l2"]
    fits = {OURS: partial(classifiers.fit, train, labels, CLASSES, l2)}
    fits |= {name: peer_fit(train, labels, l2, centred) for name, centred in PEERS.items()}
    found = {
        name: quality(*fit(), train, labels, l2, test, test_labels) for name, fit in fits.items()
    }
    fits[CHOICE] = partial(classifiers.linear, train, labels, train[:1], CLASSES)
    found[CHOICE] = dict.fromkeys(("loss", "gradient", "accuracy"))
    arms = {name: repeat(fit) for name, fit in fits.items()}
    for threads in args.threads:
        torch.set_num_threads(threads)
        with import_peer("threadpoolctl").threadpool_limits(threads):
            speeds = best_speeds(arms, args.rounds, 1, 1, env)
        yield {
            name: {"threads": threads, "arm": name, "l2": l2, "ms": 1e3 / speed}
            | {"a minute": 60 * speed, **found[name]}
            for name, speed in speeds.items()
        }


def peer_fit(train, labels, l2, centred):
    """callable() of scikit-learn's fit: (weights (C,D), bias (C,)) for the features as they are, to
    the same gradient (its largest entry) where 64 bits allow it.
    """
    linear_model = import_peer("sklearn.linear_model")
    mean, scale = mean_and_scale(train)
    shift, unit = (mean.cpu().numpy(), scale) if centred else (0.0, 1.0)
    x = np.ascontiguousarray((train.double().cpu().numpy() - shift) / unit)
    strength, gradient = len(x) * l2 * (scale / unit) ** 2, classifiers.GRADIENT * scale / unit
    model = linear_model.LogisticRegression(C=1 / strength, max_iter=20_000, tol=gradient)

    def fit():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it stops short of the gradient
            model.fit(x, labels)
        weights = model.coef_ / unit
        bias = model.intercept_ - (weights * shift).sum(1)
        return torch.from_numpy(weights), torch.from_numpy(bias)

    return fit


def mean_and_scale(features):
    """(mean (D,), root of the mean squared distance to it) of features (N,D)."""
    mean = features.mean(0, dtype=torch.float64)
    return mean, float((features - mean).square().sum(1).mean().sqrt())


def quality(weights, bias, train, labels, l2, test, test_labels):
    """Objective and the norm of its gradient, both from scratch by autograd, and test accuracy."""
    mean, scale = mean_and_scale(train)
    weights, bias = weights.to(train.device), bias.to(train.device)
    unit = [(weights * scale).requires_grad_(), (bias + weights @ mean).requires_grad_()]
    logits = (train - mean) / scale @ unit[0].T + unit[1]
    loss = F.cross_entropy(logits, torch.from_numpy(labels).to(train.device))
    loss = loss + l2 / 2 * unit[0].square().sum()
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, unit)]).norm()
    answers = (test.double() @ weights.T + bias).argmax(1).cpu().numpy()
    accuracy = float((answers == test_labels).mean())
    return {"loss": loss.item(), "gradient": float(gradient), "accuracy": accuracy}


def network_features(env, images):
    torch.manual_seed(0)
    model = models.create_model("R14x0.5", CLASSES, device=env.device).eval()
    env, normalization, found = env._replace(precision="fp32"), NORMALIZATION["natural"], []
    for split, count in (("train", images), ("test", TEST_IMAGES)):
        dataset = data.load_dataset("synthetic-natural-target", split=split)
        stream = in_order(dataset.subset(np.arange(count)), Pipeline(keep, keep), 100)
        features = predict(model.features, WIDTH, stream, count, env, normalization)
        found += [features.to(env.device), dataset.labels[:count]]
    return found


def made_features(env, images):
    rng = np.random.default_rng(0)
    spread = np.arange(1, WIDTH + 1) ** -0.5
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    centres = 0.3 * rng.normal(size=(CLASSES, WIDTH)) * spread
    found = []
    for count in (images, TEST_IMAGES):
        labels = rng.integers(CLASSES, size=count)
        features = 1 + ((centres[labels] + rng.normal(size=(count, WIDTH)) * spread) @ turn)
        labels = np.where(rng.random(count) < 0.2, rng.integers(CLASSES, size=count), labels)
        found += [torch.from_numpy(features.astype(np.float32)).to(env.device), labels]
    return found
