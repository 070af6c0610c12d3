"""Chest X-rays: CheXpert, MIMIC-CXR, NIH ChestX-ray14, PadChest, COVIDx, tuberculosis.

Each function of a dataset is (name, root, split, **its options) -> ImageDataset.
"""

import functools
import math
import os
import re

import numpy as np

from readers import tables
from readers.images import Files, ImageDataset, encoded, need
from readers.tables import NUMBER, TEXT, Column, may_be_missing, one_of

CHEXPERT_CLASSES = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,"
    "Lung Lesion,Lung Opacity,Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
).split(",")
# Their columns: one class goes by a shorter name here, in its column's alphabetical place.
CHEXPERT_COLUMNS = [{"Effusion": "Pleural Effusion"}.get(cls, cls) for cls in CHEXPERT_CLASSES]
NIH_CLASSES = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia "
    "Infiltration Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
).split()
PADCHEST_CLASSES = (
    "Air Trapping,Aortic Atheromatosis,Aortic Elongation,Atelectasis,Bronchiectasis,Cardiomegaly,"
    "Consolidation,Costophrenic Angle Blunting,Edema,Effusion,Emphysema,Fibrosis,"
    "Flattened Diaphragm,Fracture,Granuloma,Hemidiaphragm Elevation,Hernia,Hilar Enlargement,"
    "Infiltration,Mass,Nodule,Pleural_Thickening,Pneumonia,Pneumothorax,Scoliosis,"
    "Support Devices,Tuberculosis"
).split(",")
VIEW = may_be_missing(TEXT)  # a column of them
PRESENT = one_of({"0": 0, "0.0": 0, "1": 1, "1.0": 1}, np.float32)
VIEWS = {
    "chexpert": ("PA", "AP", "LL", "RL", "L"),
    "mimic": ("PA", "AP", "LATERAL", "LL"),
    "nih": ("PA", "AP"),
    "padchest": ("PA", "AP", "AP Supine", "L", "COSTAL"),
}
# A class is present where the label text holds its name in lower case, or one of these.
PADCHEST_SYNONYMS = {
    "Consolidation": ["air bronchogram"],
    "Hilar Enlargement": ["adenopathy", "pulmonary artery enlargement"],
    "Infiltration": (
        "infiltrates,interstitial pattern,ground glass pattern,reticular interstitial pattern,"
        "reticulonodular interstitial pattern,alveolar pattern,consolidation,air bronchogram"
    ).split(","),
    "Pleural_Thickening": ["pleural thickening"],
    "Support Devices": ["device", "pacemaker"],
}
# As the study lists them; all but the last begin alike.
PADCHEST_BROKEN = [
    f"21684011136696401{end}.png"
    for end in """
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
] + ["269300710246070740096540277379121868595_e7zsan.png"]


def _of_views(name, table, found, views):
    """(which rows show one of these views: (N,) bool, why the others are left out)."""
    known = {*VIEWS.get(name, ()), *map(os.fsdecode, np.unique(found))} - {""}
    if not views or not known.issuperset(views):
        raise ValueError(f"{table}: --views {views}; known: {', '.join(sorted(known))}")
    return np.isin(found, [view.encode() for view in views]), f"views other than {', '.join(views)}"


def _xray(name, folder, names, labels, classes, groups, **about):
    """An X-ray dataset of files below a folder; multi-class when its labels are (N,) int."""
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    reader = Files(str(folder), names, "L")
    return ImageDataset(name, reader, labels, classes, task, "medical", groups, **about)


FINDING_COLUMNS = ["No Finding", *CHEXPERT_COLUMNS]
DEVICES = "marks of Support Devices, as No Finding is 1"  # left out of so many kept images


def _finding_labels(no_finding, *findings):
    """(labels (N,13) of CheXpert's labeller, whose mark of Support Devices is so left out (N,)).

    With No Finding all are absent, as in the study; torchxrayvision keeps Support Devices.
    """
    labels, none = np.stack(findings, axis=1), no_finding == 1
    devices = none & (labels[:, CHEXPERT_CLASSES.index("Support Devices")] == 1)
    labels[none] = 0
    return labels, devices


def _chexpert_paths(pattern, example):
    """The Column of such paths below the dataset's directory, whichever release they are of."""
    whole = re.compile(rf"CheXpert-v1\.0[^/]*/({pattern})")

    def convert(texts):
        matches = list(map(whole.fullmatch, texts))
        if not all(matches):
            raise ValueError("unknown path")
        return encoded(match[1] for match in matches)

    return Column(convert, f"be like CheXpert-v1.0/{example}")


CHEXPERT_IMAGES = _chexpert_paths(
    "(?:train|valid)/patient[0-9]+/[^/]+/[^/]+", "train/patient00001/study1/view1_frontal.jpg"
)
CHEXPERT_STUDIES = _chexpert_paths("test/patient[0-9]+/[^/]+", "test/patient64741/study1")


def _chexpert_patients(paths):
    return np.array([int(path.split(b"/")[1][len("patient") :]) for path in paths], np.int64)


def chexpert(name, root, split, views=("PA", "AP"), uncertain="ignore", blank="ignore"):
    """CheXpert (Irvin et al. 2019, arXiv:1901.07031); test is its official validation set.

    uncertain, blank: how the labeller's marks -1 and none are read, of `tables.finding`.
    """
    folder = root / "CheXpert-v1.0"
    table = folder / ("train.csv" if split == "train" else "valid.csv")
    need(name, table)
    finding, options = tables.finding(uncertain, blank)
    columns = {"Frontal/Lateral": one_of({"Frontal": True, "Lateral": False}, bool)}
    columns |= {"Path": CHEXPERT_IMAGES, "AP/PA": VIEW} | dict.fromkeys(FINDING_COLUMNS, finding)
    frontal, paths, found, *findings = tables.read_table(table, columns)
    kept, other = _of_views(name, table, np.where(frontal, found, b"L"), views)
    labels, devices = _finding_labels(*findings)
    paths, labels = paths[kept], labels[kept]
    tables.refuse_repeats(paths, table)
    about = {"options": options | {"views": list(views)}}
    about["dropped"] = {other: int((~kept).sum()), DEVICES: int(devices[kept].sum())}
    patients = _chexpert_patients(paths)
    return _xray(name, folder, paths, labels, CHEXPERT_CLASSES, patients, **about)


def chexpert_test(name, root, split):
    """CheXpert's test set of 500 studies, labelled by radiologists (Irvin et al. 2019): what is
    present in a study is so in each of its frontal images. It has no training images.
    """
    if split == "train":
        raise ValueError(f"{name}: has test images alone; evaluate a network there by --eval-only")
    folder = root / "CheXpert-v1.0"
    table = folder / "groundtruth.csv"
    table = table if table.exists() else folder / "test" / "groundtruth.csv"
    need(name, table, folder / "test")
    columns = {"Study": CHEXPERT_STUDIES} | dict.fromkeys(FINDING_COLUMNS, PRESENT)
    studies, *findings = tables.read_table(table, columns)
    tables.refuse_repeats(studies, table, rows=True)
    names, rows = [], []
    for row, study in enumerate(map(os.fsdecode, studies)):
        found = sorted(file.name for file in (folder / study).glob("*_frontal.jpg"))
        if not found:
            raise FileNotFoundError(f"{folder / study}: no frontal image, listed in {table}")
        names += [f"{study}/{file}" for file in found]
        rows += [row] * len(found)
    labels, names = _finding_labels(*findings)[0][rows], encoded(names)
    return _xray(name, folder, names, labels, CHEXPERT_CLASSES, _chexpert_patients(names))


def packed_or_not(path):
    """A gzipped table, or the unpacked one where that is there alone."""
    unpacked = path.with_suffix("")
    return unpacked if unpacked.exists() and not path.exists() else path


def mimic(name, root, split, views=("PA", "AP"), uncertain="ignore", blank="ignore"):
    """MIMIC-CXR-JPG 2.0.0 (Johnson et al. 2019, arXiv:1901.07042); test is its validate split.

    uncertain, blank: as of `chexpert`.
    """
    folder = root / "mimic-cxr-jpg" / "2.0.0"
    finding, options = tables.finding(uncertain, blank)
    dicoms, subjects, studies, labels, dropped = mimic_rows(name, folder, split, views, finding)
    names = [
        b"p%d/p%d/s%d/%s.jpg" % (int(str(subject)[:2]), subject, study, dicom)
        for subject, study, dicom in zip(subjects.tolist(), studies.tolist(), dicoms.tolist())
    ]
    names, files = np.array(names), folder / "files"
    about = {"options": options | {"views": list(views)}, "dropped": dropped}
    return _xray(name, files, names, labels, CHEXPERT_CLASSES, subjects, **about)


def mimic_rows(name, folder, split, views, finding):
    """The rows of a split: (dicom ids, subject ids, study ids, labels (N,13), dropped)."""
    parts = ("metadata", "split", "chexpert")
    paths = [packed_or_not(folder / f"mimic-cxr-2.0.0-{part}.csv.gz") for part in parts]
    need(name, *paths)
    metadata, split_table, findings_table = paths
    of_split = one_of({"train": split == "train", "validate": split == "test", "test": False}, bool)
    listed, mine = tables.read_table(split_table, {"dicom_id": TEXT, "split": of_split})
    columns = {"dicom_id": TEXT, "subject_id": NUMBER, "study_id": NUMBER, "ViewPosition": VIEW}
    dicoms, subjects, studies, found = tables.read_table(metadata, columns)
    tables.refuse_repeats(dicoms, metadata)
    mine = mine[tables.positions(dicoms, listed, split_table, source=metadata)]
    kept, other = _of_views(name, metadata, found, views)
    dropped = {other: int((mine & ~kept).sum())}
    kept &= mine
    dicoms, subjects, studies = dicoms[kept], subjects[kept], studies[kept]

    columns = {"study_id": NUMBER, "subject_id": NUMBER} | dict.fromkeys(FINDING_COLUMNS, finding)
    annotated, owners, *findings = tables.read_table(findings_table, columns)
    row = tables.positions(studies, annotated, findings_table)
    labelled = row >= 0
    if (wrong := labelled & (owners[row] != subjects)).any():
        which = f"study {studies[wrong][0]} is of another subject than in {metadata.name}"
        raise ValueError(f"{findings_table}: {which}; fetch both of one release")
    dropped["studies without labels"] = int((~labelled).sum())
    labels, devices = _finding_labels(*findings)
    dropped[DEVICES] = int(devices[row[labelled]].sum())
    return dicoms[labelled], subjects[labelled], studies[labelled], labels[row[labelled]], dropped


def _nih_labels(texts):
    """The labels (N,14) that texts like "Mass|Nodule" name."""
    present = [set(text.split("|")) - {"No Finding"} for text in texts]
    if not set().union(*present) <= set(NIH_CLASSES):
        raise ValueError("unknown finding")
    return np.array([[cls in row for cls in NIH_CLASSES] for row in present], np.float32)


def nih(name, root, split, views=None):
    """NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315) in its official layout and split."""
    folder = root / "NIH-ChestXRay-14"
    table = folder / "Data_Entry_2017_v2020.csv"
    lists = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    need(name, table, *lists.values(), folder / "images")
    listed = {part: encoded(text for _, text in tables.read_list(lists[part])) for part in lists}
    tables.refuse_repeats(np.concatenate([*listed.values()]), " + ".join(map(str, lists.values())))
    must = f"be No Finding, or some of these joined by |: {', '.join(NIH_CLASSES)}"
    columns = {"Image Index": TEXT, "Finding Labels": Column(_nih_labels, must)}
    columns |= {"Patient ID": NUMBER} | ({} if views is None else {"View Position": VIEW})
    names, labels, patients, *found = tables.read_table(table, columns)
    rows, about = np.sort(tables.positions(listed[split], names, table, source=lists[split])), {}
    if views is not None:
        kept, other = _of_views(name, table, found[0], views)
        about["options"] = {"views": list(views)}
        about["dropped"] = {other: int((~kept[rows]).sum())}
        rows = rows[kept[rows]]
    names, labels, patients = names[rows], labels[rows], patients[rows]
    return _xray(name, folder / "images", names, labels, NIH_CLASSES, patients, **about)


@functools.lru_cache(maxsize=2**16)
def _padchest_row(text):
    """The study's reading of the label text; NaN everywhere where there is none."""
    words = ((cls.lower(), *PADCHEST_SYNONYMS.get(cls, ())) for cls in PADCHEST_CLASSES)
    return [any(word in text for word in own) if text else math.nan for own in words]


def padchest(name, root, split, views=VIEWS["padchest"], split_by="patient"):
    """PadChest (Bustos et al. 2020, arXiv:1901.07441), a tenth of it held out.

    split_by: "patient" keeps each patient on one side; "image" is the study's split, which does
    not. Images without labels (the real table has 103, whose Labels reads nan) and those known to
    be broken are left out, as in the study.
    """
    folder = root / "PadChest"
    table = packed_or_not(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz")
    need(name, table)
    if split_by not in ("patient", "image"):
        raise ValueError(f"--split-by {split_by}: must be patient or image")
    labelled = Column(lambda texts: np.array([*map(_padchest_row, texts)], np.float32), "be text")
    columns = {"ImageID": TEXT, "PatientID": TEXT, "Projection": VIEW}
    columns |= {"Labels": may_be_missing(labelled), "ImageDir": may_be_missing(TEXT)}
    read = tables.read_table(table, columns, optional=("ImageDir",))
    names, patients, found, labels, folders = read
    tables.refuse_repeats(names, table)
    found = np.where(found == b"AP_horizontal", b"AP Supine", found)
    kept, other = _of_views(name, table, found, views)
    unlabelled = kept & np.isnan(labels[:, 0])
    broken = np.isin(names, [file.encode() for file in PADCHEST_BROKEN]) & kept & ~unlabelled
    rows = np.flatnonzero(kept & ~unlabelled & ~broken)

    rng = np.random.RandomState(42)
    if split_by == "image":
        rows = rows[rng.permutation(len(rows))]
        train = np.arange(len(rows)) < int(0.9 * len(rows))
    else:
        known = rng.permutation(np.unique(patients[rows]))
        train = np.isin(patients[rows], known[: int(0.9 * len(known))])
    rows = rows[train if split == "train" else ~train]

    # Images lie in the folder that ImageDir names, or beside the table.
    used = [] if folders is None else filter(None, map(os.fsdecode, np.unique(folders)))
    if any((folder / part).is_dir() for part in used):
        names = np.char.add(np.where(folders != b"", np.char.add(folders, b"/"), b""), names)
    left_out = {other: ~kept, "no labels": unlabelled, "known broken": broken}
    about = {"dropped": {why: int(images.sum()) for why, images in left_out.items()}}
    about["options"] = {"views": list(views), "split_by": split_by}
    names, labels, patients = names[rows], labels[rows], patients[rows]
    return _xray(name, folder, names, labels, PADCHEST_CLASSES, patients, **about)


def covidx(name, root, split):
    """COVIDx CXR-2 (Wang et al. 2020, arXiv:2003.09871)."""
    folder = root / "COVIDx-CXR2"
    path = folder / f"{split}.txt"
    need(name, path, folder / split)
    classes, rows = ("negative", "positive"), []
    for number, line in tables.read_list(path):
        # The patient's id may hold blanks, the file's name, the label and the source do not.
        patient, *fields = line.rsplit(None, 3)
        if len(fields) < 3 or fields[1] not in classes:
            must = "be 'patient file negative|positive source'"
            raise ValueError(f"{path}, line {number}: {line!r} must {must}")
        rows.append((patient, fields[0], classes.index(fields[1])))
    patients, names, labels = zip(*rows)
    names, labels, patients = encoded(names), np.array(labels, np.int64), encoded(patients)
    tables.refuse_repeats(names, path)
    return _xray(name, folder / split, names, labels, classes, patients)


def tuberculosis(name, root, split):
    """Shenzhen and Montgomery (Jaeger et al. 2014), the first 85 % of each in the study's order."""
    folder = root / "Tuberculosis_dataset"
    parts = "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png", "Montgomery/MontgomerySet/CXR_png"
    need(name, *(folder / part for part in parts))
    names = []
    for part in parts:
        files = sorted(f for f in (folder / part).glob("*.png") if not f.name.startswith("."))
        if not files:
            raise ValueError(f"{folder / part}: holds no .png file; fetch the dataset again")
        for file in files:
            if file.stem[-1] not in "01":
                raise ValueError(f"{file}: must end in _0 (normal) or _1; rename it or move it out")
        np.random.RandomState(42).shuffle(files)
        count = int(0.85 * len(files))
        chosen = files[:count] if split == "train" else files[count:]
        names += [str(file.relative_to(folder)) for file in chosen]
    labels = np.array([int(file[-len("0.png")]) for file in names], np.int64)
    return _xray(name, folder, encoded(names), labels, ("normal", "tuberculosis"), None)
