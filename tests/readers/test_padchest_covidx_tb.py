"""PadChest, COVIDx and Tuberculosis in their official layouts; views, splits and parts of a set.

Expected values are typed by hand, or computed with numpy's RandomState, which the study used.
"""

import csv
import gzip
import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses
from PIL import Image
from trees import save

import data
from data import load_dataset


def names(dataset):
    """The file name of each image, in the dataset's order."""
    return [Path(dataset.where(i)).name for i in range(len(dataset))]


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


# ------------------------------------------------------------------------------------------------
# PadChest
# ------------------------------------------------------------------------------------------------

PADCHEST_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
# The first column, pandas' row number, has no name.
PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,"
    "PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,PixelAspectRatio_DICOM,"
    "SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
    "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
).split(",")
PADCHEST_DEFAULTS = {
    "": "7",
    "ImageDir": "0",
    "StudyDate_DICOM": "20140915",
    "StudyID": "20536686640136348236148679891455886468",
    "PatientBirth": "1930.0",
    "PatientSex_DICOM": "F",
    "ViewPosition_DICOM": "POSTEROANTERIOR",
    "MethodProjection": "Manual review of DICOM fields",
    "Pediatric": "No",
    "Modality_DICOM": "DX",
    "Manufacturer_DICOM": "GMM, Móstoles",
    "PhotometricInterpretation_DICOM": "MONOCHROME2",
    "PixelAspectRatio_DICOM": "['1', '1']",
    "BitsStored_DICOM": "14.0",
    "ReportID": "4765777",
    # Other findings than those of Labels stand in the other columns.
    "Report": 'sin hallazgos , "cardiomegaly" , neumonía . pacemaker',
    "MethodLabel": "Physician",
    "Localizations": "['loc right', 'loc basal', 'scoliosis']",
    "LabelsLocalizationsBySentence": "[['hernia', 'loc right'], ['normal']]",
    # numpy's own print of an array breaks the line at 75 characters.
    "labelCUIS": "['C0742855' 'C0024115' 'C0006267' 'C0000001' 'C0000002' 'C0000003'\n 'C0034069']",
    "LocalizationsCUIS": "['C0444532' 'C1282378']",
}
PADCHEST_CLASSES = (
    *("Air Trapping", "Aortic Atheromatosis", "Aortic Elongation", "Atelectasis"),
    *("Bronchiectasis", "Cardiomegaly", "Consolidation", "Costophrenic Angle Blunting", "Edema"),
    *("Effusion", "Emphysema", "Fibrosis", "Flattened Diaphragm", "Fracture", "Granuloma"),
    *("Hemidiaphragm Elevation", "Hernia", "Hilar Enlargement", "Infiltration", "Mass", "Nodule"),
    *("Pleural_Thickening", "Pneumonia", "Pneumothorax", "Scoliosis", "Support Devices"),
    "Tuberculosis",
)
STUDY_VIEWS = ["PA", "AP", "AP Supine", "L", "COSTAL"]
# The end of each; all but the last begin with 21684011136696401.
BROKEN_ENDS = """
    2819207061112010307142602253_04-014-084 2989926673512011074122523403_00-163-058
    2959786098432011033083840143_00-176-115 2558082906712009327122220177_00-102-064
    2339356563862009072111404053_00-043-192 3076187734852011291090445391_00-196-188
    2373310883942009117084022290_00-064-025 2283393834152009033102258826_00-059-087
    2373310883942009170084120009_00-097-074 2819207061112010315104455352_04-024-184
    3829543166512013353113303615_02-092-190 2904401302362010337093236130_03-198-079
    2904401302362010336141343749_03-198-010 2989926673512011151082430686_00-157-045
    2989926673512011083134050913_00-168-009 2373310883942009077082646386_00-047-124
    3686042548532013208193054515_02-026-007 3962490064942014134093945580_01-178-104
    2819207061112010281134410801_00-129-131 3590140476722013043111952381_02-065-198
    2283393834152009027091819347_00-007-136 2373310883942009152114636712_00-102-045
    2283393834152009033140208626_00-059-118 3590140476722013058110301622_02-056-111
    2487858717522009280135853083_00-075-001 3590140476722013049100117076_02-063-097
    3649110343042013092101343018_02-075-146 2819207061112010306085429121_04-020-102
    2373310883942009180082307973_00-097-011
""".split()
BROKEN = [
    *(f"21684011136696401{end}.png" for end in BROKEN_ENDS),
    "269300710246070740096540277379121868595_e7zsan.png",
]


def patient(number):
    """36 digits, of which floating point and 64 bits would lose the last ones."""
    return f"8398604886942923316379882356814609{number:02d}"


def padchest_row(name, number=0, projection="PA", labels="['normal']", **others):
    row = {"ImageID": name, "PatientID": patient(number), "Projection": projection}
    return PADCHEST_DEFAULTS | row | {"Labels": labels} | others


def write_padchest(root, rows, header=PADCHEST_HEADER):
    """The table in root/PadChest; returns its path."""
    table = root / "PadChest" / PADCHEST_TABLE
    table.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(table, "wt", encoding="utf-8", newline="", compresslevel=1) as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return table


LABELS = [
    ("['normal']", set()),
    ("['cardiomegaly', 'pleural effusion']", {"Cardiomegaly", "Effusion"}),
    ("['pacemaker', 'chronic changes']", {"Support Devices"}),
    ("['COPD signs', 'air bronchogram']", {"Consolidation", "Infiltration"}),
    ("['scoliosis']", {"Scoliosis"}),
]


class PadChest:
    """48 images of 24 patients, 4 of them dropped, and 30 broken ones of 30 other patients.

    rows: the table. kept: rows that the study keeps, in the table's order. found: {name: classes}.
    pixels: {name: array}; what is dropped has no file.
    """

    def __init__(self, root):
        self.root, self.folder = root, root / "PadChest"
        images = [(number, i) for number in range(24) for i in range(1 + number % 3)]
        self.kept, self.found, dropped = [], {}, []
        for k, (number, i) in enumerate(images):
            name = f"2168401113669640129593565638620090411227{k:05d}_00-155-{k:03d}.png"
            labels, classes = LABELS[k % len(LABELS)]
            projection = ["PA", "L", "AP_horizontal", "AP", "COSTAL", "AP Supine"][k % 6]
            # The last image of patients 2, 5, 8 and 11, who have others.
            changes = {2: ("UNK", labels), 5: ("EXCLUDE", ""), 8: ("UNK", labels), 11: ("PA", "")}
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
        self.table = write_padchest(root, self.rows)
        rng = np.random.default_rng(0)
        shapes = {row["ImageID"]: (4 + k % 2, 6) for k, row in enumerate(self.kept)}
        self.pixels = {
            name: rng.integers(2**16, size=shape).astype(np.uint16)
            for name, shape in shapes.items()
        }
        for row in self.kept:
            save(self.folder / row["ImageDir"] / row["ImageID"], self.pixels[row["ImageID"]])

    def load(self, split="train", **options):
        return load_dataset("padchest", self.root, split, **options)

    def both(self, **options):
        return [self.load(split, **options) for split in ("train", "test")]

    def column(self, name, rows=None):
        return [row[name] for row in (self.kept if rows is None else rows)]

    def study_split(self, kept=None):
        """(train rows, test rows) of the study."""
        kept = self.kept if kept is None else kept
        order, count = study_order(len(kept)), int(0.9 * len(kept))
        return [kept[i] for i in order[:count]], [kept[i] for i in order[count:]]


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    return PadChest(tmp_path_factory.mktemp("padchest"))


def test_padchest_layout(chests):
    assert len(PADCHEST_HEADER) == 36 and len(set(BROKEN)) == 30 and len(chests.kept) == 44
    for dataset in chests.both():
        assert dataset.name == "padchest" and dataset.classes == PADCHEST_CLASSES
        assert (dataset.task, dataset.domain, dataset.size) == ("multilabel", "medical", None)
        assert dataset.labels.dtype == np.float32 and set(np.unique(dataset.labels)) == {0, 1}
        assert dataset.labels.shape == (len(dataset), 27)


@pytest.mark.parametrize("split_by", ["patient", "image"])
def test_padchest_labels_and_groups_belong_to_the_image(chests, split_by):
    train, test = chests.both(split_by=split_by)
    assert found(train) | found(test) == chests.found
    owners = dict(zip(names(train) + names(test), groups(train) + groups(test)))
    assert owners == dict(zip(chests.column("ImageID"), chests.column("PatientID")))


@pytest.mark.parametrize("split_by", ["patient", "image"])
def test_padchest_pixels_are_16_bit_in_the_named_folders(chests, split_by):
    folders = dict(zip(chests.column("ImageID"), chests.column("ImageDir")))
    assert set(folders.values()) == {"0", "27", "54"}
    for dataset in chests.both(split_by=split_by):
        for i, name in enumerate(names(dataset)):
            assert dataset.where(i) == str(chests.folder / folders[name] / name)
            image, deep = dataset.read(i), chests.pixels[name].astype(int)
            assert image.dtype == torch.uint8
            np.testing.assert_array_equal(image, [(deep + 128) // 257])


@pytest.mark.parametrize("column", [True, False])
def test_padchest_images_beside_the_table(tmp_path, column):
    header = [name for name in PADCHEST_HEADER if column or name != "ImageDir"]
    rows = [padchest_row(f"{k}.png", k, ImageDir="3") for k in range(10)]
    table = write_padchest(tmp_path, rows, header)
    for k in range(10):
        save(table.parent / f"{k}.png", np.full((2, 3), 257 * k, np.uint16))
    train, test = (load_dataset("padchest", tmp_path, split) for split in ("train", "test"))
    assert sorted(names(train) + names(test)) == [f"{k}.png" for k in range(10)]
    for i in range(9):
        assert train.read(i).unique().tolist() == [int(names(train)[i][0])]
    assert test.where(0) == str(table.parent / names(test)[0])


# All but the last lines are one finding each of the real table, beside the classes' own names.
TEXTS = {
    **{f"['{cls.lower()}']": {cls} for cls in PADCHEST_CLASSES},
    "['consolidation']": {"Consolidation", "Infiltration"},
    # Synonyms.
    "['infiltrates']": {"Infiltration"},
    "['interstitial pattern']": {"Infiltration"},
    "['ground glass pattern']": {"Infiltration"},
    "['reticular interstitial pattern']": {"Infiltration"},
    "['reticulonodular interstitial pattern']": {"Infiltration"},
    "['alveolar pattern']": {"Infiltration"},
    "['air bronchogram']": {"Consolidation", "Infiltration"},
    "['pleural thickening']": {"Pleural_Thickening"},
    "['adenopathy']": {"Hilar Enlargement"},
    "['pulmonary artery enlargement']": {"Hilar Enlargement"},
    "['electrical device']": {"Support Devices"},
    "['pacemaker']": {"Support Devices"},
    # Names within longer ones.
    "['pleural effusion']": {"Effusion"},
    "['loculated fissural effusion']": {"Effusion"},
    "['apical pleural thickening']": {"Pleural_Thickening"},
    "['laminar atelectasis']": {"Atelectasis"},
    "['supra aortic elongation']": {"Aortic Elongation"},
    "['vascular hilar enlargement']": {"Hilar Enlargement"},
    "['calcified mediastinal adenopathy']": {"Hilar Enlargement"},
    "['calcified granuloma']": {"Granuloma"},
    "['hydropneumothorax']": {"Pneumothorax"},
    "['pseudonodule']": {"Nodule"},
    "['multiple nodules']": {"Nodule"},
    "['soft tissue mass']": {"Mass"},
    "['subcutaneous emphysema']": {"Emphysema"},
    "['atypical pneumonia']": {"Pneumonia"},
    "['pulmonary edema']": {"Edema"},
    "['hiatal hernia']": {"Hernia"},
    "['callus rib fracture']": {"Fracture"},
    "['pulmonary fibrosis']": {"Fibrosis"},
    "['dual chamber device']": {"Support Devices"},
    "['tuberculosis sequelae']": {"Tuberculosis"},
    # What only looks like them.
    "['fissure thickening']": set(),
    "['calcified pleural plaques']": set(),
    "['fibrotic band']": set(),
    "['hilar congestion']": set(),
    "['mediastinal enlargement']": set(),
    "['pulmonary artery hypertension']": set(),
    "['aortic button enlargement']": set(),
    "['mastectomy']": set(),
    "['pneumoperitoneo']": set(),
    "['pneumomediastinum']": set(),
    "['central venous catheter via jugular vein']": set(),
    "['diaphragmatic eventration']": set(),
    "['COPD signs']": set(),
    "['kyphosis']": set(),
    "['air', 'trapping', 'infiltrate', 'pleural', 'thickening']": set(),
    "[]": set(),
    # Several.
    "['normal', 'pleural effusion']": {"Effusion"},
    "['infiltrates', 'infiltrates', 'Scoliosis']": {"Infiltration"},
    "['costophrenic angle blunting', 'chronic changes', 'consolidation', 'granuloma', 'mass']": {
        *("Costophrenic Angle Blunting", "Consolidation", "Infiltration", "Granuloma", "Mass")
    },
}


def test_padchest_findings_by_text(tmp_path):
    rows = [padchest_row(f"{k}.png", k, labels=text) for k, text in enumerate(TEXTS)]
    write_padchest(tmp_path, rows)
    marks = {}
    for split in ("train", "test"):
        marks |= found(load_dataset("padchest", tmp_path, split, verify=False))
    assert {text: marks[f"{k}.png"] for k, text in enumerate(TEXTS)} == TEXTS


def test_padchest_patients_stay_on_one_side(chests):
    train, test = chests.both()
    assert not set(groups(train)) & set(groups(test))
    assert (len(set(groups(train))), len(set(groups(test)))) == (21, 3)  # int(0.9 x 24) of 24
    assert len(train) + len(test) == 44
    kept = chests.column("ImageID")
    for dataset, again in zip((train, test), chests.both(split_by="patient")):
        places = [kept.index(name) for name in names(dataset)]
        assert places == sorted(places)  # the table's order
        assert names(again) == names(dataset)
        assert again.options == dataset.options


def test_padchest_patient_split_is_the_studys_shuffle_of_sorted_patients(chests):
    known = sorted(set(chests.column("PatientID")))
    train = {known[i] for i in study_order(24)[:21]}
    for dataset, inside in zip(chests.both(), (True, False)):
        expected = [row for row in chests.kept if (row["PatientID"] in train) == inside]
        assert names(dataset) == chests.column("ImageID", expected)


def test_padchest_image_split_is_the_studys(chests):
    parts = chests.study_split()
    assert [len(part) for part in parts] == [39, 5]  # int(39.6)
    for dataset, part in zip(chests.both(split_by="image"), parts):
        assert names(dataset) == chests.column("ImageID", part)  # in the shuffled order
        assert groups(dataset) == chests.column("PatientID", part)
    owners = [set(chests.column("PatientID", part)) for part in parts]
    assert owners[0] & owners[1]


def test_padchest_drops_in_order_and_counts(chests):
    train, test = chests.both(split_by="image")
    assert not set(names(train) + names(test)) & set(BROKEN)
    for dataset in (train, test, *chests.both()):
        views, labels, broken = dataset.dropped.items()
        # An image that is left out for two reasons counts for the first.
        assert views == ("views other than PA, AP, AP Supine, L, COSTAL", 4)
        assert labels == ("no labels", 2)
        assert broken == ("known broken", 28)


def test_padchest_drops_each_broken_name(tmp_path):
    near = [name.replace(".png", "0.png") for name in BROKEN]
    rows = [padchest_row(name, k % 50) for k, name in enumerate([*BROKEN, *near])]
    write_padchest(tmp_path, rows)
    kept = []
    for split in ("train", "test"):
        dataset = load_dataset("padchest", tmp_path, split, verify=False, split_by="image")
        assert dataset.dropped["known broken"] == 30
        kept += names(dataset)
    assert sorted(kept) == sorted(near)


def test_padchest_options_are_recorded(chests):
    for dataset in chests.both():
        assert dataset.options == {"views": STUDY_VIEWS, "split_by": "patient"}
    for dataset in chests.both(views=("L", "PA"), split_by="image"):
        assert dataset.options == {"views": ["L", "PA"], "split_by": "image"}


@pytest.mark.parametrize(
    "views, projections",
    [
        (["PA"], {"PA"}),
        (["AP Supine"], {"AP Supine", "AP_horizontal"}),
        (["L", "AP"], {"AP", "L"}),
        (["COSTAL", "UNK"], {"COSTAL", "UNK"}),
    ],
)
def test_padchest_views(chests, views, projections):
    kept = [row for row in chests.rows if row["Projection"] in projections]
    other = len(chests.rows) - len(kept)
    kept = [row for row in kept if row["Labels"] and row["ImageID"] not in BROKEN]
    assert 6 < len(kept) < 20
    # The positions that are shuffled are those of the rows that are left.
    parts = chests.study_split(kept)
    for dataset, part in zip(chests.both(views=views, split_by="image", verify=False), parts):
        assert names(dataset) == chests.column("ImageID", part)
        assert list(dataset.dropped.items())[0] == (f"views other than {', '.join(views)}", other)


def test_padchest_default_views(chests):
    kept = {*chests.column("Projection")}
    assert kept == {"PA", "AP", "AP Supine", "AP_horizontal", "L", "COSTAL"}
    default, named = chests.load(), chests.load(views=STUDY_VIEWS)
    assert names(named) == names(default) and named.dropped == default.dropped


def test_padchest_refuses_views_and_splits(chests):
    call = partial(partial, chests.load)
    words = (chests.table, "--views", "known:", "AP Supine")
    refuses(ValueError, call(views=["PA", "LATERAL"]), "'LATERAL'", *words)
    # The real table's word for it is no view of its own.
    refuses(ValueError, call(views=["AP_horizontal"]), "'AP_horizontal'", *words)
    refuses(ValueError, call(views=[]), *words)
    refuses(ValueError, call(split_by="study"), "--split-by study", "patient or image")
    refuses(ValueError, call(labels="union"), "padchest", "labels", "views, split_by")


def test_padchest_long_table(tmp_path):
    """Cells of two lines wherever a reader that goes in pieces may cut."""
    rows = [padchest_row(f"{k:05d}.png", k % 100) for k in range(20_000)]
    write_padchest(tmp_path, rows)
    order = study_order(20_000)
    train, test = (
        load_dataset("padchest", tmp_path, split, verify=False, split_by="image")
        for split in ("train", "test")
    )
    assert names(train) == [f"{k:05d}.png" for k in order[:18_000]]
    assert names(test) == [f"{k:05d}.png" for k in order[18_000:]]
    assert groups(test) == [patient(k % 100) for k in order[18_000:]]


def test_padchest_missing_parts(tmp_path):
    call = partial(load_dataset, "padchest", tmp_path)
    folder = tmp_path / "PadChest"
    refuses(FileNotFoundError, call, f"no {folder / PADCHEST_TABLE}", "--data-dir")
    rows = [padchest_row(f"{k}.png", k, ImageDir=str(k % 2)) for k in range(20)]
    write_padchest(tmp_path, rows)
    for row in rows[2:]:
        save(folder / row["ImageDir"] / row["ImageID"], np.zeros((2, 2), np.uint16))
    parts = [load_dataset("padchest", tmp_path, s, verify=False) for s in ("train", "test")]
    for split, dataset in zip(("train", "test"), parts):
        lost = [i for i, name in enumerate(names(dataset)) if name in ("0.png", "1.png")]
        if lost:
            words = (dataset.where(lost[0]), f"{len(lost)} such", "padchest")
            refuses(FileNotFoundError, partial(call, split), *words)
        else:
            assert len(call(split)) == len(dataset)
    assert sum(name in ("0.png", "1.png") for part in parts for name in names(part)) == 2


@pytest.mark.parametrize("column", ["ImageID", "PatientID", "Projection", "Labels"])
def test_padchest_refuses_a_lost_column(tmp_path, column):
    header = [name for name in PADCHEST_HEADER if name != column]
    table = write_padchest(tmp_path, [padchest_row("0.png")], header)
    words = (table, f"no column {column!r}", "Report")
    refuses(ValueError, partial(load_dataset, "padchest", tmp_path), *words)


def test_padchest_refuses_damaged_tables(tmp_path):
    call = partial(load_dataset, "padchest", tmp_path, verify=False)
    rows = [padchest_row(f"{k}.png", k, labelCUIS="") for k in range(20)]
    table = write_padchest(tmp_path, rows)
    whole = table.read_bytes()
    assert len(call()) == 18
    table.write_bytes(whole[: len(whole) * 2 // 3])
    refuses(ValueError, call, table, "mend")
    table.write_bytes(b"not gzipped at all\n" * 20)
    refuses(ValueError, call, table, "mend")
    table.write_bytes(gzip.compress(gzip.decompress(whole) + b"21,x.png,0,20140915\n"))
    refuses(ValueError, call, f"{table}, line 22", "4 columns", "36")
    write_padchest(tmp_path, [*rows, rows[3]])
    refuses(ValueError, call, table, "3.png", "more than once")
    write_padchest(tmp_path, [])
    refuses(ValueError, call, table, "no row")


def test_padchest_refuses_an_empty_split(tmp_path):
    write_padchest(tmp_path, [padchest_row("0.png"), padchest_row("1.png", labels="")])
    call = partial(load_dataset, "padchest", tmp_path, verify=False)
    # One patient, of whom int(0.9 x 1) train.
    refuses(ValueError, call, "padchest", "no image of the train split", "split_by")
    assert names(call("test")) == ["0.png"]


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def info(capsys, *args):
    """(what `info` prints, {first cell of each line of its tables: the other cells})."""
    assert data.main(["info", "padchest", *map(str, args)]) == 0
    text = capsys.readouterr().out
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return text, {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_info_of_the_studys_split(chests, capsys):
    text, cells = info(capsys, "--split-by", "image", "--data-dir", chests.root)
    train, test = chests.study_split()
    owners = [set(chests.column("PatientID", part)) for part in (train, test)]
    both = len(owners[0] & owners[1])
    assert both == 4  # of the five test images'
    lines = text.splitlines()
    assert f"patients on both sides: {both}" in lines
    assert "padchest: medical, multilabel, 27 classes" in lines and "split_by: image" in lines
    assert cells["train"][:2] == ["39", str(len(owners[0]))]
    assert cells["test"][:2] == ["5", str(len(owners[1]))]
    for why in ("4 views other than PA", "2 no labels", "28 known broken"):
        assert why in cells["train"][2]
    for cls in PADCHEST_CLASSES:
        positives = [
            sum(cls in chests.found[row["ImageID"]] for row in part) for part in (train, test)
        ]
        assert cells[cls] == [str(positives[0]), "0", str(positives[1]), "0"]
    assert cells["Cardiomegaly"] != ["0"] * 4


def test_info_of_the_split_by_patient(chests, capsys):
    for args in ([], ["--split-by", "patient"]):
        text, cells = info(capsys, *args, "--data-dir", chests.root)
        assert "patients on both sides: 0" in text.splitlines()
        assert "split_by: patient" in text.splitlines()
        assert [cells["train"][1], cells["test"][1]] == ["21", "3"]
        assert int(cells["train"][0]) + int(cells["test"][0]) == 44


def test_info_of_views(chests, capsys):
    args = ["--views", "AP Supine", "L", "--split-by", "image", "--data-dir", chests.root]
    text, cells = info(capsys, *args)
    count = sum(p in ("AP Supine", "AP_horizontal", "L") for p in chests.column("Projection"))
    assert "views: ['AP Supine', 'L']" in text.splitlines()
    expected = [math.floor(0.9 * count), count - math.floor(0.9 * count)]
    assert [int(cells[split][0]) for split in ("train", "test")] == expected
    assert f"{78 - count} views other than AP Supine, L" in cells["train"][2]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--split-by", "both"], ["--split-by", "both", "patient", "image"]),
        (["--views", "FRONTAL"], ["--views", "'FRONTAL'", "AP Supine"]),
    ],
)
def test_info_refuses(chests, capsys, args, words):
    assert data.main(["info", "padchest", *args, "--data-dir", str(chests.root)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    for word in words:
        assert word in line


# ------------------------------------------------------------------------------------------------
# COVIDx
# ------------------------------------------------------------------------------------------------

COVIDX_TRAIN = (
    "379 1e64990d1b40c1758a2aaa9c7f7a85_jumbo.jpeg negative cohen",
    "ANON 34 0034.jpg positive actmed",
    "",
    "379 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.PNG negative cohen",
    "sub-S03047 sub-S03047_ses-E06244_run-1.png positive bimcv",
    "positive negative.png\tpositive  sirm",
)
COVIDX_TEST = ("MIDRC-RICORD-1C-419639-000082 0034.jpg positive ricord", "7 7.png negative rsna")


class Covidx:
    """A tiny tree in the official layout, to be spoilt by a test."""

    def __init__(self, root):
        self.root, self.folder = root, root / "COVIDx-CXR2"
        self.pixels, rng = {}, np.random.default_rng(0)
        for split, lines in (("train", COVIDX_TRAIN), ("test", COVIDX_TEST)):
            self.write(split, *lines)
            for line in filter(None, lines):
                name = line.split()[-3]
                pixels = rng.integers(256, size=(8, 9)).astype(np.uint8)
                save(self.folder / split / name, pixels)
                with Image.open(self.folder / split / name) as image:
                    self.pixels[split, name] = np.asarray(image)

    def write(self, split, *lines):
        path = self.folder / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path

    def load(self, split="train", **options):
        return load_dataset("covidx", self.root, split, **options)


@pytest.fixture
def covidx(tmp_path):
    return Covidx(tmp_path)


def test_covidx_labels_order_and_groups(covidx):
    train, test = covidx.load(), covidx.load("test")
    for dataset in (train, test):
        assert dataset.name == "covidx" and dataset.classes == ("negative", "positive")
        assert (dataset.task, dataset.domain, dataset.options) == ("multiclass", "medical", {})
        assert dataset.labels.dtype == np.int64
    assert names(train) == [line.split()[-3] for line in COVIDX_TRAIN if line]
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert groups(train) == ["379", "ANON 34", "379", "sub-S03047", "positive"]
    assert names(test) == ["0034.jpg", "7.png"] and test.labels.tolist() == [1, 0]
    assert groups(test) == ["MIDRC-RICORD-1C-419639-000082", "7"]


def test_covidx_pixels(covidx):
    # A name that is in both lists is a file of its own in each folder.
    assert (covidx.pixels["train", "0034.jpg"] != covidx.pixels["test", "0034.jpg"]).any()
    for split in ("train", "test"):
        dataset = covidx.load(split)
        for i, name in enumerate(names(dataset)):
            assert dataset.where(i) == str(covidx.folder / split / name)
            np.testing.assert_array_equal(dataset.read(i), covidx.pixels[split, name][None])
    image, label = covidx.load("test")[1]
    assert image.shape == (1, 8, 9) and label.dtype == torch.int64 and label == 0


@pytest.mark.parametrize(
    "line",
    [
        "379 x.png COVID-19 cohen",
        "379 x.png Positive cohen",
        "379 x.png 1 cohen",
        "x.png positive cohen",
        "positive cohen",
        "379 x.png positive",
        "x.png",
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_covidx_refuses_lines(covidx, split, line):
    path = covidx.write(split, COVIDX_TRAIN[0], "", line, *COVIDX_TRAIN[3:])
    refuses(ValueError, partial(covidx.load, split), f"{path}, line 3", repr(line), "positive")


def test_covidx_refuses_repeats_and_empty_lists(covidx):
    path = covidx.write("train", *COVIDX_TRAIN, "9 0034.jpg negative cohen")
    refuses(ValueError, covidx.load, path, "0034.jpg", "more than once")
    covidx.write("train", "", "  ")
    refuses(ValueError, covidx.load, path, "no image")


def test_covidx_refuses_missing_files(covidx):
    lost = covidx.folder / "train" / "0034.jpg"
    lost.unlink()  # test/0034.jpg is still there
    refuses(FileNotFoundError, covidx.load, lost, "covidx", "1 such")
    assert len(covidx.load("test")) == 2
    for part in ("test.txt", "test"):
        path = covidx.folder / part
        path.rename(covidx.folder / "elsewhere")
        words = (f"no {path};", "--data-dir")
        refuses(FileNotFoundError, partial(covidx.load, "test"), *words)
        (covidx.folder / "elsewhere").rename(path)


def test_covidx_names_a_broken_image(covidx):
    path = covidx.folder / "test" / "7.png"
    path.write_bytes(path.read_bytes()[:40])
    refuses(ValueError, lambda: covidx.load("test").read(1), path, "unreadable")


# ------------------------------------------------------------------------------------------------
# Tuberculosis
# ------------------------------------------------------------------------------------------------

SHENZHEN = "Tuberculosis_dataset/ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png"
MONTGOMERY = "Tuberculosis_dataset/Montgomery/MontgomerySet/CXR_png"


class Tuberculosis:
    """Both folders with 33 and 13 images, each of its own grey value."""

    def __init__(self, root):
        self.root = root
        # In the real sets, too, all normal images come before the others.
        self.shenzhen = [f"CHNCXR_{k:04d}_{int(k > 20)}.png" for k in range(1, 34)]
        self.montgomery = [f"MCUCXR_{k:04d}_{int(k > 8)}.png" for k in range(1, 14)]
        self.grey = {name: k for k, name in enumerate(self.shenzhen + self.montgomery)}
        for part, files in ((SHENZHEN, self.shenzhen), (MONTGOMERY, self.montgomery)):
            # A directory lists its files in no order: they are not written in the sorted one.
            for name in sorted(files, key=lambda name: name[::-1]):
                save(root / part / name, np.full((3, 4), self.grey[name], np.uint8))

    def load(self, split="train", **options):
        return load_dataset("tuberculosis", self.root, split, **options)


@pytest.fixture
def lungs(tmp_path):
    return Tuberculosis(tmp_path)


def study_parts(lungs):
    """(train, test) names: the first 85 % of each folder's shuffled order."""
    train, test = [], []
    for files, count in ((lungs.shenzhen, 28), (lungs.montgomery, 11)):  # int(28.05), int(11.05)
        order = [files[i] for i in study_order(len(files))]
        train += order[:count]
        test += order[count:]
    return train, test


def test_tuberculosis_split_order_and_labels(lungs):
    for split, expected in zip(("train", "test"), study_parts(lungs)):
        dataset = lungs.load(split)
        assert names(dataset) == expected
        assert dataset.labels.tolist() == [int(name[-5]) for name in expected]
        assert dataset.labels.dtype == np.int64 and dataset.classes == ("normal", "tuberculosis")
        assert dataset.name == "tuberculosis" and dataset.groups is None
        assert (dataset.task, dataset.domain, dataset.options) == ("multiclass", "medical", {})


def test_tuberculosis_pixels(lungs):
    for split in ("train", "test"):
        dataset = lungs.load(split)
        for i, name in enumerate(names(dataset)):
            part = SHENZHEN if name.startswith("CHN") else MONTGOMERY
            assert dataset.where(i) == str(lungs.root / part / name)
            assert dataset.read(i).shape == (1, 3, 4)
            assert dataset.read(i).unique().tolist() == [lungs.grey[name]]


def test_tuberculosis_of_the_real_size(tmp_path):
    """662 and 138 images: int(562.7) and int(117.3) train."""
    files = {SHENZHEN: 662, MONTGOMERY: 138}
    one = tmp_path / "one.png"
    save(one, np.zeros((1, 1), np.uint8))
    for part, count in files.items():
        (tmp_path / part).mkdir(parents=True)
        for k in range(count):
            (tmp_path / part / f"X_{k:04d}_{k % 2}.png").hardlink_to(one)
    train, test = (load_dataset("tuberculosis", tmp_path, s) for s in ("train", "test"))
    assert (len(train), len(test)) == (562 + 117, 100 + 21)
    assert names(train)[:562] == [f"X_{k:04d}_{k % 2}.png" for k in study_order(662)[:562]]
    assert names(test)[100:] == [f"X_{k:04d}_{k % 2}.png" for k in study_order(138)[117:]]


@pytest.mark.parametrize(
    "other", ["Thumbs.db", ".DS_Store", "NLM-README.txt", "ClinicalReadings/CHNCXR_0001_0.txt"]
)
def test_tuberculosis_passes_over_other_files(lungs, other):
    for part in (SHENZHEN, MONTGOMERY):
        path = lungs.root / part / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    assert [names(lungs.load(split)) for split in ("train", "test")] == [*study_parts(lungs)]


def test_tuberculosis_passes_over_hidden_files(lungs):
    """An archive that macOS unpacks has a hidden ._NAME beside each file."""
    for part, files in ((SHENZHEN, lungs.shenzhen), (MONTGOMERY, lungs.montgomery)):
        (lungs.root / part / f"._{files[0]}").write_bytes(b"no image")
    assert [names(lungs.load(split)) for split in ("train", "test")] == [*study_parts(lungs)]


@pytest.mark.parametrize("part", [SHENZHEN, MONTGOMERY])
@pytest.mark.parametrize("name", ["CHNCXR_0400_2.png", "CHNCXR_0001_0_mask.png", "a.png"])
def test_tuberculosis_refuses_other_names(lungs, part, name):
    save(lungs.root / part / name, np.zeros((2, 2), np.uint8))
    for split in ("train", "test"):
        refuses(ValueError, partial(lungs.load, split), lungs.root / part / name, "_0", "_1")


@pytest.mark.parametrize("part", [SHENZHEN, MONTGOMERY])
def test_tuberculosis_missing_folders(lungs, part):
    folder = lungs.root / part
    for file in folder.iterdir():
        file.unlink()
    refuses(ValueError, lungs.load, folder, "no .png")
    folder.rmdir()
    refuses(FileNotFoundError, lungs.load, f"no {folder};", "--data-dir")


# ------------------------------------------------------------------------------------------------
# Views of NIH ChestX-ray14
# ------------------------------------------------------------------------------------------------

# The header of 2017 has a comma after its last name, and so has each row.
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
NIH_CLASSES = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
    *("Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"),
    *("Pneumonia", "Pneumothorax"),
)
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


def write_nih(root, train, test, header=NIH_HEADER):
    """The table and lists, in root/NIH-ChestXRay-14; returns the table's path."""
    folder = root / "NIH-ChestXRay-14"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [header]
    for name, findings, number, view in sorted(train + test):
        facts = {"View Position": view, "Patient ID": number, "Finding Labels": findings}
        facts |= {"Image Index": name, "Patient Age": "058Y", "": ""}
        lines.append(",".join(str(facts.get(column, 1)) for column in header.split(",")))
        (folder / "images" / name).touch()
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    for path, rows in (("train_val_list.txt", train), ("test_list.txt", test)):
        # Not in the table's order.
        (folder / path).write_text("\n".join(row[0] for row in reversed(rows)))
    return folder / "Data_Entry_2017_v2020.csv"


@pytest.fixture
def nih(tmp_path):
    write_nih(tmp_path, NIH_TRAIN, NIH_TEST)
    return partial(load_dataset, "nih", tmp_path)


def test_nih_takes_all_views_by_default(nih):
    for split, rows in (("train", NIH_TRAIN), ("test", NIH_TEST)):
        dataset = nih(split)
        assert names(dataset) == [name for name, *_ in rows]
        assert (dataset.options, dataset.dropped) == ({}, {})


@pytest.mark.parametrize(
    "views, kept, dropped",
    [
        (["PA"], [0, 2, 4], 2),
        (("AP",), [1, 3], 3),
        (["AP", "PA"], [0, 1, 2, 3, 4], 0),
    ],
)
def test_nih_views(nih, views, kept, dropped):
    dataset = nih(views=views)
    rows = [NIH_TRAIN[i] for i in kept]
    assert names(dataset) == [name for name, *_ in rows]
    assert dataset.groups.tolist() == [number for _, _, number, _ in rows]
    marks = [set(findings.split("|")) - {"No Finding"} for _, findings, _, _ in rows]
    assert list(found(dataset).values()) == marks
    assert dataset.options == {"views": list(views)}
    # Those of the other split are not counted.
    assert dataset.dropped == {f"views other than {', '.join(views)}": dropped}


def test_nih_views_of_the_test_split(nih):
    dataset = nih("test", views=["PA"])
    assert names(dataset) == [name for name, *_ in NIH_TEST]
    assert dataset.dropped == {"views other than PA": 0}


def test_nih_refuses_views(nih, tmp_path):
    table = tmp_path / "NIH-ChestXRay-14" / "Data_Entry_2017_v2020.csv"
    for views in (["PA", "L"], []):
        refuses(ValueError, partial(nih, views=views), table, "--views", "known: AP, PA")
    refuses(ValueError, partial(nih, views=["L"]), "'L'")
    refuses(ValueError, partial(nih, "test", views=["AP"]), "nih", "test", "views", "AP")
    write_nih(tmp_path, NIH_TRAIN, NIH_TEST, NIH_HEADER.replace("View Position,", ""))
    assert len(nih()) == 5
    refuses(ValueError, partial(nih, views=["PA"]), table, "no column 'View Position'")


# ------------------------------------------------------------------------------------------------
# One label an image
# ------------------------------------------------------------------------------------------------

MORE = "not exactly one positive label"


def test_single_label_of_padchest(chests):
    for split, part in zip(("train", "test"), chests.study_split()):
        dataset = chests.load(split, split_by="image", single_label=True)
        kept = [row for row in part if len(chests.found[row["ImageID"]]) == 1]
        assert names(dataset) == chests.column("ImageID", kept)
        marks = [chests.found[row["ImageID"]] for row in kept]
        assert [{dataset.classes[label]} for label in dataset.labels] == marks
        assert groups(dataset) == chests.column("PatientID", kept)
        assert (dataset.task, dataset.domain) == ("multiclass", "medical")
        assert dataset.classes == PADCHEST_CLASSES and dataset.labels.dtype == np.int64
        assert dataset.options == {
            "views": STUDY_VIEWS,
            "split_by": "image",
            "single_label": True,
        }
        assert list(dataset.dropped.values()) == [4, 2, 28, len(part) - len(kept)]
        assert list(dataset.dropped)[3] == MORE
        deep = chests.pixels[names(dataset)[0]].astype(int)
        np.testing.assert_array_equal(dataset[0][0], [(deep + 128) // 257])


def test_single_label_of_nih(nih):
    train, test = (nih(split, single_label=True) for split in ("train", "test"))
    assert names(train) == ["00000005_000.png", "00000006_000.png", "00000006_001.png"]
    assert train.labels.tolist() == [7, 9, 13] and train.labels.dtype == np.int64
    assert train.classes == NIH_CLASSES and train.groups.tolist() == [5, 6, 6]
    assert names(test) == ["00000003_001.png"] and test.labels.tolist() == [0]
    for dataset in (train, test):
        assert dataset.options == {"single_label": True} and dataset.dropped == {MORE: 2}
        assert dataset.task == "multiclass"


def test_single_label_after_views(nih):
    dataset = nih(views=["PA"], single_label=True)
    assert names(dataset) == ["00000005_000.png", "00000006_001.png"]
    assert dataset.options == {"views": ["PA"], "single_label": True}
    assert dataset.dropped == {"views other than PA": 2, MORE: 1}


CHEXPERT_FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)


def write_chexpert(root, split, marks):
    """marks: of each patient {finding: text}, blank for the others."""
    folder = root / "CheXpert-v1.0"
    folder.mkdir(exist_ok=True)
    lines = [",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS])]
    for k, row in enumerate(marks, 1):
        path = f"CheXpert-v1.0/{split}/patient{k:05d}/study1/view1_frontal.jpg"
        texts = [row.get(name, "") for name in CHEXPERT_FINDINGS]
        lines.append(",".join([path, "Female", "68", "Frontal", "AP", *texts]))
    (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return partial(load_dataset, "chexpert", root, verify=False)


CHEXPERT_MARKS = [
    {"Pleural Effusion": "1.0"},  # one, and what is not mentioned
    {"Pleural Effusion": "1.0", "Edema": "-1.0"},  # one, and an uncertain one
    {"Pleural Effusion": "1.0", "Edema": "1.0"},
    {"Edema": "-1.0"},
    {"No Finding": "1.0", "Support Devices": "1.0"},  # No Finding: all are absent
    {"Support Devices": "1.0", "Edema": "0.0"},
    {},
    {"Atelectasis": "1.0", "Fracture": "", "Pneumonia": "0.0"},
]


def test_single_label_passes_over_what_is_not_annotated(tmp_path):
    load = write_chexpert(tmp_path, "train", CHEXPERT_MARKS)
    write_chexpert(tmp_path, "valid", CHEXPERT_MARKS[2:6])
    train, test = (load(split, single_label=True) for split in ("train", "test"))
    # Their places among the 13: Effusion 8, Support Devices 12, Atelectasis 0.
    assert train.labels.tolist() == [8, 8, 12, 0] and train.groups.tolist() == [1, 2, 6, 8]
    assert [train.classes[c] for c in (8, 12, 0)] == ["Effusion", "Support Devices", "Atelectasis"]
    assert test.labels.tolist() == [12] and test.groups.tolist() == [4]
    assert (train.dropped[MORE], test.dropped[MORE]) == (4, 3)


def test_single_label_of_a_union(tmp_path):
    write_chexpert(tmp_path, "train", CHEXPERT_MARKS[:3])
    write_nih(tmp_path, NIH_TRAIN, NIH_TEST)
    call = partial(load_dataset, "chexpert+nih", tmp_path, verify=False, single_label=True)
    shared = call()  # chexpert: Effusion twice; nih: Cardiomegaly, Pneumothorax
    assert [shared.classes[label] for label in shared.labels] == [
        *("Effusion", "Effusion", "Cardiomegaly", "Pneumothorax")
    ]
    every = call(labels="union")
    assert [every.classes[label] for label in every.labels] == [
        *("Effusion", "Effusion", "Hernia", "Mass", "Pneumothorax")
    ]
    assert every.options["single_label"] is True and every.options["labels"] == "union"


def test_single_label_refused(covidx, lungs, nih, tmp_path):
    for load, name in ((covidx.load, "covidx"), (lungs.load, "tuberculosis")):
        refuses(ValueError, partial(load, single_label=True), name, "--single-label", "multi-label")
    write_nih(tmp_path, NIH_TRAIN[:2], NIH_TEST)
    refuses(ValueError, partial(nih, single_label=True), "nih", "exactly one positive label")
    assert len(nih("test", single_label=True)) == 1


# ------------------------------------------------------------------------------------------------
# A part of the training images
# ------------------------------------------------------------------------------------------------

MANY = [(f"{k:08d}_000.png", "Mass" if k % 3 else "Edema|Mass", k, "PA") for k in range(120)]


@pytest.fixture
def many(tmp_path):
    """100 + 20 images."""
    write_nih(tmp_path, MANY[:100], MANY[100:])
    return partial(load_dataset, "nih", tmp_path)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_smaller_fraction_lies_inside_a_larger_one(many, seed):
    fractions = (0.01, 0.1, 0.3, 0.77, 1)
    parts = [names(many(fraction=fraction, fraction_seed=seed)) for fraction in fractions]
    assert [len(part) for part in parts] == [1, 10, 30, 77, 100]
    for smaller, larger in zip(parts, parts[1:]):
        assert set(smaller) < set(larger)
    for part in parts:
        assert part == sorted(part)  # the table's order
    # Neither the first images nor every tenth.
    steps = np.diff([int(name[:8]) for name in parts[1]])
    assert len(set(steps.tolist())) > 2 and parts[1] != parts[-1][:10]


def test_fractions_by_seed(many):
    parts = [names(many(fraction=0.3, fraction_seed=seed)) for seed in range(5)]
    assert len({tuple(part) for part in parts}) == 5
    assert names(many(fraction=0.3)) == parts[0]
    # Each image is as likely as any other.
    often = {name for part in parts for name in part}
    assert 70 < len(often) < 97


def test_a_fraction_keeps_labels_and_groups_together(many):
    dataset = many(fraction=0.3, fraction_seed=2)
    for i, name in enumerate(names(dataset)):
        k = int(name[:8])
        assert dataset.groups[i] == k
        marks = {dataset.classes[c] for c in np.flatnonzero(dataset.labels[i])}
        assert marks == ({"Mass"} if k % 3 else {"Edema", "Mass"})


def test_a_fraction_leaves_the_test_split(many):
    whole = many("test")
    for seed in (0, 1):
        dataset = many("test", fraction=0.1, fraction_seed=seed)
        assert names(dataset) == names(whole) == [name for name, *_ in MANY[100:]]
        np.testing.assert_array_equal(dataset.labels, whole.labels)


def test_a_fraction_is_recorded(many):
    part, whole = many(fraction=0.3, fraction_seed=7), many(fraction=1, fraction_seed=7)
    assert part.name == "nih-0.3"
    assert part.options == {"fraction": 0.3, "fraction_seed": 7}
    assert whole.name == "nih" and whole.options == {}
    views = many(fraction=0.25, views=["PA"])
    assert views.name == "nih-0.25"
    assert views.options == {"views": ["PA"], "fraction": 0.25, "fraction_seed": 0}


def test_a_fraction_is_of_what_the_other_options_leave(many):
    dataset = many(fraction=0.5, single_label=True)
    assert len(dataset) == 33  # of 66 with one label
    assert all(int(name[:8]) % 3 for name in names(dataset))
    assert dataset.options == {"single_label": True, "fraction": 0.5, "fraction_seed": 0}


def test_a_fraction_of_the_studys_split_keeps_its_order(chests):
    whole = names(chests.load(split_by="image"))
    dataset = chests.load(split_by="image", fraction=0.5, fraction_seed=1)
    places = [whole.index(name) for name in names(dataset)]
    assert len(places) == 20 and places == sorted(places)  # 19.5, to the even number
    assert dataset.options["split_by"] == "image" and dataset.name == "padchest-0.5"


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 30, math.nan, math.inf])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fractions_out_of_range(many, split, fraction):
    words = (f"--fraction {fraction}", "above 0", "at most 1")
    refuses(ValueError, partial(many, split, fraction=fraction), *words)


def test_a_fraction_of_no_image(many):
    refuses(ValueError, partial(many, fraction=0.004), "nih", "--fraction 0.004", "no image")
    assert len(many("test", fraction=0.004)) == 20
