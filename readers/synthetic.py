"""Two procedural image worlds, so that every script runs with nothing downloaded.

The natural-like world shows a coloured, textured object over clutter; its class is the pair texture
x shape. The X-ray-like world shows a grey chest phantom with findings. Each world has a source, for
pre-training, and four targets, for transfer, whose classes neither the source nor another shows.
The knob `gap` moves a dataset from its own world (0) to the look of the other (1), pixels in a
straight line; what bears the label stays at full strength.

An image is a pure function of (name, split, seed, index, size, gap): the key and counter of Philox
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") name it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from readers.images import ImageDataset
from readers.names import base_name, gap_of
from readers.scenes import FINDINGS, SHAPES, TEXTURES, paint_background, paint_chest, paint_object

# The targets pair what the source never pairs; NEW ones it never shows at all.
# Shape and texture are crossed, so that neither alone tells the class (in the last, shape does).
NEW = {"gridded", "hourglass", "square", "ell"}
TARGET_OBJECTS = (
    *itertools.product(("striped", "dotted"), ("disc", "triangle", "cross", "hourglass")),
    *itertools.product(("gridded",), ("disc", "cross")),
)
OBJECTS = {
    "synthetic-natural": tuple(
        pair
        for pair in itertools.product(TEXTURES, SHAPES)
        if pair not in TARGET_OBJECTS and not NEW & set(pair)
    ),
    "synthetic-natural-target": TARGET_OBJECTS,
    "synthetic-natural-target2": tuple(
        itertools.product(("checked", "ringed", "zigzag", "spoked"), ("hourglass", "square"))
    ),
    "synthetic-natural-target3": tuple(
        itertools.product(("striped", "dotted", "gridded"), ("square", "ell"))
    ),
    "synthetic-natural-target4": tuple(
        ("gridded", s) for s in ("ring", "triangle", "star", "crescent", "heart", "hourglass")
    ),
}
# Of each X-ray-like target the finding that is its class; it occurs in half of the images.
TARGET_FINDING = {
    "synthetic-xray-target": "Tuberculosis",
    "synthetic-xray-target2": "Mass",
    "synthetic-xray-target3": "Abscess",
    "synthetic-xray-target4": "Fibrosis",
}
XRAY_CLASSES = FINDINGS[:7]
DISTRACTORS = ("Cardiomegaly", "Effusion")  # shown by both classes of a target, equally often


class World(NamedTuple):
    """One row per dataset; the counts of images are defaults."""

    domain: str  # "natural" | "medical"
    task: str  # "multiclass" | "multilabel"
    classes: tuple[str, ...]
    train: int
    test: int


# A row's place names its random numbers: new rows come last.
WORLDS = {
    "synthetic-natural": None,
    "synthetic-xray": World("medical", "multilabel", XRAY_CLASSES, 8000, 1000),
    "synthetic-natural-target": None,
    "synthetic-xray-target": None,
}
for name, objects in OBJECTS.items():
    counts = (8000, 1000) if name == "synthetic-natural" else (2000, 500)
    WORLDS[name] = World("natural", "multiclass", tuple(map(" ".join, objects)), *counts)
for name, finding in TARGET_FINDING.items():
    WORLDS[name] = World("medical", "multiclass", ("Normal", finding), 1000, 500)
SIZE = 32  # pixels, the default
# The other world's share is the gap to this power: distances grow with the square of a small shift
# and fade with a large one, and so equal steps of the gap make steps of distance that tell apart.
EVEN_STEPS = {"natural": 0.65, "medical": 0.5}
DRAWS = 8  # label draws per image: one for each finding of the source, the last for the class


def generator(name, split, seed, counter):
    """The random stream of one split, from a place in it that counter (4 words) names."""
    stream = 2 * list(WORLDS).index(name) + (split == "test")
    key, counter = np.array((stream, seed), np.uint64), np.array(counter, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def label_draws(name, split, seed, first, count):
    """Rows first to first + count - 1 of the table of label draws, (count, DRAWS) in [0, 1)."""
    # A step of Philox's counter yields 4 draws, so any row can be had without those before it.
    return generator(name, split, seed, (first * DRAWS // 4, 0, 0, 0)).random((count, DRAWS))


def present(name, draws):
    """Which findings the images of an X-ray-like world show, (N, DRAWS) bool: those of XRAY_CLASSES
    and, of a target, its own; independent of each other."""
    if name in TARGET_FINDING:
        return draws < [0.25 * (finding in DISTRACTORS) for finding in XRAY_CLASSES] + [0.5]
    return draws < [0.25] * len(XRAY_CLASSES) + [0]


def labels(name, split, num_images, seed=0):
    """Labels of the first num_images images of a split ("train" or "test").

    Returns (num_images,) int64 class indices, or for a multi-label world (num_images, classes)
    float32 in {0, 1}. Fewer images give a prefix.
    """
    draws = label_draws(name, split, seed, 0, num_images)
    if name in OBJECTS:
        return (draws[:, -1] * len(OBJECTS[name])).astype(np.int64)
    shown = present(name, draws)
    if name in TARGET_FINDING:
        return shown[:, -1].astype(np.int64)
    return shown[:, :-1].astype(np.float32)


def render(name, split, index, size, seed=0, gap=0.0):
    """The image at index of a split, its label being labels(name, split, index + 1, seed)[index].

    gap: how far from its own world towards the other, 0 to 1; scene and label stay the same.
    Returns (C, size, size) uint8: C = 3 of a natural world or with a gap, else 1.
    """
    draws = label_draws(name, split, seed, index, 1)
    share = gap ** EVEN_STEPS[WORLDS[name].domain]
    scene = functools.partial(generator, name, split, seed, (0, index, 1, 0))
    other = functools.partial(generator, name, split, seed, (0, index, 2, 0))
    if name in OBJECTS:
        texture, shape = OBJECTS[name][int(draws[0, -1] * len(OBJECTS[name]))]
        phantom = paint_chest((), size, other()) if gap else 0
        image = paint_object(texture, shape, size, scene(), share, phantom)
    else:
        names = *XRAY_CLASSES, TARGET_FINDING.get(name)
        findings = [finding for finding, shown in zip(names, present(name, draws)[0]) if shown]
        image = paint_chest(findings, size, scene())
        if gap:
            # The chest alone gives way: what the findings add to it stays.
            chest, background = paint_chest((), size, scene()), paint_background(size, other())
            image = image + np.float32(share) * (background - chest)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


class Painted(NamedTuple):
    """A reader of images that are painted when they are read; paint: i -> uint8 (C,H,W)."""

    name: str
    paint: Callable

    def __call__(self, i, size=None):
        return torch.from_numpy(self.paint(int(i)))

    def content(self, i):
        return b""  # nothing is stored

    def where(self, i):
        return f"{self.name} image {i}"


def dataset(name, root, split, seed=0, size=None, gap=None):
    """The ImageDataset of a world, or of NAME~GAP. size: pixels (default: the world's own).

    gap: as in the name, which then states it. Raises ValueError for values out of range.
    """
    if not 0 <= seed < 2**63 or (size is not None and size < 1):
        raise ValueError(f"{name}: seed {seed} or size {size} is out of range")
    if gap is not None:
        if not 0 <= gap <= 1 or "~" in name:
            raise ValueError(f"{name}: gap {gap} must be 0 to 1, and not in the name (~) too")
        name = f"{name}~{np.format_float_positional(gap, trim='-')}"
    gap, base, size = gap_of(name), base_name(name), size or SIZE
    world, options = WORLDS[base], {} if gap is None else {"gap": gap}
    paint = functools.partial(render, base, split, size=size, seed=seed, gap=gap or 0.0)
    reader = Painted(f"{name} {split}", paint)
    marks = labels(base, split, getattr(world, split), seed)
    about = world.classes, world.task, world.domain
    return ImageDataset(name, reader, marks, *about, size=size, options=options)
