"""Packs against their originals, at every interruption, on full disks, and damaged."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refuses
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm
from trees import Trees, noise, save, write, write_photos

import data
from data import SPLITS, load_dataset
from readers import packs
from readers.xrays import NIH_CLASSES

# ------------------------------------------------------------------------------------------------
# Small datasets
# ------------------------------------------------------------------------------------------------

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


@pytest.fixture
def xrays(tmp_path):
    return Xrays(tmp_path)


@pytest.fixture
def photos(tmp_path, rng):
    return write_photos(tmp_path / "photos", rng)


@pytest.fixture
def pack(capsys):
    """Runs `data.py pack` in this process; the one line of its error, or what it printed."""

    def call(name, size, *args, root=".", status=0):
        words = ("pack", name, "--size", size, "--data-dir", root, "--workers", 1, *args)
        capsys.readouterr()
        assert data.main([*map(str, words)]) == status
        out, err = capsys.readouterr()
        return error_line(err) if status else out

    return call


def error_line(err):
    """The last line, which alone speaks of an error (progress bars may stand above it)."""
    *above, last = err.splitlines()
    assert last.startswith("error: ") and "Traceback" not in err and "error" not in "".join(above)
    return last


def says(message, *words):
    return all(str(word) in message for word in words)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_but_pixels(packed, original):
    np.testing.assert_array_equal(packed.labels, original.labels)  # a NaN equals a NaN
    assert packed.labels.dtype == original.labels.dtype
    assert packed.classes == original.classes and isinstance(packed.classes, tuple)
    assert (packed.task, packed.domain) == (original.task, original.domain)
    assert packed.options == json.loads(json.dumps(original.options))
    assert packed.dropped == original.dropped
    np.testing.assert_array_equal(packed.groups, original.groups)
    assert getattr(packed.groups, "dtype", None) == getattr(original.groups, "dtype", None)


# ------------------------------------------------------------------------------------------------
# What a pack holds
# ------------------------------------------------------------------------------------------------


def area_means(pixels, size):
    """Exact area means of the central square, as fractions: each pixel is cut into size² parts."""
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257)
    side = min(pixels.shape)
    top, left = ((length - side) // 2 for length in pixels.shape)
    square = pixels[top : top + side, left : left + side].astype(np.int64)
    size = min(size, side)
    parts = square.repeat(size, 0).repeat(size, 1).reshape(size, side, size, side)
    return parts.mean((1, 3))


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_xray_pack(xrays, pack, codec):
    originals = data.load_splits("nih", xrays.root)
    pack("nih", 16, "--codec", codec, "--quality", 95, root=xrays.root)
    xrays.nih.rename(xrays.root / "gone")
    for rows, packed, original in zip(
        NIH.values(), data.load_splits("nih@16", xrays.root), originals
    ):
        same_but_pixels(packed, original)
        assert packed.name == "nih@16" and packed.groups.tolist() == [row[2] for row in rows]
        for i, (name, findings, *_) in enumerate(rows):
            found = {cls for cls, mark in zip(NIH_CLASSES, packed.labels[i]) if mark == 1}
            assert found == set(findings.split("|")) - {"No Finding"} and name in packed.where(i)
            image, means = packed.read(i), area_means(xrays.pixels[name], 16)
            assert image.dtype == torch.uint8 and image.shape == (1, *means.shape)
            error = np.abs(image[0].numpy() - means)
            # Noise is the worst case of JPEG; at quality 95 the mean error stays near 1.
            assert error.max() <= 0.5 if codec == "raw" else error.mean() < 2.5


def resized(path, size):
    """torchvision's antialiased Resize of Pillow's reading; a smaller image as it is."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return v2.Resize(min(size, *pixels.shape[1:]), antialias=True)(pixels)


def as_jpeg(image, quality):
    """Pillow's writing and reading of a (3,H,W) image."""
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(content))).permute(2, 0, 1)


@pytest.mark.parametrize("codec, quality", [("raw", 90), ("jpeg", 95), ("jpeg", 10)])
def test_natural_pack(photos, pack, codec, quality):
    name = f"folder:{photos}"
    originals = data.load_splits(name)
    files = [sorted((photos / split).glob("*/*")) for split in SPLITS]
    expected = [[resized(path, 20) for path in paths] for paths in files]
    pack(name, 20, "--codec", codec, "--quality", quality)
    shutil.rmtree(photos)
    for packed, original, images in zip(data.load_splits(f"{name}@20"), originals, expected):
        same_but_pixels(packed, original)
        assert packed.name == f"{name}@20" and packed.classes == ("cat", "dog", "newt")
        for i, image in enumerate(images):
            assert torch.equal(packed.read(i), image if codec == "raw" else as_jpeg(image, quality))
    assert [min(image.shape[1:]) for image in images] == [20, 20, 20, 20, 12, 13]
    part = packed.subset([4, 0])
    assert torch.equal(part.read(0), packed.read(-2)) and part.where(1) == packed.where(0)


def test_large_jpeg_originals(tmp_path, rng, pack):
    """They may be decoded at a fraction of their size: smooth pictures stay the same."""
    y, x = np.mgrid[:320, :400]
    waves = np.stack([np.sin(x / 37), np.cos(y / 29), np.sin((x + y) / 51)], -1)
    path = tmp_path / "set" / "train" / "a" / "0.jpg"
    save(path, (127 + 100 * waves).astype(np.uint8), quality=98)
    save(tmp_path / "set" / "test" / "a" / "0.jpg", noise(rng, 30, 30, 3))
    pack(f"folder:{tmp_path}/set", 32)
    image = load_dataset(f"folder:{tmp_path}/set@32").read(0)
    assert image.shape == (3, 32, 40)
    assert (image.float() - resized(path, 32)).abs().max() <= 6


CHEXPERT = [
    "train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    "train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,0.0,,,,1.0,,,",
    "train/patient00002/study2/view2_lateral.jpg,Male,87,Lateral,,,,1.0,1.0,,-1.0,,,,,,,,",
    "train/patient00005/study1/view1_frontal.jpg,Male,83,Frontal,AP,,1.0,,,,,,,1.0,0.0,,,,",
]


def write_chexpert(trees):
    """Marks that are missing, an image that is left out."""
    trees.write_chexpert("train", CHEXPERT)
    trees.write_chexpert("valid", [CHEXPERT[1].replace("train/patient00002", "valid/patient64541")])


def write_padchest(trees):
    """16-bit images in numbered folders, patients of 36 digits."""
    rows = [{"ImageID": f"{i}.png", "PatientID": f"{10**35 + i // 2}"} for i in range(20)]
    trees.write_padchest(rows)
    for row in rows:
        save(trees.padchest / "0" / row["ImageID"], trees.noise(16, 16, dtype=np.uint16))


def write_covidx(trees):
    """Patients with names."""
    rows = {
        "train": ["3 COVID-19 0.png positive", "anon17 1.png negative"],
        "test": ["7 2.png positive"],
    }
    for split in SPLITS:
        write(
            trees.root / "COVIDx-CXR2" / f"{split}.txt", "".join(f"{r} rsna\n" for r in rows[split])
        )
        for row in rows[split]:
            save(trees.root / "COVIDx-CXR2" / split / row.split()[-2], trees.noise(20, 20))


@pytest.mark.parametrize(
    "name, make, words, options, other",
    [
        ("chexpert", write_chexpert, "", {}, {"views": ["L", "AP"]}),
        ("chexpert", write_chexpert, "--views L PA", {"views": ["L", "PA"]}, {"views": ["AP"]}),
        (
            "padchest",
            write_padchest,
            "--split-by image",
            {"split_by": "image"},
            {"split_by": "patient"},
        ),
        ("covidx", write_covidx, "", {}, {}),
    ],
)
def test_labels_patients_and_options(tmp_path, pack, name, make, words, options, other):
    make(Trees(tmp_path))
    originals = data.load_splits(name, tmp_path, **options)
    pack(name, 8, *words.split(), root=tmp_path)
    shutil.rmtree(tmp_path / data.DATASETS[name].folder)
    for given in ({}, options):
        for packed, original in zip(data.load_splits(f"{name}@8", tmp_path, **given), originals):
            same_but_pixels(packed, original)
    for option, value in other.items():
        load = partial(load_dataset, f"{name}@8", tmp_path, **other)
        refuses(ValueError, load, f"{name}@8 was packed with {option}", value, "--data-dir")
    refuses(ValueError, partial(load_dataset, f"{name}@8", tmp_path, gap=1), "takes no option gap")


def test_unions_and_parts_of_packs(xrays, pack):
    write_chexpert(xrays)
    for name in ("nih", "chexpert"):
        pack(name, 10, root=xrays.root)
    union, original = (
        load_dataset(name, xrays.root) for name in ("nih@10+chexpert@10", "nih+chexpert")
    )
    assert union.classes == original.classes and len(union) == 4 + 3
    assert union.groups.tolist() == original.groups.tolist()
    assert torch.equal(union.read(5), load_dataset("chexpert@10", xrays.root).read(1))
    for name in ("nih@10+chexpert@10", "nih+chexpert@10", "nih@10+chexpert"):
        np.testing.assert_array_equal(load_dataset(name, xrays.root).labels, original.labels)
    for options in ({"single_label": True}, {"fraction": 0.5, "fraction_seed": 2}):
        packed, original = (load_dataset(n, xrays.root, **options) for n in ("nih@10", "nih"))
        assert 0 < len(packed) < 4 and packed.labels.tolist() == original.labels.tolist()
        for i in range(len(packed)):
            assert os.path.basename(original.where(i)) in packed.where(i)


# ------------------------------------------------------------------------------------------------
# Where a pack lies, and of what it may be made
# ------------------------------------------------------------------------------------------------


def test_out_directory(xrays, photos, tmp_path, pack):
    out = tmp_path / "elsewhere" / "deep"
    for name in ("nih", f"folder:{photos}"):
        assert str(out) in pack(name, 16, "--out", out, root=xrays.root)
    assert not list(tmp_path.glob("*@*")) and len(load_dataset("nih@16", out)) == 4
    words = xrays.root / "nih@16", "python data.py pack nih --size 16"
    refuses(FileNotFoundError, partial(load_dataset, "nih@16", xrays.root), *words)
    out.rename(tmp_path / "moved")
    assert len(load_dataset(f"folder:{tmp_path}/moved/photos@16")) == 9


def test_names_of_folders(photos, pack):
    """A slash at the end, as a shell completes it; own images in a directory called NAME@SIZE."""
    pack(f"folder:{photos}/", 20)
    assert sorted(path.name for path in photos.iterdir()) == ["test", "train"]
    for name in (f"folder:{photos}@20", f"folder:{photos}/@20"):
        assert len(load_dataset(name)) == 9
    photos.rename(photos.parent / "own@30")
    own = f"folder:{photos.parent}/own@30"
    assert min(load_dataset(own).read(0).shape[1:]) == 40
    pack(own, 10)
    assert min(load_dataset(f"{own}@10").read(0).shape[1:]) == 10
    refused = pack(f"folder:{photos.parent}/own", 30, status=2)
    assert says(refused, photos.parent / "own", "PATH/train/CLASS")


def test_packing_what_is_packed(xrays, pack):
    """Nothing is touched; other settings or other labels are refused."""
    root, folder = xrays.root, xrays.root / "nih@16"
    pack("nih", 16, "--codec", "jpeg", "--quality", 70, "--views", "PA", root=root)
    assert [len(dataset) for dataset in data.load_splits("nih@16", root)] == [3, 1]
    before, first = {p: p.stat().st_mtime_ns for p in folder.iterdir()}, contents(folder)
    xrays.image("00000003_000.png").write_bytes(b"broken since")
    same = ("--codec", "jpeg", "--quality", 70, "--views", "PA")
    assert "whole" in pack("nih", 16, *same, root=root).splitlines()[-1]
    for other, word in (
        (("--codec", "raw", "--views", "PA"), "raw"),
        (("--codec", "jpeg", "--quality", 50, "--views", "PA"), "50"),
        (("--codec", "jpeg", "--quality", 70), "options"),
    ):
        line = pack("nih", 16, *other, root=root, status=2)
        assert says(line, folder, word, "remove it, or give another --out")
    table = xrays.tables["nih"]
    table.write_text(table.read_text().replace("Hernia", "Mass"))
    assert says(pack("nih", 16, *same, root=root, status=2), folder, "index", "remove")
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert contents(folder) == first
    assert sorted(p.name for p in root.iterdir()) == ["NIH-ChestXRay-14", "nih@16"]


def test_workers_give_the_same_bytes(nih_root, tmp_path, pack):
    """At the side that the images have: the very pixels."""
    for workers in (1, 2):
        pack("nih", 48, "--workers", workers, "--out", tmp_path / str(workers), root=nih_root)
    assert contents(tmp_path / "1" / "nih@48") == contents(tmp_path / "2" / "nih@48")
    packed, original = load_dataset("nih@48", tmp_path / "1"), load_dataset("nih", nih_root)
    assert all(torch.equal(packed.read(i), original.read(i)) for i in range(40))


def test_pack_made_anew_in_the_same_process(photos, pack):
    """A notebook that loads, packs anew and loads again must not see the old arrays."""
    name = f"folder:{photos}"
    pack(name, 20)
    assert load_dataset(f"{name}@20").read(0).shape == (3, 20, 30)
    for gone in (photos.parent / "photos@20", photos / "train" / "cat", photos / "test" / "cat"):
        shutil.rmtree(gone)
    pack(name, 20, "--codec", "jpeg")
    packed = load_dataset(f"{name}@20")
    assert packed.labels.tolist() == [0, 0, 0, 1, 1, 1] and packed.classes == ("dog", "newt")
    assert packed.read(0).shape == (3, 36, 20)


@pytest.mark.parametrize(
    "args, words",
    [
        (["nih", "--size", "0"], ["--size", "0"]),
        (["nih"], ["--size"]),
        (["nih", "--size", "16", "--codec", "jpeg", "--quality", "101"], ["--quality", "100"]),
        (["nih@16", "--size", "8"], ["nih@16", "nothing to pack"]),
        (["nih+chexpert", "--size", "8"], ["nih+chexpert", "one by one"]),
        (["synthetic-xray~0.4", "--size", "8"], ["synthetic-xray~0.4", "nothing to pack"]),
        (["hin", "--size", "8"], ["hin", "did you mean"]),
        (["chexpert", "--size", "8"], ["chexpert", "train.csv", "--data-dir"]),
        (["nih", "--size", "8", "--split-by", "image"], ["--split-by", "nih"]),
        (["nih", "--size", "8", "--labels", "union"], ["--labels", "nih"]),
        (["nih", "--size", "8", "--views", "L"], ["--views", "L", "PA"]),
        (["nih", "--size", "8", "--out", "/dev/null"], ["/dev/null"]),
        (["folder:nowhere", "--size", "8"], ["nowhere", "PATH/train/CLASS"]),
    ],
)
def test_bad_arguments(xrays, capsys, args, words):
    assert data.main(["pack", *args, "--data-dir", str(xrays.root)]) == 2
    assert says(error_line(capsys.readouterr().err), *words)
    assert [path.name for path in xrays.root.iterdir()] == ["NIH-ChestXRay-14"]


def test_broken_and_missing_images_stop_packing(photos, xrays, pack):
    path = photos / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    for content in (b"", whole[:200], b"GIF89a" + whole):
        path.write_bytes(content)
        line = pack(f"folder:{photos}", 20, status=2)
        assert says(line, path, "unreadable", "mend or remove")
        refuses(FileNotFoundError, partial(load_dataset, f"folder:{photos}@20"), "data.py pack")
    path.write_bytes(whole)
    pack(f"folder:{photos}", 20)
    assert torch.equal(load_dataset(f"folder:{photos}@20").read(4), resized(path, 20))
    xrays.image("00000005_000.png").unlink()
    assert says(pack("nih", 8, root=xrays.root, status=2), xrays.image("00000005_000.png"))


# ------------------------------------------------------------------------------------------------
# Interruptions
# ------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return Large(tmp_path_factory.mktemp("large"))


def test_killed_at_ten_moments(large, tmp_path):
    """Moments spread over the bytes written; the whole group or the main process alone."""
    rng, kills, out = np.random.default_rng(5), 0, tmp_path / "out"
    for k in range(10):
        moment = large.bytes * (k + rng.random()) / 10
        pid = start(large.args(out), tmp_path / "log")
        until(lambda: written(out) >= moment, pid)  # noqa: B023
        time.sleep(0.01 * rng.random())
        (os.killpg if k % 2 else os.kill)(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
        if not (out / "large@640").exists():
            load = partial(load_dataset, f"folder:{out}/large@640")
            refuses(FileNotFoundError, load, f"{out}/large@640", "python data.py pack")
    assert kills >= 9  # the last may have come too late
    large.finish(out)


def test_interrupted_by_hand(large, tmp_path):
    """One line, status 75 as for every stopped run, and what is written is kept."""
    out = tmp_path / "out"
    pid = start(large.args(out), tmp_path / "log")
    until(lambda: written(out) >= 0.7 * large.bytes, pid)
    os.kill(pid, signal.SIGINT)
    status, output = wait(pid), (tmp_path / "log").read_text()
    assert "Traceback" not in output and status == 75 and says(output.splitlines()[-1], "SIGINT")
    large.finish(out)


def test_images_that_are_there_are_not_read_again(large, tmp_path):
    """The first of them change after a stop: the pack has them as they were."""
    images, out = shutil.copytree(large.images, tmp_path / "large"), tmp_path / "out"
    args = "pack", f"folder:{images}", "--size", 640, "--out", out
    late = images / "train" / "b" / "85.png"  # not among those that tell the size needed
    whole = late.read_bytes()
    late.write_bytes(whole[:100])
    assert wait(start(args, tmp_path / "log")) == 2
    assert says(error_line((tmp_path / "log").read_text()), late, "unreadable")
    assert written(out) > 10**8
    late.write_bytes(whole)
    for i in (2, 4):
        Image.new("RGB", (640, 640), "white").save(images / "train" / "a" / f"{i:02d}.png")
    assert wait(start(args, tmp_path / "log")) == 0
    large.finish(out)


def test_two_packings_at_once(large, tmp_path):
    out = tmp_path / "out"
    pid = start(large.args(out), tmp_path / "first")
    until(lambda: written(out) >= 10**6, pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait(start(large.args(out), tmp_path / "second")) == 2
        assert says(error_line((tmp_path / "second").read_text()), "large@640", "another process")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    large.finish(out)


def test_check_interrupted_by_hand(large, tmp_path):
    pid = start(["check", f"folder:{large.images}"], tmp_path / "log")
    children = f"/proc/{pid}/task/{pid}/children"
    until(lambda: open(children).read(), pid)  # its worker has begun
    time.sleep(0.05)  # Python passes over an exception in what it calls after a fork
    os.kill(pid, signal.SIGINT)
    status, output = wait(pid), (tmp_path / "log").read_text()
    # Neither clean nor found nor refused.
    assert "Traceback" not in output and status == 75 and says(output.splitlines()[-1], "SIGINT")


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.rmdir")


def at_operation(number, folder, act):
    """An audit hook: act(number) before the file operation of that number, of each for None."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            seen += 1
            if number in (None, seen):
                act(seen)

    return hook


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(data directory with nih@8 in undisturbed/, number of file operations that it took)."""
    root = tmp_path_factory.mktemp("small")
    out, note = Xrays(root).root / "undisturbed", os.open(root / "note", os.O_RDWR | os.O_CREAT)
    hook = at_operation(None, out, lambda number: os.write(note, b"."))
    assert wait(start(small_args(root, out), root / "log", hook)) == 0
    return root, (root / "note").stat().st_size


def small_args(root, out, *more):
    return "pack", "nih", "--size", 8, "--data-dir", root, "--out", out, *more


def test_killed_before_file_operations(small, tmp_path, pack):
    """Files half there, pack.json written but the directory not renamed.

    At whatever moment it stopped, other settings are refused or make what they say.
    """
    root, operations = small
    expected = contents(root / "undisturbed" / "nih@8")
    # The last ten one by one, before them every ninth.
    for number in [*range(1, operations - 9, 9), *range(operations - 9, operations + 1)]:
        out, other = tmp_path / str(number), tmp_path / f"{number}-jpeg"
        pid = start(small_args(root, out), tmp_path / "log", at_operation(number, out, die))
        assert wait(pid) == -signal.SIGKILL
        load = partial(load_dataset, "nih@8", out)
        refuses(FileNotFoundError, load, out / "nih@8", "python data.py pack nih --size 8")
        assert data.main(["list", "--data-dir", str(out)]) == 0
        if out.exists():
            shutil.copytree(out, other)
        args = small_args(root, other, "--codec", "jpeg", "--workers", 1)
        if data.main([*map(str, args)]) == 0:
            assert json.loads((other / "nih@8" / "pack.json").read_text())["codec"] == "jpeg"
        pack("nih", 8, "--out", out, root=root)
        assert contents(out / "nih@8") == expected, number
        assert [path.name for path in out.iterdir()] == ["nih@8"], number


# ------------------------------------------------------------------------------------------------
# Full disks
# ------------------------------------------------------------------------------------------------


def test_file_that_cannot_grow(large, tmp_path):
    """As on a full disk, in the middle of the images."""
    out = tmp_path / "out"
    assert wait(start(large.args(out), tmp_path / "log", limit=large.bytes // 2)) == 2
    line = error_line((tmp_path / "log").read_text())
    assert says(line, os.strerror(errno.EFBIG), out / "large@640", "run the same command again")
    large.finish(out)


def test_disk_too_small(xrays, pack, monkeypatch):
    """Refused before any image is written, with what it takes; a larger disk will do."""
    pack("nih", 16, "--out", xrays.root / "other", root=xrays.root)
    images = sum(path.stat().st_size for path in xrays.root.glob("other/nih@16/*.images"))
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images))
    line = pack("nih", 16, root=xrays.root, status=2)
    assert says(line, xrays.root / "nih@16.part", "--out", "--size", "--codec jpeg", "GB free")
    assert images < 1e9 * float(line.partition("needs about ")[2].split()[0]) < images + 6 * 200
    assert written(xrays.root) < 2000
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images + 6 * 200))
    pack("nih", 16, root=xrays.root)


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipped(path, place):
    """One bit of a file changed in place, for a while."""
    whole = path.read_bytes()
    for byte in (whole[place] ^ 1, whole[place]):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
        if byte != whole[place]:
            yield


@pytest.fixture
def packed(xrays, pack):
    pack("nih", 16, root=xrays.root)
    return xrays.root / "nih@16"


@pytest.fixture
def damaged(packed):
    """The pack is refused, by the name of a file and with the mend."""
    return partial(refuses, ValueError, partial(load_dataset, packed.name, packed.parent))


def test_flipped_byte_of_an_image(packed, capsys):
    """Each byte of the images file is under the checksum of its image, which is named."""
    names, train = [row[0] for row in NIH["train"]], load_dataset("nih@16", packed.parent)
    places = np.cumsum([0, *(train.read(i).numel() for i in range(4))])
    assert places[-1] == (packed / "train.images").stat().st_size
    for i, name in enumerate(names):
        for place in (places[i], places[i + 1] - 1):
            with flipped(packed / "train.images", place):
                dataset = load_dataset("nih@16", packed.parent)
                refuses(ValueError, partial(dataset.read, i), name, packed, "pack it again")
                dataset.read((i + 1) % 4)
    with flipped(packed / "train.images", places[2]):
        assert data.main(["check", "nih@16", "--data-dir", str(packed.parent)]) == 1
        line = f"broken: train: nih@16 train image 2 ({names[2]}): damaged"
        assert line in capsys.readouterr().out


def test_flipped_byte_of_the_index_and_the_description(packed, damaged):
    """A class, a codec, an option that went wrong must not pass."""
    indices = [path for path in packed.iterdir() if path.suffix == ".npy"]
    assert len(indices) == 12
    for path in indices:
        for place in {0, 100, path.stat().st_size // 2, path.stat().st_size - 1}:
            with flipped(path, place):
                damaged(path, "pack it again")
    for place in range((packed / "pack.json").stat().st_size):
        with flipped(packed / "pack.json", place):
            damaged(packed)
    assert len(load_dataset("nih@16", packed.parent)) == 4


def test_description_that_is_none(packed, damaged):
    path = packed / "pack.json"
    text = path.read_text()
    whole = json.loads(text)
    bad = ["", "[]", "{}", '{"schema": 1}', text[:-40], "\xff"]
    bad += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    bad += [json.dumps(whole | {key: None}) for key in ("files", "classes", "dropped", "options")]
    for content in bad:
        path.write_text(content, encoding="latin-1")
        damaged(path, "pack it again")
    path.write_text(json.dumps(whole | {"schema": 99}))
    damaged(path, "99", "1", "pack it again")
    path.write_text(text)
    for name in ("nih@32", "chexpert@16"):
        packed.rename(packed.parent / name)
        load = partial(load_dataset, name, packed.parent)
        refuses(ValueError, load, packed.parent / name, "nih@16", "rename")
        (packed.parent / name).rename(packed)


def test_lost_and_cut_files(packed, damaged, pack):
    for path in sorted(packed.iterdir()):
        whole = path.read_bytes()
        for content in (whole[:-3], whole + b"\0"):
            path.write_bytes(content)
            damaged(path, "pack it again")
        path.unlink()
        if path.name != "pack.json":
            damaged(path, "pack it again")
        else:
            # The message says to pack: that says what to remove, and then works.
            words = packed, "python data.py pack nih --size 16"
            refuses(FileNotFoundError, partial(load_dataset, "nih@16", packed.parent), *words)
            assert says(pack("nih", 16, root=packed.parent, status=2), packed, "remove")
        path.write_bytes(whole)
    shutil.rmtree(packed)
    pack("nih", 16, root=packed.parent)
    assert len(load_dataset("nih@16", packed.parent)) == 4
