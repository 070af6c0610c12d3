"""The digest of a dataset: what changes it, in which part, and what does not."""

import hashlib
import shutil

import numpy as np
import pytest
from packing import NIH, Xrays, pack
from test_archives import jpeg, write_tar
from trees import write_photos

import data
from readers import digest
from readers.digest import data_digest
from readers.images import Array, ImageDataset

PARTS = ("names", "labels", "classes", "content")


def swap(one, other):
    between = one.rename(one.with_name("between"))
    other.rename(one)
    between.rename(other)


def flip(path):
    """One bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
    return data_digest(train=train, test=test)


def changed(before, after):
    assert list(before) == list(after) == [f"{s} {p}" for s in ("train", "test") for p in PARTS]
    return [part for part in before if before[part] != after[part]]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_of_a_folder_changes(tmp_path, rng, change):
    photos = write_photos(tmp_path / "photos", rng)
    before = digests(f"folder:{photos}")
    photos = photos.rename(tmp_path / "moved")
    assert digests(f"folder:{photos}") == before  # wherever it lies
    spoil, parts = CHANGES[change]
    spoil(photos / "test")
    expected = [f"test {part}" for part in parts.split()]
    if change == "a class renamed":
        expected = [*(f"train {part}" for part in parts.split()), *expected]
    assert changed(before, digests(f"folder:{photos}")) == expected


@pytest.mark.parametrize("name", ["nih", "nih+chexpert", "nih@16"])
@pytest.mark.parametrize("fraction", [1, 0.75])
def test_tables_unions_packs_and_parts_of_them(tmp_path, name, fraction):
    xrays = Xrays(tmp_path)
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


def test_archives_read_in_place(tmp_path):
    files = {f"{i}.jpg": jpeg(i) for i in range(3)}
    for split in ("train", "test"):
        write_tar(tmp_path / split / "a.tar", files)
    before = digests(f"folder:{tmp_path}")
    write_tar(tmp_path / "test" / "a.tar", files | {"1.jpg": jpeg(7)})
    assert changed(before, digests(f"folder:{tmp_path}")) == ["test content"]
    (tmp_path / "test" / "a.tar").unlink()
    (tmp_path / "test" / "a").mkdir()
    for name, content in files.items():
        (tmp_path / "test" / "a" / name).write_bytes(content)
    assert changed(before, digests(f"folder:{tmp_path}")) == ["test names"]


def test_the_digits_are_those_of_sha256(tmp_path):
    """By hand: a later version has to know what an earlier one has read."""
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    labels = np.array([1, 0], np.int64)
    made = ImageDataset("x", Array("x", images), labels, ("a", "b"), "multiclass", "natural")

    def digits(*pieces):
        return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]

    pixels = [image.transpose(2, 0, 1).tobytes() for image in images]
    assert data_digest(test=made) == {
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


def test_of_many_images_a_sample_is_read(monkeypatch):
    read, images = [], np.zeros((100_000, 1, 1, 3), np.uint8)
    content = digest._content
    monkeypatch.setattr(digest, "_content", lambda reader, i: read.append(i) or content(reader, i))
    labels = np.zeros(len(images), np.int64)
    made = ImageDataset("x", Array("x", images), labels, ("a",), "multiclass", "natural")
    data_digest(test=made)
    assert len(read) == 256 and {0, 99_999} < set(read) and np.diff(sorted(read)).max() == 393
