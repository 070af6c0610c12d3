"""What is done to pixels: the study's transforms, uint8 (C,H,W) -> uint8 (C,h,w)."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as TF

# Mean and standard deviation of pixels in [0,1], by the domain of the pre-training source.
NORMALIZATION = {
    "natural": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "medical": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Pipeline(NamedTuple):
    """prepare: done to an image once, deterministic. augment: (image, rng) -> image, drawn anew.

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
    return TF.resize(image, [size])


def resize_square(image, size):
    """Both sides become `size` pixels whatever the aspect, antialiased bilinear."""
    return TF.resize(image, [size, size])


def resize_center_crop(image, size):
    """ImageNet's test transform: shorter side to size * 256/224, then the central square."""
    return TF.center_crop(resize_shorter(image, round(size * 256 / 224)), [size, size])


def xray_square(image, size):
    """The study's X-ray preparation: the central square, by area to `size` pixels.

    Each output pixel is the mean over the exact area that it covers (OpenCV's INTER_AREA); a square
    smaller than `size` is enlarged bilinearly.
    """
    side, channels = min(image.shape[-2:]), []
    square = TF.center_crop(image, [side, side])
    if side == size:
        return square
    if side < size:
        return resize_square(square, size)
    pixels, weights = _area_weights(side, size)
    for sums in square:
        # Sums over the rows, then the columns, in units of 1/size pixel. The first lie below 2^24:
        # they are exact up to 65,793 pixels.
        for dtype in (torch.float32, torch.float64):
            taken = sums.contiguous().index_select(0, pixels).to(dtype)
            taken = taken.unflatten(0, (len(weights), -1))
            sums = (weights.to(dtype) @ taken).flatten(0, 1)[:size].t()
        channels.append((sums / side**2).round_().to(torch.uint8))
    return torch.stack(channels)


@lru_cache(maxsize=256)
def _area_weights(side, size):
    """What each of four neighbouring outputs takes of each pixel that they touch.

    Returns (pixels (G*taps,) int64, weights (G,4,taps) int64 in units of 1/size pixel).
    """
    outputs = torch.arange(math.ceil(size / 4) * 4).view(-1, 4, 1)
    first = outputs[:, :1] * side // size
    pixels = first + torch.arange(math.ceil(4 * side / size) + 1)
    ends = torch.minimum((pixels + 1) * size, (outputs + 1) * side)
    weights = (ends - torch.maximum(pixels * size, outputs * side)).clamp_(min=0)
    weights *= pixels < side
    return pixels.clamp_(max=side - 1).flatten(), weights


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
    height, width = image.shape[-2:]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:  # a very elongated image: its central part of the nearest allowed aspect
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return random_flip(resize_square(image[..., top : top + h, left : left + w], size), rng)


def random_affine_flip(image, rng):
    """The study's X-ray augmentation: shift to 25 %, rotate to 45 degrees, scale +-10 %, flip.

    Turned and scaled about the centre, then shifted. Bilinear; beyond its border the image is
    mirrored, as the study's library did by default (albumentations 0.5, ShiftScaleRotate).
    """
    angle, scale = math.radians(rng.uniform(-45, 45)), rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    sides = image.shape[-1], image.shape[-2]
    right, down = (rng.uniform(-0.25, 0.25) * side for side in sides)  # pixels
    half = [max((side - 1) / 2, 0.5) for side in sides]
    rows = []  # from a pixel to where it comes from, both in units of half the image
    for x, y, unit in ((cos, sin, half[0]), (-sin, cos, half[1])):
        rows.append([x * half[0] / unit, y * half[1] / unit, -(x * right + y * down) / unit])
    grid = F.affine_grid(torch.tensor([rows]), [1, *image.shape], align_corners=True)
    image = F.grid_sample(image[None].float(), grid, "bilinear", "reflection", align_corners=True)
    return random_flip(image[0].round_().to(torch.uint8), rng)


def random_shift_flip(image, rng):
    """Shift by up to a sixteenth of the side, black coming in, and flip."""
    size, edge = image.shape[-1], image.shape[-1] // 16
    return random_crop_flip(F.pad(image, (edge,) * 4), rng, size)


RAND_AUGMENT = RandAugment(num_ops=2, magnitude=9)


def random_augment_crop_flip(image, rng, size):
    """RandAugment(2, 9) as torchvision has it (Cubuk et al. 2019, arXiv:1909.13719), then
    Inception-style crop and flip: the study's order.
    """
    with torch.random.fork_rng(devices=[]):
        # torchvision draws from PyTorch's own generator, whatever drew from it before.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        image = RAND_AUGMENT(image)
    return random_resized_crop_flip(image, rng, size)


# Of natural images in pre-training: (image, rng, size) -> image of size x size pixels.
AUGMENTATIONS = {"crop": random_resized_crop_flip, "randaugment": random_augment_crop_flip}


def xray_pipeline(size, train):
    """The study's way with X-rays, in pre-training and for multi-label targets: `size` pixels."""
    return Pipeline(partial(xray_square, size=size), random_affine_flip if train else keep, size)


def cropped_pipeline(resize, crop, train, square=False):
    """BiT's way of fine-tuning: a random crop of the image, resized by its shorter side or to a
    square, and flip; to test, the whole image as a square. Raises ValueError for too large a crop.
    """
    if crop > resize:
        raise ValueError(f"a crop of {crop} pixels is larger than the images, {resize}")
    if not train:
        return Pipeline(partial(resize_square, size=crop), keep, crop)
    prepare = partial(resize_square if square else resize_shorter, size=resize)
    return Pipeline(prepare, partial(random_crop_flip, size=crop), resize)
