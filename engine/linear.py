"""Classifiers on frozen features: logistic regression and the nearest class mean.

Labels are those of the datasets: (N,) int64 for multi-class, (N,C) float32 in {0,1,nan} for
multi-label, where nan takes no part. Features are (N,D) float32, on the CPU or a GPU.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

# Of the L2 penalty, from strong to weak, for features of mean squared distance 1 to their mean.
STRENGTHS = tuple(10.0 ** (-step / 2) for step in range(13))
ONE_SHOT_STRENGTH = 0.01  # with one image a class nothing can be held out
FOLDS = 5
ONE_FOLD_FROM = 10_000  # of more images one fifth is held out once: it tells strengths apart
# Norm of the gradient at which a fit is done, again for features of that scale and the mean loss.
GRADIENT = 1e-7
MAX_ITERATIONS = 2000
HISTORY = 10  # steps that L-BFGS remembers
# Mean square taken for each coordinate of features that are not along their principal axes: about
# that of the axes that carry most of them, which decide how many steps a fit takes.
SPREAD = 0.05
TEMPERATURE = 2.0  # of the nearest mean
CHUNK = 8192  # test images whose features are held in 64 bits at a time


def linear(train_features, train_labels, test_features, num_classes, l2=None):
    """Logistic regression whose L2 strength, if not given, is chosen on held-out training images.

    Multinomial for multi-class, one binary regression a label for multi-label. Minimises, over the
    weights W and the bias, mean cross-entropy + l2 * scale^2 / 2 * |W|^2, where scale^2 is the mean
    squared distance of the training features to their mean. A label of which only one value is
    known gets that value's smoothed log-odds, log((n1 + 1/2) / (n0 + 1/2)), for every image.

    Returns (logits (M,C) float32, what was chosen): l2; folds (0: given, or default of one shot);
    held_out, the least held-out cross-entropy, or None; iterations and gradient of the last fit.
    Raises ValueError for features that are not finite.
    """
    count, width = train_features.shape
    mean = train_features.mean(0, dtype=torch.float64)
    points = mean.new_ones(count, width + 1)  # made once: it may be large; ones for the bias
    centred = points[:, :-1]
    torch.sub(train_features, mean, out=centred)
    scale = torch.linalg.vector_norm(centred) / count**0.5
    if not scale.isfinite():
        raise ValueError("the network's features are not finite; another --checkpoint may mend it")
    scale = torch.where(scale > 0, scale, 1)
    centred /= scale
    axes, spread = None, points.new_full((width + 1,), SPREAD)
    # Of few images the best weights lie in the span (representer theorem), and the fit is short
    # along its principal axes. Of more images these would cost more than they save.
    if 2 * count <= width:
        squares, vectors = torch.linalg.eigh(centred @ centred.T)
        kept = squares > squares[-1] * count * torch.finfo(torch.float64).eps
        squares, vectors = squares[kept], vectors[:, kept]
        axes = centred.T @ (vectors / squares.sqrt())
        points = F.pad(vectors * squares.sqrt(), (0, 1), value=1.0)
        spread = F.pad(squares / count, (0, 1))
        del centred, vectors  # they may be large
    spread[-1] = 1
    labels, known = _targets(train_labels, num_classes, points.device)
    start = _start(labels, known, points.shape[1])
    folds, held_out = held_out_folds(train_labels) if l2 is None else None, None
    if folds is not None:
        l2, held_out, nearby = _choose_strength(points, spread, labels, known, folds)
        undecided = _shares(labels, known).sum(2, keepdim=True) == 0
        start = torch.where(undecided, start, nearby)
    elif l2 is None:
        l2 = ONE_SHOT_STRENGTH
    weights, iterations, gradient = minimise(points, labels, known, l2, start, spread, GRADIENT)
    chosen = {"l2": l2, "folds": 0 if folds is None else len(folds), "held_out": held_out}
    chosen |= {"iterations": iterations, "gradient": gradient}
    weights, bias = weights.flatten(0, 1).split((points.shape[1] - 1, 1), 1)
    weights = (weights if axes is None else weights @ axes.T) / scale
    bias = bias[:, 0] - weights @ mean  # both now of the features as they came
    chunks = test_features.split(CHUNK)
    return torch.cat([(chunk.double() @ weights.T + bias).float() for chunk in chunks]), chosen


def held_out_folds(labels, seed=0):
    """(folds, N) bool: which images each fold holds out; None where classes have but one image.

    min(5, images of the median class) folds, stratified: the images of a class (multi-label: those
    of which it is the rarest finding) are dealt out in a random order. The only image of a class is
    never held out. Over 10,000 images there is one fold, of a fifth.
    """
    if labels.ndim == 1:
        group, counts = labels, np.bincount(labels)
    else:
        counts = (labels == 1).sum(0)
        group = np.where(labels == 1, counts, len(labels) + 1).argmin(1)
        group[(labels != 1).all(1)] = len(counts)
        counts = np.append(counts, 0)
    count = min(FOLDS, int(np.median(counts[counts > 0]))) if counts.any() else 0
    if count < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(group[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % count
    fold[counts[group] == 1] = count
    folds = fold == np.arange(1 if len(labels) > ONE_FOLD_FROM else count)[:, None]
    return folds if folds.any() else None


def _choose_strength(points, spread, labels, known, folds):
    """(strength of the least held-out cross-entropy, that loss, mean weights of its folds).

    All folds are fitted at once, from the strongest penalty to the weakest, each fit starting where
    the two before it point, until the loss lies 1 % above the least: weaker ones are slow. 32 bits
    and a gradient of 0.001 sqrt(l2) keep held-out losses within 2e-4 of those of converged fits.
    """
    folds = torch.from_numpy(folds).to(points.device)
    points, spread = points.float(), spread.float()
    known_in = (known * ~folds[:, None, None]).flatten(0, 1).float()
    known_out = (known * folds[:, None, None]).flatten(0, 1).float()
    labels = labels.float().repeat(len(folds), 1, 1)
    weights = before = _start(labels, known_in, points.shape[1])
    best = None
    for l2 in STRENGTHS:
        ahead = weights + 0.7 * (weights - before)
        before = weights
        weights, _, _ = minimise(points, labels, known_in, l2, ahead, spread, 0.001 * l2**0.5)
        scores = _scores(weights, points)  # and from them the loss of each image, (P,1,N)
        if scores.shape[1] > 1:
            losses = -(scores.log_softmax(1) * labels).sum(1, keepdim=True)
        else:
            losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        loss = float((losses * known_out).sum() / known_out.sum())
        if best is None or loss < best[1]:
            best = l2, loss, weights
        if loss > 1.01 * best[1]:
            break
    l2, loss, weights = best
    return l2, loss, weights.unflatten(0, (len(folds), -1)).mean(0).double()


def _targets(labels, num_classes, device):
    """(labels (P,K,N), which are known (P,1,N)) in float64, 0 for what is not known.

    P problems of K outputs: one of all classes, or one of one output for each label.
    """
    labels = torch.as_tensor(np.array(labels), device=device)
    if labels.ndim == 1:
        one_hot = F.one_hot(labels, num_classes).T[None].double()
        return one_hot, torch.ones_like(one_hot[:, :1])
    labels = labels.T[:, None].double()
    return labels.nan_to_num(0.0), (~labels.isnan()).double()


def _start(labels, known, width):
    """Weights 0, and as bias the log-frequencies of the classes, or a label's log-odds."""
    positives = (labels * known).sum(2)
    bias = (positives + 0.5).log()
    if labels.shape[1] == 1:
        bias -= (known.sum(2) - positives + 0.5).log()
    else:
        bias -= bias.mean(1, keepdim=True)
    return F.pad(bias[..., None], (width - 1, 0))


def _scores(weights, points):
    """(P,K,Q) and (N,Q) to (P,K,N)."""
    return (weights.flatten(0, 1) @ points.T).unflatten(0, weights.shape[:2])


def minimise(points, labels, known, l2, weights, spread, tolerance):
    """Minimises P separate regularised cross-entropies by L-BFGS (Nocedal & Wright, alg. 7.4).

    points (N,Q), the last column ones; labels (P,K,N); known (P,1,N) in {0,1}; weights (P,K,Q),
    where to start; spread (Q,), about the mean square of each coordinate. Each problem has its own
    step and history; one whose gradient is shorter than `tolerance`, or that knows no two labels
    that differ, stays where it is. The metric is the Hessian's diagonal as it were if all images
    had the mean curvature p (1 - p).
    torch.optim.LBFGS would take one step length and one history for all problems, and compute
    scores anew at each trial of the line search, along which they are linear.

    Returns (weights, iterations, the longest gradient).
    """
    probabilities_of = partial(torch.softmax, dim=1) if labels.shape[1] > 1 else torch.sigmoid
    share = _shares(labels, known)
    penalty = torch.full_like(spread, l2)
    penalty[-1] = 0
    scores = _scores(weights, points)
    probabilities = probabilities_of(scores)
    curvature = (share * probabilities * (1 - probabilities)).sum(2, keepdim=True)
    metric = 1 / (curvature.clamp(min=1e-3) * spread + penalty)
    residuals, history = share * (probabilities - labels), []
    moved = last = None  # the step before, and the gradient ahead of it
    for iteration in range(MAX_ITERATIONS + 1):
        gradient = (residuals.flatten(0, 1) @ points).unflatten(0, weights.shape[:2])
        gradient += penalty * weights
        if moved is not None:
            change = gradient - last
            product = _dot(moved, change)
            inverse = torch.where(product > 0, 1 / product, 0)  # 0 where the problem rests
            history = [*history[1 - HISTORY :], (moved, change, inverse)]
        lengths = gradient.flatten(1).norm(dim=1)
        active = (lengths > tolerance)[:, None, None]
        if iteration == MAX_ITERATIONS or not active.any():
            return weights, iteration, float(lengths.max())
        # The two-loop recursion: the inverse Hessian times the gradient.
        newton, factors = gradient.clone(), []
        for moved, change, inverse in reversed(history):
            factors.append(inverse * _dot(moved, newton))
            newton.addcmul_(-factors[-1], change)
        newton *= metric
        if history:
            moved, change, inverse = history[-1]
            newton *= torch.where(inverse > 0, 1 / (inverse * _dot(change * metric, change)), 1)
        for (moved, change, inverse), factor in zip(history, reversed(factors)):
            newton.addcmul_(factor - inverse * _dot(change, newton), moved)
        direction = -newton * active
        # The step at which the slope has become 0.9 times the first to -0.8 times: the approximate
        # Wolfe conditions of Hager & Zhang (2005), eq. 4.1. The slope grows along the line, so that
        # the secant finds the step, between bounds.
        along, slope = _scores(direction, points), _dot(gradient, direction)
        pull, stiffness = _dot(penalty * weights, direction), _dot(penalty * direction, direction)
        step, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.inf
        for _ in range(20):
            residuals = share * (probabilities_of(scores + step * along) - labels)
            reached = _dot(residuals, along) + pull + step * stiffness
            good = (reached >= 0.9 * slope) & (reached <= -0.8 * slope)
            if good.all():
                break
            low, high = torch.where(reached < 0, step, low), torch.where(reached > 0, step, high)
            secant = step * slope / (slope - reached)
            inside = (secant > low) & (secant < high) & (secant < 10 * step)
            other = torch.where(high.isinf(), 10 * step, (low + high) / 2)
            step = torch.where(good, step, torch.where(inside, secant, other))
        scores = scores + step * along
        moved, last = step * direction, gradient
        weights = weights + moved


def _shares(labels, known):
    """known as shares of the mean loss, 0 for a binary problem that knows one value only."""
    total = known.sum(2, keepdim=True)
    share = known / total.clamp(min=1)
    if labels.shape[1] > 1:
        return share
    positives = (labels * known).sum(2, keepdim=True)
    return share * ((positives > 0) & (positives < total))


def _dot(a, b):
    return (a * b).sum((1, 2), keepdim=True)


def nearest_mean(train_features, train_labels, test_features, num_classes):
    """The nearest class mean (Mensink et al. 2013; the prototypes of Snell et al. 2017).

    Features are centred by the training mean and brought to length 1, as SimpleShot's CL2N (Wang
    et al. 2019, arXiv:1911.04623). Returns logits (M,C) float32: -2 times the squared distance to
    the mean of class c; for multi-label 2 times (that to the mean without the label - that to the
    mean with it); the factor changes the loss alone. A class without images is as far away as can
    be; a label of which one value only is known gets the constant of `linear`.
    """
    mean = train_features.mean(0, dtype=torch.float64)
    train, test = (F.normalize(features - mean) for features in (train_features, test_features))
    labels, known = _targets(train_labels, num_classes, train.device)
    distances, counts = _distances(train, labels.flatten(0, 1), test)
    if len(labels) == 1 and labels.shape[1] > 1:
        return -TEMPERATURE * torch.where(counts > 0, distances, 4).float()
    without, others = _distances(train, (known - labels).flatten(0, 1), test)
    undecided = ((counts + 0.5) / (others + 0.5)).log()
    logits = TEMPERATURE * (without - distances)
    return torch.where((counts > 0) & (others > 0), logits, undecided).float()


def _distances(train, members, test):
    """(squared distances (M,C) of test to the mean of each class's members (C,N), counts (C,))."""
    counts = members.sum(1)
    means = members @ train / counts.clamp(min=1)[:, None]
    return torch.cdist(test, means).square(), counts


# method: (train features, train labels, test features, classes) -> (logits, what a result says).
CLASSIFIERS = {"linear": linear, "nearest-mean": lambda *args: (nearest_mean(*args), {})}
