"""How far a target's images lie from a pre-training source, as the pre-trained network sees them.

`sample` chooses images, `project` compresses their features (what the classifier reads) to 64
numbers an image, `compare` measures. A projected sample of the source is small whatever the source
and the network, 131 kB, and so travels with the weights.
"""

import functools

import numpy as np
import torch

SAMPLE = 512  # images of the source; half as many of a target are compared with them
DIMENSIONS = 64  # of the projected features
ROUNDS = 8  # random halves of the source over which the Fréchet distance is averaged


def sample(num_images, limit=SAMPLE):
    """Which images to look at: min(num_images, limit) sorted int64 indices, always the same."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(num_images, min(num_images, limit), replace=False, shuffle=False)
    return np.sort(chosen)


@functools.lru_cache(maxsize=8)
def projection(width):
    """A random map with orthonormal columns, (width, DIMENSIONS) float32, the same for a width."""
    gaussian = np.random.default_rng(width).standard_normal((width, DIMENSIONS))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy(q * np.sign(np.diag(r))).float()  # of either sign: LAPACK's choice


def project(features):
    return features.float().cpu() @ projection(features.shape[1])


def compare(source, target, rounds=ROUNDS):
    source, target = source.double(), target.double()
    half = min(len(source) // 2, len(target))
    own, other = [], []
    for r in range(rounds):
        rng = np.random.default_rng(r)
        order = torch.from_numpy(rng.permutation(len(source)))
        drawn = torch.from_numpy(rng.permutation(len(target)))[:half]
        first, second = (_gaussian(source[part]) for part in (order[:half], order[half : 2 * half]))
        third = _gaussian(target[drawn])
        own.append(frechet(first, second))
        other += [frechet(first, third), frechet(second, third)]
    own, other = float(np.mean(own)), float(np.mean(other))
    return {
        "frechet": other,
        "frechet_relative": other / own,
        "energy": energy(source, target),
        "images": len(target),
    }


def _gaussian(x):
    mean = x.mean(0)
    c = x - mean
    cov = c.T @ c / (len(x) - 1)
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return mean, cov, root


def frechet(a, b):
    (m1, c1, r1), (m2, c2, r2) = a, b
    cross = torch.linalg.eigvalsh(r1 @ c2 @ r1).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def energy(x, y):
    between = torch.cdist(x, y).mean()
    within = torch.pdist(x).mean() + torch.pdist(y).mean()
    return float(1 - within / (2 * between))
