"""What it takes to know a dataset's images: mimic's tables, and the paths of ImageNet-21k."""

import csv
import hashlib
import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Report, Required, apart, import_peer, megabytes, timed
from data import batch_indices
from readers import archives, natural, xrays

IMAGENET21K_CLASSES = 21_841
OPENERS = 4
WORKER_MEGABYTES, OPEN_SECONDS = 100, 2.0  # what a worker may add, and opening may take


def index(args, env):
    """Seconds and memory to know a dataset's images: mimic's tables beside pandas; a class index.

    Each measurement has a process of its own; its memory is the growth of the peak (VmHWM).
    Of the class index all is real but the listing of its 21,841 directories, which is timed
    apart. "opening": the slowest and largest of 4 workers, which then look up 100 batches; their
    own memory leaves out the mapped files, which all workers share.
    """
    import_peer("pandas")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        tables, tree = Path(folder, "mimic"), Path(folder, "imagenet-21K")
        make_mimic(tables, args.rows)
        for _ in range(args.rounds):
            for name, read in (("ours, mimic", our_mimic), ("pandas, mimic", pandas_mimic)):
                found = apart(read, tables)
                best = measured.setdefault(name, found)
                best |= {key: min(best[key], found[key]) for key in ("seconds", "megabytes")}
        ours, pandas = measured.values()
        if ours["digest"] != pandas["digest"]:
            raise RuntimeError("ours and pandas read different labels")
        measured["listing"] = apart(list_classes, Path(folder, "listed"), args.listed)
        measured["building"] = apart(build_index, tree, args.images)
        with multiprocessing.get_context("spawn").Pool(OPENERS) as pool:
            workers = pool.starmap(open_index, [(tree, args.images)] * OPENERS, chunksize=1)
    opening = {key: max(worker[key] for worker in workers) for key in workers[0]}
    measured["opening"] = opening
    counts = (args.rows, args.rows, args.listed, args.images, args.images)
    rows = [
        {"what": name, "images": count, "seconds": found["seconds"], "MB": found["megabytes"]}
        for (name, found), count in zip(measured.items(), counts)
    ]
    required = []
    for unit, least in (("seconds", 0.5), ("megabytes", 1.0)):
        required.append(Required(f"pandas' {unit}", "ours", pandas[unit] / ours[unit], least))
    for unit, limit in (("megabytes", WORKER_MEGABYTES), ("seconds", OPEN_SECONDS)):
        required.append(Required(f"{limit:g} {unit}", "opening", limit / opening[unit], 1.0))
    return Report({"measured": measured}, rows, required)


def make_mimic(folder, rows):
    """MIMIC-CXR-JPG's three tables with made content, in the real columns."""
    pandas, rng = import_peer("pandas"), np.random.default_rng(0)
    folder.mkdir()
    studies = 50_000_000 + np.arange(max(1, rows * 3 // 5))  # as many as are MIMIC's
    owners = 10_000_000 + rng.integers(max(1, rows * 65_379 // 377_110), size=len(studies))
    marks = rng.choice(["", "0.0", "1.0", "-1.0"], (len(studies), 14), p=[0.8, 0.05, 0.12, 0.03])
    dicoms = ["-".join(f"{w:08x}" for w in row) for row in rng.integers(2**32, size=(rows, 5))]
    views = rng.choice(["AP", "PA", "LATERAL", "LL", ""], rows, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    parts = rng.choice(["train", "validate", "test"], rows, p=[0.97, 0.02, 0.01])
    findings = {"subject_id": owners, "study_id": studies}
    findings |= dict(zip(sorted(xrays.FINDING_COLUMNS), marks.T))
    of = rng.integers(len(studies), size=rows)
    ids = {"dicom_id": dicoms, "subject_id": owners[of], "study_id": studies[of]}
    procedure = '"CHEST (PA AND LAT)"'
    metadata = ids | {"PerformedProcedureStepDescription": procedure, "ViewPosition": views}
    metadata |= {"Rows": 3056, "Columns": 2544, "StudyDate": 21800506, "StudyTime": 213014.531}
    metadata["ProcedureCodeSequence_CodeMeaning"] = procedure
    split = {"dicom_id": dicoms, "study_id": studies[of], "subject_id": owners[of], "split": parts}
    for part, table in {"chexpert": findings, "metadata": metadata, "split": split}.items():
        path, packing = table_of(folder, part), {"method": "gzip", "compresslevel": 1}
        quotes = {"quoting": csv.QUOTE_NONE, "quotechar": "'"}  # as they stand
        pandas.DataFrame(table).to_csv(path, index=False, compression=packing, **quotes)


def table_of(folder, part):
    return folder / f"mimic-cxr-2.0.0-{part}.csv.gz"


def our_mimic(folder):
    rows, taken = timed(lambda: xrays.mimic_rows("mimic", folder, "train", ("PA", "AP")))
    return taken | {"digest": digest(rows[0], rows[3])}


def pandas_mimic(folder):
    pandas = import_peer("pandas")

    def read():
        columns = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
        metadata = pandas.read_csv(table_of(folder, "metadata"), usecols=columns)
        split = pandas.read_csv(table_of(folder, "split"), usecols=["dicom_id", "split"])
        table = metadata.merge(split, on="dicom_id")
        table = table[(table["split"] == "train") & table["ViewPosition"].isin(["PA", "AP"])]
        findings = pandas.read_csv(table_of(folder, "chexpert"))
        table = table.merge(findings, on=["subject_id", "study_id"])
        labels = table[xrays.CHEXPERT_COLUMNS].replace(-1, np.nan).to_numpy(np.float32)
        labels[table["No Finding"].to_numpy() == 1] = 0
        return table["dicom_id"].to_numpy("S"), labels

    rows, taken = timed(read)
    return taken | {"digest": digest(*rows)}


def digest(names, labels):
    """Of names (N,) bytes and labels (N,C), whatever their order."""
    order = np.argsort(names)
    content = np.ascontiguousarray(names[order]), np.nan_to_num(labels[order], nan=-1)
    return hashlib.sha256(b"".join(values.tobytes() for values in content)).hexdigest()


def list_classes(folder, files):
    """Of class_index on files that are really there (links to one)."""
    for start in range(0, files, 1000):
        first = folder / f"n{start:08d}" / "first.JPEG"
        first.parent.mkdir(parents=True)
        first.touch()
        for i in range(1, min(1000, files - start)):
            os.link(first, first.with_name(f"{i}.JPEG"))
    return timed(lambda: archives.class_index(folder))[1]


def build_index(folder, images):
    """Of class_index on empty directories, in place of whose listing made_images answers."""
    for c in range(min(IMAGENET21K_CLASSES, images)):
        (folder / f"n{c:08d}").mkdir(parents=True)
    archives._class_images = partial(made_images, images)
    archives.CACHE_FROM = 0
    return timed(lambda: archives.class_index(folder, held_out=natural.held_out))[1]


def made_images(images, entry):
    """What listing the directory of a class would find of so many images in all."""
    count = images // IMAGENET21K_CLASSES + (int(entry.name[1:]) < images % IMAGENET21K_CLASSES)
    names = np.array([f"{entry.name}/{entry.name}_{i}.JPEG".encode() for i in range(count)], "S")
    return names, np.full((count, 2), -1)


def open_index(folder, images):
    """Of a worker, which opens the index and looks up the images of 100 batches."""
    before = megabytes("RssAnon")
    found, taken = timed(lambda: archives.class_index(folder, held_out=natural.held_out))
    for step in range(100):
        chosen = batch_indices(step, images, 256, seed=0)[0]
        found["names"][chosen], found["labels"][chosen]
    return taken | {"megabytes": max(megabytes("RssAnon") - before, 0.1)}
