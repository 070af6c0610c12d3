"""Few-shot subsets."""

from functools import partial

import numpy as np
from conftest import refuses
from scipy.stats import chisquare

from data import few_shot_indices


def test_few_shot_counts_nesting_and_seeds(rng):
    labels = rng.permutation(np.repeat(np.arange(4), (5, 40, 7, 100)))
    chosen = {}
    for shots in (1, 2, 5):
        chosen[shots] = few_shot_indices(labels, shots, seed=3)
        assert chosen[shots].dtype == np.int64
        assert np.bincount(labels[chosen[shots]]).tolist() == [shots] * 4
        assert (np.diff(chosen[shots]) > 0).all()  # sorted, without replacement
        np.testing.assert_array_equal(chosen[shots], few_shot_indices(labels, shots, seed=3))
    assert set(chosen[1]) < set(chosen[2]) < set(chosen[5])
    others = {tuple(few_shot_indices(labels, 5, seed)) for seed in range(20)}
    assert len(others) == 20
    # Every image of the large class has the same chance, 5 in 100 (200 seeds, 10 each).
    drawn = np.concatenate([few_shot_indices(labels, 5, seed) for seed in range(200)])
    counts = np.bincount(drawn, minlength=len(labels))[labels == 3]
    assert chisquare(counts).pvalue > 0.001 and counts.sum() == 1000


def test_few_shot_refusals():
    labels = np.array([0, 0, 1, 1, 1])
    call = partial(few_shot_indices, labels, 3, 0)
    refuses(ValueError, partial(call, ("cat", "dog")), "--shots 3", "cat", "only 2")
    refuses(ValueError, call, "class 0", "only 2")
    # A class without any image at the end is seen too, when the names are known.
    refuses(ValueError, lambda: few_shot_indices(labels, 1, 0, ("a", "b", "c")), "c", "only 0")
    for shots in (0, -1):
        refuses(ValueError, partial(few_shot_indices, labels, shots, 0), f"--shots {shots}")
    refuses(ValueError, lambda: few_shot_indices(labels, 1, -5), "--seed -5", "0 or more")
    wide = np.array([[1, np.nan], [1, 0], [1, 1]], np.float32)
    refuses(ValueError, lambda: few_shot_indices(wide, 2, 0, ("x", "y")), "y", "only 1")


def test_few_shot_multilabel(rng):
    labels = (rng.random((400, 5)) < [0.5, 0.1, 0.2, 0.03, 0.3]).astype(np.float32)
    labels[rng.random((400, 5)) < 0.2] = np.nan
    for shots in (1, 3, 6):
        for seed in range(5):
            chosen = few_shot_indices(labels, shots, seed)
            positives = (labels[chosen] == 1).sum(0)
            assert (positives >= shots).all()
            assert len(chosen) <= 5 * shots and (np.diff(chosen) > 0).all()
            assert (labels[chosen] == 1).any(1).all()  # an image without a positive helps nobody
            # Exhaustive: the rarest classes are needed, so some class has exactly `shots`.
            assert positives.min() == shots
    assert len({tuple(few_shot_indices(labels, 3, seed)) for seed in range(10)}) == 10
    once = np.eye(4, dtype=np.float32)[rng.integers(4, size=80)]  # one positive an image
    assert (once[few_shot_indices(once, 7, 0)].sum(0) == 7).all()
