"""Chest X-rays: CheXpert, MIMIC-CXR, NIH ChestX-ray14, PadChest, COVIDx, tuberculosis.

Each function of a dataset is (name, root, split, **its options) -> ImageDataset. Tables become
arrays without an object a row.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers.images import Files, ImageDataset, encoded, need

# ------------------------------------------------------------------------------------------------
# Tables and lists
# ------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """How a table's column is read. dtype: of numpy.loadtxt; convert: those values -> an array.

    valid: a text -> whether it may stand there; else the error says the text `must` so.
    """

    dtype: object
    convert: Callable
    valid: Callable
    must: str


def _texts(values):
    """UTF-8 as it stands in the file: (N,) bytes, no wider than the longest."""
    letters = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    if letters[:, -1].any():
        raise ValueError("cut short")
    if letters.max() > 127:
        np.char.decode(values, "utf-8")
    return values.astype(f"S{max(1, np.count_nonzero(letters.any(0)))}")


def _is_text(text):
    with contextlib.suppress(UnicodeDecodeError):
        text.encode("latin-1").decode()
        return len(text) < 256
    return False


TEXT = Column("S256", _texts, _is_text, "be UTF-8 of less than 256 bytes")


def _numbers(values):
    if (values < 0).any():
        raise ValueError("a negative number")
    return np.array(values)


def _is_number(text):
    return text.isdecimal() and len(text) < 19  # as many digits fit 64 bits


NUMBER = Column(np.int64, _numbers, _is_number, "be a whole number of at most 18 digits")


def _one_of(*known):
    """The Column of texts that are one of these."""

    def convert(values):
        if not np.isin(values, [text.encode() for text in known]).all():
            raise ValueError("unknown text")
        return _texts(values)

    return Column("S32", convert, known.__contains__, f"be one of {', '.join(known)}")


def read_table(path, columns, optional=()):
    """The named columns of a CSV file (RFC 4180, UTF-8, gzipped or not) as a list of arrays.

    columns: {name: Column}; texts come as UTF-8 bytes. optional: names of columns that may be
    missing; their array is None. Blank lines are passed over. Raises ValueError naming file and
    line.
    """
    chunks = []
    try:
        with _open_table(path) as file, warnings.catch_warnings():
            lines = filter(str.strip, file)
            header = _header(path, lines, columns, optional)
            present = {name: kind for name, kind in columns.items() if name in header}
            # All columns are read, though most to one character, so that none may be missing.
            kinds = [present[name].dtype if name in present else "U1" for name in header]
            dtype = [(str(place), kind) for place, kind in enumerate(kinds)]
            # An older numpy only warns when it cuts 1.5 down to the integer 1.
            warnings.simplefilter("error", DeprecationWarning)
            for line in lines:
                rows = np.loadtxt(
                    itertools.chain([line], lines), dtype, comments=None, delimiter=",",
                    quotechar='"', ndmin=1, max_rows=2**13,
                )  # fmt: skip
                chunks.append(
                    [kind.convert(rows[str(header.index(name))]) for name, kind in present.items()]
                )
    except (ValueError, DeprecationWarning, EOFError, zlib.error, gzip.BadGzipFile) as error:
        _refuse_bad_line(path, columns)
        raise ValueError(f"{path}: {error}; mend it or fetch it again") from error
    if not chunks:
        raise ValueError(f"{path}: has no row below its header; fetch it again")
    arrays = dict(zip(present, map(np.concatenate, zip(*chunks))))
    return [arrays.get(name) for name in columns]


def _open_table(path):
    """The lines of a text file; each byte of its UTF-8 is one character (latin-1)."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    file = io.BufferedReader(file, 2**18)
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    return io.TextIOWrapper(file, encoding="latin-1", newline="")


def _header(path, lines, columns, optional):
    """The names of a table's columns; these columns must be there, once."""
    line = next(lines, "").encode("latin-1").decode()
    header = next(csv.reader([line]), [])
    for name in columns:
        if name not in header and name not in optional:
            hint = "; is it separated by commas?" if len(header) < 2 else ""
            raise ValueError(f"has no column {name!r}, only: {', '.join(header)}{hint}")
        if header.count(name) > 1:
            raise ValueError(f"has {header.count(name)} columns {name!r}; keep one")
    return header


def _refuse_bad_line(path, columns):
    """Raises ValueError naming the first line of a table that is not as its columns must be."""
    reader = None
    try:
        with _open_table(path) as lines:
            reader = csv.reader(lines)
            # Lines of blanks are passed over, as read_table passes over them.
            rows = (row for row in reader if len(row) > 1 or "".join(row).strip())
            header = next(rows, [])
            if "\0" in "".join(header):
                return  # UTF-16, which has no lines here; the header's own error says it
            places = [(header.index(name), name) for name in columns if name in header]
            for row in rows:
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{where}: {len(row)} columns, the header has {len(header)}")
                for place, name in places:
                    if not columns[name].valid(row[place]):
                        text = row[place].encode("latin-1").decode(errors="replace")
                        raise ValueError(f"{where}: {name} {text!r} must {columns[name].must}")
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if "NUL" in str(error):
            return  # UTF-16 again, as Python 3.10 says it
        line = reader.line_num if reader else 0
        raise ValueError(f"{path}: unreadable after line {line} ({error}); mend it") from error


def _read_list(path):
    """[(line number, text)] of a text file, blank lines aside."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as such") from error
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: lists no image; fetch it again")
    return lines


def _refuse_repeats(values, where):
    values, counts = np.unique(values, return_counts=True)
    if counts.max(initial=0) > 1:
        value = values[counts.argmax()]
        value = os.fsdecode(value) if isinstance(value, bytes) else value
        raise ValueError(f"{where}: {value} occurs more than once; keep one")


def _positions(keys, table, where):
    """Where each key stands in `table`, an array without repeats: (N,) int64, -1 where nowhere."""
    if np.array_equal(keys, table):  # keys are without repeats where that matters
        return np.arange(len(keys))
    _refuse_repeats(table, where)
    order = np.argsort(table)
    places = order[np.minimum(np.searchsorted(table, keys, sorter=order), len(table) - 1)]
    return np.where(table[places] == keys, places, -1)


def views_in_union(name, views):
    """Of the views that all datasets of a union were given, those that this one may have."""
    others = {view for known in VIEWS.values() for view in known} - set(VIEWS.get(name, ()))
    return [view for view in views if view not in others] or views


def _of_views(table, found, views, known):
    """(which rows show one of these views: (N,) bool, why the others are left out)."""
    if isinstance(views, str) or len(set(views)) < len(views):
        raise ValueError(f"--views {views}: must be a list that names each view once")
    shows = {view: found == view.encode() for view in views}
    unknown = [view for view in views if view not in known and not shows[view].any()]
    if unknown or not views:
        known = sorted({*known, *map(os.fsdecode, np.unique(found))} - {""})
        raise ValueError(f"{table}: no image of --views {unknown}; known: {', '.join(known)}")
    return np.any(list(shows.values()), axis=0), f"views other than {', '.join(views)}"


# ------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------

CHEXPERT_CLASSES = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
    "Fracture", "Lung Lesion", "Lung Opacity", "Effusion", "Pleural Other", "Pneumonia",
    "Pneumothorax", "Support Devices",
)  # fmt: skip
# Their columns: one class goes by a shorter name here, in its column's alphabetical place.
CHEXPERT_COLUMNS = [{"Effusion": "Pleural Effusion"}.get(cls, cls) for cls in CHEXPERT_CLASSES]
NIH_CLASSES = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia "
    "Infiltration Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
).split()
PADCHEST_CLASSES = (
    "Air Trapping", "Aortic Atheromatosis", "Aortic Elongation", "Atelectasis", "Bronchiectasis",
    "Cardiomegaly", "Consolidation", "Costophrenic Angle Blunting", "Edema", "Effusion",
    "Emphysema", "Fibrosis", "Flattened Diaphragm", "Fracture", "Granuloma",
    "Hemidiaphragm Elevation", "Hernia", "Hilar Enlargement", "Infiltration", "Mass", "Nodule",
    "Pleural_Thickening", "Pneumonia", "Pneumothorax", "Scoliosis", "Support Devices",
    "Tuberculosis",
)  # fmt: skip
VIEWS = {
    "chexpert": ("PA", "AP", "LL", "RL", "L"),
    "mimic": ("PA", "AP", "LATERAL", "LL"),
    "nih": ("PA", "AP"),
    "padchest": ("PA", "AP", "AP Supine", "L", "COSTAL"),
}
PADCHEST_SYNONYMS = {
    "Consolidation": ("air bronchogram",),
    "Hilar Enlargement": ("adenopathy", "pulmonary artery enlargement"),
    "Infiltration": (
        "infiltrates", "interstitial pattern", "ground glass pattern",
        "reticular interstitial pattern", "reticulonodular interstitial pattern",
        "alveolar pattern", "consolidation", "air bronchogram",
    ),
    "Pleural_Thickening": ("pleural thickening",),
    "Support Devices": ("device", "pacemaker"),
}  # fmt: skip
PADCHEST_BROKEN = frozenset(
    """
216840111366964012819207061112010307142602253_04-014-084.png
    216840111366964012989926673512011074122523403_00-163-058.png
    216840111366964012959786098432011033083840143_00-176-115.png
    216840111366964012558082906712009327122220177_00-102-064.png
    216840111366964012339356563862009072111404053_00-043-192.png
    216840111366964013076187734852011291090445391_00-196-188.png
    216840111366964012373310883942009117084022290_00-064-025.png
    216840111366964012283393834152009033102258826_00-059-087.png
    216840111366964012373310883942009170084120009_00-097-074.png
    216840111366964012819207061112010315104455352_04-024-184.png
    216840111366964013829543166512013353113303615_02-092-190.png
    216840111366964012904401302362010337093236130_03-198-079.png
    216840111366964012904401302362010336141343749_03-198-010.png
    216840111366964012989926673512011151082430686_00-157-045.png
    216840111366964012989926673512011083134050913_00-168-009.png
    216840111366964012373310883942009077082646386_00-047-124.png
    216840111366964013686042548532013208193054515_02-026-007.png
    216840111366964013962490064942014134093945580_01-178-104.png
    216840111366964012819207061112010281134410801_00-129-131.png
    216840111366964013590140476722013043111952381_02-065-198.png
    216840111366964012283393834152009027091819347_00-007-136.png
    216840111366964012373310883942009152114636712_00-102-045.png
    216840111366964012283393834152009033140208626_00-059-118.png
    216840111366964013590140476722013058110301622_02-056-111.png
    216840111366964012487858717522009280135853083_00-075-001.png
    216840111366964013590140476722013049100117076_02-063-097.png
    216840111366964013649110343042013092101343018_02-075-146.png
    216840111366964012819207061112010306085429121_04-020-102.png
    269300710246070740096540277379121868595_e7zsan.png
    216840111366964012373310883942009180082307973_00-097-011.png
    """.split()
)


def _xray(name, folder, names, labels, classes, groups, **facts):
    """An X-ray dataset of files; multi-class when its labels are (N,) int."""
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    reader = Files(str(folder), names, "L")
    return ImageDataset(name, reader, labels, classes, task, "medical", groups, **facts)


FINDINGS = {"": np.nan, "-1": np.nan, "-1.0": np.nan, "0": 0, "0.0": 0, "1": 1, "1.0": 1}


def _findings(values):
    """1 present, 0 absent, NaN unmentioned (blank) or uncertain (-1): (N,) float32."""
    labels, numbers = (
        np.full(len(values), -1, np.float32),
        np.ascontiguousarray(values).view(np.int64),
    )
    for text, label in FINDINGS.items():
        # Eight bytes are compared as one number.
        labels[numbers == np.array(text, "S8").view(np.int64)] = label
    if (labels == -1).any():
        raise ValueError("unknown finding")
    return labels


FINDING = Column("S8", _findings, FINDINGS.__contains__, "be 1, 0, -1 or blank")
FINDING_COLUMNS = dict.fromkeys(["No Finding", *CHEXPERT_COLUMNS], FINDING)


def _finding_labels(no_finding, *findings):
    """The labels (N,13) of CheXpert's labeller; with No Finding all are absent."""
    labels = np.stack(findings, axis=1)
    labels[no_finding == 1] = 0
    return labels


CHEXPERT_PATH = re.compile(r"CheXpert-v1\.0[^/]*/((?:train|valid)/patient(\d+)/[^/]+/[^/]+)")


def _chexpert_paths(values):
    """Paths below the dataset's directory, whichever release they are of."""
    matches = list(map(CHEXPERT_PATH.fullmatch, values))
    if not all(matches):
        raise ValueError("unknown path")
    return np.array([match[1].encode("latin-1") for match in matches])


CHEXPERT_PATHS = Column(
    object, _chexpert_paths, CHEXPERT_PATH.fullmatch,
    "be like CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg",
)  # fmt: skip


def chexpert(name, root, split, views=("PA", "AP")):
    """CheXpert (Irvin et al. 2019, arXiv:1901.07031); test is its official validation set."""
    folder = root / "CheXpert-v1.0"
    table = folder / {"train": "train.csv", "test": "valid.csv"}[split]
    need(name, table)
    columns = {"Path": CHEXPERT_PATHS, "AP/PA": TEXT}
    columns |= {"Frontal/Lateral": _one_of("Frontal", "Lateral")}
    paths, frontal, side, *findings = read_table(table, columns | FINDING_COLUMNS)
    found = np.where(side == b"Frontal", frontal, b"L")
    kept, other = _of_views(table, found, views, VIEWS["chexpert"])
    paths = paths[kept]
    _refuse_repeats(paths, table)
    patients = np.array([int(path.split(b"/")[1][len("patient") :]) for path in paths], np.int64)
    return _xray(
        name, folder, paths, _finding_labels(*findings)[kept], CHEXPERT_CLASSES, patients,
        options={"views": list(views)}, dropped={other: int((~kept).sum())},
    )  # fmt: skip


def mimic(name, root, split, views=("PA", "AP")):
    """MIMIC-CXR-JPG 2.0.0 (Johnson et al. 2019, arXiv:1901.07042); test is its validate split."""
    folder = root / "mimic-cxr-jpg" / "2.0.0"
    dicoms, subjects, studies, labels, dropped = mimic_rows(name, folder, split, views)
    names = [
        b"p%d/p%d/s%d/%s.jpg" % (int(str(subject)[:2]), subject, study, dicom)
        for subject, study, dicom in zip(subjects, studies, dicoms)
    ]
    return _xray(
        name, folder / "files", np.array(names), labels, CHEXPERT_CLASSES, subjects,
        options={"views": list(views)}, dropped=dropped,
    )  # fmt: skip


def mimic_rows(name, folder, split, views):
    """The rows of a split: (dicom ids, subject ids, study ids, labels (N,13), dropped)."""
    tables = [
        folder / f"mimic-cxr-2.0.0-{part}.csv.gz" for part in ("metadata", "split", "chexpert")
    ]
    metadata, split_table, findings_table = tables
    need(name, *tables)
    parts = _one_of("train", "validate", "test")
    dicoms, parts = read_table(split_table, {"dicom_id": TEXT, "split": parts})
    ids = {"dicom_id": TEXT, "subject_id": NUMBER, "study_id": NUMBER}
    ids, subjects, studies, found = read_table(metadata, ids | {"ViewPosition": TEXT})
    place = _positions(ids, dicoms, split_table)
    if (place < 0).any():
        raise ValueError(
            f"{split_table}: has no row of {ids[place < 0][0].decode()}; fetch both of one release"
        )
    mine = parts[place] == {"train": b"train", "test": b"validate"}[split]
    del dicoms, parts, place
    _refuse_repeats(ids, metadata)
    kept, other = _of_views(metadata, found, views, VIEWS["mimic"])
    dropped = {other: int((mine & ~kept).sum())}
    kept &= mine
    ids, subjects, studies = ids[kept], subjects[kept], studies[kept]
    key, owners, *findings = read_table(
        findings_table, {"study_id": NUMBER, "subject_id": NUMBER} | FINDING_COLUMNS
    )
    _refuse_repeats(key, findings_table)  # two images of a study are no repeat, two rows are
    row = _positions(studies, key, findings_table)
    wrong = (row >= 0) & (owners[row] != subjects)
    if wrong.any():
        raise ValueError(
            f"{findings_table}: study {studies[wrong][0]} is of another subject than in "
            f"{metadata.name}; fetch both of one release"
        )
    labelled = row >= 0
    dropped["studies without labels"] = int((~labelled).sum())
    labels = _finding_labels(*findings)[row[labelled]]
    return ids[labelled], subjects[labelled], studies[labelled], labels, dropped


def nih(name, root, split, views=None):
    """NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315) in its official layout and split."""
    folder = root / "NIH-ChestXRay-14"
    table = folder / "Data_Entry_2017_v2020.csv"
    lists = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    need(name, table, *lists.values(), folder / "images")
    listed = {part: encoded(text for _, text in _read_list(path)) for part, path in lists.items()}
    both = " + ".join(map(str, lists.values()))
    _refuse_repeats(np.concatenate(list(listed.values())), both)
    columns = {"Image Index": TEXT, "Finding Labels": NIH_FINDINGS, "Patient ID": NUMBER}
    columns |= {"View Position": TEXT} if views is not None else {}
    names, labels, patients, *found = read_table(table, columns)
    _refuse_repeats(names, table)
    place = _positions(listed[split], names, table)
    if (place < 0).any():
        image = listed[split][place < 0][0].decode()
        raise ValueError(f"{lists[split]}: {image} has no row in {table.name}; fetch both again")
    rows, dropped = np.sort(place), {}
    if views is not None:
        kept, other = _of_views(table, found[0], views, VIEWS["nih"])
        rows, dropped = rows[kept[rows]], {other: int((~kept[rows]).sum())}
    return _xray(
        name, folder / "images", names[rows], labels[rows], NIH_CLASSES, patients[rows],
        options={"views": list(views)} if views else {}, dropped=dropped,
    )  # fmt: skip


def _nih_labels(values):
    return np.array([_nih_row(value) for value in values], np.float32)


@functools.cache
def _nih_row(findings):
    """The labels (14,) that a text like "Mass|Nodule" names."""
    present = set(findings.split("|")) - {"No Finding"}
    if not present <= set(NIH_CLASSES):
        raise ValueError("unknown finding")
    return [cls in present for cls in NIH_CLASSES]


NIH_FINDINGS = Column(
    object, _nih_labels, lambda text: set(text.split("|")) <= {"No Finding", *NIH_CLASSES},
    f"be No Finding, or some of these joined by |: {', '.join(NIH_CLASSES)}",
)  # fmt: skip


def padchest(name, root, split, views=VIEWS["padchest"], split_by="patient"):
    """PadChest (Bustos et al. 2020, arXiv:1901.07441), a tenth of it held out.

    split_by: "patient" keeps each patient on one side; "image" is the study's split, which does
    not. Images without labels and those known to be broken are left out, as in the study.
    """
    folder = root / "PadChest"
    table = folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    need(name, table)
    if split_by not in ("patient", "image"):
        raise ValueError(f"--split-by {split_by}: must be patient or image")
    columns = {"ImageID": TEXT, "PatientID": TEXT, "Projection": TEXT}
    columns |= {"Labels": PADCHEST_FINDINGS, "ImageDir": TEXT}
    names, patients, found, labels, folders = read_table(table, columns, optional=("ImageDir",))
    _refuse_repeats(names, table)
    found = np.where(found == b"AP_horizontal", b"AP Supine", found)
    kept, other = _of_views(table, found, views, VIEWS["padchest"])
    unlabelled = kept & np.isnan(labels[:, 0])
    broken = np.isin(names, [file.encode() for file in PADCHEST_BROKEN]) & kept & ~unlabelled
    rows = np.flatnonzero(kept & ~unlabelled & ~broken)
    rows = _padchest_split(rows, patients[rows], split_by)[split]
    dropped = {other: (~kept).sum(), "no labels": unlabelled.sum(), "known broken": broken.sum()}
    return _xray(
        name, folder, _padchest_names(folder, names, folders)[rows], labels[rows],
        PADCHEST_CLASSES, patients[rows], options={"views": list(views), "split_by": split_by},
        dropped={why: int(count) for why, count in dropped.items()},
    )  # fmt: skip


PADCHEST_FINDINGS = Column(
    object, lambda values: np.array([_padchest_row(value) for value in values], np.float32),
    lambda text: True, "be text",
)  # fmt: skip


def _padchest_split(rows, patients, split_by):
    """{split: rows}: nine tenths of the images, or of the patients, train."""
    rng = np.random.RandomState(42)
    if split_by == "image":
        rows = rows[rng.permutation(len(rows))]
        count = int(0.9 * len(rows))
        return {"train": rows[:count], "test": rows[count:]}
    known = rng.permutation(np.unique(patients))
    train = np.isin(patients, known[: int(0.9 * len(known))])
    return {"train": rows[train], "test": rows[~train]}


def _padchest_names(folder, names, folders):
    """Paths below the dataset's directory: images lie in the folder of ImageDir, or beside it."""
    used = [] if folders is None else [f for f in np.unique(folders) if f]
    if not any((folder / os.fsdecode(f)).is_dir() for f in used):
        return names
    return np.char.add(np.where(folders != b"", np.char.add(folders, b"/"), b""), names)


@functools.lru_cache(maxsize=2**16)
def _padchest_row(text):
    """The study's reading of the label text; NaN everywhere where there is none."""
    if not text:
        return [math.nan] * len(PADCHEST_CLASSES)
    return [
        any(word in text for word in (cls.lower(), *PADCHEST_SYNONYMS.get(cls, ())))
        for cls in PADCHEST_CLASSES
    ]


def covidx(name, root, split):
    """COVIDx CXR-2 (Wang et al. 2020, arXiv:2003.09871)."""
    folder = root / "COVIDx-CXR2"
    path = folder / f"{split}.txt"
    need(name, path, folder / split)
    classes, rows = ("negative", "positive"), []
    for number, line in _read_list(path):
        # The patient's id may hold blanks, the file's name, the label and the source do not.
        patient, *fields = line.rsplit(None, 3)
        if len(fields) < 3 or fields[1] not in classes or "/" in fields[0]:
            raise ValueError(
                f"{path}, line {number}: {line!r} is not 'patient file negative|positive source'"
            )
        rows.append((patient, fields[0], classes.index(fields[1])))
    patients, names, labels = zip(*rows)
    names = encoded(names)
    _refuse_repeats(names, path)
    return _xray(
        name, folder / split, names, np.array(labels, np.int64), classes, encoded(patients)
    )


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
                raise ValueError(
                    f"{file}: its name ends in neither _0 (normal) nor _1; rename it or move it out"
                )
        np.random.RandomState(42).shuffle(files)
        count = int(0.85 * len(files))
        chosen = files[:count] if split == "train" else files[count:]
        names += [str(file.relative_to(folder)) for file in chosen]
    labels = np.array([int(Path(file).stem[-1]) for file in names], np.int64)
    return _xray(name, folder, encoded(names), labels, ("normal", "tuberculosis"), None)
