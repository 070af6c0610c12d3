"""Names of datasets, few-shot subsets, batches that depend on seed and step alone, the commands."""

import multiprocessing
import operator
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from packing import pack, rows_of, run_data
from scipy.stats import chisquare
from trees import load_folder, noise, places, save

import data
from data import Batches, batch_indices, few_shot_indices, load_dataset
from readers import synthetic, transforms
from readers.cache import preload
from readers.images import Array, ImageDataset
from readers.transforms import Pipeline, keep, random_crop_flip, resize_shorter
from readers.workers import in_order


def test_rows_say_what_their_datasets_are(nih_root):
    for name in (*synthetic.WORLDS, "nih"):
        assert load_dataset(name, nih_root).domain == data.DATASETS[name].domain
    medical = {name for name, known in data.DATASETS.items() if known.domain == "medical"}
    chests = "chexpert chexpert-test mimic nih padchest covidx tuberculosis".split()
    assert medical == {*chests, *(name for name in synthetic.WORLDS if "xray" in name)}


def test_a_smaller_fraction_lies_in_a_larger(nih_root):
    chosen = [load_dataset("nih", nih_root, fraction=f, fraction_seed=3) for f in (0.2, 0.5)]
    small, large = map(places, chosen)
    assert (len(small), len(large)) == (8, 20) and set(small) < set(large)
    assert sorted(large) == large and chosen[1].name == "nih-0.5"
    other = load_dataset("nih", nih_root, fraction=0.5, fraction_seed=4)
    assert places(other) != large
    assert len(load_dataset("nih", nih_root, "test", fraction=0.5)) == 12


def test_validation_is_of_the_training_set(nih_root, tmp_path):
    whole = load_dataset("nih", nih_root)
    parts = data.load_splits("nih", nih_root, validation=0.25)
    paths = [*map(places, parts)]
    assert sorted(sum(paths, [])) == sorted(places(whole)) and len(whole) == 40
    # 40 patients, a finding each or two: of the rarest, the first of all stays.
    assert len(paths[1]) <= 10 and parts[1].labels[:, 4].sum() >= 1
    assert {d.options["validation"] for d in parts} == {0.25}
    assert {d.name for d in parts} == {"nih-validation0.25"}
    few = load_dataset("nih", nih_root, validation=0.25, fraction=0.5)
    assert len(few) == round(len(paths[0]) / 2) and few.name == "nih-validation0.25-0.5"
    for share in (1, 1.5, -0.5):
        call = partial(load_dataset, "nih", nih_root, validation=share)
        refuses(ValueError, call, f"--validation {share}: must be above 0")


def test_a_name_may_state_the_gap():
    name = "synthetic-xray-target~0.4"
    dataset, option = load_dataset(name), load_dataset("synthetic-xray-target", gap=0.4)
    for d in (dataset, option):
        assert d.name == name and d.options == {"gap": 0.4} and d.domain == "medical"
        assert d.where(3) == f"{name} train image 3"
        expected = synthetic.render("synthetic-xray-target", "train", 3, 32, gap=0.4)
        np.testing.assert_array_equal(d.read(3), expected)
    small = load_dataset("synthetic-natural~0.25", split="test", seed=3, size=16)
    expected = synthetic.render("synthetic-natural", "test", 9, 16, seed=3, gap=0.25)
    np.testing.assert_array_equal(small.read(9), expected)
    assert data.base_name(name) == data.base_name(f"{name}@32") == "synthetic-xray-target"
    assert data.dataset_slug(name) == name and data.dataset_slug("folder:/a/b") == "folder-b"
    assert load_dataset("synthetic-natural~1", fraction=0.01).name == "synthetic-natural~1-0.01"
    plain, named = (load_dataset(f"synthetic-natural-target{gap}") for gap in ("", "~0"))
    np.testing.assert_array_equal(plain.read(5), named.read(5))
    assert (plain.options, named.options) == ({}, {"gap": 0.0}) and named.name[-2:] == "~0"
    assert len(load_dataset("synthetic-xray+synthetic-xray~0")) == 16_000
    assert load_dataset("synthetic-xray", gap=1).name == "synthetic-xray~1"
    assert load_dataset("synthetic-xray", gap=1e-5).name == "synthetic-xray~0.00001"


GAPS = " 1.2 -0.2 0.40 1.0 .4 4e-1 0.4~0.5".split(" ")
NO_GAP = ["is no gap; write a decimal from 0 to 1", "synthetic-xray~0.4"]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("nih~0.4", {}, ["only synthetic datasets have a gap", "write nih"]),
        ("synthetic-natral~0.4", {}, ["did you mean 'synthetic-natural'"]),
        ("nih", {"gap": 0.4}, ["nih takes no option gap", "it takes: views"]),
        ("synthetic-xray", {"gap": 1.5}, ["must be 0 to 1, and not in the name"]),
        ("synthetic-xray~0.4", {"gap": 0.4}, ["must be 0 to 1, and not in the name"]),
        ("synthetic-xray", {"seed": -1}, ["seed -1"]),
        ("synthetic-xray", {"fraction": 1e-5}, ["no image", "--fraction 1e-05"]),
        ("synthetic-xray", {"split": "val"}, ["'val'", "train, test"]),
        ("nih+nih@64", {}, ["nih+nih@64", "occurs twice"]),
        ("synthetic-xray+synthetic-xray~0.4", {}, ["three channels"]),
        ("nih@64@32", {}, ["nih@64 is a pack already"]),
        ("nih@064", {}, ["unknown dataset 'nih@064'"]),
        *((f"synthetic-xray~{gap}", {}, NO_GAP) for gap in GAPS),
        ("/my/images", {}, ["did you mean 'folder:/my/images'?"]),
        *((f"{path}a", {}, [f"did you mean 'folder:{path}a'?"]) for path in ("./", "my/", "~/")),
        ("a/b.csv", {}, ["did you mean 'table:a/b.csv'?"]),
    ],
)
def test_names_and_options_that_mean_nothing(name, options, words):
    refuses(ValueError, partial(load_dataset, name, **options), *words)


def test_few_shot_counts_nesting_and_seeds(rng):
    labels = rng.permutation(np.repeat(np.arange(4), (5, 40, 7, 100)))
    chosen = {}
    for shots in (1, 2, 5):
        chosen[shots] = few_shot_indices(labels, shots, seed=3)
        assert chosen[shots].dtype == np.int64
        assert np.bincount(labels[chosen[shots]]).tolist() == [shots] * 4
        assert (np.diff(chosen[shots]) > 0).all()  # sorted, without replacement
    assert set(chosen[1]) < set(chosen[2]) < set(chosen[5])
    assert len({tuple(few_shot_indices(labels, 5, seed)) for seed in range(20)}) == 20
    # Every image of the large class has the same chance, 5 in 100 (200 seeds, 10 each).
    drawn = np.concatenate([few_shot_indices(labels, 5, seed) for seed in range(200)])
    counts = np.bincount(drawn, minlength=len(labels))[labels == 3]
    assert chisquare(counts).pvalue > 0.001 and counts.sum() == 1000


def test_few_shot_leaves_out_a_class_without_any_image():
    labels = np.array([3, 0, 3, 0, 0, 3, 1])  # none of class 2, nor of 4
    assert sorted(labels[few_shot_indices(labels, 1, 0, "abcde")]) == [0, 1, 3]
    wide = np.zeros((9, 3), np.float32)  # none of the first
    wide[:4, 1], wide[4:, 2], wide[8] = 1, 1, np.nan
    for seed in range(9):
        assert wide[few_shot_indices(wide, 2, seed)].sum(0).tolist() == [0, 2, 2]
    some = np.array([[1, np.nan], [1, 0], [1, 1]], np.float32)
    for images, shots, words in (
        (labels, 2, ["--shots 2", "class b has only 1"]),
        (labels, 0, ["--shots 0"]),
        (some, 2, ["--shots 2", "b", "only 1"]),
        (0 * wide, 2, ["no training image"]),
    ):
        refuses(ValueError, partial(few_shot_indices, images, shots, 0, "abcde"), *words)


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


@pytest.mark.parametrize("images, batch", [(12, 4), (10, 4), (7, 20), (1, 3)])
def test_shuffle_shows_every_image_once_an_epoch(images, batch):
    steps = -(-3 * images // batch)
    parts = [batch_indices(step, images, batch, seed=5) for step in range(steps)]
    assert all(len(indices) == len(draws) == batch for indices, draws in parts)
    indices, epochs = (np.concatenate(words) for words in zip(*parts))
    orders = indices[: 3 * images].reshape(3, images)
    assert (epochs[: 3 * images].reshape(3, images) == np.arange(3)[:, None]).all()
    for epoch, order in enumerate(orders):
        expected = np.arange(images)
        np.random.default_rng([5, 1, epoch]).shuffle(expected)  # the seed, the purpose, the epoch
        assert order.tolist() == expected.tolist()


def test_batches_depend_on_seed_and_step_alone():
    labels = np.arange(50) % 3
    for sampling in ("shuffle", "replacement", "balanced"):
        call = partial(batch_indices, sampling=sampling, classes=data.by_class(labels))
        forth = [call(step, 50, 8, 2)[0] for step in range(30)]
        batch_indices(0, 9, 4, 0)  # another order is looked at in between
        back = [call(step, 50, 8, 2)[0] for step in reversed(range(30))][::-1]
        np.testing.assert_array_equal(forth, back)
        assert (call(0, 50, 8, 3)[0] != forth[0]).any()
        assert len({tuple(indices) for indices in forth}) == 30
    refuses(ValueError, lambda: batch_indices(0, 10, 4, -1), "--seed -1", "0 or more")
    refuses(ValueError, lambda: batch_indices(0, 10, 4, 0, "sorted"), "'sorted'")


@pytest.mark.parametrize("sampling", ("replacement", "balanced"))
def test_draws_are_even_and_anew(sampling):
    labels = np.repeat([0, 2, 3], (900, 90, 10))  # class 1 has no image
    about = 1000, 100, 0, sampling, data.by_class(labels)
    parts = [batch_indices(step, *about) for step in range(300)]
    indices, draws = (np.concatenate(words) for words in zip(*parts))
    counts = np.bincount(labels[indices])
    even = [27_000, 2700, 300] if sampling == "replacement" else [10_000] * 3
    assert counts[1] == 0 and chisquare(counts[[0, 2, 3]], even).pvalue > 0.001
    within = np.bincount(indices, minlength=1000)[labels == 2]
    assert chisquare(within).pvalue > 0.001
    assert len(np.unique(draws)) == 30_000  # so no augmentation comes twice


def array_dataset(rng, multilabel=False, count=23):
    reader = Array("array", noise(rng, count, 20, 26, 3))
    labels = rng.integers(4, size=count)
    if multilabel:
        labels = rng.choice(np.array([0, 1, np.nan], np.float32), (count, 5))
    task = "multilabel" if multilabel else "multiclass"
    return ImageDataset("array", reader, labels, "abcde", task, "natural")


CROP = Pipeline(partial(resize_shorter, size=18), partial(random_crop_flip, size=12))


def same(one, other):
    """Bitwise; a NaN equals a NaN."""
    return np.array_equal(one.numpy().view(np.uint8), other.numpy().view(np.uint8))


@pytest.mark.parametrize("sampling", ["shuffle", "replacement", "balanced"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same(rng, sampling, pairs, ranks):
    make = partial(Batches, array_dataset(rng, sampling != "balanced"), CROP, 8, 3, sampling)
    alone = make()
    assert len(alone) == 3
    for step in range(3):
        images, labels, count = alone[step]
        parts = [make(rank=rank, ranks=ranks, pairs=pairs)[step] for rank in range(ranks)]
        assert count == (labels == labels).sum() and {part[2] for part in parts} == {count}
        unit = 1 + pairs
        for rank, (part, part_labels, _) in enumerate(parts):
            mine = [i for i in range(len(images)) if i // unit % ranks == rank]
            assert torch.equal(part, images[mine]) and same(part_labels, labels[mine])


@pytest.mark.parametrize("step, batch_size", [(0, 30), (1, 30), (3, 8)])
def test_batch_is_what_the_pipeline_makes(rng, step, batch_size):
    """The augmentation depends on the seed, the epoch and the image alone."""
    dataset = array_dataset(rng)
    images, labels, _ = Batches(dataset, CROP, batch_size, seed=9)[step]
    indices, draws = batch_indices(step, 23, batch_size, 9)
    assert images.dtype == torch.uint8 and images.shape == (batch_size, 3, 12, 12)
    assert labels.tolist() == dataset.labels[indices].tolist()
    for image, i, draw in zip(images, indices, draws):
        generator = np.random.default_rng([9, 3, draw, i])
        assert torch.equal(image, CROP.augment(CROP.prepare(dataset.read(i)), generator))


@pytest.mark.parametrize("images", [2, 8, 23])
@pytest.mark.parametrize("ranks, workers", [(1, 0), (4, 0), (2, 1)])
def test_in_order_one_rank_has_each_image(rng, images, ranks, workers):
    dataset, seen = array_dataset(rng, count=images), []
    pipeline = Pipeline(partial(transforms.resize_square, size=9), keep)
    for rank in range(ranks):
        for rows, part in in_order(dataset, pipeline, 8, rank, ranks, workers):
            assert len(rows) == len(part) > 0 and rows.dtype == torch.int64
            assert (rows // 8 == rows[0] // 8).all() and (rows % 8 % ranks == rank).all()
            for row, image in zip(rows, part):
                assert torch.equal(image, pipeline.read(dataset, int(row)))
            seen += rows.tolist()
    assert sorted(seen) == list(range(images))


def test_datasets_travel_to_spawned_processes(chests, pets_at_home):
    """macOS spawns its loader workers: everything in a Batches must pickle."""
    uneven = load_folder(pets_at_home)
    medical = Pipeline(partial(transforms.xray_square, size=8), transforms.random_affine_flip)
    many = [
        Batches(uneven, CROP, 4),
        Batches(*preload(chests.load(), medical), 3),
        Batches(load_dataset("synthetic-natural").subset([3, 1]), CROP, 2),
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for batches in many:
            images, labels, count = pool.apply(operator.getitem, (batches, 1))
            assert same(images, batches[1][0]) and same(labels, batches[1][1])
            assert count == batches[1][2]


def test_list(nih_root, tmp_path, rng):
    (tmp_path / "NIH-ChestXRay-14").symlink_to(nih_root / "NIH-ChestXRay-14")
    for split in data.SPLITS:
        save(tmp_path / "photos" / split / "cat" / "0.png", noise(rng, 12, 15, 3))
    for name in ("nih", f"folder:{tmp_path}/photos"):
        pack(name, 8, root=tmp_path)
    (tmp_path / "PadChest").mkdir()
    (tmp_path / "nih@9.part").mkdir()
    rows = rows_of(run_data("list", "--data-dir", tmp_path))
    assert [*rows][2:] == [*data.DATASETS, "nih@8", f"folder:{tmp_path}/photos@8"]
    for name in ("nih", "nih@8"):
        assert rows[name][1:] == ["yes", "40 + 12", "14", "medical"]
        assert (tmp_path / rows[name][0]).is_dir()
    assert rows["synthetic-natural"] == ["(made)", "yes", "8,000 + 1,000", "36", "natural"]
    assert rows[f"folder:{tmp_path}/photos@8"] == ["photos@8", "yes", "1 + 1", "1", "natural"]
    assert {rows[name][1] for name in ("mimic", "pets", "chexpert")} == {"no"}
    assert rows["padchest"][1] == "damaged" and "PADCHEST" in " ".join(rows["padchest"])


@pytest.mark.parametrize("rest", ["", "@20", "/@20"])
def test_a_path_of_ones_own_has_one_name(rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = f"{tmp_path}/my/images", "my/images", "my//images/", "./my/x/../images", "~/my/images"
    name = f"folder:{tmp_path}/my/images" + rest.strip("/")
    assert {data.dataset_name(f"folder:{path}{rest}") for path in paths} == {name}
    table = f"nih+table:{tmp_path}/a+b.csv"
    assert data.dataset_name("nih+table:./a+b.csv") == data.dataset_name(table) == table
    assert data.dataset_name("synthetic-natural~0.4+nih@20") == "synthetic-natural~0.4+nih@20"
