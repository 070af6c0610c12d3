"""CheXpert, MIMIC-CXR-JPG, unions of X-ray sets, and tables as users spoil them.

Small trees in the official layouts; labels, orders and splits are typed by hand.
"""

import csv
import gzip
import io
import json
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from PIL import Image
from trees import save

import data
from data import load_dataset

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
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
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum"),
    *("Fracture", "Lung Lesion", "Lung Opacity", "Effusion", "Pleural Other", "Pneumonia"),
    *("Pneumothorax", "Support Devices"),
)

METADATA_HEADER = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning"
)
SPLIT_HEADER = "dicom_id,study_id,subject_id,split"
MIMIC_FINDINGS_HEADER = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,"
    "Fracture,Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,"
    "Pneumothorax,Support Devices"
)
# dicom_id, subject_id, study_id, ViewPosition, split; in the order of the metadata.
MIMIC_ROWS = (
    ("fffabebf-74fd3a1f-673b6b41-96ec0ac9-2ab69818", 10000032, 53911762, "AP", "train"),
    ("02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", 10000032, 50414267, "PA", "train"),
    ("174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962", 10000032, 50414267, "LATERAL", "train"),
    ("f3a5dbbc-23c7f3f4-ab6c0f8a-ec7c9a0b-d1f1b3aa", 19999733, 57132437, "PA", "train"),
    ("68b5c4b1-227d0485-9cc38c3f-7b84ab51-4b472714", 10000032, 53911762, "AP", "train"),
    ("096052b7-d256dc40-453a102b-fa7d01c6-1b22c6b4", 10000764, 57375967, "AP", "validate"),
    ("2b8ab9ea-2b9bb9a2-c4e7f2fa-a5b3a8a0-1ae1f9d1", 10000898, 50771383, "PA", "train"),
    ("d0b71acc-b5a62046-bbb5f6b8-7b173b85-65cdf738", 10000935, 50578979, "PA", "test"),
    ("8b2a3bd3-f5c7a08f-ac7f6ec4-fc7e2b1c-0b7f4bfb", 10000935, 51178377, "LL", "train"),
    ("b75df1bd-0f22d631-52d73526-2ae7b85a-d843b39d", 10000980, 50985099, "", "validate"),
    ("0b2f8b0d-1b0d3a6b-5e9d3ac5-7f0a9f6d-77aaf3c4", 10000980, 54577367, "PA", "validate"),
)
MIMIC_FINDINGS = (
    "19999733,57132437,1.0,,,,,,,0.0,1.0,,,-1.0,,1.0",
    "10000764,57375967,,,1.0,,,,,,,,,-1.0,,",
    "10000001,59999999,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,,1.0,1.0,1.0,1.0,1.0",
    "10000032,50414267,,,,,,,,,1.0,,,,,",
    "10000980,54577367,,,,0,,,,,,,,,1,-1",
    "10000980,50985099,,,,,,,,,,,,,1.0,",
    "10000032,53911762,0.0,-1.0,,1.0,,,,,,1,0,,,-1",
    "10000935,50578979,1.0,,,,,,,,,,,,,",
    "10000935,51178377,,1.0,,,,,,,,,,,,",
)

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,"
    "PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,PixelAspectRatio_DICOM,"
    "SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
    "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)


def marks(*rows):
    """A row a text: 1, 0, and . for NaN."""
    return np.array([[{"1": 1, "0": 0, ".": np.nan}[c] for c in row] for row in rows], np.float32)


def write(path, content):
    """Writes a table, gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def read(path):
    return (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode()


def lines(header, rows):
    return "\n".join([header, *rows]) + "\n"


class Trees:
    """Datasets below one root, to be spoilt by a test."""

    def __init__(self, root):
        self.root, self.rng = root, np.random.default_rng(0)
        self.chexpert = root / "CheXpert-v1.0"
        self.mimic = root / "mimic-cxr-jpg" / "2.0.0"
        self.tables = {
            part: self.mimic / f"mimic-cxr-2.0.0-{part}.csv.gz"
            for part in ("metadata", "split", "chexpert")
        }
        self.tables |= {part: self.chexpert / f"{part}.csv" for part in ("train", "valid")}

    def noise(self, *shape, dtype=np.uint8):
        return self.rng.integers(np.iinfo(dtype).max + 1, size=shape).astype(dtype)

    def write_chexpert(self, part, rows, release="CheXpert-v1.0", images=True):
        write(self.tables[part], lines(CHEXPERT_HEADER, [f"{release}/{row}" for row in rows]))
        for row in rows if images else ():
            save(self.chexpert / row.split(",")[0], self.noise(10, 12))

    def write_mimic(self, rows=MIMIC_ROWS, findings=MIMIC_FINDINGS, images=True):
        metadata = [
            f"{dicom},{subject},{study},CHEST (PA AND LAT),{view},3056,2544,21800506,213014.531,"
            "CHEST (PA AND LAT),postero-anterior,Erect"
            for dicom, subject, study, view, _ in rows
        ]
        splits = [f"{dicom},{study},{subject},{split}" for dicom, subject, study, _, split in rows]
        write(self.tables["metadata"], lines(METADATA_HEADER, metadata))
        write(self.tables["split"], lines(SPLIT_HEADER, [*splits[4:], *splits[3::-1]]))
        write(self.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, findings))
        for dicom, subject, study, _, split in rows if images else ():
            if split != "test":  # nothing reads these
                save(self.mimic_image(dicom, subject, study), self.noise(10, 12))

    def mimic_image(self, dicom, subject, study):
        part = f"p{subject // 10**6}/p{subject}/s{study}/{dicom}.jpg"
        return self.mimic / "files" / part

    def write_nih(self, train, test):
        """Rows (file, findings, patient)."""
        folder = self.root / "NIH-ChestXRay-14"
        rows = [
            f"{file},{findings},0,{patient},57,M,PA,2682,2749,0.143,0.143"
            for file, findings, patient in (*train, *test)
        ]
        write(folder / "Data_Entry_2017_v2020.csv", lines(NIH_HEADER, rows))
        for name, part in (("train_val", train), ("test", test)):
            write(folder / f"{name}_list.txt", "\n".join(file for file, _, _ in part))
        for file, _, _ in (*train, *test):
            save(folder / "images" / file, self.noise(10, 12))

    def write_padchest(self, rows):
        """Rows (file, patient, label text)."""
        folder, columns = self.root / "PadChest", PADCHEST_HEADER.split(",")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)
        for number, (file, patient, labels) in enumerate(rows):
            values = {"": number, "ImageID": file, "ImageDir": 0, "PatientID": patient}
            values |= {"Projection": "PA", "Report": "torax , sin , hallazgos", "Labels": labels}
            writer.writerow([values.get(column, "") for column in columns])
            save(folder / "0" / file, self.noise(10, 12, dtype=np.uint16))
        write(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", table.getvalue())

    def load(self, name, split="train", **options):
        return load_dataset(name, self.root, split, **options)


@pytest.fixture
def trees(tmp_path):
    """CheXpert and MIMIC-CXR-JPG."""
    trees = Trees(tmp_path)
    trees.write_chexpert("train", CHEXPERT_TRAIN)
    trees.write_chexpert("valid", CHEXPERT_VALID)
    trees.write_mimic()
    return trees


@pytest.fixture
def tables(tmp_path):
    """Their tables alone."""
    trees = Trees(tmp_path)
    trees.write_chexpert("train", CHEXPERT_TRAIN, images=False)
    trees.write_mimic(images=False)
    return trees


def files(dataset, folder):
    """The images' paths below a folder."""
    return [str(dataset.where(i)).removeprefix(f"{folder}/") for i in range(len(dataset))]


def patient_views(dataset, folder):
    """Of CheXpert: like 2/study1/view1_frontal."""
    return [path.split("patient")[1].lstrip("0")[:-4] for path in files(dataset, folder)]


def assert_grey(dataset):
    """Each image is Pillow's own reading, as one grey channel."""
    for i in range(len(dataset)):
        with Image.open(dataset.where(i)) as image:
            deep = image.mode.startswith("I")
            expected = np.rint(np.asarray(image) / 257) if deep else np.asarray(image.convert("L"))
        image = dataset.read(i)
        assert image.dtype == torch.uint8 and image.shape == (1, 10, 12)
        np.testing.assert_array_equal(image[0], expected)


# ------------------------------------------------------------------------------------------------
# CheXpert
# ------------------------------------------------------------------------------------------------

CHEXPERT_KEPT = [
    *("1/study1/view1_frontal", "2/study2/view1_frontal", "2/study1/view1_frontal"),
    *("64540/study1/view1_frontal", "3/study1/view1_frontal", "5/study1/view1_frontal"),
]
CHEXPERT_MARKS = marks(
    "0000000000000",  # No Finding, over a present and an unmentioned mark
    ".....1.1.....",
    ".....1.1.....",
    "0000000000000",  # No Finding, over uncertain and present ones
    "...1.......0.",
    "01..0...1....",  # No Finding 0 changes nothing
)


def assert_chexpert_train(dataset, trees):
    assert patient_views(dataset, trees.chexpert) == CHEXPERT_KEPT
    np.testing.assert_array_equal(dataset.labels, CHEXPERT_MARKS)
    assert dataset.groups.tolist() == [1, 2, 2, 64540, 3, 5]


def test_chexpert_train(trees):
    dataset = trees.load("chexpert")
    assert_chexpert_train(dataset, trees)
    assert dataset.classes == FINDINGS and dataset.name == "chexpert" and len(dataset) == 6
    assert (dataset.task, dataset.domain) == ("multilabel", "medical")
    assert dataset.labels.dtype == np.float32
    assert dataset.options == {"views": ["PA", "AP"]} and sum(dataset.dropped.values()) == 3


def test_chexpert_test_is_valid_csv(trees):
    dataset = trees.load("chexpert", "test")
    assert files(dataset, trees.chexpert) == [
        "valid/patient64542/study1/view1_frontal.jpg",
        "valid/patient64541/study1/view1_frontal.jpg",
    ]
    np.testing.assert_array_equal(dataset.labels, marks("0000100110000", "0000000000000"))
    assert dataset.groups.tolist() == [64542, 64541] and dataset.classes == FINDINGS
    trees.tables["train"].unlink()
    assert len(trees.load("chexpert", "test")) == 2
    refuses(FileNotFoundError, partial(trees.load, "chexpert"), trees.tables["train"], "--data-dir")


@pytest.mark.parametrize("release", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_chexpert_releases(trees, release):
    """The table of either release lists the images in the one directory."""
    trees.write_chexpert("train", CHEXPERT_TRAIN, release)
    assert_chexpert_train(trees.load("chexpert"), trees)


# The findings by their column's place in train.csv -> by their place among the classes.
CHEXPERT_PLACES = [4, 1, 7, 6, 3, 2, 10, 0, 11, 8, 9, 5, 12]


@pytest.mark.parametrize("other, value", [("", np.nan), ("0", 0), ("-1", np.nan)])
def test_chexpert_each_column_is_its_class(trees, other, value):
    rows = []
    for column in range(13):
        findings = ["1" if place == column else other for place in range(13)]
        start = f"train/patient{column + 1:05d}/study1/view1_frontal.jpg,Male,50,Frontal,PA,"
        rows.append(start + ",".join(["", *findings]))
    trees.write_chexpert("train", rows)
    expected = np.full((13, 13), value, np.float32)
    expected[range(13), CHEXPERT_PLACES] = 1
    np.testing.assert_array_equal(trees.load("chexpert").labels, expected)


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), ("1.0", 1), ("0", 0), ("0.0", 0)] + [(t, np.nan) for t in ("", "-1", "-1.0")],
)
@pytest.mark.parametrize("no_finding", ["", "0", "-1", "-1.0", "1", "1.0"])
def test_coding(trees, text, value, no_finding):
    """Of both datasets: one labeller made both."""
    row = f"train/patient00007/study1/view1_frontal.jpg,Male,50,Frontal,PA,{no_finding}"
    trees.write_chexpert("train", [row + f",{text}" * 13])
    findings = [f"10000032,50414267{f',{text}' * 8},{no_finding}{f',{text}' * 5}"]
    trees.write_mimic(MIMIC_ROWS[1:6], findings)
    expected = np.full((1, 13), 0 if no_finding in ("1", "1.0") else value, np.float32)
    for name in ("chexpert", "mimic"):
        np.testing.assert_array_equal(trees.load(name).labels, expected)


@pytest.mark.parametrize(
    "views, kept, dropped",
    [
        (["PA"], ["64540/study1/view1_frontal", "5/study1/view1_frontal"], 7),
        (["L"], ["2/study1/view2_lateral"], 8),
        (["RL", "LL"], ["4/study1/view1_frontal", "6/study1/view1_frontal"], 7),
        (["PA", "L"], ["2/study1/view2_lateral", *CHEXPERT_KEPT[3:6:2]], 6),
        (["AP"], [*CHEXPERT_KEPT[:3], "3/study1/view1_frontal"], 5),
    ],
)
def test_chexpert_views(trees, views, kept, dropped):
    dataset = trees.load("chexpert", views=views)
    assert patient_views(dataset, trees.chexpert) == kept
    assert len(dataset.labels) == len(dataset.groups) == len(kept)
    assert dataset.options == {"views": views} and list(dataset.dropped.values()) == [dropped]


def test_chexpert_a_lateral_image_is_L_whatever_its_second_column_says(trees):
    rows = [
        "train/patient00001/study1/view1_lateral.jpg,Male,50,Lateral,PA" + ",1" * 14,
        "train/patient00002/study1/view1_frontal.jpg,Male,50,Frontal,PA" + ",1" * 14,
    ]
    trees.write_chexpert("train", rows)
    assert trees.load("chexpert").groups.tolist() == [2]
    assert trees.load("chexpert", views=["L"]).groups.tolist() == [1]


@pytest.mark.parametrize(
    "name, known", [("chexpert", "AP, L, LL, PA, RL"), ("mimic", "AP, LATERAL, LL, PA")]
)
def test_unknown_views(trees, name, known):
    table = trees.tables[{"chexpert": "train", "mimic": "metadata"}[name]]
    for views in (["PA", "AXIAL"], ["pa"], ["P"]):
        refuses(
            ValueError, partial(trees.load, name, views=views), table, "--views", views[-1], known
        )
    refuses(ValueError, partial(trees.load, name, views=[]), table, "--views", known)
    refuses(ValueError, partial(trees.load, name, split_by="patient"), name, "split_by", "views")


def test_no_image_of_a_known_view(trees):
    call = partial(trees.load, "chexpert", "test", views=["RL"])
    refuses(ValueError, call, "chexpert", "no image", "test", "RL")
    call = partial(trees.load, "mimic", "test", views=["LATERAL"])
    refuses(ValueError, call, "mimic", "no image", "test", "LATERAL")


def test_chexpert_pixels(trees):
    path = trees.chexpert / "train/patient00003/study1/view1_frontal.jpg"
    save(path, trees.noise(10, 12, 3))
    dataset = trees.load("chexpert")
    assert_grey(dataset)
    image, label = dataset[1]
    assert torch.equal(image, dataset.read(1)) and label.dtype == torch.float32
    np.testing.assert_array_equal(label, marks(".....1.1.....")[0])


def test_chexpert_an_image_listed_twice(trees):
    trees.write_chexpert("train", [*CHEXPERT_TRAIN, CHEXPERT_TRAIN[4]])
    file = CHEXPERT_TRAIN[4].split(",")[0]
    refuses(ValueError, partial(trees.load, "chexpert"), trees.tables["train"], file, "keep one")


@pytest.mark.parametrize(
    "path",
    [
        "train/patient00007/study1/view1_frontal.jpg",
        "CheXpert-v1.0/../patient00007/study1/view1_frontal.jpg",
        "CheXpert-v1.0/train/patient/study1/view1_frontal.jpg",
        "CheXpert-v1.0/train/00007/study1/view1_frontal.jpg",
        "CheXpert-v1.0/train/patient00007/view1_frontal.jpg",
        "CheXpert-v1x0/train/patient00007/study1/view1_frontal.jpg",
        "/CheXpert-v1.0/train/patient00007/study1/view1_frontal.jpg",
        "",
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_chexpert_paths_that_are_none(trees, path, mark):
    table = trees.tables["train"]
    row = CHEXPERT_TRAIN[5].split(",", 1)[1]
    write(table, mark + lines(CHEXPERT_HEADER, [f"CheXpert-v1.0/{CHEXPERT_TRAIN[0]}"]))
    with open(table, "a") as file:
        file.write(f"{path},{row}\n")
    call = partial(trees.load, "chexpert", verify=False)
    refuses(ValueError, call, f"{table}, line 3", repr(path), "must be like CheXpert-v1.0/train/")


# ------------------------------------------------------------------------------------------------
# MIMIC-CXR-JPG
# ------------------------------------------------------------------------------------------------

MIMIC_KEPT = [
    "p10/p10000032/s53911762/fffabebf-74fd3a1f-673b6b41-96ec0ac9-2ab69818.jpg",
    "p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg",
    "p19/p19999733/s57132437/f3a5dbbc-23c7f3f4-ab6c0f8a-ec7c9a0b-d1f1b3aa.jpg",
    "p10/p10000032/s53911762/68b5c4b1-227d0485-9cc38c3f-7b84ab51-4b472714.jpg",
]


def assert_mimic_train(dataset, trees):
    assert files(dataset, trees.mimic / "files") == MIMIC_KEPT
    expected = marks("0..1....10...", "0000000000000", "0000000000000", "0..1....10...")
    np.testing.assert_array_equal(dataset.labels, expected)
    assert dataset.groups.tolist() == [10000032, 10000032, 19999733, 10000032]


def test_mimic_train(trees):
    dataset = trees.load("mimic")
    assert_mimic_train(dataset, trees)
    assert dataset.classes == FINDINGS and dataset.name == "mimic" and len(dataset) == 4
    assert (dataset.task, dataset.domain) == ("multilabel", "medical")
    assert dataset.labels.dtype == np.float32
    assert dataset.options == {"views": ["PA", "AP"]}
    assert list(dataset.dropped.values()) == [2, 1]  # other views; a study without labels


def test_mimic_test_is_validate(trees):
    dataset = trees.load("mimic", "test")
    assert files(dataset, trees.mimic / "files") == [
        "p10/p10000764/s57375967/096052b7-d256dc40-453a102b-fa7d01c6-1b22c6b4.jpg",
        "p10/p10000980/s54577367/0b2f8b0d-1b0d3a6b-5e9d3ac5-7f0a9f6d-77aaf3c4.jpg",
    ]
    np.testing.assert_array_equal(dataset.labels, marks("..1..........", "...0.......1."))
    assert dataset.groups.tolist() == [10000764, 10000980]
    assert list(dataset.dropped.values()) == [1, 0]


def test_mimic_each_column_is_its_class(trees):
    rows, findings = [], []
    for column in range(13):
        texts = ["1.0" if place == column else "" for place in range(13)]
        rows.append((f"{column:08x}-0", 11000000 + column, 50000000 + column, "PA", "train"))
        texts = [str(11000000 + column), str(50000000 + column), *texts[:8], "", *texts[8:]]
        findings.append(",".join(texts))
    trees.write_mimic(rows, findings[::-1])
    expected = np.full((13, 13), np.nan, np.float32)
    np.fill_diagonal(expected, 1)
    np.testing.assert_array_equal(trees.load("mimic").labels, expected)


@pytest.mark.parametrize(
    "views, kept, dropped",
    [
        (["LATERAL"], [50414267], [6, 0]),
        (["LATERAL", "LL"], [50414267, 51178377], [5, 0]),
        (["PA"], [50414267, 57132437], [4, 1]),
        (["AP"], [53911762, 53911762], [5, 0]),
    ],
)
def test_mimic_views(trees, views, kept, dropped):
    dataset = trees.load("mimic", views=views)
    studies = [int(path.split("/s")[1][:8]) for path in files(dataset, trees.mimic / "files")]
    assert studies == kept and len(dataset.labels) == len(dataset.groups) == len(kept)
    assert dataset.options == {"views": views} and list(dataset.dropped.values()) == dropped


def test_mimic_views_of_no_standard_name(trees):
    rows = [(*row[:3], "AP AXIAL" if row[3] == "LL" else row[3], row[4]) for row in MIMIC_ROWS]
    trees.write_mimic(rows)
    dataset = trees.load("mimic", views=["AP AXIAL"])
    assert dataset.groups.tolist() == [10000935]
    np.testing.assert_array_equal(dataset.labels, marks(".1..........."))
    refuses(ValueError, partial(trees.load, "mimic", views=["AXIAL"]), "'AXIAL'", "AP AXIAL")


def test_mimic_pixels(trees):
    path = trees.mimic / "files" / MIMIC_KEPT[2]
    save(path, trees.noise(10, 12, 3))
    assert_grey(trees.load("mimic"))


@pytest.mark.parametrize("order", range(4))
def test_mimic_tables_in_any_order(trees, order):
    """The metadata's order is the images'; the orders of the two other tables mean nothing."""
    for part in ("split", "chexpert"):
        header, *rows = read(trees.tables[part]).splitlines()
        rows = [rows[i] for i in np.random.RandomState(order).permutation(len(rows))]
        write(trees.tables[part], lines(header, rows if order else sorted(rows)))
    assert_mimic_train(trees.load("mimic"), trees)
    header, *rows = read(trees.tables["metadata"]).splitlines()
    write(trees.tables["metadata"], lines(header, rows[::-1]))
    dataset = trees.load("mimic")
    assert files(dataset, trees.mimic / "files") == MIMIC_KEPT[::-1]
    expected = marks("0..1....10...", "0000000000000", "0000000000000", "0..1....10...")
    np.testing.assert_array_equal(dataset.labels, expected)


def test_mimic_tables_in_one_order(trees):
    """As published, the split lists the images as the metadata does."""
    rows = [row for row in MIMIC_ROWS if row[3] == "PA" and row[2] != 50771383]
    header = read(trees.tables["split"]).splitlines()[0]
    by_dicom = {line.split(",")[0]: line for line in read(trees.tables["split"]).splitlines()}
    write(trees.tables["split"], lines(header, [by_dicom[row[0]] for row in MIMIC_ROWS]))
    assert_mimic_train(trees.load("mimic"), trees)
    findings = [f"{row[1]},{row[2]}" + f",{i % 2}" * 8 + "," + ",1" * 5 for i, row in
                enumerate(rows[:2])]  # fmt: skip
    write(trees.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, findings))
    dataset = trees.load("mimic", views=["PA"])
    np.testing.assert_array_equal(dataset.labels, marks("0000000011111", "1" * 13))


def test_mimic_every_study_without_labels(trees):
    write(trees.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, [MIMIC_FINDINGS[2]]))
    refuses(ValueError, partial(trees.load, "mimic"), "mimic", "no image", "train")


def test_mimic_a_study_of_another_subject(trees):
    findings = [line.replace("10000032,53911762", "10000033,53911762") for line in MIMIC_FINDINGS]
    write(trees.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, findings))
    words = trees.tables["chexpert"], "53911762", trees.tables["metadata"].name, "fetch"
    refuses(ValueError, partial(trees.load, "mimic"), *words)
    assert len(trees.load("mimic", "test")) == 2


@pytest.mark.parametrize("part", ["metadata", "split", "chexpert"])
@pytest.mark.parametrize("place", [1, 4])
def test_mimic_a_row_twice(trees, part, place):
    header, *rows = read(trees.tables[part]).splitlines()
    key = rows[place].split(",")[part == "chexpert"]
    write(trees.tables[part], lines(header, [*rows, rows[place]]))
    for split in ("train", "test"):
        call = partial(trees.load, "mimic", split)
        refuses(ValueError, call, trees.tables[part], key, "more than once", "keep one")


def test_mimic_a_study_twice_in_the_order_of_its_images(trees):
    """Two rows of a study contradict each other, also where there are as many images."""
    rows = [row for row in MIMIC_ROWS if row[2] == 53911762]
    findings = ["10000032,53911762" + ",1" * 8 + "," + ",1" * 5] * 2
    trees.write_mimic(rows, findings)
    words = trees.tables["chexpert"], "53911762", "more than once"
    refuses(ValueError, partial(trees.load, "mimic"), *words)


def test_mimic_metadata_and_split_both_list_an_image_twice(trees):
    trees.write_mimic([*MIMIC_ROWS, MIMIC_ROWS[1]])
    for part in ("metadata", "split"):
        header, *rows = read(trees.tables[part]).splitlines()
        write(trees.tables[part], lines(header, sorted(rows)))
    refuses(ValueError, partial(trees.load, "mimic"), MIMIC_ROWS[1][0], "more than once")


def test_mimic_an_image_without_split(trees):
    header, *rows = read(trees.tables["split"]).splitlines()
    write(trees.tables["split"], lines(header, rows[1:]))
    words = trees.tables["split"], "no row", rows[0].split(",")[0]
    refuses(ValueError, partial(trees.load, "mimic"), *words)
    trees.write_mimic(MIMIC_ROWS[1:])  # while a split of an image that is not there is nothing
    header, *rows = read(trees.tables["split"]).splitlines()
    write(trees.tables["split"], lines(header, ["00000000-0,50414267,10000032,train", *rows]))
    assert files(trees.load("mimic"), trees.mimic / "files") == MIMIC_KEPT[1:]


@pytest.mark.parametrize("part", ["metadata", "split", "chexpert"])
def test_mimic_missing_table(trees, part):
    trees.tables[part].unlink()
    call = partial(trees.load, "mimic")
    refuses(FileNotFoundError, call, f"no {trees.tables[part]}", "--data-dir")


# ------------------------------------------------------------------------------------------------
# Images that a table lists and the disk lacks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chexpert", "mimic", "chexpert+mimic"])
def test_a_listed_image_is_missing(trees, name):
    whole = trees.load(name)
    if name == "chexpert":
        missing = [1, 4]
    else:
        missing = [len(whole) - 2, len(whole) - 1]
    for i in missing:
        (trees.root / whole.where(i)).unlink()
    call, first = partial(trees.load, name), whole.where(missing[0])
    refuses(FileNotFoundError, call, first, "2 such", "fetch it", "remove it from the list")
    dataset = trees.load(name, verify=False)
    np.testing.assert_array_equal(dataset.labels, whole.labels)
    assert len(dataset) == len(whole) and dataset.where(missing[0]) == first
    assert torch.equal(dataset.read(0), whole.read(0))
    refuses(FileNotFoundError, partial(dataset.read, missing[0]), first)


def test_images_of_other_views_and_splits_need_not_be_there(trees):
    for row in CHEXPERT_TRAIN[3], CHEXPERT_TRAIN[6], *CHEXPERT_VALID:
        (trees.chexpert / row.split(",")[0]).unlink()
    for row in MIMIC_ROWS[2], MIMIC_ROWS[5], MIMIC_ROWS[6], MIMIC_ROWS[8]:
        trees.mimic_image(*row[:3]).unlink()
    assert len(trees.load("chexpert+mimic")) == 10


def test_missing_directories(trees):
    (trees.chexpert / "train").rename(trees.chexpert / "elsewhere")
    first = trees.chexpert / CHEXPERT_TRAIN[0].split(",")[0]
    refuses(FileNotFoundError, partial(trees.load, "chexpert"), first, "6 such")
    for name in ("chexpert", "mimic"):
        call = partial(load_dataset, name, trees.root / "nowhere")
        refuses(FileNotFoundError, call, trees.root / "nowhere", "--data-dir")


# ------------------------------------------------------------------------------------------------
# Unions
# ------------------------------------------------------------------------------------------------

COMMON = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia"),
    "Pneumothorax",
)


@pytest.fixture
def four(tmp_path):
    """Four sources whose patients have the same numbers."""
    four = Trees(tmp_path)
    rows = (
        "patient10000032/study1/view1_frontal.jpg,Male,50,Frontal,PA,1,,,,,,,,,,,,,",
        "patient00002/study1/view1_frontal.jpg,Male,50,Frontal,AP,0,1,-1,1,0,0,,1,0,,1,0,,1",
        "patient00002/study1/view2_lateral.jpg,Male,50,Lateral,,1,,,,,,,,,,,,,",
    )
    four.write_chexpert("train", [f"train/{row}" for row in rows])
    four.write_chexpert("valid", [f"valid/{row}" for row in rows[1:2]])
    four.write_mimic((MIMIC_ROWS[1], MIMIC_ROWS[0], MIMIC_ROWS[5]))
    train = [
        ("00000002_000.png", "No Finding", 2),
        ("00000002_001.png", "Effusion|Hernia|Pleural_Thickening", 2),
        ("10000032_000.png", "Pneumothorax", 10000032),
    ]
    four.write_nih(train, [("00000003_000.png", "Mass|Pneumonia", 3)])
    rows = [
        ("2_1.png", "2", "['cardiomegaly', 'pacemaker']"),
        ("2_2.png", "10000032", "['normal']"),
        ("2_3.png", "2", "['pulmonary edema']"),
        ("2_4.png", "2", "['pneumothorax', 'scoliosis']"),
    ]
    four.write_padchest(rows)
    return four


FOUR = "chexpert+mimic+nih+padchest"
SHUFFLED = ["2_2", "2_4", "2_1", "2_3"]  # PadChest's images; the last is a tenth, rounded up


def test_union_of_four(four):
    dataset = four.load(FOUR, split_by="image")
    assert dataset.classes == COMMON and dataset.name == FOUR
    assert (dataset.task, dataset.domain) == ("multilabel", "medical")
    assert dataset.labels.dtype == np.float32
    order = np.arange(4)
    np.random.RandomState(42).shuffle(order)
    assert [f"2_{i + 1}" for i in order] == SHUFFLED
    assert files(dataset, four.root) == [
        "CheXpert-v1.0/train/patient10000032/study1/view1_frontal.jpg",
        "CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg",
        f"mimic-cxr-jpg/2.0.0/files/{MIMIC_KEPT[1]}",
        f"mimic-cxr-jpg/2.0.0/files/{MIMIC_KEPT[0]}",
        *(f"NIH-ChestXRay-14/images/{n}.png" for n in ("00000002_000", "00000002_001")),
        "NIH-ChestXRay-14/images/10000032_000.png",
        *(f"PadChest/0/{name}.png" for name in SHUFFLED[:3]),
    ]
    expected = marks(
        *("0000000", "0..011."),
        *("0000000", "0..11.."),
        *("0000000", "0000100", "0000001"),
        *("0000000", "0000001", "0100000"),
    )
    np.testing.assert_array_equal(dataset.labels, expected)
    assert_grey(dataset)
    image, label = dataset[-1]
    assert torch.equal(image, dataset.read(9)) and label.tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_union_test_split(four):
    dataset = four.load(FOUR, "test", split_by="image")
    assert [path.split("/")[-1] for path in files(dataset, four.root)] == [
        "view1_frontal.jpg", MIMIC_ROWS[5][0] + ".jpg", "00000003_000.png", "2_3.png",
    ]  # fmt: skip
    expected = marks("0..011.", "..1....", "0000010", "0001000")
    np.testing.assert_array_equal(dataset.labels, expected)


def test_union_in_the_order_of_its_name(four):
    dataset = four.load("nih+chexpert")
    assert [path.split("/")[0] for path in files(dataset, four.root)] == (
        ["NIH-ChestXRay-14"] * 3 + ["CheXpert-v1.0"] * 2
    )
    assert dataset.classes == COMMON
    np.testing.assert_array_equal(
        dataset.labels, marks("0000000", "0000100", "0000001", "0000000", "0..011.")
    )
    assert_grey(dataset)


@pytest.mark.parametrize("name", ["chexpert+mimic+nih", "nih+padchest+mimic", "mimic+nih"])
def test_common_labels(four, name):
    assert four.load(name).classes == COMMON


def test_union_of_two_alike_keeps_all_13(four):
    dataset = four.load("chexpert+mimic")
    assert set(dataset.classes) == set(FINDINGS) and len(dataset.classes) == 13
    columns = [dataset.classes.index(name) for name in FINDINGS]
    expected = marks("0000000000000", "0..01.01101.1", "0000000000000", "0..1....10...")
    np.testing.assert_array_equal(dataset.labels[:, columns], expected)


ALL_LABELS = (
    *("Air Trapping", "Aortic Atheromatosis", "Aortic Elongation", "Atelectasis"),
    *("Bronchiectasis", "Cardiomegaly", "Consolidation", "Costophrenic Angle Blunting", "Edema"),
    *("Effusion", "Emphysema", "Enlarged Cardiomediastinum", "Fibrosis", "Flattened Diaphragm"),
    *("Fracture", "Granuloma", "Hemidiaphragm Elevation", "Hernia", "Hilar Enlargement"),
    *("Infiltration", "Lung Lesion", "Lung Opacity", "Mass", "Nodule", "Pleural Other"),
    *("Pleural_Thickening", "Pneumonia", "Pneumothorax", "Scoliosis", "Support Devices"),
    "Tuberculosis",
)


def test_union_of_all_labels(four):
    dataset = four.load(FOUR, labels="union", split_by="image")
    assert dataset.classes == ALL_LABELS
    expected = marks(
        "...0.00.00.0..0.....00..0.00.0.",
        "...0....01.1........01..0.1..1.",
        "...0.00.00.0..0.....00..0.00.0.",
        "...0....11..............0......",
        "...0.00.000.0....0.0..00.000...",
        "...0.00.010.0....1.0..00.100...",
        "...0.00.000.0....0.0..00.001...",
        "00000000000.00000000..00.000000",
        "00000000000.00000000..00.001100",
        "00000100000.00000000..00.000010",
    )
    np.testing.assert_array_equal(np.isnan(dataset.labels), np.isnan(expected))
    np.testing.assert_array_equal(dataset.labels, expected)


def test_union_of_three_keeps_20_labels(four):
    dataset = four.load("chexpert+mimic+nih", labels="union")
    expected = {*FINDINGS, *"Emphysema Fibrosis Hernia Infiltration Mass Nodule".split()}
    assert dataset.classes == tuple(sorted({*expected, "Pleural_Thickening"}))
    assert len(dataset.classes) == 20


def test_groups_of_different_sources_never_coincide(four):
    dataset = four.load(FOUR, split_by="image")
    groups = dataset.groups.tolist()
    assert len(groups) == 10
    sources = [groups[:2], groups[2:4], groups[4:7], groups[7:]]
    assert len({group for source in sources for group in source}) == sum(
        len(set(source)) for source in sources
    )
    # chexpert: two patients; mimic: one; nih 2, 2, 10000032; padchest 10000032, 2, 2.
    assert [len(set(source)) for source in sources] == [2, 1, 2, 2]
    assert groups[4] == groups[5] != groups[6] and groups[7] != groups[8] == groups[9]
    test = four.load(FOUR, "test", split_by="image").groups.tolist()
    assert test[0] == groups[1]  # one patient has one name in both splits
    assert test[3] == groups[8] and test[2] not in groups


def test_groups_of_a_source_without_patients(four):
    dataset = four.load("chexpert+synthetic-xray")
    assert dataset.classes == COMMON[:5] + COMMON[6:]
    assert len(set(dataset.groups.tolist())) == 2 + 8000


def test_union_options(four):
    dataset = four.load(FOUR)
    views = {"views": ["PA", "AP"]}
    padchest = {"views": ["PA", "AP", "AP Supine", "L", "COSTAL"], "split_by": "patient"}
    expected = {"labels": "intersection", "chexpert": views, "mimic": views, "padchest": padchest}
    assert dataset.options == expected
    dataset = four.load(FOUR, labels="union", split_by="image", views=["PA"])
    views = {"views": ["PA"]}
    padchest = views | {"split_by": "image"}
    expected = dict.fromkeys(["chexpert", "mimic", "nih"], views) | {"padchest": padchest}
    assert dataset.options == expected | {"labels": "union"}
    assert json.loads(json.dumps(dataset.options)) == dataset.options
    assert [path.split("/")[0] for path in files(dataset, four.root)][:2] == [
        "CheXpert-v1.0", "mimic-cxr-jpg",
    ]  # fmt: skip
    assert sum(dataset.dropped.values()) == 2 + 1  # laterals and AP of chexpert, AP of mimic


def test_union_takes_the_options_of_its_members():
    assert set(data.dataset_options("chexpert+padchest")) == {"labels", "views", "split_by"}
    assert set(data.dataset_options("chexpert+mimic")) == {"labels", "views"}
    assert set(data.dataset_options("chexpert")) == set(data.dataset_options("mimic")) == {"views"}


def test_union_takes_the_views_of_all_its_datasets(four):
    """The study's union of four: a view that one dataset does not know may be another's."""
    views = ["PA", "AP", "AP Supine", "L", "COSTAL"]
    name = "chexpert+mimic+nih+padchest"
    dataset = four.load(name, views=views, split_by="image")
    used = {part: dataset.options[part]["views"] for part in name.split("+")}
    assert used["chexpert"] == ["PA", "AP", "L"] and used["mimic"] == used["nih"] == ["PA", "AP"]
    assert used["padchest"] == views
    laterals = four.load("chexpert", views=["L"])
    assert (
        len(dataset) == len(four.load(name, split_by="image")) + len(laterals) > len(laterals) > 0
    )


def test_union_refuses_options(four):
    call = partial(four.load, "chexpert+mimic")
    refuses(ValueError, partial(call, split_by="image"), "split_by", "labels", "views")
    refuses(ValueError, partial(call, labels="all"), "--labels all", "intersection", "union")
    refuses(ValueError, partial(call, views=["L"]), four.tables["metadata"], "['L']", "LATERAL")
    refuses(ValueError, partial(four.load, "chexpert", labels="union"), "chexpert", "labels")


@pytest.mark.parametrize(
    "name", ["chexpert+chexpert", "chexpert+mimic+chexpert", "chexpert@6+chexpert", "mimic@6+mimic"]
)
def test_union_refuses_a_source_twice(four, capsys, name):
    if "@" in name:
        assert data.main(["pack", name[: name.index("@")], "--size", "6", *four_args(four)]) == 0
    refuses(ValueError, partial(four.load, name), name, "twice")


def four_args(trees):
    return ["--data-dir", str(trees.root)]


def test_union_refuses_a_multi_class_source(four):
    name = "chexpert+synthetic-natural"
    refuses(ValueError, partial(four.load, name), name, "synthetic-natural is not multi-label")
    for split in ("train", "test"):
        for cls in ("a", "b"):
            save(four.root / "own" / split / cls / "1.png", four.noise(10, 12))
    name = f"nih+folder:{four.root / 'own'}"
    refuses(ValueError, partial(four.load, name), name, "not multi-label")


def test_union_with_a_pack(four, capsys):
    whole = four.load("chexpert+nih", labels="union")
    assert data.main(["pack", "nih", "--size", "6", "--workers", "1", *four_args(four)]) == 0
    dataset = four.load("chexpert+nih@6", labels="union")
    assert dataset.classes == whole.classes
    np.testing.assert_array_equal(dataset.labels, whole.labels)
    assert dataset.groups.tolist() == whole.groups.tolist()
    assert [tuple(dataset.read(i).shape) for i in (0, 2)] == [(1, 10, 12), (1, 6, 6)]


def test_union_refuses_sources_without_a_common_label(four, capsys):
    """A pack may name its own labels: of the datasets known by name all share some."""
    assert data.main(["pack", "nih", "--size", "6", "--workers", "1", *four_args(four)]) == 0
    path = four.root / "nih@6" / "pack.json"
    facts = json.loads(path.read_text())
    assert facts["classes"][0] == "Atelectasis" and len(facts["classes"]) == 14
    facts = facts | {"classes": [f"finding {i}" for i in range(14)]}
    del facts["crc32"]
    facts["crc32"] = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    path.write_text(json.dumps(facts))
    name = "chexpert+nih@6"
    refuses(ValueError, partial(four.load, name), name, "no label is common", "--labels union")
    assert len(four.load(name, labels="union").classes) == 27


def test_union_names_the_bad_table_of_a_member(four):
    write(four.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, ["1,2" + ",3" * 14]))
    refuses(ValueError, partial(four.load, FOUR), f"{four.tables['chexpert']}, line 2", "'3'")
    refuses(ValueError, partial(four.load, "chexpert+mimmic"), "'mimmic'", "did you mean 'mimic'")


# ------------------------------------------------------------------------------------------------
# Tables: what is legal is read rightly
# ------------------------------------------------------------------------------------------------

TABLES = ("train", "metadata", "split", "chexpert")
NAME = {"train": "chexpert", "metadata": "mimic", "split": "mimic", "chexpert": "mimic"}


def noted(note):
    """A new first column of that text in each row."""

    def change(text):
        header, *rows = text.splitlines()
        return lines(f"Note,{header}", [f"{note},{row}" for row in rows])

    return change


def rewritten(change_rows=list, **dialect):
    """The same table, its list of rows changed, by the csv module's writer."""

    def change(text):
        out = io.StringIO()
        writer = csv.writer(out, **{"lineterminator": "\n"} | dialect)
        writer.writerows(change_rows(csv.reader(text.splitlines())))
        return out.getvalue()

    return change


LEGAL = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "BOM, CRLF, quotes": lambda text: "\ufeff" + rewritten(quoting=1)(text).replace("\n", "\r\n"),
    "no last line end": lambda text: text.rstrip("\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n") + "\n\n",
    "blank lines, CRLF": lambda text: text.replace("\n", "\r\n\r\n"),
    "blank lines first": lambda text: "\n\r\n" + text,
    "lines of blanks": lambda text: text.replace("\n", "\n  \n\t\n"),
    "all quoted": rewritten(quoting=csv.QUOTE_ALL),
    "quoted commas": noted('"CHEST (PA, LAT), 2 views"'),
    "quoted quotes": noted('"a ""b"", c"'),
    "quoted line ends": noted('"a\nb"'),
    "quoted CRLF": lambda text: noted('"a\r\nb"')(text).replace("\n", "\r\n"),
    "quoted blank lines": noted('"a\n\nb, c\n"'),
    "not ASCII": noted("Zoë 𝄞 読影"),
    "a long text": noted('"' + "long, " * 10000 + '"'),
    "hashes": noted("# 1"),
    "columns in another order": rewritten(lambda rows: [row[::-1] for row in rows]),
    "an unknown column twice": lambda text: noted("1")(noted("2")(text)),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("change", LEGAL.values(), ids=LEGAL)
def test_legal(tables, table, change):
    path = tables.tables[table]
    write(path, change(read(path)))
    check = {"chexpert": assert_chexpert_train, "mimic": assert_mimic_train}[NAME[table]]
    check(tables.load(NAME[table], verify=False), tables)


def test_several_gzip_members(tables):
    """As `cat` joins them."""
    path = tables.tables["metadata"]
    content = read(path).encode()
    path.write_bytes(gzip.compress(content[:300]) + gzip.compress(content[300:]))
    assert_mimic_train(tables.load("mimic", verify=False), tables)


BIG = 20_000


def big_table(tables, spoil=()):
    """CheXpert's train.csv of many rows, some with line ends in quotes; spoil: {row: texts}."""
    rows = []
    for i in range(BIG):
        note = '"a\nb"' if 8180 < i < 8200 else "F"
        findings = ",".join(["", "1.0", *("1", "0", "-1", "")[i % 4 : i % 4 + 1], *[""] * 11])
        row = f"CheXpert-v1.0/train/patient{i + 1:05d}/study1/view1_frontal.jpg,{note},1,Frontal,"
        rows.append(row + ("PA" if i % 5 else "LL") + "," + findings)
    for i, (old, new) in dict(spoil).items():
        assert old in rows[i]
        rows[i] = rows[i].replace(old, new)
    write(tables.tables["train"], lines(CHEXPERT_HEADER, rows))


def test_many_rows(tables):
    big_table(tables)
    dataset = tables.load("chexpert", verify=False, views=["PA", "LL"])
    assert dataset.groups.tolist() == list(range(1, BIG + 1))
    cardiomegaly = dataset.labels[:, 1]
    expected = np.tile(np.array([1, 0, np.nan, np.nan], np.float32), BIG // 4)
    np.testing.assert_array_equal(cardiomegaly, expected)
    assert (dataset.labels[:, 4] == 1).all() and np.isnan(dataset.labels[:, 5:]).all()
    assert len(tables.load("chexpert", verify=False)) == BIG * 4 // 5


@pytest.mark.parametrize(
    "row, line",
    [(0, 2), (8180, 8182), (8191, 8204), (8192, 8206), (8193, 8208), (16383, 16404), (16384, 16405)]
    + [(BIG - 1, BIG + 20)],
)
def test_the_line_of_a_bad_row_of_many(tables, row, line):
    """The 19 rows whose text holds a line end take two lines; their marks stand on the second."""
    big_table(tables, {row: (",1.0", ",2.0")})
    words = f"{tables.tables['train']}, line {line}:", "Enlarged Cardiomediastinum '2.0'"
    refuses(ValueError, partial(tables.load, "chexpert", verify=False), *words)


# ------------------------------------------------------------------------------------------------
# Tables: what is not legal is named
# ------------------------------------------------------------------------------------------------


def refused(tables, table, *words):
    refuses(ValueError, partial(tables.load, NAME[table]), tables.tables[table], *words)


def change_lines(tables, table, change):
    """change: a function of the list of lines (line 1 is the header) that changes it."""
    texts = read(tables.tables[table]).splitlines()
    change(texts)
    write(tables.tables[table], "\n".join(texts) + "\n")


@pytest.mark.parametrize(
    "table, column",
    [
        *(("train", column) for column in ("Path", "Frontal/Lateral", "AP/PA", "No Finding")),
        *(("train", column) for column in ("Pleural Effusion", "Support Devices")),
        *(("metadata", column) for column in ("dicom_id", "subject_id", "ViewPosition")),
        *(("split", column) for column in ("dicom_id", "split")),
        *(("chexpert", column) for column in ("study_id", "subject_id", "No Finding", "Fracture")),
    ],
)
def test_missing_and_doubled_columns(tables, table, column):
    header, *rows = read(tables.tables[table]).splitlines()
    place = header.split(",").index(column)
    names = header.split(",")
    write(tables.tables[table], lines(",".join([*names[:place], "x", *names[place + 1 :]]), rows))
    refused(tables, table, "no column", repr(column), "only: ", names[place - 1], "mend")
    doubled = ",".join([*names, column])
    write(tables.tables[table], lines(doubled, [row + ",1" for row in rows]))
    refused(tables, table, "2 columns", repr(column), "keep one")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(tables, table, delimiter):
    write(tables.tables[table], read(tables.tables[table]).replace(",", delimiter))
    refused(tables, table, "no column", "separated by commas")


@pytest.mark.parametrize("table", TABLES)
def test_other_delimiters_beside_commas(tables, table):
    """A comma in a text must not hide that the table's delimiter is another."""
    text = noted("1,5")(read(tables.tables[table]).replace(",", ";"))
    write(tables.tables[table], text.replace("Note,", "Note;"))
    refused(tables, table, "columns")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("line", [2, 3, 5])
def test_short_and_long_rows(tables, table, line):
    header, *_ = text = read(tables.tables[table]).splitlines()
    columns = header.count(",") + 1
    rows = [*text]
    rows[line - 1] = rows[line - 1].rpartition(",")[0]
    write(tables.tables[table], "\n".join(rows) + "\n")
    refused(tables, table, f", line {line}:", f"{columns - 1} columns", f"has {columns}")
    rows = [*text]
    rows[line - 1] += ",1"
    write(tables.tables[table], "\n".join(rows) + "\n")
    refused(tables, table, f", line {line}:", f"{columns + 1} columns", f"has {columns}")


@pytest.mark.parametrize("table", TABLES)
def test_all_rows_longer_than_the_header(tables, table):
    header, *rows = read(tables.tables[table]).splitlines()
    write(tables.tables[table], lines(header, [f"{i},{row}" for i, row in enumerate(rows)]))
    refused(tables, table, ", line 2:", f"{header.count(',') + 2} columns")


@pytest.mark.parametrize(
    "text",
    ["2", "yes", "-2", "1.5", "nan", " 1", "1 ", "+1", "01", "True", "-1.00000000", "é", "?"],
)
@pytest.mark.parametrize(
    "table, column",
    [("train", "Edema"), ("train", "No Finding"), ("train", "Support Devices")]
    + [("chexpert", "Atelectasis"), ("chexpert", "No Finding"), ("chexpert", "Pneumothorax")],
)
def test_unknown_marks(tables, table, column, text):
    def change(rows):
        fields = rows[3].split(",")
        fields[rows[0].split(",").index(column)] = text
        rows[3] = ",".join(fields)

    change_lines(tables, table, change)
    refused(tables, table, ", line 4:", f"{column} {text!r} must be 1, 0, -1 or blank")


@pytest.mark.parametrize(
    "table, column, text, must",
    [
        ("metadata", "subject_id", "p10000032", "whole number"),
        ("metadata", "subject_id", "", "whole number"),
        ("metadata", "study_id", "s50414267", "whole number"),
        ("metadata", "study_id", "50414267.5", "whole number"),
        ("metadata", "study_id", "-50414267", "whole number"),
        ("metadata", "dicom_id", "x" * 256, "256 bytes"),
        ("metadata", "ViewPosition", "P" * 300, "256 bytes"),
        ("chexpert", "subject_id", "ten", "whole number"),
        ("chexpert", "study_id", "", "whole number"),
        ("chexpert", "study_id", "50414267.5", "whole number"),
        ("chexpert", "study_id", "9" * 30, "whole number"),
        ("split", "split", "validation", "be one of train, validate, test"),
        ("split", "split", "", "be one of train, validate, test"),
        ("split", "split", "Train", "be one of train, validate, test"),
        ("split", "split", "train" + " " * 40, "be one of train, validate, test"),
    ],
)
def test_unknown_texts(tables, table, column, text, must):
    def change(rows):
        fields = rows[2].split(",")
        fields[rows[0].split(",").index(column)] = text
        rows[2] = ",".join(fields)

    change_lines(tables, table, change)
    refused(tables, table, ", line 3:", f"{column} {text!r} must", must)


@pytest.mark.parametrize("text", ["frontal", "", "AP"])
def test_a_side_that_is_neither_frontal_nor_lateral(tables, text):
    """It would be taken for a lateral image, and left out unseen."""
    write(tables.tables["train"], read(tables.tables["train"]).replace("Frontal,PA", f"{text},PA"))
    refused(tables, "train", ", line 6:", f"Frontal/Lateral {text!r}", "Frontal, Lateral")


@pytest.mark.parametrize("start", ["", "\n", "\r\n\r\n", "  \n", "\ufeff"])
@pytest.mark.parametrize("between", ["", "\n", "   \n", "\t\r\n"])
@pytest.mark.parametrize("table", ["train", "chexpert"])
def test_blank_lines_count(tables, table, start, between):
    """A line number is the editor's, whatever lines were passed over."""
    header, *rows = read(tables.tables[table]).splitlines()
    rows[1] = rows[1].rpartition(",")[0] + ",2"
    write(tables.tables[table], start + f"{header}\n{between}" + "\n".join(rows) + "\n")
    line = 3 + start.count("\n") + between.count("\n")
    refused(tables, table, f", line {line}:", "Support Devices '2' must be 1, 0, -1 or blank")


@pytest.mark.parametrize("table", TABLES)
def test_an_open_quote(tables, table):
    def change(rows):
        rows[2] = '"' + rows[2]

    change_lines(tables, table, change)
    refused(tables, table, ", line ", "columns")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("bad", ["Zo\xeb".encode("latin-1"), b"\xff", "é".encode()[:1]])
def test_not_utf8(tables, table, bad):
    path = tables.tables[table]
    column = {"train": "AP/PA", "chexpert": "Edema"}.get(table, "dicom_id")
    header, *rows = read(path).splitlines()
    fields = rows[2].split(",")
    fields[header.split(",").index(column)] = "@"
    rows[2] = ",".join(fields)
    write(path, lines(header, rows).encode().replace(b"@", bad))
    must = "1, 0, -1 or blank" if table == "chexpert" else "UTF-8"
    refused(tables, table, ", line 4:", column, must)


@pytest.mark.parametrize("table", TABLES)
def test_not_utf8_header(tables, table):
    path = tables.tables[table]
    write(path, noted("1")(read(path)).encode().replace(b"Note", b"\xff"))
    refused(tables, table, "utf-8", "mend")


@pytest.mark.parametrize("table", TABLES)
def test_utf16(tables, table):
    write(tables.tables[table], read(tables.tables[table]).encode("utf-16"))
    refused(tables, table, "utf-8")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "  \r\n"])
def test_empty_table(tables, table, content):
    write(tables.tables[table], content)
    refused(tables, table, "fetch it again")


def test_empty_gzip_file(tables):
    tables.tables["split"].write_bytes(b"")
    refused(tables, "split", "fetch it again")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("end", ["\n", "", "\n\n\r\n"])
def test_header_only(tables, table, end):
    header = read(tables.tables[table]).splitlines()[0]
    write(tables.tables[table], header + end)
    refused(tables, table, "no row below its header", "fetch it again")


@pytest.mark.parametrize("table", TABLES[1:])
@pytest.mark.parametrize("left", [5, 40, 0.5, -1, -8, -9])
def test_cut_gzip(tables, table, left):
    path = tables.tables[table]
    content = path.read_bytes()
    left = int(left * len(content)) if isinstance(left, float) else left
    path.write_bytes(content[:left])
    refused(tables, table, "line", "ended", "mend")


@pytest.mark.parametrize("table", TABLES[1:])
def test_damaged_gzip(tables, table):
    path = tables.tables[table]
    content = bytearray(path.read_bytes())
    # Its checksum, its text, and (byte 10) a kind of block that there is not.
    for place in (len(content) - 6, len(content) // 2, 10):
        flipped = 255 if place == 10 else content[place] ^ 255
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        refused(tables, table, "line", "mend")
    path.write_bytes(gzip.decompress(content))
    refused(tables, table, "ot a gzipped file", "mend")


def test_a_long_gzip_file_is_cut(tables):
    """The last whole line is named, not the first of the file."""
    rows = [(f"{i:08x}-{i * 2654435761 % 2**32:08x}", 11000000 + i, 50000000 + i, "PA", "train")
            for i in range(40000)]  # fmt: skip
    text = [f"{row[0]},{row[2]},{row[1]},train" for row in rows]
    write(tables.tables["split"], lines(SPLIT_HEADER, text))
    content = tables.tables["split"].read_bytes()
    tables.tables["split"].write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError) as caught:
        tables.load("mimic")
    line = int(str(caught.value).split("line ")[1].split()[0])
    assert 20000 < line < 34000


@pytest.mark.parametrize("table", TABLES)
def test_one_line_on_the_command_line(tables, capfd, table):
    change_lines(tables, table, lambda rows: rows.__setitem__(3, rows[3] + ",2"))
    assert data.main(["info", NAME[table], "--data-dir", str(tables.root)]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {tables.tables[table]}, line 4: ") and err.count("\n") == 1


def test_info_on_the_command_line(four, capfd):
    args = ["info", "chexpert+mimic+nih", "--views", "PA", "--labels", "union"]
    assert data.main([*args, "--data-dir", str(four.root)]) == 2  # no AP in the validation sets
    out, err = capfd.readouterr()
    assert "no image of the test split" in err and "PA" in err and err.count("\n") == 1
    assert data.main(["info", "chexpert+mimic+nih", "--data-dir", str(four.root)]) == 0
    out, err = capfd.readouterr()
    assert "chexpert+mimic+nih: medical, multilabel, 7 classes" in out
    row = next(line for line in out.splitlines() if line.startswith("| Effusion"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["3", "0", "1", "1"]
