"""Which images: random numbers and what they are for, few-shot subsets, what is held out."""

import numpy as np

from engine.console import counted
from readers.labels import images_by_class


class Stream:
    """What a random number is for: the second word of the seed of every generator."""

    SHOTS, ORDER, DRAW, AUGMENT, MIXUP, FRACTION, HELD_OUT = range(7)


def generator(seed, *purpose):
    """numpy's generator for a seed, a Stream and what else tells its draws from others."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: must be 0 or more")
    return np.random.default_rng([seed, *purpose])


def few_shot_indices(labels, shots, seed, classes=None):
    """Indices of a few-shot training set, sorted: (M,) int64.

    labels: (N,) int64, or (N,C) in {0,1,nan}. Multi-class: `shots` images of each class without
    replacement; a larger `shots` with the same seed holds the smaller one's images. Multi-label:
    images are taken in random order while some class that they show has fewer than `shots`
    positives. A class without any image is left out. classes: names for the message. Raises
    ValueError when a class has some images but fewer than `shots`.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots}: must be 1 or more")
    labels = np.asarray(labels)
    counts = images_by_class(labels, 0)
    if not counts.any():
        raise ValueError(f"--shots {shots}: no training image shows any class")
    for cls, count in enumerate(counts):
        if 0 < count < shots:
            label, only = classes[cls] if classes else cls, counted(count, "training image")
            mend = "give fewer, or leave that class out"
            raise ValueError(f"--shots {shots}: class {label} has only {only}; {mend}")
    order = generator(seed, Stream.SHOTS).permutation(len(labels))
    if labels.ndim == 1:
        places, starts, _ = by_class(labels[order])
        return np.sort(order[places[starts[:, None] + np.arange(shots)]].ravel())
    positive, wanted, chosen = labels == 1, np.where(counts, shots, 0), []
    for i in order:
        if (wanted <= 0).all():
            break
        if (positive[i] & (wanted > 0)).any():
            wanted -= positive[i]
            chosen.append(i)
    return np.sort(np.array(chosen, np.int64))


def by_class(labels):
    """(images sorted by class (N,), first place (C,) and number (C,) of each class present)."""
    _, counts = np.unique(labels, return_counts=True)
    return np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, counts


def hold_out(labels, groups, share):
    """Which images are held out: (N,) bool, about `share` of the images of each class.

    labels: (N,) int64, or (N,C) in {0,1,nan}. groups: (N,) patients, each of whom is on one side,
    or None. A patient counts for the rarest class of all that its images show; of the patients of
    each class, in random order but always the same one, every 1/share-th is held out, never the
    first, so that none of these classes loses all its training images.
    """
    every = np.arange(len(labels))
    owners = every if groups is None else np.unique(groups, return_inverse=True)[1]
    images, shown = (every, labels) if labels.ndim == 1 else np.where(labels == 1)
    rarity = np.argsort(np.argsort(np.bincount(shown)))  # 0: of the rarest class
    strata = np.full(owners.max(initial=-1) + 1, len(rarity))  # as it is of who shows none
    np.minimum.at(strata, owners[images], rarity[shown])
    mixed = generator(0, Stream.HELD_OUT).permutation(len(strata))
    order = mixed[np.argsort(strata[mixed], kind="stable")]
    counts = np.floor(share * np.arange(len(order) + 1))
    first = np.diff(strata[order], prepend=-1) > 0
    held = np.empty(len(order), bool)
    held[order] = (np.diff(counts) > 0) & ~first
    return held[owners]
