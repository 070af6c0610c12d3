"""What the tests of packs share: six chest X-rays, packing here and in a process of its own."""

import contextlib
import io
import os
import resource
import signal
import sys
import threading
import time
import traceback

import numpy as np
from PIL import Image
from tqdm import tqdm
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
        names = sorted(row[0] for rows in NIH.values() for row in rows)
        self.pixels = {name: self.noise(*shape) for name, shape in zip(names, shapes)}
        self.pixels["00000002_000.png"] = self.noise(48, 48, dtype=np.uint16)
        for name, pixels in self.pixels.items():
            save(self.image(name), pixels)

    def image(self, name):
        return self.nih / "images" / name


def pack(name, size, *args, root=".", status=0):
    """Runs `data.py pack` in this process; the one line of its error, or what it printed."""
    out, err = io.StringIO(), io.StringIO()
    words = ("pack", name, "--size", size, "--data-dir", root, "--workers", 1, *args)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert data.main([*map(str, words)]) == status
    return error_line(err.getvalue()) if status else out.getvalue()


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
    """The command line in a forked process of its own group: no import to wait for.

    hook: called with (event, arguments) of each file operation (sys.addaudithook). limit: bytes
    that a file may have.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # the parent's is one for all, and one may die with it
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if hook:
            sys.addaudithook(hook)
        status = data.main([*map(str, args), "--workers", "1"])
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def until(condition, pid):
    """Waits for the condition or for the end of the process."""
    while not condition() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)


def wait(pid):
    """Its status, negative for a signal; what is left of its group ends too."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status


def written(folder):
    """Bytes of the packs below a folder, whole or not."""
    total = 0
    for path in folder.glob("*@*/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


class Large:
    """folder: dataset of 96 + 16 flat images of 640 px: a raw pack of 138 MB, quickly decoded."""

    def __init__(self, root):
        self.images, self.undisturbed = root / "large", root / "undisturbed"
        for split, count in (("train", 96), ("test", 16)):
            for i in range(count):
                path = self.images / split / "ab"[i % 2] / f"{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                flat = Image.new("RGB", (640, 640), (i, 2 * i, len(split)))
                flat.save(path, compress_level=1)
        assert wait(start(self.args(self.undisturbed), root / "log")) == 0
        self.bytes = written(self.undisturbed)

    def args(self, out):
        return "pack", f"folder:{self.images}", "--size", 640, "--out", out

    def finish(self, out):
        """Packing goes on to the same bytes; compared one by one, for small machines."""
        assert wait(start(self.args(out), out.parent / "log")) == 0
        folder, expected = out / "large@640", self.undisturbed / "large@640"
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            p.name for p in expected.iterdir()
        )
        assert all(p.read_bytes() == (expected / p.name).read_bytes() for p in folder.iterdir())
        assert [path.name for path in out.iterdir()] == ["large@640"]
