"""Natural images: CIFAR, Flowers-102, Pets, ImageNet, and folders of one's own.

Each function of a dataset is (name, root, split, **its options) -> ImageDataset.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torchvision

from readers.archives import class_index
from readers.images import Array, Files, ImageDataset, encoded, need, own_domain


def _torchvision(dataset, name, root, download, **options):
    """torchvision's dataset; its 'not found' becomes a line that names directory and mend."""
    try:
        return dataset(root, download=download, **options)
    except (ImportError, RuntimeError, OSError, ValueError) as error:  # Flowers need scipy
        below = f"{root} ({' '.join(str(error).split())})"
        mend = "give --data-dir, or --download"
        raise FileNotFoundError(f"{name}: not whole below {below}; {mend}") from error


def cifar(name, root, split, download=False):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), by its name."""
    build = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    source = _torchvision(build[name], name, root, download, train=split == "train")
    labels = np.array(source.targets, np.int64)
    reader = Array(f"{name} {split}", source.data)
    return ImageDataset(name, reader, labels, source.classes, "multiclass", "natural")


def flowers(name, root, split, download=False):
    """Oxford Flowers-102 (Nilsback and Zisserman 2008).

    As in the study, train is the official test list, test the official train and validation ones.
    """
    parts = ["test"] if split == "train" else ["train", "val"]
    build = torchvision.datasets.Flowers102
    sources = [_torchvision(build, name, root, download, split=part) for part in parts]
    paths = [path for source in sources for path in source._image_files]
    labels = [label for source in sources for label in source._labels]
    return _path_dataset(name, root, paths, labels, build.classes)


def pets(name, root, split, download=False):
    """Oxford-IIIT Pets (Parkhi et al. 2012); train is its trainval list."""
    part = "trainval" if split == "train" else "test"
    source = _torchvision(torchvision.datasets.OxfordIIITPet, name, root, download, split=part)
    return _path_dataset(name, root, source._images, source._labels, source.classes)


def _path_dataset(name, root, paths, labels, classes):
    reader = Files(str(root), encoded(os.path.relpath(path, root) for path in paths), "RGB")
    return ImageDataset(name, reader, np.array(labels, np.int64), classes, "multiclass", "natural")


def imagenet1k(name, root, split, cache_dir=None):
    """ILSVRC 2012 (Russakovsky et al. 2015, arXiv:1409.0575); test is its validation set."""
    train, val = (root / "imagenet-1K" / part for part in ("train", "val"))
    need(name, train, val)
    return _class_split(name, train, val, split, cache_dir)


def imagenet21k(name, root, split, cache_dir=None):
    """ImageNet-21k; one file in a hundred, by the hash of its name, is held out for the test."""
    folder = root / "imagenet-21K"
    need(name, folder)
    index = class_index(folder, cache_dir, held_out)
    held_from = int(index["held_from"])
    images = slice(0, held_from) if split == "train" else slice(held_from, None)
    return _class_dataset(name, folder, index, images)


def held_out(file):
    """Whether an image belongs to the test split of imagenet21k: by its file name alone."""
    return zlib.crc32(os.path.basename(file)) % 100 == 0


def folder(name, root, split, cache_dir=None, domain="natural"):
    """PATH/train/CLASS/*, PATH/test/CLASS/*; classes are the sorted names below train/.

    domain: "natural", or "medical" for X-rays, which are read as grey.
    """
    train, test = (Path(name.removeprefix("folder:")) / part for part in ("train", "test"))
    for path in (train, test):
        if not path.is_dir():
            mend = f"images belong in PATH/{path.name}/CLASS/"
            raise FileNotFoundError(f"{name}: no directory {path}; {mend}")
    return _class_split(name, train, test, split, cache_dir, domain)


def _class_split(name, train, test, split, cache_dir, domain="natural"):
    folder, like = (train, None) if split == "train" else (test, train)
    return _class_dataset(name, folder, class_index(folder, cache_dir, like=like), domain=domain)


def _class_dataset(name, folder, index, images=slice(None), domain="natural"):
    """The dataset of these images of a class_index of the folder."""
    names, labels = index["names"][images], index["labels"][images]
    classes = list(map(os.fsdecode, index["classes"]))
    if not len(names):
        raise ValueError(f"{name}: {folder} holds no image for this split")
    mode, options = own_domain(domain)
    places = [index[key][images] for key in ("starts", "sizes") if key in index]
    reader = Files(str(folder), names, mode, classes, labels, *places)
    return ImageDataset(name, reader, labels, classes, "multiclass", domain, options=options)
