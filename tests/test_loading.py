"""Batches that depend on the seed and the step alone."""

import math
import multiprocessing
import operator
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, refuses
from scipy.stats import chisquare
from trees import load_folder, random_image

from data import load_dataset
from readers import cache as loading
from readers.cache import Batches, batch_indices, loader, preload
from readers.images import ImageDataset
from readers.transforms import (
    Pipeline,
    hyperrule_pipeline,
    keep,
    pretraining_pipeline,
    random_crop_flip,
    resize_shorter,
)


@pytest.mark.parametrize("images, batch", [(12, 4), (10, 4), (7, 20), (1, 3), (64, 1)])
def test_shuffle_shows_every_image_once_an_epoch(images, batch):
    steps = -(-3 * images // batch)
    parts = [batch_indices(step, images, batch, seed=5) for step in range(steps)]
    assert all(len(indices) == len(draws) == batch for indices, draws in parts)
    indices, epochs = (np.concatenate(words) for words in zip(*parts))
    orders = indices[: 3 * images].reshape(3, images)
    assert (np.sort(orders) == np.arange(images)).all()
    assert (epochs[: 3 * images].reshape(3, images) == np.arange(3)[:, None]).all()
    if images > 6:
        assert len({tuple(order) for order in orders}) == 3


def test_batches_depend_on_seed_and_step_alone():
    labels = np.arange(50) % 3
    for sampling in ("shuffle", "replacement", "balanced"):
        call = partial(batch_indices, sampling=sampling, classes=loading.by_class(labels))
        forth = [call(step, 50, 8, 2)[0] for step in range(30)]
        loading._ORDER.clear()
        back = [call(step, 50, 8, 2)[0] for step in reversed(range(30))][::-1]
        np.testing.assert_array_equal(forth, back)
        assert (call(0, 50, 8, 3)[0] != forth[0]).any()
        assert len({tuple(indices) for indices in forth}) == 30


def test_replacement_draws_evenly_and_anew():
    parts = [batch_indices(step, 10, 50, 0, "replacement") for step in range(200)]
    indices, draws = (np.concatenate(words) for words in zip(*parts))
    assert chisquare(np.bincount(indices, minlength=10)).pvalue > 0.001
    assert len(np.unique(draws)) == 10000  # so no augmentation comes twice


def test_balanced_draws_classes_evenly():
    labels = np.repeat([0, 2, 3], (900, 90, 10))  # class 1 has no image
    classes = loading.by_class(labels)
    parts = [batch_indices(step, 1000, 100, 0, "balanced", classes) for step in range(300)]
    indices, draws = (np.concatenate(words) for words in zip(*parts))
    counts = np.bincount(labels[indices])
    assert counts[1] == 0 and np.abs(counts[[0, 2, 3]] / 10000 - 1).max() < 0.05
    within = np.bincount(indices, minlength=1000)[labels == 2]
    assert chisquare(within).pvalue > 0.001 and len(np.unique(draws)) == 30000


@pytest.mark.parametrize("images, batch", [(10, 4), (8, 4), (3, 5)])
def test_sequential_covers_each_once(images, batch):
    parts = [batch_indices(s, images, batch, 0, "sequential") for s in range(-(-images // batch))]
    assert np.concatenate([indices for indices, _ in parts]).tolist() == list(range(images))
    assert all(len(indices) for indices, _ in parts)


def test_odd_seeds():
    refuses(ValueError, lambda: batch_indices(0, 10, 4, -1), "--seed -1", "0 or more")
    huge = [batch_indices(0, 1000, 50, seed)[0].tolist() for seed in (2**64, 10**40, 2**64 + 1)]
    assert huge[0] != huge[1] and huge[0] != huge[2]
    refuses(ValueError, lambda: batch_indices(0, 10, 4, 0, "sorted"), "'sorted'")


def read_from(images, i, size=None):
    return images[i]


def array_dataset(rng, count=23, multilabel=False, shape=(3, 20, 26)):
    images = random_image(rng, count, *shape)
    labels = rng.integers(4, size=count)
    if multilabel:
        labels = rng.choice(np.array([0, 1, np.nan], np.float32), (count, 5))
    task = "multilabel" if multilabel else "multiclass"
    return ImageDataset("array", partial(read_from, images), labels, "abcde", task, "natural")


CROP = Pipeline(partial(resize_shorter, size=18), partial(random_crop_flip, size=12))


def same(one, other):
    """Bitwise; a NaN equals a NaN."""
    return np.array_equal(one.numpy().view(np.uint8), other.numpy().view(np.uint8))


@pytest.mark.parametrize("sampling", ["shuffle", "replacement", "balanced", "sequential"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same(rng, sampling, pairs, ranks):
    dataset = array_dataset(rng)
    make = partial(Batches, dataset, CROP, 8, 3, sampling)
    alone = make()
    for step in range(3):
        images, labels, count = alone[step]
        parts = [make(rank=rank, ranks=ranks, pairs=pairs)[step] for rank in range(ranks)]
        assert count == len(labels) and {part[2] for part in parts} == {count}
        unit = 1 + pairs
        for rank, (part, part_labels, _) in enumerate(parts):
            mine = [i for i in range(len(images)) if i // unit % ranks == rank]
            assert torch.equal(part, images[mine]) and torch.equal(part_labels, labels[mine])


def test_batch_is_what_the_pipeline_makes(rng):
    dataset = array_dataset(rng)
    images, labels, _ = Batches(dataset, CROP, 30, seed=9)[0]
    indices, draws = batch_indices(0, 23, 30, 9)
    assert images.dtype == torch.uint8 and images.shape == (30, 3, 12, 12)
    assert labels.tolist() == dataset.labels[indices].tolist()
    for image, i, draw in zip(images, indices, draws):
        generator = np.random.default_rng([9, loading.Stream.AUGMENT, draw, i])
        assert torch.equal(image, CROP.augment(CROP.prepare(dataset.read(i)), generator))


def epoch_of(batches, epoch):
    """Image number -> pixels, over one epoch; the batch size divides the number of images."""
    steps = len(batches)
    found = {}
    for step in range(epoch * steps, (epoch + 1) * steps):
        indices, _ = batch_indices(
            step, len(batches.dataset), batches.batch_size, batches.seed, batches.sampling
        )
        found |= dict(zip(indices.tolist(), batches[step][0]))
    return found


def test_augmentation_depends_on_seed_epoch_and_image_alone(rng):
    dataset = array_dataset(rng, 24)
    by_four, by_eight = (Batches(dataset, CROP, size, seed=1) for size in (4, 8))
    first, second = epoch_of(by_four, 0), epoch_of(by_four, 1)
    other = epoch_of(Batches(dataset, CROP, 4, seed=2), 0)
    again = epoch_of(by_eight, 0)
    assert len(first) == 24 and all(torch.equal(first[i], again[i]) for i in range(24))
    assert sum(torch.equal(first[i], second[i]) for i in range(24)) < 4
    assert sum(torch.equal(first[i], other[i]) for i in range(24)) < 4
    twins = Batches(dataset.subset([5] * 24), CROP, 24, seed=1)[0][0]  # equal pixels, own numbers
    assert len({twin.numpy().tobytes() for twin in twins}) > 12


def test_count_is_of_the_global_batch(rng):
    dataset = array_dataset(rng, multilabel=True)
    for ranks in (1, 2, 5):
        for step in range(3):
            indices, _ = batch_indices(step, 23, 6, 0)
            expected = sum(not math.isnan(v) for row in dataset.labels[indices] for v in row)
            for rank in range(ranks):
                _, labels, count = Batches(dataset, CROP, 6, rank=rank, ranks=ranks)[step]
                assert isinstance(count, int) and count == expected
                assert labels.dtype == torch.float32 and labels.shape[1] == 5
    assert 0 < expected < 30


def test_fewer_images_than_ranks(rng):
    dataset = array_dataset(rng, 2)
    parts = [Batches(dataset, CROP, 8, 0, "sequential", rank, 4)[0] for rank in range(4)]
    assert [len(images) for images, _, _ in parts] == [1, 1, 0, 0]
    assert [len(labels) for _, labels, _ in parts] == [1, 1, 0, 0]
    assert {count for _, _, count in parts} == {2}


@pytest.mark.parametrize("images, batch, steps", [(23, 8, 3), (24, 8, 3), (5, 8, 1)])
def test_steps_an_epoch(rng, images, batch, steps):
    assert len(Batches(array_dataset(rng, images), CROP, batch)) == steps


@pytest.mark.parametrize("multilabel", [False, True])
def test_workers_give_the_same_batches(rng, multilabel):
    batches = Batches(array_dataset(rng, multilabel=multilabel), CROP, 6, seed=4)
    alone, ahead = (list(loader(batches, 1, 6, workers)) for workers in (0, 2))
    assert len(alone) == len(ahead) == 5
    for step, (one, other) in enumerate(zip(alone, ahead), 1):
        assert same(one[0], other[0]) and same(one[1], other[1]) and one[2] == other[2]
        assert same(one[0], batches[step][0])


def test_worker_names_a_broken_image(pets_at_home):
    path = pets_at_home / "train" / "cat" / "1.png"
    path.write_bytes(b"")
    batches = Batches(load_folder(pets_at_home), CROP, 5)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=str(path)):
            list(loader(batches, 0, 1, workers))


FAILING = """
import data
from readers import cache as loading
from readers.transforms import Pipeline, keep
if __name__ == "__main__":
    dataset = data.load_dataset("synthetic-natural")
    batches = loading.Batches(dataset, Pipeline(keep, keep), 8)
    ahead = iter(loading.loader(batches, 0, 9, workers=1))
    next(ahead)
    raise RuntimeError("out of memory")
"""


def test_an_error_ends_the_process_and_its_workers():
    """Workers ignore SIGTERM: Python's exit must not wait for them for ever."""
    command = [sys.executable, "-c", FAILING]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: out of memory")


def test_datasets_travel_to_spawned_processes(chests, pets_at_home, rng, monkeypatch):
    """macOS spawns its loader workers: everything in a Batches must pickle."""
    uneven = load_folder(pets_at_home)
    medical = pretraining_pipeline("medical", 8, train=True)
    many = [
        Batches(uneven, pretraining_pipeline("natural", 8, train=True), 4),
        Batches(*preload(uneven, Pipeline(keep, partial(random_crop_flip, size=4))), 4),
        Batches(chests.load(), medical, 3),
        Batches(*preload(chests.load(), medical), 3),
        Batches(load_dataset("synthetic-natural").subset([3, 1]), CROP, 2),
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for batches in many:
            images, labels, count = pool.apply(operator.getitem, (batches, 1))
            assert same(images, batches[1][0]) and same(labels, batches[1][1])
            assert count == batches[1][2]


def test_preload_changes_no_batch(chests, pets_at_home):
    cases = [
        (chests.load(), pretraining_pipeline("medical", 6, train=True)),
        (load_folder(pets_at_home), hyperrule_pipeline(9, 7, train=True)),  # images differ in shape
        (load_folder(pets_at_home), hyperrule_pipeline(9, 7, train=False)),
    ]
    for dataset, pipeline in cases:
        held, shorter = preload(dataset, pipeline)
        assert shorter.prepare is keep and shorter.augment is pipeline.augment
        assert held.labels is dataset.labels and held.name == dataset.name
        for step in range(4):
            one = Batches(dataset, pipeline, 2, seed=6)[step]
            other = Batches(held, shorter, 2, seed=6)[step]
            assert same(one[0], other[0]) and same(one[1], other[1])


def test_preload_reads_each_image_once(rng):
    reads = []
    images = random_image(rng, 9, 3, 6, 6)
    dataset = array_dataset(rng, 9).replace(reader=lambda i, size: reads.append(i) or images[i])
    held, _ = preload(dataset, Pipeline(keep, keep))
    assert sorted(reads)[1:] == list(range(9))  # and the first once more, to tell the size
    assert torch.equal(held.read(-1), images[8]) and len(reads) == 10


def test_preload_over_the_limit(rng):
    dataset, pipeline = array_dataset(rng), Pipeline(keep, keep)
    exact = 23 * 3 * 20 * 26
    assert preload(dataset, pipeline, exact)[0] is not dataset
    held, same_pipeline = preload(dataset, pipeline, exact - 1)
    assert held is dataset and same_pipeline is pipeline
    # A first image that is smaller than the others must not hide their size.
    images = [random_image(rng, 3, 1, 1), *(random_image(rng, 3, 30, 30) for _ in range(22))]
    uneven = dataset.replace(reader=lambda i, size: images[i])
    assert preload(uneven, pipeline, exact)[0] is uneven


def test_preload_names_a_broken_image(pets_at_home):
    path = pets_at_home / "train" / "cat" / "1.png"
    os.truncate(path, 50)
    dataset = load_folder(pets_at_home)
    refuses(ValueError, lambda: preload(dataset, hyperrule_pipeline(9, 7, True)), path)
