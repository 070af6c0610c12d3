"""From files to batches: decoding, packs, folders and tables, beside what else does it."""

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

import data
import pretrain
from benchmarks.train import best_speeds, make_images, speed_report
from engine.evaluate import to_input
from readers import packs, xrays
from readers.tables import finding
from readers.transforms import NORMALIZATION, xray_pipeline

BATCH, SIZE = 32, 224
MIMIC, IDS = "mimic-cxr-2.0.0-{}.csv.gz", ["dicom_id", "subject_id", "study_id"]
REQUIRED = (
    ("ours, decoding", "study", 1.2),
    ("ours, pack, training", "study", 8),
    ("ours, pack, test", "study", 30),
    ("ours, 32 px JPEG", "torchvision, 32 px JPEG", 1.2),
    ("ours, 256 px JPEG", "torchvision, 256 px JPEG", 1.2),
    ("ours, tables", "pandas, tables", 0.5),
)


def load(args, env):
    """Images a second of one core (of its own time, whatever else runs on the machine): from files
    in the page cache to a batch of images of 224 pixels.

    "study": 1024 px X-rays to floats, cropped and resized as the study's code does it, with Pillow.
    "ours": the same to uint8 batches; from a pack with the X-ray training augmentation, and from a
    pack at test. "torchvision": ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize on
    folders of JPEGs; ours with the same transform, normalised too. "tables": the labels of made
    images in MIMIC's three tables.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder, sets, arms = Path(made), {}, {}
        make_mimic(folder, args.rows)
        mimic = folder, "train", ("PA", "AP"), finding()[0]
        ours = (xrays.mimic_rows("mimic", *mimic) for _ in itertools.count())
        theirs = (pandas_of_mimic(folder) for _ in itertools.count())
        (files, _, _, labels, _), (expected_files, expected_labels) = next(ours), next(theirs)
        np.testing.assert_array_equal(files, expected_files)
        np.testing.assert_array_equal(labels, expected_labels)
        photos = make_images(folder, 1024, "synthetic-xray", "png")
        for split in data.SPLITS:
            dataset = data.load_dataset(f"folder:{photos}", split=split)
            grey = dataset.reader._replace(mode="L")
            sets[split] = replace(dataset, domain="medical", reader=grey)
        packs.pack("xrays", sets, SIZE, folder / f"xrays@{SIZE}")
        dataset, packed = sets["train"], packs.open_pack(f"xrays@{SIZE}", folder, "train")
        arms["study"] = one_by_one(study, [dataset.where(i) for i in range(len(dataset))])
        arms["ours, decoding"] = batches(dataset, xray_pipeline(SIZE, train=False))
        arms["ours, pack, training"] = batches(packed, xray_pipeline(SIZE, train=True))
        arms["ours, pack, test"] = batches(packed, xray_pipeline(SIZE, train=False))
        for side, size in ((32, 32), (256, SIZE)):
            photos, norm = make_images(folder, side), NORMALIZATION["natural"]
            augment = T.RandomResizedCrop(size), T.RandomHorizontalFlip()
            transform = T.Compose([*augment, T.ToTensor(), T.Normalize(*norm)])
            peer = torchvision.datasets.ImageFolder(photos / "train", transform)
            images = one_by_one(lambda i, peer=peer: peer[i][0], range(len(peer)))
            arms[f"torchvision, {side} px JPEG"] = images
            dataset = data.load_dataset(f"folder:{photos}")
            stream = batches(dataset, pretrain.choose_pipeline(dataset, size, train=True))
            arms[f"ours, {side} px JPEG"] = (to_input(x, norm, env.device) for x in stream)
        for arm in arms.values():
            next(arm)
        speeds = best_speeds(arms, args.rounds, 4, BATCH, env, time.process_time)
        tables = {"ours, tables": ours, "pandas, tables": theirs}
        speeds |= best_speeds(tables, args.rounds, 1, args.rows, env, time.process_time)
    return speed_report(speeds, "study", REQUIRED)


def pandas_of_mimic(folder):
    import pandas

    columns = {"metadata": [*IDS, "ViewPosition"], "split": ["dicom_id", "split"], "chexpert": None}
    tables = [pandas.read_csv(folder / MIMIC.format(k), usecols=v) for k, v in columns.items()]
    table = tables[0].merge(tables[1], on="dicom_id")
    table = table[(table["split"] == "train") & table["ViewPosition"].isin(["PA", "AP"])]
    table = table.merge(tables[2], on=IDS[1:])
    labels = table[xrays.CHEXPERT_COLUMNS].replace(-1, np.nan).to_numpy(np.float32)
    labels[table["No Finding"].to_numpy() == 1] = 0
    return table["dicom_id"].to_numpy("S"), labels


def batches(dataset, pipeline):
    """Yields batch after batch of shuffled images, as a loader worker makes them."""
    source = data.Batches(dataset, pipeline, BATCH)
    return (source[step][0] for step in itertools.count())


def one_by_one(read, items):
    """Yields batch after batch of the same images, read(item) each."""
    while True:
        yield torch.stack([read(item) for item in itertools.islice(itertools.cycle(items), BATCH)])


def study(path):
    """The study's X-ray, (SIZE, SIZE) floats, by Pillow: colour decoded, floats in [0,1], one
    channel, the central square, area resize.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")) / 255.0
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = Image.fromarray(pixels[top:, left:, 0][:side, :side].astype(np.float32))
    return torch.from_numpy(np.array(square.resize((SIZE, SIZE), Image.Resampling.BOX)))


def make_mimic(folder, rows):
    """MIMIC-CXR-JPG's three tables of so many images with made content, in the real columns."""
    import pandas

    rng = np.random.default_rng(0)
    studies = 50_000_000 + np.arange(max(1, rows * 3 // 5))  # as many as are MIMIC's
    subjects = 10_000_000 + rng.integers(max(1, rows // 6), size=len(studies))
    marks = rng.choice(["", "0.0", "1.0", "-1.0"], (len(studies), 14), p=[0.8, 0.05, 0.12, 0.03])
    findings = {"subject_id": subjects, "study_id": studies}
    findings |= dict(zip(sorted(xrays.FINDING_COLUMNS), marks.T))
    of = rng.integers(len(studies), size=rows)
    dicoms = ["-".join(f"{w:08x}" for w in row) for row in rng.integers(2**32, size=(rows, 5))]
    ids = dict(zip(IDS, (dicoms, subjects[of], studies[of])))
    views = rng.choice(["AP", "PA", "LATERAL", "LL", ""], rows, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    metadata = {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "ViewPosition": views}
    metadata |= {"Rows": 3056, "Columns": 2544, "StudyDate": 21800506}
    splits = rng.choice(["train", "validate", "test"], rows, p=[0.97, 0.02, 0.01])
    tables = {"chexpert": findings, "metadata": ids | metadata, "split": ids | {"split": splits}}
    for part, table in tables.items():
        pandas.DataFrame(table).to_csv(folder / MIMIC.format(part), index=False)
