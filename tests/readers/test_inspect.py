"""What `data.py info` and `check`, and digests, say of whole datasets and of spoilt ones."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from packing import NIH, Xrays, pack, rows_of, run_data, write_chexpert
from PIL import Image
from test_archives import jpeg, write_tar
from torchvision.transforms import v2
from trees import Trees, write_photos

import data
from readers import inspect
from readers.images import Array, ImageDataset
from readers.xrays import NIH_CLASSES


@pytest.fixture
def xrays(tmp_path):
    return Xrays(tmp_path)


@pytest.fixture
def photos(tmp_path, rng):
    return write_photos(tmp_path / "photos", rng)


def test_info_multilabel(xrays):
    out = run_data("info", "nih", "--data-dir", xrays.root)
    assert out.splitlines()[0] == "nih: medical, multilabel, 14 classes"
    rows = rows_of(out)
    assert rows["train"] == ["4", "3", "none"] and rows["test"] == ["2", "2", "none"]
    assert "patients on both sides: 0" in out
    assert rows["Hernia"] == ["1", "0", "0", "0"] and rows["Mass"] == ["0", "0", "1", "0"]
    assert out.count("\n| ") == 3 + 1 + 14 + 2
    for shown in ("60 x 48 x 1 (1)", "48 x 100 x 1 (1)", "12 x 10 x 1 (1)"):
        assert shown in out.splitlines()[-2]
    assert "train images, of 4:" in out and "test images, of 2:" in out
    table = xrays.tables["nih"]
    table.write_text(table.read_text().replace("Nodule,1,5,", "Nodule,1,3,"))
    assert "patients on both sides: 1" in run_data("info", "nih", "--data-dir", xrays.root)


def test_info_missing_marks_and_what_is_left_out(tmp_path):
    write_chexpert(Trees(tmp_path))
    out = run_data("info", "chexpert", "--data-dir", tmp_path)
    rows = rows_of(out)
    assert rows["train"][:2] == ["2", "2"] and rows["train"][2].startswith("1 ")
    # Train: absent by No Finding, -1. Test: -1.
    assert rows["Cardiomegaly"] == ["0", "1", "0", "1"]
    assert rows["Lung Opacity"] == ["1", "0", "1", "0"]
    assert "views: ['PA', 'AP']" in out


def test_info_multiclass(photos):
    out = run_data("info", f"folder:{photos}")
    assert out.splitlines()[0] == f"folder:{photos}: natural, multiclass, 3 classes"
    assert rows_of(out)["train"] == ["9", "unknown", "none"] and rows_of(out)["newt"] == ["3", "2"]
    assert "60 x 40 x 3 (1)" in out and "patients on both" not in out
    for split in ("train", "test"):
        (photos / split / "cat").rename(photos / split / "cat|dog")
    assert r"| cat\|dog |" in run_data("info", f"folder:{photos}")


def test_contact_sheet(photos, tmp_path):
    sheet = tmp_path / "sheet.png"
    out = run_data("info", f"folder:{photos}", "--sheet", sheet)
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


def test_contact_sheet_of_findings(xrays, tmp_path):
    run_data("info", "nih", "--data-dir", xrays.root, "--sheet", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (948, 14 * 96)
        rows = (np.asarray(sheet.convert("L")) != 255).reshape(14, 96, 948)[:, :, 180:]
    shown = {cls for cls, row in zip(NIH_CLASSES, rows) if row.any()}
    assert shown == {"Hernia", "Cardiomegaly", "Effusion", "Pneumothorax", "Atelectasis"}


def test_check_of_clean_and_of_missing_images(xrays):
    out = run_data("check", "nih", "--data-dir", xrays.root, "--workers", 2)
    assert out == "nih: 4 + 2 images, 0 missing, 0 broken, 0 duplicated, 0 in train and test\n"
    gone = xrays.image("00000003_000.png")
    gone.unlink()
    out = run_data("check", "nih", "--data-dir", xrays.root, status=1)
    assert out.startswith(f"missing: train: {gone}: no such image\n")
    assert "1 missing, 0 broken, 0 duplicated" in out


def test_check_lists_everything(photos, tmp_path):
    train, test = photos / "train", photos / "test"
    (train / "cat" / "0.png").write_bytes(b"")
    os.truncate(train / "cat" / "1.png", 300)
    (train / "cat" / "2.png").write_bytes(b"GIF89a" + bytes(99))
    shutil.copy(train / "dog" / "0.png", train / "dog" / "again.png")
    with Image.open(train / "dog" / "1.png") as image:  # the same pixels in another format
        image.save(test / "newt" / "zebra.bmp")
    report = tmp_path / "report.json"
    out = run_data("check", f"folder:{photos}", "--report", report, status=1)
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


def test_check_says_that_12_bits_lie_in_16(photos, rng):
    for image in photos.rglob("*/*/*.*"):
        image.unlink()
        pixels = rng.integers(0, 2**12, (9, 9)).astype(np.uint16)
        Image.fromarray(pixels).save(image.with_suffix(".png"))
    out = run_data("check", f"folder:{photos}", status=1).splitlines()[0]
    dark = "half of the images have no pixel above 16 of 255"
    mend = "12-bit values in 16-bit files? multiply them by 16"
    assert out == f"train: {dark}; test: {dark}: {mend}"


# Digests: what changes them, in which part, and what does not

PARTS = ("names", "labels", "classes", "content")


def swap(one, other):
    between = one.rename(one.with_name("between"))
    other.rename(one)
    between.rename(other)


def flip(path):
    """One bit in its middle."""
    content = np.memmap(path, mode="r+")
    content[len(content) // 2] ^= 1


def rename_class(at):
    for split in ("train", "test"):
        (at.parent / split / "dog").rename(at.parent / split / "dot")


CHANGES = {  # of the photos in a folder `at`, to what they change
    "two classes swapped": (lambda at: swap(at / "cat", at / "dog"), "content"),
    "two images swapped": (lambda at: swap(at / "cat/0.png", at / "cat/1.png"), "content"),
    "an image replaced": (lambda at: shutil.copy(at / "cat/0.png", at / "dog/1.png"), "content"),
    "a bit flipped": (lambda at: flip(at / "newt/1.png"), "content"),
    "an image cut": (lambda at: (at / "newt/0.png").write_bytes(b""), "content"),
    "an image renamed": (lambda at: (at / "cat/1.png").rename(at / "cat/1.PNG"), "names"),
    "a class renamed": (rename_class, "names classes"),
    "an image moved": (
        lambda at: (at / "cat/1.png").rename(at / "dog/3.png"),
        "names labels content",
    ),
    "an image removed": (lambda at: (at / "newt/1.png").unlink(), "names labels content"),
}


def digests(*args, **options):
    train, test = data.load_splits(*args, **options)
    return inspect.data_digest(train=train, test=test)


def changed(before, after):
    assert list(before) == list(after) == [f"{s} {p}" for s in ("train", "test") for p in PARTS]
    return [part for part in before if before[part] != after[part]]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_of_a_folder_changes(photos, tmp_path, change):
    before = digests(f"folder:{photos}")
    photos = photos.rename(tmp_path / "moved")
    assert digests(f"folder:{photos}") == before  # wherever it lies
    spoil, parts = CHANGES[change]
    spoil(photos / "test")
    splits = ("train", "test") if change == "a class renamed" else ("test",)
    expected = [f"{split} {part}" for split in splits for part in parts.split()]
    assert changed(before, digests(f"folder:{photos}")) == expected


@pytest.mark.parametrize("name", ["nih", "nih+chexpert", "nih@16"])
@pytest.mark.parametrize("fraction", [1, 0.75])
def test_digests_of_tables_unions_packs_and_parts_of_them(xrays, tmp_path, name, fraction):
    row = "patient{0}/study1/view1_frontal.jpg,Male,50,Frontal,PA,,,1,,,,0,,,,,,,"
    for split in ("train", "valid"):
        xrays.write_chexpert(split, [f"{split}/{row.format(number)}" for number in range(1, 4)])
    more = {"root": tmp_path, "fraction": fraction}

    def taken():
        if name == "nih@16":
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            pack("nih", 16, root=tmp_path)
        return digests(name, **more)

    before = taken()
    for file, *_ in NIH["train"]:  # a part leaves one of them out
        shutil.copy(xrays.image("00000005_000.png"), xrays.image(file))
    assert changed(before, taken()) == ["train content"]
    table = xrays.tables["nih"]
    table.write_text(table.read_text().replace("Nodule", "Pneumothorax"))
    assert changed(before, taken()) == ["train content", "test labels"]
    if fraction < 1:
        other = changed(taken(), digests(name, **more, fraction_seed=2))
        assert other[:2] == ["train names", "train labels"]  # its images may look alike


def test_digests_of_archives_read_in_place(tmp_path):
    files = {f"{i}.jpg": jpeg(i) for i in range(3)}
    for split in ("train", "test"):
        write_tar(tmp_path / split / "a.tar", files)
    before = digests(f"folder:{tmp_path}")
    data.main(["pack", f"folder:{tmp_path}", "--size", "8", "--out", f"{tmp_path}.packs"])
    (names,) = tmp_path.parent.glob("*.packs/*/test.names.npy")
    assert np.load(names).tolist() == [b"0", b"1", b"2"]  # packs of archives have always had these
    write_tar(tmp_path / "test" / "a.tar", files | {"1.jpg": jpeg(7)})
    assert changed(before, digests(f"folder:{tmp_path}")) == ["test content"]
    (tmp_path / "test" / "a.tar").unlink()
    (tmp_path / "test" / "a").mkdir()
    for name, content in files.items():
        (tmp_path / "test" / "a" / name).write_bytes(content)
    assert changed(before, digests(f"folder:{tmp_path}")) == ["test names"]


def test_the_digits_of_digests_are_those_of_sha256(tmp_path):
    """By hand: a later version has to know what an earlier one has read."""
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    labels = np.array([1, 0], np.int64)
    made = ImageDataset("x", Array("x", images), labels, ("a", "b"), "multiclass", "natural")

    def digits(*pieces):
        return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]

    pixels = [image.transpose(2, 0, 1).tobytes() for image in images]
    assert inspect.data_digest(test=made) == {
        "test names": digits(),
        "test labels": digits(b"int64 (2,) 16 ", labels.tobytes()),
        "test classes": digits(b"|S10 (1,) 10 ", b'["a", "b"]'),
        "test content": digits(*(b"uint8 (3, 2, 2) 12 " + image for image in pixels)),
    }
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(b"no image")
    found = digests(f"folder:{tmp_path}")
    assert found["train names"] == digits(b"|S7 (1,) 7 ", b"a/0.png")
    assert found["test content"] == digits(b"|S8 (1,) 8 ", b"no image")


def test_of_many_images_a_digest_reads_a_sample():
    read, image = [], torch.zeros(3, 1, 1, dtype=torch.uint8)
    labels = np.zeros(100_000, np.int64)

    def reader(i, size):
        read.append(i)
        return image

    inspect.data_digest(test=ImageDataset("x", reader, labels, ("a",), "multiclass", "natural"))
    assert len(read) == 256 and {0, 99_999} < set(read) and np.diff(sorted(read)).max() == 393
