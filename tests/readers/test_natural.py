"""What torchvision reads, and folders of one's own (imagenet: test_archives.py)."""

import os
import pickle
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import refuses
from trees import load_folder, noise, pixels_of, save, write

from data import load_dataset


def test_folder(pets_at_home):
    train, test = load_folder(pets_at_home), load_folder(pets_at_home, "test")
    assert train.classes == test.classes == ("Dog", "cat")  # sorted as torchvision sorts
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.labels.dtype == np.int64
    assert (train.task, train.domain, train.groups) == ("multiclass", "natural", None)
    image, label = train[4]
    np.testing.assert_array_equal(image, pixels_of(pets_at_home / "train" / "cat" / "1.png"))
    assert label.dtype == torch.int64 and label.item() == 1


def test_folder_refusals(pets_at_home):
    train, test = pets_at_home / "train", pets_at_home / "test"
    (test / "cow").mkdir()
    refuses(ValueError, partial(load_folder, pets_at_home, "test"), test / "cow", "no class")
    (test / "cow").rename(train / "cow")
    refuses(ValueError, partial(load_folder, pets_at_home), train / "cow", "no image")
    train.rename(pets_at_home / "training")
    refuses(FileNotFoundError, partial(load_folder, pets_at_home), train, "PATH/train/CLASS")
    train.mkdir()
    refuses(ValueError, partial(load_folder, pets_at_home), train, "no class directory")


@pytest.mark.parametrize("split, count", [("train", 2000), ("test", 1000)])
def test_folder_real_equals_torchvision(real_data, split, count):
    dataset = load_folder(real_data / "cifar10-folder", split)
    reference = torchvision.datasets.ImageFolder(real_data / "cifar10-folder" / split)
    assert len(dataset) == len(reference) == count
    assert dataset.classes == tuple(reference.classes) and len(dataset.classes) == 10
    assert dataset.labels.tolist() == reference.targets
    for i in range(0, count, 7):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(reference.samples[i][0]))


def whole(monkeypatch, module):
    """torchvision's checksums are of the real files: any file that exists will do here."""
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.mark.parametrize("name, key", [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar(tmp_path, rng, monkeypatch, name, key):
    whole(monkeypatch, torchvision.datasets.cifar)
    build = getattr(torchvision.datasets, name)
    base, classes = tmp_path / build.base_folder, [f"class {i}" for i in range(int(name[5:]))]
    base.mkdir()
    (base / build.meta["filename"]).write_bytes(pickle.dumps({build.meta["key"]: classes}))
    count, files = 2 * len(build.train_list), [*build.train_list, *build.test_list]
    pixels = noise(rng, count + 2, 3, 32, 32)
    labels = rng.integers(len(classes), size=count + 2).tolist()
    for i, (file, _) in enumerate(files):
        part = slice(2 * i, 2 * i + 2)
        content = {"data": pixels[part].reshape(2, 3072), key: labels[part]}
        (base / file).write_bytes(pickle.dumps(content | {"coarse_labels": [1, 1]}))
    for split, part in (("train", slice(count)), ("test", slice(count, None))):
        dataset = load_dataset(name.lower(), tmp_path, split)
        assert dataset.classes == tuple(classes)
        assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == labels[part]
        for i, expected in enumerate(pixels[part]):
            np.testing.assert_array_equal(dataset.read(i), expected)


def test_flowers(tmp_path, rng, monkeypatch):
    whole(monkeypatch, torchvision.datasets.flowers102)
    base = tmp_path / "flowers-102"
    for image in range(1, 8):
        save(base / "jpg" / f"image_{image:05d}.jpg", noise(rng, 6, 4 + image, 3))
    labels = np.array([[77, 1, 102, 3, 3, 50, 2]])  # counted from 1
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    sets = {"trnid": [[2, 1]], "valid": [[7, 5]], "tstid": [[6, 3, 4]]}
    scipy.io.savemat(base / "setid.mat", {name: np.array(ids) for name, ids in sets.items()})
    train, test = (load_dataset("flowers102", tmp_path, split) for split in ("train", "test"))
    # The study's rule: the official test list is trained on, train + validation is tested on.
    assert train.labels.tolist() == [49, 101, 2] and test.labels.tolist() == [0, 76, 1, 2]
    assert train.labels.dtype == np.int64
    for dataset, images in ((train, (6, 3, 4)), (test, (2, 1, 7, 5))):
        assert len(dataset.classes) == 102 and dataset.classes[76] == "passion flower"
        for i, image in enumerate(images):
            path = base / "jpg" / f"image_{image:05d}.jpg"
            np.testing.assert_array_equal(dataset.read(i), pixels_of(path))


def test_pets(tmp_path, rng):
    base = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": ["Abyssinian_2 1 1 1", "great_pyrenees_9 2 2 1", "Abyssinian_5 1 1 1"]}
    lists["test"] = ["great_pyrenees_1 2 2 1", "Abyssinian_7 1 1 1"]
    for file, lines in lists.items():
        write(base / "annotations" / f"{file}.txt", "\n".join(lines) + "\n")
        for line in lines:
            save(base / "images" / f"{line.split()[0]}.jpg", noise(rng, 7, 5, 3))
    train, test = (load_dataset("pets", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ("Abyssinian", "Great Pyrenees")
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1, 0]
    expected = pixels_of(base / "images" / "great_pyrenees_9.jpg")
    np.testing.assert_array_equal(train.read(1), expected)
    (base / "annotations" / "test.txt").write_text("half a line")
    refuses(FileNotFoundError, lambda: load_dataset("pets", tmp_path, "test"), tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets"])
def test_missing_data_names_directory_and_mend(tmp_path, name):
    call = partial(load_dataset, name, tmp_path / "nowhere")
    refuses(FileNotFoundError, call, name, tmp_path / "nowhere", "--data-dir", "--download")


def test_failed_download_says_so(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    call = partial(load_dataset, "cifar10", tmp_path, download=True)
    refuses(FileNotFoundError, call, "download", tmp_path, "no route to host")
