"""Loss and metrics of the study: over valid labels only, ties handled, undefined is None."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from engine.intervals import auc_influence, auc_interval, unit_numbers, wilson
from engine.processes import gathered

CHUNK = 4096  # images whose scores are computed in 64 bits at a time


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
    count = int((~labels.isnan()).sum()) if task == "multilabel" else len(labels)
    right, in_top5 = answers(logits, labels)
    rank, ranks = (env.rank, env.ranks) if env else (0, 1)
    mine = range(rank, len(classes), ranks)
    scores = np.empty((len(mine), len(logits)))  # a row a class, in 64 bits
    for start in range(0, len(logits), CHUNK):
        chunk = logits[start : start + CHUNK].double()
        chunk = chunk.softmax(1) if task == "multiclass" else chunk
        scores[:, start : start + CHUNK] = chunk[:, mine.start :: ranks].T
    predicted = logits.argmax(1) if task == "multiclass" else None
    found, units, influences = {}, unit_numbers(groups, len(logits)), np.zeros(len(logits))
    for c, row in zip(mine, scores):
        if task == "multiclass":
            valid, truth, answer = slice(None), (labels == c).numpy(), (predicted == c).numpy()
        else:
            valid = ~labels[:, c].isnan().numpy()
            truth, answer = labels[:, c].numpy()[valid] == 1, logits[:, c].numpy()[valid] > 0
        found[c] = _class_metrics(row[valid], answer, truth)
        influence = auc_influence(row[valid], truth, units[valid])
        influences[valid] += influence
        found[c]["auc_interval"] = auc_interval(found[c]["auc"], influence, units[valid])
    if ranks > 1:
        parts = gathered((found, influences), env)
        found = {c: values for part, _ in parts for c, values in part.items()}
        influences = sum(part for _, part in parts)
    if task == "multiclass":
        correct, counted = (predicted == labels).numpy(), np.ones(len(labels))
    else:
        counted = (~labels.isnan()).sum(1).numpy()
        correct = (((logits > 0) == (labels == 1)) & ~labels.isnan()).sum(1).numpy()
    per_class = {name: found[c] for c, name in enumerate(classes)}
    aucs = [m["auc"] for m in per_class.values() if m["auc"] is not None]
    influences /= max(len(aucs), 1)
    return {
        "accuracy": int(right) / count if count else math.nan,
        "top5": int(in_top5) / count if in_top5 is not None else None,
        "mean_auc": _mean(aucs),
        "mean_ap": _mean([m["ap"] for m in per_class.values()]),
        "loss": float(loss_sum(logits, labels, task)) / count,
        "intervals": {
            "accuracy": wilson(correct, counted, units),
            "mean_auc": auc_interval(_mean(aucs), influences, units),
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


def _class_metrics(scores, predicted, truth):
    hits, claims, positives = (predicted & truth).sum(), predicted.sum(), truth.sum()
    auc, ap = roc_auc(scores, truth), average_precision(scores, truth)
    return {
        "auc": None if math.isnan(auc) else auc,
        "ap": None if math.isnan(ap) else ap,
        "f1": float(2 * hits / (claims + positives)) if claims + positives else None,
        "precision": float(hits / claims) if claims else None,
        "recall": float(hits / positives) if positives else None,
        "positives": int(positives),
        "negatives": int(len(truth) - positives),
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None
