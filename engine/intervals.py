"""95 % intervals over test images, in closed form: Wilson's of accuracy, DeLong's of AUC.

DeLong et al. 1988 write the variance of an AUC as a sum over images; Obuchowski 1997 sums over
patients, whose images go together. Here an image has its influence on an AUC, such that the sum of
squares over units (patients; images where these are unknown) is the variance. Influences average
over classes as AUCs do, which gives the variance of their mean with all covariances.
"""

import math

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def unit_numbers(groups, count):
    """Which unit each of count images belongs to, (count,) int64. groups: (count,) patients, or
    None: each image is a unit."""
    return np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]


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
