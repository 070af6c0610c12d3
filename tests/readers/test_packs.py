"""Packs against their originals, at every interruption; `python data.py` as a user meets it."""

import contextlib
import errno
import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses, run
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm
from trees import noise, save

import data
from data import load_dataset

SPLITS = ("train", "test")


def assert_says(message, *words):
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def says(capsys, *args, status=0):
    """Runs the command line in this process; returns what it printed, or the one line of error."""
    assert data.main([*map(str, args)]) == status
    out, err = capsys.readouterr()
    return error_line(err) if status == 2 else out


def error_line(err):
    """The last line, which alone speaks of an error (progress bars may stand above it)."""
    *above, last = err.splitlines()
    assert last.startswith("error: ") and "Traceback" not in err and "error" not in "".join(above)
    return last


def pack(name, size, *args, root=".", status=0):
    args = ("pack", name, "--size", size, "--data-dir", root, "--workers", "1", *args)
    assert data.main([*map(str, args)]) == status


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------
# Small datasets
# ------------------------------------------------------------------------------------------------

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"  # two unquoted commas, officially
)
NIH_CLASSES = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
    *("Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"),
    *("Pneumonia", "Pneumothorax"),
)
# Name, findings, patient, view, split. The lists below are written in another order.
NIH_ROWS = [
    ("00000003_000.png", "Hernia", 3, "PA", "train"),
    ("00000001_000.png", "Cardiomegaly|Effusion", 1, "PA", "train"),
    ("00000001_001.png", "No Finding", 1, "AP", "train"),
    ("00000002_000.png", "Mass", 2, "AP", "test"),
    ("00000004_000.png", "Pneumothorax|Atelectasis", 4, "PA", "train"),
    ("00000005_000.png", "Nodule", 5, "PA", "test"),
]


def nih_pixels(rng):
    """Tall, wide, 16-bit, square, small; margins are even, so the central square is one alone."""
    return {
        "00000001_000.png": noise(rng, 48, 60),
        "00000001_001.png": noise(rng, 100, 48),
        "00000002_000.png": noise(rng, 48, 48, dtype=np.uint16),
        "00000003_000.png": noise(rng, 21, 21),
        "00000004_000.png": noise(rng, 10, 12),  # smaller than a pack of 16
        "00000005_000.png": noise(rng, 50, 50),
    }


def write_nih(root, pixels):
    folder = root / "NIH-ChestXRay-14"
    for name, image in pixels.items():
        save(folder / "images" / name, image)
    lines = [
        f"{name},{findings},0,{patient},058,M,{view},48,48,0.143,0.143"
        for name, findings, patient, view, _ in NIH_ROWS
    ]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([NIH_HEADER, *lines]) + "\n")
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        names = sorted(row[0] for row in NIH_ROWS if row[4] == split)
        (folder / file).write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def nih(tmp_path, rng):
    """(data directory, {name: pixels}) of six X-rays."""
    pixels = nih_pixels(rng)
    write_nih(tmp_path, pixels)
    return tmp_path, pixels


@pytest.fixture
def photos(tmp_path, rng):
    """Three classes of RGB images, wide and tall, one smaller than the packs made of it."""
    shapes = {"cat": (40, 60), "dog": (61, 33), "newt": (12, 15)}
    for split, count in (("train", 3), ("test", 2)):
        for cls, (height, width) in shapes.items():
            for i in range(count):
                path = tmp_path / "photos" / split / cls / f"{i}.png"
                save(path, noise(rng, height + i, width, 3))
    return tmp_path / "photos"


def same_labels(packed, original):
    """Labels, classes and all else that is no pixel."""
    np.testing.assert_array_equal(packed.labels, original.labels)  # a NaN equals a NaN
    assert packed.labels.dtype == original.labels.dtype
    assert packed.classes == original.classes and isinstance(packed.classes, tuple)
    assert (packed.task, packed.domain) == (original.task, original.domain)
    assert packed.options == json.loads(json.dumps(original.options))
    assert packed.dropped == original.dropped
    if original.groups is None:
        assert packed.groups is None
    else:
        assert packed.groups.dtype == original.groups.dtype
        assert packed.groups.tolist() == original.groups.tolist()
    assert len(packed) == len(original)


def both(name, root):
    return [load_dataset(name, root, split) for split in SPLITS]


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
def test_xray_pack(nih, codec):
    root, pixels = nih
    originals = both("nih", root)
    pack("nih", 16, "--codec", codec, "--quality", 95, root=root)
    (root / "NIH-ChestXRay-14").rename(root / "gone")
    for split, packed, original in zip(SPLITS, both("nih@16", root), originals):
        assert packed.name == "nih@16" and packed.classes == NIH_CLASSES
        same_labels(packed, original)
        rows = [row for row in NIH_ROWS if row[4] == split]
        assert packed.groups.tolist() == [row[2] for row in rows]
        for i, (name, findings, *_) in enumerate(rows):
            found = {cls for cls, mark in zip(NIH_CLASSES, packed.labels[i]) if mark == 1}
            assert found == set(findings.split("|")) - {"No Finding"}
            assert name in packed.where(i)
            image, label = packed[i]
            assert image.dtype == torch.uint8 and label.tolist() == packed.labels[i].tolist()
            means = area_means(pixels[name], 16)
            assert image.shape == (1, *means.shape)
            error = np.abs(image[0].numpy() - means)
            # Noise is the worst case of JPEG; at quality 95 the mean error stays near 1.
            assert error.max() <= 0.5 if codec == "raw" else error.mean() < 2.5
    assert len(packed) == 2 and packed.read(0).shape == (1, 16, 16)


def test_square_whose_side_is_no_multiple(nih):
    """21 and 50 pixels to 16: windows end inside pixels."""
    root, pixels = nih
    pack("nih", 16, root=root)
    train, test = both("nih@16", root)
    for image, name in ((train.read(0), "00000003_000.png"), (test.read(1), "00000005_000.png")):
        assert np.abs(image[0].numpy() - area_means(pixels[name], 16)).max() <= 0.5


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


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_natural_pack(photos, codec):
    name = f"folder:{photos}"
    originals = both(name, ".")
    files = {split: sorted((photos / split).glob("*/*")) for split in SPLITS}
    expected = {split: [resized(path, 20) for path in files[split]] for split in SPLITS}
    pack(name, 20, "--codec", codec, "--quality", 95)
    assert (photos.parent / "photos@20").is_dir()
    shutil.rmtree(photos)
    for split, packed, original in zip(SPLITS, both(f"{name}@20", "."), originals):
        assert packed.name == f"{name}@20" and packed.classes == ("cat", "dog", "newt")
        same_labels(packed, original)
        assert packed.labels.tolist() == sorted([0, 1, 2] * (3 if split == "train" else 2))
        for i, image in enumerate(expected[split]):
            assert packed.read(i).dtype == torch.uint8 and packed.read(i).shape == image.shape
            if codec == "jpeg":
                image = as_jpeg(image, 95)
            assert torch.equal(packed.read(i), image)
        assert [min(image.shape[1:]) for image in expected["test"]] == [20, 20, 20, 20, 12, 13]


def test_jpeg_quality_counts(photos):
    errors, sizes = {}, {}
    original = resized(photos / "train" / "cat" / "0.png", 20).float()
    for quality in (10, 95):
        out = photos.parent / str(quality)
        pack(f"folder:{photos}", 20, "--codec", "jpeg", "--quality", quality, "--out", out)
        packed = load_dataset(f"folder:{out}/photos@20")
        errors[quality] = (packed.read(0) - original).abs().mean()
        sizes[quality] = sum(path.stat().st_size for path in (out / "photos@20").iterdir())
    assert errors[95] < errors[10] and sizes[95] < sizes[10] * 10
    pack(f"folder:{photos}", 20, root=photos.parent)
    assert sizes[10] < sum(path.stat().st_size for path in photos.parent.glob("photos@20/*"))


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


CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
CHEXPERT_ROWS = {
    "train": [
        ("patient00001/study1/view1_frontal", "Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0"),
        ("patient00002/study2/view1_frontal", "Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,0.0,,,,1.0,,,"),
        ("patient00002/study2/view2_lateral", "Male,87,Lateral,,,,1.0,1.0,,-1.0,,,,,,,,"),
        ("patient00005/study1/view1_frontal", "Male,83,Frontal,AP,,1.0,,,,,,,1.0,0.0,,,,"),
    ],
    "valid": [
        ("patient64541/study1/view1_frontal", "Male,73,Frontal,AP,0.0,1.0,0.0,1.0" + ",0.0" * 10),
    ],
}


def write_chexpert(root, rng):
    folder = root / "CheXpert-v1.0"
    for split, rows in CHEXPERT_ROWS.items():
        lines = [f"CheXpert-v1.0-small/{split}/{path}.jpg,{rest}" for path, rest in rows]
        for path, _ in rows:
            save(folder / split / f"{path}.jpg", noise(rng, 24, 20))
        (folder / f"{split}.csv").write_text("\n".join([CHEXPERT_HEADER, *lines]) + "\n")


def test_missing_marks_stay_missing(tmp_path, rng):
    write_chexpert(tmp_path, rng)
    originals = both("chexpert", tmp_path)
    pack("chexpert", 10, root=tmp_path)
    shutil.rmtree(tmp_path / "CheXpert-v1.0")
    train, test = both("chexpert@10", tmp_path)
    for packed, original in zip((train, test), originals):
        same_labels(packed, original)
    nan = np.nan
    # Classes: Atelectasis, Cardiomegaly, Consolidation, Edema, Enlarged, Fracture, Lesion,
    # Opacity, Effusion, Other, Pneumonia, Pneumothorax, Devices. The first row has No Finding.
    expected = [
        [0] * 13,
        [nan, nan, 0, nan, nan, nan, nan, 1, 1, nan, nan, nan, nan],
        [1, nan, nan, nan, 1, nan, nan, nan, nan, nan, nan, 0, nan],
    ]
    np.testing.assert_array_equal(train.labels, np.array(expected, np.float32))
    assert train.groups.tolist() == [1, 2, 5] and test.groups.tolist() == [64541]
    assert train.options == {"views": ["PA", "AP"]} and sum(train.dropped.values()) == 1


def test_views_that_shaped_a_pack(tmp_path, rng):
    write_chexpert(tmp_path, rng)
    pack("chexpert", 10, "--views", "L", "AP", root=tmp_path)
    load = partial(load_dataset, "chexpert@10", tmp_path)
    assert load().groups.tolist() == [1, 2, 5] and load().options == {"views": ["L", "AP"]}
    for same in (["L", "AP"], ("L", "AP")):
        assert load(views=same).labels.shape == (3, 13)
    refuses(ValueError, partial(load, views=["PA", "AP"]), "chexpert@10", "views", "L", "PA")
    refuses(ValueError, partial(load, split_by="image"), "chexpert@10", "split_by", "views")


def test_pack_of_one_view_is_none_of_all(nih, capsys):
    root, _ = nih
    pack("nih", 16, "--views", "PA", root=root)
    assert [len(dataset) for dataset in both("nih@16", root)] == [3, 1]
    capsys.readouterr()
    line = says(capsys, "pack", "nih", "--size", 16, "--data-dir", root, status=2)
    assert_says(line, root / "nih@16", "PA", "remove")
    line = says(capsys, "info", "nih@16", "--data-dir", root, "--views", "AP", status=2)
    assert_says(line, root / "nih@16", "views", "PA", "AP")


def test_text_groups(tmp_path, rng):
    lines = {"train": ["3 COVID-19 pneumonia", "ANON 29", "anon17"], "test": ["7"]}
    folder = tmp_path / "COVIDx-CXR2"
    for split, patients in lines.items():
        rows = []
        for i, patient in enumerate(patients):
            save(folder / split / f"{i}.png", noise(rng, 20, 20))
            rows.append(f"{patient} {i}.png {('positive', 'negative')[i % 2]} ricord")
        (folder / f"{split}.txt").write_text("\n".join(rows) + "\n")
    originals = both("covidx", tmp_path)
    pack("covidx", 10, root=tmp_path)
    shutil.rmtree(folder)
    train, test = both("covidx@10", tmp_path)
    same_labels(train, originals[0])
    same_labels(test, originals[1])
    assert train.groups.tolist() == [b"3 COVID-19 pneumonia", b"ANON 29", b"anon17"]
    assert train.labels.tolist() == [1, 0, 1] and train.classes == ("negative", "positive")


PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Labels"
)


def test_split_that_shaped_a_pack(tmp_path, rng):
    """PadChest: 36-digit patients, quoted labels, 16-bit images in numbered folders."""
    rows = []
    for i in range(20):
        patient = f"{10**35 + i // 2}"
        save(tmp_path / "PadChest" / "7" / f"{i}.png", noise(rng, 16, 16, dtype=np.uint16))
        rows.append(
            f"{i},{i}.png,7,20140915,{i},{patient},1930.0,F,POSTERO,PA,Manual,\"['mass', 'copd']\""
        )
    path = tmp_path / "PadChest" / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    path.write_bytes(gzip.compress("\n".join([PADCHEST_HEADER, *rows, ""]).encode()))
    originals = [load_dataset("padchest", tmp_path, s, split_by="image") for s in SPLITS]
    pack("padchest", 8, "--split-by", "image", root=tmp_path)
    path.unlink()
    for packed, original in zip(both("padchest@8", tmp_path), originals):
        same_labels(packed, original)
        assert packed.groups.dtype == np.dtype("S36") and packed.options["split_by"] == "image"
    order = np.random.RandomState(42).permutation(20)
    assert [f"({i}.png)" in packed.where(k) or f"7/{i}.png" in packed.where(k)
            for k, i in enumerate(order[18:])] == [True, True]  # fmt: skip
    load = partial(load_dataset, "padchest@8", tmp_path)
    assert len(load(split_by="image")) == 18
    refuses(ValueError, partial(load, split_by="patient"), "padchest@8", "image", "patient")


def test_union_of_packs(nih, rng):
    root, _ = nih
    write_chexpert(root, rng)
    for name in ("nih", "chexpert"):
        pack(name, 10, root=root)
    union = load_dataset("nih@10+chexpert@10", root)
    original = load_dataset("nih+chexpert", root)
    np.testing.assert_array_equal(union.labels, original.labels)
    assert union.classes == original.classes and len(union) == 4 + 3
    assert union.groups.tolist() == original.groups.tolist()
    assert torch.equal(union.read(5), load_dataset("chexpert@10", root).read(1))
    for mixed in ("nih+chexpert@10", "nih@10+chexpert"):
        np.testing.assert_array_equal(load_dataset(mixed, root).labels, original.labels)


def test_parts_of_a_pack(nih_root):
    """--single-label and --fraction choose the same images of a pack as of its original."""
    root = nih_root
    if not (root / "nih@16").exists():
        pack("nih", 16, root=root)
    for options in ({"single_label": True}, {"fraction": 0.3, "fraction_seed": 2}):
        packed, original = (load_dataset(name, root, **options) for name in ("nih@16", "nih"))
        assert 0 < len(packed) < 40 and packed.labels.tolist() == original.labels.tolist()
        assert packed.groups.tolist() == original.groups.tolist()
        assert [os.path.basename(original.where(i)) in packed.where(i) for i in range(len(packed))]
    chosen = (data.few_shot_indices(load_dataset(name, root).labels, 2, 3) for name in
              ("nih@16", "nih"))  # fmt: skip
    np.testing.assert_array_equal(*chosen)


def test_every_image_is_reached_from_either_end(photos):
    pack(f"folder:{photos}", 20)
    packed = load_dataset(f"folder:{photos}@20")
    assert torch.equal(packed.read(-1), packed.read(8)) and len(packed) == 9
    with pytest.raises(IndexError):
        packed.read(9)
    part = packed.subset([7, 0])
    assert torch.equal(part.read(0), packed.read(7)) and part.where(1) == packed.where(0)


# ------------------------------------------------------------------------------------------------
# Where a pack lies, and what it is called
# ------------------------------------------------------------------------------------------------


def test_out_directory(nih, capsys):
    root, _ = nih
    out = root / "elsewhere" / "deep"
    pack("nih", 16, "--out", out, root=root)
    assert str(out / "nih@16") in capsys.readouterr().out
    assert not list(root.glob("nih@*")) and len(load_dataset("nih@16", out)) == 4
    refuses(
        FileNotFoundError, partial(load_dataset, "nih@16", root), root / "nih@16",
        "python data.py pack nih --size 16",
    )  # fmt: skip


def test_folder_pack_may_move(photos, tmp_path):
    pack(f"folder:{photos}", 20, "--out", tmp_path / "out")
    assert not (tmp_path / "photos@20").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert len(load_dataset(f"folder:{tmp_path}/moved/photos@20")) == 9


def test_folder_with_a_slash_at_its_end(photos):
    """As a shell completes it."""
    pack(f"folder:{photos}/", 20)
    assert sorted(path.name for path in photos.iterdir()) == ["test", "train"]
    assert len(load_dataset(f"folder:{photos}@20")) == 9


def test_own_images_in_a_directory_with_such_a_name(photos):
    photos.rename(photos.parent / "photos@20")
    dataset = load_dataset(f"folder:{photos}@20")
    assert min(dataset.read(0).shape[1:]) == 40
    pack(f"folder:{photos}@20", 10)
    assert min(load_dataset(f"folder:{photos}@20@10").read(0).shape[1:]) == 10


def test_relaunch_after_whole(nih, capsys):
    root, _ = nih
    pack("nih", 16, root=root)
    before = {path: path.stat().st_mtime_ns for path in (root / "nih@16").iterdir()}
    first = contents(root / "nih@16")
    (root / "NIH-ChestXRay-14" / "images" / "00000003_000.png").write_bytes(b"broken since")
    pack("nih", 16, root=root)
    assert before == {path: path.stat().st_mtime_ns for path in (root / "nih@16").iterdir()}
    assert contents(root / "nih@16") == first
    assert "whole" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(p.name for p in root.iterdir()) == ["NIH-ChestXRay-14", "nih@16"]


@pytest.mark.parametrize("more", [("--codec", "jpeg"), ("--codec", "jpeg", "--quality", 50)])
def test_other_settings_are_refused(nih, capsys, more):
    root, _ = nih
    first = () if more[-1] == "jpeg" else ("--codec", "jpeg")
    pack("nih", 16, *first, root=root)
    before = contents(root / "nih@16")
    pack("nih", 16, *more, root=root, status=2)
    assert_says(error_line(capsys.readouterr().err), root / "nih@16", more[-1], "remove", "--out")
    assert contents(root / "nih@16") == before


def test_labels_that_changed_are_refused(nih, capsys):
    root, _ = nih
    pack("nih", 16, root=root)
    table = root / "NIH-ChestXRay-14" / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Hernia", "Mass"))
    pack("nih", 16, root=root, status=2)
    assert_says(error_line(capsys.readouterr().err), root / "nih@16", "remove")


def test_workers_give_the_same_bytes(nih_root, tmp_path):
    for workers in ("1", "2"):
        args = ["pack", "nih", "--size", "16", "--data-dir", nih_root, "--workers", workers]
        assert data.main([*map(str, args), "--out", str(tmp_path / workers)]) == 0
    assert contents(tmp_path / "1" / "nih@16") == contents(tmp_path / "2" / "nih@16")


def test_pack_made_anew_in_the_same_process(photos):
    """A notebook that loads, packs anew and loads again must not see the old arrays."""
    name = f"folder:{photos}"
    pack(name, 20)
    assert load_dataset(f"{name}@20").read(0).shape == (3, 20, 30)
    shutil.rmtree(photos.parent / "photos@20")
    shutil.rmtree(photos / "train" / "cat")
    shutil.rmtree(photos / "test" / "cat")
    pack(name, 20, "--codec", "jpeg")
    packed = load_dataset(f"{name}@20")
    assert packed.labels.tolist() == [0, 0, 0, 1, 1, 1] and packed.classes == ("dog", "newt")
    assert packed.read(0).shape == (3, 36, 20)


# ------------------------------------------------------------------------------------------------
# Interruptions
# ------------------------------------------------------------------------------------------------


def start(args, log, hook=None, limit=None):
    """The command line in a forked process of its own group: no import to wait for.

    hook: called with (event, arguments) of each file operation (sys.addaudithook). limit: bytes
    that a file may have.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # the parent's is one for all, and one may die with it
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if hook:
            sys.addaudithook(hook)
        status = data.main([*map(str, args), "--workers", "1"])
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def until(condition, pid):
    """Waits for the condition or for the end of the process."""
    began = time.monotonic()
    while not condition() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() - began > 60:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("it hangs")
        time.sleep(0.001)


def wait(pid):
    """Its status, negative for a signal; what is left of its group ends too."""
    until(lambda: False, pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status


def written(folder, name):
    """Bytes of a pack, whole or not."""
    total = 0
    for path in folder.glob(f"{name}*/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """folder: dataset of 96 + 16 flat images of 640 px: a raw pack of 138 MB, quickly decoded."""
    root = tmp_path_factory.mktemp("large")
    for split, count in (("train", 96), ("test", 16)):
        for i in range(count):
            image = Image.new("RGB", (640, 640), (i, 2 * i, len(split)))
            path = root / "large" / split / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=1)
    pack(f"folder:{root}/large", 640, "--out", root / "undisturbed")
    return root


def large_args(large, out):
    return "pack", f"folder:{large}/large", "--size", 640, "--out", out


def same_files(a, b):
    """Compared one by one: together they would fill the memory of a small machine."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    return all(path.read_bytes() == (b / path.name).read_bytes() for path in a.iterdir())


def test_killed_at_ten_moments(large, tmp_path):
    """Moments spread over the bytes written; the whole group or the main process alone."""
    total = written(large / "undisturbed", "large@640")
    rng, kills = np.random.default_rng(5), 0
    args = large_args(large, tmp_path)
    for k in range(10):
        moment = total * (k + rng.random()) / 10
        pid = start(args, tmp_path / "log")
        until(lambda: written(tmp_path, "large@640") >= moment, pid)  # noqa: B023
        time.sleep(0.01 * rng.random())
        (os.killpg if k % 2 else os.kill)(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
        if not (tmp_path / "large@640").exists():
            refuses(
                FileNotFoundError,
                partial(load_dataset, f"folder:{tmp_path}/large@640"),
                f"{tmp_path}/large@640",
                "python data.py pack",
            )
    assert kills >= 9  # the last may have come too late
    assert wait(start(args, tmp_path / "log")) == 0
    assert same_files(tmp_path / "large@640", large / "undisturbed" / "large@640")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large@640", "log"]


def test_interrupted_by_hand(large, tmp_path):
    """One line, status 75 as for every stopped run, and what is written is kept."""
    args, total = large_args(large, tmp_path), written(large / "undisturbed", "large@640")
    pid = start(args, tmp_path / "log")
    until(lambda: written(tmp_path, "large@640") >= 0.7 * total, pid)
    os.kill(pid, signal.SIGINT)
    status, output = wait(pid), (tmp_path / "log").read_text()
    assert wait(start(args, tmp_path / "log")) == 0
    assert same_files(tmp_path / "large@640", large / "undisturbed" / "large@640")
    assert "Traceback" not in output, output
    assert status == 75
    assert_says(output.splitlines()[-1], "SIGINT")


def test_images_that_are_there_are_not_read_again(large, tmp_path):
    """The first of them change after a stop: the pack has them as they were."""
    images = shutil.copytree(large / "large", tmp_path / "large")
    late = images / "train" / "b" / "85.png"  # not among those that tell the size needed
    whole = late.read_bytes()
    late.write_bytes(whole[:100])
    args = "pack", f"folder:{images}", "--size", 640
    assert wait(start(args, tmp_path / "log")) == 2
    output = (tmp_path / "log").read_text()
    assert written(tmp_path, "large@640") > 10**8
    late.write_bytes(whole)
    for i in (2, 4):
        Image.new("RGB", (640, 640), "white").save(images / "train" / "a" / f"{i:02d}.png")
    assert wait(start(args, tmp_path / "log")) == 0
    assert same_files(tmp_path / "large@640", large / "undisturbed" / "large@640")
    assert_says(error_line(output), late, "unreadable")


def test_two_packings_at_once(large, tmp_path):
    args = large_args(large, tmp_path)
    pid = start(args, tmp_path / "first")
    until(lambda: written(tmp_path, "large@640") >= 10**6, pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait(start(args, tmp_path / "second")) == 2
        assert_says(error_line((tmp_path / "second").read_text()), "large@640", "another process")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    assert same_files(tmp_path / "large@640", large / "undisturbed" / "large@640")


def die_at(number, folder, note=None):
    """An audit hook: the process kills itself before its file operation of that number."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            seen += 1
            if note:
                note.write_text(str(seen))
            elif seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.rmdir")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(data directory with nih@8 in undisturbed/, number of file operations that it took)."""
    root = tmp_path_factory.mktemp("small")
    write_nih(root, nih_pixels(np.random.default_rng(3)))
    out, note = root / "undisturbed", root / "note"

    def hook(event, args):
        if event in FILE_EVENTS and str(args[0]).startswith(str(out)):
            with os.fdopen(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as file:
                file.write(".")

    assert wait(start(small_args(root, out), root / "log", hook)) == 0
    return root, len(note.read_text())


def small_args(root, out, *more):
    return "pack", "nih", "--size", 8, "--data-dir", root, "--out", out, *more


def test_killed_before_each_last_file_operation(small, tmp_path):
    """From the index on: files half there, pack.json written but the directory not renamed."""
    root, operations = small
    expected = contents(root / "undisturbed" / "nih@8")
    # The last nine one by one, before them every fourth.
    for number in [*range(1, operations - 9, 9), *range(operations - 9, operations + 1)]:
        out = tmp_path / str(number)
        pid = start(small_args(root, out), tmp_path / "log", die_at(number, out))
        assert wait(pid) == -signal.SIGKILL
        refuses(
            FileNotFoundError, partial(load_dataset, "nih@8", out),
            out / "nih@8", "python data.py pack nih --size 8",
        )  # fmt: skip
        if out.exists():
            shutil.copytree(out, tmp_path / f"{number}-jpeg")
        pack("nih", 8, "--out", out, root=root)
        assert contents(out / "nih@8") == expected, number
        assert [path.name for path in out.iterdir()] == ["nih@8"], number


def test_a_begun_pack_goes_on_only_as_it_was_begun(small, tmp_path):
    """At whatever moment it stopped, other settings are refused or make what they say."""
    root, operations = small
    for number in range(operations - 9, operations + 1):
        out = tmp_path / str(number)
        wait(start(small_args(root, out), tmp_path / "log", die_at(number, out)))
        args = small_args(root, out, "--codec", "jpeg", "--workers", 1)
        if data.main([*map(str, args)]) == 0:
            assert json.loads((out / "nih@8" / "pack.json").read_text())["codec"] == "jpeg"


def test_broken_image_stops_and_resumes(photos, capsys):
    path = photos / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    for content in (b"", whole[:200], b"GIF89a" + whole):
        path.write_bytes(content)
        pack(f"folder:{photos}", 20, status=2)
        assert_says(error_line(capsys.readouterr().err), path, "unreadable", "mend or remove")
        refuses(FileNotFoundError, partial(load_dataset, f"folder:{photos}@20"), "data.py pack")
    path.write_bytes(whole)
    pack(f"folder:{photos}", 20)
    assert torch.equal(load_dataset(f"folder:{photos}@20").read(4), resized(path, 20))


# ------------------------------------------------------------------------------------------------
# Full disks
# ------------------------------------------------------------------------------------------------


def test_file_that_cannot_grow(large, tmp_path):
    """As on a full disk, in the middle of the images."""
    args, total = large_args(large, tmp_path), written(large / "undisturbed", "large@640")
    assert wait(start(args, tmp_path / "log", limit=total // 2)) == 2
    output = (tmp_path / "log").read_text()
    assert wait(start(args, tmp_path / "log")) == 0
    assert same_files(tmp_path / "large@640", large / "undisturbed" / "large@640")
    assert_says(error_line(output), os.strerror(errno.EFBIG), tmp_path / "large@640")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_too_small(large, small_disk, capsys):
    total = written(large / "undisturbed", "large@640")
    line = says(capsys, *large_args(large, small_disk), status=2)
    assert_says(line, small_disk, "--out", "--size", "jpeg", "GB free")
    needed = float(line.partition("needs about ")[2].split()[0])
    assert needed == pytest.approx(total / 1e9, rel=0.05)
    assert written(small_disk, "large@640") < 10**5  # refused before any image was written


def test_disk_that_fills_up(small, small_disk, tmp_path):
    """Another program takes the rest of the disk at some moment of the packing."""
    root, operations = small
    filler = small_disk / "filler"

    def fill_at(number, out):
        seen = 0

        def hook(event, args):
            nonlocal seen
            if event in FILE_EVENTS and str(args[0]).startswith(str(out)):
                seen += 1
                if seen == number:
                    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                        while file.write(bytes(4096)):
                            pass

        return hook

    outputs = []
    for number in range(3, operations, 6):
        out = small_disk / str(number)
        status = wait(start(small_args(root, out), tmp_path / "log", fill_at(number, out)))
        assert status in (0, 2)
        if status == 2:
            outputs.append((out, (tmp_path / "log").read_text()))
        filler.unlink()
        assert wait(start(small_args(root, out), tmp_path / "log")) == 0
        assert contents(out / "nih@8") == contents(root / "undisturbed" / "nih@8")
    assert len(outputs) >= 3
    for out, output in outputs:
        assert_says(error_line(output), out)


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipped(path, place, bit=1):
    """One bit of a file changed in place, for a while."""
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes([whole[place] ^ bit]))
    yield
    with open(path, "r+b") as file:
        file.write(whole)


@pytest.fixture
def packed(nih):
    root, _ = nih
    pack("nih", 16, root=root)
    return root / "nih@16"


def load_packed(packed, split="train"):
    return load_dataset(packed.name, packed.parent, split)


def test_flipped_byte_of_an_image(packed, capsys):
    """Each byte of the images file is under the checksum of its image, which is named."""
    train = load_packed(packed)
    names = [row[0] for row in NIH_ROWS if row[4] == "train"]
    places = np.cumsum([0, *(train.read(i).numel() for i in range(4))])
    assert places[-1] == (packed / "train.images").stat().st_size
    for i, name in enumerate(names):
        for place in (places[i], places[i + 1] - 1):
            with flipped(packed / "train.images", place):
                dataset = load_packed(packed)
                refuses(ValueError, partial(dataset.read, i), name, packed, "pack it again")
                dataset.read((i + 1) % 4)
    with flipped(packed / "train.images", places[2]):
        out = says(capsys, "check", "nih@16", "--data-dir", packed.parent, status=1)
        assert f"broken: train: nih@16 train image 2 ({names[2]}): damaged" in out


def test_flipped_byte_of_an_index_file(packed):
    indices = [path for path in packed.iterdir() if path.suffix not in (".json", ".images")]
    assert len(indices) >= 4
    for path in indices:
        for place in {0, 100, path.stat().st_size // 2, path.stat().st_size - 1}:
            with flipped(path, place):
                refuses(ValueError, partial(load_packed, packed), path, "pack it again")
    assert len(load_packed(packed)) == 4


def test_flipped_byte_of_the_description(packed):
    """Any byte of pack.json: a class, a codec, an option that went wrong must not pass."""
    path = packed / "pack.json"
    passed = []
    for place in range(path.stat().st_size):
        with flipped(path, place):
            try:
                load_packed(packed)
            except ValueError as error:
                if str(packed) in str(error):
                    continue
            except Exception as error:
                passed.append(error)
                continue
        passed.append(path.read_bytes()[max(0, place - 20) : place + 1])
    assert not passed


def test_description_that_is_none(packed):
    path = packed / "pack.json"
    whole = json.loads(path.read_text())
    for text in ("", "[]", "{}", '{"schema": 1}', path.read_text()[:-40], "\xff"):
        path.write_text(text, encoding="latin-1")
        refuses(ValueError, partial(load_packed, packed), path, "pack it again")
    for key in whole:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        refuses(ValueError, partial(load_packed, packed), path, "pack it again")
    for key in ("files", "classes", "dropped", "options"):
        path.write_text(json.dumps(whole | {key: None}))
        refuses(ValueError, partial(load_packed, packed), path, "pack it again")


def test_another_schema(packed):
    path = packed / "pack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    refuses(ValueError, partial(load_packed, packed), path, "99", "1", "pack it again")


def test_another_name(packed):
    for name in ("nih@32", "chexpert@16"):
        packed.rename(packed.parent / name)
        load = partial(load_dataset, name, packed.parent)
        refuses(ValueError, load, packed.parent / name, "nih@16", "rename")
        (packed.parent / name).rename(packed)


def test_lost_and_cut_files(packed):
    for path in sorted(packed.iterdir()):
        whole = path.read_bytes()
        for damage in (path.unlink, partial(os.truncate, path, len(whole) - 3)):
            damage()
            error = ValueError if path.name != "pack.json" or path.exists() else FileNotFoundError
            refuses(error, partial(load_packed, packed), path.parent, "pack")
            path.write_bytes(whole)
        path.write_bytes(whole + b"\0")
        refuses(ValueError, partial(load_packed, packed), path, "pack it again")
        path.write_bytes(whole)


def test_the_mend_mends(packed, capsys):
    """Without pack.json the message says to pack: packing then works, or says what to remove."""
    (packed / "pack.json").unlink()
    refuses(FileNotFoundError, partial(load_packed, packed), "python data.py pack nih --size 16")
    args = ["pack", "nih", "--size", "16", "--data-dir", str(packed.parent), "--workers", "1"]
    if data.main(args) == 2:
        assert_says(error_line(capsys.readouterr().err), packed, "remove")
        shutil.rmtree(packed)
        assert data.main(args) == 0
    assert len(load_packed(packed)) == 4


# ------------------------------------------------------------------------------------------------
# Bad arguments
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        (["nih", "--size", "0"], ["--size", "0"]),
        (["nih", "--size", "-3"], ["--size", "-3"]),
        (["nih", "--size", "big"], ["--size", "big"]),
        (["nih"], ["--size"]),
        (["nih", "--size", "16", "--codec", "png"], ["--codec", "png", "raw", "jpeg"]),
        (["nih", "--size", "16", "--codec", "jpeg", "--quality", "0"], ["--quality", "100"]),
        (["nih", "--size", "16", "--codec", "jpeg", "--quality", "101"], ["--quality", "100"]),
        (["nih", "--size", "16", "--workers", "-1"], ["--workers", "-1"]),
        (["nih@16", "--size", "8"], ["nih@16", "nothing to pack"]),
        (["nih+chexpert", "--size", "8"], ["nih+chexpert", "one by one"]),
        (["synthetic-xray", "--size", "8"], ["synthetic-xray", "nothing to pack"]),
        (["hin", "--size", "8"], ["hin", "did you mean"]),
        (["chexpert", "--size", "8"], ["chexpert", "train.csv", "--data-dir"]),
        (["nih", "--size", "8", "--split-by", "image"], ["split", "nih", "views"]),
        (["nih", "--size", "8", "--labels", "union"], ["labels", "nih"]),
        (["nih", "--size", "8", "--views", "L"], ["--views", "L", "PA"]),
        (["nih", "--size", "8", "--colour"], ["--colour"]),
        (["folder:nowhere", "--size", "8"], ["nowhere", "PATH/train/CLASS"]),
    ],
)
def test_bad_arguments(nih, capsys, args, words):
    root, _ = nih
    assert_says(says(capsys, "pack", *args, "--data-dir", root, status=2), *words)
    assert [path.name for path in root.iterdir()] == ["NIH-ChestXRay-14"]


def test_out_that_is_a_file(nih, capsys):
    root, _ = nih
    (root / "file").touch()
    args = ("pack", "nih", "--size", 8, "--data-dir", root, "--out", root / "file")
    assert_says(says(capsys, *args, status=2), root / "file")


def test_missing_image_stops_packing(nih, capsys):
    root, _ = nih
    path = root / "NIH-ChestXRay-14" / "images" / "00000005_000.png"
    path.unlink()
    assert_says(says(capsys, "pack", "nih", "--size", 8, "--data-dir", root, status=2), path)


def test_packs_that_are_not_there(nih, capsys):
    root, _ = nih
    line = says(capsys, "info", "nih@64", "--data-dir", root, status=2)
    assert_says(line, root / "nih@64", "python data.py pack nih --size 64")
    assert_says(says(capsys, "info", "hin@64", "--data-dir", root, status=2), "hin", "nih")


# ------------------------------------------------------------------------------------------------
# Training from a pack
# ------------------------------------------------------------------------------------------------

SHORT = ("--precision", "fp32", "--image-size", "32", "--batch-size", "8")


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def test_pretrain_from_a_pack(photos, tmp_path):
    name = f"folder:{photos}@20"
    pack(f"folder:{photos}", 20)
    shutil.rmtree(photos)
    run("pretrain.py", "--source", name, "--epochs", "2", "--log-every", "1", *SHORT, cwd=tmp_path)
    (record,) = results(tmp_path / "runs")
    assert record["source"] == name and record["source_domain"] == "natural"
    assert record["source_images"] == 9 and record["train"]["steps"] >= 2
    (model,) = tmp_path.glob("runs/*/model.pt")
    model = torch.load(model, weights_only=True)
    assert model["source"] == name and model["classes"] == ("cat", "dog", "newt")


def test_targets_from_a_pack(nih_root, tmp_path):
    """At 48 px the pack holds the very pixels, so that every number is the same."""
    pack("nih", 48, "--out", tmp_path, root=nih_root)
    (tmp_path / "NIH-ChestXRay-14").symlink_to(nih_root / "NIH-ChestXRay-14")
    args = ("--checkpoint", "scratch", "--target", "nih", "nih@48", "--data-dir", tmp_path)
    args += ("--steps", "2", "--seeds", "1", *SHORT)
    run("fewshot.py", *args, "--shots", "2", cwd=tmp_path)
    run("transfer.py", *args, cwd=tmp_path)
    records = {(r["kind"], r["target"]): r for r in results(tmp_path / "results")}
    assert len(records) == 4
    for kind in ("fewshot", "transfer"):
        one, other = records[kind, "nih"], records[kind, "nih@48"]
        assert one["metrics"] == other["metrics"] and other["target_domain"] == "medical"
        assert one["train"]["images"] == other["train"]["images"] > 0
        assert other["config"]["sampling"] == one["config"]["sampling"]


# ------------------------------------------------------------------------------------------------
# list
# ------------------------------------------------------------------------------------------------


def rows_of(out, first):
    """Cells of the rows of Markdown tables whose first cell is one of these names or all."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    return [row for row in cells if row and (first is None or row[0] == first)]


def test_list(nih, photos, capsys):
    root, _ = nih
    pack("nih", 16, root=root)
    pack(f"folder:{photos}", 20, "--out", root / "other")
    (root / "PadChest").mkdir()
    capsys.readouterr()
    out = says(capsys, "list", "--data-dir", root)
    known = (
        "synthetic-natural synthetic-xray synthetic-natural-target synthetic-xray-target "
        "imagenet1k imagenet21k chexpert mimic nih padchest cifar10 cifar100 flowers102 pets "
        "covidx tuberculosis nih@16"
    ).split()
    assert sorted(row[0] for row in rows_of(out, None)[2:]) == sorted(known)
    for name in ("nih", "nih@16"):
        ((_, folder, there, counts, classes, domain),) = rows_of(out, name)
        assert (there, counts, classes, domain) == ("yes", "4 + 2", "14", "medical")
        assert (root / folder).is_dir()
    ((_, _, there, counts, classes, domain),) = rows_of(out, "synthetic-natural")
    assert (there, counts, classes, domain) == ("yes", "8,000 + 1,000", "36", "natural")
    assert [rows_of(out, name)[0][2] for name in ("mimic", "pets", "chexpert")] == ["no"] * 3
    ((_, _, there, *rest),) = rows_of(out, "padchest")
    assert there == "damaged" and "PADCHEST" in " ".join(rest)


def test_list_knows_packs_of_folders(photos, capsys):
    """They lie in --data-dir where --out says so, and are used as folder:PATH@SIZE."""
    pack(f"folder:{photos}", 20, "--out", photos.parent)
    out = says(capsys, "list", "--data-dir", photos.parent)
    assert "damaged" not in out and "unknown" not in out
    (row,) = [row for row in rows_of(out, None) if "photos@20" in row[0]]
    assert row[2:] == ["yes", "9 + 6", "3", "natural"]


def test_list_of_an_empty_directory(tmp_path, capsys):
    out = says(capsys, "list", "--data-dir", tmp_path)
    assert len(rows_of(out, None)) == 2 + 16
    assert [row[2] for row in rows_of(out, None)[2:]].count("yes") == 4


def test_list_leaves_unfinished_packs_out(small, tmp_path, capsys):
    root, operations = small
    for number in (operations - 1, operations):
        out = tmp_path / str(number)
        wait(start(small_args(root, out), tmp_path / "log", die_at(number, out)))
        assert list(out.glob("nih@8*")) and "@" not in says(capsys, "list", "--data-dir", out)


# ------------------------------------------------------------------------------------------------
# info
# ------------------------------------------------------------------------------------------------


def test_info_multilabel(nih, capsys):
    root, _ = nih
    out = says(capsys, "info", "nih", "--data-dir", root)
    assert out.splitlines()[0] == "nih: medical, multilabel, 14 classes"
    assert rows_of(out, "train") == [["train", "4", "3", "none"]]
    assert rows_of(out, "test") == [["test", "2", "2", "none"]]
    assert "patients on both sides: 0" in out
    for cls, *numbers in (("Hernia", 1, 0, 0, 0), ("Mass", 0, 0, 1, 0), ("Effusion", 1, 0, 0, 0)):
        assert rows_of(out, cls) == [[cls, *map(str, numbers)]]
    assert len(rows_of(out, None)) == 2 + 2 + 2 + 14
    for shown in ("60 x 48 x 1 (1)", "48 x 100 x 1 (1)", "12 x 10 x 1 (1)"):
        assert shown in out.splitlines()[-2]
    assert "train images, of 4:" in out and "test images, of 2:" in out


def test_info_missing_marks_and_what_is_left_out(tmp_path, rng, capsys):
    write_chexpert(tmp_path, rng)
    out = says(capsys, "info", "chexpert", "--data-dir", tmp_path)
    assert rows_of(out, "train")[0][:3] == ["train", "3", "3"]
    assert rows_of(out, "train")[0][3].startswith("1 ")
    # Train: absent by No Finding, -1, blank. Test: 0.
    assert rows_of(out, "Cardiomegaly") == [["Cardiomegaly", "0", "2", "0", "0"]]
    assert rows_of(out, "Lung Opacity") == [["Lung Opacity", "1", "1", "1", "0"]]
    assert "views: ['PA', 'AP']" in out or "views: PA AP" in out
    out = says(capsys, "info", "chexpert", "--data-dir", tmp_path, "--views", "L", "PA", "AP")
    assert rows_of(out, "train") == [["train", "4", "3", "none"]]


def test_info_multiclass(photos, capsys):
    out = says(capsys, "info", f"folder:{photos}")
    assert out.splitlines()[0] == f"folder:{photos}: natural, multiclass, 3 classes"
    assert rows_of(out, "train") == [["train", "9", "unknown", "none"]]
    assert rows_of(out, "newt") == [["newt", "3", "2"]]
    assert "60 x 40 x 3 (1)" in out and "patients on both" not in out


def test_info_patients_on_both_sides(nih, capsys):
    root, _ = nih
    table = root / "NIH-ChestXRay-14" / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Nodule,0,5,", "Nodule,0,3,"))
    assert "patients on both sides: 1" in says(capsys, "info", "nih", "--data-dir", root)


def test_contact_sheet(photos, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    out = says(capsys, "info", f"folder:{photos}", "--sheet", sheet)
    assert out.splitlines()[-1] == f"wrote {sheet}"
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.size == (180 + 8 * 96, 3 * 96)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # A row a class: its name, then its three images, then white.
    for row in range(3):
        band = pixels[row * 96 : row * 96 + 94]
        assert (band[:, :180] < 100).any()
        for i in range(3):
            path = photos / "train" / ("cat", "dog", "newt")[row] / f"{i}.png"
            with Image.open(path) as image:
                tile = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            tile = v2.Resize((94, 94), antialias=True)(tile).permute(1, 2, 0).numpy().astype(int)
            left = 180 + 96 * i
            assert np.abs(band[:, left : left + 94] - tile).max() <= 1
        assert (band[:, 180 + 3 * 96 :] == 255).all()


def test_contact_sheet_of_findings(nih, capsys):
    root, pixels = nih
    says(capsys, "info", "nih", "--data-dir", root, "--sheet", root / "sheet.png")
    with Image.open(root / "sheet.png") as image:
        assert image.size == (948, 14 * 96)
        rows = (np.asarray(image.convert("L")) != 255).reshape(14, 96, 948)[:, :, 180:]
    shown = {cls for cls, row in zip(NIH_CLASSES, rows) if row.any()}
    assert shown == {"Hernia", "Cardiomegaly", "Effusion", "Pneumothorax", "Atelectasis"}


# ------------------------------------------------------------------------------------------------
# check
# ------------------------------------------------------------------------------------------------


def test_check_of_clean_images(nih, photos, capsys):
    root, _ = nih
    out = says(capsys, "check", "nih", "--data-dir", root)
    summary = "nih: 4 + 2 images, 0 missing, 0 broken, 0 duplicated, 0 in train and test"
    assert out.splitlines() == [summary]
    assert says(capsys, "check", f"folder:{photos}", "--workers", 2).startswith(f"folder:{photos}:")


def bomb():
    def chunk(kind, body):
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def test_check_lists_everything(photos, tmp_path, capsys):
    train, test = photos / "train", photos / "test"
    (train / "cat" / "0.png").write_bytes(b"")
    os.truncate(train / "cat" / "1.png", 300)
    (train / "cat" / "2.png").write_bytes(bomb())
    shutil.copy(train / "dog" / "0.png", train / "dog" / "again.png")
    with Image.open(train / "dog" / "1.png") as image:  # the same pixels in another format
        image.save(test / "newt" / "zebra.bmp")
    report = tmp_path / "report.json"
    out = says(capsys, "check", f"folder:{photos}", "--report", report, status=1)
    *lines, summary = out.splitlines()
    counts = "10 + 7 images, 0 missing, 3 broken, 1 duplicated, 1 in train and test"
    assert summary == f"folder:{photos}: {counts}"
    for i, line in enumerate(lines[:3]):
        assert line.startswith(f"broken: train: {train}/cat/{i}.png: unreadable image")
    duplicate = f"train: {train}/dog/again.png is the same as {train}/dog/0.png"
    shared = f"{train}/dog/1.png is the same as {test}/newt/zebra.bmp"
    assert lines[3:] == [f"duplicated: {duplicate}", f"in train and test: {shared}"]
    record = json.loads(report.read_text())
    assert record["name"] == f"folder:{photos}" and record["images"] == {"train": 10, "test": 7}
    assert record["missing"] == [] and record["duplicated"] == [duplicate]
    assert record["in train and test"] == [shared]
    assert [f"broken: {line}" for line in record["broken"]] == lines[:3]


def test_check_lists_missing_files(nih, capsys):
    root, _ = nih
    images = root / "NIH-ChestXRay-14" / "images"
    for name in ("00000002_000.png", "00000003_000.png"):
        (images / name).unlink()
    out = says(capsys, "check", "nih", "--data-dir", root, status=1)
    assert out.splitlines()[:2] == [
        f"missing: train: {images}/00000003_000.png: no such image",
        f"missing: test: {images}/00000002_000.png: no such image",
    ]
    assert "2 missing, 0 broken, 0 duplicated" in out.splitlines()[2]


def test_check_shortens_a_long_list(photos, tmp_path, capsys):
    for i in range(30):
        (photos / "train" / "cat" / f"empty{i}.png").touch()
    report = tmp_path / "report.json"
    out = says(capsys, "check", f"folder:{photos}", "--report", report, status=1)
    assert len(out.splitlines()) == 22 and "10 more; --report" in out
    assert len(json.loads(report.read_text())["broken"]) == 30


def test_check_refuses_a_report_that_cannot_be_written(photos, tmp_path, capsys):
    """Before the hours of work, not after."""
    (tmp_path / "file").touch()
    args = ["check", f"folder:{photos}", "--report", str(tmp_path / "file" / "r.json")]
    assert data.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and "file" in error_line(err)


def test_check_interrupted_by_hand(large, tmp_path):
    pid = start(["check", f"folder:{large}/large"], tmp_path / "log")
    until(Path(f"/proc/{pid}/task/{pid}/children").read_text, pid)  # its worker has begun
    time.sleep(0.05)  # Python passes over an exception in what it calls after a fork
    os.kill(pid, signal.SIGINT)
    status, output = wait(pid), (tmp_path / "log").read_text()
    assert "Traceback" not in output, output
    assert status not in (0, 1, 2)  # neither clean nor found nor refused
    assert_says(output.splitlines()[-1], "SIGINT")


# ------------------------------------------------------------------------------------------------
# download, and the rest of the command line
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nih", "imagenet1k", "nih+chexpert", "folder:photos", "nih@16"])
def test_download_of_what_cannot_be_fetched(name, tmp_path, capsys):
    assert_says(says(capsys, "download", name, "--data-dir", tmp_path, status=2), name, "fetch")
    assert not list(tmp_path.iterdir())


def test_download_is_no_option_of_a_pack(tmp_path, rng):
    """Of several targets one may be a pack: pets@20 with --download reads the pack."""
    base = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": ["Abyssinian_2 1 1 1", "great_pyrenees_9 2 2 1"]}
    lists["test"] = ["Abyssinian_7 1 1 1", "great_pyrenees_1 2 2 1"]
    (base / "annotations").mkdir(parents=True)
    for file, lines in lists.items():
        (base / "annotations" / f"{file}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            save(base / "images" / f"{line.split()[0]}.jpg", noise(rng, 40, 30, 3))
    pack("pets", 20, root=tmp_path)
    if "download" in data.dataset_options("pets@20"):
        assert len(load_dataset("pets@20", tmp_path, download=True)) == 2


@pytest.mark.parametrize(
    "args, words",
    [
        ([], ["COMMAND"]),
        (["chek", "nih"], ["chek", "check"]),
        (["info"], ["name"]),
        (["info", "nih", "--sheets", "x.png"], ["--sheets", "--sheet"]),
        (["info", "folder:"], ["folder:"]),
        (["info", ""], ["name is missing"]),
        (["check", "nih", "--data-dir", "nowhere"], ["nowhere", "--data-dir"]),
        (["check", "cifar10", "--data-dir", "nowhere"], ["cifar10", "download"]),
    ],
)
def test_mistakes_on_the_command_line(args, words, capsys):
    assert_says(says(capsys, *args, status=2), *words)


@pytest.mark.parametrize("name", [(), ("list",), ("info",), ("check",), ("pack",), ("download",)])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        data.main([*name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for word in {(): ("list", "info", "check", "pack", "download"), ("pack",): (
        "--size", "--codec", "raw", "jpeg", "--quality", "90", "--out", "--workers", "--data-dir",
    ), ("info",): ("--sheet",), ("check",): ("--report",)}.get(name, ("--data-dir",)):  # fmt: skip
        assert word in out
    assert "None" not in out


def test_as_a_program(nih, tmp_path):
    """Exit status and streams of `python data.py` itself."""
    root, _ = nih
    (root / "NIH-ChestXRay-14" / "images" / "00000002_000.png").write_bytes(b"")
    out, err = run("data.py", "check", "nih", "--data-dir", root, cwd=tmp_path, status=1)
    assert "1 broken" in out and "Traceback" not in err
