"""Decoding: every kind of pixel file, and what is none; subsets of a dataset."""

import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, refuses
from PIL import Image
from trees import load_folder, luma, noise, pixels_of, save

from readers.images import read_image

GREY = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
ALPHA = np.array([[0, 0, 7], [255, 3, 0]], np.uint8)
DEEP = np.array([[0, 128, 129], [257, 32896, 65535]], np.uint16)
PALETTE = np.arange(10, 28, dtype=np.uint8).reshape(2, 3, 3)
INDEXED = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
INDEXED.putpalette(PALETTE.tobytes())


@pytest.mark.parametrize(
    "image, rgb, grey",
    [
        (Image.fromarray(GREY), GREY, GREY),
        (Image.fromarray(DEEP), *[np.array([[0, 0, 1], [1, 128, 255]], np.uint8)] * 2),
        (Image.fromarray(np.stack([GREY, ALPHA], -1)), GREY, GREY),
        (Image.fromarray(COLOUR), COLOUR, luma(COLOUR)),
        (Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR, luma(COLOUR)),
        (INDEXED, PALETTE, luma(PALETTE)),
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


def test_read_image_refuses_what_is_no_image_or_cut(tmp_path, rng):
    for ending in ("png", "jpg"):
        save(tmp_path / f"0.{ending}", noise(rng, 64, 64, 3))
        whole = (tmp_path / f"0.{ending}").read_bytes()
        for part in (0, 1, 20, len(whole) // 2, len(whole) - 100):
            (tmp_path / f"{part}.{ending}").write_bytes(whole[:part])
    (tmp_path / "text.png").write_text("no image\n" * 100)
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / "float.tif", np.full((2, 2), 0.5, np.float32))
    save(tmp_path / "wide.tif", np.full((2, 2), 70000, np.int32))
    for path in sorted(tmp_path.iterdir()):
        for mode in ("L", "RGB"):
            refuses(ValueError, partial(read_image, path, mode), path, "unreadable", "mend or rem")
    refuses(FileNotFoundError, partial(read_image, tmp_path / "none", "L"), tmp_path / "none")


def test_read_image_refuses_bombs(tmp_path, monkeypatch):
    # Pillow refuses from twice its limit on and merely warns below that.
    save(tmp_path / "x.png", np.zeros((10, 15), np.uint8))
    assert read_image(tmp_path / "x.png", "L").shape == (1, 10, 15)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(ValueError, lambda: read_image(tmp_path / "x.png", "L"), "x.png", "15 x 10", "bomb")


def test_subset(chests, pets_at_home):
    part = chests.load().subset([2, 0])  # labels and groups go with their images
    assert part.groups.tolist() == [3, 1]
    assert [np.flatnonzero(row).tolist() for row in part.labels] == [[0, 11, 13], [1, 4]]
    np.testing.assert_array_equal(part.read(1)[0], chests.pixels["00000001_000.png"])
    dataset = load_folder(pets_at_home)
    for indices in ([4, 0], np.array([False, True, False, False, True]), torch.tensor([3, 3])):
        part, places = dataset.subset(indices), np.arange(5)[indices]
        assert len(part) == len(places) and part.labels.tolist() == dataset.labels[places].tolist()
        for i, place in enumerate(places):
            assert torch.equal(part.read(i), dataset.read(place))
            assert part.where(i) == dataset.where(place)
    for call, index in ((dataset.subset, [5]), (dataset.read, 5), (dataset.where, -6)):
        with pytest.raises(IndexError):
            call(index)


def test_damaged_exif_is_no_damage_of_the_pixels(tmp_path):
    """Pillow's warning would name no file; warnings of others stay."""
    path, damaged = tmp_path / "a.jpg", b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 40
    Image.new("RGB", (9, 9), (200, 0, 0)).save(path, exif=damaged)
    code = f"from readers.images import read_image; print(read_image({str(path)!r}, 'RGB').shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("torch.Size([3, 9, 9])\n", "")
