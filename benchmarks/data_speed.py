"""The benchmarks of data: from files to batches, and the index of a dataset."""

import functools
import gzip
import hashlib
import importlib
import itertools
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T
from tqdm import tqdm

import data
from benchmarks.measure import (
    Report,
    apart,
    best_speeds,
    fastest,
    import_peer,
    memory,
    speed_report,
    timed,
)
from engine import console
from engine import processes as engine
from readers import archives, natural, packs, synthetic, transforms, xrays
from readers import cache as loading
from readers.images import ImageDataset

# ------------------------------------------------------------------------------------------------
# load: from files to batches
# ------------------------------------------------------------------------------------------------

LOAD_BATCH, LOAD_SIZE = 32, 224
STUDY, OURS = "study", "ours"
LOAD_REQUIRED = (
    (f"{OURS}, decoding", STUDY, 1.2),
    (f"{OURS}, pack, training", STUDY, 8),
    (f"{OURS}, pack, test", STUDY, 30),
    (f"{OURS}, 32 px JPEG", "torchvision, 32 px JPEG", 1.2),
    (f"{OURS}, 256 px JPEG", "torchvision, 256 px JPEG", 1.2),
)


def load_options(parser):
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="directory that holds nih (default: 32 X-rays of "
        "1024 px are made)")  # fmt: skip
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")


def load(args, env):
    """Images a second of one core (of its own time, whatever else runs on the machine): from files
    in the page cache to a batch of images of 224 pixels.

    "study": 1024 px X-rays to floats, cropped and resized as the study's code does it, with OpenCV
    (if installed) and with Pillow. "ours": the same to uint8 batches; from a pack with the X-ray
    training augmentation, and from a pack at test. "torchvision": ImageFolder with
    RandomResizedCrop, flip, ToTensor and Normalize on folders of JPEGs; ours with the same
    transform, normalised too.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arms = _xray_arms(Path(args.data_dir or _make_xrays(Path(folder))), Path(folder))
        for side, crop in ((32, 32), (256, LOAD_SIZE)):
            arms |= _folder_arms(make_photos(Path(folder), side), f"{side} px JPEG", crop, env)
        for run in arms.values():
            run(1)
        speeds = best_speeds(arms, args.rounds, 4, LOAD_BATCH, env, time.process_time)
    return speed_report(speeds, fastest(speeds, STUDY), LOAD_REQUIRED)


def _xray_arms(root, folder):
    dataset = data.load_dataset("nih", root)
    packs.pack("nih", {s: data.load_dataset("nih", root, s) for s in data.SPLITS}, LOAD_SIZE,
        folder / f"nih@{LOAD_SIZE}")  # fmt: skip
    packed = data.load_dataset(f"nih@{LOAD_SIZE}", folder)
    pipelines = [transforms.pretraining_pipeline("medical", LOAD_SIZE, t) for t in (True, False)]
    readers = {f"{STUDY}, Pillow": _study_pillow}
    if importlib.util.find_spec("cv2"):
        readers |= {f"{STUDY}, OpenCV": _study_opencv, "OpenCV, grey, 32-bit": _lean_opencv}
    peers = {name: functools.partial(_read_as, read, dataset) for name, read in readers.items()}
    return peers | {
        f"{OURS}, decoding": _batches_of(dataset, pipelines[1]),
        f"{OURS}, pack, training": _batches_of(packed, pipelines[0]),
        f"{OURS}, pack, test": _batches_of(packed, pipelines[1]),
    }


def _folder_arms(folder, title, size, env):
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.pretraining_pipeline("natural", size, train=True)
    mean, std = transforms.NORMALIZATION["natural"]
    peer = torchvision.datasets.ImageFolder(
        folder / "train",
        T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(),
            T.Normalize(mean, std)]),
    )  # fmt: skip
    normalised = _batches_of(
        dataset, pipeline, lambda batch: engine.to_input(batch, (mean, std), env.device)
    )
    return {
        f"torchvision, {title}": functools.partial(_read_as, lambda item: item[0], peer),
        f"{OURS}, {title}": normalised,
    }


def _batches_of(dataset, pipeline, then=lambda batch: batch):
    """steps -> that many global batches of shuffled images, as a loader worker makes them."""
    batches, step = loading.Batches(dataset, pipeline, LOAD_BATCH), itertools.count()
    return lambda steps: [then(batches[next(step)][0]) for _ in range(steps)]


def _read_as(read, dataset, steps):
    """Batches of the peer: read(item) of one image after the other, stacked."""
    files = isinstance(dataset, ImageDataset)
    for _ in range(steps):
        items = (i % len(dataset) for i in range(LOAD_BATCH))
        torch.stack([read(dataset.where(i) if files else dataset[i]) for i in items])


def _study_pillow(path):
    """The study's preparation, by Pillow: colour decoded, floats in [0,1], one channel, square."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")) / 255.0
    square = Image.fromarray(_central_square(pixels[..., 0]).astype(np.float32))
    return torch.from_numpy(np.array(square.resize((LOAD_SIZE, LOAD_SIZE), Image.Resampling.BOX)))


def _study_opencv(path):
    """The study's preparation with its library: OpenCV's INTER_AREA on 64-bit floats."""
    cv2 = importlib.import_module("cv2")
    pixels = cv2.imread(path) / 255.0
    return _opencv_area(cv2, pixels[..., 0])


def _lean_opencv(path):
    """The same without its detours: grey decoded, 32-bit floats."""
    cv2 = importlib.import_module("cv2")
    return _opencv_area(cv2, cv2.imread(path, cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255)


def _opencv_area(cv2, pixels):
    cv2.setNumThreads(1)
    square = _central_square(pixels)
    return torch.from_numpy(cv2.resize(square, (LOAD_SIZE,) * 2, interpolation=cv2.INTER_AREA))


def _central_square(pixels):
    height, width = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _make_xrays(root, count=LOAD_BATCH, side=1024):
    """A data directory with nih: made X-rays in the official layout."""
    folder = root / data.DATASETS["nih"].folder
    (folder / "images").mkdir(parents=True)
    names = [f"{i:08d}_000.png" for i in range(count + 1)]
    rows = ["Image Index,Finding Labels,Patient ID"]
    for i, name in enumerate(tqdm(names, "X-rays", leave=False)):
        pixels = synthetic.render("synthetic-xray", "train", i, side, 0)[0]
        Image.fromarray(pixels).save(folder / "images" / name)
        rows.append(f"{name},No Finding,{i}")
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (folder / "train_val_list.txt").write_text("\n".join(names[:count]))
    (folder / "test_list.txt").write_text(names[count])
    return root


def make_photos(root, side, classes=4, count=16):
    """A folder of made JPEGs: train/CLASS/* and test/CLASS/*."""
    folder = root / f"photos-{side}"
    for split, cls in itertools.product(data.SPLITS, range(classes)):
        (folder / split / str(cls)).mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            pixels = synthetic.render("synthetic-natural", split, cls * count + i, side, 0)
            photo = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            photo.save(folder / split / str(cls) / f"{i}.jpg", quality=90)
    return folder


# ------------------------------------------------------------------------------------------------
# index: mimic's tables, and the paths of ImageNet-21k
# ------------------------------------------------------------------------------------------------

MIMIC_SUBJECTS, MIMIC_ROWS, OPENERS = 65_379, 377_110, 4
WORKER_MEGABYTES, OPEN_SECONDS = 100, 2.0  # what a worker may add, and opening may take


def index_options(parser):
    add = parser.add_argument
    add(
        "--rows", type=console.positive(int), default=MIMIC_ROWS, help="images of made mimic tables"
    )
    add("--images", type=console.positive(int), default=14_000_000, help="paths in the class index")
    add("--listed", type=console.positive(int), default=100_000, help="of them files that are "
        "really made, to time the listing of directories")  # fmt: skip
    add("--rounds", type=console.positive(int), default=3, help="turns an arm; the best counts")


def index(args, env):
    """Seconds and memory to know a dataset's images: mimic's tables beside pandas; a class index.

    Each measurement has a process of its own; its memory is the growth of the peak (VmHWM).
    Of the class index all is real but the listing of its 21,841 directories, which is timed
    apart. A worker's own memory leaves out the mapped files, which all workers share.
    """
    import_peer("pandas")
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        tables, tree = Path(folder) / "mimic", Path(folder) / "imagenet-21K"
        _make_mimic(tables, args.rows)
        arms = {"ours, mimic": _our_mimic, "pandas, mimic": _pandas_mimic}
        for _ in range(args.rounds):
            for name, read in arms.items():
                found = apart(read, tables)
                best = values.setdefault(name, found)
                best |= {key: min(best[key], found[key]) for key in ("seconds", "megabytes")}
        if values["ours, mimic"]["digest"] != values["pandas, mimic"]["digest"]:
            raise RuntimeError("ours and pandas read different labels")
        values["listing"] = apart(_list_classes, Path(folder) / "listed", args.listed)
        values["building"] = apart(_build_index, tree, args.images)
        with multiprocessing.get_context("spawn").Pool(OPENERS) as pool:
            workers = pool.starmap(_open_index, [(tree, args.images)] * OPENERS, chunksize=1)
        values["opening"] = {key: max(w[key] for w in workers) for key in workers[0]}
    return _index_report(values, args)


def _index_report(values, args):
    titles = {
        "ours, mimic": f"{args.rows:,} rows of mimic: ours",
        "pandas, mimic": f"{args.rows:,} rows of mimic: pandas",
        "listing": f"class index: listing {args.listed:,} files",
        "building": f"class index: building and writing {args.images:,} paths",
        "opening": f"class index: opening, slowest and largest of {OPENERS} workers",
    }
    header = ["what", "seconds", "MB"]
    rows = [[titles[k], f"{v['seconds']:.2f}", f"{v['megabytes']:.0f}"] for k, v in values.items()]
    ours, pandas, opening = (values[k] for k in ("ours, mimic", "pandas, mimic", "opening"))
    required = [
        (f"pandas' {unit}", "ours", pandas[unit] / ours[unit], least)
        for unit, least in (("seconds", 0.5), ("megabytes", 1.0))
    ]
    limits = {"megabytes": WORKER_MEGABYTES, "seconds": OPEN_SECONDS}
    required += [
        (f"{limit:g} {unit}", "opening", limit / opening[unit], 1.0)
        for unit, limit in limits.items()
    ]
    return Report({"measured": values}, header, rows, required)


def _our_mimic(folder):
    rows, taken = timed(lambda: xrays.mimic_rows("mimic", folder, "train", ("PA", "AP")))
    return taken | {"digest": _digest(rows[0], rows[3])}


def _pandas_mimic(folder):
    pandas = import_peer("pandas")

    def read():
        parts = [folder / f"mimic-cxr-2.0.0-{p}.csv.gz" for p in ("metadata", "split", "chexpert")]
        metadata = pandas.read_csv(
            parts[0], usecols=["dicom_id", "subject_id", "study_id", "ViewPosition"]
        )
        split = pandas.read_csv(parts[1], usecols=["dicom_id", "split"])
        table = metadata.merge(split, on="dicom_id")
        table = table[(table["split"] == "train") & table["ViewPosition"].isin(["PA", "AP"])]
        table = table.merge(pandas.read_csv(parts[2]), on=["subject_id", "study_id"])
        labels = table[xrays.CHEXPERT_COLUMNS].replace(-1, np.nan).to_numpy(np.float32)
        labels[table["No Finding"].to_numpy() == 1] = 0
        return table["dicom_id"].to_numpy("S"), labels

    rows, taken = timed(read)
    return taken | {"digest": _digest(*rows)}


def _digest(names, labels):
    order = np.argsort(names)
    content = np.ascontiguousarray(names[order]), np.nan_to_num(labels[order], nan=-1)
    return hashlib.sha256(b"".join(values.tobytes() for values in content)).hexdigest()


def _make_mimic(folder, rows):
    """MIMIC-CXR-JPG's three tables with made content, in the real columns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    subjects = rng.integers(10_000_000, 20_000_000, max(1, rows * MIMIC_SUBJECTS // MIMIC_ROWS))
    subjects = np.unique(subjects)
    studies = np.unique(rng.integers(50_000_000, 60_000_000, max(1, rows * 3 // 5)))
    owners = subjects[rng.integers(len(subjects), size=len(studies))]
    marks = rng.choice(["", "0.0", "1.0", "-1.0"], (len(studies), 14), p=[0.8, 0.05, 0.12, 0.03])
    dicoms = ["-".join(f"{w:08x}" for w in row) for row in rng.integers(2**32, size=(rows, 5))]
    views = rng.choice(["AP", "PA", "LATERAL", "LL", ""], rows, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    parts = rng.choice(["train", "validate", "test"], rows, p=[0.97, 0.02, 0.01])
    columns = sorted(xrays.FINDING_COLUMNS)
    with _packed_table(folder, "chexpert") as table:
        table.write(",".join(["subject_id", "study_id", *columns]) + "\n")
        for owner, study, row in zip(owners, studies, marks):
            table.write(f"{owner},{study},{','.join(row)}\n")
    of = rng.integers(len(studies), size=rows)
    with _packed_table(folder, "metadata") as table, _packed_table(folder, "split") as split:
        table.write(
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,"
            "Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning\n"
        )
        split.write("dicom_id,study_id,subject_id,split\n")
        for dicom, study, view, part in zip(dicoms, of, views, parts):
            ids = owners[study], studies[study]
            table.write(
                f'{dicom},{ids[0]},{ids[1]},"CHEST (PA AND LAT)",{view},3056,2544,21800506,'
                '213014.531,"CHEST (PA AND LAT)"\n'
            )
            split.write(f"{dicom},{ids[1]},{ids[0]},{part}\n")


def _packed_table(folder, part):
    return gzip.open(folder / f"mimic-cxr-2.0.0-{part}.csv.gz", "wt", compresslevel=1)


def _list_classes(folder, files):
    """Time and memory of class_index on files that are really there (links to one)."""
    for start in range(0, files, 1000):
        (folder / f"n{start:08d}").mkdir(parents=True)
        first = folder / f"n{start:08d}" / "first.JPEG"
        first.touch()
        for i in range(1, min(1000, files - start)):
            os.link(first, first.with_name(f"{i}.JPEG"))
    found, taken = timed(lambda: archives.class_index(folder))
    if len(found["names"]) != files:
        raise RuntimeError(f"{len(found['names'])} of {files} files were found")
    return taken


def _made_images(images, entry):
    """In place of listing a directory of class entry: what it would find."""
    count = images // IMAGENET21K_CLASSES + (int(entry.name[1:]) < images % IMAGENET21K_CLASSES)
    names = np.array([f"{entry.name}/{entry.name}_{i}.JPEG".encode() for i in range(count)], "S")
    return names, np.full((count, 2), -1)


IMAGENET21K_CLASSES = 21_841


def _build_index(folder, images):
    for c in range(min(IMAGENET21K_CLASSES, images)):
        (folder / f"n{c:08d}").mkdir(parents=True)
    archives._class_images = functools.partial(_made_images, images)
    archives.CACHE_FROM = 0
    return timed(lambda: archives.class_index(folder, held_out=natural.held_out))[1]


def _open_index(folder, images):
    """A worker: opens the index, then looks up the images of 100 batches."""
    before = memory("RssAnon")
    found, taken = timed(lambda: archives.class_index(folder, held_out=natural.held_out))
    for step in range(100):
        chosen = loading.batch_indices(step, images, 256, seed=0)[0]
        found["names"][chosen], found["labels"][chosen]
    return taken | {"megabytes": max(memory("RssAnon") - before, 0.1)}
