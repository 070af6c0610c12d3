"""What the tests of packs share: six chest X-rays, packing here and in a process of its own."""

import contextlib
import io
import os
import resource
import sys

import interruption
import numpy as np
from trees import Trees, save

import data

# File, findings, patient, view: of the training and the test images, in the order of the table.
NIH = {
    "train": [
        ("00000001_000.png", "Cardiomegaly|Effusion", 1, "PA"),
        ("00000001_001.png", "No Finding", 1, "AP"),
        ("00000003_000.png", "Hernia", 3, "PA"),
        ("00000004_000.png", "Pneumothorax|Atelectasis", 4, "PA"),
    ],
    "test": [("00000002_000.png", "Mass", 2, "AP"), ("00000005_000.png", "Nodule", 5, "PA")],
}


class Xrays(Trees):
    """Six chest X-rays: wide, tall, of sides that are no multiple of 16, 16-bit, small."""

    def __init__(self, root):
        super().__init__(root)
        self.write_nih(NIH["train"], NIH["test"], images=False)
        # Margins are even, so that the central square is one alone; 10 x 12 is smaller than a pack.
        shapes = [(48, 60), (100, 48), (48, 48), (21, 21), (10, 12), (50, 50)]
        for name, shape in zip(sorted(row[0] for rows in NIH.values() for row in rows), shapes):
            save(self.image(name), self.noise(*shape))
        save(self.image("00000002_000.png"), self.noise(48, 48, dtype=np.uint16))

    def image(self, name):
        return self.nih / "images" / name


CHEXPERT = [
    "train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    "train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,0.0,,,,1.0,,,",
    "train/patient00002/study2/view2_lateral.jpg,Male,87,Lateral,,,,1.0,1.0,,-1.0,,,,,,,,",
]


def write_chexpert(trees):
    """Marks that are missing, an image that is left out."""
    trees.write_chexpert("train", CHEXPERT)
    trees.write_chexpert("valid", [CHEXPERT[1].replace("train/patient00002", "valid/patient64541")])


def run_data(*args, status=0):
    """Runs data.py in this process; what it printed, or the one line of its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert data.main([*map(str, args)]) == status
    return error_line(err.getvalue()) if status == 2 else out.getvalue()


def rows_of(out):
    """Cells of the rows of Markdown tables, by the first."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


def pack(name, size, *args, root=".", status=0):
    words = "pack", name, "--size", size, "--data-dir", root, "--workers", 1
    return run_data(*words, *args, status=status)


def error_line(err):
    """The last line, which alone speaks of an error (progress bars may stand above it)."""
    *above, last = err.splitlines()
    assert last.startswith("error: ") and "Traceback" not in err and "error" not in "".join(above)
    return last


def says(message, *words):
    return all(str(word) in message for word in words)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(args, log, hook=None, limit=None):
    """The command line in a forked process, which writes to `log`; see interruption.start.

    hook: called with (event, arguments) of each file operation (sys.addaudithook), os.fsync too.
    limit: bytes that a file may have.
    """

    def patch():
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2, sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(output, stream)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if hook:
            sys.addaudithook(hook)
            os.fsync = lambda file: sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{file}"))

    return interruption.start(data.main, ["data.py", *args, "--workers", 1], log.parent, patch)
