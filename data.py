"""Datasets by name, the study's transforms, few-shot subsets, and batches that any layout repeats.

Data flows: `load_dataset` -> `ImageDataset` (uint8 images and labels) -> a `Pipeline` (what is done
to a pixel once, what is drawn anew each time) -> `Batches` (the global batch of step s, or one
rank's part of it) -> `loader` (the same, read ahead by worker processes).

Images stay uint8 until they are on the device; engine.py normalises them there.
"""

import argparse
import atexit
import collections
import contextlib
import csv
import difflib
import fcntl
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import synthetic

# Mean and standard deviation of pixels in [0,1], by the domain of the pre-training source.
NORMALIZATION = {
    "natural": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "medical": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SPLITS = ("train", "test")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def read_image(file, mode, size=None, name=None):
    """Decodes one file to uint8 (C,H,W). mode: "RGB" (natural) or "L" (X-ray, C = 1).

    file: a path, or a binary stream called `name` in messages. Grey is copied to RGB; colour
    becomes luma for "L"; alpha is dropped; 16-bit grey is divided by 257, so that 65535 becomes
    255. size: the shorter side that will be needed, in pixels: a JPEG is then decoded at 1/2, 1/4
    or 1/8 where that leaves twice as much. Raises ValueError naming an unreadable or truncated
    file.
    """
    name = name or file
    try:
        with Image.open(file) as image:
            # Pillow only warns, and filters of warnings are not safe among preload's threads.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, a decompression bomb?")
            if size:
                image.draft(None, (2 * size, 2 * size))  # of all formats only JPEG has scales
            pixels = _to_uint8(image, mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: unreadable image ({error}); mend or remove it") from error
    pixels = torch.from_numpy(pixels)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _to_uint8(image, mode):
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert(mode))
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("neither 8- nor 16-bit pixels")
    grey = np.rint(pixels / 257).astype(np.uint8)
    return grey if mode == "L" else np.repeat(grey[..., None], 3, axis=2)


# ------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------


class ImageDataset(torch.utils.data.Dataset):
    """Images with labels; [i] -> (uint8 (C,H,W), label).

    name: as given to load_dataset. reader: one of the readers below. labels: (N,) int64 for
    task "multiclass", (N,C) float32 in {0,1,nan} for "multilabel". classes: tuple of str.
    domain: "natural" or "medical". groups: (N,) patient ids, or None. size: the images' side in
    pixels where the set is made at a side of its own (the synthetic ones), else None. options:
    what shaped it, as used. dropped: {reason: number of images} that the options left out.
    """

    def __init__(
        self,
        name,
        reader,
        labels,
        classes,
        task,
        domain,
        groups=None,
        size=None,
        options=None,
        dropped=None,
    ):
        self.name, self.reader, self.labels, self.classes = name, reader, labels, tuple(classes)
        self.task, self.domain, self.groups, self.size = task, domain, groups, size
        self.options, self.dropped = options or {}, dropped or {}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.read(i), torch.tensor(self.labels[i])

    def read(self, i, size=None):
        """The image i as a uint8 tensor (C,H,W); a negative i counts from the end.

        size: the shorter side that will be needed, in pixels; None: all that the file has.
        """
        return self.reader(range(len(self))[i], size)

    def where(self, i):
        """The file of image i, or what else to call it in a message."""
        return self.reader.where(range(len(self))[i])

    def subset(self, indices):
        """The same dataset with only these images: (M,) int, in this order, or (N,) bool."""
        indices = np.arange(len(self))[indices]
        return self.replace(
            reader=Subset(self.reader, indices),
            labels=self.labels[indices],
            groups=None if self.groups is None else self.groups[indices],
        )

    def replace(self, **changes):
        """A copy with some attributes changed."""
        return ImageDataset(**(vars(self) | changes))


# Readers: (i, size) -> uint8 (C,H,W), and .where(i) -> str. They hold arrays, no object an image.


class Files(NamedTuple):
    """Image files: names (N,) bytes below a folder; mode: of read_image."""

    folder: str
    names: np.ndarray
    mode: str

    def __call__(self, i, size=None):
        return read_image(self.where(i), self.mode, size)

    def where(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i]))


class Array(NamedTuple):
    """Images in memory: (N,H,W,C) uint8."""

    name: str
    images: np.ndarray

    def __call__(self, i, size=None):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)

    def where(self, i):
        return f"{self.name} image {i}"


class Rendered(NamedTuple):
    """Images of a synthetic world, made when read."""

    name: str
    split: str
    side: int
    seed: int

    def __call__(self, i, size=None):
        return torch.from_numpy(
            synthetic.render(self.name, self.split, int(i), self.side, self.seed)
        )

    def where(self, i):
        return f"{self.name} {self.split} image {i}"


class Members(NamedTuple):
    """Members of one tar archive a class, read in place: names (N,) bytes, labels (N,).

    starts, sizes (N,) int64: bytes in the archive folder/CLASS.tar; start -1: a file of its own.
    """

    folder: str
    classes: list
    names: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def __call__(self, i, size=None):
        if self.starts[i] < 0:
            return read_image(self.where(i), "RGB", size)
        with open(self._archive(i), "rb") as file:
            file.seek(self.starts[i])
            return read_image(io.BytesIO(file.read(self.sizes[i])), "RGB", size, self.where(i))

    def _archive(self, i):
        return os.path.join(self.folder, f"{self.classes[self.labels[i]]}.tar")

    def where(self, i):
        name = os.fsdecode(self.names[i])
        return (
            os.path.join(self.folder, name) if self.starts[i] < 0 else f"{self._archive(i)}: {name}"
        )


class Joined(NamedTuple):
    """The images of several readers, one after the other: ends (R,), of each its last index + 1."""

    readers: list
    ends: np.ndarray

    def _find(self, i):
        r = int(np.searchsorted(self.ends, i, side="right"))
        return self.readers[r], i - (self.ends[r - 1] if r else 0)

    def __call__(self, i, size=None):
        reader, i = self._find(i)
        return reader(i, size)

    def where(self, i):
        reader, i = self._find(i)
        return reader.where(i)


class Subset(NamedTuple):
    """Some images of another reader: indices (M,)."""

    reader: Callable
    indices: np.ndarray

    def __call__(self, i, size=None):
        return self.reader(self.indices[i], size)

    def where(self, i):
        return self.reader.where(self.indices[i])


class Decoded(NamedTuple):
    """Prepared images in memory, one after the other in pixels: starts (N,), shapes (N,3)."""

    pixels: torch.Tensor
    starts: np.ndarray
    shapes: np.ndarray
    original: Callable

    def __call__(self, i, size=None):
        shape = self.shapes[i]
        return self.pixels[self.starts[i] : self.starts[i] + shape.prod()].view(*shape.tolist())

    def where(self, i):
        return self.original.where(i)


class Known(NamedTuple):
    """A dataset known by name. build: (name, root, split, **its options) -> ImageDataset.

    folder: below the root, None where it needs none. listed: a table or list names its files.
    """

    build: Callable
    folder: str | None
    listed: bool = False


def load_dataset(
    name,
    root="datasets",
    split="train",
    *,
    verify=True,
    single_label=False,
    fraction=1.0,
    fraction_seed=0,
    **options,
):
    """The dataset of that name.

    name: a key of DATASETS, folder:PATH, NAME@SIZE (a pack), or several joined by "+" (a union).
    root: directory that holds the real datasets. split: "train" or "test". verify: refuse a
    dataset of which a listed file is missing. single_label: of a multi-label dataset keep the
    images with exactly one positive label, as a multi-class one. fraction: of the training
    images, in (0,1]; a smaller one lies inside a larger one of the same fraction_seed. options:
    those of the dataset (`dataset_options`), e.g. views, split_by, labels, cache_dir, download,
    and for the synthetic worlds seed and size (pixels).
    Raises ValueError for an unknown name, split, option, column or label, FileNotFoundError for a
    missing directory or file; each names it and the mend.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: must be above 0 and at most 1")
    takes = dataset_options(name)
    for option in options:
        if option not in takes:
            raise ValueError(
                f"{name} takes no option {option}; it takes: {', '.join(takes) or 'none'}"
            )
    parts = _parts(name)
    if len(parts) > 1:
        dataset = _union(parts, Path(root), split, verify, **options)
    else:
        dataset = _builder(name)(name, Path(root), split, **options)
        if verify and getattr(DATASETS.get(name), "listed", False):
            _refuse_missing(dataset)
    if single_label:
        dataset = keep_single_label(dataset)
    images = len(dataset) if split == "test" else round(fraction * len(dataset))
    if not images:
        raise ValueError(
            f"{name}: no image of the {split} split is left by the options "
            f"(--fraction {fraction:g}, {dataset.options})"
        )
    if images < len(dataset):
        chosen = generator(fraction_seed, Stream.FRACTION).permutation(len(dataset))
        dataset = dataset.subset(np.sort(chosen[:images]))
    if fraction < 1:
        changed = dataset.options | {"fraction": fraction, "fraction_seed": fraction_seed}
        dataset = dataset.replace(name=f"{name}-{fraction:g}", options=changed)
    return dataset


def _parts(name):
    """The names that a union joins; a path may hold a "+" too."""
    return [name] if name.startswith("folder:") else name.split("+")


def _builder(name):
    """The function that makes the dataset of this name: (name, root, split, **its options)."""
    original, size, _ = pack_of(name)
    if size:
        _builder(original)
        return _open_pack
    if name.startswith("folder:"):
        return _folder
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown dataset {name!r}; did you mean {near!r}? "
            f"known: {', '.join(DATASETS)}, folder:PATH, NAME@SIZE (a pack), NAME+NAME (a union)"
        )
    return DATASETS[name].build


def dataset_options(name):
    """The options that load_dataset takes for this name, beside those that all take."""
    parts = _parts(name)
    takes = ["labels"] if len(parts) > 1 else []
    for part in parts:
        own = list(inspect.signature(_builder(pack_of(part)[0])).parameters)[3:]
        takes += [option for option in own if option not in takes]
    return tuple(takes)


def base_name(name):
    """The name of the dataset itself: nih of nih@256."""
    return name.partition("@")[0]


def dataset_slug(name):
    """The name as a part of a path: folder:/a/b becomes folder-b."""
    if name.startswith("folder:"):
        return f"folder-{Path(name.removeprefix('folder:')).resolve().name}"
    return name


def keep_single_label(dataset):
    """PadChest-Cl of the study: one positive label exactly (what is not annotated is none)."""
    if dataset.task != "multilabel":
        raise ValueError(f"{dataset.name}: --single-label is for multi-label datasets")
    positive = dataset.labels == 1
    kept = positive.sum(1) == 1
    if not kept.any():
        raise ValueError(f"{dataset.name}: no image has exactly one positive label")
    dropped = dataset.dropped | {"not exactly one positive label": int((~kept).sum())}
    return dataset.subset(kept).replace(
        labels=positive[kept].argmax(1),
        task="multiclass",
        options=dataset.options | {"single_label": True},
        dropped=dropped,
    )


def _union(parts, root, split, verify, labels="intersection", **options):
    """Multi-label datasets one after the other, their labels aligned by name.

    labels: "intersection" keeps the names that all have (the study); "union" keeps every name,
    NaN where a dataset does not annotate it. Both in alphabetical order.
    """
    name = "+".join(parts)
    if labels not in ("intersection", "union"):
        raise ValueError(f"--labels {labels}: must be intersection or union")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name}: a dataset occurs twice in the union")
    members = []
    for part in parts:
        own = {key: value for key, value in options.items() if key in dataset_options(part)}
        members.append(load_dataset(part, root, split, verify=verify, **own))
        if members[-1].task != "multilabel":
            raise ValueError(f"{name}: {part} is not multi-label; a union joins labels by name")
    names = [set(member.classes) for member in members]
    classes = sorted(set.union(*names) if labels == "union" else set.intersection(*names))
    if not classes:
        have = "; ".join(f"{m.name}: {', '.join(m.classes)}" for m in members)
        raise ValueError(f"{name}: no label is common to all; --labels union keeps all ({have})")
    reader = Joined([m.reader for m in members], np.cumsum([len(m) for m in members]))
    used = {"labels": labels} | {m.name: m.options for m in members if m.options}
    dropped = {f"{m.name}: {why}": count for m in members for why, count in m.dropped.items()}
    table = np.concatenate([_columns(member, classes) for member in members])
    groups = np.concatenate([_own_groups(member) for member in members])
    return ImageDataset(
        name, reader, table, classes, "multilabel", members[0].domain, groups, None, used, dropped
    )


def _columns(dataset, classes):
    """The labels (N,len(classes)) of these names, NaN where the dataset has no such label."""
    table = np.full((len(dataset), len(classes)), np.nan, np.float32)
    for column, cls in enumerate(classes):
        if cls in dataset.classes:
            table[:, column] = dataset.labels[:, dataset.classes.index(cls)]
    return table


def _own_groups(dataset):
    """Patients that are told from those of another dataset: (N,) bytes like b"nih:61"."""
    source = base_name(dataset.name).encode() + b":"
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    return np.char.add(source, groups.astype("S"))


def missing_files(dataset):
    """Indices of the images whose files do not exist; a directory is listed once, not each file."""
    reader = dataset.reader

    @functools.lru_cache(maxsize=256)
    def listing(folder):
        path = os.path.join(reader.folder, os.fsdecode(folder))
        return frozenset(map(os.fsencode, os.listdir(path))) if os.path.isdir(path) else frozenset()

    places = (name.rpartition(b"/") for name in reader.names)
    return [i for i, (folder, _, file) in enumerate(places) if file not in listing(folder)]


def _refuse_missing(dataset):
    missing = missing_files(dataset)
    if missing:
        raise FileNotFoundError(
            f"{dataset.where(missing[0])}: listed for {dataset.name} but missing "
            f"({len(missing)} such); fetch it, or remove it from the list"
        )


# ------------------------------------------------------------------------------------------------
# Tables and lists
# ------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """How a table's column is read. dtype: of numpy.loadtxt; convert: those values -> an array.

    valid: a text -> whether it may stand there; else the error says the text `must` so.
    """

    dtype: object
    convert: Callable
    valid: Callable
    must: str


def _texts(values):
    """UTF-8 as it stands in the file: (N,) bytes, no wider than the longest."""
    letters = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    if letters[:, -1].any():
        raise ValueError("cut short")
    if letters.max() > 127:
        np.char.decode(values, "utf-8")
    return values.astype(f"S{max(1, np.count_nonzero(letters.any(0)))}")


def _is_text(text):
    with contextlib.suppress(UnicodeDecodeError):
        text.encode("latin-1").decode()
        return len(text) < 256
    return False


TEXT = Column("S256", _texts, _is_text, "be UTF-8 of less than 256 bytes")
NUMBER = Column(np.int64, np.array, str.isdecimal, "be a whole number")


def _one_of(*known):
    """The Column of texts that are one of these."""

    def convert(values):
        if not np.isin(values, [text.encode() for text in known]).all():
            raise ValueError("unknown text")
        return _texts(values)

    return Column("S32", convert, known.__contains__, f"be one of {', '.join(known)}")


def read_table(path, columns, optional=()):
    """The named columns of a CSV file (RFC 4180, UTF-8, gzipped or not) as a list of arrays.

    columns: {name: Column}; texts come as UTF-8 bytes. optional: names of columns that may be
    missing; their array is None. Blank lines are passed over. Raises ValueError naming file and
    line.
    """
    chunks = []
    try:
        with _open_table(path) as file:
            lines = filter(str.strip, file)
            header = _header(path, lines, columns, optional)
            present = {name: kind for name, kind in columns.items() if name in header}
            # All columns are read, though most to one character, so that none may be missing.
            kinds = [present[name].dtype if name in present else "U1" for name in header]
            dtype = [(str(place), kind) for place, kind in enumerate(kinds)]
            for line in lines:
                rows = np.loadtxt(
                    itertools.chain([line], lines), dtype, comments=None, delimiter=",",
                    quotechar='"', ndmin=1, max_rows=2**13,
                )  # fmt: skip
                chunks.append(
                    [kind.convert(rows[str(header.index(name))]) for name, kind in present.items()]
                )
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        _refuse_bad_line(path, columns)
        raise ValueError(f"{path}: {error}; mend it or fetch it again") from error
    if not chunks:
        raise ValueError(f"{path}: has no row below its header")
    arrays = dict(zip(present, map(np.concatenate, zip(*chunks))))
    return [arrays.get(name) for name in columns]


def _open_table(path):
    """The lines of a text file; each byte of its UTF-8 is one character (latin-1)."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    return io.TextIOWrapper(io.BufferedReader(file, 2**18), encoding="latin-1", newline="")


def _header(path, lines, columns, optional):
    """The names of a table's columns; these columns must be there, once."""
    line = next(lines, "").encode("latin-1").decode("utf-8-sig")
    header = next(csv.reader([line]), [])
    for name in columns:
        if name not in header and name not in optional:
            hint = "; is it separated by commas?" if len(header) < 2 else ""
            raise ValueError(f"has no column {name!r}, only: {', '.join(header)}{hint}")
        if header.count(name) > 1:
            raise ValueError(f"has {header.count(name)} columns {name!r}; keep one")
    return header


def _refuse_bad_line(path, columns):
    """Raises ValueError naming the first line of a table that is not as its columns must be."""
    reader = None
    try:
        with _open_table(path) as lines:
            reader = csv.reader(lines)
            header = next(reader, [])  # its first name may begin with a byte order mark
            places = [(header.index(name), name) for name in columns if name in header]
            for row in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{where}: {len(row)} columns, the header has {len(header)}")
                for place, name in places:
                    if not columns[name].valid(row[place]):
                        text = row[place].encode("latin-1").decode(errors="replace")
                        raise ValueError(f"{where}: {name} {text!r} must {columns[name].must}")
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = reader.line_num if reader else 0
        raise ValueError(f"{path}: unreadable after line {line} ({error}); mend it") from error


def _read_list(path):
    """[(line number, text)] of a text file, blank lines aside."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: lists no image")
    return lines


def _encoded(texts):
    return np.array([os.fsencode(text) for text in texts])


def _refuse_repeats(values, where):
    values, counts = np.unique(values, return_counts=True)
    if counts.max(initial=0) > 1:
        value = values[counts.argmax()]
        value = os.fsdecode(value) if isinstance(value, bytes) else value
        raise ValueError(f"{where}: {value} occurs more than once; keep one")


def _positions(keys, table, where):
    """Where each key stands in `table`, an array without repeats: (N,) int64, -1 where nowhere."""
    if np.array_equal(keys, table):  # keys are without repeats where that matters
        return np.arange(len(keys))
    _refuse_repeats(table, where)
    order = np.argsort(table)
    places = order[np.minimum(np.searchsorted(table, keys, sorter=order), len(table) - 1)]
    return np.where(table[places] == keys, places, -1)


def _need(name, *paths):
    """Raises FileNotFoundError unless all of these files and directories of a dataset exist."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: no {path}; give the directory that holds the dataset's own as --data-dir "
                "(its owner distributes it, --download cannot)"
            )


def _of_views(table, found, views, known):
    """(which rows show one of these views: (N,) bool, why the others are left out)."""
    shows = {view: found == view.encode() for view in views}
    unknown = [view for view in views if view not in known and not shows[view].any()]
    if unknown or not views:
        known = sorted({*known, *map(os.fsdecode, np.unique(found))} - {""})
        raise ValueError(f"{table}: no image of --views {unknown}; known: {', '.join(known)}")
    return np.any(list(shows.values()), axis=0), f"views other than {', '.join(views)}"


# ------------------------------------------------------------------------------------------------
# Natural and synthetic images
# ------------------------------------------------------------------------------------------------


def _synthetic(name, root, split, seed=0, size=None):
    world = synthetic.WORLDS[name]
    if not 0 <= seed < 2**63 or (size is not None and size < 1):
        raise ValueError(f"{name}: seed {seed} or size {size} is out of range")
    size = size or world.size
    labels = synthetic.labels(name, split, getattr(world, split), seed)
    reader = Rendered(name, split, size, seed)
    return ImageDataset(name, reader, labels, world.classes, world.task, world.domain, size=size)


def _torchvision(dataset, name, root, download, **options):
    """torchvision's dataset; its 'not found' becomes a line that names directory and mend."""
    try:
        return dataset(root, download=download, **options)
    except ModuleNotFoundError as error:
        message = f"{name}: torchvision needs {error.name}: pip install {error.name}"
        raise ValueError(message) from error
    except (RuntimeError, OSError, ValueError) as error:
        message = f"{name}: not found or not whole below {root}; give --data-dir, or --download"
        if download:
            message = f"{name}: download to {root} failed ({error}); try again, or give --data-dir"
        raise FileNotFoundError(message) from error


def _cifar(name, root, split, download=False):
    build = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    source = _torchvision(build[name], name, root, download, train=split == "train")
    labels = np.array(source.targets, np.int64)
    reader = Array(f"{name} {split}", source.data)
    return ImageDataset(name, reader, labels, source.classes, "multiclass", "natural")


def _flowers(name, root, split, download=False):
    # The study trains on the official test list and tests on train + validation.
    parts = {"train": ("test",), "test": ("train", "val")}[split]
    build = torchvision.datasets.Flowers102
    sources = [_torchvision(build, name, root, download, split=part) for part in parts]
    paths = [path for source in sources for path in source._image_files]
    labels = [label for source in sources for label in source._labels]
    classes = getattr(build, "classes", [str(i) for i in range(102)])
    return _path_dataset(name, root, paths, labels, classes)


def _pets(name, root, split, download=False):
    part = {"train": "trainval", "test": "test"}[split]
    source = _torchvision(torchvision.datasets.OxfordIIITPet, name, root, download, split=part)
    return _path_dataset(name, root, source._images, source._labels, source.classes)


def _path_dataset(name, root, paths, labels, classes):
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{name}: no {path}; remove its directory, then --download")
    reader = Files(str(root), _encoded(os.path.relpath(path, root) for path in paths), "RGB")
    return ImageDataset(name, reader, np.array(labels, np.int64), classes, "multiclass", "natural")


CACHE_FROM = 50_000  # images: the index of a larger set is kept on disk


def _imagenet1k(name, root, split, cache_dir=None):
    """ILSVRC 2012 (Russakovsky et al. 2015, arXiv:1409.0575); test is its validation set."""
    folder = root / "imagenet-1K"
    _need(name, folder / "train", folder / "val")
    return _class_dataset(name, folder, {"train": "train", "test": "val"}[split], cache_dir)


def _imagenet21k(name, root, split, cache_dir=None):
    """ImageNet-21k; one file in a hundred, by the hash of its name, is held out for the test."""
    folder = root / "imagenet-21K"
    _need(name, folder)
    index = class_index(folder, cache_dir, held_out)
    part = slice(
        *{"train": (0, int(index["held_from"])), "test": (int(index["held_from"]), None)}[split]
    )
    return _indexed(name, folder, index, part)


def held_out(file):
    """Whether an image belongs to the test split of imagenet21k: by its file name alone."""
    return zlib.crc32(os.path.basename(file)) % 100 == 0


def _folder(name, root, split, cache_dir=None):
    """PATH/train/CLASS/*, PATH/test/CLASS/*; classes are the sorted names below train/."""
    path = Path(name.removeprefix("folder:"))
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(
                f"{name}: no directory {path / part}; images belong in PATH/train/CLASS/ and "
                "PATH/test/CLASS/"
            )
    return _class_dataset(name, path, split, cache_dir)


def _class_dataset(name, folder, part, cache_dir):
    """FOLDER/PART/CLASS/* or FOLDER/PART/CLASS.tar; the classes are those below train/."""
    classes, found = ({cls for cls, _ in _class_entries(folder / p)} for p in ("train", part))
    for unknown in sorted(found - classes):
        raise ValueError(f"{folder / part / unknown}: no class of that name in {folder / 'train'}")
    for absent in sorted(classes - found):
        raise ValueError(f"{folder / part / absent}: the class has no image; add some or drop it")
    return _indexed(name, folder / part, class_index(folder / part, cache_dir), slice(None))


def _indexed(name, folder, index, part):
    classes = list(map(os.fsdecode, index["classes"]))
    names, labels = index["names"][part], index["labels"][part]
    if not len(names):
        raise ValueError(f"{name}: {folder} holds no image for this split")
    reader = Files(str(folder), names, "RGB")
    if "starts" in index:
        reader = Members(
            str(folder), classes, names, labels, index["starts"][part], index["sizes"][part]
        )
    return ImageDataset(name, reader, labels, classes, "multiclass", "natural")


def _class_entries(folder):
    """[(class, its directory entry)], sorted: directories, or archives CLASS.tar."""
    entries = {}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir() and not entry.name.endswith(".tar"):
            raise ValueError(
                f"{entry.path}: neither a class directory nor CLASS.tar; move it out of the dataset"
            )
        cls = entry.name if entry.is_dir() else entry.name.removesuffix(".tar")
        if cls in entries:
            raise ValueError(f"{entry.path}: {cls} and {cls}.tar are both there; remove one")
        entries[cls] = entry
    if not entries:
        raise ValueError(f"{folder}: holds no class directory")
    return sorted(entries.items())


def class_index(folder, cache_dir=None, held_out=None):
    """The images of a folder of classes as arrays, class by class and sorted by name.

    Returns {"classes": (C,) bytes, "names": (N,) bytes, "labels": (N,) int64} and, when classes
    are archives, "starts" and "sizes" (N,) int64: the bytes of the archive that an image takes.
    held_out: function of a name; such images come last, from "held_from" on. From CACHE_FROM
    images on, the arrays are kept in a directory beside the data, or below cache_dir, and mapped
    into memory; they are made anew when a class directory or archive has changed.
    """
    entries = _class_entries(folder)
    key = hashlib.sha256(f"1 {held_out and held_out.__name__} {bool(cache_dir)}\n".encode())
    for _, entry in entries:
        stat = entry.stat()
        size = None if entry.is_dir() else stat.st_size
        key.update(os.fsencode(f"{entry.name} {size} {stat.st_mtime_ns}\n"))
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    stem = Path(cache_dir or folder) / f".index-{place if cache_dir else ''}"
    cache = Path(f"{stem}{key.hexdigest()[:24]}")
    index = _open_arrays(cache)
    if index is None:
        index = _build_index(entries, held_out)
        if len(index["names"]) >= CACHE_FROM:
            index = _keep_arrays(cache, stem, index, required=cache_dir is not None)
    return index


def _build_index(entries, held_out):
    archives = any(not entry.is_dir() for _, entry in entries)
    columns = []  # of each class: names, labels, starts, sizes
    for label, (_, entry) in enumerate(tqdm(entries, "index", disable=len(entries) < 1000)):
        names, places = _class_images(entry)
        if not len(names):
            raise ValueError(f"{entry.path}: the class has no image; add some or drop it")
        columns.append((names, np.full(len(names), label, np.int64), *places.T))
    names, labels, starts, sizes = map(np.concatenate, zip(*columns))
    index = {"names": names, "labels": labels}
    if archives:
        index |= {"starts": starts, "sizes": sizes}
    if held_out:
        held = np.fromiter(map(held_out, names), bool, len(names))
        order = np.argsort(held, kind="stable")
        index = {key: values[order] for key, values in index.items()}
        index["held_from"] = np.array(len(held) - held.sum())
    return index | {"classes": np.array([os.fsencode(cls) for cls, _ in entries])}


def _class_images(entry):
    """(names (N,) bytes, places (N,2) int64: start and size in the archive, -1 for files)."""
    if entry.is_dir():
        names = [f"{entry.name}/{file}" for file in _image_names(entry.path)]
        return np.array(list(map(os.fsencode, names)), "S"), np.full((len(names), 2), -1)
    members = _tar_members(entry.path)
    names = np.array([os.fsencode(name) for name, _, _ in members], "S")
    return names, np.array([member[1:] for member in members], np.int64).reshape(-1, 2)


def _image_names(folder):
    """Sorted file names; hidden files are passed over, any other file must be an image."""
    names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    for name in names:
        _refuse_no_image(name, os.path.join(folder, name))
    return names


def _refuse_no_image(name, where):
    if not name.lower().endswith(IMAGE_ENDINGS):
        raise ValueError(
            f"{where}: not an image by its ending ({' '.join(IMAGE_ENDINGS)}); "
            "move it out of the dataset"
        )


def _tar_members(path):
    """[(name, start, size)] of a tar's images, by name; nothing is read or written but headers."""
    members = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                where = f"{path}: {member.name}"
                if member.isdir() or os.path.basename(member.name).startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{where}: a link or device, not a file; make the tar anew")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{where}: names a place outside; make the tar anew")
                if member.name in members:
                    raise ValueError(f"{where}: two members of that name; make the tar anew")
                _refuse_no_image(member.name, where)
                members[member.name] = (member.name, member.offset_data, member.size)
                archive.members.clear()  # tarfile would keep every header
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"no end of archive at byte {archive.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: a damaged or cut tar ({error}); fetch it again") from error
    return sorted(members.values())


def _open_arrays(cache):
    """{name: array} of a directory of .npy files, mapped into memory; None where it is damaged."""
    try:
        arrays = {
            file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in cache.glob("*.npy")
        }
        whole = len({len(arrays[name]) for name in ("names", "labels")}) == 1
        return arrays if whole and "classes" in arrays else None
    except (OSError, ValueError, KeyError):
        return None


def _keep_arrays(cache, stem, arrays, required):
    """Writes the arrays beside and renames, whichever process is first; returns them mapped.

    Where that cannot be written, it stays in memory; required: raises OSError instead.
    """
    beside = Path(f"{stem}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        beside.mkdir(parents=True)
        for name, values in arrays.items():
            np.save(beside / f"{name}.npy", values)
        for old in stem.parent.glob(f"{stem.name}*"):
            finished = re.fullmatch(re.escape(stem.name) + "[0-9a-f]{24}", old.name)
            if finished and (old != cache or _open_arrays(cache) is None):
                shutil.rmtree(old, ignore_errors=True)
        try:
            beside.rename(cache)
        except OSError:
            if not cache.is_dir():
                raise
    except OSError as error:
        if required:
            raise OSError(f"--cache-dir {stem.parent}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return _open_arrays(cache) or arrays


# ------------------------------------------------------------------------------------------------
# Chest X-rays
# ------------------------------------------------------------------------------------------------

CHEXPERT_CLASSES = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
    "Fracture", "Lung Lesion", "Lung Opacity", "Effusion", "Pleural Other", "Pneumonia",
    "Pneumothorax", "Support Devices",
)  # fmt: skip
# Their columns: one class goes by a shorter name here, in its column's alphabetical place.
CHEXPERT_COLUMNS = [{"Effusion": "Pleural Effusion"}.get(cls, cls) for cls in CHEXPERT_CLASSES]
NIH_CLASSES = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia "
    "Infiltration Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
).split()
PADCHEST_CLASSES = (
    "Air Trapping", "Aortic Atheromatosis", "Aortic Elongation", "Atelectasis", "Bronchiectasis",
    "Cardiomegaly", "Consolidation", "Costophrenic Angle Blunting", "Edema", "Effusion",
    "Emphysema", "Fibrosis", "Flattened Diaphragm", "Fracture", "Granuloma",
    "Hemidiaphragm Elevation", "Hernia", "Hilar Enlargement", "Infiltration", "Mass", "Nodule",
    "Pleural_Thickening", "Pneumonia", "Pneumothorax", "Scoliosis", "Support Devices",
    "Tuberculosis",
)  # fmt: skip
PADCHEST_SYNONYMS = {
    "Consolidation": ("air bronchogram",),
    "Hilar Enlargement": ("adenopathy", "pulmonary artery enlargement"),
    "Infiltration": (
        "infiltrates", "interstitial pattern", "ground glass pattern",
        "reticular interstitial pattern", "reticulonodular interstitial pattern",
        "alveolar pattern", "consolidation", "air bronchogram",
    ),
    "Pleural_Thickening": ("pleural thickening",),
    "Support Devices": ("device", "pacemaker"),
}  # fmt: skip
PADCHEST_BROKEN = frozenset(
    """
216840111366964012819207061112010307142602253_04-014-084.png
    216840111366964012989926673512011074122523403_00-163-058.png
    216840111366964012959786098432011033083840143_00-176-115.png
    216840111366964012558082906712009327122220177_00-102-064.png
    216840111366964012339356563862009072111404053_00-043-192.png
    216840111366964013076187734852011291090445391_00-196-188.png
    216840111366964012373310883942009117084022290_00-064-025.png
    216840111366964012283393834152009033102258826_00-059-087.png
    216840111366964012373310883942009170084120009_00-097-074.png
    216840111366964012819207061112010315104455352_04-024-184.png
    216840111366964013829543166512013353113303615_02-092-190.png
    216840111366964012904401302362010337093236130_03-198-079.png
    216840111366964012904401302362010336141343749_03-198-010.png
    216840111366964012989926673512011151082430686_00-157-045.png
    216840111366964012989926673512011083134050913_00-168-009.png
    216840111366964012373310883942009077082646386_00-047-124.png
    216840111366964013686042548532013208193054515_02-026-007.png
    216840111366964013962490064942014134093945580_01-178-104.png
    216840111366964012819207061112010281134410801_00-129-131.png
    216840111366964013590140476722013043111952381_02-065-198.png
    216840111366964012283393834152009027091819347_00-007-136.png
    216840111366964012373310883942009152114636712_00-102-045.png
    216840111366964012283393834152009033140208626_00-059-118.png
    216840111366964013590140476722013058110301622_02-056-111.png
    216840111366964012487858717522009280135853083_00-075-001.png
    216840111366964013590140476722013049100117076_02-063-097.png
    216840111366964013649110343042013092101343018_02-075-146.png
    216840111366964012819207061112010306085429121_04-020-102.png
    269300710246070740096540277379121868595_e7zsan.png
    216840111366964012373310883942009180082307973_00-097-011.png
    """.split()
)


def _xray(name, folder, names, labels, classes, groups, **facts):
    """An X-ray dataset of files; multi-class when its labels are (N,) int."""
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    reader = Files(str(folder), names, "L")
    return ImageDataset(name, reader, labels, classes, task, "medical", groups, **facts)


FINDINGS = {"": np.nan, "-1": np.nan, "-1.0": np.nan, "0": 0, "0.0": 0, "1": 1, "1.0": 1}


def _findings(values):
    """1 present, 0 absent, NaN unmentioned (blank) or uncertain (-1): (N,) float32."""
    labels, numbers = (
        np.full(len(values), -1, np.float32),
        np.ascontiguousarray(values).view(np.int64),
    )
    for text, label in FINDINGS.items():
        # Eight bytes are compared as one number.
        labels[numbers == np.array(text, "S8").view(np.int64)] = label
    if (labels == -1).any():
        raise ValueError("unknown finding")
    return labels


FINDING = Column("S8", _findings, FINDINGS.__contains__, "be 1, 0, -1 or blank")
FINDING_COLUMNS = dict.fromkeys(["No Finding", *CHEXPERT_COLUMNS], FINDING)


def _finding_labels(no_finding, *findings):
    """The labels (N,13) of CheXpert's labeller; with No Finding all are absent."""
    labels = np.stack(findings, axis=1)
    labels[no_finding == 1] = 0
    return labels


CHEXPERT_PATH = re.compile(r"CheXpert-v1\.0[^/]*/((?:train|valid)/patient(\d+)/[^/]+/[^/]+)")


def _chexpert_paths(values):
    """Paths below the dataset's directory, whichever release they are of."""
    matches = list(map(CHEXPERT_PATH.fullmatch, values))
    if not all(matches):
        raise ValueError("unknown path")
    return np.array([match[1].encode("latin-1") for match in matches])


CHEXPERT_PATHS = Column(
    object, _chexpert_paths, CHEXPERT_PATH.fullmatch,
    "be like CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg",
)  # fmt: skip


def _chexpert(name, root, split, views=("PA", "AP")):
    """CheXpert (Irvin et al. 2019, arXiv:1901.07031); test is its official validation set."""
    folder = root / "CheXpert-v1.0"
    table = folder / {"train": "train.csv", "test": "valid.csv"}[split]
    _need(name, table)
    columns = {"Path": CHEXPERT_PATHS, "Frontal/Lateral": TEXT, "AP/PA": TEXT}
    paths, side, frontal, *findings = read_table(table, columns | FINDING_COLUMNS)
    found = np.where(side == b"Frontal", frontal, b"L")
    kept, other = _of_views(table, found, views, ("PA", "AP", "LL", "RL", "L"))
    paths = paths[kept]
    _refuse_repeats(paths, table)
    patients = np.array([int(path.split(b"/")[1][len("patient") :]) for path in paths], np.int64)
    return _xray(
        name, folder, paths, _finding_labels(*findings)[kept], CHEXPERT_CLASSES, patients,
        options={"views": list(views)}, dropped={other: int((~kept).sum())},
    )  # fmt: skip


def _mimic(name, root, split, views=("PA", "AP")):
    """MIMIC-CXR-JPG 2.0.0 (Johnson et al. 2019, arXiv:1901.07042); test is its validate split."""
    folder = root / "mimic-cxr-jpg" / "2.0.0"
    dicoms, subjects, studies, labels, dropped = mimic_rows(name, folder, split, views)
    names = [
        b"p%d/p%d/s%d/%s.jpg" % (int(str(subject)[:2]), subject, study, dicom)
        for subject, study, dicom in zip(subjects, studies, dicoms)
    ]
    return _xray(
        name, folder / "files", np.array(names), labels, CHEXPERT_CLASSES, subjects,
        options={"views": list(views)}, dropped=dropped,
    )  # fmt: skip


def mimic_rows(name, folder, split, views):
    """The rows of a split: (dicom ids, subject ids, study ids, labels (N,13), dropped)."""
    tables = [
        folder / f"mimic-cxr-2.0.0-{part}.csv.gz" for part in ("metadata", "split", "chexpert")
    ]
    metadata, split_table, findings_table = tables
    _need(name, *tables)
    parts = _one_of("train", "validate", "test")
    dicoms, parts = read_table(split_table, {"dicom_id": TEXT, "split": parts})
    ids = {"dicom_id": TEXT, "subject_id": NUMBER, "study_id": NUMBER}
    ids, subjects, studies, found = read_table(metadata, ids | {"ViewPosition": TEXT})
    place = _positions(ids, dicoms, split_table)
    if (place < 0).any():
        raise ValueError(f"{split_table}: has no row of {ids[place < 0][0].decode()}")
    mine = parts[place] == {"train": b"train", "test": b"validate"}[split]
    del dicoms, parts, place
    _refuse_repeats(ids, metadata)
    kept, other = _of_views(metadata, found, views, ("PA", "AP", "LATERAL", "LL"))
    dropped = {other: int((mine & ~kept).sum())}
    kept &= mine
    ids, subjects, studies = ids[kept], subjects[kept], studies[kept]
    key, owners, *findings = read_table(
        findings_table, {"study_id": NUMBER, "subject_id": NUMBER} | FINDING_COLUMNS
    )
    row = _positions(studies, key, findings_table)
    wrong = (row >= 0) & (owners[row] != subjects)
    if wrong.any():
        raise ValueError(
            f"{findings_table}: study {studies[wrong][0]} is of another subject than in "
            f"{metadata.name}; fetch both of one release"
        )
    labelled = row >= 0
    dropped["studies without labels"] = int((~labelled).sum())
    labels = _finding_labels(*findings)[row[labelled]]
    return ids[labelled], subjects[labelled], studies[labelled], labels, dropped


def _nih(name, root, split, views=None):
    """NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315) in its official layout and split."""
    folder = root / "NIH-ChestXRay-14"
    table = folder / "Data_Entry_2017_v2020.csv"
    lists = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    _need(name, table, *lists.values(), folder / "images")
    listed = {part: _encoded(text for _, text in _read_list(path)) for part, path in lists.items()}
    both = " + ".join(map(str, lists.values()))
    _refuse_repeats(np.concatenate(list(listed.values())), both)
    columns = {"Image Index": TEXT, "Finding Labels": NIH_FINDINGS, "Patient ID": NUMBER}
    columns |= {"View Position": TEXT} if views is not None else {}
    names, labels, patients, *found = read_table(table, columns)
    _refuse_repeats(names, table)
    place = _positions(listed[split], names, table)
    if (place < 0).any():
        image = listed[split][place < 0][0].decode()
        raise ValueError(f"{lists[split]}: {image} has no row in {table.name}")
    rows, dropped = np.sort(place), {}
    if views is not None:
        kept, other = _of_views(table, found[0], views, ("PA", "AP"))
        rows, dropped = rows[kept[rows]], {other: int((~kept[rows]).sum())}
    return _xray(
        name, folder / "images", names[rows], labels[rows], NIH_CLASSES, patients[rows],
        options={"views": list(views)} if views else {}, dropped=dropped,
    )  # fmt: skip


def _nih_labels(values):
    return np.array([_nih_row(value) for value in values], np.float32)


@functools.cache
def _nih_row(findings):
    """The labels (14,) that a text like "Mass|Nodule" names."""
    present = set(findings.split("|")) - {"No Finding"}
    if not present <= set(NIH_CLASSES):
        raise ValueError("unknown finding")
    return [cls in present for cls in NIH_CLASSES]


NIH_FINDINGS = Column(
    object, _nih_labels, lambda text: set(text.split("|")) <= {"No Finding", *NIH_CLASSES},
    f"be No Finding, or some of these joined by |: {', '.join(NIH_CLASSES)}",
)  # fmt: skip


PADCHEST_VIEWS = ("PA", "AP", "AP Supine", "L", "COSTAL")


def _padchest(name, root, split, views=PADCHEST_VIEWS, split_by="patient"):
    """PadChest (Bustos et al. 2020, arXiv:1901.07441), a tenth of it held out.

    split_by: "patient" keeps each patient on one side; "image" is the study's split, which does
    not. Images without labels and those known to be broken are left out, as in the study.
    """
    folder = root / "PadChest"
    table = folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    _need(name, table)
    if split_by not in ("patient", "image"):
        raise ValueError(f"--split-by {split_by}: must be patient or image")
    columns = {"ImageID": TEXT, "PatientID": TEXT, "Projection": TEXT}
    columns |= {"Labels": PADCHEST_FINDINGS, "ImageDir": TEXT}
    names, patients, found, labels, folders = read_table(table, columns, optional=("ImageDir",))
    _refuse_repeats(names, table)
    found = np.where(found == b"AP_horizontal", b"AP Supine", found)
    kept, other = _of_views(table, found, views, PADCHEST_VIEWS)
    unlabelled = kept & np.isnan(labels[:, 0])
    broken = np.isin(names, [file.encode() for file in PADCHEST_BROKEN]) & kept & ~unlabelled
    rows = np.flatnonzero(kept & ~unlabelled & ~broken)
    rows = _padchest_split(rows, patients[rows], split_by)[split]
    dropped = {other: (~kept).sum(), "no labels": unlabelled.sum(), "known broken": broken.sum()}
    return _xray(
        name, folder, _padchest_names(folder, names, folders)[rows], labels[rows],
        PADCHEST_CLASSES, patients[rows], options={"views": list(views), "split_by": split_by},
        dropped={why: int(count) for why, count in dropped.items()},
    )  # fmt: skip


PADCHEST_FINDINGS = Column(
    object, lambda values: np.array([_padchest_row(value) for value in values], np.float32),
    lambda text: True, "be text",
)  # fmt: skip


def _padchest_split(rows, patients, split_by):
    """{split: rows}: nine tenths of the images, or of the patients, train."""
    rng = np.random.RandomState(42)
    if split_by == "image":
        rows = rows[rng.permutation(len(rows))]
        count = int(0.9 * len(rows))
        return {"train": rows[:count], "test": rows[count:]}
    known = rng.permutation(np.unique(patients))
    train = np.isin(patients, known[: int(0.9 * len(known))])
    return {"train": rows[train], "test": rows[~train]}


def _padchest_names(folder, names, folders):
    """Paths below the dataset's directory: images lie in the folder of ImageDir, or beside it."""
    if folders is None:
        return names
    there = [value for value in np.unique(folders) if (folder / os.fsdecode(value)).is_dir()]
    prefix = np.where(np.isin(folders, there) & (folders != b""), np.char.add(folders, b"/"), b"")
    return np.char.add(prefix, names)


@functools.lru_cache(maxsize=2**16)
def _padchest_row(text):
    """The study's reading of the label text; NaN everywhere where there is none."""
    if not text:
        return [math.nan] * len(PADCHEST_CLASSES)
    return [
        any(word in text for word in (cls.lower(), *PADCHEST_SYNONYMS.get(cls, ())))
        for cls in PADCHEST_CLASSES
    ]


def _covidx(name, root, split):
    """COVIDx CXR-2 (Wang et al. 2020, arXiv:2003.09871)."""
    folder = root / "COVIDx-CXR2"
    path = folder / f"{split}.txt"
    _need(name, path, folder / split)
    classes, rows = ("negative", "positive"), []
    for number, line in _read_list(path):
        # The patient's id may hold blanks, the file's name, the label and the source do not.
        patient, *fields = line.rsplit(None, 3)
        if len(fields) < 3 or fields[1] not in classes:
            raise ValueError(
                f"{path}, line {number}: {line!r} is not 'patient file negative|positive source'"
            )
        rows.append((patient, fields[0], classes.index(fields[1])))
    patients, names, labels = zip(*rows)
    names = _encoded(names)
    _refuse_repeats(names, path)
    return _xray(
        name, folder / split, names, np.array(labels, np.int64), classes, _encoded(patients)
    )


def _tuberculosis(name, root, split):
    """Shenzhen and Montgomery (Jaeger et al. 2014), the first 85 % of each in the study's order."""
    folder = root / "Tuberculosis_dataset"
    parts = "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png", "Montgomery/MontgomerySet/CXR_png"
    _need(name, *(folder / part for part in parts))
    names = []
    for part in parts:
        files = sorted((folder / part).glob("*.png"))
        if not files:
            raise ValueError(f"{folder / part}: holds no .png file; fetch the dataset again")
        for file in files:
            if file.stem[-1] not in "01":
                raise ValueError(f"{file}: its name ends in neither _0 (normal) nor _1")
        np.random.RandomState(42).shuffle(files)
        count = int(0.85 * len(files))
        chosen = files[:count] if split == "train" else files[count:]
        names += [str(file.relative_to(folder)) for file in chosen]
    labels = np.array([int(Path(file).stem[-1]) for file in names], np.int64)
    return _xray(name, folder, _encoded(names), labels, ("normal", "tuberculosis"), None)


DATASETS = {
    **{name: Known(_synthetic, None) for name in synthetic.WORLDS},
    "imagenet1k": Known(_imagenet1k, "imagenet-1K"),
    "imagenet21k": Known(_imagenet21k, "imagenet-21K"),
    "chexpert": Known(_chexpert, "CheXpert-v1.0", listed=True),
    "mimic": Known(_mimic, "mimic-cxr-jpg/2.0.0", listed=True),
    "nih": Known(_nih, "NIH-ChestXRay-14", listed=True),
    "padchest": Known(_padchest, "PadChest", listed=True),
    "cifar10": Known(_cifar, "cifar-10-batches-py"),
    "cifar100": Known(_cifar, "cifar-100-python"),
    "flowers102": Known(_flowers, "flowers-102", listed=True),
    "pets": Known(_pets, "oxford-iiit-pet", listed=True),
    "covidx": Known(_covidx, "COVIDx-CXR2", listed=True),
    "tuberculosis": Known(_tuberculosis, "Tuberculosis_dataset"),
}


# ------------------------------------------------------------------------------------------------
# Packs: images decoded and resized once
# ------------------------------------------------------------------------------------------------

PACK_SCHEMA = 1
PACK_CHUNK = 16  # images that one process prepares at a time


class Packed(NamedTuple):
    """Images of a pack, mapped into memory and shared; each is checked when it is read."""

    name: str
    folder: str
    split: str
    codec: str
    mode: str

    def __call__(self, i, size=None):
        pack = _mapped_pack(self.folder, self.split)
        content = pack["images"][pack["offsets"][i] : pack["offsets"][i + 1]]
        if zlib.crc32(content) != pack["crc32"][i]:
            raise ValueError(f"{self.where(i)}: damaged; remove {self.folder} and pack it again")
        if self.codec == "jpeg":
            return read_image(io.BytesIO(content), self.mode, size, self.where(i))
        return torch.from_numpy(content.copy()).view(*pack["shapes"][i].tolist())

    def where(self, i):
        name = _mapped_pack(self.folder, self.split)["names"][i]
        return f"{self.name} {self.split} image {i} ({os.fsdecode(name)})"


@functools.lru_cache(maxsize=64)
def _mapped_pack(folder, split):
    """The arrays of a pack's split, mapped once a process: {name: array}."""
    paths = Path(folder).glob(f"{split}.*.npy")
    arrays = {path.name.split(".")[1]: np.load(path, mmap_mode="r") for path in paths}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return arrays | {"images": np.asarray(np.memmap(Path(folder, f"{split}.images"), mode="r"))}


def pack_of(name, root="datasets"):
    """(name of the original, size, directory) that NAME@SIZE means, or (name, None, None)."""
    match = re.fullmatch(r"(.+)@(\d+)", name)
    folder = (
        name.removeprefix("folder:") if name.startswith("folder:") else os.path.join(root, name)
    )
    # A directory of one's own images may have such a name too.
    if not match or (name.startswith("folder:") and os.path.isdir(os.path.join(folder, "train"))):
        return name, None, None
    return match[1], int(match[2]), Path(folder)


def _open_pack(name, root, split, **options):
    """The dataset of a pack; options that shaped it must be those it was made with."""
    original, size, folder = pack_of(name, root)
    facts = _pack_facts(folder, original, size)
    options.pop("cache_dir", None)
    for option, value in json.loads(json.dumps(options)).items():
        made_with = facts["options"].get(option)
        if value != made_with:
            raise ValueError(
                f"{folder} was packed with {option} = {made_with}, not {value}; leave the option "
                "out, or pack it again into another --data-dir"
            )
    arrays = _mapped_pack(str(folder), split)
    reader = Packed(name, str(folder), split, facts["codec"], facts["mode"])
    return ImageDataset(
        name, reader, arrays["labels"], facts["classes"], facts["task"], facts["domain"],
        arrays.get("groups"), None, facts["options"], facts["dropped"][split],
    )  # fmt: skip


def _pack_facts(folder, original, size):
    """The content of pack.json. Raises ValueError or FileNotFoundError unless the pack is whole."""
    path, again = folder / "pack.json", f"remove {folder} and pack it again"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no whole pack; `python data.py pack {original} --size {size}` makes or "
            "finishes it"
        )
    try:
        facts = json.loads(path.read_text())
        schema, files = facts["schema"], facts["files"]
        found = facts["name"], facts["size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {again}") from error
    if schema != PACK_SCHEMA:
        raise ValueError(f"{path}: of version {schema}, this program reads {PACK_SCHEMA}; {again}")
    if found != (_pack_name(original), size):
        raise ValueError(f"{path}: a pack of {found[0]}@{found[1]}; rename its directory so")
    for name, (count, checksum) in files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != count:
            raise ValueError(f"{file}: missing or not of {count} bytes; {again}")
        if checksum is not None and _file_crc32(file) != checksum:
            raise ValueError(f"{file}: its checksum is wrong; {again}")
    return facts


def _pack_name(name):
    """What a pack is called inside: the place of a folder does not matter."""
    return f"folder:{Path(name).name}" if name.startswith("folder:") else name


def _file_crc32(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Each(torch.utils.data.Dataset):
    """[k] -> work(dataset, i) of the k-th PACK_CHUNK images; the error itself where it fails."""

    def __init__(self, dataset, work):
        self.dataset, self.work = dataset, work

    def __len__(self):
        return math.ceil(len(self.dataset) / PACK_CHUNK)

    def __getitem__(self, k):
        last = min((k + 1) * PACK_CHUNK, len(self.dataset))
        return [self._one(i) for i in range(k * PACK_CHUNK, last)]

    def _one(self, i):
        try:
            return self.work(self.dataset, i)
        except (ValueError, OSError) as error:
            return error


def each_image(dataset, work, workers, title, first=0):
    """Yields work(dataset, i), or its error, for i from `first` (a multiple of PACK_CHUNK) on."""
    each, start = Each(dataset, work), first // PACK_CHUNK
    with tqdm(total=len(dataset), initial=first, desc=title, unit="image", mininterval=1) as bar:
        for results in loader(each, start, len(each), workers):
            yield from results
            bar.update(len(results))


def _encode(dataset, i, size, codec, quality):
    """(bytes, shape) of an image as a pack holds it; a smaller image keeps its size."""
    image = dataset.read(i, size)
    side = min(size, *image.shape[-2:])
    image = (xray_square if dataset.domain == "medical" else resize_shorter)(image, side)
    pixels = image.contiguous().numpy()
    if codec == "raw":
        return pixels.tobytes(), pixels.shape
    content = io.BytesIO()
    pixels_last = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(pixels_last).save(content, "JPEG", quality=quality)
    return content.getvalue(), pixels.shape


JOURNAL = np.dtype([("bytes", "<i8"), ("crc32", "<u4"), ("shape", "<i4", 3)])


def pack(name, size, root="datasets", out=None, codec="raw", quality=90, workers=None, **options):
    """Decodes and resizes every image of a dataset once, into the directory NAME@SIZE of `out`.

    size: pixels, of the central square (medical) or of the shorter side (natural). codec: "raw",
    or "jpeg" of that quality. workers: processes (default: one a core). Killed at any moment and
    called again it goes on, to the same bytes. Returns the directory. Raises ValueError for what
    cannot be packed, a broken image, a disk too small, or a pack begun with other settings.
    """
    if "+" in name and len(_parts(name)) > 1:
        raise ValueError(f"{name}: pack the datasets of a union one by one")
    if pack_of(name)[1] or name in synthetic.WORLDS:
        raise ValueError(f"{name}: nothing to pack; its images need no decoding")
    if codec not in ("raw", "jpeg") or not 1 <= quality <= 100 or size < 1:
        raise ValueError(f"--size {size} --codec {codec} --quality {quality}: out of range")
    sets = {split: load_dataset(name, root, split, **options) for split in SPLITS}
    facts = _facts(name, sets, size, codec, quality)
    target = pack_of(f"{name}@{size}", out or root)[2]
    if out and name.startswith("folder:"):
        target = Path(out) / target.name
    if target.exists():
        made = _pack_facts(target, name, size)
        _same_facts(target, {key: made.get(key) for key in facts}, facts)
        return target
    part = target.with_name(target.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    with open(part / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{part}: another process is packing it") from error
        _begin(part, facts)
        if not (part / "pack.json").exists():
            work = functools.partial(_encode, size=size, codec=codec, quality=quality)
            _refuse_small_disk(part, sets, work)
            for split, dataset in sets.items():
                _write_images(part, split, dataset, work, workers or os.cpu_count())
            _write_index(part, facts, sets)
        for name in ("train.journal", "test.journal", "begun.json", "lock"):
            (part / name).unlink(missing_ok=True)
        part.rename(target)
    return target


def _facts(name, sets, size, codec, quality):
    """What pack.json says of a pack, beside its files."""
    train = sets["train"]
    digest = hashlib.sha256()
    for dataset in sets.values():
        for values in (_names(dataset), dataset.labels):
            digest.update(np.ascontiguousarray(values))
    return {
        "schema": PACK_SCHEMA,
        "name": _pack_name(name),
        "size": size,
        "codec": codec,
        "quality": quality if codec == "jpeg" else None,
        "mode": "L" if train.domain == "medical" else "RGB",
        "task": train.task,
        "domain": train.domain,
        "classes": list(train.classes),
        "options": train.options,
        "dropped": {split: dataset.dropped for split, dataset in sets.items()},
        "images": {split: len(dataset) for split, dataset in sets.items()},
        "index": digest.hexdigest(),
    }


def _names(dataset):
    """What each image is called in its dataset: (N,) bytes."""
    names = getattr(dataset.reader, "names", None)
    return np.arange(len(dataset)).astype("S") if names is None else names


def _same_facts(place, theirs, ours):
    for key, value in json.loads(json.dumps(ours)).items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{place} was packed from another {key} ({theirs.get(key)}, now {value}); remove "
                "it, or give another --out"
            )


def _begin(part, facts):
    """Notes what is packed; a packing that was begun goes on only with the same."""
    path = part / "begun.json"
    if path.exists():
        _same_facts(part, json.loads(path.read_text()), facts)
    else:
        _write_json(path, facts)


def _write_json(path, content):
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _refuse_small_disk(part, sets, work):
    """Raises OSError when the disk cannot hold the pack, judged by a sample of its images."""
    needed = 0
    for dataset in sets.values():
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        sizes = [len(content) for content, _ in (work(dataset, int(i)) for i in sample)]
        index = JOURNAL.itemsize * 2 + dataset.labels[:1].nbytes + _names(dataset).itemsize
        needed += len(dataset) * (np.mean(sizes) + index)
    written = sum(file.stat().st_size for file in part.iterdir())
    free = shutil.disk_usage(part).free
    if needed - written > free:
        raise OSError(
            f"{part}: packing needs about {(needed - written) / 1e9:.3g} GB more, the disk has "
            f"{free / 1e9:.3g} GB free; give another --out, a smaller --size, or --codec jpeg"
        )


def _write_images(part, split, dataset, work, workers):
    """Appends the images that are not there yet; the journal knows those that are on the disk."""
    journal_path = part / f"{split}.journal"
    with open(part / f"{split}.images", "ab") as images, open(journal_path, "ab") as journal:
        done = _trim(images, journal, len(dataset))
        if done == len(dataset):
            return
        results = each_image(dataset, work, workers, f"{split} images", done)
        records, pending = [], 0
        for number, result in enumerate(results, done + 1):
            if isinstance(result, Exception):
                raise result
            content, shape = result
            images.write(content)
            records.append((len(content), zlib.crc32(content), shape))
            pending += len(content)
            if pending > 2**26 or number == len(dataset):
                images.flush()
                os.fsync(images.fileno())
                journal.write(np.array(records, JOURNAL).tobytes())
                journal.flush()
                os.fsync(journal.fileno())
                records, pending = [], 0


def _trim(images, journal, total):
    """Cuts both files back to whole chunks of images that both have; returns how many images."""
    records = np.fromfile(journal.name, JOURNAL)
    ends = np.cumsum(records["bytes"])
    done = int(np.searchsorted(ends, os.fstat(images.fileno()).st_size, side="right"))
    done -= done % PACK_CHUNK if done < total else 0
    journal.truncate(done * JOURNAL.itemsize)
    images.truncate(int(ends[done - 1]) if done else 0)
    return done


def _write_index(part, facts, sets):
    """Reads the images back, writes the index and, last, pack.json."""
    files = {}
    for split, dataset in sets.items():
        records = np.fromfile(part / f"{split}.journal", JOURNAL)
        offsets = np.concatenate([[0], np.cumsum(records["bytes"])])
        images = np.memmap(part / f"{split}.images", mode="r")
        for i in tqdm(range(len(records)), f"{split} verified", unit="image", mininterval=1):
            if zlib.crc32(images[offsets[i] : offsets[i + 1]]) != records["crc32"][i]:
                raise ValueError(f"{part}: image {i} of {split} was not written well; remove it")
        arrays = {"offsets": offsets, "shapes": records["shape"], "crc32": records["crc32"]}
        arrays |= {"labels": dataset.labels, "names": _names(dataset)}
        arrays |= {} if dataset.groups is None else {"groups": dataset.groups}
        for key, values in arrays.items():
            np.save(part / f"{split}.{key}.npy", values)
            files[f"{split}.{key}.npy"] = None
        files[f"{split}.images"] = None
    for name in files:
        with open(part / name, "rb") as file:
            os.fsync(file.fileno())
        checksum = None if name.endswith(".images") else _file_crc32(part / name)
        files[name] = (part / name).stat().st_size, checksum
    _write_json(part / "pack.json", facts | {"files": files})


# ------------------------------------------------------------------------------------------------
# Few-shot subsets
# ------------------------------------------------------------------------------------------------


def few_shot_indices(labels, shots, seed, classes=None):
    """Indices of a few-shot training set, sorted: (M,) int64.

    labels: (N,) int64, or (N,C) in {0,1,nan}. Multi-class: `shots` images of each class without
    replacement; a larger `shots` with the same seed holds the smaller one's images. Multi-label:
    images are taken in random order while some class that they show has fewer than `shots`
    positives. classes: names for the message. Raises ValueError when a class has too few images.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots}: must be 1 or more")
    labels = np.asarray(labels)
    multilabel = labels.ndim == 2
    positive = labels == 1 if multilabel else labels
    counts = positive.sum(0) if multilabel else np.bincount(labels, minlength=len(classes or ()))
    for cls, count in enumerate(counts):
        if count < shots:
            label = classes[cls] if classes else cls
            raise ValueError(f"--shots {shots}: class {label} has only {count} training images")
    order = generator(seed, Stream.SHOTS).permutation(len(labels))
    if not multilabel:
        by_class = order[np.argsort(labels[order], kind="stable")]
        starts = np.cumsum(counts) - counts
        return np.sort((by_class[starts[:, None] + np.arange(shots)]).ravel())
    found, chosen = np.zeros(labels.shape[1], int), []
    for i in order:
        if (found >= shots).all():
            break
        if (positive[i] & (found < shots)).any():
            found += positive[i]
            chosen.append(i)
    return np.sort(np.array(chosen, np.int64))


# ------------------------------------------------------------------------------------------------
# Transforms: uint8 (C,H,W) -> uint8 (C,h,w)
# ------------------------------------------------------------------------------------------------


class Pipeline(NamedTuple):
    """prepare: done to an image once, deterministic. augment: (image, rng) -> image, each time.

    size: the shorter side that `prepare` makes of an image, in pixels; None: it keeps its own.
    """

    prepare: Callable
    augment: Callable
    size: int | None = None

    def read(self, dataset, i):
        """The image i of the dataset, prepared."""
        return self.prepare(dataset.read(i, self.size))


def keep(image, rng=None):
    """The image as it is."""
    return image


def resize_shorter(image, size):
    """The shorter side becomes `size` pixels, antialiased bilinear (torchvision's Resize)."""
    return TF.resize(image, [size], antialias=True)


def resize_square(image, size):
    """Both sides become `size` pixels whatever the aspect, antialiased bilinear."""
    return TF.resize(image, [size, size], antialias=True)


def resize_center_crop(image, size):
    """ImageNet's test transform: shorter side to size * 256/224, then the central square."""
    return TF.center_crop(resize_shorter(image, round(size * 256 / 224)), [size, size])


def xray_square(image, size):
    """The study's X-ray preparation: central square, area resize to `size` pixels."""
    side = min(image.shape[-2:])
    return area_resize(TF.center_crop(image, [side, side]), size)


def area_resize(image, size):
    """Each output pixel is the mean over the exact area that it covers (OpenCV's INTER_AREA).

    image: uint8 (C,H,H). An image smaller than `size` is enlarged bilinearly.
    """
    side = image.shape[-1]
    if side == size:
        return image
    if side < size:
        return resize_square(image, size)
    sums = _area_sum(_area_sum(image.numpy(), size).swapaxes(1, 2), size).swapaxes(1, 2)
    return torch.from_numpy(np.rint(sums / side**2).astype(np.uint8))


def _area_sum(pixels, size):
    """Sums over `size` equal intervals of axis 1, in units of 1/size pixel: exact integers."""
    side, outputs = pixels.shape[1], np.arange(size)
    total = 0
    for tap in range(-(-side // size) + 1):  # an interval touches no more pixels than these
        rows = outputs * side // size + tap
        overlap = np.minimum((rows + 1) * size, (outputs + 1) * side) - np.maximum(
            rows * size, outputs * side
        )
        weights = np.maximum(overlap, 0).astype(np.int32 if pixels.dtype == np.uint8 else np.int64)
        total = total + pixels[:, np.minimum(rows, side - 1)] * weights[:, None]
    return total


def random_flip(image, rng):
    """Left-right mirror image with probability one half."""
    return image.flip(-1) if rng.random() < 0.5 else image


def random_crop_flip(image, rng, size):
    """A size x size window anywhere in the image (BiT-HyperRule), flipped half of the time."""
    height, width = image.shape[-2:]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return random_flip(image[..., top : top + size, left : left + size], rng)


def random_resized_crop_flip(image, rng, size):
    """Inception-style crop: 8 to 100 % of the area, aspect 3/4 to 4/3, resized; then flip.

    Szegedy et al. 2015, arXiv:1409.4842; the draw is torchvision's RandomResizedCrop.
    """
    top, left, height, width = _resized_crop_window(*image.shape[-2:], rng)
    crop = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    return random_flip(crop, rng)


def _resized_crop_window(height, width, rng):
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # A very elongated image: its central part of the nearest allowed aspect.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_affine_flip(image, rng):
    """The study's X-ray augmentation: shift to 25 %, rotate to 45 degrees, scale +-10 %, flip.

    Bilinear; what comes in from outside is black (torchvision's RandomAffine).
    """
    angle, scale = rng.uniform(-45, 45), rng.uniform(0.9, 1.1)
    shift = [round(rng.uniform(-0.25, 0.25) * side) for side in (image.shape[-1], image.shape[-2])]
    image = TF.affine(image, angle, shift, scale, [0.0, 0.0], TF.InterpolationMode.BILINEAR, fill=0)
    return random_flip(image, rng)


def random_shift_flip(image, rng):
    """Shift by up to a sixteenth of the side, black coming in, and flip."""
    size, edge = image.shape[-1], image.shape[-1] // 16
    return random_crop_flip(F.pad(image, (edge,) * 4), rng, size)


def pretraining_pipeline(domain, size, train, own_size=False):
    """Pre-training at size x size pixels, for a "natural" or a "medical" source.

    own_size: the images have that size already (the synthetic worlds), and are only shifted.
    """
    at_size = functools.partial
    if own_size:
        return Pipeline(keep, random_shift_flip if train else keep)
    if domain == "medical":
        augment = random_affine_flip if train else keep
        return Pipeline(at_size(xray_square, size=size), augment, size)
    if train:
        return Pipeline(keep, at_size(random_resized_crop_flip, size=size))
    return Pipeline(at_size(resize_center_crop, size=size), keep, round(size * 256 / 224))


def hyperrule_pipeline(resize, crop, train, square=False):
    """BiT-HyperRule: shorter side (square=True: both sides) to `resize`, random crop, flip.

    Test: both sides to `crop`. Kolesnikov et al. 2020, section 3.3. Raises ValueError when the
    crop does not fit.
    """
    if crop > resize:
        raise ValueError(f"a crop of {crop} pixels does not fit into images resized to {resize}")
    if not train:
        return Pipeline(functools.partial(resize_square, size=crop), keep, crop)
    prepare = functools.partial(resize_square if square else resize_shorter, size=resize)
    return Pipeline(prepare, functools.partial(random_crop_flip, size=crop), resize)


def preload(dataset, pipeline, limit=2**30):
    """Reads and prepares every image once, into memory, when that takes at most `limit` bytes.

    Returns (dataset, pipeline): the prepared images with nothing left to prepare, or both as they
    were. A broken image is so met before training.
    """
    # The first image tells the size of all, mostly: a large dataset is not read in vain.
    if pipeline.read(dataset, 0).numel() * len(dataset) > limit:
        return dataset, pipeline

    def prepared(i):
        return pipeline.read(dataset, i).contiguous()

    images, total = [], 0
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        for image in pool.map(prepared, range(len(dataset))):
            images.append(image)
            total += image.numel()
            if total > limit:
                pool.shutdown(cancel_futures=True)
                return dataset, pipeline
    shapes = np.array([image.shape for image in images])
    sizes = shapes.prod(1)
    pixels = torch.cat([image.flatten() for image in images])  # workers share it without copies
    reader = Decoded(pixels, np.cumsum(sizes) - sizes, shapes, dataset.reader)
    return dataset.replace(reader=reader), pipeline._replace(prepare=keep)


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


class Stream:
    """What a random number is for: the second word of the seed of every generator."""

    SHOTS, ORDER, DRAW, AUGMENT, MIXUP, FRACTION = range(6)


def generator(seed, *purpose):
    """numpy's generator for a seed, a Stream and what else tells its draws from others."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: must be 0 or more")
    return np.random.default_rng([seed, *purpose])


@functools.lru_cache(maxsize=1)
def _permutation(num_images, seed, epoch):
    """Half the memory of generator.permutation: every worker of every rank holds one."""
    order = np.arange(num_images, dtype=np.int32 if num_images < 2**31 else np.int64)
    generator(seed, Stream.ORDER, epoch).shuffle(order)
    return order


def by_class(labels):
    """(images sorted by class (N,), first place (C,) and number (C,) of each class present)."""
    _, counts = np.unique(labels, return_counts=True)
    return np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, counts


def batch_indices(step, num_images, batch_size, seed, sampling="shuffle", classes=None):
    """Which images make up the global batch of a step, a function of (seed, step) alone.

    sampling: "shuffle" walks through one permutation an epoch after the other, so that each image
    comes once an epoch and no batch is short; "replacement" draws each image anew; "balanced"
    does so with probability inverse to the frequency of its class in classes = by_class(labels);
    "sequential" is the test order, with a short last batch.
    Returns (indices, draws), both (B,) int64; (draw, image) is never the same twice in a run.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    if sampling == "sequential":
        places = places[places < num_images]
        return places, np.zeros_like(places)
    if sampling == "shuffle":
        epochs = places // num_images
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(num_images, seed, int(epoch))[places[here] % num_images]
        return indices, epochs
    rng = generator(seed, Stream.DRAW, step)
    if sampling == "replacement":
        return rng.integers(num_images, size=batch_size), places
    if sampling == "balanced":
        images, starts, counts = classes
        drawn = rng.integers(len(counts), size=batch_size)
        return images[starts[drawn] + rng.integers(counts[drawn])], places
    raise ValueError(f"unknown sampling {sampling!r}")


class Batches(torch.utils.data.Dataset):
    """[step] -> (images uint8 (b,C,H,W), labels (b,) or (b,C), count) for one rank.

    The rank's part is every `ranks`-th image of the global batch (with pairs: every `ranks`-th two
    neighbours, which MixUp mixes, so that this too is the same on any number of ranks). count:
    labels that are not NaN in the whole global batch (the denominator of its mean loss), known to
    each rank without communication. Augmentation depends on (seed, draw, image) alone.
    """

    def __init__(
        self,
        dataset,
        pipeline,
        batch_size,
        seed=0,
        sampling="shuffle",
        rank=0,
        ranks=1,
        pairs=False,
    ):
        self.dataset, self.pipeline = dataset, pipeline
        self.batch_size, self.seed, self.sampling = batch_size, seed, sampling
        self.rank, self.ranks, self.unit = rank, ranks, 1 + pairs
        self.classes = by_class(dataset.labels) if sampling == "balanced" else None

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, step):
        labels = self.dataset.labels
        indices, draws = batch_indices(
            step, len(self.dataset), self.batch_size, self.seed, self.sampling, self.classes
        )
        count = int(np.count_nonzero(~np.isnan(labels[indices])))
        mine = np.arange(len(indices)) // self.unit % self.ranks == self.rank
        indices, draws = indices[mine], draws[mine]
        images = [self._image(int(i), int(draw)) for i, draw in zip(indices, draws)]
        images = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return images, torch.from_numpy(labels[indices]), count

    def _image(self, i, draw):
        image = self.pipeline.read(self.dataset, i)
        if self.pipeline.augment is keep:
            return image
        rng = generator(self.seed, Stream.AUGMENT, draw, i)
        return self.pipeline.augment(image, rng)


def _worker_init(worker):
    """A worker ends when its parent does; signals to the whole group are for the parent alone."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Python's own exit sends SIGTERM to the workers that are left and waits; ours ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def loader(batches, start, stop, workers=0, pin_memory=False):
    """Iterates over batches[start:stop]; `workers` processes read ahead (0: none)."""
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        worker_init_fn=_worker_init,
        pin_memory=pin_memory,
    )


# ------------------------------------------------------------------------------------------------
# Command line: python data.py list | info | check | pack | download
# ------------------------------------------------------------------------------------------------


def _both(name, args, **options):
    """{split: dataset}, with the options that were given."""
    given = {key: getattr(args, key) for key in ("views", "split_by", "labels", "cache_dir")}
    options |= {key: value for key, value in given.items() if value is not None}
    return {split: load_dataset(name, args.data_dir, split, **options) for split in SPLITS}


def _table(rows, *header):
    """Prints a Markdown table."""
    rows = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def list_datasets(args):
    """Every name that can be had below --data-dir, packs included."""
    root, rows = Path(args.data_dir), []
    packs = sorted(path.name for path in root.glob("*@*") if (path / "pack.json").exists())
    for name in (*DATASETS, *packs):
        folder = DATASETS[name].folder if name in DATASETS else name
        row = [name, "(made)" if folder is None else folder, "no", "", "", ""]
        if folder is None or (root / folder).is_dir():
            try:
                sets = {s: load_dataset(name, root, s, verify=False) for s in SPLITS}
                counts = " + ".join(f"{len(dataset):,}" for dataset in sets.values())
                train = sets["train"]
                row[2:] = "yes", counts, len(train.classes), train.domain
            except (ValueError, OSError) as error:
                row[2:4] = "damaged", str(error)
        rows.append(row)
    _table(rows, "name", f"below {root}", "there", "images (train + test)", "classes", "domain")


def info(args):
    """What a dataset holds: counts, marks by class, patients, image sizes; a sheet of examples."""
    sets = _both(args.name, args)
    train = sets["train"]
    print(f"{args.name}: {train.domain}, {train.task}, {len(train.classes)} classes")
    for option, value in train.options.items():
        print(f"{option}: {value}")
    groups = {split: np.unique(d.groups) for split, d in sets.items() if d.groups is not None}
    _table(
        [
            (split, len(dataset), len(groups[split]) if groups else "unknown", *_left_out(dataset))
            for split, dataset in sets.items()
        ],
        "split", "images", "patients", "left out",
    )  # fmt: skip
    if groups:
        print(f"patients on both sides: {len(np.intersect1d(*groups.values()))}")
    counts = [count for dataset in sets.values() for count in _marks(dataset)]
    multilabel = train.task == "multilabel"
    header = [f"{s} {mark}" for s in sets for mark in ("positive", "missing")[: 1 + multilabel]]
    _table(zip(train.classes, *counts), "class", *header)
    for split, dataset in sets.items():
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        sizes = collections.Counter(tuple(dataset.read(i).shape) for i in sample)
        shown = ", ".join(f"{w} x {h} x {c} ({n})" for (c, h, w), n in sizes.most_common(8))
        print(f"{split} images, of {len(sample)}: width x height x channels {shown}")
    if args.sheet:
        contact_sheet(train).save(args.sheet)
        print(f"wrote {args.sheet}")


def _left_out(dataset):
    return [
        ", ".join(f"{count} {why}" for why, count in dataset.dropped.items() if count) or "none"
    ]


def _marks(dataset):
    """[positives of each class], and for multi-label ones [missing marks of each class]."""
    if dataset.task == "multiclass":
        return [np.bincount(dataset.labels, minlength=len(dataset.classes))]
    return [(dataset.labels == 1).sum(0), np.isnan(dataset.labels).sum(0)]


def contact_sheet(dataset, columns=8, rows=20, side=96):
    """A PIL image: the first images of each of the first classes, a row a class."""
    rows = min(rows, len(dataset.classes))
    sheet = Image.new("RGB", (180 + columns * side, rows * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cls in enumerate(dataset.classes[:rows]):
        draw.text((6, row * side + side // 2 - 6), cls, fill="black")
        multilabel = dataset.task == "multilabel"
        shows = dataset.labels[:, row] == 1 if multilabel else dataset.labels == row
        for column, i in enumerate(np.flatnonzero(shows)[:columns]):
            image = resize_square(dataset.read(i, side), side - 2).expand(3, -1, -1)
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile, (180 + column * side, row * side))
    return sheet


def check(args):
    """Opens every image; lists what is broken, missing, or there twice. 1 where anything is."""
    sets = _both(args.name, args, verify=False)
    found = {"missing": [], "broken": [], "duplicated": [], "in train and test": []}
    prints, firsts = {}, {}
    for split, dataset in sets.items():
        prints[split] = np.zeros(len(dataset), np.uint64)
        good = np.ones(len(dataset), bool)
        workers = args.workers or os.cpu_count()
        for i, result in enumerate(each_image(dataset, _fingerprint, workers, split)):
            if isinstance(result, Exception):
                good[i] = False
                kind = "missing" if isinstance(result, FileNotFoundError) else "broken"
                found[kind].append(f"{split}: {result}")
            else:
                prints[split][i] = result
        places = np.flatnonzero(good)
        values, first, inverse = np.unique(
            prints[split][places], return_index=True, return_inverse=True
        )
        firsts[split] = values, places[first]
        for i in np.flatnonzero(first[inverse] != np.arange(len(places))):
            original = places[first[inverse[i]]]
            line = f"{split}: {dataset.where(places[i])} is the same as {dataset.where(original)}"
            found["duplicated"].append(line)
    _, a, b = np.intersect1d(firsts["train"][0], firsts["test"][0], return_indices=True)
    for i, j in zip(firsts["train"][1][a], firsts["test"][1][b]):
        line = f"{sets['train'].where(i)} is the same as {sets['test'].where(j)}"
        found["in train and test"].append(line)
    return _report(args, sets, found)


def _fingerprint(dataset, i):
    """64 bits of the pixels' hash: of 14 million images, two alike by chance in 5e-6 of cases."""
    pixels = dataset.read(i).contiguous().numpy()
    content = hashlib.blake2b(str(pixels.shape).encode(), digest_size=8)
    content.update(pixels)
    return int.from_bytes(content.digest(), "little")


def _report(args, sets, found):
    for kind, lines in found.items():
        for line in lines[:20]:
            print(f"{kind}: {line}")
        if len(lines) > 20:
            print(f"{kind}: {len(lines) - 20} more; --report FILE.json lists all")
    images = {split: len(dataset) for split, dataset in sets.items()}
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in found.items())
    print(f"{args.name}: {images['train']} + {images['test']} images, {counts}")
    if args.report:
        _write_json(Path(args.report), {"name": args.name, "images": images, **found})
    return int(any(found.values()))


def pack_dataset(args):
    """Decodes and resizes every image once, into the directory NAME@SIZE."""
    given = {key: getattr(args, key) for key in ("views", "split_by", "cache_dir")}
    options = {key: value for key, value in given.items() if value is not None}
    began = time.monotonic()
    target = pack(
        args.name, args.size, args.data_dir, args.out, args.codec, args.quality, args.workers,
        **options,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: whole, {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")


def download(args):
    """Fetches what torchvision can fetch."""
    if "download" not in dataset_options(args.name):
        raise ValueError(f"{args.name}: its owner distributes it, torchvision cannot fetch it")
    sets = _both(args.name, args, download=True)
    print(f"{args.name}: {len(sets['train'])} + {len(sets['test'])} images in {args.data_dir}")


COMMANDS = {
    "list": list_datasets, "info": info, "check": check, "pack": pack_dataset,
    "download": download,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ordinary errors, for `main` to say in one line."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """Command line -> Namespace."""
    parser = Parser(
        prog="data.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        add = commands.add_parser(
            command, help=function.__doc__, description=function.__doc__, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        ).add_argument  # fmt: skip
        add("--data-dir", default="datasets", help="directory that holds the datasets")
        add("--cache-dir", help="directory for the index of large datasets; None: beside them")
        if command == "list":
            continue
        add("name", help=f"{', '.join(DATASETS)}, folder:PATH, NAME@SIZE, NAME+NAME")
        add("--views", nargs="+", help="X-ray views to keep; None: the study's of the dataset")
        add("--split-by", help="patient or image, of padchest; None: patient")
        add("--labels", help="intersection or union, of a union; None: intersection")
        if command == "info":
            add("--sheet", metavar="PNG", help="write a contact sheet of examples there")
        if command == "check":
            add("--report", metavar="JSON", help="write all that was found there")
        if command == "pack":
            add("--size", type=int, required=True, help="pixels of the side (X-rays) or the "
                "shorter side")  # fmt: skip
            add("--codec", default="raw", help="raw (fastest) or jpeg (smallest)")
            add("--quality", type=int, default=90, help="of JPEG")
            add("--out", help="directory for the pack; None: --data-dir, or beside a folder:")
        if command in ("check", "pack"):
            add("--workers", type=int, help="processes; None: one a core")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command line; returns the exit status, 2 after a line that says what is wrong."""
    try:
        args = parse(argv)
        return COMMANDS[args.command](args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
