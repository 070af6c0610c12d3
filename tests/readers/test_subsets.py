"""What is held out: by class, each patient on one side, the same ones whenever asked.

Few-shot subsets: tests/test_data.py.
"""

import numpy as np

from readers.subsets import hold_out


def test_by_class_without_patients(rng):
    labels = rng.permutation(np.repeat(np.arange(5), (1, 5, 40, 100, 1000)))
    held = hold_out(labels, None, 0.2)
    counts = np.bincount(labels[held], minlength=5)
    assert counts[0] == 0 and np.abs(counts[1:] - [1, 8, 20, 200]).max() <= 1
    assert (held == hold_out(labels, None, 0.2)).all()
    assert not hold_out(np.arange(10), None, 0.5).any()  # of each class the first stays


def test_patients_stay_together_and_findings_are_shared_out(rng):
    patients = np.sort(rng.integers(3000, size=10_000)).astype("S")
    labels = (rng.random((10_000, 4)) < [0.3, 0.1, 0.02, 0]).astype(np.float32)
    labels[rng.random((10_000, 4)) < 0.1] = np.nan
    held = hold_out(labels, patients, 0.2)
    assert not np.intersect1d(patients[held], patients[~held]).size
    shares = (labels[held] == 1).sum(0)[:3] / (labels == 1).sum(0)[:3]
    assert np.abs(shares - 0.2).max() < 0.03 and abs(held.mean() - 0.2) < 0.01
    # Of patients with the rarest finding a fifth, to one.
    rarest = np.unique(patients[labels[:, 2] == 1])
    mine = np.isin(rarest, patients[held]).sum()
    assert abs(mine - len(rarest) / 5) <= 1


def test_a_patient_of_several_classes_counts_for_the_rarest():
    labels = np.array([0, 1] * 50 + [0] * 100)  # fifty patients show both, a hundred one
    patients = np.repeat(np.arange(150), [2] * 50 + [1] * 100)
    held = hold_out(labels, patients, 0.5)
    assert np.bincount(labels[held]).tolist() in ([75, 25], [74, 24], [74, 25], [75, 24])


def test_nothing_and_little():
    assert hold_out(np.zeros(0, int), None, 0.5).shape == (0,)
    assert not hold_out(np.zeros((1, 3), np.float32), None, 0.5).any()
    assert hold_out(np.zeros((2, 3), np.float32), np.array([7, 3]), 0.5).sum() == 1
