"""NIH ChestX-ray14 in its official layout, made and real."""

import csv
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from trees import NIH_HEADER, NIH_ROWS, luma, noise, pixels_of, save

from data import load_dataset
from readers.xrays import NIH_CLASSES


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
def test_nih_real(tmp_path, real_data, size, train, test):
    folder = real_data / f"nih-{size}"
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
