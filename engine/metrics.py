"""Loss and metrics of the study: over valid labels only, ties handled, undefined is None; their
95 % intervals over test images in closed form, Wilson's of accuracy, DeLong's of AUC.

DeLong et al. 1988 write the variance of an AUC as a sum over images; Obuchowski 1997 sums over
patients, whose images go together. Here an image has its influence on an AUC, such that the sum of
squares over units (patients; images where these are unknown) is the variance. Influences average
over classes as AUCs do, which gives the variance of their mean with all covariances.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from engine.processes import gathered

CHUNK = 4096  # images whose scores are computed in 64 bits at a time
Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Diverged(ValueError):
    """The loss, a gradient or the outputs are not finite, as all ranks see alike."""


def loss_sum(logits, labels, task):
    """Sum over valid labels, in fp32: cross-entropy for labels (N,) int64; binary cross-entropy
    over what is not NaN for labels (N,C). Divide by the count of valid labels for the mean.
    """
    logits = logits.float()
    if task == "multiclass":
        return F.cross_entropy(logits, labels, reduction="sum")
    valid = ~labels.isnan()
    targets = torch.where(valid, labels, 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(valid, losses, 0).sum()


def roc_auc(scores, targets):
    """Area under the ROC curve: the chance that a positive outscores a negative, ties half.

    scores: (N,) numbers. targets: (N,) in {0,1}. nan when one class is absent.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) == 1
    positives, negatives = int(targets.sum()), int((~targets).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # tied scores share their mean rank
    return float((ranks[targets].sum() / positives - (positives + 1) / 2) / negatives)


def average_precision(scores, targets):
    """Sum over thresholds of (recall gained) * precision, tied scores entering together.

    scores: (N,) numbers. targets: (N,) in {0,1}. nan when one class is absent.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) == 1
    if targets.all() or not targets.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, targets = scores[order], targets[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    hits = np.cumsum(targets)[last]
    precision, gained = hits / (last + 1), np.diff(hits, prepend=0) / hits[-1]
    return float((precision * gained).sum())


def wilson(right, counted, units):
    """Interval of sum(right) / sum(counted): [low, high], or None where nothing counted.

    right, counted: (N,) right answers of an image and how many counted. Wilson 1927, for as many
    independent answers as have the variance over units (N,) int64 (one an image: all of them).
    """
    total = counted.sum()
    if not total:
        return None
    p = right.sum() / total
    variance = np.sum(np.bincount(units, right - p * counted) ** 2) / total**2
    # Where all answers are alike there is no variance: then a unit is an answer.
    n = len(np.unique(units[counted > 0])) if p in (0, 1) else total
    n = min(n, p * (1 - p) / variance) if variance else n
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    ends = ((middle + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return [round(max(float(end), 0.0), 6) for end in ends]


def auc_influence(scores, truth, units):
    """Influences (N,) on the AUC of scores (N,) for truth (N,) bool, ties half: 0 where it is
    undefined, nan where one class has a single unit. units: (N,) int64.

    Without patients their sum of squares is DeLong's variance; with them Obuchowski's, but for the
    factor of its last term, I / (I - 1) of all units, which is here the root of both classes'.
    """
    positives, negatives = truth.sum(), (~truth).sum()
    if not positives or not negatives:
        return np.zeros(len(scores))
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    tied = np.bincount(place[truth], minlength=len(counts))  # positives of each score
    others = counts - tied
    outscored = (np.cumsum(others) - others / 2)[place] / negatives  # share of negatives
    outscoring = (positives - np.cumsum(tied) + tied / 2)[place] / positives
    influence = np.where(truth, outscored, outscoring)
    influence -= outscored[truth].mean()
    for part, images in ((truth, positives), (~truth, negatives)):
        count = np.count_nonzero(np.bincount(units[part]))
        influence[part] *= math.sqrt(count / (count - 1)) / images if count > 1 else math.nan
    return influence


def auc_interval(auc, influence, units):
    """[low, high] on the logit scale, which keeps it within 0 and 1; None where auc is None, or
    without variance, as for a perfect ranking. influence, units: (N,)."""
    variance = np.sum(np.bincount(units, influence) ** 2)
    if auc is None or not 0 < auc < 1 or not variance > 0:
        return None
    half = Z * math.sqrt(variance) / (auc * (1 - auc))
    odds = [auc / (1 - auc) * math.exp(sign * half) for sign in (-1, 1)]
    return [round(float(value / (1 + value)), 6) for value in odds]


def compute_metrics(logits, labels, classes, env=None, groups=None):
    """Metrics of a whole test set as fractions; what is undefined is None.

    logits: (N,C). labels: (N,) int64 for multi-class, (N,C) in {0,1,nan} for multi-label. env: its
    ranks, which all have the same logits, share out the classes. groups: (N,) patients, or None.
    accuracy: share of right answers (multi-label: of right yes/no answers over all valid labels,
    at probability 0.5). mean_auc, mean_ap: means over the classes for which they are defined, one
    against the rest. loss: mean over valid labels. intervals, auc_interval: of 95 % over images, or
    over patients. Raises Diverged for non-finite logits.
    """
    logits = torch.as_tensor(logits).cpu()
    labels = torch.as_tensor(np.array(labels))  # a copy: those of a pack cannot be written
    refuse_nonfinite(logits.isfinite().all())
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    if task == "multiclass":
        predicted = logits.argmax(1)
        right, counted = (predicted == labels).numpy(), np.ones(len(labels))
    else:
        right = (((logits > 0) == (labels == 1)) & ~labels.isnan()).sum(1).numpy()
        counted = (~labels.isnan()).sum(1).numpy()
    _, in_top5 = answers(logits, labels)
    rank, ranks = (env.rank, env.ranks) if env else (0, 1)
    mine = range(rank, len(classes), ranks)
    scores = np.empty((len(mine), len(logits)))  # a row a class, in 64 bits
    for start in range(0, len(logits), CHUNK):
        chunk = logits[start : start + CHUNK].double()
        chunk = chunk.softmax(1) if task == "multiclass" else chunk
        scores[:, start : start + CHUNK] = chunk[:, rank::ranks].T
    units = np.arange(len(logits)) if groups is None else np.unique(groups, return_inverse=True)[1]
    found, influences = {}, np.zeros(len(logits))
    for c, row in zip(mine, scores):
        if task == "multiclass":
            valid, truth, answer = slice(None), (labels == c).numpy(), (predicted == c).numpy()
        else:
            valid = ~labels[:, c].isnan().numpy()
            truth, answer = labels[:, c].numpy()[valid] == 1, logits[:, c].numpy()[valid] > 0
        row = row[valid]
        auc, ap = roc_auc(row, truth), average_precision(row, truth)
        influence = auc_influence(row, truth, units[valid])
        influences[valid] += influence
        hits, claims, positives = (answer & truth).sum(), answer.sum(), truth.sum()
        found[c] = {
            "auc": None if math.isnan(auc) else auc,
            "ap": None if math.isnan(ap) else ap,
            "f1": float(2 * hits / (claims + positives)) if claims + positives else None,
            "precision": float(hits / claims) if claims else None,
            "recall": float(hits / positives) if positives else None,
            "positives": int(positives),
            "negatives": int(len(truth) - positives),
            "auc_interval": auc_interval(auc, influence, units[valid]),
        }
    if ranks > 1:
        parts = gathered((found, influences), env)
        found = {c: values for part, _ in parts for c, values in part.items()}
        influences = sum(part for _, part in parts)
    per_class = {name: found[c] for c, name in enumerate(classes)}
    known = [[m[key] for m in per_class.values() if m[key] is not None] for key in ("auc", "ap")]
    mean_auc, mean_ap = (float(np.mean(values)) if values else None for values in known)
    influences /= max(len(known[0]), 1)
    count = int(counted.sum())
    return {
        "accuracy": int(right.sum()) / count,
        "top5": int(in_top5) / count if in_top5 is not None else None,
        "mean_auc": mean_auc,
        "mean_ap": mean_ap,
        "loss": float(loss_sum(logits, labels, task)) / count,
        "intervals": {
            "accuracy": wilson(right, counted, units),
            "mean_auc": auc_interval(mean_auc, influences, units),
        },
        "per_class": per_class,
    }


def refuse_nonfinite(finite):
    """Raises Diverged unless all outputs of the network are finite."""
    if not finite:
        mend = "a smaller --lr or --precision fp32 may mend it"
        raise Diverged(f"the network's outputs are not finite; {mend}")


def answers(logits, labels):
    """(how many answers are right, for how many images the label is among the five likeliest
    classes), as tensors; the second None for multi-label or at most five classes.
    """
    if labels.ndim == 2:
        return ((logits > 0) == (labels == 1))[~labels.isnan()].sum(), None
    right = (logits.argmax(1) == labels).sum()
    if logits.shape[1] <= 5:
        return right, None
    return right, (logits.topk(5).indices == labels[:, None]).any(1).sum()
