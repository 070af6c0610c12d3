"""Pictures from random numbers: a textured object over clutter, and a chest with findings.

Geometry is in unit coordinates, x to the right and y downwards, the image spanning [-1, 1] in both.
Shapes are signed distances, negative inside, softened over a pixel: every size shows one scene.
"""

import functools
from typing import NamedTuple

import numpy as np


@functools.lru_cache(maxsize=16)
def grid(size):
    """Coordinates of the pixel centres, x and y, each (size, size) float32 in (-1, 1)."""
    centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    return np.meshgrid(centres, centres)


@functools.lru_cache(maxsize=16)
def upsampling(size, cells):
    """Smooth interpolation from cells knots to size pixels, (size, cells) float32."""
    place = np.linspace(0, cells - 1, 2 * size + 1)[1::2]
    hat = np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0, 1)
    return (hat * hat * (3 - 2 * hat)).astype(np.float32)


def clouds(rng, channels, cells, size):
    """Value noise with about cells / 2 bumps a side, (channels, size, size) float32 in [0, 1)."""
    knots = rng.random((channels, cells, cells), dtype=np.float32)
    weights = upsampling(size, cells)
    return weights @ knots @ weights.T


def turn(x, y, angle):
    """The coordinates as seen from a frame turned by angle."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def inside(distance, soft):
    """1 inside, 0 outside, a linear ramp of width soft at the edge."""
    return np.clip(0.5 - distance / soft, 0, 1)


def length(x, y):
    return np.sqrt(x * x + y * y)


def box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def spikes(x, y, count, tilt, reach):
    """A regular polygon of count sides, reach from its centre; tilted sides make it a star."""
    wedge = 2 * np.pi / count
    turns = np.arctan2(x, -y) / wedge
    angle = np.abs(turns - np.round(turns)) * wedge  # from the axis of the nearest wedge
    return length(x, y) * np.cos(angle - tilt) - reach


def heart(x, y):
    x = np.abs(x)
    lobe = length(x - 0.42, y + 0.3) - 0.51
    point = np.maximum((x + y) * 0.7071 - 0.60, -0.30 - y)
    return np.minimum(lobe, np.maximum(point, (x - y) * 0.7071 - 0.88))


# Signed distances, all of an area of about 2, so that neither brightness nor size tells a class.
SHAPES = {
    "disc": lambda x, y: length(x, y) - 0.8,
    "ring": lambda x, y: np.abs(length(x, y) - 0.75) - 0.23,
    "triangle": lambda x, y: spikes(x, -y - 0.15, 3, 0, 0.64),
    "star": lambda x, y: spikes(x, y, 5, 0.88, 0.70),
    "cross": lambda x, y: np.minimum(box(x, y, 1.0, 0.32), box(x, y, 0.32, 1.0)),
    "crescent": lambda x, y: np.maximum(length(x, y) - 0.98, 0.65 - length(x - 0.5, y)),
    "heart": heart,
    "hourglass": lambda x, y: np.maximum(np.abs(y) - 0.9, (np.abs(x) - np.abs(y)) * 0.7 - 0.12),
    "square": lambda x, y: box(x, y, 0.71, 0.71),
    "ell": lambda x, y: np.minimum(box(x + 0.45, y, 0.37, 0.9), box(x - 0.02, y - 0.5, 0.84, 0.4)),
}

# Waves over the object, above 0 on about half of it: both tones cover the same area.
TEXTURES = {
    "striped": lambda u, v: np.sin(u),
    "checked": lambda u, v: np.sin(0.8 * u) * np.sin(0.8 * v) * 1.8,
    "dotted": lambda u, v: np.cos(u) + np.cos(v) - 0.4,
    "ringed": lambda u, v: np.sin(length(u, v)),
    "zigzag": lambda u, v: np.sin(u + 1.3 * np.arcsin(np.sin(0.8 * v))),
    "spoked": lambda u, v: np.sin(6 * np.arctan2(u, v)) * 1.5,
    "gridded": lambda u, v: np.maximum(np.sin(u), np.sin(v)) * 1.3 - 0.7,
}

CENTRED = ("ringed", "spoked")  # on the object; the other textures get a random phase


def paint_clutter(size, rng):
    """A background of soft colours, bars and faint waves, (3, size, size)."""
    x, y = grid(size)
    image = 0.3 + 0.4 * clouds(rng, 3, 4, size)
    colours = rng.random((3, 3), dtype=np.float32)
    for colour, u in zip(colours, rng.random((3, 6)).tolist()):
        px, py = turn(x - 2.4 * u[0] + 1.2, y - 2.4 * u[1] + 1.2, np.pi * u[2])
        width = 0.06 + 0.16 * u[3]
        mask = inside(box(px, py, width, width + 0.7 * u[4] ** 2), 2.5 / size)
        image += mask * (colour[:, None, None] - image)
    u = rng.random(4).tolist()
    image += 0.1 * u[3] * np.sin(turn(x, y, np.pi * u[0])[0] * (4 + 12 * u[1]) + 7 * u[2])
    return image


def shine(image, u, rng):
    """Light that falls off to one side, and the noise of a camera, in place. u: 3 draws."""
    image *= turn(*grid(image.shape[-1]), 2 * np.pi * u[0])[0] * (0.35 * u[1]) + (0.75 + 0.5 * u[2])
    image += 0.03 * rng.standard_normal(image.shape[-2:], dtype=np.float32)


def paint_object(texture, shape, size, rng, share=0, phantom=0):
    """A textured shape over clutter, (3, size, size) float32 in about [0, 1].

    share: how far, 0 to 1, clutter gives way to the phantom (1, size, size) and colour to grey.
    """
    (x, y), soft = grid(size), 2.5 / size
    image = paint_clutter(size, rng)
    u = rng.random(12).tolist()
    scale = 0.55 + 0.25 * u[0]
    px = (x - (1 - scale) * (2 * u[1] - 1)) / scale
    py = (y - (1 - scale) * (2 * u[2] - 1)) / scale
    mask = inside(SHAPES[shape](*turn(px, py, 0.7 * (2 * u[3] - 1))), soft / scale)
    frequency = 7 + 2.5 * u[4]
    tx, ty = turn(px * frequency, py * frequency, np.pi * u[5])
    if texture not in CENTRED:
        tx, ty = tx + 7 * u[6], ty + 7 * u[7]
    tone = inside(-TEXTURES[texture](tx, ty), soft * frequency / scale)
    # One tone is dark and one light in all three channels; which is which is chance.
    dark, light = rng.random((2, 3, 1, 1), dtype=np.float32) * 0.4
    first, second = (dark, light + 0.6) if u[8] < 0.5 else (light + 0.6, dark)
    surface = first + tone * (second - first)
    image += mask * (surface - image)
    shine(image, u[9:], rng)
    if share:
        other = phantom + mask * (image.mean(0) - phantom)
        image += np.float32(share) * (other - image)
    return image


def paint_background(size, rng):
    """The natural-like world without an object, (3, size, size) float32 in about [0, 1]."""
    image = paint_clutter(size, rng)
    shine(image, rng.random(3).tolist(), rng)
    return image


def heart_shadow(x, y, width):
    x = (x - 0.3 * width) / width
    y = (y - 0.2 - 0.08 * x) / (0.22 + 0.25 * width)
    return inside(length(x, y) - 1, 0.15)


class Chest(NamedTuple):
    """The phantom's (size, size) float32 maps in the patient's own frame, and what they may show.

    A finding is the share of the air that gives way to tissue, up to 1; negative where there is
    more air. u: 4 draws.
    """

    x: np.ndarray  # the heart lies mostly at x > 0, as on a frontal radiograph
    y: np.ndarray
    cloud: np.ndarray  # smooth noise in [0, 1)
    soft: float  # width of a sharp edge

    def beside(self, u):
        """x from the spine into one lung, the left or the right."""
        return self.x * (1 if u < 0.5 else -1)

    def atelectasis(self, u):
        """Plate-like bands across a lower zone."""
        x = self.beside(u[0]) - 0.42
        y = self.y - 0.02 - 0.2 * u[1] - 0.8 * (u[2] - 0.5) * x
        return 0.8 * inside(np.abs(y) - 0.045 - 0.02 * u[3], self.soft) * (x > -0.42)

    def cardiomegaly(self, u):
        """A heart wider than half of the thorax."""
        return heart_shadow(self.x, self.y, 0.46 + 0.1 * u[0])

    def consolidation(self, u):
        """A dense patch with a ragged border in a lobe."""
        x = self.beside(u[0]) - 0.36 - 0.14 * u[1]
        y = self.y + 0.3 - 0.5 * u[2]
        edge = length(x, y) - 0.2 - 0.06 * u[3] + 0.3 * (self.cloud - 0.5)
        return 0.65 * inside(edge, 0.12)

    def edema(self, u):
        """Perihilar haze in both lungs, the bat wing."""
        reach = length((np.abs(self.x) - 0.25) * 1.2, self.y + 0.05) / (0.4 + 0.1 * u[0])
        return (0.5 + 0.15 * u[1]) * np.maximum(1 - reach * reach, 0) * (0.5 + self.cloud)

    def effusion(self, u):
        """Fluid that blunts a base and climbs along the lateral wall, the meniscus."""
        x = self.beside(u[0])
        level = 0.36 - 0.28 * u[1] - 0.9 * np.maximum(x - 0.4, 0)
        return 0.9 * inside(level - self.y, 0.08) * (x > 0)

    def nodule(self, u):
        """A round, well-defined spot."""
        x = self.beside(u[0]) - 0.33 - 0.2 * u[1]
        y = self.y + 0.45 - 0.7 * u[2]
        return 0.9 * inside(length(x, y) - 0.11 - 0.04 * u[3], self.soft)

    def pneumothorax(self, u):
        """Air without markings between the pleura's thin line and the apex and lateral wall."""
        x = self.beside(u[0])
        gap = length((x - 0.32) / 0.75, (self.y - 0.12) * 0.8) - 0.34 - 0.08 * u[1]
        line = 0.6 * inside(np.abs(gap) - 0.015, self.soft)
        air = 0.4 * inside(-gap, self.soft)
        return (line - air) * (x > 0) * inside(self.y - 0.25, 0.2)

    def tuberculosis(self, u):
        """A thick-walled cavity among patchy infiltrates in an upper zone; the source has none."""
        x, y = self.beside(u[0]) - 0.36, self.y + 0.36
        rim = length(x - 0.1 * (u[1] - 0.5), y - 0.2 * (u[2] - 0.5)) - 0.12 - 0.05 * u[3]
        cavity = 0.7 * inside(np.abs(rim) - 0.045, self.soft)
        infiltrate = np.maximum(1 - 5 * (x * x + y * y), 0) * self.cloud
        hollow = 0.3 * inside(rim + 0.045, self.soft)
        return np.minimum(np.maximum(cavity, 1.1 * infiltrate), 1) - hollow

    def mass(self, u):
        """A large spot with spicules."""
        x = self.beside(u[0]) - 0.36 - 0.12 * u[1]
        y = self.y + 0.3 - 0.45 * u[2]
        return 0.8 * inside(spikes(x, y, 7, 0.6, 0.15 + 0.05 * u[3]), self.soft)

    def abscess(self, u):
        """A round cavity with a level: fluid below, air above."""
        x = self.beside(u[0]) - 0.36 - 0.12 * u[1]
        y = self.y + 0.25 - 0.4 * u[2]
        cavity = inside(length(x, y) - 0.19 - 0.04 * u[3], self.soft)
        return cavity * (1.3 * inside(-y, self.soft) - 0.5)

    def fibrosis(self, u):
        """A coarse net in both lower zones."""
        x, y = turn(self.x, self.y, 0.8 * (u[0] - 0.5))
        net = np.maximum(np.sin((22 + 4 * u[1]) * x), np.sin((22 + 4 * u[2]) * y))
        return (0.5 + 0.2 * u[3]) * (net - 0.35) * inside(-self.y - 0.05, 0.3)


# The source's seven, and the one of each target.
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Nodule"),
    *("Pneumothorax", "Tuberculosis", "Mass", "Abscess", "Fibrosis"),
)


def paint_chest(findings, size, rng):
    """A frontal chest radiograph with the findings named, (1, size, size) float32."""
    u = rng.random(16).tolist()
    soft = 3 / size
    zoom = 0.9 + 0.2 * u[0]
    x, y = (zoom * axis - 0.2 * (v - 0.5) for axis, v in zip(grid(size), u[1:3]))
    x, y = turn(x, y, 0.2 * (u[3] - 0.5))
    x = x * (0.9 + 0.2 * u[4])
    side = np.abs(x)
    # Lungs: two upright ovals, narrower at the apex, cut by the domes of the diaphragm.
    oval = length((side - 0.43) / (0.33 + 0.12 * y), (y + 0.02) / 0.75) - 1
    dome = y - 0.42 - 0.08 * u[5] + 0.06 * (x < 0) - 0.9 * (side - 0.36) ** 2
    heart = heart_shadow(x, y, 0.28 + 0.08 * u[7])
    lung = inside(np.maximum(oval * 0.33, dome), 0.05) * (1 - heart)
    chest = Chest(x, y, clouds(rng, 1, 9, size)[0], soft)
    # Draws for every finding, present or not: one finding more leaves the rest of the image as is.
    # The last are of whichever the source never shows: an image has one of these at most.
    draws = rng.random((8, 4)).tolist()
    for finding in findings:
        place = min(FINDINGS.index(finding), 7)
        lung *= 1 - getattr(chest, finding.lower())(draws[place])
    body = inside(side - np.minimum(0.92, 0.42 + 2.2 * (y + 1.12)), 0.08)
    density = body * (0.66 - 0.06 * y) - (0.42 + 0.1 * u[6]) * lung + 0.06 * heart
    # Spine, ribs, clavicles, and the vessels that fan out from the hila.
    density += 0.16 * inside(side - 0.1, 0.06) * (1 + 0.2 * np.sin(22 * y))
    ribs = np.sin((y - 0.5 * side + 0.9 * side * side) * (19 + 3 * u[8]) + 6 * u[9])
    density += (0.05 + 0.05 * u[10]) * body * np.maximum(ribs, 0) * (side > 0.1)
    collar = np.abs(y + 0.72 - 0.25 * side + 0.1 * u[11]) - 0.03
    density += 0.1 * inside(collar, soft) * (side > 0.08) * body
    hila = np.maximum(1 - length((side - 0.16) * 2.2, y + 0.02) * 2, 0)
    density += lung * (0.18 * hila + 0.16 * (chest.cloud - 0.5))
    exposure, contrast = 0.2 * (u[12] - 0.5), 0.75 + 0.5 * u[13]
    image = 0.5 + exposure + contrast * (density - 0.5)
    image += (0.015 + 0.025 * u[14]) * rng.standard_normal((size, size), dtype=np.float32)
    return image[None]
