"""How far a target's images lie from a pre-training source, as the pre-trained network sees them.

A projected sample of the source takes 262 kB whatever the source and the network, and so travels
with the weights.

The Fréchet distance (Dowson & Landau 1982; as FID: Heusel et al. 2017, arXiv:1706.08500) sees mean
and covariance, and has no upper end. The energy coefficient (Székely & Rizzo 2013, "Energy
statistics") sees any difference of distributions and lies in [0, 1]. Both are measured where the
source has unit covariance, as the Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888): classes
make features vary most, so that elsewhere other classes would be far, and a change of appearance
near. Ranks of synthetic targets correlate with their gap by 0.97 and more so (docs/speed.md).
"""

import functools

import numpy as np
import torch

SAMPLE = 512  # images of the source; half as many of a target are compared with them
DIMENSIONS = 128  # of the projected features: half the images of a half sample
ROUNDS = 3  # random halves of the source that a comparison averages over
RIDGE = 0.01  # of the mean variance, added to each: halves with fewer images than dimensions


def sample(num_images, limit=SAMPLE):
    """Which images to look at: min(num_images, limit) sorted int64 indices, always the same."""
    rng = np.random.default_rng(0)
    count = min(num_images, limit)
    return np.sort(rng.choice(num_images, count, replace=False, shuffle=False).astype(np.int64))


@functools.lru_cache(maxsize=4)
def projection(width):
    """A random map with orthonormal columns, (width, DIMENSIONS) float32, one for each width."""
    if width < DIMENSIONS:
        raise ValueError(f"features of {width} dimensions: a distance needs {DIMENSIONS} or more")
    rng = np.random.default_rng(width)
    q, r = np.linalg.qr(rng.standard_normal((width, DIMENSIONS)))
    return torch.from_numpy(q * np.sign(np.diag(r))).float()  # LAPACK's signs are of no meaning


def project(features):
    """The classifier's features (N, D) -> (N, DIMENSIONS) float32 on the CPU, by projection(D)."""
    return features.float().cpu() @ projection(features.shape[1])


def compare(source, target):
    """Both distances of a target from a source, by projected features (n, D) and (m, D).

    A random half of the source sets the coordinates and is what the Fréchet distance is measured
    from; the other half and as many target images are measured by it alike. So a target like the
    source is on average as far from it as the source is from itself, however few the images.

    Returns {"frechet": squared distance, in the source's standard deviations and with the bias of
    finite samples, "frechet_relative": that in units of the source's distance from itself (1: no
    further), "energy": energy coefficient, without bias, and so sometimes a little below 0,
    "images": m}. Fewer target images than n / 2 meet as many of the source, in the unit of whole
    halves. None where the features of half of the source do not vary. Raises ValueError for less
    than 4 images of the source or 2 of the target, and for features that are not finite.
    """
    source, target = source.double(), target.double()
    half = len(source) // 2
    count = min(half, len(target))
    if half < 2 or count < 2:
        found = f"{len(source)} and {len(target)}"
        raise ValueError(f"a distance needs 4 images of the source, 2 of the target, not {found}")
    if not (source.isfinite().all() and target.isfinite().all()):
        raise ValueError("a distance needs finite features; has the network diverged?")
    rounds = []
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        halves = torch.from_numpy(rng.permutation(len(source))[: 2 * half]).view(2, half)
        drawn = torch.from_numpy(rng.permutation(len(target))[:count])
        first, own, other = source[halves[0]], source[halves[1]], target[drawn]
        if not (first != first[0]).any():
            unknown = dict.fromkeys(("frechet", "frechet_relative", "energy"))
            return unknown | {"images": len(target)}
        covariance = first.T.cov()
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        values, axes = torch.linalg.eigh(covariance)
        own, other = ((x - first.mean(0)) @ (axes / values.sqrt()) for x in (own, other))
        unit = frechet(own)
        near = unit if count == half else frechet(own[:count])
        rounds.append((unit, near, frechet(other), energy(own, other)))
    unit, near, far, coefficient = np.mean(rounds, axis=0).tolist()
    found = {"frechet": far, "frechet_relative": 1 + (far - near) / unit, "energy": coefficient}
    return found | {"images": len(target)}


def frechet(x):
    """Squared Fréchet distance of the Gaussian fitted to x (N, D) from the standard one: float.

    Dowson & Landau 1982: |m|^2 + tr(C) + D - 2 tr(C^(1/2)), the last by C's eigenvalues.
    """
    covariance = x.T.cov()
    roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()  # below 0 by rounding alone
    return float(x.mean(0).square().sum() + covariance.trace() + x.shape[1] - 2 * roots.sum())


def energy(x, y):
    """Energy coefficient of x (N, D) and y (M, D), from pairs of different images: float.

    Székely & Rizzo 2013: (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / 2 E|X-Y|; 0 where all points are one.
    """
    between = 2 * torch.cdist(x, y).mean()
    within = sum(torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(1 - within / between) if between > 0 else 0.0
