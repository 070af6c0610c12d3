"""Tiny datasets in their official layouts, for tests to read and to spoil."""

import numpy as np
import torch
from PIL import Image

from data import load_dataset


def noise(rng, *shape, dtype=np.uint8):
    return rng.integers(np.iinfo(dtype).max + 1, size=shape).astype(dtype)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def luma(rgb):
    """ITU-R 601-2 in Pillow's fixed-point arithmetic."""
    r, g, b = (rgb[..., c].astype(int) for c in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


def random_image(rng, *shape):
    return torch.from_numpy(noise(rng, *shape))


def pixels_of(path, mode="RGB"):
    """Pillow's own reading as (C,H,W)."""
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)


NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,View Position"
NIH_ROWS = (
    "00000001_000.png,Cardiomegaly|Effusion,0,1,PA",
    "00000001_001.png,No Finding,1,1,PA",
    "",
    '00000002_000.png,"Hernia","0, or so",2,"A, P"',
    "00000003_000.png,Pleural_Thickening|Atelectasis|Pneumothorax,0,3,PA",
    "00000004_000.png,Mass,0,4,PA",
)


class Chests:
    """A tiny tree in the official layout, to be spoilt by a test."""

    def __init__(self, root, rng):
        self.root, self.folder = root, root / "NIH-ChestXRay-14"
        self.table = self.folder / "Data_Entry_2017_v2020.csv"
        self.train, self.test = self.folder / "train_val_list.txt", self.folder / "test_list.txt"
        self.pixels = {
            "00000001_000.png": noise(rng, 9, 8),
            "00000001_001.png": noise(rng, 9, 8, dtype=np.uint16),
            "00000002_000.png": noise(rng, 9, 8),
            "00000003_000.png": noise(rng, 9, 8, 4),
        }
        for name, pixels in self.pixels.items():
            save(self.folder / "images" / name, pixels)
        self.write_table(NIH_HEADER, *NIH_ROWS)
        # Not in the order of the table, Windows line ends, blank lines, a byte order mark.
        self.train.write_bytes(
            b"\xef\xbb\xbf00000003_000.png\r\n00000001_000.png\r\n\r\n00000001_001.png"
        )
        self.test.write_text("00000002_000.png\n")

    def write_table(self, *lines):
        self.table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")

    def load(self, split="train", **options):
        return load_dataset("nih", self.root, split, **options)


def load_folder(path, split="train"):
    return load_dataset(f"folder:{path}", split=split)
