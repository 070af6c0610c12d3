"""Datasets by name, the study's transforms, few-shot subsets, and batches that any layout repeats.

Data flows: `load_dataset` -> `ImageDataset` (uint8 images and labels) -> a `Pipeline` (what is done
to a pixel once, what is drawn anew each time) -> `Batches` (the global batch of step s, or one
rank's part of it) -> `loader` (the same, read ahead by worker processes).

Images stay uint8 until they are on the device; engine.py normalises them there.
"""

import atexit
import csv
import difflib
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import synthetic

# Mean and standard deviation of pixels in [0,1], by the domain of the pre-training source.
NORMALIZATION = {
    "natural": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "medical": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
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
        return self.read(i), torch.as_tensor(self.labels[i])

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


def load_dataset(name, root="datasets", split="train", **options):
    """The dataset of that name.

    name: a key of DATASETS or folder:PATH. root: directory that holds the real datasets.
    split: "train" or "test". options: download=True fetches what torchvision can fetch;
    seed=0 and size=None (pixels) for the synthetic worlds.
    Raises ValueError for an unknown name, split, column or label, FileNotFoundError for a
    missing directory or file; each names it and the mend.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")
    if name.startswith("folder:"):
        return _folder(name, Path(name.removeprefix("folder:")), split, **options)
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown dataset {name!r}; did you mean {near!r}? "
            f"known: {', '.join(DATASETS)}, folder:PATH"
        )
    return DATASETS[name](name, Path(root), split, **options)


def dataset_slug(name):
    """The name as a part of a path: folder:/a/b becomes folder-b."""
    if name.startswith("folder:"):
        return f"folder-{Path(name.removeprefix('folder:')).resolve().name}"
    return name


def _synthetic(name, root, split, seed=0, size=None, download=False):
    world = synthetic.WORLDS[name]
    if not 0 <= seed < 2**63 or (size is not None and size < 1):
        raise ValueError(f"{name}: seed {seed} or size {size} is out of range")
    size = size or world.size
    labels = synthetic.labels(name, split, getattr(world, split), seed)
    reader = Rendered(name, split, size, seed)
    return ImageDataset(name, reader, labels, world.classes, world.task, world.domain, size=size)


def _folder(name, path, split, download=False):
    """PATH/train/CLASS/*, PATH/test/CLASS/*; classes are the sorted names below train/."""
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(
                f"{name}: no directory {path / part}; images belong in PATH/train/CLASS/ and "
                "PATH/test/CLASS/"
            )
    classes, here = _class_names(path / "train"), _class_names(path / split)
    if not classes:
        raise ValueError(f"{path / 'train'}: holds no class directory")
    for unknown in sorted(set(here) - set(classes)):
        raise ValueError(f"{path / split / unknown}: no class of that name in {path / 'train'}")
    names, labels = [], []
    for label, cls in enumerate(classes):
        files = _image_names(path / split / cls) if cls in here else []
        if not files:
            raise ValueError(f"{path / split / cls}: the class has no image; add some or drop it")
        names += [os.fsencode(f"{cls}/{file}") for file in files]
        labels += [label] * len(files)
    reader = Files(str(path / split), np.array(names), "RGB")
    return ImageDataset(name, reader, np.array(labels, np.int64), classes, "multiclass", "natural")


def _class_names(folder):
    """Sorted directory names; hidden entries are passed over, a loose file is refused."""
    entries = sorted(
        (e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name
    )
    for entry in entries:
        if not entry.is_dir():
            raise ValueError(f"{entry.path}: not a class directory; move it out of the dataset")
    return [entry.name for entry in entries]


def _image_names(folder):
    """Sorted file names; hidden files are passed over, any other file must be an image."""
    names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    for name in names:
        if not name.lower().endswith(IMAGE_ENDINGS):
            raise ValueError(
                f"{folder / name}: not an image by its ending ({' '.join(IMAGE_ENDINGS)}); "
                "move it out of the dataset"
            )
    return names


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
    return _path_dataset(name, paths, labels, classes)


def _pets(name, root, split, download=False):
    part = {"train": "trainval", "test": "test"}[split]
    source = _torchvision(torchvision.datasets.OxfordIIITPet, name, root, download, split=part)
    return _path_dataset(name, source._images, source._labels, source.classes)


def _path_dataset(name, paths, labels, classes):
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{name}: no {path}; remove its directory, then --download")
    names = np.array([os.fsencode(path) for path in paths])
    reader = Files("", names, "RGB")
    return ImageDataset(name, reader, np.array(labels, np.int64), classes, "multiclass", "natural")


NIH_CLASSES = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia "
    "Infiltration Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
).split()


def _nih(name, root, split, download=False):
    """NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315) in its official layout and split."""
    folder = root / "NIH-ChestXRay-14"
    table = folder / "Data_Entry_2017_v2020.csv"
    lists = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    for path in (table, *lists.values(), folder / "images"):
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: no {path}; give the directory above {folder.name} as --data-dir "
                "(its owner distributes it, --download cannot)"
            )
    listed = {part: _read_list(path) for part, path in lists.items()}
    _refuse_repeats(listed["train"] + listed["test"], " + ".join(map(str, lists.values())))
    chosen, chosen_list = set(listed[split]), lists[split]
    names, labels, patients = [], [], []
    columns = ("Image Index", "Finding Labels", "Patient ID")
    for line, (image, findings, patient) in _read_csv(table, columns):
        if image in chosen:
            if not patient.isdecimal():
                raise ValueError(f"{table}, line {line}: Patient ID {patient!r} is not a number")
            names.append(image)
            labels.append(_nih_labels(findings, f"{table}, line {line}"))
            patients.append(int(patient))
    _refuse_repeats(names, table)
    missing = chosen - set(names)
    if missing:
        raise ValueError(f"{chosen_list}: {min(missing)} has no row in {table.name}")
    missing = chosen - {entry.name for entry in os.scandir(folder / "images")}
    if missing:
        raise FileNotFoundError(
            f"{folder / 'images' / min(missing)}: listed in {chosen_list.name} but missing "
            f"({len(missing)} such)"
        )
    names = np.array([os.fsencode(name) for name in names])
    reader = Files(str(folder / "images"), names, "L")
    labels, groups = np.array(labels, np.float32), np.array(patients, np.int64)
    return ImageDataset(name, reader, labels, NIH_CLASSES, "multilabel", "medical", groups)


def _nih_labels(findings, where):
    present = set(findings.split("|")) - {"No Finding"}
    for unknown in sorted(present - set(NIH_CLASSES)):
        raise ValueError(f"{where}: unknown finding {unknown!r}; known: {', '.join(NIH_CLASSES)}")
    return [cls in present for cls in NIH_CLASSES]


def _read_list(path):
    """The lines of a text file, blank ones aside."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: lists no image")
    return names


def _refuse_repeats(names, where):
    names, counts = np.unique(names, return_counts=True)
    if counts.max(initial=0) > 1:
        raise ValueError(f"{where}: {names[counts.argmax()]} occurs more than once; keep one")


def _read_csv(path, columns):
    """Yields (line number, the values of these columns) for each row."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            for column in columns:
                if column not in header:
                    raise ValueError(f"{path}: no column {column!r}; it has: {', '.join(header)}")
            places = [header.index(column) for column in columns]
            for row in rows:
                if row and len(row) <= max(places):
                    raise ValueError(f"{path}, line {rows.line_num}: {len(row)} columns only")
                if row:
                    yield rows.line_num, [row[place] for place in places]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: unreadable near line {rows.line_num} ({error})") from error


DATASETS = {
    **dict.fromkeys(synthetic.WORLDS, _synthetic),
    "cifar10": _cifar,
    "cifar100": _cifar,
    "flowers102": _flowers,
    "pets": _pets,
    "nih": _nih,
}


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

    SHOTS, ORDER, DRAW, AUGMENT, MIXUP = range(5)


def generator(seed, *purpose):
    """numpy's generator for a seed, a Stream and what else tells its draws from others."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: must be 0 or more")
    return np.random.default_rng([seed, *purpose])


@functools.lru_cache(maxsize=2)
def _permutation(num_images, seed, epoch):
    return generator(seed, Stream.ORDER, epoch).permutation(num_images)


def batch_indices(step, num_images, batch_size, seed, sampling="shuffle", labels=None):
    """Which images make up the global batch of a step, a function of (seed, step) alone.

    sampling: "shuffle" walks through one permutation an epoch after the other, so that each image
    comes once an epoch and no batch is short; "replacement" draws each image anew; "balanced"
    does so with probability inverse to the frequency of its class in labels (N,);
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
        weights = 1 / np.bincount(labels)[labels]
        return rng.choice(num_images, batch_size, p=weights / weights.sum()), places
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

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, step):
        labels = self.dataset.labels
        indices, draws = batch_indices(
            step, len(self.dataset), self.batch_size, self.seed, self.sampling, labels
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
