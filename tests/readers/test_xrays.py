"""The X-ray datasets in their official layouts; labels, orders and splits are typed by hand.

What the study drew is computed with numpy's RandomState, which it used.
"""

import collections
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
from trees import MIMIC_ROWS, Trees, lines, marks, names, noise, places, read, replaced, save, write

import data
from data import load_dataset
from readers.xrays import CHEXPERT_CLASSES, NIH_CLASSES, PADCHEST_CLASSES, VIEWS
from readers.xrays import PADCHEST_BROKEN as BROKEN


def files(dataset, folder):
    """The images' paths below a folder."""
    return [place.removeprefix(f"{folder}/") for place in places(dataset)]


def groups(dataset):
    return [group.decode() for group in dataset.groups]


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


@pytest.mark.parametrize(
    "listed, count, digest",
    [
        (CHEXPERT_CLASSES, 13, "60584c80aec4b1ae86ac6eae"),
        (NIH_CLASSES, 14, "2545c8291c3d85b0f792bbd7"),
        (PADCHEST_CLASSES, 27, "bb860c4bc1dbdf81df532d80"),
        (sorted(BROKEN), 30, "71e423efdf4a9501f75ec4ef"),
    ],
)
def test_names_are_those_of_the_study(listed, count, digest):
    """By the digests of its own lists."""
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest().startswith(digest)
    assert len(set(listed)) == count


# CheXpert

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
def test_chexpert(trees, release):
    """The table of either release lists the images in the one directory."""
    trees.write_chexpert("train", CHEXPERT_TRAIN, release)
    path = trees.chexpert / "train/patient00003/study1/view1_frontal.jpg"
    save(path, trees.noise(10, 12, 3))
    dataset = trees.load("chexpert")
    assert_xrays(dataset, "chexpert", CHEXPERT_CLASSES)
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
    test = trees.load("chexpert", "test")
    kept = [CHEXPERT_VALID[i].split(",")[0] for i in (0, 2)]
    assert files(test, trees.chexpert) == kept and test.groups.tolist() == [64542, 64541]
    np.testing.assert_array_equal(test.labels, marks("0000100110000", "0000000000000"))


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
    dataset = trees.load("chexpert", uncertain=uncertain, blank=blank)
    np.testing.assert_array_equal(dataset.labels[[1, 4, 5]], marks(*expected))
    assert not dataset.labels[[0, 3]].any()
    chosen = {"uncertain": uncertain, "blank": blank}
    chosen = {key: value for key, value in chosen.items() if value != "ignore"}
    assert dataset.options == {"views": ["PA", "AP"]} | chosen
    usual, dataset = trees.load("mimic"), trees.load("mimic", uncertain=uncertain, blank=blank)
    assert dataset.options == {"views": ["PA", "AP"]} | chosen
    known = ~np.isnan(usual.labels)
    np.testing.assert_array_equal(dataset.labels[known], usual.labels[known])
    assert np.isnan(dataset.labels).sum() < np.isnan(usual.labels).sum()


def test_chexpert_test(trees, tmp_path):
    header = ",".join(["Study", "No Finding", *CHEXPERT_CLASSES])
    header = header.replace("Effusion", "Pleural Effusion")
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
    assert_xrays(dataset, "chexpert-test", CHEXPERT_CLASSES)
    study2 = "test/patient64740/study2/view1_frontal.jpg"
    kept = [f"{study}/view1_frontal.jpg", f"{study}/view2_frontal.jpg", study2]
    assert files(dataset, trees.chexpert) == kept
    expected = marks("1000000000001", "1000000000001", "0000000000000")
    np.testing.assert_array_equal(dataset.labels, expected)
    assert dataset.groups.tolist() == [64741, 64741, 64740]
    refuses(ValueError, lambda: trees.load("chexpert-test"), "test images alone", "--eval-only")
    args = Namespace(method="eval", data_dir=tmp_path)
    assert [len(part) for part in data.open_splits("chexpert-test", args)] == [3, 3]
    table.rename(trees.chexpert / "test/groundtruth.csv")  # it may lie there too
    assert len(call()) == 3
    write(table, lines(header, [*rows, rows[0]]))
    refuses(ValueError, call, "groundtruth.csv, line 4", "more than once")
    write(table, lines(header, [rows[0].replace("0.0", "-1", 1)]))
    refuses(ValueError, call, "line 2: No Finding '-1' must be one of 0")


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
    [("1", 1), ("1.0", 1), ("0", 0), ("0.0", 0)]
    + [(t, np.nan) for t in ("", "nan", "N/A", "-1", "-1.0")],
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

MIMIC_MARKS = marks("0..1....10...", "0000000000000", "0000000000000", "0..1....10...")


def table_rows(path):
    """(header, [rows]) as texts."""
    header, *rows = read(path).splitlines()
    return header, rows


@pytest.mark.parametrize("order", [1, -1])
def test_mimic(trees, order):
    """The metadata's order is the images'; the orders of the two other tables mean nothing."""
    if order == -1:
        for part in ("metadata", "split", "chexpert"):
            header, rows = table_rows(trees.tables[part])
            rows = rows[::-1] if part == "metadata" else rows[3:] + rows[:3]
            trees.tables[part].unlink()  # as whoever has unpacked it
            write(trees.tables[part].with_suffix(""), lines(header, rows))
    folder = trees.mimic / "files"
    every = [str(trees.mimic_image(*row[:3]).relative_to(folder)) for row in MIMIC_ROWS]
    assert every[0] == f"p10/p10000032/s53911762/{MIMIC_ROWS[0][0]}.jpg"
    save(folder / every[3], trees.noise(10, 12, 3))
    dataset = trees.load("mimic")
    assert_xrays(dataset, "mimic", CHEXPERT_CLASSES)
    assert files(dataset, folder) == [every[i] for i in (0, 1, 3, 4)][::order]
    np.testing.assert_array_equal(dataset.labels, MIMIC_MARKS[::order])
    assert dataset.groups.tolist() == [10000032, 10000032, 19999733, 10000032][::order]
    assert dataset.options == {"views": ["PA", "AP"]}
    left_out = {"views other than PA, AP": 2, "studies without labels": 1, DEVICES: 1}
    assert dataset.dropped == left_out
    assert_grey(dataset)
    test = trees.load("mimic", "test")  # its validate split
    assert files(test, folder) == [every[i] for i in (5, 10)][::order]
    expected = marks("..1..........", "...0.......1.")
    np.testing.assert_array_equal(test.labels, expected[::order])
    assert test.groups.tolist() == [10000764, 10000980][::order]
    assert list(test.dropped.values()) == [1, 0, 0]


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
    if part == "chexpert":
        write(trees.tables[part], lines(header, [rows[3].replace("10000032", "10000033")]))
        words = trees.tables[part], "study 50414267 is of another subject", "fetch both"
        refuses(ValueError, call, *words)


# Texts and images that are none


@pytest.mark.parametrize(
    "table, column, text, must",
    [
        ("train", "Frontal/Lateral", "frontal", "one of Frontal, Lateral"),
        ("train", "AP/PA", "P" * 256, "UTF-8 of less than 256 bytes"),
        ("train", "No Finding", "2", "1, 0, -1 or blank"),
        ("train", "Support Devices", "inf", "1, 0, -1 or blank"),
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
    write(path, replaced(column, text, read(path)))
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
    call = partial(load_dataset, name, tmp_path)
    refuses(FileNotFoundError, call, f"no {tmp_path}", "--data-dir")


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
    assert_grey(train)  # of which one has 16 bits, one colours
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
    text = read(chests.table)
    write(chests.table, text + text.splitlines()[1])
    refuses(ValueError, chests.load, chests.table, "00000001_000.png", "more than once")


@pytest.mark.parametrize("size, train, test", [(256, 558, 129), (1024, 30, 8)])
def test_nih_real(tmp_path, real_data, size, train, test):
    folder = real_data / f"nih-{size}"
    (tmp_path / "NIH-ChestXRay-14").symlink_to(folder)
    frame = pandas.read_csv(folder / "Data_Entry_2017_v2020.csv", index_col="Image Index")
    sets = [load_dataset("nih", tmp_path, split) for split in ("train", "test")]
    assert [len(dataset) for dataset in sets] == [train, test]
    assert not set(sets[0].groups) & set(sets[1].groups)
    for dataset, file in zip(sets, ("train_val_list.txt", "test_list.txt")):
        kept = frame[frame.index.isin((folder / file).read_text().split())]
        marked = kept["Finding Labels"].map(lambda text: set(text.split("|")) - {"No Finding"})
        assert found(dataset) == marked.to_dict()
        assert dataset.groups.tolist() == kept["Patient ID"].tolist()
        some = dataset.subset(range(0, len(kept), 10 if size == 256 else 5))
        assert {tuple(some.read(i).shape) for i in range(len(some))} == {(1, size, size)}
        assert_grey(some)


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
    "views, kept",
    [(None, range(5)), (["PA"], [0, 2, 4]), (("AP",), [1, 3]), (["AP", "PA"], range(5))],
)
def test_nih_views(tmp_path, views, kept, monkeypatch):
    trees = Trees(tmp_path)
    trees.write_nih(NIH_TRAIN, NIH_TEST)
    dataset = trees.load("nih", **({"views": views} if views else {}))
    rows = [NIH_TRAIN[i] for i in kept]
    assert dataset.groups.tolist() == [number for _, _, number, _ in rows]
    marked = {name: set(findings.split("|")) - {"No Finding"} for name, findings, _, _ in rows}
    assert found(dataset) == marked
    assert dataset.options == ({"views": list(views)} if views else {})
    # Those of the other split are not counted.
    other = {f"views other than {', '.join(views)}": 5 - len(kept)} if views else {}
    assert dataset.dropped == other
    monkeypatch.delitem(VIEWS, "nih")  # a dataset of one's own needs no row there
    again = trees.load("nih", **dataset.options)
    assert again.groups.tolist() == dataset.groups.tolist()


# PadChest

STUDY_VIEWS = ["PA", "AP", "AP Supine", "L", "COSTAL"]


def padchest_row(name, number=0, projection="PA", labels="['normal']", **others):
    # 36 digits, of which floating point and 64 bits would lose the last ones.
    patient = f"8398604886942923316379882356814609{number:02d}"
    row = {"ImageID": name, "PatientID": patient, "Projection": projection, "Labels": labels}
    return row | others


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


def padchest_table(root, count):
    """Trees with a table of so many rows, some of which the study leaves out; no images."""
    rng, trees = random.Random(0), Trees(root)
    texts = rng.choices([*TEXTS], k=count)
    projections = rng.choices(["PA", "L", "AP_horizontal", "AP", "COSTAL", "AP Supine"], k=count)
    rows = [
        padchest_row(f"{k}.png", 0, *about) | {"PatientID": f"{10**35 + k % (count * 5 // 12)}"}
        for k, about in enumerate(zip(projections, texts))
    ]
    special = rng.sample(rows, 19 + 103 + 30)
    for row in special[:19]:
        row["Projection"] = "UNK"
    for k, row in enumerate(special[19:122]):
        row["Labels"] = ("nan", "")[k % 2]
    for row, name in zip(special[122:], BROKEN, strict=True):
        row["ImageID"] = name
    special[0]["Labels"] = special[-1]["Labels"] = "nan"  # left out for two reasons
    trees.write_padchest(rows)
    return trees


def padchest_splits(trees, views, split_by):
    """({split: its rows as the study draws them}, {why: rows left out}), by pandas."""
    frame = pandas.read_csv(trees.tables["padchest"], dtype={"PatientID": str})
    frame["Projection"] = frame["Projection"].replace("AP_horizontal", "AP Supine")
    seen = frame[frame["Projection"].isin(views)]
    labelled = seen.dropna(subset="Labels")
    kept = labelled[~labelled["ImageID"].isin(BROKEN)]
    counts = -np.diff([len(part) for part in (frame, seen, labelled, kept)])
    reasons = f"views other than {', '.join(views)}", "no labels", "known broken"
    if split_by == "image":
        kept = kept.iloc[study_order(len(kept))]
        train = np.arange(len(kept)) < int(0.9 * len(kept))
    else:
        patients = np.array(sorted(set(kept["PatientID"])))
        drawn = study_order(len(patients))[: int(0.9 * len(patients))]
        train = kept["PatientID"].isin(patients[drawn])  # in the table's order
    return {"train": kept[train], "test": kept[~train]}, dict(zip(reasons, counts.tolist()))


@pytest.mark.parametrize(
    "count, views, split_by",
    [
        (160_861, STUDY_VIEWS, "image"),  # as the real table
        (600, STUDY_VIEWS, "patient"),
        (600, ["PA"], "image"),
        (600, ["AP Supine"], "patient"),
        (600, ["L", "AP"], "image"),
        (600, ["COSTAL", "UNK"], "image"),
    ],
)
def test_padchest_rows(tmp_path, count, views, split_by):
    """Images, labels and patients are those that pandas finds by the study's rule."""
    trees = padchest_table(tmp_path, count)
    parts, dropped = padchest_splits(trees, views, split_by)
    for split, part in parts.items():
        options = {"views": views, "split_by": split_by}
        dataset = trees.load("padchest", split, verify=False, **options)
        assert_xrays(dataset, "padchest", PADCHEST_CLASSES)
        assert names(dataset) == part["ImageID"].tolist()
        assert groups(dataset) == part["PatientID"].tolist()
        assert (dataset.options, dataset.dropped) == (options, dropped)
        classes = part["Labels"].map(TEXTS)
        assert [*found(dataset).values()] == classes.tolist()
        assert set(np.unique(dataset.labels)) == {0, 1}
        single = data.keep_single_label(dataset)
        expected = collections.Counter(cls for own in classes if len(own) == 1 for cls in own)
        assert collections.Counter(single.classes[label] for label in single.labels) == expected
        if count == 160_861:
            assert len(part) == {"train": 144_638, "test": 16_071}[split]
            assert "Consolidation" not in expected and len(expected) == 26
            assert [*dropped.values()] == [19, 104, 29]


def test_padchest_images(tmp_path):
    """16-bit ones, in the folders that ImageDir names; what is left out has no file."""
    trees = Trees(tmp_path)
    rows = [padchest_row(f"{k}.png", k // 2, ImageDir=f"{k % 3 * 27}") for k in range(12)]
    trees.write_padchest([*rows, padchest_row("12.png", 0, "UNK"), padchest_row(BROKEN[0])])
    pixels = [trees.noise(4 + k % 2, 6, dtype=np.uint16) for k in range(12)]
    for row, deep in zip(rows, pixels):
        save(trees.padchest / row["ImageDir"] / row["ImageID"], deep)
    train, test = trees.load("padchest"), trees.load("padchest", "test")
    assert (len(train), len(test)) == (10, 2) and not {*groups(train)} & {*groups(test)}
    for dataset in (train, test):
        assert dataset.options == {"views": STUDY_VIEWS, "split_by": "patient"}
        for i, name in enumerate(names(dataset)):
            k = int(Path(name).stem)
            assert dataset.where(i) == str(trees.padchest / rows[k]["ImageDir"] / name)
            np.testing.assert_array_equal(dataset.read(i), [(pixels[k].astype(int) + 128) // 257])


def test_padchest_small_tables(tmp_path):
    trees = Trees(tmp_path)
    call, table = partial(trees.load, "padchest", verify=False), trees.tables["padchest"]
    trees.write_padchest([padchest_row("3.png"), padchest_row("3.png", labelCUIS="")])
    refuses(ValueError, call, table, "3.png", "more than once")
    refuses(ValueError, partial(call, split_by="study"), "--split-by study", "patient or image")
    # One patient, of whom int(0.9 x 1) train; images beside the table, with ImageDir or without.
    for absent in ([], ["ImageDir"]):
        trees.write_padchest([padchest_row("0.png"), padchest_row("1.png", labels="")])
        pandas.read_csv(table, dtype=str).drop(columns=absent).to_csv(table, index=False)
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


def test_covidx(tmp_path, rng):
    folder, load = tmp_path / "COVIDx-CXR2", partial(load_dataset, "covidx", tmp_path)
    for split, rows in (("train", COVIDX_TRAIN), ("test", COVIDX_TEST)):
        write(folder / f"{split}.txt", "\n".join(rows) + "\n")
        for line in filter(None, rows):
            save(folder / split / line.split()[-3], noise(rng, 8, 9))
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
    for row in ("379 x.png COVID-19 cohen", "379 x.png 1 cohen", "x.png positive c"):
        write(folder / "test.txt", "\n".join([COVIDX_TRAIN[0], "", row]))
        words = f"{folder}/test.txt, line 3", row, "positive"
        refuses(ValueError, partial(load, split="test"), *words)
    write(folder / "train.txt", "\n".join([*COVIDX_TRAIN, "9 0034.jpg negative cohen"]))
    refuses(ValueError, load, folder / "train.txt", "0034.jpg", "more than once")


# Tuberculosis

LUNGS = {  # in the real sets, too, all normal images come before the others
    "Tuberculosis_dataset/ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png": [
        f"CHNCXR_{k:04d}_{int(k > 20)}.png" for k in range(1, 35)
    ],
    "Tuberculosis_dataset/Montgomery/MontgomerySet/CXR_png": [
        f"MCUCXR_{k:04d}_{int(k > 8)}.png" for k in range(1, 14)
    ],
}


def test_tuberculosis(tmp_path, rng):
    """34 and 13 images, of which int(28.9) and int(11.05) train."""
    expected, load = {"train": [], "test": []}, partial(load_dataset, "tuberculosis", tmp_path)
    for (part, listed), count in zip(LUNGS.items(), (28, 11)):
        # A directory lists its files in no order: they are not written in the sorted one.
        for name in sorted(listed, key=lambda name: name[::-1]):
            save(tmp_path / part / name, noise(rng, 3, 4))
        for other in ("Thumbs.db", f"._{listed[0]}"):  # which macOS unpacks beside each file
            write(tmp_path / part / other, "no image")
        order = [f"{part}/{listed[i]}" for i in study_order(len(listed))]
        expected["train"] += order[:count]
        expected["test"] += order[count:]
    for split, paths in expected.items():
        dataset = load(split=split)
        assert_xrays(dataset, "tuberculosis", ("normal", "tuberculosis"), "multiclass")
        assert files(dataset, tmp_path) == paths
        assert dataset.groups is None and dataset.options == {}
        assert dataset.labels.tolist() == [int(path[-5]) for path in paths]
        assert_grey(dataset)
    for part in reversed(LUNGS):
        mask = tmp_path / part / "CHNCXR_0001_0_mask.png"
        save(mask, np.zeros((2, 2), np.uint8))
        refuses(ValueError, load, mask, "_0", "_1")
        for file in (tmp_path / part).iterdir():
            file.unlink()
        refuses(ValueError, load, tmp_path / part, "no .png")
