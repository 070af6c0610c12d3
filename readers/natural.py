"""Natural images: CIFAR, Flowers-102, Pets, ImageNet; images of one's own, in folders or tables.

Each function of a dataset is (name, root, split, **its options) -> ImageDataset.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torchvision

from readers import tables
from readers.archives import class_index
from readers.images import Array, Files, ImageDataset, encoded, need, own_domain
from readers.labels import hold_out


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
    build = getattr(torchvision.datasets, name.upper())
    source = _torchvision(build, name, root, download, train=split == "train")
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
    return _class_dataset(name, split, cache_dir, train, val)


def imagenet21k(name, root, split, cache_dir=None):
    """ImageNet-21k; one file in a hundred, by the hash of its name, is held out for the test."""
    need(name, root / "imagenet-21K")
    return _class_dataset(name, split, cache_dir, root / "imagenet-21K")


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
    return _class_dataset(name, split, cache_dir, train, test, domain)


def _class_dataset(name, split, cache_dir, train, test=None, domain="natural"):
    """Images in a directory or archive a class; test None: that of `held_out` lies in train."""
    if test:
        folder, like = (train, None) if split == "train" else (test, train)
        index, images = class_index(folder, cache_dir, like=like), slice(None)
    else:
        folder, index = train, class_index(train, cache_dir, held_out)
        held_from = int(index["held_from"])
        images = slice(0, held_from) if split == "train" else slice(held_from, None)
    names, labels = index["names"][images], index["labels"][images]
    classes = list(map(os.fsdecode, index["classes"]))
    if not len(names):
        raise ValueError(f"{name}: {folder} holds no image for this split")
    mode, options = own_domain(domain)
    reader = Files(str(folder), names, mode)
    if "starts" in index:
        places = {key: index[key][images] for key in ("starts", "sizes")}
        reader = reader._replace(classes=classes, labels=labels, **places)
    return ImageDataset(name, reader, labels, classes, "multiclass", domain, options=options)


def table(name, root, split, domain="natural", uncertain="ignore", blank="ignore"):
    """The images that the rows of a CSV file name.

    Columns: path, relative to the file; split (train or test) and patient, both optional; then
    either label, the class, or a column a finding: 1, 0, -1 (uncertain) or blank. Without split
    `labels.hold_out` chooses a fifth as the test set. domain: as of `folder`. uncertain, blank: of
    `tables.finding`. Raises ValueError naming the file and, of a row, its line.
    """
    path = Path(name.removeprefix("table:"))
    if not path.is_file() or not path.name.endswith((".csv", ".csv.gz")):
        mend = "name a table that ends in .csv or .csv.gz"
        raise FileNotFoundError(f"{name}: no file {path}; {mend}")
    mode, options = own_domain(domain)
    patient, label = tables.Names(), tables.Names()
    known = {"path": tables.BELOW, "split": tables.one_of({"train": False, "test": True}, bool)}
    known |= {"patient": patient, "label": label}
    mark, choices = tables.finding(uncertain, blank)
    _, (header,) = next(tables.rows(path), (0, [[]]))
    for place, column in enumerate(header, 1):
        if not column.strip():
            mend = "name it, or remove it"
            raise ValueError(f"{path}: column {place} of its header has no name; {mend}")
        if column not in known and (meant := column.strip().lower()) in known:
            raise ValueError(f"{path}: column {column!r} of its header; write {meant!r}")
    findings = [column for column in header if column not in known]
    others = ", ".join([*findings, *(f"--{choice}" for choice in choices)])
    if "path" in header and "label" in header and others:
        raise ValueError(f"{path}: a label and {others}; keep label, or a column a finding")
    if "label" not in header and "path" in header and not findings:
        raise ValueError(f"{path}: neither a column label nor one a finding; add one")
    names, test, patients, numbers, *marks = tables.read_table(
        path, known | dict.fromkeys(findings, mark), optional=("split", "patient", "label")
    )
    tables.refuse_repeats(names, path, rows=True)
    if numbers is None:
        task, classes, labels = "multilabel", findings, np.stack(marks, axis=1)
        training = labels if test is None or test.all() else labels[~test]
        for column in np.flatnonzero(np.isnan(training).all(0)):
            mend = "to train on; fill it or drop it"
            raise ValueError(f"{path}: finding {classes[column]} has no mark {mend}")
    else:
        task, classes = "multiclass", sorted(label.numbers)
        labels = np.argsort(np.argsort([*label.numbers]))[numbers]
        if len(classes) < 2:
            raise ValueError(f"{path}: all images are of one class, {classes[0]}; a task needs two")
    if test is None:
        test = hold_out(labels, patients, 0.2)
        of = "images" if patients is None else "patients"
        options["split"] = f"a fifth of the {of}, by class, drawn"
    elif patients is not None:
        firsts = np.unique(patients, return_index=True)[1]
        for row in np.flatnonzero(test != test[firsts][patients]):
            line, both = tables.line_of(path, row), [*patient.numbers][patients[row]]
            mend = "choose one, or leave out the column split"
            raise ValueError(f"{path}, line {line}: patient {both} is in train and in test; {mend}")
    for cls in [] if numbers is None or test.all() else np.setdiff1d(labels, labels[~test]):
        line, unseen = tables.line_of(path, np.argmax(labels == cls)), classes[cls]
        raise ValueError(f"{path}, line {line}: class {unseen} has no training image; add some")
    mine = np.flatnonzero(test if split == "test" else ~test)
    if not len(mine):
        mend = "add some" + ", or leave out split" * ("split" in header)
        raise ValueError(f"{path}: no row is of the {split} split; {mend}")
    reader, options = Files(str(path.parent), names[mine], mode), options | choices
    groups = None if patients is None else patients[mine]
    return ImageDataset(name, reader, labels[mine], classes, task, domain, groups, options=options)
