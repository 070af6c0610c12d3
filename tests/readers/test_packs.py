"""What packs hold, against their originals; where they lie, and of what they may be made."""

import io
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from packing import NIH, Xrays, contents, error_line, pack, says
from PIL import Image
from torchvision.transforms import v2
from trees import Trees, noise, save, write_photos

import data
from data import SPLITS, load_dataset
from readers.xrays import NIH_CLASSES


@pytest.fixture
def xrays(tmp_path):
    return Xrays(tmp_path)


@pytest.fixture
def photos(tmp_path, rng):
    return write_photos(tmp_path / "photos", rng)


def same_but_pixels(packed, original):
    np.testing.assert_array_equal(packed.labels, original.labels)  # a NaN equals a NaN
    assert packed.labels.dtype == original.labels.dtype
    assert packed.classes == original.classes and isinstance(packed.classes, tuple)
    assert (packed.task, packed.domain) == (original.task, original.domain)
    assert packed.options == json.loads(json.dumps(original.options))
    assert packed.dropped == original.dropped
    np.testing.assert_array_equal(packed.groups, original.groups)
    assert getattr(packed.groups, "dtype", None) == getattr(original.groups, "dtype", None)


# ------------------------------------------------------------------------------------------------
# What a pack holds
# ------------------------------------------------------------------------------------------------


def area_means(pixels, size):
    """Exact area means of the central square, as fractions: each pixel is cut into size² parts."""
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257)
    side = min(pixels.shape)
    top, left = ((length - side) // 2 for length in pixels.shape)
    square = pixels[top : top + side, left : left + side].astype(np.int64)
    size = min(size, side)
    parts = square.repeat(size, 0).repeat(size, 1).reshape(size, side, size, side)
    return parts.mean((1, 3))


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_xray_pack(xrays, codec):
    originals = data.load_splits("nih", xrays.root)
    pack("nih", 16, "--codec", codec, "--quality", 95, root=xrays.root)
    xrays.nih.rename(xrays.root / "gone")
    for rows, packed, original in zip(
        NIH.values(), data.load_splits("nih@16", xrays.root), originals
    ):
        same_but_pixels(packed, original)
        assert packed.name == "nih@16" and packed.groups.tolist() == [row[2] for row in rows]
        for i, (name, findings, *_) in enumerate(rows):
            found = {cls for cls, mark in zip(NIH_CLASSES, packed.labels[i]) if mark == 1}
            assert found == set(findings.split("|")) - {"No Finding"} and name in packed.where(i)
            image, means = packed.read(i), area_means(xrays.pixels[name], 16)
            assert image.dtype == torch.uint8 and image.shape == (1, *means.shape)
            error = np.abs(image[0].numpy() - means)
            # Noise is the worst case of JPEG; at quality 95 the mean error stays near 1.
            assert error.max() <= 0.5 if codec == "raw" else error.mean() < 2.5


def resized(path, size):
    """torchvision's antialiased Resize of Pillow's reading; a smaller image as it is."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return v2.Resize(min(size, *pixels.shape[1:]), antialias=True)(pixels)


def as_jpeg(image, quality):
    """Pillow's writing and reading of a (3,H,W) image."""
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(content))).permute(2, 0, 1)


@pytest.mark.parametrize("codec, quality", [("raw", 90), ("jpeg", 10)])
def test_natural_pack(photos, codec, quality):
    name = f"folder:{photos}"
    originals = data.load_splits(name)
    files = [sorted((photos / split).glob("*/*")) for split in SPLITS]
    expected = [[resized(path, 20) for path in paths] for paths in files]
    pack(name, 20, "--codec", codec, "--quality", quality)
    shutil.rmtree(photos)
    for packed, original, images in zip(data.load_splits(f"{name}@20"), originals, expected):
        same_but_pixels(packed, original)
        assert packed.name == f"{name}@20" and packed.classes == ("cat", "dog", "newt")
        for i, image in enumerate(images):
            assert torch.equal(packed.read(i), image if codec == "raw" else as_jpeg(image, quality))
    assert [min(image.shape[1:]) for image in images] == [20, 20, 20, 20, 12, 13]
    part = packed.subset([4, 0])
    assert torch.equal(part.read(0), packed.read(-2)) and part.where(1) == packed.where(0)


def test_large_jpeg_originals(tmp_path, rng):
    """They may be decoded at a fraction of their size: smooth pictures stay the same."""
    y, x = np.mgrid[:320, :400]
    waves = np.stack([np.sin(x / 37), np.cos(y / 29), np.sin((x + y) / 51)], -1)
    path = tmp_path / "set" / "train" / "a" / "0.jpg"
    save(path, (127 + 100 * waves).astype(np.uint8), quality=98)
    save(tmp_path / "set" / "test" / "a" / "0.jpg", noise(rng, 30, 30, 3))
    pack(f"folder:{tmp_path}/set", 32)
    image = load_dataset(f"folder:{tmp_path}/set@32").read(0)
    assert image.shape == (3, 32, 40)
    assert (image.float() - resized(path, 32)).abs().max() <= 6


CHEXPERT = [
    "train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    "train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,0.0,,,,1.0,,,",
    "train/patient00002/study2/view2_lateral.jpg,Male,87,Lateral,,,,1.0,1.0,,-1.0,,,,,,,,",
]


def write_chexpert(trees):
    """Marks that are missing, an image that is left out."""
    trees.write_chexpert("train", CHEXPERT)
    trees.write_chexpert("valid", [CHEXPERT[1].replace("train/patient00002", "valid/patient64541")])


def write_padchest(trees):
    """16-bit images in numbered folders, patients of 36 digits."""
    rows = [{"ImageID": f"{i}.png", "PatientID": f"{10**35 + i // 2}"} for i in range(20)]
    trees.write_padchest(rows)
    for row in rows:
        save(trees.padchest / "0" / row["ImageID"], trees.noise(16, 16, dtype=np.uint16))


@pytest.mark.parametrize(
    "name, make, words, option, value, other",
    [
        ("chexpert", write_chexpert, "--views L PA", "views", ["L", "PA"], ["AP"]),
        ("padchest", write_padchest, "--split-by image", "split_by", "image", "patient"),
    ],
)
def test_labels_patients_and_options(tmp_path, name, make, words, option, value, other):
    make(Trees(tmp_path))
    originals = data.load_splits(name, tmp_path, **{option: value})
    pack(name, 8, *words.split(), root=tmp_path)
    shutil.rmtree(tmp_path / data.DATASETS[name].folder)
    for given in ({}, {option: value}):
        for packed, original in zip(data.load_splits(f"{name}@8", tmp_path, **given), originals):
            same_but_pixels(packed, original)
    load = partial(load_dataset, f"{name}@8", tmp_path, **{option: other})
    refuses(ValueError, load, f"{name}@8 was packed with {option}", other, "--data-dir")


def test_unions_and_parts_of_packs(xrays):
    write_chexpert(xrays)
    for name in ("nih", "chexpert"):
        pack(name, 10, root=xrays.root)
    union, original = (
        load_dataset(name, xrays.root) for name in ("nih@10+chexpert@10", "nih+chexpert")
    )
    assert union.classes == original.classes and len(union) == 4 + 2
    assert union.groups.tolist() == original.groups.tolist()
    np.testing.assert_array_equal(union.labels, original.labels)
    assert torch.equal(union.read(5), load_dataset("chexpert@10", xrays.root).read(1))
    options = {"fraction": 0.5, "fraction_seed": 2}
    packed, original = (load_dataset(n, xrays.root, **options) for n in ("nih@10", "nih"))
    assert len(packed) == 2 and packed.labels.tolist() == original.labels.tolist()
    assert all(os.path.basename(original.where(i)) in packed.where(i) for i in range(2))


# ------------------------------------------------------------------------------------------------
# Where a pack lies, and of what it may be made
# ------------------------------------------------------------------------------------------------


def test_out_directory(xrays, photos, tmp_path):
    out = tmp_path / "elsewhere" / "deep"
    for name in ("nih", f"folder:{photos}"):
        assert str(out) in pack(name, 16, "--out", out, root=xrays.root)
    assert not list(tmp_path.glob("*@*")) and len(load_dataset("nih@16", out)) == 4
    words = xrays.root / "nih@16", "python data.py pack nih --size 16"
    refuses(FileNotFoundError, partial(load_dataset, "nih@16", xrays.root), *words)
    out.rename(tmp_path / "moved")
    assert len(load_dataset(f"folder:{tmp_path}/moved/photos@16")) == 9


def test_names_of_folders(photos):
    """A slash at the end, as a shell completes it; own images in a directory called NAME@SIZE."""
    pack(f"folder:{photos}/", 20)
    assert sorted(path.name for path in photos.iterdir()) == ["test", "train"]
    for name in (f"folder:{photos}@20", f"folder:{photos}/@20"):
        assert len(load_dataset(name)) == 9
    photos.rename(photos.parent / "own@30")
    own = f"folder:{photos.parent}/own@30"
    assert min(load_dataset(own).read(0).shape[1:]) == 40
    pack(own, 10)
    assert min(load_dataset(f"{own}@10").read(0).shape[1:]) == 10
    refused = pack(f"folder:{photos.parent}/own", 30, status=2)
    assert says(refused, photos.parent / "own", "PATH/train/CLASS")


def test_packing_what_is_packed(xrays):
    """Nothing is touched; other settings or other labels are refused."""
    root, folder = xrays.root, xrays.root / "nih@16"
    pack("nih", 16, "--codec", "jpeg", "--quality", 70, "--views", "PA", root=root)
    assert [len(dataset) for dataset in data.load_splits("nih@16", root)] == [3, 1]
    before, first = {p: p.stat().st_mtime_ns for p in folder.iterdir()}, contents(folder)
    xrays.image("00000003_000.png").write_bytes(b"broken since")
    same = ("--codec", "jpeg", "--quality", 70, "--views", "PA")
    assert "whole" in pack("nih", 16, *same, root=root).splitlines()[-1]
    for other, word in (
        (("--codec", "raw", "--views", "PA"), "raw"),
        (("--codec", "jpeg", "--quality", 50, "--views", "PA"), "50"),
        (("--codec", "jpeg", "--quality", 70), "options"),
    ):
        line = pack("nih", 16, *other, root=root, status=2)
        assert says(line, folder, word, "remove it, or give another --out")
    table = xrays.tables["nih"]
    table.write_text(table.read_text().replace("Hernia", "Mass"))
    assert says(pack("nih", 16, *same, root=root, status=2), folder, "index", "remove")
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert contents(folder) == first
    assert sorted(p.name for p in root.iterdir()) == ["NIH-ChestXRay-14", "nih@16"]


def test_workers_give_the_same_bytes(nih_root, tmp_path):
    """At the side that the images have: the very pixels."""
    for workers in (1, 2):
        pack("nih", 48, "--workers", workers, "--out", tmp_path / str(workers), root=nih_root)
    assert contents(tmp_path / "1" / "nih@48") == contents(tmp_path / "2" / "nih@48")
    packed, original = load_dataset("nih@48", tmp_path / "1"), load_dataset("nih", nih_root)
    assert all(torch.equal(packed.read(i), original.read(i)) for i in range(40))


def test_pack_made_anew_in_the_same_process(photos):
    """A notebook that loads, packs anew and loads again must not see the old arrays."""
    name = f"folder:{photos}"
    pack(name, 20)
    assert load_dataset(f"{name}@20").read(0).shape == (3, 20, 30)
    for gone in (photos.parent / "photos@20", photos / "train" / "cat", photos / "test" / "cat"):
        shutil.rmtree(gone)
    pack(name, 20, "--codec", "jpeg")
    packed = load_dataset(f"{name}@20")
    assert packed.labels.tolist() == [0, 0, 0, 1, 1, 1] and packed.classes == ("dog", "newt")
    assert packed.read(0).shape == (3, 36, 20)


@pytest.mark.parametrize(
    "args, words",
    [
        (["nih", "--size", "0"], ["--size", "0"]),
        (["nih"], ["--size"]),
        (["nih", "--size", "16", "--codec", "jpeg", "--quality", "101"], ["--quality", "100"]),
        (["nih@16", "--size", "8"], ["nih@16", "nothing to pack"]),
        (["nih+chexpert", "--size", "8"], ["nih+chexpert", "one by one"]),
        (["synthetic-xray~0.4", "--size", "8"], ["synthetic-xray~0.4", "nothing to pack"]),
        (["nih", "--size", "8", "--split-by", "image"], ["--split-by", "nih"]),
        (["nih", "--size", "8", "--out", "/dev/null"], ["/dev/null"]),
    ],
)
def test_bad_arguments(xrays, capsys, args, words):
    assert data.main(["pack", *args, "--data-dir", str(xrays.root)]) == 2
    assert says(error_line(capsys.readouterr().err), *words)
    assert [path.name for path in xrays.root.iterdir()] == ["NIH-ChestXRay-14"]


def test_broken_and_missing_images_stop_packing(photos, xrays):
    path = photos / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    assert says(pack(f"folder:{photos}", 20, status=2), path, "unreadable", "mend or remove")
    refuses(FileNotFoundError, partial(load_dataset, f"folder:{photos}@20"), "data.py pack")
    path.write_bytes(whole)
    pack(f"folder:{photos}", 20)
    assert torch.equal(load_dataset(f"folder:{photos}@20").read(4), resized(path, 20))
    xrays.image("00000005_000.png").unlink()
    assert says(pack("nih", 8, root=xrays.root, status=2), xrays.image("00000005_000.png"))
