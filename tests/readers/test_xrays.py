"""The X-ray datasets in their official layouts; labels, orders and splits are typed by hand.

What the study drew is computed with numpy's RandomState, which it used.
"""

import collections
import csv
import hashlib
import random
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import refuses
from PIL import Image
from trees import (
    MIMIC_ROWS,
    NIH_HEADER,
    NIH_ROWS,
    PADCHEST_HEADER,
    Trees,
    lines,
    luma,
    marks,
    noise,
    pixels_of,
    read,
    save,
    write,
)

import data
from data import load_dataset
from readers.xrays import PADCHEST_BROKEN as BROKEN


def files(dataset, folder):
    """The images' paths below a folder."""
    return [str(dataset.where(i)).removeprefix(f"{folder}/") for i in range(len(dataset))]


def names(dataset):
    return [Path(dataset.where(i)).name for i in range(len(dataset))]


def found(dataset):
    """{file name: names of the classes that are positive}."""
    marked = [{dataset.classes[c] for c in np.flatnonzero(row == 1)} for row in dataset.labels]
    return dict(zip(names(dataset), marked))


def study_order(count):
    """The positions 0 ... count - 1 as the study shuffles them."""
    positions = np.arange(count)
    np.random.RandomState(42).shuffle(positions)
    return positions.tolist()


def assert_grey(dataset):
    """Each image is Pillow's own reading, as one grey channel."""
    for i in range(len(dataset)):
        with Image.open(dataset.where(i)) as image:
            deep = image.mode.startswith("I")
            expected = np.rint(np.asarray(image) / 257) if deep else np.asarray(image.convert("L"))
        image = dataset.read(i)
        assert image.dtype == torch.uint8 and image.shape[0] == 1
        np.testing.assert_array_equal(image[0], expected)


def assert_xrays(dataset, name, classes, task="multilabel"):
    assert (dataset.name, dataset.classes, dataset.size) == (name, tuple(classes), None)
    assert (dataset.task, dataset.domain) == (task, "medical")
    assert dataset.labels.dtype == (np.float32 if task == "multilabel" else np.int64)


@pytest.fixture
def trees(tmp_path):
    """CheXpert and MIMIC-CXR-JPG."""
    trees = Trees(tmp_path)
    trees.write_chexpert("train", CHEXPERT_TRAIN)
    trees.write_chexpert("valid", CHEXPERT_VALID)
    trees.write_mimic()
    return trees


# CheXpert

FINDINGS = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
).split(",")
NIH_CLASSES = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Effusion,Emphysema,Fibrosis,Hernia,Infiltration,"
    "Mass,Nodule,Pleural_Thickening,Pneumonia,Pneumothorax"
).split(",")
PADCHEST_CLASSES = (
    "Air Trapping,Aortic Atheromatosis,Aortic Elongation,Atelectasis,Bronchiectasis,Cardiomegaly,"
    "Consolidation,Costophrenic Angle Blunting,Edema,Effusion,Emphysema,Fibrosis,"
    "Flattened Diaphragm,Fracture,Granuloma,Hemidiaphragm Elevation,Hernia,Hilar Enlargement,"
    "Infiltration,Mass,Nodule,Pleural_Thickening,Pneumonia,Pneumothorax,Scoliosis,Support Devices,"
    "Tuberculosis"
).split(",")
CHEXPERT_TRAIN = (
    "train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    "train/patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,"
    ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
    "train/patient00002/study1/view1_frontal.jpg,Female,83,Frontal,AP,,,,1.0,,,-1.0,,,,,,1.0,",
    "train/patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,",
    "train/patient64540/study1/view1_frontal.jpg,Male,60,Frontal,PA,1,0,-1,-1,1,,,,,,,,,",
    "train/patient00003/study1/view1_frontal.jpg,Male,41,Frontal,AP,,,,,,1.0,,,,0.0,,,,",
    "train/patient00004/study1/view1_frontal.jpg,Female,20,Frontal,LL,,,,,,,,,,,1,,,",
    "train/patient00006/study1/view1_frontal.jpg,Unknown,0,Frontal,RL,,,,,,,,,,,,1,,",
    "train/patient00005/study1/view1_frontal.jpg,Male,33,Frontal,PA,0,0,1,,,,,-1,0,,1,,,",
)
CHEXPERT_VALID = (
    "valid/patient64542/study1/view1_frontal.jpg,Male,73,Frontal,PA,"
    "0.0,1.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0",
    "valid/patient64542/study1/view2_lateral.jpg,Male,73,Lateral,,"
    "0.0,1.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0",
    "valid/patient64541/study1/view1_frontal.jpg,Female,70,Frontal,AP,"
    "1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
)
CHEXPERT_MARKS = marks(
    "0000000000000",  # No Finding, over a present and an unmentioned mark
    ".....1.1.....",
    ".....1.1.....",
    "0000000000000",  # No Finding, over uncertain and present ones
    "...1.......0.",
    "01..0...1....",  # No Finding 0 changes nothing
)
CHEXPERT_PATIENTS = [1, 2, 2, 64540, 3, 5]
DEVICES = "marks of Support Devices, as No Finding is 1"


@pytest.mark.parametrize("release", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_chexpert_train(trees, release):
    """The table of either release lists the images in the one directory."""
    trees.write_chexpert("train", CHEXPERT_TRAIN, release)
    path = trees.chexpert / "train/patient00003/study1/view1_frontal.jpg"
    save(path, trees.noise(10, 12, 3))
    dataset = trees.load("chexpert")
    assert_xrays(dataset, "chexpert", FINDINGS)
    kept = [CHEXPERT_TRAIN[i].split(",")[0] for i in (0, 1, 2, 4, 5, 8)]
    assert files(dataset, trees.chexpert) == kept
    np.testing.assert_array_equal(dataset.labels, CHEXPERT_MARKS)
    assert dataset.groups.tolist() == CHEXPERT_PATIENTS
    assert dataset.options == {"views": ["PA", "AP"]}
    assert dataset.dropped == {"views other than PA, AP": 3, DEVICES: 1}
    assert_grey(dataset)
    image, label = dataset[1]
    assert torch.equal(image, dataset.read(1)) and label.dtype == torch.float32
    np.testing.assert_array_equal(label, CHEXPERT_MARKS[1])


@pytest.mark.parametrize(
    "uncertain, blank, expected",
    [
        ("negative", "ignore", ("0000.1.10....", "...1.......0.", "01..0...1.0..")),
        ("positive", "ignore", ("1111.1.11....", "...1.......0.", "01..0...1.1..")),
        ("ignore", "negative", ("....0101.0000", "0001000000000", "0100000010.00")),
    ],
)
def test_how_uncertain_and_blank_marks_are_read(trees, uncertain, blank, expected):
    """Patients 2, 3 and 5; with No Finding all are absent whichever way."""
    trees.write_chexpert("train", CHEXPERT_TRAIN)
    dataset = trees.load("chexpert", uncertain=uncertain, blank=blank)
    np.testing.assert_array_equal(dataset.labels[[1, 4, 5]], marks(*expected))
    assert not dataset.labels[[0, 3]].any()
    chosen = {"uncertain": uncertain, "blank": blank}
    chosen = {key: value for key, value in chosen.items() if value != "ignore"}
    assert dataset.options == {"views": ["PA", "AP"]} | chosen
    trees.write_mimic()
    usual, dataset = trees.load("mimic"), trees.load("mimic", uncertain=uncertain, blank=blank)
    assert dataset.options == {"views": ["PA", "AP"]} | chosen
    known = ~np.isnan(usual.labels)
    np.testing.assert_array_equal(dataset.labels[known], usual.labels[known])
    assert np.isnan(dataset.labels).sum() < np.isnan(usual.labels).sum()


def test_chexpert_test(trees, tmp_path):
    header = "Study," + ",".join(["No Finding", *sorted({*FINDINGS, "Pleural Effusion"})])
    header = header.replace(",Effusion", "")
    study = "test/patient64741/study1"
    rows = [f"CheXpert-v1.0/{study},0.0,1,0,0,0,0,0,0,0,0,0,0,0,1"]
    rows.append("CheXpert-v1.0/test/patient64740/study2,1" + ",0" * 13)
    table = trees.chexpert / "groundtruth.csv"
    write(table, lines(header, rows))
    for name in ("view1_frontal", "view2_frontal", "view3_lateral"):
        save(trees.chexpert / study / f"{name}.jpg", trees.noise(10, 12))
    call = partial(trees.load, "chexpert-test", "test")
    refuses(FileNotFoundError, call, "patient64740/study2: no frontal image", table)
    save(trees.chexpert / "test/patient64740/study2/view1_frontal.jpg", trees.noise(10, 12))
    dataset = call()
    assert_xrays(dataset, "chexpert-test", FINDINGS)
    study2 = "test/patient64740/study2/view1_frontal.jpg"
    kept = [f"{study}/view1_frontal.jpg", f"{study}/view2_frontal.jpg", study2]
    assert files(dataset, trees.chexpert) == kept
    expected = marks("1000000000001", "1000000000001", "0000000000000")
    np.testing.assert_array_equal(dataset.labels, expected)
    assert dataset.groups.tolist() == [64741, 64741, 64740]
    refuses(ValueError, lambda: trees.load("chexpert-test"), "test images alone", "--eval-only")
    args = Namespace(method="eval", data_dir=tmp_path)
    assert [len(part) for part in data.open_splits("chexpert-test", args)] == [3, 3]
    write(table, lines(header, [*rows, rows[0]]))
    refuses(ValueError, call, "groundtruth.csv, line 4", "more than once")
    write(table, lines(header, [rows[0].replace("0.0", "-1", 1)]))
    refuses(ValueError, call, "line 2: No Finding '-1' must be one of 0")


def test_chexpert_test_is_valid_csv(trees):
    dataset = trees.load("chexpert", "test")
    assert files(dataset, trees.chexpert) == [
        "valid/patient64542/study1/view1_frontal.jpg",
        "valid/patient64541/study1/view1_frontal.jpg",
    ]
    np.testing.assert_array_equal(dataset.labels, marks("0000100110000", "0000000000000"))
    assert dataset.groups.tolist() == [64542, 64541]


# The findings by their column's place in train.csv -> by their place among the classes.
CHEXPERT_PLACES = [4, 1, 7, 6, 3, 2, 10, 0, 11, 8, 9, 5, 12]


def test_each_column_is_its_class(tmp_path):
    trees, chexpert, mimic, findings = Trees(tmp_path), [], [], []
    for column in range(13):
        texts = ["1" if place == column else "0" for place in range(13)]
        start = f"train/patient{column + 1:05d}/study1/view1_frontal.jpg,Male,50,Frontal,PA,"
        chexpert.append(start + ",".join(["", *texts]))
        ids = 11000000 + column, 50000000 + column
        mimic.append((f"{column:08x}-0", *ids, "PA", "train"))
        findings.append(",".join([*map(str, ids), *texts[:8], "", *texts[8:]]))
    trees.write_chexpert("train", chexpert, images=False)
    trees.write_mimic(mimic, findings[::-1], images=False)
    expected = np.eye(13)[CHEXPERT_PLACES]
    np.testing.assert_array_equal(trees.load("chexpert", verify=False).labels, expected)
    np.testing.assert_array_equal(trees.load("mimic", verify=False).labels, np.eye(13))


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), ("1.0", 1), ("0", 0), ("0.0", 0)] + [(t, np.nan) for t in ("", "-1", "-1.0")],
)
@pytest.mark.parametrize("no_finding", ["", "0", "-1", "-1.0", "1", "1.0"])
def test_coding(tmp_path, text, value, no_finding):
    """Of both datasets: one labeller made both."""
    trees = Trees(tmp_path)
    row = f"train/patient00007/study1/view1_frontal.jpg,Male,50,Frontal,PA,{no_finding}"
    trees.write_chexpert("train", [row + f",{text}" * 13], images=False)
    findings = [f"10000032,50414267{f',{text}' * 8},{no_finding}{f',{text}' * 5}"]
    trees.write_mimic(MIMIC_ROWS[1:6], findings, images=False)
    expected = np.full((1, 13), 0 if no_finding in ("1", "1.0") else value, np.float32)
    zeroed = no_finding in ("1", "1.0") and value == 1
    for name in ("chexpert", "mimic"):
        dataset = trees.load(name, verify=False)
        np.testing.assert_array_equal(dataset.labels, expected)
        assert dataset.dropped[DEVICES] == len(dataset) * zeroed


@pytest.mark.parametrize(
    "views, kept", [(["L"], [3]), (["RL", "LL"], [6, 7]), (["PA", "L"], [3, 4, 8])]
)
def test_chexpert_views(trees, views, kept):
    # A lateral image is L whatever its second column says.
    rows = [row.replace("Lateral,", "Lateral,PA") for row in CHEXPERT_TRAIN]
    trees.write_chexpert("train", rows, images=False)
    dataset = trees.load("chexpert", views=views)
    assert files(dataset, trees.chexpert) == [CHEXPERT_TRAIN[i].split(",")[0] for i in kept]
    assert len(dataset.labels) == len(dataset.groups) == len(kept)
    assert dataset.options == {"views": views} and dataset.dropped[DEVICES] == 0
    assert dataset.dropped[f"views other than {', '.join(views)}"] == 9 - len(kept)


# MIMIC-CXR-JPG

MIMIC_KEPT = [
    "p10/p10000032/s53911762/fffabebf-74fd3a1f-673b6b41-96ec0ac9-2ab69818.jpg",
    "p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg",
    "p19/p19999733/s57132437/f3a5dbbc-23c7f3f4-ab6c0f8a-ec7c9a0b-d1f1b3aa.jpg",
    "p10/p10000032/s53911762/68b5c4b1-227d0485-9cc38c3f-7b84ab51-4b472714.jpg",
]
MIMIC_MARKS = marks("0..1....10...", "0000000000000", "0000000000000", "0..1....10...")


def table_rows(path):
    """(header, [rows]) as texts."""
    header, *rows = read(path).splitlines()
    return header, rows


@pytest.mark.parametrize("order", [1, -1])
def test_mimic_train(trees, order):
    """The metadata's order is the images'; the orders of the two other tables mean nothing."""
    if order == -1:
        for part in ("metadata", "split", "chexpert"):
            header, rows = table_rows(trees.tables[part])
            rows = rows[::-1] if part == "metadata" else rows[3:] + rows[:3]
            trees.tables[part].unlink()  # as whoever has unpacked it
            write(trees.tables[part].with_suffix(""), lines(header, rows))
    save(trees.mimic / "files" / MIMIC_KEPT[2], trees.noise(10, 12, 3))
    dataset = trees.load("mimic")
    assert_xrays(dataset, "mimic", FINDINGS)
    assert files(dataset, trees.mimic / "files") == MIMIC_KEPT[::order]
    np.testing.assert_array_equal(dataset.labels, MIMIC_MARKS[::order])
    assert dataset.groups.tolist() == [10000032, 10000032, 19999733, 10000032][::order]
    assert dataset.options == {"views": ["PA", "AP"]}
    left_out = {"views other than PA, AP": 2, "studies without labels": 1, DEVICES: 1}
    assert dataset.dropped == left_out
    assert_grey(dataset)


def test_mimic_test_is_validate(trees):
    dataset = trees.load("mimic", "test")
    assert files(dataset, trees.mimic / "files") == [
        "p10/p10000764/s57375967/096052b7-d256dc40-453a102b-fa7d01c6-1b22c6b4.jpg",
        "p10/p10000980/s54577367/0b2f8b0d-1b0d3a6b-5e9d3ac5-7f0a9f6d-77aaf3c4.jpg",
    ]
    np.testing.assert_array_equal(dataset.labels, marks("..1..........", "...0.......1."))
    assert dataset.groups.tolist() == [10000764, 10000980]
    assert list(dataset.dropped.values()) == [1, 0, 0]


@pytest.mark.parametrize("part", ["train", "metadata", "split", "chexpert"])
def test_a_row_twice_or_lost(trees, part):
    header, rows = table_rows(trees.tables[part])
    key = rows[4].split(",")[part == "chexpert"].removeprefix("CheXpert-v1.0/")
    call = partial(trees.load, "chexpert" if part == "train" else "mimic")
    write(trees.tables[part], lines(header, [*rows, rows[4]]))
    refuses(ValueError, call, trees.tables[part], key, "more than once", "keep one")
    write(trees.tables[part], lines(header, rows[:4] + rows[5:]))
    if part == "split":
        refuses(ValueError, call, trees.tables[part], "no row", key, "fetch")
    else:
        call()


# Texts and images that are none


@pytest.mark.parametrize(
    "table, column, text, must",
    [
        ("train", "Frontal/Lateral", "frontal", "one of Frontal, Lateral"),
        ("train", "AP/PA", "P" * 256, "UTF-8 of less than 256 bytes"),
        ("train", "No Finding", "2", "1, 0, -1 or blank"),
        ("train", "Support Devices", "nan", "1, 0, -1 or blank"),
        ("train", "Path", "train/patient00007/study1/view1_frontal.jpg", "like CheXpert-v1.0/"),
        ("train", "Path", "CheXpert-v1.0/train/patient/study1/x.jpg", "like CheXpert-v1.0/"),
        ("train", "Path", "CheXpert-v1.0/train/patient00007/x.jpg", "like CheXpert-v1.0/"),
        ("metadata", "subject_id", "p10000032", "a whole number"),
        ("chexpert", "Pneumothorax", " 1", "1, 0, -1 or blank"),
        ("split", "split", "validation", "one of train, validate, test"),
        ("nih", "Patient ID", "one", "a whole number"),
        ("nih", "Finding Labels", "Mass|Tumour", "No Finding, or some of these joined by |"),
        ("nih", "Finding Labels", "", "No Finding, or some of these joined by |"),
    ],
)
def test_unknown_texts(trees, capfd, table, column, text, must):
    trees.write_nih(NIH_TRAIN, NIH_TEST)
    path, name = trees.tables[table], {"train": "chexpert", "nih": "nih"}.get(table, "mimic")
    header, rows = table_rows(path)
    fields = rows[2].split(",")
    fields[header.split(",").index(column)] = text
    write(path, lines(header, [*rows[:2], ",".join(fields), *rows[3:]]))
    assert data.main(["info", name, "--data-dir", str(trees.root)]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {path}, line 4: {column} {text!r} must be {must}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name, table, known",
    [
        ("chexpert", "train", "AP, L, LL, PA, RL"),
        ("mimic", "metadata", "AP, LATERAL, LL, PA"),
        ("nih", "nih", "AP, PA"),
        # The real table's word for it, AP_horizontal, is no view of its own.
        ("padchest", "padchest", "AP, AP Supine, COSTAL, L, PA"),
    ],
)
def test_unknown_views(trees, name, table, known):
    trees.write_nih(NIH_TRAIN, NIH_TEST)
    trees.write_padchest([padchest_row("1.png", projection="AP_horizontal")])
    for views in (["PA", "AXIAL"], ["pa"], ["P"], ["AP_horizontal"], []):
        words = trees.tables[table], f"--views {views}", f"known: {known}"
        refuses(ValueError, partial(trees.load, name, views=views), *words)


def test_a_listed_image_is_missing(trees):
    """Those of other views and splits need not be there."""
    for row in CHEXPERT_TRAIN[3], CHEXPERT_TRAIN[6], *CHEXPERT_VALID:
        (trees.chexpert / row.split(",")[0]).unlink()
    for row in MIMIC_ROWS[2], MIMIC_ROWS[5], MIMIC_ROWS[8]:
        trees.mimic_image(*row[:3]).unlink()
    whole = trees.load("chexpert+mimic")
    for i in (8, 9):
        Path(whole.where(i)).unlink()
    words = whole.where(8), "2 such", "fetch it", "remove it from the list"
    refuses(FileNotFoundError, partial(trees.load, "chexpert+mimic"), *words)
    dataset = trees.load("chexpert+mimic", verify=False)
    np.testing.assert_array_equal(dataset.labels, whole.labels)
    refuses(FileNotFoundError, partial(dataset.read, 8), whole.where(8))
    (trees.chexpert / "train").rename(trees.chexpert / "elsewhere")
    refuses(FileNotFoundError, partial(trees.load, "chexpert"), whole.where(0), "6 such")


@pytest.mark.parametrize("name", ["chexpert", "mimic", "nih", "padchest", "covidx", "tuberculosis"])
def test_missing_datasets(tmp_path, name):
    refuses(
        FileNotFoundError, partial(load_dataset, name, tmp_path), f"no {tmp_path}", "--data-dir"
    )


# NIH ChestX-ray14


def test_nih(chests):
    train, test = chests.load(), chests.load("test")
    for dataset in (train, test):
        assert_xrays(dataset, "nih", NIH_CLASSES)
    assert train.groups.tolist() == [1, 1, 3] and test.groups.tolist() == [2]
    # The rows' order, not the list's: Cardiomegaly 1, Effusion 4; nothing; 0, 11, 13.
    assert [np.flatnonzero(row).tolist() for row in train.labels] == [[1, 4], [], [0, 11, 13]]
    assert np.flatnonzero(test.labels[0]).tolist() == [7]
    assert set(np.unique(train.labels)) == {0, 1}
    grey, deep, rgba = (chests.pixels[f"0000000{n}.png"] for n in ("1_000", "1_001", "3_000"))
    for i, expected in enumerate((grey, (deep.astype(int) + 128) // 257, luma(rgba))):
        image = train.read(i)
        assert image.dtype == torch.uint8 and image.shape == (1, 9, 8)
        np.testing.assert_array_equal(image[0], expected)
    image, label = test[0]
    np.testing.assert_array_equal(image[0], chests.pixels["00000002_000.png"])
    assert label.dtype == torch.float32 and label.tolist() == test.labels[0].tolist()
    refuses(ValueError, partial(chests.load, download=True), "nih", "download", "views")


def test_nih_refuses_lists(chests):
    for listed, words in (
        ("1_000 9_000", [chests.train, "00000009_000.png", "no row", chests.table]),
        ("1_000 2_000", [chests.train, "00000002_000.png", chests.test]),  # which is a test image
        ("1_000 1_000", ["00000001_000.png", "more than once"]),
    ):
        chests.train.write_text("".join(f"0000000{image}.png\n" for image in listed.split()))
        refuses(ValueError, chests.load, *words)
    chests.train.write_text("00000004_000.png\n")
    refuses(FileNotFoundError, chests.load, chests.folder / "images" / "00000004_000.png", "1 such")
    chests.write_table(NIH_HEADER, *NIH_ROWS, NIH_ROWS[0])
    refuses(ValueError, chests.load, chests.table, "00000001_000.png", "more than once")


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
        kept = [name for name in rows if name in listed]
        marked = {name: set(rows[name]["Finding Labels"].split("|")) for name in kept}
        assert found(dataset) == {name: marks - {"No Finding"} for name, marks in marked.items()}
        assert dataset.groups.tolist() == [int(rows[name]["Patient ID"]) for name in kept]
        for i in range(0, len(kept), 10 if size == 256 else 5):
            expected = pixels_of(folder / "images" / kept[i], "L")
            assert expected.shape == (1, size, size)
            np.testing.assert_array_equal(dataset.read(i), expected)


NIH_TRAIN = [  # (name, findings, patient, view)
    ("00000001_000.png", "Cardiomegaly|Emphysema", 1, "PA"),
    ("00000001_001.png", "No Finding", 1, "AP"),
    ("00000005_000.png", "Hernia", 5, "PA"),
    ("00000006_000.png", "Mass", 6, "AP"),
    ("00000006_001.png", "Pneumothorax", 6, "PA"),
]
NIH_TEST = [
    ("00000003_000.png", "Edema|Mass", 3, "PA"),
    ("00000003_001.png", "Atelectasis", 3, "PA"),
    ("00000004_000.png", "No Finding", 4, "PA"),
]


@pytest.mark.parametrize(
    "views, kept, dropped",
    [(None, [0, 1, 2, 3, 4], 0), (["PA"], [0, 2, 4], 2), (("AP",), [1, 3], 3)]
    + [(["AP", "PA"], [0, 1, 2, 3, 4], 0)],
)
def test_nih_views(tmp_path, views, kept, dropped):
    trees = Trees(tmp_path)
    trees.write_nih(NIH_TRAIN, NIH_TEST)
    dataset = trees.load("nih", **({"views": views} if views else {}))
    rows = [NIH_TRAIN[i] for i in kept]
    assert dataset.groups.tolist() == [number for _, _, number, _ in rows]
    marked = {name: set(findings.split("|")) - {"No Finding"} for name, findings, _, _ in rows}
    assert found(dataset) == marked
    assert dataset.options == ({"views": list(views)} if views else {})
    # Those of the other split are not counted.
    other = {f"views other than {', '.join(views)}": dropped} if views else {}
    assert dataset.dropped == other


# PadChest

STUDY_VIEWS = ["PA", "AP", "AP Supine", "L", "COSTAL"]


def padchest_row(name, number=0, projection="PA", labels="['normal']", **others):
    # 36 digits, of which floating point and 64 bits would lose the last ones.
    patient = f"8398604886942923316379882356814609{number:02d}"
    row = {"ImageID": name, "PatientID": patient, "Projection": projection, "Labels": labels}
    return row | others


LABELS = [
    ("['normal']", set()),
    ("['cardiomegaly', 'pleural effusion']", {"Cardiomegaly", "Effusion"}),
    ("['pacemaker', 'chronic changes']", {"Support Devices"}),
    ("['COPD signs', 'air bronchogram']", {"Consolidation", "Infiltration"}),
    ("['scoliosis']", {"Scoliosis"}),
]


class PadChest(Trees):
    """48 images of 24 patients, 4 of them dropped, and 30 broken ones of 30 other patients.

    rows: the table. kept: rows that the study keeps, in the table's order. found: {name: classes}.
    pixels: {name: array}; what is dropped has no file.
    """

    def __init__(self, root):
        super().__init__(root)
        images = [(number, i) for number in range(24) for i in range(1 + number % 3)]
        self.kept, self.found, dropped = [], {}, []
        for k, (number, i) in enumerate(images):
            name = f"2168401113669640129593565638620090411227{k:05d}_00-155-{k:03d}.png"
            labels, classes = LABELS[k % len(LABELS)]
            projection = ["PA", "L", "AP_horizontal", "AP", "COSTAL", "AP Supine"][k % 6]
            # The last image of patients 2, 5, 8 and 11, who have others.
            changes = {2: ("UNK", labels), 5: ("NA", ""), 8: ("UNK", labels), 11: ("PA", "nan")}
            if i == 2 and number in changes:
                dropped.append(padchest_row(name, number, *changes[number]))
                continue
            folder = str(k % 3 * 27)  # 0, 27 and 54
            self.kept.append(padchest_row(name, number, projection, labels, ImageDir=folder))
            self.found[name] = classes
        dropped += [padchest_row(name, 40 + k) for k, name in enumerate(BROKEN)]
        dropped[-1] |= {"Projection": "EXCLUDE"}
        dropped[-2] |= {"Labels": ""}
        self.rows = self.kept + dropped
        random.Random(0).shuffle(self.rows)
        self.kept = [row for row in self.rows if row in self.kept]
        self.write_padchest(self.rows)
        self.pixels = {}
        for k, row in enumerate(self.kept):
            self.pixels[row["ImageID"]] = self.noise(4 + k % 2, 6, dtype=np.uint16)
            save(self.padchest / row["ImageDir"] / row["ImageID"], self.pixels[row["ImageID"]])

    def both(self, **options):
        return [self.load("padchest", split, **options) for split in ("train", "test")]

    def study_split(self, kept=None):
        """(train rows, test rows) of the study."""
        kept = self.kept if kept is None else kept
        order, count = study_order(len(kept)), int(0.9 * len(kept))
        return [kept[i] for i in order[:count]], [kept[i] for i in order[count:]]


def column(rows, name="ImageID"):
    return [row[name] for row in rows]


def groups(dataset):
    return [group.decode() for group in dataset.groups]


@pytest.fixture(scope="module")
def padchest(tmp_path_factory):
    return PadChest(tmp_path_factory.mktemp("padchest"))


@pytest.mark.parametrize("split_by", ["patient", "image"])
def test_padchest(padchest, split_by):
    """Labels, groups and pixels are those of the file, whichever side it is on."""
    facts = {row["ImageID"]: row for row in padchest.kept}
    train, test = padchest.both(split_by=split_by)
    assert found(train) | found(test) == padchest.found and len(train) + len(test) == 44
    for dataset in (train, test):
        assert_xrays(dataset, "padchest", PADCHEST_CLASSES)
        assert set(np.unique(dataset.labels)) == {0, 1}
        assert groups(dataset) == [facts[name]["PatientID"] for name in names(dataset)]
        assert dataset.options == {"views": STUDY_VIEWS, "split_by": split_by}
        # An image that is left out for two reasons counts for the first.
        dropped = {f"views other than {', '.join(STUDY_VIEWS)}": 4, "no labels": 2}
        assert dataset.dropped == dropped | {"known broken": 28}
        for i, name in enumerate(names(dataset)):
            assert dataset.where(i) == str(padchest.padchest / facts[name]["ImageDir"] / name)
            deep = padchest.pixels[name].astype(int)
            np.testing.assert_array_equal(dataset.read(i), [(deep + 128) // 257])


# A text as the real table has it, and the classes it names.


# A text as the real table has it, and the classes it names.
TEXTS = {
    **{f"['{cls.lower()}']": {cls} for cls in PADCHEST_CLASSES},
    # Synonyms, and names within longer ones.
    "['consolidation']": {"Consolidation", "Infiltration"},
    "['air bronchogram']": {"Consolidation", "Infiltration"},
    **dict.fromkeys(
        [
            f"['{text}']"
            for text in "infiltrates,interstitial pattern,ground glass pattern,alveolar pattern,"
            "reticular interstitial pattern,reticulonodular interstitial pattern".split(",")
        ],
        {"Infiltration"},
    ),
    "['apical pleural thickening']": {"Pleural_Thickening"},
    "['calcified mediastinal adenopathy']": {"Hilar Enlargement"},
    "['pulmonary artery enlargement']": {"Hilar Enlargement"},
    "['electrical device']": {"Support Devices"},
    "['pacemaker']": {"Support Devices"},
    "['hydropneumothorax', 'pseudonodule']": {"Pneumothorax", "Nodule"},
    # What only looks like them.
    "['fissure thickening', 'fibrotic band', 'hilar congestion', 'mastectomy']": set(),
    "['air', 'trapping', 'infiltrate', 'mediastinal enlargement', 'Scoliosis']": set(),
    "[]": set(),
}


def test_padchest_findings_by_text(tmp_path):
    trees, marked = Trees(tmp_path), {}
    trees.write_padchest([padchest_row(f"{k}.png", k, labels=x) for k, x in enumerate(TEXTS)])
    for split in ("train", "test"):
        marked |= found(trees.load("padchest", split, verify=False))
    assert {text: marked[f"{k}.png"] for k, text in enumerate(TEXTS)} == TEXTS


def test_padchest_splits_are_the_studys_shuffles(padchest):
    known = sorted(set(column(padchest.kept, "PatientID")))
    train = {known[i] for i in study_order(24)[:21]}  # int(0.9 x 24)
    for dataset, inside in zip(padchest.both(), (True, False)):
        expected = [row for row in padchest.kept if (row["PatientID"] in train) == inside]
        assert names(dataset) == column(expected)  # the table's order
    parts = padchest.study_split()
    assert [len(part) for part in parts] == [39, 5]  # int(39.6)
    for dataset, part in zip(padchest.both(split_by="image"), parts):
        assert names(dataset) == column(part)  # in the shuffled order


def test_padchest_at_its_real_size(tmp_path):
    """The counts of the real table, and its images, as pandas finds them by the study's rule."""
    rng, trees, count = random.Random(0), Trees(tmp_path), 160_861
    texts = rng.choices([*TEXTS], k=count)
    projections = rng.choices(["PA", "L", "AP_horizontal", "AP", "COSTAL", "AP Supine"], k=count)
    rows = [
        padchest_row(f"{k}.png", 0, *about) | {"PatientID": f"{10**35 + k % 67_000}"}
        for k, about in enumerate(zip(projections, texts))
    ]
    special = rng.sample(rows, 19 + 103 + 30)
    for row in special[:19]:
        row["Projection"] = "UNK"
    for row in special[19:122]:
        row["Labels"] = "nan"
    for row, name in zip(special[122:], BROKEN, strict=True):
        row["ImageID"] = name
    trees.write_padchest(rows)

    frame = pandas.read_csv(trees.tables["padchest"], dtype={"PatientID": str})
    frame["Projection"] = frame["Projection"].replace("AP_horizontal", "AP Supine")
    frame = frame[frame["Projection"].isin(STUDY_VIEWS)].dropna(subset="Labels")
    frame = frame[~frame["ImageID"].isin(BROKEN)].iloc[study_order(160_709)]
    for split, part in (("train", frame[:144_638]), ("test", frame[144_638:])):
        dataset = trees.load("padchest", split, split_by="image", verify=False)
        assert names(dataset) == part["ImageID"].tolist()
        assert groups(dataset) == part["PatientID"].tolist()
        assert list(dataset.dropped.values()) == [19, 103, 30]
        classes = part["Labels"].map(TEXTS)
        assert dataset.labels.sum(1).tolist() == classes.map(len).tolist()
        single = data.keep_single_label(dataset)
        expected = collections.Counter(cls for own in classes if len(own) == 1 for cls in own)
        assert collections.Counter(single.classes[label] for label in single.labels) == expected
        assert "Consolidation" not in expected and len(expected) == 26


def test_padchest_broken_names():
    """Those of the study's list, by its digest."""
    digest = hashlib.sha256("\n".join(sorted(BROKEN)).encode()).hexdigest()
    assert digest.startswith("71e423efdf4a9501f75ec4ef") and len(set(BROKEN)) == 30


@pytest.mark.parametrize(
    "views, projections",
    [
        (["PA"], {"PA"}),
        (["AP Supine"], {"AP Supine", "AP_horizontal"}),
        (["L", "AP"], {"AP", "L"}),
        (["COSTAL", "UNK"], {"COSTAL", "UNK"}),
    ],
)
def test_padchest_views(padchest, views, projections):
    kept = [row for row in padchest.rows if row["Projection"] in projections]
    other = len(padchest.rows) - len(kept)
    kept = [
        row for row in kept if row["Labels"] not in ("", "nan") and row["ImageID"] not in BROKEN
    ]
    assert 6 < len(kept) < 20
    # The positions that are shuffled are those of the rows that are left.
    parts = padchest.study_split(kept)
    for dataset, part in zip(padchest.both(views=views, split_by="image", verify=False), parts):
        assert names(dataset) == column(part) and dataset.options["views"] == views
        assert list(dataset.dropped.items())[0] == (f"views other than {', '.join(views)}", other)


def test_padchest_small_tables(tmp_path):
    trees = Trees(tmp_path)
    call, table = partial(trees.load, "padchest", verify=False), trees.tables["padchest"]
    trees.write_padchest([padchest_row("3.png"), padchest_row("3.png", labelCUIS="")])
    refuses(ValueError, call, table, "3.png", "more than once")
    refuses(ValueError, partial(call, split_by="study"), "--split-by study", "patient or image")
    # One patient, of whom int(0.9 x 1) train; images beside the table, with ImageDir or without.
    for header in (PADCHEST_HEADER, [c for c in PADCHEST_HEADER if c != "ImageDir"]):
        trees.write_padchest([padchest_row("0.png"), padchest_row("1.png", labels="")], header)
        refuses(ValueError, call, "padchest", "no image of the train split", "split_by")
        assert call("test").where(0) == str(trees.padchest / "0.png")


# COVIDx

COVIDX_TRAIN = (
    "379 1e64990d1b40c1758a2aaa9c7f7a85_jumbo.jpeg negative cohen",
    "ANON 34 0034.jpg positive actmed",
    "",
    "379 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.PNG negative cohen",
    "sub-S03047 sub-S03047_ses-E06244_run-1.png positive bimcv",
    "positive negative.png\tpositive  sirm",
)
COVIDX_TEST = ("MIDRC-RICORD-1C-419639-000082 0034.jpg positive ricord", "7 7.png negative rsna")


@pytest.fixture
def covidx(tmp_path):
    """(its folder, load)."""
    folder = tmp_path / "COVIDx-CXR2"
    for split, rows in (("train", COVIDX_TRAIN), ("test", COVIDX_TEST)):
        write(folder / f"{split}.txt", "\n".join(rows) + "\n")
        for seed, line in enumerate(filter(None, rows)):
            save(folder / split / line.split()[-3], noise(np.random.default_rng(seed), 8, 9))
    return folder, partial(load_dataset, "covidx", tmp_path)


def test_covidx(covidx):
    folder, load = covidx
    train, test = load(), load(split="test")
    for split, dataset in (("train", train), ("test", test)):
        assert_xrays(dataset, "covidx", ("negative", "positive"), "multiclass")
        assert dataset.options == {}
        # A name that is in both lists is a file of its own in each folder.
        assert files(dataset, folder / split) == names(dataset)
        assert_grey(dataset)
    assert names(train) == [line.split()[-3] for line in COVIDX_TRAIN if line]
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert groups(train) == ["379", "ANON 34", "379", "sub-S03047", "positive"]
    assert names(test) == ["0034.jpg", "7.png"] and test.labels.tolist() == [1, 0]
    assert groups(test) == ["MIDRC-RICORD-1C-419639-000082", "7"]
    image, label = test[1]
    assert image.shape == (1, 8, 9) and label.dtype == torch.int64 and label == 0


@pytest.mark.parametrize(
    "row", ["379 x.png COVID-19 cohen", "379 x.png 1 cohen", "x.png positive c"]
)
def test_covidx_refuses(covidx, row):
    folder, load = covidx
    write(folder / "test.txt", "\n".join([COVIDX_TRAIN[0], "", row]))
    refuses(ValueError, partial(load, split="test"), f"{folder}/test.txt, line 3", row, "positive")
    write(folder / "train.txt", "\n".join([*COVIDX_TRAIN, "9 0034.jpg negative cohen"]))
    refuses(ValueError, load, folder / "train.txt", "0034.jpg", "more than once")


# Tuberculosis

SHENZHEN = "Tuberculosis_dataset/ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png"
MONTGOMERY = "Tuberculosis_dataset/Montgomery/MontgomerySet/CXR_png"


# In the real sets, too, all normal images come before the others.
LUNGS = {
    SHENZHEN: [f"CHNCXR_{k:04d}_{int(k > 20)}.png" for k in range(1, 35)],
    MONTGOMERY: [f"MCUCXR_{k:04d}_{int(k > 8)}.png" for k in range(1, 14)],
}


@pytest.fixture
def lungs(tmp_path):
    """(root, load, {split: files}): 34 and 13 images, of which int(28.9) and int(11.05) train."""
    expected = {"train": [], "test": []}
    for (part, files), count in zip(LUNGS.items(), (28, 11)):
        # A directory lists its files in no order: they are not written in the sorted one.
        for name in sorted(files, key=lambda name: name[::-1]):
            grey = int(name[7:11]) + 100 * (part == MONTGOMERY)
            save(tmp_path / part / name, np.full((3, 4), grey, np.uint8))
        order = [f"{part}/{files[i]}" for i in study_order(len(files))]
        expected["train"] += order[:count]
        expected["test"] += order[count:]
    return tmp_path, partial(load_dataset, "tuberculosis", tmp_path), expected


def test_tuberculosis(lungs):
    root, load, expected = lungs
    for split, paths in expected.items():
        dataset = load(split=split)
        assert_xrays(dataset, "tuberculosis", ("normal", "tuberculosis"), "multiclass")
        assert files(dataset, root) == paths and dataset.groups is None and dataset.options == {}
        assert dataset.labels.tolist() == [int(path[-5]) for path in paths]
        for i, path in enumerate(paths):
            grey = int(path[-10:-6]) + 100 * path.startswith(MONTGOMERY)
            assert dataset.read(i).shape == (1, 3, 4) and dataset.read(i).unique().tolist() == [
                grey
            ]


@pytest.mark.parametrize("part", LUNGS)
def test_tuberculosis_other_files(lungs, part):
    """An archive that macOS unpacks has a hidden ._NAME beside each file."""
    root, load, expected = lungs
    for other in ("Thumbs.db", f"._{LUNGS[part][0]}"):
        write(root / part / other, "no image")
    assert files(load(), root) == expected["train"]
    save(root / part / "CHNCXR_0001_0_mask.png", np.zeros((2, 2), np.uint8))
    refuses(ValueError, load, root / part / "CHNCXR_0001_0_mask.png", "_0", "_1")
    for file in (root / part).iterdir():
        file.unlink()
    refuses(ValueError, load, root / part, "no .png")
