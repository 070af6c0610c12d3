"""The benchmark of logistic regression on frozen features; `python -m benchmarks` runs it."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
from benchmarks.measure import Report, best_speeds, import_peer
from engine import console
from engine import linear as classifiers
from readers import transforms

CLASSES, WIDTH, TEST_IMAGES = 10, 1024, 500
OURS, CHOICE = "ours", "ours, strength chosen"
PEERS = {"scikit-learn": False, "scikit-learn, centred": True}
FORMATS = {"l2": ".0e", "ms": ".1f", "a minute": ".0f", "loss": ".7f", "gradient": ".0e"}
# Accuracy at most 0.002 from the peer's; the objective at most a millionth above it.
SAME_ACCURACY, SAME_LOSS = 0.998, 1 - 1e-6


def linear_options(parser):
    add = parser.add_argument
    add("--shots", type=console.positive(int), nargs="+", default=[1, 10, 100],
        help=f"training images of each of {CLASSES} classes, up to 140")  # fmt: skip
    add("--threads", type=console.positive(int), nargs="+", default=[1],
        help="threads of the CPU, the same for both packages")  # fmt: skip
    add("--rounds", type=console.positive(int), default=3, help="turns an arm; the best counts")
    add("--fits", type=console.positive(int), default=1, help="fits a turn")


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
    measured = []
    pool = min(2000, 100 + 13 * max(args.shots))
    for kind, features in FEATURES.items():
        train, labels, *test = features(env.device, pool)
        for shots in sorted(args.shots):
            chosen = data.few_shot_indices(labels, shots, seed=0)
            console.say(env, f"measuring: {kind}, {len(chosen)} images")
            values = _measure(args, env, train[chosen], labels[chosen], *test)
            measured += [{"features": kind, "images": len(chosen)} | value for value in values]
    rows = [[_text(*item) for item in row.items()] for row in measured]
    return Report({"measured": measured}, list(measured[0]), rows, _required(measured))


def _measure(args, env, train, labels, test, test_labels):
    """A dict an arm and number of threads."""
    l2, fitted = classifiers.linear(train, labels, train, CLASSES)[1]["l2"], {}
    arms = {
        (name, threads): _repeat(run, threads, fitted, (name, threads))
        for name, run in _arms(train, labels, l2).items()
        for threads in args.threads
    }
    speeds = best_speeds(arms, args.rounds, args.fits, 1, env)
    return [
        {"threads": threads, "arm": name, "l2": l2, "ms": 1e3 / speed, "a minute": 60 * speed}
        | _quality(fitted[name, threads], train, labels, l2, test, test_labels)
        for (name, threads), speed in speeds.items()
    ]


def _text(column, value):
    return "" if value is None else format(value, FORMATS.get(column, ""))


def _repeat(run, threads, fitted, key):
    """The arm: run() on so many threads, its outcome kept."""
    libraries = import_peer("threadpoolctl").ThreadpoolController()

    def arm(fits):
        torch.set_num_threads(threads)
        with libraries.limit(limits=threads):
            for _ in range(fits):
                fitted[key] = run()

    return arm


def _arms(train, labels, l2):
    """{name: callable} that returns (weights (C,D), bias (C,)) of the features as they are."""
    arms = {OURS: lambda: classifiers.fit(train, labels, CLASSES, l2)}
    arms |= {name: _peer(train, labels, l2, centred) for name, centred in PEERS.items()}
    arms[CHOICE] = lambda: classifiers.linear(train, labels, train[:1], CLASSES) and None
    return arms


def _peer(train, labels, l2, centred):
    """scikit-learn's fit, to the same gradient (its largest entry) where 64 bits allow it."""
    sklearn = import_peer("sklearn.linear_model")
    x, scale = train.double().cpu().numpy(), _scale(train)
    mean, unit = (x.mean(0), scale) if centred else (0 * x[0], 1)
    x = np.ascontiguousarray((x - mean) / unit)
    model = sklearn.LogisticRegression(
        C=1 / (len(x) * l2 * (scale / unit) ** 2), max_iter=20_000,
        tol=classifiers.GRADIENT * scale / unit,
    )  # fmt: skip

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it stops short of the gradient
            model.fit(x, labels)
        weights = model.coef_ / unit
        return torch.from_numpy(weights), torch.from_numpy(model.intercept_ - weights @ mean)

    return run


def _scale(features):
    features = features.double()
    return float((features - features.mean(0)).square().sum(1).mean().sqrt())


def _quality(fit, train, labels, l2, test, test_labels):
    """Objective and the norm of its gradient, both from scratch by autograd, and test accuracy."""
    if fit is None:
        return dict.fromkeys(("loss", "gradient", "accuracy"))
    mean, scale = train.mean(0, dtype=torch.float64), _scale(train)
    weights, bias = (part.to(train.device) for part in fit)
    unit = [weights * scale, bias + weights @ mean]
    for part in unit:
        part.requires_grad_()
    logits = (train - mean) / scale @ unit[0].T + unit[1]
    loss = F.cross_entropy(logits, torch.from_numpy(labels).to(train.device))
    loss = loss + l2 / 2 * unit[0].square().sum()
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, unit)]).norm()
    answers = (test.double() @ weights.T + bias).argmax(1).cpu().numpy()
    accuracy = float((answers == test_labels).mean())
    return {"loss": loss.item(), "gradient": float(gradient), "accuracy": accuracy}


def _required(measured):
    """Against the faster of scikit-learn's arms: time in each setting, and over all of them the
    accuracy and the objective reached.
    """
    settings, required, pairs = {}, [], []
    for row in measured:
        setting = f"{row['features']} {row['images']}, {row['threads']} threads"
        settings.setdefault(setting, {})[row["arm"]] = row
    for setting, rows in settings.items():
        peer = min((rows[name] for name in PEERS), key=lambda row: row["ms"])
        pairs.append((rows[OURS], peer))
        required.append((f"{setting}: ours", peer["arm"], peer["ms"] / rows[OURS]["ms"], 1.0))
    accuracy = min(1 - abs(ours["accuracy"] - peer["accuracy"]) for ours, peer in pairs)
    loss = min(peer["loss"] / ours["loss"] for ours, peer in pairs)
    required.append(("accuracy, 1 - the largest difference", "1", accuracy, SAME_ACCURACY))
    return [*required, ("least objective of scikit-learn", "ours", loss, SAME_LOSS)]


# ------------------------------------------------------------------------------------------------
# Features: (train (pool,1024) float32, labels, test (500,1024), test labels)
# ------------------------------------------------------------------------------------------------


def network_features(device, pool):
    torch.manual_seed(0)
    model = models.place(models.create_model("R14x0.5", CLASSES), device).eval()
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in transforms.NORMALIZATION["natural"])
    outcome = []
    for split, count in (("train", pool), ("test", TEST_IMAGES)):
        dataset = data.load_dataset("synthetic-natural-target", split=split)
        images = torch.from_numpy(np.stack([dataset.read(i) for i in range(count)]))
        batches = ((images / 255 - mean) / std).split(100)
        with torch.no_grad():
            outcome.append(torch.cat([model.features(batch.to(device)) for batch in batches]))
        outcome.append(dataset.labels[:count])
    return outcome


def made_features(device, pool):
    rng = np.random.default_rng(0)
    spread = np.arange(1, WIDTH + 1) ** -0.5
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    centres = 0.3 * rng.normal(size=(CLASSES, WIDTH)) * spread
    outcome = []
    for count in (pool, TEST_IMAGES):
        labels = rng.integers(CLASSES, size=count)
        features = 1 + ((centres[labels] + rng.normal(size=(count, WIDTH)) * spread) @ turn)
        labels = np.where(rng.random(count) < 0.2, rng.integers(CLASSES, size=count), labels)
        outcome += [torch.from_numpy(features.astype(np.float32)).to(device), labels]
    return outcome


FEATURES = {"network": network_features, "made": made_features}
