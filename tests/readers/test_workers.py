"""Worker processes: errors in order, and none that stays (the same weights: test_pretrain.py)."""

import subprocess
import sys

import pytest
from conftest import ROOT

from data import load_dataset
from readers.workers import each_image


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
