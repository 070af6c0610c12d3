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
from packing import Xrays, contents, pack, says, write_chexpert
from PIL import Image
from torchvision.transforms import v2
from trees import Trees, load_folder, noise, save, write_photos

import data
from data import load_dataset
from engine.console import write_json
from readers import packs
from readers.transforms import resize_shorter, xray_square


@pytest.fixture
def xrays(tmp_path):
    return Xrays(tmp_path)


@pytest.fixture
def photos(tmp_path, rng):
    return write_photos(tmp_path / "photos", rng)


def same_but_pixels(packed, original):
    for field in ("labels", "groups"):
        found, expected = (np.asarray(getattr(dataset, field)) for dataset in (packed, original))
        np.testing.assert_array_equal(found, expected)  # a NaN equals a NaN
        assert found.dtype == expected.dtype
    for field in ("classes", "task", "domain", "dropped"):
        assert getattr(packed, field) == getattr(original, field)
    assert packed.options == json.loads(json.dumps(original.options))


def as_jpeg(image, quality):
    """Pillow's writing and reading of a (C,H,W) image."""
    v2.functional.to_pil_image(image).save(content := io.BytesIO(), "JPEG", quality=quality)
    return v2.functional.pil_to_tensor(Image.open(content))


@pytest.mark.parametrize("codec, quality", [("raw", 90), ("jpeg", 95), ("jpeg", 10)])
@pytest.mark.parametrize("name, prepare", [("nih", xray_square), ("folder:", resize_shorter)])
def test_what_a_pack_holds(xrays, photos, name, prepare, codec, quality):
    """A smaller image keeps its size."""
    name += str(photos) if name == "folder:" else ""
    originals, expected = data.load_splits(name, xrays.root), []
    for original in originals:
        images = [original.read(i) for i in range(len(original))]
        expected.append([prepare(image, min(20, *image.shape[1:])) for image in images])
    pack(name, 20, "--codec", codec, "--quality", quality, root=xrays.root)
    shutil.rmtree(xrays.nih)
    shutil.rmtree(photos)
    splits = data.load_splits(f"{name}@20", xrays.root)
    for packed, original, images in zip(splits, originals, expected):
        same_but_pixels(packed, original)
        assert packed.name == f"{name}@20"
        for i, image in enumerate(images):
            assert torch.equal(packed.read(i), image if codec == "raw" else as_jpeg(image, quality))
            assert os.path.basename(original.where(i)) in packed.where(i)
    part = packed.subset([1, 0])
    assert torch.equal(part.read(0), packed.read(1)) and part.where(1) == packed.where(0)


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
    expected = resize_shorter(load_folder(tmp_path / "set").read(0), 32)
    assert (image.float() - expected).abs().max() <= 6


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
    """Nothing is touched; other settings, labels or images are refused."""
    root, folder = xrays.root, xrays.root / "nih@16"
    same = ("--codec", "jpeg", "--quality", 70, "--views", "PA")
    pack("nih", 16, *same, root=root)
    assert [len(dataset) for dataset in data.load_splits("nih@16", root)] == [3, 1]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "whole" in pack("nih", 16, *same, root=root).splitlines()[-1]
    for other, word in (((*same, "--quality", 50), "50"), (same[:-2], "options")):
        line = pack("nih", 16, *other, root=root, status=2)
        assert says(line, folder, word, "remove it, or give another --out")
    image, table = xrays.image("00000003_000.png"), xrays.tables["nih"]
    for path, old, new, word in (
        (image, image.read_bytes(), b"broken since", "train content"),
        (table, b"Hernia", b"Mass", "train labels"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new))
        line = pack("nih", 16, *same, root=root, status=2)
        assert says(line, folder, f"packed from another {word}", "remove")
        path.write_bytes(whole)
    older = json.loads((folder / "pack.json").read_text())  # without digests of the data
    older = {key: value for key, value in older.items() if " " not in key and key != "crc32"}
    write_json(folder / "pack.json", older | {"crc32": packs._crc32_of(older)})
    before |= {folder / "pack.json": (folder / "pack.json").stat().st_mtime_ns}
    image.write_bytes(b"broken since")
    assert "whole" in pack("nih", 16, *same, root=root)
    table.write_bytes(table.read_bytes().replace(b"Hernia", b"Mass"))
    assert says(pack("nih", 16, *same, root=root, status=2), folder, "another index")
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
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


def test_broken_images_stop_packing(photos):
    path = photos / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    assert says(pack(f"folder:{photos}", 20, status=2), path, "unreadable", "mend or remove")
    refuses(FileNotFoundError, partial(load_dataset, f"folder:{photos}@20"), "data.py pack")
    path.write_bytes(whole)
    part = photos.parent / "photos@20.part"
    refused = pack(f"folder:{photos}", 20, status=2)  # what is packed already may have changed too
    assert says(refused, part, "packed from another train content", "remove it")
    shutil.rmtree(part)
    pack(f"folder:{photos}", 20)
    assert len(load_dataset(f"folder:{photos}@20")) == 9
