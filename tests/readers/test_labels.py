"""Unions, one label an image, what is held out; labels, orders and groups are typed by hand.

Few-shot subsets: tests/test_data.py.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from trees import MIMIC_ROWS, Trees, marks, names, pixels_of, save

import data
from readers.labels import hold_out
from readers.xrays import CHEXPERT_CLASSES, NIH_CLASSES, PADCHEST_CLASSES

COMMON = "Atelectasis Cardiomegaly Consolidation Edema Effusion Pneumonia Pneumothorax".split()
FOUR = "chexpert+mimic+nih+padchest"


@pytest.fixture
def four(tmp_path):
    """Four sources whose patients have the same numbers."""
    four = Trees(tmp_path)
    rows = (
        "patient10000032/study1/view1_frontal.jpg,Male,50,Frontal,PA,1,,,,,,,,,,,,,",
        "patient00002/study1/view2_frontal.jpg,Male,50,Frontal,AP,0,1,-1,1,0,0,,1,0,,1,0,,1",
        "patient00002/study1/view3_lateral.jpg,Male,50,Lateral,,1,,,,,,,,,,,,,",
    )
    four.write_chexpert("train", [f"train/{row}" for row in rows])
    four.write_chexpert("valid", [f"valid/{row}" for row in rows[1:2]])
    four.write_mimic((MIMIC_ROWS[1], MIMIC_ROWS[0], MIMIC_ROWS[5]))
    train = [
        ("00000002_000.png", "No Finding", 2, "PA"),
        ("00000002_001.png", "Effusion|Hernia|Pleural_Thickening", 2, "PA"),
        ("10000032_000.png", "Pneumothorax", 10000032, "PA"),
    ]
    four.write_nih(train, [("00000003_000.png", "Mass|Pneumonia", 3, "PA")])
    rows = [
        {"ImageID": "2_1.png", "PatientID": "2", "Labels": "['cardiomegaly', 'pacemaker']"},
        {"ImageID": "2_2.png", "PatientID": "10000032", "Labels": "['normal']"},
        {"ImageID": "2_3.png", "PatientID": "2", "Labels": "['pulmonary edema']"},
        {"ImageID": "2_4.png", "PatientID": "2", "Labels": "['pneumothorax', 'scoliosis']"},
    ]
    four.write_padchest(rows)
    for row in rows:
        save(four.padchest / "0" / row["ImageID"], four.noise(10, 12, dtype=np.uint16))
    return four


ORDER = [
    *("view1_frontal.jpg", "view2_frontal.jpg", "view3_lateral.jpg"),
    *(f"{MIMIC_ROWS[1][0]}.jpg", f"{MIMIC_ROWS[0][0]}.jpg"),
    *("00000002_000.png", "00000002_001.png", "10000032_000.png"),
    # As the study shuffles four; the last is a tenth, rounded up.
    *("2_2.png", "2_4.png", "2_1.png", "2_3.png"),
]


def test_union_of_four(four):
    dataset, test = (four.load(FOUR, split, split_by="image") for split in ("train", "test"))
    assert dataset.classes == tuple(COMMON) and dataset.name == FOUR
    assert (dataset.task, dataset.domain) == ("multilabel", "medical")
    assert dataset.labels.dtype == np.float32 and names(dataset) == ORDER[:11]
    order = np.arange(4)
    np.random.RandomState(42).shuffle(order)
    assert [f"2_{i + 1}.png" for i in order] == ORDER[8:]
    expected = marks(
        *("0000000", "0..011.", "0000000"),
        *("0000000", "0..11.."),
        *("0000000", "0000100", "0000001"),
        *("0000000", "0000001", "0100000"),
    )
    np.testing.assert_array_equal(dataset.labels, expected)
    for i in range(7):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(dataset.where(i), "L"))
    image, label = dataset[-1]
    assert torch.equal(image, dataset.read(10)) and label.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert names(test) == [ORDER[1], f"{MIMIC_ROWS[5][0]}.jpg", "00000003_000.png", ORDER[11]]
    np.testing.assert_array_equal(test.labels, marks("0..011.", "..1....", "0000010", "0001000"))


def test_union_of_all_labels(four):
    dataset = four.load(FOUR, labels="union", split_by="image")
    every = {*CHEXPERT_CLASSES, *NIH_CLASSES, *PADCHEST_CLASSES}
    assert dataset.classes == tuple(sorted(every))
    expected = marks(
        "...0.00.00.0..0.....00..0.00.0.",
        "...0....01.1........01..0.1..1.",
        "...0.00.00.0..0.....00..0.00.0.",
        "...0.00.00.0..0.....00..0.00.0.",
        "...0....11..............0......",
        "...0.00.000.0....0.0..00.000...",
        "...0.00.010.0....1.0..00.100...",
        "...0.00.000.0....0.0..00.001...",
        "00000000000.00000000..00.000000",
        "00000000000.00000000..00.001100",
        "00000100000.00000000..00.000010",
    )
    np.testing.assert_array_equal(dataset.labels, expected)
    two = four.load("chexpert+mimic")  # which are alike
    assert two.classes == tuple(sorted(CHEXPERT_CLASSES))
    columns = [two.classes.index(name) for name in CHEXPERT_CLASSES]
    expected = marks("0000000000000", "0..01.01101.1", "0000000000000", "0..1....10...")
    np.testing.assert_array_equal(two.labels[:, columns], expected)


def test_groups_of_different_sources_never_coincide(four):
    groups = four.load(FOUR, split_by="image").groups.tolist()
    sources = [groups[:3], groups[3:5], groups[5:8], groups[8:]]
    # chexpert: two patients; mimic: one; nih 2, 2, 10000032; padchest 10000032, 2, 2.
    assert [len(set(source)) for source in sources] == [2, 1, 2, 2]
    assert len(groups) == 11 and len(set(groups)) == 2 + 1 + 2 + 2
    assert groups[5] == groups[6] != groups[7] and groups[8] != groups[9] == groups[10]
    test = four.load(FOUR, "test", split_by="image").groups.tolist()
    assert test[0] == groups[1]  # one patient has one name in both splits
    assert groups[1] == groups[2] and test[3] == groups[9] and test[2] not in groups
    dataset = four.load("chexpert+synthetic-xray")  # which has no patients
    assert dataset.classes == (*COMMON[:5], COMMON[6])
    assert len(set(dataset.groups.tolist())) == 2 + 8000


def test_union_options(four):
    # Of four all take the study's five views, as far as each knows them; of two or three PA and AP.
    dataset, views = four.load(FOUR), {"views": ["PA", "AP"]}
    padchest = {"views": ["PA", "AP", "AP Supine", "L", "COSTAL"], "split_by": "patient"}
    expected = {"labels": "intersection", "chexpert": {"views": ["PA", "AP", "L"]}, "mimic": views}
    assert dataset.options == expected | {"nih": views, "padchest": padchest}
    assert four.load("chexpert+mimic").options["chexpert"] == views
    dataset = four.load(FOUR, labels="union", split_by="image", views=["PA"])
    views = {"views": ["PA"]}
    expected = dict.fromkeys(["chexpert", "mimic", "nih"], views)
    expected |= {"padchest": views | {"split_by": "image"}, "labels": "union"}
    assert dataset.options == expected == json.loads(json.dumps(dataset.options))
    assert names(dataset)[:2] == [ORDER[0], ORDER[3]]
    assert sum(dataset.dropped.values()) == 2 + 1  # lateral and AP of chexpert, AP of mimic
    takes = {"labels", "views", "split_by", "uncertain", "blank"}
    assert set(data.dataset_options("chexpert+padchest")) == takes
    # A view that one dataset does not know may be another's.
    dataset = four.load(FOUR, views=["PA", "L"], split_by="image")
    used = [dataset.options[part]["views"] for part in FOUR.split("+")]
    assert used == [["PA", "L"], ["PA"], ["PA"], ["PA", "L"]]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("chexpert+mimic", {"split_by": "image"}, ["split_by", "labels", "views"]),
        ("chexpert+mimic", {"labels": "all"}, ["--labels all", "intersection", "union"]),
        ("chexpert+mimic", {"views": ["L"]}, ["metadata.csv.gz", "['L']", "LATERAL"]),
        ("chexpert+mimmic", {}, ["'mimmic'", "did you mean 'mimic'"]),
        ("chexpert+synthetic-natural", {}, ["synthetic-natural is not multi-label"]),
        ("nih+nih", {}, ["nih+nih", "twice"]),
        ("chexpert@6+chexpert", {}, ["chexpert@6+chexpert", "twice"]),
        ("synthetic-natural", {"single_label": True}, ["--single-label", "multi-label"]),
        ("chexpert", {"single_label": True}, ["chexpert", "exactly one positive label"]),
    ],
)
def test_refusals(four, name, options, words):
    refuses(ValueError, partial(four.load, name, **options), *words)


def test_union_with_packs(four, capsys):
    whole = four.load("chexpert+nih", labels="union")
    for name in ("nih", "chexpert"):
        args = ["--size", "6", "--workers", "1", "--data-dir", str(four.root)]
        assert data.main(["pack", name, *args]) == 0
    dataset = four.load("chexpert+nih@6", labels="union")
    assert dataset.classes == whole.classes
    np.testing.assert_array_equal(dataset.labels, whole.labels)
    assert dataset.groups.tolist() == whole.groups.tolist()
    assert [tuple(dataset.read(i).shape) for i in (0, 2)] == [(1, 10, 12), (1, 6, 6)]


# One label an image

MORE = "not exactly one positive label"


def test_single_label_passes_over_what_is_not_annotated(tmp_path):
    trees, start = Trees(tmp_path), "/study1/view1_frontal.jpg,Female,68,Frontal,AP,"
    # No Finding, then by their column's place: Edema 4, Atelectasis 7, Effusion 9, Devices 12.
    rows = [
        ",,,,,,,,,,1.0,,,",  # one, and what is not mentioned
        ",,,,,-1.0,,,,,1.0,,,",  # one, and an uncertain one
        ",,,,,1.0,,,,,1.0,,,",
        ",,,,,-1.0,,,,,,,,",
        "1.0,,,,,,,,,,,,,1.0",  # No Finding: all are absent
        ",,,,,0.0,,,,,,,,1.0",
        ",,,,,,,,,,,,,",
        ",,,,,,,0.0,1.0,,,,,",
    ]
    rows = [f"/patient{i:05d}{start}{row}" for i, row in enumerate(rows, 1)]
    trees.write_chexpert("train", [f"train{row}" for row in rows], images=False)
    trees.write_chexpert("valid", [f"valid{row}" for row in rows[2:6]], images=False)
    load = partial(trees.load, "chexpert", verify=False, single_label=True)
    train, test = load(), load("test")
    # Effusion, Effusion, Support Devices, Atelectasis.
    assert train.labels.tolist() == [8, 8, 12, 0] and train.labels.dtype == np.int64
    assert train.groups.tolist() == [1, 2, 6, 8] and train.classes == tuple(CHEXPERT_CLASSES)
    assert test.labels.tolist() == [12] and test.groups.tolist() == [6]
    assert (train.task, train.domain) == ("multiclass", "medical")
    assert train.options == {"views": ["PA", "AP"], "single_label": True}
    assert (train.dropped[MORE], test.dropped[MORE]) == (4, 3)


def test_single_label_after_views_and_of_a_union(four):
    nih = four.load("nih", views=["PA"], single_label=True)
    assert names(nih) == ["10000032_000.png"] and nih.labels.tolist() == [13]
    assert nih.options == {"views": ["PA"], "single_label": True}
    assert nih.dropped == {"views other than PA": 0, MORE: 2}
    call = partial(four.load, "nih+padchest", single_label=True, split_by="image")
    shared, every = call(), call(labels="union")
    # Scoliosis and Support Devices are PadChest's alone.
    marked = [shared.classes[label] for label in shared.labels]
    assert marked == ["Pneumothorax", "Pneumothorax", "Cardiomegaly"]
    assert names(every) == ["10000032_000.png"] and every.options["labels"] == "union"
    assert every.classes[every.labels[0]] == "Pneumothorax" and every.options["single_label"]
    image = every[0][0]
    np.testing.assert_array_equal(image, pixels_of(four.nih / "images" / "10000032_000.png", "L"))


# What is held out: by class, each patient on one side, the same ones whenever asked


def test_by_class_without_patients(rng):
    labels = rng.permutation(np.repeat(np.arange(5), (1, 5, 40, 100, 1000)))
    held = hold_out(labels, None, 0.2)
    counts = np.bincount(labels[held], minlength=5)
    assert counts[0] == 0 and np.abs(counts[1:] - [1, 8, 20, 200]).max() <= 1
    assert (held == hold_out(labels, None, 0.2)).all()
    assert not hold_out(np.arange(10), None, 0.5).any()  # of each class the first stays


def test_patients_stay_together_and_findings_are_shared_out(rng):
    patients = np.sort(rng.integers(3000, size=10_000)).astype("S")
    labels = (rng.random((10_000, 4)) < [0.3, 0.1, 0.02, 0]).astype(np.float32)
    labels[rng.random((10_000, 4)) < 0.1] = np.nan
    held = hold_out(labels, patients, 0.2)
    assert not np.intersect1d(patients[held], patients[~held]).size
    shares = (labels[held] == 1).sum(0)[:3] / (labels == 1).sum(0)[:3]
    assert np.abs(shares - 0.2).max() < 0.03 and abs(held.mean() - 0.2) < 0.01
    # Of patients with the rarest finding a fifth, to one.
    rarest = np.unique(patients[labels[:, 2] == 1])
    mine = np.isin(rarest, patients[held]).sum()
    assert abs(mine - len(rarest) / 5) <= 1


def test_a_patient_of_several_classes_counts_for_the_rarest():
    labels = np.array([0, 1] * 50 + [0] * 100)  # fifty patients show both, a hundred one
    patients = np.repeat(np.arange(150), [2] * 50 + [1] * 100)
    held = hold_out(labels, patients, 0.5)
    assert np.bincount(labels[held]).tolist() in ([75, 25], [74, 24], [74, 25], [75, 24])


def test_nothing_and_little():
    assert hold_out(np.zeros(0, int), None, 0.5).shape == (0,)
    assert not hold_out(np.zeros((1, 3), np.float32), None, 0.5).any()
    assert hold_out(np.zeros((2, 3), np.float32), np.array([7, 3]), 0.5).sum() == 1
