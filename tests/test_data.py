"""Labels, splits and pixels against independent readers; draws that any layout repeats."""

import csv
import math
import multiprocessing
import operator
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
import loading
import transforms
from data import few_shot_indices, load_dataset
from images import ImageDataset, read_image
from loading import Batches, batch_indices, loader, preload
from transforms import (
    Pipeline,
    area_resize,
    hyperrule_pipeline,
    keep,
    pretraining_pipeline,
    random_affine_flip,
    random_crop_flip,
    random_flip,
    random_resized_crop_flip,
    random_shift_flip,
    resize_center_crop,
    resize_shorter,
    resize_square,
    xray_square,
)
from xrays import NIH_CLASSES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def real():
    if "REAL_DATA" not in os.environ:
        pytest.skip("REAL_DATA does not name the directory of the real files")
    return Path(os.environ["REAL_DATA"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(rng, *shape, dtype=np.uint8):
    return rng.integers(np.iinfo(dtype).max + 1, size=shape).astype(dtype)


def refuses(error, call, *words):
    """The error is of exactly this type, one line long, and has these words."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def pixels_of(path, mode="RGB"):
    """Pillow's own reading as (C,H,W)."""
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------
# Reading one image
# ------------------------------------------------------------------------------------------------


def luma(rgb):
    """ITU-R 601-2 in Pillow's fixed-point arithmetic."""
    r, g, b = (rgb[..., c].astype(int) for c in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


GREY = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
ALPHA = np.array([[0, 0, 7], [255, 3, 0]], np.uint8)
DEEP = np.array([[0, 128, 129], [257, 32896, 65535]], np.uint16)


def as_palette():
    image = Image.new("P", (3, 2))
    image.putpalette([*range(10, 28)])
    image.putdata([0, 1, 2, 3, 4, 5])
    return image, np.arange(10, 28, dtype=np.uint8).reshape(2, 3, 3)


@pytest.mark.parametrize(
    "image, rgb, grey",
    [
        (Image.fromarray(GREY), GREY, GREY),
        (Image.fromarray(DEEP), *[np.array([[0, 0, 1], [1, 128, 255]], np.uint8)] * 2),
        (Image.fromarray(np.stack([GREY, ALPHA], -1)), GREY, GREY),
        (Image.fromarray(COLOUR), COLOUR, luma(COLOUR)),
        (Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR, luma(COLOUR)),
        (as_palette()[0], as_palette()[1], luma(as_palette()[1])),
        (Image.fromarray(GREY > 127), *[np.where(GREY > 127, 255, 0).astype(np.uint8)] * 2),
    ],
    ids=["grey", "grey16", "grey+alpha", "rgb", "rgba", "palette", "one-bit"],
)
def test_read_image_modes(tmp_path, image, rgb, grey):
    image.save(tmp_path / "x.png")
    colour, single = read_image(tmp_path / "x.png", "RGB"), read_image(tmp_path / "x.png", "L")
    assert colour.dtype == single.dtype == torch.uint8
    assert colour.shape == (3, 2, 3) and single.shape == (1, 2, 3)
    rgb = rgb if rgb.ndim == 3 else np.stack([rgb] * 3, -1)
    np.testing.assert_array_equal(colour.permute(1, 2, 0), rgb)
    np.testing.assert_array_equal(single[0], grey)


def test_read_image_cmyk_jpeg(tmp_path, rng):
    inks = noise(rng, 16, 24, 4)
    Image.fromarray(inks, "CMYK").save(tmp_path / "x.jpg", quality=95)
    colour, single = (read_image(tmp_path / "x.jpg", mode) for mode in ("RGB", "L"))
    assert colour.shape == (3, 16, 24) and single.shape == (1, 16, 24)
    np.testing.assert_array_equal(colour, pixels_of(tmp_path / "x.jpg"))
    np.testing.assert_array_equal(single, pixels_of(tmp_path / "x.jpg", "L"))
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")
    assert read_image(tmp_path / "cyan.jpg", "RGB")[:, 4, 4].tolist() == [0, 255, 255]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_read_image_refuses_truncated(tmp_path, rng, ending):
    path = tmp_path / f"x.{ending}"
    save(path, noise(rng, 64, 64, 3))
    whole = path.read_bytes()
    for part in (1, 20, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:part])
        refuses(ValueError, lambda: read_image(path, "RGB"), path, "unreadable")


def test_read_image_refuses_what_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image\n" * 100)
    (tmp_path / "folder.png").mkdir()
    for name in ("empty.png", "text.png", "folder.png"):
        refuses(ValueError, lambda name=name: read_image(tmp_path / name, "L"), tmp_path / name)
    refuses(
        FileNotFoundError, lambda: read_image(tmp_path / "none.png", "L"), tmp_path / "none.png"
    )


def test_read_image_refuses_float_and_wide_pixels(tmp_path):
    for pixels in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32)):
        save(tmp_path / "x.tif", pixels)
        refuses(ValueError, lambda: read_image(tmp_path / "x.tif", "L"), "x.tif", "16-bit")


def test_read_image_refuses_bombs(tmp_path, monkeypatch):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    refuses(ValueError, lambda: read_image(tmp_path / "bomb.png", "L"), "bomb.png", "bomb")
    # Pillow refuses from twice its limit on and merely warns below that.
    save(tmp_path / "x.png", np.zeros((10, 15), np.uint8))
    assert read_image(tmp_path / "x.png", "L").shape == (1, 10, 15)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(ValueError, lambda: read_image(tmp_path / "x.png", "L"), "x.png", "15 x 10", "bomb")


# ------------------------------------------------------------------------------------------------
# NIH ChestX-ray14
# ------------------------------------------------------------------------------------------------

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


@pytest.fixture
def chests(tmp_path, rng):
    return Chests(tmp_path, rng)


def test_nih_classes():
    assert NIH_CLASSES == [
        *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
        *("Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"),
        *("Pneumonia", "Pneumothorax"),
    ]


def test_nih_labels_order_and_groups(chests):
    train, test = chests.load(), chests.load("test")
    assert (len(train), len(test)) == (3, 1)
    for dataset in (train, test):
        assert dataset.name == "nih" and dataset.classes == tuple(NIH_CLASSES)
        assert (dataset.task, dataset.domain, dataset.size) == ("multilabel", "medical", None)
        assert dataset.labels.dtype == np.float32
    assert train.groups.tolist() == [1, 1, 3] and test.groups.tolist() == [2]
    # The rows' order, not the list's: Cardiomegaly 1, Effusion 4; nothing; 0, 11, 13.
    assert [np.flatnonzero(row).tolist() for row in train.labels] == [[1, 4], [], [0, 11, 13]]
    assert np.flatnonzero(test.labels[0]).tolist() == [7]
    assert set(np.unique(train.labels)) == {0, 1}


def test_nih_pixels(chests):
    train, test = chests.load(), chests.load("test")
    grey, deep, rgba = (chests.pixels[f"0000000{n}.png"] for n in ("1_000", "1_001", "3_000"))
    for i, expected in enumerate((grey, (deep.astype(int) + 128) // 257, luma(rgba))):
        image = train.read(i)
        assert image.dtype == torch.uint8 and image.shape == (1, 9, 8)
        np.testing.assert_array_equal(image[0], expected)
    image, label = test[0]
    np.testing.assert_array_equal(image[0], chests.pixels["00000002_000.png"])
    assert label.dtype == torch.float32 and label.tolist() == test.labels[0].tolist()


def test_nih_cannot_be_downloaded(chests):
    refuses(ValueError, partial(chests.load, download=True), "nih", "download", "views")


@pytest.mark.parametrize("part", ["table", "train", "test", "folder"])
def test_nih_missing_parts(chests, part):
    path = getattr(chests, part)
    path.rename(path.parent / "elsewhere")
    missing = chests.table if part == "folder" else path
    refuses(FileNotFoundError, chests.load, f"no {missing}", "--data-dir", "--download cannot")


def test_nih_missing_images_folder(chests):
    (chests.folder / "images").rename(chests.folder / "pictures")
    refuses(FileNotFoundError, chests.load, chests.folder / "images", "--data-dir")


@pytest.mark.parametrize(
    "lines, words",
    [
        ([NIH_HEADER.replace("Patient ID", "Patient"), *NIH_ROWS], ["'Patient ID'", "Image Index"]),
        ([], ["no column 'Image Index'"]),
        ([NIH_HEADER, *NIH_ROWS, "00000001_000.png,Mass"], ["line 8", "2 columns"]),
        (
            [NIH_HEADER, "00000001_000.png,Mass|Tumour,0,1,PA"],
            ["line 2", "'Mass|Tumour'", "Nodule"],
        ),
        ([NIH_HEADER, "00000001_000.png,,0,1,PA"], ["line 2", "Finding Labels ''"]),
        ([NIH_HEADER, "00000001_000.png,Mass,0,one,PA"], ["line 2", "Patient ID 'one'"]),
        ([NIH_HEADER, *NIH_ROWS, NIH_ROWS[0]], ["00000001_000.png", "more than once"]),
        ([NIH_HEADER, *NIH_ROWS, "x" * 200000], ["line 8", "field limit"]),
    ],
)
def test_nih_refuses_table(chests, lines, words):
    chests.write_table(*lines)
    refuses(ValueError, chests.load, chests.table, *words)


@pytest.mark.parametrize("file", ["table", "train", "test"])
def test_nih_refuses_other_encodings(chests, file):
    getattr(chests, file).write_bytes("Zoë.png\n".encode("latin-1"))
    refuses(ValueError, chests.load, getattr(chests, file), "utf-8")


def test_nih_refuses_lists(chests):
    chests.train.write_text("00000001_000.png\n00000009_000.png\n")
    refuses(ValueError, chests.load, chests.train, "00000009_000.png", "no row", chests.table.name)
    chests.train.write_text("00000001_000.png\n00000004_000.png\n")
    path = chests.folder / "images" / "00000004_000.png"
    refuses(FileNotFoundError, chests.load, path, "1 such")
    chests.train.write_text("00000001_000.png\n00000002_000.png\n")
    for split in ("train", "test"):  # in both lists: it would be trained on and tested on
        refuses(ValueError, partial(chests.load, split), "00000002_000.png", chests.train.name)
    chests.train.write_text("00000001_000.png\n" * 2)
    refuses(ValueError, chests.load, "00000001_000.png", "more than once")
    chests.train.write_text("\n \r\n")
    refuses(ValueError, chests.load, chests.train, "no image")


def test_nih_names_a_broken_image(chests):
    path = chests.folder / "images" / "00000003_000.png"
    path.write_bytes(path.read_bytes()[:60])
    refuses(ValueError, lambda: chests.load().read(2), path)


def test_nih_file_names_with_blanks(chests, rng):
    save(chests.folder / "images" / "a b é.png", noise(rng, 5, 5))
    chests.write_table(NIH_HEADER, "a b é.png,Mass,0,7,PA", *NIH_ROWS)
    chests.train.write_text("a b é.png\n", encoding="utf-8")
    dataset = chests.load()
    assert dataset.read(0).shape == (1, 5, 5) and dataset.groups.tolist() == [7]


@pytest.mark.parametrize("size, train, test", [(256, 558, 129), (1024, 30, 8)])
def test_nih_real(tmp_path, real, size, train, test):
    folder = real / f"nih-{size}"
    (tmp_path / "NIH-ChestXRay-14").symlink_to(folder)
    with open(folder / "Data_Entry_2017_v2020.csv", newline="") as file:
        rows = {row["Image Index"]: row for row in csv.DictReader(file)}
    sets = [load_dataset("nih", tmp_path, split) for split in ("train", "test")]
    assert [len(dataset) for dataset in sets] == [train, test]
    assert not set(sets[0].groups) & set(sets[1].groups)
    for dataset, file in zip(sets, ("train_val_list.txt", "test_list.txt")):
        listed = set((folder / file).read_text().split())
        names = [name for name in rows if name in listed]
        for i, name in enumerate(names):
            found = {dataset.classes[c] for c in np.flatnonzero(dataset.labels[i])}
            assert found == set(rows[name]["Finding Labels"].split("|")) - {"No Finding"}
            assert dataset.groups[i] == int(rows[name]["Patient ID"])
        for i in range(0, len(names), 10 if size == 256 else 5):
            expected = pixels_of(folder / "images" / names[i], "L")
            assert expected.shape == (1, size, size)
            np.testing.assert_array_equal(dataset.read(i), expected)


# ------------------------------------------------------------------------------------------------
# A folder of one's own
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def pets_at_home(tmp_path, rng):
    for split, counts in (("train", (2, 3)), ("test", (1, 1))):
        for cls, count in zip(("cat", "Dog"), counts):
            for i in range(count):
                save(tmp_path / split / cls / f"{i}.png", noise(rng, 4 + i, 5, 3))
    return tmp_path


def folder(path, split="train"):
    return load_dataset(f"folder:{path}", split=split)


def test_folder(pets_at_home):
    train, test = folder(pets_at_home), folder(pets_at_home, "test")
    assert train.classes == test.classes == ("Dog", "cat")  # sorted as torchvision sorts
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.labels.dtype == np.int64
    assert (train.task, train.domain, train.groups) == ("multiclass", "natural", None)
    image, label = train[4]
    np.testing.assert_array_equal(image, pixels_of(pets_at_home / "train" / "cat" / "1.png"))
    assert label.dtype == torch.int64 and label.item() == 1


def test_folder_passes_hidden_entries_over(pets_at_home):
    (pets_at_home / "train" / "cat" / ".DS_Store").touch()
    (pets_at_home / "train" / ".thumbnails").mkdir()
    (pets_at_home / "test" / ".thumbnails").mkdir()
    assert folder(pets_at_home).labels.tolist() == [0, 0, 0, 1, 1]
    assert folder(pets_at_home, "test").classes == ("Dog", "cat")


def test_folder_odd_names(pets_at_home, rng):
    names = ["A B.PNG", "new\nline.JpEg", "é漢.png", "-rf.TIFF", "'q\".bmp", "a%d{}.png"]
    expected = []
    for i, name in enumerate(sorted(names)):
        save(pets_at_home / "train" / "Ünï 漢" / name, noise(rng, 3 + i, 4, 3))
        expected.append(pixels_of(pets_at_home / "train" / "Ünï 漢" / name))
    dataset = folder(pets_at_home)
    assert dataset.classes == ("Dog", "cat", "Ünï 漢")
    for i, pixels in enumerate(expected):
        np.testing.assert_array_equal(dataset.read(5 + i), pixels)


def test_folder_names_that_are_not_utf8(pets_at_home, rng):
    path = os.fsencode(pets_at_home / "train" / "cat" / "0.png")
    odd = path.replace(b"cat", b"c\xff\xfet").replace(b"0.png", b"\xe9.png")
    try:
        os.mkdir(os.path.dirname(odd))
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    os.rename(path, odd)
    dataset = folder(pets_at_home)
    assert dataset.classes == ("Dog", "cat", "c\udcff\udcfet")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 2]
    np.testing.assert_array_equal(dataset.read(4), pixels_of(odd))
    os.truncate(odd, 30)
    refuses(ValueError, lambda: dataset.read(4), "c\udcff\udcfet")


def test_folder_refusals(pets_at_home):
    train, test = pets_at_home / "train", pets_at_home / "test"
    (test / "cow").mkdir()
    refuses(ValueError, partial(folder, pets_at_home, "test"), test / "cow", "no class")
    (test / "cow").rename(train / "cow")
    refuses(ValueError, partial(folder, pets_at_home), train / "cow", "no image")
    (train / "cow").rmdir()
    (train / "cat" / "notes.txt").touch()
    refuses(ValueError, partial(folder, pets_at_home), train / "cat" / "notes.txt", "not an image")
    (train / "cat" / "notes.txt").rename(train / "notes.txt")
    refuses(ValueError, partial(folder, pets_at_home), train / "notes.txt", "class directory")
    (train / "notes.txt").unlink()
    (test / "cat" / "0.png").unlink()
    refuses(ValueError, partial(folder, pets_at_home, "test"), test / "cat", "no image")
    train.rename(pets_at_home / "training")
    refuses(FileNotFoundError, partial(folder, pets_at_home), train, "PATH/train/CLASS")
    train.mkdir()
    refuses(ValueError, partial(folder, pets_at_home), train, "no class directory")


def test_folder_symlinks(pets_at_home):
    train = pets_at_home / "train"
    (train / "cat" / "9.png").symlink_to("1.png")
    assert torch.equal(folder(pets_at_home).read(5), folder(pets_at_home).read(4))
    (train / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises((ValueError, OSError), match="loop.png"):
        folder(pets_at_home).read(6)
    (train / "round").symlink_to(train)  # a class that holds the classes
    refuses(ValueError, partial(folder, pets_at_home), train / "round" / "Dog", "not an image")
    (train / "round").unlink()
    (train / "round").symlink_to("round")
    with pytest.raises(OSError, match="round"):
        folder(pets_at_home)


@pytest.mark.parametrize("split, count", [("train", 2000), ("test", 1000)])
def test_folder_real_equals_torchvision(real, split, count):
    dataset = folder(real / "cifar10-folder", split)
    reference = torchvision.datasets.ImageFolder(real / "cifar10-folder" / split)
    assert len(dataset) == len(reference) == count
    assert dataset.classes == tuple(reference.classes) and len(dataset.classes) == 10
    assert dataset.labels.tolist() == reference.targets
    for i in range(0, count, 7):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(reference.samples[i][0]))


def test_subset_keeps_labels_and_groups_together(chests):
    part = chests.load().subset([2, 0])
    assert part.groups.tolist() == [3, 1]
    assert [np.flatnonzero(row).tolist() for row in part.labels] == [[0, 11, 13], [1, 4]]
    np.testing.assert_array_equal(part.read(1)[0], chests.pixels["00000001_000.png"])


def test_subset(pets_at_home):
    dataset = folder(pets_at_home)
    for indices in ([4, 0], np.array([False, True, False, False, True]), torch.tensor([3, 3])):
        part = dataset.subset(indices)
        places = np.arange(5)[indices]
        assert len(part) == len(places) and part.labels.tolist() == dataset.labels[places].tolist()
        for i, place in enumerate(places):
            assert torch.equal(part.read(i), dataset.read(place))
    with pytest.raises(IndexError):
        dataset.subset([5])


def test_slug():
    assert data.dataset_slug("nih") == "nih"
    assert data.dataset_slug("folder:/a/b/") == "folder-b"


# ------------------------------------------------------------------------------------------------
# What torchvision reads
# ------------------------------------------------------------------------------------------------


def whole(monkeypatch, module):
    """torchvision's checksums are of the real files: any file that exists will do here."""
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def test_cifar10(tmp_path, rng, monkeypatch):
    whole(monkeypatch, torchvision.datasets.cifar)
    base = tmp_path / "cifar-10-batches-py"
    pixels, labels = noise(rng, 12, 3, 32, 32), rng.integers(10, size=12).tolist()
    for i, file in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        part = slice(2 * i, 2 * i + 2)
        write_pickle(base / file, {"data": pixels[part].reshape(2, 3072), "labels": labels[part]})
    names = [f"class {i}" for i in range(10)]
    write_pickle(base / "batches.meta", {"label_names": names})
    for split, part in (("train", slice(10)), ("test", slice(10, 12))):
        dataset = load_dataset("cifar10", tmp_path, split)
        assert dataset.classes == tuple(names)
        assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == labels[part]
        for i, expected in enumerate(pixels[part]):
            np.testing.assert_array_equal(dataset.read(i), expected)


def test_cifar100(tmp_path, rng, monkeypatch):
    whole(monkeypatch, torchvision.datasets.cifar)
    base = tmp_path / "cifar-100-python"
    pixels = noise(rng, 5, 3, 32, 32)
    for file, part, fine in (("train", slice(3), [99, 0, 5]), ("test", slice(3, 5), [7, 7])):
        flat = pixels[part].reshape(-1, 3072)
        write_pickle(base / file, {"data": flat, "fine_labels": fine, "coarse_labels": [1] * 3})
    write_pickle(base / "meta", {"fine_label_names": [f"f{i}" for i in range(100)]})
    train, test = (load_dataset("cifar100", tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [99, 0, 5] and test.labels.tolist() == [7, 7]
    assert train.classes[99] == "f99" and len(train.classes) == 100
    np.testing.assert_array_equal(test.read(1), pixels[4])


@pytest.fixture
def flowers(tmp_path, rng, monkeypatch):
    whole(monkeypatch, torchvision.datasets.flowers102)
    base = tmp_path / "flowers-102"
    for image in range(1, 8):
        save(base / "jpg" / f"image_{image:05d}.jpg", noise(rng, 6, 4 + image, 3))
    labels = np.array([[77, 1, 102, 3, 3, 50, 2]])  # counted from 1
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    sets = {"trnid": [[2, 1]], "valid": [[7, 5]], "tstid": [[6, 3, 4]]}
    scipy.io.savemat(base / "setid.mat", {name: np.array(ids) for name, ids in sets.items()})
    return tmp_path


def test_flowers(flowers):
    train, test = (load_dataset("flowers102", flowers, split) for split in ("train", "test"))
    # The study's rule: the official test list is trained on, train + validation is tested on.
    assert train.labels.tolist() == [49, 101, 2] and test.labels.tolist() == [0, 76, 1, 2]
    assert train.labels.dtype == np.int64
    for dataset, images in ((train, (6, 3, 4)), (test, (2, 1, 7, 5))):
        assert len(dataset.classes) == 102 and dataset.classes[76] == "passion flower"
        for i, image in enumerate(images):
            path = flowers / "flowers-102" / "jpg" / f"image_{image:05d}.jpg"
            np.testing.assert_array_equal(dataset.read(i), pixels_of(path))


def test_flowers_names_a_missing_image(flowers):
    path = flowers / "flowers-102" / "jpg" / "image_00003.jpg"
    path.unlink()
    refuses(FileNotFoundError, lambda: load_dataset("flowers102", flowers), "flowers102", path)


def test_pets(tmp_path, rng):
    base = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": ["Abyssinian_2 1 1 1", "great_pyrenees_9 2 2 1", "Abyssinian_5 1 1 1"]}
    lists["test"] = ["great_pyrenees_1 2 2 1", "Abyssinian_7 1 1 1"]
    for file, lines in lists.items():
        (base / "annotations").mkdir(parents=True, exist_ok=True)
        (base / "annotations" / f"{file}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            save(base / "images" / f"{line.split()[0]}.jpg", noise(rng, 7, 5, 3))
    train, test = (load_dataset("pets", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ("Abyssinian", "Great Pyrenees")
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(
        train.read(1), pixels_of(base / "images" / "great_pyrenees_9.jpg")
    )
    (base / "annotations" / "test.txt").write_text("half a line")
    refuses(FileNotFoundError, lambda: load_dataset("pets", tmp_path, "test"), tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets"])
def test_missing_data_names_directory_and_mend(tmp_path, name):
    where = tmp_path / "nowhere"
    for split in ("train", "test"):
        call = partial(load_dataset, name, where, split)
        refuses(FileNotFoundError, call, name, where, "--data-dir", "--download")


def test_failed_download_says_so(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    call = partial(load_dataset, "cifar10", tmp_path, download=True)
    refuses(FileNotFoundError, call, "download", tmp_path, "no route to host")


@pytest.mark.parametrize("name, near", [("cifar11", "cifar10"), ("NIH", "nih"), ("pet", "pets")])
def test_unknown_dataset(name, near):
    words = f"{name!r}; did you mean {near!r}", "folder:PATH", *data.DATASETS
    refuses(ValueError, lambda: load_dataset(name), *words)


def test_nameless_dataset():
    refuses(ValueError, lambda: load_dataset(""), "unknown dataset ''")


def test_unknown_split_and_bad_options():
    refuses(ValueError, lambda: load_dataset("nih", split="val"), "'val'", "train, test")
    for options in ({"seed": -1}, {"seed": 2**70}, {"size": 0}, {"size": -8}):
        refuses(ValueError, partial(load_dataset, "synthetic-xray", **options), "synthetic-xray")


def test_synthetic_equals_its_renderer():
    for name, size, seed in (("synthetic-xray", None, 0), ("synthetic-natural-target", 20, 7)):
        dataset = load_dataset(name, split="test", size=size, seed=seed)
        world = data.synthetic.WORLDS[name]
        assert (dataset.task, dataset.domain) == (world.task, world.domain)
        assert len(dataset) == world.test and dataset.classes == tuple(world.classes)
        expected = data.synthetic.render(name, "test", 3, size or world.size, seed)
        np.testing.assert_array_equal(dataset.read(3), expected)
        labels = data.synthetic.labels(name, "test", world.test, seed)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.size == (size or world.size) == dataset.read(0).shape[-1]
        assert torch.equal(dataset[-1][0], dataset.read(world.test - 1))
        with pytest.raises(IndexError):  # a renderer has no end of its own
            dataset.read(world.test)


# ------------------------------------------------------------------------------------------------
# Few-shot subsets
# ------------------------------------------------------------------------------------------------


def test_few_shot_counts_nesting_and_seeds(rng):
    labels = rng.permutation(np.repeat(np.arange(4), (5, 40, 7, 100)))
    chosen = {}
    for shots in (1, 2, 5):
        chosen[shots] = few_shot_indices(labels, shots, seed=3)
        assert chosen[shots].dtype == np.int64
        assert np.bincount(labels[chosen[shots]]).tolist() == [shots] * 4
        assert (np.diff(chosen[shots]) > 0).all()  # sorted, without replacement
        np.testing.assert_array_equal(chosen[shots], few_shot_indices(labels, shots, seed=3))
    assert set(chosen[1]) < set(chosen[2]) < set(chosen[5])
    others = {tuple(few_shot_indices(labels, 5, seed)) for seed in range(20)}
    assert len(others) == 20
    # Every image of the large class has the same chance, 5 in 100 (200 seeds, 10 each).
    drawn = np.concatenate([few_shot_indices(labels, 5, seed) for seed in range(200)])
    counts = np.bincount(drawn, minlength=len(labels))[labels == 3]
    assert chisquare(counts).pvalue > 0.001 and counts.sum() == 1000


def test_few_shot_refusals():
    labels = np.array([0, 0, 1, 1, 1])
    call = partial(few_shot_indices, labels, 3, 0)
    refuses(ValueError, partial(call, ("cat", "dog")), "--shots 3", "cat", "only 2")
    refuses(ValueError, call, "class 0", "only 2")
    # A class without any image at the end is seen too, when the names are known.
    refuses(ValueError, lambda: few_shot_indices(labels, 1, 0, ("a", "b", "c")), "c", "only 0")
    for shots in (0, -1):
        refuses(ValueError, partial(few_shot_indices, labels, shots, 0), f"--shots {shots}")
    refuses(ValueError, lambda: few_shot_indices(labels, 1, -5), "--seed -5", "0 or more")
    wide = np.array([[1, np.nan], [1, 0], [1, 1]], np.float32)
    refuses(ValueError, lambda: few_shot_indices(wide, 2, 0, ("x", "y")), "y", "only 1")


def test_few_shot_multilabel(rng):
    labels = (rng.random((400, 5)) < [0.5, 0.1, 0.2, 0.03, 0.3]).astype(np.float32)
    labels[rng.random((400, 5)) < 0.2] = np.nan
    for shots in (1, 3, 6):
        for seed in range(5):
            chosen = few_shot_indices(labels, shots, seed)
            positives = (labels[chosen] == 1).sum(0)
            assert (positives >= shots).all()
            assert len(chosen) <= 5 * shots and (np.diff(chosen) > 0).all()
            assert (labels[chosen] == 1).any(1).all()  # an image without a positive helps nobody
            # Exhaustive: the rarest classes are needed, so some class has exactly `shots`.
            assert positives.min() == shots
    assert len({tuple(few_shot_indices(labels, 3, seed)) for seed in range(10)}) == 10
    once = np.eye(4, dtype=np.float32)[rng.integers(4, size=80)]  # one positive an image
    assert (once[few_shot_indices(once, 7, 0)].sum(0) == 7).all()


# ------------------------------------------------------------------------------------------------
# Transforms
# ------------------------------------------------------------------------------------------------

SHAPES = [(3, 40, 61), (1, 61, 40), (3, 32, 32), (1, 1, 1), (3, 1, 9)]


def random_image(rng, *shape):
    return torch.from_numpy(noise(rng, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 32, 50])
def test_resizes_equal_torchvision(rng, shape, size):
    image = random_image(rng, *shape)
    assert torch.equal(resize_shorter(image, size), v2.Resize(size, antialias=True)(image))
    square = resize_square(image, size)
    assert square.shape == (shape[0], size, size)
    assert torch.equal(square, v2.Resize((size, size), antialias=True)(image))
    reference = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    assert torch.equal(resize_center_crop(image, size), reference(image))


def test_resize_equals_pillow(rng):
    image = random_image(rng, 1, 50, 70)
    expected = Image.fromarray(image[0].numpy()).resize((24, 24), Image.Resampling.BILINEAR)
    difference = resize_square(image, 24)[0].int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 1
    assert resize_shorter(image, 25).shape == (1, 25, 35)


def exact_area(pixels, size):
    """Every pixel repeated until the areas hold whole pixels; then their means."""
    channels, side, _ = pixels.shape
    repeats = size // math.gcd(side, size)
    for axis in (1, 2):
        wide = np.repeat(pixels, repeats, axis)
        shape = (channels, size, -1, side) if axis == 1 else (channels, size, size, -1)
        pixels = wide.reshape(shape).sum(axis + 1, dtype=np.int64)
    return pixels / (repeats * side // size) ** 2


@pytest.mark.parametrize(
    "side, size",
    [(7, 3), (10, 4), (9, 9), (5, 1), (256, 224), (225, 224), (300, 224), (1024, 224)],
)
def test_area_resize_is_exact(rng, side, size):
    image = random_image(rng, 2 if side < 500 else 1, side, side)
    before = image.clone()
    small = area_resize(image, size)
    assert small.dtype == torch.uint8 and small.shape == (len(image), size, size)
    np.testing.assert_array_equal(small, np.rint(exact_area(image.numpy(), size)))
    assert torch.equal(image, before)


def test_area_resize_extremes(rng):
    for side, value in ((1024, 255), (3000, 255), (31, 0)):  # sums that would leave 32 bits
        assert (
            area_resize(torch.full((1, side, side), value, dtype=torch.uint8), 7) == value
        ).all()
    # Integer ratios: Pillow's box filter, which rounds once more between the axes.
    image = random_image(rng, 1, 96, 96)
    for size in (48, 32, 12):
        box = np.array(Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BOX))
        assert np.abs(area_resize(image, size)[0].numpy().astype(int) - box).max() <= 1
    small = random_image(rng, 1, 5, 5)
    assert torch.equal(area_resize(small, 8), resize_square(small, 8))


def test_xray_square_takes_the_centre():
    image = torch.zeros(1, 20, 32, dtype=torch.uint8)
    image[..., 6:26] = 200
    assert (xray_square(image, 10) == 200).all()
    assert (xray_square(image.transpose(1, 2), 10) == 200).all()
    assert xray_square(image[:, :1, :1], 10).shape == (1, 10, 10)


def windows(height, width, count, rng):
    return np.array([transforms._resized_crop_window(height, width, rng) for _ in range(count)])


@pytest.mark.parametrize("height, width", [(300, 400), (256, 256)])
def test_resized_crop_is_torchvisions(rng, height, width):
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    ours = windows(height, width, 6000, rng)

    def properties(boxes):
        top, left, h, w = boxes.T
        # Where a window has room to move, its place in that room.
        room = (height > h + 20) & (width > w + 20)
        places = (top / np.maximum(height - h, 1))[room], (left / np.maximum(width - w, 1))[room]
        return h * w, w / h, *places

    for mine, reference in zip(properties(ours), properties(theirs)):
        assert ks_2samp(mine, reference).pvalue > 0.01
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1), (1, 50), (3, 200)])
def test_resized_crop_of_elongated_images(rng, height, width):
    draw = torchvision.transforms.RandomResizedCrop.get_params
    expected = draw(torch.empty(1, height, width), (0.08, 1.0), (3 / 4, 4 / 3))
    for box in windows(height, width, 50, rng):
        assert tuple(box) == tuple(expected)
    image = random_image(rng, 3, height, width)
    assert random_resized_crop_flip(image, rng, 24).shape == (3, 24, 24)


def test_resized_crop_pixels(rng):
    image, seen = random_image(rng, 3, 50, 40), set()
    for seed in range(20):
        crop = random_resized_crop_flip(image, np.random.default_rng(seed), 16)
        top, left, h, w = transforms._resized_crop_window(50, 40, np.random.default_rng(seed))
        expected = v2.Resize((16, 16))(image[:, top : top + h, left : left + w])
        flipped = torch.equal(crop, expected.flip(-1))
        assert flipped or torch.equal(crop, expected)
        seen.add(flipped)
    assert seen == {True, False}


def test_crop_and_flip_windows_are_equally_likely(rng):
    image = torch.arange(42, dtype=torch.uint8).reshape(1, 6, 7)
    views = [image[:, t : t + 4, l : l + 4] for t in range(3) for l in range(4)]
    views = [tuple(v.flatten().tolist()) for view in views for v in (view, view.flip(-1))]
    drawn = [tuple(random_crop_flip(image, rng, 4).flatten().tolist()) for _ in range(4800)]
    counts = [drawn.count(view) for view in views]
    assert sum(counts) == 4800 and chisquare(counts).pvalue > 0.001
    flips = sum(torch.equal(random_flip(image, rng), image.flip(-1)) for _ in range(1000))
    assert 430 < flips < 570


def test_shift_flip_windows(rng):
    image = random_image(rng, 1, 16, 16)
    framed = torch.zeros(1, 18, 18, dtype=torch.uint8)
    framed[:, 1:17, 1:17] = image
    views = [framed[:, t : t + 16, l : l + 16] for t in range(3) for l in range(3)]
    views = {v.numpy().tobytes() for view in views for v in (view, view.flip(-1))}
    drawn = {random_shift_flip(image, rng).numpy().tobytes() for _ in range(400)}
    assert drawn == views  # a sixteenth of the side, here one pixel, each way


def test_affine_draws_and_pixels(rng, monkeypatch):
    drawn, affine = [], TF.affine

    def record(image, angle, translate, scale, shear, interpolation, fill):
        assert shear == [0, 0] and fill == 0
        assert interpolation == TF.InterpolationMode.BILINEAR
        drawn.append((angle, *translate, scale))
        return image

    image = random_image(rng, 1, 40, 60)
    monkeypatch.setattr(transforms.TF, "affine", record)
    for seed in range(3000):
        random_affine_flip(image, np.random.default_rng(seed))
    angles, across, down, scales = np.array(drawn).T
    for values, bound in ((angles, 45), (across, 15), (down, 10), (scales - 1, 0.1)):
        # Within the bounds, near to both of them, and even between.
        assert np.abs(values).max() <= bound + 1e-9
        assert values.max() > 0.95 * bound and values.min() < -0.95 * bound
        assert abs(values.mean()) < 0.05 * bound
        assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.06
    monkeypatch.undo()
    seen = set()
    for seed in range(12):
        angle, x, y, scale = drawn[seed]
        bilinear = TF.InterpolationMode.BILINEAR
        expected = affine(image, angle, [int(x), int(y)], scale, [0.0, 0.0], bilinear, fill=0)
        result = random_affine_flip(image, np.random.default_rng(seed))
        flipped = torch.equal(result, expected.flip(-1))
        assert flipped or torch.equal(result, expected)
        seen.add(flipped)
    assert seen == {True, False}


def test_pretraining_pipelines(rng):
    natural, xray = random_image(rng, 3, 50, 70), random_image(rng, 1, 50, 70)
    generator = np.random.default_rng
    prepare, augment, _ = pretraining_pipeline("medical", 24, train=True)
    assert torch.equal(prepare(xray), area_resize(xray[..., 10:60], 24))
    square = prepare(xray)
    assert torch.equal(augment(square, generator(1)), random_affine_flip(square, generator(1)))
    prepare, augment, _ = pretraining_pipeline("medical", 24, train=False)
    assert torch.equal(prepare(xray), square) and augment is keep
    prepare, augment, _ = pretraining_pipeline("natural", 24, train=True)
    assert prepare(natural) is natural
    crop = random_resized_crop_flip(natural, generator(1), 24)
    assert torch.equal(augment(natural, generator(1)), crop)
    prepare, augment, _ = pretraining_pipeline("natural", 24, train=False)
    assert torch.equal(prepare(natural), resize_center_crop(natural, 24)) and augment is keep
    for domain in ("natural", "medical"):
        assert pretraining_pipeline(domain, 24, False, own_size=True) == (keep, keep, None)
        own = pretraining_pipeline(domain, 24, True, own_size=True)
        assert own == (keep, random_shift_flip, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_hyperrule_pipeline(rng, shape):
    image = random_image(rng, *shape)
    prepare, augment, _ = hyperrule_pipeline(20, 16, train=True)
    assert min(prepare(image).shape[1:]) == 20
    assert augment(prepare(image), rng).shape == (shape[0], 16, 16)
    prepare, augment, _ = hyperrule_pipeline(20, 16, train=True, square=True)
    assert prepare(image).shape == (shape[0], 20, 20)
    assert augment(prepare(image), rng).shape == (shape[0], 16, 16)
    prepare, augment, _ = hyperrule_pipeline(20, 16, train=False)
    assert torch.equal(prepare(image), resize_square(image, 16)) and augment is keep


def test_hyperrule_refuses_a_crop_that_does_not_fit():
    refuses(ValueError, lambda: hyperrule_pipeline(16, 20, train=True), "20", "16")


# ------------------------------------------------------------------------------------------------
# The indices of a batch
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, batch", [(12, 4), (10, 4), (7, 20), (1, 3), (64, 1)])
def test_shuffle_shows_every_image_once_an_epoch(images, batch):
    steps = -(-3 * images // batch)
    parts = [batch_indices(step, images, batch, seed=5) for step in range(steps)]
    assert all(len(indices) == len(draws) == batch for indices, draws in parts)
    indices, epochs = (np.concatenate(words) for words in zip(*parts))
    orders = indices[: 3 * images].reshape(3, images)
    assert (np.sort(orders) == np.arange(images)).all()
    assert (epochs[: 3 * images].reshape(3, images) == np.arange(3)[:, None]).all()
    if images > 6:
        assert len({tuple(order) for order in orders}) == 3


def test_batches_depend_on_seed_and_step_alone():
    labels = np.arange(50) % 3
    for sampling in ("shuffle", "replacement", "balanced"):
        call = partial(batch_indices, sampling=sampling, classes=loading.by_class(labels))
        forth = [call(step, 50, 8, 2)[0] for step in range(30)]
        loading._permutation.cache_clear()
        back = [call(step, 50, 8, 2)[0] for step in reversed(range(30))][::-1]
        np.testing.assert_array_equal(forth, back)
        assert (call(0, 50, 8, 3)[0] != forth[0]).any()
        assert len({tuple(indices) for indices in forth}) == 30


def test_replacement_draws_evenly_and_anew():
    parts = [batch_indices(step, 10, 50, 0, "replacement") for step in range(200)]
    indices, draws = (np.concatenate(words) for words in zip(*parts))
    assert chisquare(np.bincount(indices, minlength=10)).pvalue > 0.001
    assert len(np.unique(draws)) == 10000  # so no augmentation comes twice


def test_balanced_draws_classes_evenly():
    labels = np.repeat([0, 2, 3], (900, 90, 10))  # class 1 has no image
    classes = loading.by_class(labels)
    parts = [batch_indices(step, 1000, 100, 0, "balanced", classes) for step in range(300)]
    indices, draws = (np.concatenate(words) for words in zip(*parts))
    counts = np.bincount(labels[indices])
    assert counts[1] == 0 and np.abs(counts[[0, 2, 3]] / 10000 - 1).max() < 0.05
    within = np.bincount(indices, minlength=1000)[labels == 2]
    assert chisquare(within).pvalue > 0.001 and len(np.unique(draws)) == 30000


@pytest.mark.parametrize("images, batch", [(10, 4), (8, 4), (3, 5)])
def test_sequential_covers_each_once(images, batch):
    parts = [batch_indices(s, images, batch, 0, "sequential") for s in range(-(-images // batch))]
    assert np.concatenate([indices for indices, _ in parts]).tolist() == list(range(images))
    assert all(len(indices) for indices, _ in parts)


def test_odd_seeds():
    refuses(ValueError, lambda: batch_indices(0, 10, 4, -1), "--seed -1", "0 or more")
    huge = [batch_indices(0, 1000, 50, seed)[0].tolist() for seed in (2**64, 10**40, 2**64 + 1)]
    assert huge[0] != huge[1] and huge[0] != huge[2]
    refuses(ValueError, lambda: batch_indices(0, 10, 4, 0, "sorted"), "'sorted'")


# ------------------------------------------------------------------------------------------------
# Batches of one rank
# ------------------------------------------------------------------------------------------------


def read_from(images, i, size=None):
    return images[i]


def array_dataset(rng, count=23, multilabel=False, shape=(3, 20, 26)):
    images = random_image(rng, count, *shape)
    labels = rng.integers(4, size=count)
    if multilabel:
        labels = rng.choice(np.array([0, 1, np.nan], np.float32), (count, 5))
    task = "multilabel" if multilabel else "multiclass"
    return ImageDataset("array", partial(read_from, images), labels, "abcde", task, "natural")


CROP = Pipeline(partial(resize_shorter, size=18), partial(random_crop_flip, size=12))


def same(one, other):
    """Bitwise; a NaN equals a NaN."""
    return np.array_equal(one.numpy().view(np.uint8), other.numpy().view(np.uint8))


@pytest.mark.parametrize("sampling", ["shuffle", "replacement", "balanced", "sequential"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same(rng, sampling, pairs, ranks):
    dataset = array_dataset(rng)
    make = partial(Batches, dataset, CROP, 8, 3, sampling)
    alone = make()
    for step in range(3):
        images, labels, count = alone[step]
        parts = [make(rank=rank, ranks=ranks, pairs=pairs)[step] for rank in range(ranks)]
        assert count == len(labels) and {part[2] for part in parts} == {count}
        unit = 1 + pairs
        for rank, (part, part_labels, _) in enumerate(parts):
            mine = [i for i in range(len(images)) if i // unit % ranks == rank]
            assert torch.equal(part, images[mine]) and torch.equal(part_labels, labels[mine])


def test_batch_is_what_the_pipeline_makes(rng):
    dataset = array_dataset(rng)
    images, labels, _ = Batches(dataset, CROP, 30, seed=9)[0]
    indices, draws = batch_indices(0, 23, 30, 9)
    assert images.dtype == torch.uint8 and images.shape == (30, 3, 12, 12)
    assert labels.tolist() == dataset.labels[indices].tolist()
    for image, i, draw in zip(images, indices, draws):
        generator = np.random.default_rng([9, loading.Stream.AUGMENT, draw, i])
        assert torch.equal(image, CROP.augment(CROP.prepare(dataset.read(i)), generator))


def epoch_of(batches, epoch):
    """Image number -> pixels, over one epoch; the batch size divides the number of images."""
    steps = len(batches)
    found = {}
    for step in range(epoch * steps, (epoch + 1) * steps):
        indices, _ = batch_indices(
            step, len(batches.dataset), batches.batch_size, batches.seed, batches.sampling
        )
        found |= dict(zip(indices.tolist(), batches[step][0]))
    return found


def test_augmentation_depends_on_seed_epoch_and_image_alone(rng):
    dataset = array_dataset(rng, 24)
    by_four, by_eight = (Batches(dataset, CROP, size, seed=1) for size in (4, 8))
    first, second = epoch_of(by_four, 0), epoch_of(by_four, 1)
    other = epoch_of(Batches(dataset, CROP, 4, seed=2), 0)
    again = epoch_of(by_eight, 0)
    assert len(first) == 24 and all(torch.equal(first[i], again[i]) for i in range(24))
    assert sum(torch.equal(first[i], second[i]) for i in range(24)) < 4
    assert sum(torch.equal(first[i], other[i]) for i in range(24)) < 4
    twins = Batches(dataset.subset([5] * 24), CROP, 24, seed=1)[0][0]  # equal pixels, own numbers
    assert len({twin.numpy().tobytes() for twin in twins}) > 12


def test_count_is_of_the_global_batch(rng):
    dataset = array_dataset(rng, multilabel=True)
    for ranks in (1, 2, 5):
        for step in range(3):
            indices, _ = batch_indices(step, 23, 6, 0)
            expected = sum(not math.isnan(v) for row in dataset.labels[indices] for v in row)
            for rank in range(ranks):
                _, labels, count = Batches(dataset, CROP, 6, rank=rank, ranks=ranks)[step]
                assert isinstance(count, int) and count == expected
                assert labels.dtype == torch.float32 and labels.shape[1] == 5
    assert 0 < expected < 30


def test_fewer_images_than_ranks(rng):
    dataset = array_dataset(rng, 2)
    parts = [Batches(dataset, CROP, 8, 0, "sequential", rank, 4)[0] for rank in range(4)]
    assert [len(images) for images, _, _ in parts] == [1, 1, 0, 0]
    assert [len(labels) for _, labels, _ in parts] == [1, 1, 0, 0]
    assert {count for _, _, count in parts} == {2}


@pytest.mark.parametrize("images, batch, steps", [(23, 8, 3), (24, 8, 3), (5, 8, 1)])
def test_steps_an_epoch(rng, images, batch, steps):
    assert len(Batches(array_dataset(rng, images), CROP, batch)) == steps


@pytest.mark.parametrize("multilabel", [False, True])
def test_workers_give_the_same_batches(rng, multilabel):
    batches = Batches(array_dataset(rng, multilabel=multilabel), CROP, 6, seed=4)
    alone, ahead = (list(loader(batches, 1, 6, workers)) for workers in (0, 2))
    assert len(alone) == len(ahead) == 5
    for step, (one, other) in enumerate(zip(alone, ahead), 1):
        assert same(one[0], other[0]) and same(one[1], other[1]) and one[2] == other[2]
        assert same(one[0], batches[step][0])


def test_worker_names_a_broken_image(pets_at_home):
    path = pets_at_home / "train" / "cat" / "1.png"
    path.write_bytes(b"")
    batches = Batches(folder(pets_at_home), CROP, 5)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=str(path)):
            list(loader(batches, 0, 1, workers))


FAILING = """
import data, loading
from transforms import Pipeline, keep
if __name__ == "__main__":
    dataset = data.load_dataset("synthetic-natural")
    batches = loading.Batches(dataset, Pipeline(keep, keep), 8)
    ahead = iter(loading.loader(batches, 0, 9, workers=1))
    next(ahead)
    raise RuntimeError("out of memory")
"""


def test_an_error_ends_the_process_and_its_workers():
    """Workers ignore SIGTERM: Python's exit must not wait for them for ever."""
    command = [sys.executable, "-c", FAILING]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: out of memory")


def test_datasets_travel_to_spawned_processes(chests, pets_at_home, rng, monkeypatch):
    """macOS spawns its loader workers: everything in a Batches must pickle."""
    uneven = folder(pets_at_home)
    medical = pretraining_pipeline("medical", 8, train=True)
    many = [
        Batches(uneven, pretraining_pipeline("natural", 8, train=True), 4),
        Batches(*preload(uneven, Pipeline(keep, partial(random_crop_flip, size=4))), 4),
        Batches(chests.load(), medical, 3),
        Batches(*preload(chests.load(), medical), 3),
        Batches(load_dataset("synthetic-natural").subset([3, 1]), CROP, 2),
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for batches in many:
            images, labels, count = pool.apply(operator.getitem, (batches, 1))
            assert same(images, batches[1][0]) and same(labels, batches[1][1])
            assert count == batches[1][2]


# ------------------------------------------------------------------------------------------------
# Images in memory
# ------------------------------------------------------------------------------------------------


def test_preload_changes_no_batch(chests, pets_at_home):
    cases = [
        (chests.load(), pretraining_pipeline("medical", 6, train=True)),
        (folder(pets_at_home), hyperrule_pipeline(9, 7, train=True)),  # images differ in shape
        (folder(pets_at_home), hyperrule_pipeline(9, 7, train=False)),
    ]
    for dataset, pipeline in cases:
        held, shorter = preload(dataset, pipeline)
        assert shorter.prepare is keep and shorter.augment is pipeline.augment
        assert held.labels is dataset.labels and held.name == dataset.name
        for step in range(4):
            one = Batches(dataset, pipeline, 2, seed=6)[step]
            other = Batches(held, shorter, 2, seed=6)[step]
            assert same(one[0], other[0]) and same(one[1], other[1])


def test_preload_reads_each_image_once(rng):
    reads = []
    images = random_image(rng, 9, 3, 6, 6)
    dataset = array_dataset(rng, 9).replace(reader=lambda i, size: reads.append(i) or images[i])
    held, _ = preload(dataset, Pipeline(keep, keep))
    assert sorted(reads)[1:] == list(range(9))  # and the first once more, to tell the size
    assert torch.equal(held.read(-1), images[8]) and len(reads) == 10


def test_preload_over_the_limit(rng):
    dataset, pipeline = array_dataset(rng), Pipeline(keep, keep)
    exact = 23 * 3 * 20 * 26
    assert preload(dataset, pipeline, exact)[0] is not dataset
    held, same_pipeline = preload(dataset, pipeline, exact - 1)
    assert held is dataset and same_pipeline is pipeline
    # A first image that is smaller than the others must not hide their size.
    images = [random_image(rng, 3, 1, 1), *(random_image(rng, 3, 30, 30) for _ in range(22))]
    uneven = dataset.replace(reader=lambda i, size: images[i])
    assert preload(uneven, pipeline, exact)[0] is uneven


def test_preload_names_a_broken_image(pets_at_home):
    path = pets_at_home / "train" / "cat" / "1.png"
    os.truncate(path, 50)
    dataset = folder(pets_at_home)
    refuses(ValueError, lambda: preload(dataset, hyperrule_pipeline(9, 7, True)), path)
