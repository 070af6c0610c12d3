"""Worker processes: the same batches in order, errors by name, and no process that stays."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from data import Batches, load_dataset
from readers.transforms import Pipeline, keep, random_crop_flip
from readers.workers import each_image, loader

CROP = Pipeline(keep, partial(random_crop_flip, size=4))


@pytest.mark.parametrize("name", ["synthetic-natural", "synthetic-xray"])
def test_workers_give_the_same_batches(name):
    batches = Batches(load_dataset(name, size=12, fraction=0.003), CROP, 6, seed=4)
    alone, ahead = (list(loader(batches, 1, 6, workers)) for workers in (0, 2))
    assert len(alone) == len(ahead) == 5
    for step, (one, other) in enumerate(zip(alone, ahead), 1):
        assert torch.equal(one[0], batches[step][0])
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert one[2] == other[2]


def number(dataset, i):
    """The work of test_each_image."""
    if i % 10 == 7:
        raise ValueError(f"{i} is broken")
    return i


@pytest.mark.parametrize("workers", [1, 2, None])
@pytest.mark.parametrize("start", [0, 5, 39, 40])
def test_each_image(workers, start):
    """In order, from anywhere, an error where the work fails."""
    dataset = load_dataset("synthetic-xray", size=4, fraction=0.005)
    results = list(each_image(dataset, number, "images", workers, start))
    assert len(results) == 40 - start
    for i, result in enumerate(results, start):
        assert result == i or (str(result) == f"{i} is broken" and i % 10 == 7)


FAILING = """
import data
from readers.transforms import Pipeline, keep
from readers.workers import loader
if __name__ == "__main__":
    batches = data.Batches(data.load_dataset("synthetic-natural"), Pipeline(keep, keep), 8)
    ahead = iter(loader(batches, 0, 9, workers=1))
    next(ahead)
    raise RuntimeError("out of memory")
"""


def test_an_error_ends_the_process_and_its_workers():
    """Workers ignore SIGTERM: Python's exit must not wait for them for ever."""
    run = subprocess.run([sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: out of memory")
