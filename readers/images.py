"""Images as uint8 tensors (C,H,W): decoding, where they lie, and `ImageDataset`, with labels."""

import bisect
import dataclasses
import functools
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MODES = {"natural": "RGB", "medical": "L"}  # of read_image, by domain
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

# Of damaged EXIF, which says nothing of the pixels, Pillow warns without the file's name.
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")


def read_image(file, mode, size=None, name=None):
    """Decodes a path, or the bytes of a file `name`, to uint8 (C,H,W). mode: "RGB" or "L" (C = 1).

    Grey is copied to RGB; colour becomes luma for "L"; alpha is dropped; 16-bit grey is divided by
    257 (of 16-bit colour or alpha Pillow keeps the high byte). size: the shorter side that will be
    needed, in pixels: a JPEG is then decoded at 1/2, 1/4 or 1/8 where that leaves twice as much.
    Raises ValueError naming an unreadable or truncated file.
    """
    name = name or file
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            # Pillow only warns, and filters of warnings are not safe among preload's threads.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, a decompression bomb?")
            if size:
                image.draft(None, (2 * size, 2 * size))  # of all formats only JPEG has scales
            deep = image.mode.startswith(("I", "F"))
            pixels = np.array(image if deep or image.mode == mode else image.convert(mode))
        if deep:
            if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("neither 8- nor 16-bit pixels")
            pixels = np.rint(pixels / 257).astype(np.uint8)
            pixels = pixels if mode == "L" else np.repeat(pixels[..., None], 3, axis=2)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name}: unreadable image ({reason}); mend or remove it") from error
    pixels = torch.from_numpy(pixels)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@dataclasses.dataclass(eq=False, repr=False)
class ImageDataset(torch.utils.data.Dataset):
    """Images with labels; [i] -> (uint8 (C,H,W), label)."""

    name: str  # as given to load_dataset
    reader: Callable  # one of the readers below
    labels: np.ndarray  # (N,) int64, or (N,C) float32 in {0,1,nan}
    classes: tuple  # of str
    task: str  # "multiclass", or "multilabel" of labels (N,C)
    domain: str  # "natural" or "medical"
    groups: np.ndarray | None = None  # (N,) patient ids
    size: int | None = None  # the side in pixels of a set that is made at a side of its own
    options: dict = dataclasses.field(default_factory=dict)  # what shaped it, as used
    dropped: dict = dataclasses.field(default_factory=dict)  # {reason: images, or marks, left out}

    replace = dataclasses.replace  # (**changes) -> a copy with these attributes changed

    def __post_init__(self):
        self.classes = tuple(self.classes)
        least, most = (f.reduce(self.labels, None, initial=0) for f in (np.fmin, np.fmax))
        bound = 1 if self.task == "multilabel" else len(self.classes) - 1
        if least < 0 or most > bound:
            raise ValueError(f"{self.name}: a label is {least if least < 0 else most}")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.read(i), torch.tensor(self.labels[i])

    def read(self, i, size=None):
        """Image i (from the end if negative) as uint8 (C,H,W). size: as of `read_image`."""
        return self.reader(range(len(self))[i], size)

    def where(self, i):
        """The file of image i, or what else to call it in a message."""
        return self.reader.where(range(len(self))[i])

    def subset(self, indices):
        """The same dataset with only these images: (M,) int, in this order, or (N,) bool."""
        indices = np.arange(len(self))[indices]
        reader = Joined([self.reader], [0], indices)
        groups = None if self.groups is None else self.groups[indices]
        return self.replace(reader=reader, labels=self.labels[indices], groups=groups)


def refuse_missing(dataset):
    """Raises FileNotFoundError naming the first listed file that is not there."""

    @functools.lru_cache(maxsize=256)  # a directory is listed once, not each file looked up
    def listing(folder):
        path = os.path.join(os.fsencode(dataset.reader.folder), folder)
        return frozenset(os.listdir(path) if os.path.isdir(path) else ())

    places = (name.rpartition(b"/") for name in dataset.reader.names)
    missing = [i for i, (folder, _, file) in enumerate(places) if file not in listing(folder)]
    if missing:
        listed = f"listed for {dataset.name} but missing ({len(missing)} such)"
        mend = "fetch it, or remove it from the list"
        raise FileNotFoundError(f"{dataset.where(missing[0])}: {listed}; {mend}")


def need(name, *paths):
    """Raises FileNotFoundError unless all of these files and directories of a dataset exist."""
    mend = "--data-dir must hold the dataset's own directory, which --download cannot fetch"
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{name}: no {path}; {mend}")


def encoded(texts):
    return np.array([os.fsencode(text) for text in texts])


def own_domain(domain):
    """(mode, options) of a dataset of one's own, of which only its user knows the domain."""
    if domain not in MODES:
        raise ValueError(f"--domain {domain}: must be {' or '.join(MODES)}")
    return MODES[domain], {"domain": domain} if domain == "medical" else {}


# Readers: (i, size) -> uint8 (C,H,W), .where(i) -> str, and of files .content(i) -> their bytes.
# They hold arrays, no object an image.


class Files(NamedTuple):
    """Image files: names (N,) bytes below a folder; mode: of read_image.

    With starts and sizes (N,) int64 they are those bytes of CLASS.tar in the folder, read in place,
    by classes and labels (N,); start -1: a file of its own.
    """

    folder: str
    names: np.ndarray
    mode: str
    classes: list | None = None
    labels: np.ndarray | None = None
    starts: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def archive(self, i):
        """The archive of which image i is a member; None of a file of its own."""
        if self.starts is None or self.starts[i] < 0:
            return None
        return os.path.join(self.folder, f"{self.classes[self.labels[i]]}.tar")

    def __call__(self, i, size=None):
        name = self.where(i)
        return read_image(self.content(i) if self.archive(i) else name, self.mode, size, name)

    def content(self, i):
        archive = self.archive(i)
        if archive is None:
            return Path(self.where(i)).read_bytes()
        return np.fromfile(archive, np.uint8, self.sizes[i], offset=self.starts[i]).tobytes()

    def where(self, i):
        archive, name = self.archive(i), os.fsdecode(self.names[i])
        return f"{archive}: {name}" if archive else os.path.join(self.folder, name)


class Array(NamedTuple):
    """Images in memory: (N,H,W,C) uint8."""

    name: str
    images: np.ndarray

    def __call__(self, i, size=None):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)

    def where(self, i):
        return f"{self.name} image {i}"


class Joined(NamedTuple):
    """The images of several readers one after the other, or some of them.

    starts: of each reader its first index. chosen (M,): indices; None: all.
    """

    readers: list
    starts: list
    chosen: np.ndarray | None = None

    def find(self, i):
        """The reader that has image i, and its index there."""
        i = i if self.chosen is None else self.chosen[i]
        r = bisect.bisect(self.starts, i) - 1
        return self.readers[r], i - self.starts[r]

    def __call__(self, i, size=None):
        reader, i = self.find(i)
        return reader(i, size)

    def where(self, i):
        reader, i = self.find(i)
        return reader.where(i)


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


def in_memory(reader):
    """Whether the images of a reader need no decoding."""
    if isinstance(reader, Joined):
        return all(map(in_memory, reader.readers))
    return isinstance(reader, (Array, Decoded))
