"""Tiny datasets in their official layouts, for tests to read and to spoil."""

import csv
import gzip
import io
import os

import numpy as np
import torch
from PIL import Image

from data import load_dataset


def noise(rng, *shape, dtype=np.uint8):
    return rng.integers(np.iinfo(dtype).max + 1, size=shape).astype(dtype)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def luma(rgb):
    """ITU-R 601-2 in Pillow's fixed-point arithmetic."""
    r, g, b = (rgb[..., c].astype(int) for c in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


def random_image(rng, *shape):
    return torch.from_numpy(noise(rng, *shape))


def pixels_of(file, mode="RGB"):
    """Pillow's own reading of a path or of bytes as (C,H,W)."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)


def load_folder(path, split="train"):
    return load_dataset(f"folder:{path}", split=split)


def places(dataset):
    return [dataset.where(i) for i in range(len(dataset))]


def names(dataset):
    return [os.path.basename(place) for place in places(dataset)]


def write(path, content):
    """Writes text or bytes, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def read(path):
    return (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode()


def lines(header, rows):
    return "\n".join([header, *rows]) + "\n"


def replaced(column, text, table):
    """The table with that text in its fourth line."""
    header, *rows = table.splitlines()
    fields = rows[2].split(",")
    fields[header.split(",").index(column)] = text
    return lines(header, [*rows[:2], ",".join(fields), *rows[3:]])


def marks(*rows):
    """Labels, a row a text: 1, 0, and . for NaN."""
    return np.array([[{"1": 1, "0": 0, ".": np.nan}[c] for c in row] for row in rows], np.float32)


NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,View Position"
NIH_ROWS = (
    "00000001_000.png,Cardiomegaly|Effusion,0,1,PA",
    "00000001_001.png,No Finding,1,1,PA",
    "",
    '00000002_000.png,"Hernia","0, or so",2,"A, P"',
    "00000003_000.png,Pleural_Thickening|Atelectasis|Pneumothorax,0,3,PA",
    "00000004_000.png,Mass,0,4,PA",
)
# The header of 2017 has a comma after its last name, and so has each row.
NIH_HEADER_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
METADATA_HEADER = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns"
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
PADCHEST_HEADER = (  # the first column, pandas' row number, has no name; some others are left out
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,ViewPosition_DICOM,"
    "Projection,Manufacturer_DICOM,Report,MethodLabel,Labels,Localizations,labelCUIS"
).split(",")
# Other findings than those of Labels stand in other columns.
PADCHEST_ROW = {
    **{"": "7", "ImageDir": "0", "Projection": "PA", "Labels": "['normal']"},
    "Manufacturer_DICOM": "GMM, Móstoles",
    "Report": 'sin hallazgos , "cardiomegaly" , neumonía . pacemaker',
    "Localizations": "['loc right'\n 'scoliosis']",
}


class Trees:
    """X-ray datasets below one root; what write_ makes of rows, load reads."""

    def __init__(self, root):
        self.root, self.rng = root, np.random.default_rng(0)
        self.chexpert, self.mimic = root / "CheXpert-v1.0", root / "mimic-cxr-jpg" / "2.0.0"
        self.nih, self.padchest = root / "NIH-ChestXRay-14", root / "PadChest"
        self.tables = {part: self.chexpert / f"{part}.csv" for part in ("train", "valid")}
        for part in ("metadata", "split", "chexpert"):
            self.tables[part] = self.mimic / f"mimic-cxr-2.0.0-{part}.csv.gz"
        self.tables["nih"] = self.nih / "Data_Entry_2017_v2020.csv"
        table = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
        self.tables["padchest"] = self.padchest / table

    def noise(self, *shape, dtype=np.uint8):
        return noise(self.rng, *shape, dtype=dtype)

    def write_chexpert(self, part, rows, release="CheXpert-v1.0", images=True):
        write(self.tables[part], lines(CHEXPERT_HEADER, [f"{release}/{row}" for row in rows]))
        for row in rows if images else ():
            save(self.chexpert / row.split(",")[0], self.noise(10, 12))

    def write_mimic(self, rows=MIMIC_ROWS, findings=MIMIC_FINDINGS, images=True):
        """The split in another order than the metadata; of the official test set no image."""
        metadata = [f"{row[0]},{row[1]},{row[2]},CHEST,{row[3]},3056,2544" for row in rows]
        splits = [f"{dicom},{study},{subject},{split}" for dicom, subject, study, _, split in rows]
        write(self.tables["metadata"], lines(METADATA_HEADER, metadata))
        write(self.tables["split"], lines(SPLIT_HEADER, [*splits[4:], *splits[3::-1]]))
        write(self.tables["chexpert"], lines(MIMIC_FINDINGS_HEADER, findings))
        for *image, _, split in rows if images else ():
            if split != "test":
                save(self.mimic_image(*image), self.noise(10, 12))

    def mimic_image(self, dicom, subject, study):
        return self.mimic / f"files/p{subject // 10**6}/p{subject}/s{study}/{dicom}.jpg"

    def write_nih(self, train, test, header=NIH_HEADER_2017, images=True):
        """Rows (file, findings, patient, view); the lists are not in the table's order."""
        table = []
        for name, findings, patient, view in sorted((*train, *test)):
            facts = {"View Position": view, "Patient ID": patient, "Finding Labels": findings}
            facts |= {"Image Index": name, "Patient Age": "058Y", "": ""}
            table.append(",".join(str(facts.get(column, 1)) for column in header.split(",")))
            if images:
                save(self.nih / "images" / name, self.noise(10, 12))
        write(self.tables["nih"], lines(header, table))
        for file, rows in (("train_val_list.txt", train), ("test_list.txt", test)):
            write(self.nih / file, "\n".join(row[0] for row in reversed(rows)))

    def write_padchest(self, rows, header=PADCHEST_HEADER):
        """Rows {column: text}, completed by PADCHEST_ROW; writes no image."""
        table = io.StringIO()
        writer = csv.DictWriter(table, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(PADCHEST_ROW | row for row in rows)
        write(self.tables["padchest"], table.getvalue())

    def load(self, name, split="train", **options):
        return load_dataset(name, self.root, split, **options)


class Chests(Trees):
    """NIH ChestX-ray14 as a user may have it."""

    def __init__(self, root):
        super().__init__(root)
        self.train, self.test = self.nih / "train_val_list.txt", self.nih / "test_list.txt"
        self.folder, self.table = self.nih, self.tables["nih"]
        self.pixels = {
            "00000001_000.png": self.noise(9, 8),
            "00000001_001.png": self.noise(9, 8, dtype=np.uint16),
            "00000002_000.png": self.noise(9, 8),
            "00000003_000.png": self.noise(9, 8, 4),
        }
        for name, pixels in self.pixels.items():
            save(self.nih / "images" / name, pixels)
        write(self.table, "\ufeff" + "\r\n".join([NIH_HEADER, *NIH_ROWS, "", ""]))
        # Not in the order of the table, Windows line ends, blank lines, a byte order mark.
        write(self.train, "\ufeff00000003_000.png\r\n00000001_000.png\r\n\r\n00000001_001.png")
        write(self.test, "00000002_000.png\n")

    def load(self, split="train", **options):
        return super().load("nih", split, **options)


def write_photos(root, rng):
    """A folder: of three classes, 9 + 6 images, wide and tall, some smaller than 20 pixels."""
    shapes = {"cat": (40, 60), "dog": (61, 33), "newt": (12, 15)}
    for split, count in (("train", 3), ("test", 2)):
        for label, (height, width) in shapes.items():
            for i in range(count):
                save(root / split / label / f"{i}.png", noise(rng, height + i, width, 3))
    return root
