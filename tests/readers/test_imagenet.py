"""ImageNet's layouts: class directories, one tar a class read in place, and the kept index."""

import contextlib
import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torchvision
from conftest import ROOT, env, refuses
from PIL import Image

import data

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(1024)  # two blocks of zeros end a tar


def jpeg(seed, height=1, width=1):
    """The bytes of a JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def pixels_of(content):
    """Pillow's own reading of a JPEG's bytes as (C,H,W)."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def write_class(folder, files):
    """FOLDER/NAME of {name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def member(name, content=b"", format="gnu", **header):
    """One member of a tar: its header and its content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    head = info.tobuf(FORMATS[format], "utf-8", "surrogateescape")
    return head + content + bytes(-len(content) % 512)


def write_tar(path, files, format="gnu"):
    """A tar of {name: bytes} by Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[format]) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def gnu_tar(*args):
    """Runs GNU tar."""
    program = shutil.which("gtar") or shutil.which("tar")
    version = program and subprocess.run([program, "--version"], capture_output=True, text=True)
    if not version or "GNU" not in version.stdout:
        pytest.skip("needs GNU tar")
    subprocess.run([program, *map(str, args)], check=True)


def everything(folder):
    """{path: content} of all that lies below a folder but kept indexes; of a directory None."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if ".index-" not in str(path.relative_to(folder))
    }


def places(dataset):
    return [dataset.where(i) for i in range(len(dataset))]


def both(load):
    """(train, test) of a function of the split."""
    return load(split="train"), load(split="test")


# ------------------------------------------------------------------------------------------------
# imagenet1k
# ------------------------------------------------------------------------------------------------

# Not in sorted order, and 10026 sorts before 9 as text.
TRAIN = {
    "n01443537": {"n01443537_2.JPEG": jpeg(1, 5, 4), "n01443537_16.JPEG": jpeg(2, 3, 7)},
    "n01440764": {
        "n01440764_9.JPEG": jpeg(3, 6, 6),
        "n01440764_10026.JPEG": jpeg(4, 2, 9),
        "n01440764_18.JPEG": jpeg(5, 8, 3),
    },
    "n02119789": {"n02119789_1.JPEG": jpeg(6, 4, 4)},
}
VAL = {
    "n01440764": {"ILSVRC2012_val_00000293.JPEG": jpeg(7, 5, 5)},
    "n02119789": {
        "ILSVRC2012_val_00002138.JPEG": jpeg(8, 3, 3),
        "ILSVRC2012_val_00000784.JPEG": jpeg(9, 7, 2),
    },
    "n01443537": {"ILSVRC2012_val_00000236.JPEG": jpeg(10, 2, 2)},
}
CLASSES = ("n01440764", "n01443537", "n02119789")
ORDER = {
    "train": [
        (0, "n01440764", "n01440764_10026.JPEG"),
        (0, "n01440764", "n01440764_18.JPEG"),
        (0, "n01440764", "n01440764_9.JPEG"),
        (1, "n01443537", "n01443537_16.JPEG"),
        (1, "n01443537", "n01443537_2.JPEG"),
        (2, "n02119789", "n02119789_1.JPEG"),
    ],
    "test": [
        (0, "n01440764", "ILSVRC2012_val_00000293.JPEG"),
        (1, "n01443537", "ILSVRC2012_val_00000236.JPEG"),
        (2, "n02119789", "ILSVRC2012_val_00000784.JPEG"),
        (2, "n02119789", "ILSVRC2012_val_00002138.JPEG"),
    ],
}


def write_imagenet1k(root, tars=()):
    """The official layout; `tars`: the PART/WNID that are one tar each."""
    for part, classes in (("train", TRAIN), ("val", VAL)):
        for wnid, files in classes.items():
            folder = root / "imagenet-1K" / part
            if f"{part}/{wnid}" in tars:
                write_tar(folder / f"{wnid}.tar", files)
            else:
                write_class(folder / wnid, files)
    return root


def load_1k(root, split="train", **options):
    return data.load_dataset("imagenet1k", root, split, **options)


@pytest.mark.parametrize(
    "tars",
    [
        (),
        [f"{part}/{wnid}" for part in ("train", "val") for wnid in CLASSES],
        ["train/n01440764", "val/n02119789"],
        [f"train/{wnid}" for wnid in CLASSES],
    ],
    ids=["directories", "tars", "mixed", "train tars"],
)
def test_imagenet1k(tmp_path, tars):
    write_imagenet1k(tmp_path, tars)
    before = everything(tmp_path)
    for split, part, files in (("train", "train", TRAIN), ("test", "val", VAL)):
        dataset = load_1k(tmp_path, split)
        assert dataset.name == "imagenet1k" and dataset.classes == CLASSES
        assert (dataset.task, dataset.domain, dataset.groups) == ("multiclass", "natural", None)
        assert (dataset.options, dataset.dropped) == ({}, {})
        assert len(dataset) == len(ORDER[split])
        assert dataset.labels.dtype == np.int64
        assert dataset.labels.tolist() == [label for label, _, _ in ORDER[split]]
        for i, (label, wnid, name) in enumerate(ORDER[split]):
            folder = tmp_path / "imagenet-1K" / part / wnid
            is_tar = f"{part}/{wnid}" in tars
            assert dataset.where(i) == (f"{folder}.tar: {name}" if is_tar else f"{folder}/{name}")
            np.testing.assert_array_equal(dataset.read(i), pixels_of(files[wnid][name]))
            image, number = dataset[i]
            assert image.shape == dataset.read(i).shape and number.item() == label
    assert everything(tmp_path) == before  # nothing is unpacked, nothing is kept


@pytest.mark.parametrize("first", [1, -1])
def test_classes_are_sorted(tmp_path, first):
    wnids = [f"n{i:08d}" for i in range(95, 125)][::first]
    for i, wnid in enumerate(wnids):
        if i % 3:
            write_class(tmp_path / "imagenet-21K" / wnid, {"n01440764_1.JPEG": jpeg(0)})
        else:
            write_tar(tmp_path / "imagenet-21K" / f"{wnid}.tar", {"n01440764_1.JPEG": jpeg(0)})
    dataset = data.load_dataset("imagenet21k", tmp_path)
    assert dataset.classes == tuple(sorted(wnids)) and dataset.labels.tolist() == [*range(30)]
    assert [wnid in dataset.where(i) for i, wnid in enumerate(sorted(wnids))] == [True] * 30


def test_tars_travel_to_other_processes(tmp_path):
    dataset = load_1k(write_imagenet1k(tmp_path, ["train/n01440764"]))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels.tolist() == [0, 0, 0, 1, 1, 2]
    for i, (_, wnid, name) in enumerate(ORDER["train"]):
        np.testing.assert_array_equal(copy.read(i), pixels_of(TRAIN[wnid][name]))


def test_folder_of_tars(tmp_path):
    cats, dogs = {"b.png": jpeg(1, 3, 4), "a.jpg": jpeg(2, 5, 2)}, {"c.JPEG": jpeg(3, 2, 2)}
    write_tar(tmp_path / "train" / "cat.tar", cats)
    write_class(tmp_path / "train" / "Dog", dogs)
    write_class(tmp_path / "test" / "cat", cats)
    write_tar(tmp_path / "test" / "Dog.tar", dogs)
    train, test = both(partial(data.load_dataset, f"folder:{tmp_path}"))
    assert train.classes == test.classes == ("Dog", "cat")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 1]
    assert train.where(1) == f"{tmp_path}/train/cat.tar: a.jpg"
    assert test.where(0) == f"{tmp_path}/test/Dog.tar: c.JPEG"
    for dataset in (train, test):
        for i, content in enumerate((dogs["c.JPEG"], cats["a.jpg"], cats["b.png"])):
            np.testing.assert_array_equal(dataset.read(i), pixels_of(content))


def test_imagenet1k_command_line(tmp_path, capsys):
    write_imagenet1k(tmp_path, ["train/n01440764", "val/n02119789"])
    assert data.main(["info", "imagenet1k", "--data-dir", str(tmp_path)]) == 0
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert ["train", "6", "unknown", "none"] in lines
    assert ["test", "4", "unknown", "none"] in lines
    assert ["n01440764", "3", "1"] in lines and ["n02119789", "1", "2"] in lines
    whole = TRAIN["n01440764"]["n01440764_18.JPEG"]
    cut = {**TRAIN["n01440764"], "n01440764_18.JPEG": whole[: len(whole) // 2]}
    write_tar(tmp_path / "imagenet-1K" / "train" / "n01440764.tar", cut)
    assert data.main(["check", "imagenet1k", "--data-dir", str(tmp_path), "--workers", "1"]) == 1
    broken = [x for x in capsys.readouterr().out.splitlines() if x.startswith("broken")]
    assert len(broken) == 1 and "train/n01440764.tar: n01440764_18.JPEG: unreadable" in broken[0]


# ------------------------------------------------------------------------------------------------
# Tars as others make them
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_tar(tmp_path):
    """(root, path): an imagenet1k of one class whose train part is a tar yet to be written."""
    write_class(tmp_path / "imagenet-1K" / "val" / "n01440764", {"v.JPEG": jpeg(0)})
    (tmp_path / "imagenet-1K" / "train").mkdir()
    return tmp_path, tmp_path / "imagenet-1K" / "train" / "n01440764.tar"


def holds(root, path, files):
    """The train part consists of these members {name: bytes}, in this order."""
    dataset = load_1k(root)
    assert places(dataset) == [f"{path}: {name}" for name in files]
    assert dataset.labels.tolist() == [0] * len(files)
    for i, content in enumerate(files.values()):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(content))


@pytest.mark.parametrize("format", FORMATS)
def test_python_tars(one_tar, format):
    root, path = one_tar
    deep = "d" * 90 + "/" + "e" * 95 + ".JPEG"  # ustar splits such a name at its slash
    files = {"a b.JPEG": jpeg(1, 3, 2), deep: jpeg(2, 2, 5), "n01440764/n_1.JPEG": jpeg(3, 4, 4)}
    if format != "ustar":
        files["x" * 200 + ".JPEG"] = jpeg(4, 30, 41)
    files["é漢.JPEG"] = jpeg(5, 6, 7)
    write_tar(path, dict(reversed(files.items())), format)
    holds(root, path, files)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_gnu_tars_of_a_directory(one_tar, format):
    root, path = one_tar
    files = {"._1.JPEG": b"not an image", ".DS_Store": b"nor this"}
    files |= {"n_1.JPEG": jpeg(1, 3, 2), "n_2.JPEG": jpeg(2, 200, 91)}
    if format not in ("v7", "ustar"):
        files["n_3" + "x" * 150 + ".JPEG"] = jpeg(3, 4, 5)
    write_class(root / "n01440764", files)
    gnu_tar("-C", root / "n01440764", f"--format={format}", "-cf", path, ".")
    seen = dict(list(files.items())[2:])
    holds(root, path, {f"./{name}": content for name, content in seen.items()})
    gnu_tar("-C", root, f"--format={format}", "-cf", path, "n01440764")
    holds(root, path, {f"n01440764/{name}": content for name, content in seen.items()})


def test_tar_members_that_are_no_images_of_the_class(one_tar):
    root, path = one_tar
    image = jpeg(1, 2, 3)
    path.write_bytes(
        member("./", type=tarfile.DIRTYPE)
        + member(".DS_Store", b"hidden")
        + member("n01440764/", type=tarfile.DIRTYPE)
        + member("n01440764/._n_1.JPEG", b"hidden")
        + member("n01440764/n_1.JPEG", image)
        + member("empty.JPEG/", type=tarfile.DIRTYPE)
        + END
    )
    holds(root, path, {"n01440764/n_1.JPEG": image})


def test_hidden_directories_in_a_tar_are_passed_over(one_tar):
    root, path = one_tar  # as they are in a class directory
    path.write_bytes(
        member("./.thumbnails/n_1.JPEG", jpeg(2)) + member("./n_1.JPEG", jpeg(1)) + END
    )
    holds(root, path, {"./n_1.JPEG": jpeg(1)})


def test_tar_names_that_are_not_utf8(one_tar):
    root, path = one_tar
    for format in FORMATS:
        write_tar(path, {"n\udce9.JPEG": jpeg(1, 2, 3)}, format)
        holds(root, path, {"n\udce9.JPEG": jpeg(1, 2, 3)})


def test_contiguous_members_are_files(one_tar):
    root, path = one_tar
    path.write_bytes(member("n_1.JPEG", jpeg(1), type=tarfile.CONTTYPE) + END)
    holds(root, path, {"n_1.JPEG": jpeg(1)})


def test_symlinked_classes(tmp_path):
    write_imagenet1k(tmp_path, ["train/n01443537"])
    train = tmp_path / "imagenet-1K" / "train"
    for name in ("n01440764", "n01443537.tar"):
        (train / name).rename(tmp_path / name)
        (train / name).symlink_to(tmp_path / name)
    dataset = load_1k(tmp_path)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2]
    for i, (_, wnid, name) in enumerate(ORDER["train"]):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(TRAIN[wnid][name]))
    (tmp_path / "n01443537.tar").unlink()
    with pytest.raises(OSError, match="n01443537.tar"):
        load_1k(tmp_path)


# ------------------------------------------------------------------------------------------------
# Bad tars: one line that names the tar, the member and the mend; nothing is written
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds):
    """An endless loop fails the test; no `except Exception` catches that."""

    def late(*_):
        pytest.fail(f"not done within {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def refused(root, path, content, *words):
    """A tar of this content is refused by its name, and nothing else comes to be."""
    path.write_bytes(content)
    before = everything(root)
    with within(2):
        refuses(ValueError, partial(load_1k, root), path, *words)
    assert everything(root) == before


FIRST, LAST = member("a.JPEG", jpeg(1, 40, 40)), member("z.JPEG", jpeg(2))
REMADE = "make the tar anew"


@pytest.mark.parametrize(
    "name, header, mend",
    [
        ("/etc/n_1.JPEG", {}, REMADE),
        ("../n_1.JPEG", {}, REMADE),
        ("b/../../n_1.JPEG", {}, REMADE),
        ("b.JPEG", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, REMADE),
        ("b.JPEG", {"type": tarfile.SYMTYPE, "linkname": "a.JPEG"}, REMADE),
        ("b.JPEG", {"type": tarfile.LNKTYPE, "linkname": "a.JPEG"}, REMADE),
        ("b.JPEG", {"type": tarfile.FIFOTYPE}, REMADE),
        ("b.JPEG", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, REMADE),
        ("b.JPEG", {"type": tarfile.BLKTYPE, "devmajor": 8}, REMADE),
        ("a.JPEG", {}, REMADE),
        ("./a.JPEG", {}, REMADE),  # the same place as a.JPEG
        ("notes.txt", {}, "move it out of the dataset"),
        ("n01440764_1", {}, "move it out of the dataset"),
        ("n01440764.tar", {}, "move it out of the dataset"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_bad_members(one_tar, monkeypatch, name, header, mend, format):
    root, path = one_tar
    monkeypatch.chdir(root)  # a name relative to here would show
    content = b"" if "type" in header else jpeg(3)
    bad = member(name, content, format, **header)
    refused(root, path, FIRST + bad + LAST + END, f"{path}: {name}", mend)


def test_a_member_name_of_two_lines_is_one_line(one_tar, capsys):
    root, path = one_tar
    path.write_bytes(FIRST + member("two\nlines.txt", b"x") + END)
    assert data.main(["info", "imagenet1k", "--data-dir", str(root)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "options", [["gnu"], ["pax", "0.0"], ["pax", "0.1"], ["pax", "1.0"]], ids="-".join
)
def test_sparse_members(one_tar, options):
    root, path = one_tar
    with open(root / "hole.JPEG", "wb") as file:
        file.write(jpeg(1))
        file.truncate(2**22)
    versions = [f"--sparse-version={version}" for version in options[1:]]
    gnu_tar("-C", root, f"--format={options[0]}", *versions, "-S", "-cf", path, "hole.JPEG")
    if path.stat().st_size > 2**20:
        pytest.skip("the file system keeps no holes")
    refused(root, path, path.read_bytes(), "hole.JPEG", REMADE)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_cut_anywhere_is_refused(one_tar, format):
    root, path = one_tar
    names = ["a.JPEG", "n01440764/" + "x" * 140 + ".JPEG", "z.JPEG"]
    if format == "ustar":
        names[1] = "y" * 80 + "/" + "x" * 80 + ".JPEG"
    parts = [member(name, jpeg(i, 9, 9), format) for i, name in enumerate(names)]
    body = b"".join(parts)
    path.write_bytes(body + END)
    assert len(load_1k(root)) == 3
    ends = np.cumsum([len(part) for part in parts])  # inside headers, data, and at their borders
    cuts = {*range(0, len(body) + 512, 100), *ends, *(ends + 1), *(ends - 1), *(ends + 511)}
    for cut in cuts:
        refused(root, path, (body + END)[:cut], "tar", "fetch it again")


def test_a_damaged_header_is_refused_or_harmless(one_tar):
    root, path = one_tar
    body = FIRST + LAST + END
    start, harmless = len(FIRST), []
    for place in range(512):
        damaged = bytearray(body)
        damaged[start + place] ^= 1
        path.write_bytes(damaged)
        try:
            assert len(load_1k(root)) == 2
            harmless.append(place)
        except ValueError as error:
            assert str(path) in str(error) and "fetch it again" in str(error)
    # Only the blanks around the digits of the checksum itself may change.
    assert set(harmless) <= set(range(148, 156)) and len(harmless) < 4


def with_size(name, size, kind=tarfile.REGTYPE):
    """A header of any size, in GNU's base-256 notation, with a right checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    sign = b"\x80" if size >= 0 else b"\xff"
    header[124:136] = sign + (size % 2**88).to_bytes(11, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-512, -1024, -(2**62), 2**40, 2**62, 2**63 - 1024, 2**63, 2**80])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("b.JPEG", tarfile.REGTYPE),
        ("._b.JPEG", tarfile.REGTYPE),
        ("././@LongLink", tarfile.GNUTYPE_LONGNAME),
        ("pax", tarfile.XHDTYPE),
    ],
    ids=["file", "hidden", "long name", "pax"],
)
def test_absurd_sizes(one_tar, size, name, kind):
    root, path = one_tar
    refused(root, path, FIRST + with_size(name, size, kind) + LAST + END)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404 Not Found</html>" * 50,
        bytes(511),
        gzip.compress(FIRST + LAST + END),
        FIRST + LAST,
        FIRST + bytes(511),
        FIRST + b"\x01" * 512 + END,
        # A download by pieces may leave one as zeros: what follows it must not be lost.
        FIRST + bytes(len(LAST)) + LAST + END,
        FIRST + END + LAST + END,
        FIRST + bytes(8192) + b"<html>" * 100,
    ],
    ids=[
        "no bytes", "text", "half a block", "gzipped", "no end", "half an end", "bytes for an end",
        "zeros inside", "two tars in one", "bytes after the end",
    ],
)  # fmt: skip
def test_damaged_tars(one_tar, content):
    root, path = one_tar
    refused(root, path, content, "again")


@pytest.mark.parametrize(
    "content", [bytes(10240), END, member("d/", type=tarfile.DIRTYPE) + member(".x", b"x") + END]
)
def test_tars_without_an_image(one_tar, content):
    root, path = one_tar
    refused(root, path, content, "no image", "add some")


def test_padding_after_the_end_is_fine(one_tar):
    root, path = one_tar
    path.write_bytes(FIRST + LAST + bytes(3 * 10240))
    holds(root, path, {"a.JPEG": jpeg(1, 40, 40), "z.JPEG": jpeg(2)})


def test_a_broken_member_is_named(one_tar):
    root, path = one_tar
    write_tar(path, {"a.JPEG": jpeg(1, 9, 9), "b.JPEG": jpeg(2, 9, 9)[:-300], "c.JPEG": b""})
    dataset = load_1k(root)
    assert dataset.read(0).shape == (3, 9, 9)
    refuses(ValueError, partial(dataset.read, 1), f"{path}: b.JPEG", "mend or remove")
    refuses(ValueError, partial(dataset.read, 2), f"{path}: c.JPEG", "mend or remove")
    write_tar(path, {"a.JPEG": jpeg(1)})  # shorter now
    refuses(ValueError, partial(dataset.read, -2), f"{path}: b.JPEG", "mend or remove")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="n01440764.tar"):
        dataset.read(0)


# ------------------------------------------------------------------------------------------------
# Classes that are missing, superfluous, empty or there twice
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tars", [(), ["val/n01443537", "train/n02119789"]], ids=["", "tars"])
def test_classes_of_val_are_those_of_train(tmp_path, tars):
    val = write_imagenet1k(tmp_path, tars) / "imagenet-1K" / "val"
    lost = val / ("n01443537.tar" if tars else "n01443537")
    lost.rename(tmp_path / "away")
    refuses(ValueError, partial(load_1k, tmp_path, "test"), val / "n01443537", "add some or drop")
    assert len(load_1k(tmp_path)) == 6
    (tmp_path / "away").rename(lost)
    write_class(val / "n09999999", {"v.JPEG": jpeg(0)})
    refuses(ValueError, partial(load_1k, tmp_path, "test"), val / "n09999999", "no class")
    shutil.rmtree(val / "n09999999")
    write_tar(val / "n09999999.tar", {"v.JPEG": jpeg(0)})
    refuses(ValueError, partial(load_1k, tmp_path, "test"), val / "n09999999", "no class")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("imagenet1k", "imagenet-1K/train"),
        ("imagenet1k", "imagenet-1K/val"),
        ("imagenet21k", "imagenet-21K"),
    ],
)
def test_bad_class_entries(tmp_path, name, folder):
    write_imagenet1k(tmp_path)
    (tmp_path / "imagenet-1K" / "train").rename(tmp_path / "imagenet-21K")
    shutil.copytree(tmp_path / "imagenet-21K", tmp_path / "imagenet-1K" / "train")
    folder = tmp_path / folder
    load = partial(data.load_dataset, name, tmp_path, "test" if folder.name == "val" else "train")

    tar = folder / "n01440764.tar"
    write_tar(tar, {"x.JPEG": jpeg(0)})
    refuses(ValueError, load, folder / "n01440764", "n01440764.tar are both there", "remove one")
    tar.unlink()

    (folder / "n01440764").rename(tmp_path / "away")
    (folder / "n01440764").mkdir()
    refuses(ValueError, load, folder / "n01440764", "no image", "add some or drop")
    (folder / "n01440764" / ".hidden.JPEG").write_bytes(jpeg(0))
    refuses(ValueError, load, folder / "n01440764", "no image", "add some or drop")
    shutil.rmtree(folder / "n01440764")
    (tmp_path / "away").rename(folder / "n01440764")

    stray = folder / "ILSVRC2012_val_00000001.JPEG"  # as the validation tar unpacks
    stray.write_bytes(jpeg(0))
    refuses(ValueError, load, stray, "neither a class directory nor CLASS.tar")
    stray.unlink()

    (folder / "n01440764" / "boxes.xml").touch()
    refuses(ValueError, load, folder / "n01440764" / "boxes.xml", "not an image")
    (folder / "n01440764" / "boxes.xml").unlink()

    (folder / ".DS_Store").touch()
    (folder / ".cache").mkdir()
    (folder / ".n.tar").touch()
    assert load().classes == CLASSES


@pytest.mark.parametrize("part", ["imagenet-1K", "imagenet-1K/train", "imagenet-1K/val"])
def test_missing_parts(tmp_path, part):
    shutil.rmtree(write_imagenet1k(tmp_path) / part)
    for split in ("train", "test"):
        refuses(FileNotFoundError, partial(load_1k, tmp_path, split), tmp_path / part, "--data-dir")


def test_no_class_at_all(tmp_path):
    load = partial(data.load_dataset, "imagenet21k", tmp_path)
    refuses(FileNotFoundError, load, tmp_path / "imagenet-21K", "--data-dir")
    (tmp_path / "imagenet-21K" / ".hidden").mkdir(parents=True)
    refuses(ValueError, load, tmp_path / "imagenet-21K", "no class")


# ------------------------------------------------------------------------------------------------
# imagenet21k: one image in a hundred is held out, by its name alone
# ------------------------------------------------------------------------------------------------


def load_21k(root, split="train", **options):
    return data.load_dataset("imagenet21k", root, split, **options)


def base(place):
    return place.replace(": ", "/").rpartition("/")[2]


def held(root, **options):
    """The file names of the test split."""
    return [base(place) for place in places(load_21k(root, "test", **options))]


NAMES = {wnid: [f"{wnid}_{i}.JPEG" for i in range(1, 1001)] for wnid in ("n01440764", "n02124075")}
# The names whose CRC-32 is a multiple of 100. Another rule would make other test sets of old ones.
HELD = [
    *(f"n01440764_{i}.JPEG" for i in ("29 30 37 338 587 590 952").split()),
    *(f"n02124075_{i}.JPEG" for i in ("54 75 116 214 260 309 363 566 713 846").split()),
]


def write_21k(root, names, tars=(), image=None):
    """imagenet-21K/WNID/NAME of {wnid: names}; `tars`: the classes that are one tar each."""
    image = image or jpeg(0)
    for wnid, files in names.items():
        folder = root / "imagenet-21K" / wnid
        if wnid in tars:
            write_tar(folder.with_suffix(".tar"), dict.fromkeys(files, image))
        else:
            write_class(folder, {files[0]: image})
            for name in files[1:]:
                os.link(folder / files[0], folder / name)
    return root


@pytest.mark.parametrize("tars", [(), NAMES, ["n02124075"]], ids=["directories", "tars", "mixed"])
def test_imagenet21k(tmp_path, tars):
    root = write_21k(tmp_path, dict(reversed(NAMES.items())), tars)
    before = set(root.rglob("*"))
    train, test = both(partial(load_21k, root))
    assert train.classes == test.classes == ("n01440764", "n02124075")
    assert (len(train), len(test)) == (1983, 17)
    assert (train.task, train.domain, train.groups) == ("multiclass", "natural", None)
    assert sorted(HELD) == [base(place) for place in places(test)]
    rest = [name for names in NAMES.values() for name in names if name not in HELD]
    assert sorted(rest) == [base(place) for place in places(train)]
    for dataset in (train, test):
        assert dataset.labels.dtype == np.int64
        for i, place in enumerate(places(dataset)):
            wnid = base(place)[:9]
            assert dataset.classes[dataset.labels[i]] == wnid
            between = ".tar: " if wnid in tars else "/"
            assert place == f"{root}/imagenet-21K/{wnid}{between}{base(place)}"
    assert {path for path in root.rglob("*") if ".index-" not in str(path)} == before


@pytest.mark.parametrize("tar", [False, True], ids=["directory", "tar"])
def test_imagenet21k_pixels(tmp_path, tar):
    files = {name: jpeg(i, 2 + i % 5, 3) for i, name in enumerate(NAMES["n01440764"][:40])}
    folder = tmp_path / "imagenet-21K" / "n01440764"
    write_tar(folder.with_suffix(".tar"), files) if tar else write_class(folder, files)
    train, test = both(partial(load_21k, tmp_path))
    assert held(tmp_path) == ["n01440764_29.JPEG", "n01440764_30.JPEG", "n01440764_37.JPEG"]
    for dataset in (train, test):
        for i, place in enumerate(places(dataset)):
            np.testing.assert_array_equal(dataset.read(i), pixels_of(files[base(place)]))


def test_held_out_by_the_name_alone(tmp_path):
    names, reference = NAMES["n01440764"][:600], sorted(HELD[:6])
    # In another class, with other content, in another order, and beside other files.
    assert held(write_21k(tmp_path / "a", {"n99999999": names}, image=jpeg(9))) == reference
    assert held(write_21k(tmp_path / "b", {"x": names[::-1]}, ["x"])) == reference
    few = ["n01440764_1.JPEG", *reference[:3]]
    assert held(write_21k(tmp_path / "c", {"x": few})) == reference[:3]
    more = {"a": [f"n_{i}.JPEG" for i in range(50)], "n01440764": names}
    assert [x for x in held(write_21k(tmp_path / "d", more)) if x in names] == reference
    # And wherever the tar says that it lies.
    for part in ("./", "n01440764/", "./deep/er/"):
        root = write_21k(tmp_path / f"e{len(part)}", {"x": [part + x for x in names]}, ["x"])
        assert held(root) == reference


def test_a_class_may_lie_on_one_side(tmp_path):
    root = write_21k(tmp_path, {"a": ["n01440764_29.JPEG"], "b": ["n01440764_1.JPEG"]})
    train, test = both(partial(load_21k, root))
    assert train.classes == test.classes == ("a", "b")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1], [0])


def test_a_split_without_an_image_is_refused(tmp_path):
    root = write_21k(tmp_path, {"a": ["n01440764_1.JPEG"]})
    assert len(load_21k(root)) == 1
    refuses(ValueError, partial(load_21k, root, "test"), root / "imagenet-21K", "no image")


# ------------------------------------------------------------------------------------------------
# The index of 50,000 images is kept
# ------------------------------------------------------------------------------------------------

BIG = {"n00000001": 20_000, "n00000002": 29_990}  # ten images short of an index that is kept
OWN = [f"n00000003_{i}.JPEG" for i in range(10)]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A folder of the classes of BIG: links to a single JPEG."""
    folder = tmp_path_factory.mktemp("big") / "imagenet-21K"
    folder.mkdir()
    (folder.parent / "one").write_bytes(jpeg(0))
    for wnid, count in BIG.items():
        (folder / wnid).mkdir()
        for i in range(count):
            os.link(folder.parent / "one", f"{folder}/{wnid}/{wnid}_{i}.JPEG")
    return folder


@pytest.fixture
def large(big, tmp_path):
    """A data directory with imagenet21k: the classes of BIG, and one of its own that may change."""
    folder = tmp_path / "datasets" / "imagenet-21K"
    folder.mkdir(parents=True)
    for wnid in BIG:
        (folder / wnid).symlink_to(big / wnid)
    write_class(folder / "n00000003", dict.fromkeys(OWN, jpeg(1, 2, 2)))
    return folder.parent


def listed(root):
    """The places of all images as the directories and Python's tarfile list them, sorted."""
    found = []
    for cls in (root / "imagenet-21K").iterdir():
        if cls.suffix == ".tar":
            with tarfile.open(cls) as archive:
                found += [f"{cls}: {name}" for name in archive.getnames()]
        elif not cls.name.startswith("."):
            found += [f"{cls}/{name}" for name in os.listdir(cls)]
    return sorted(found)


def whole(root, **options):
    """Loads both splits, which must be all that is there, rightly labelled."""
    train, test = both(partial(load_21k, root, **options))
    assert sorted(places(train) + places(test)) == listed(root)
    for dataset in (train, test):
        of_class = {cls: label for label, cls in enumerate(dataset.classes)}
        labels = [of_class[base(place).partition("_")[0]] for place in places(dataset)]
        np.testing.assert_array_equal(dataset.labels, labels)
    # 1 % of 50,000 give or take five standard deviations.
    assert 380 < len(test) < 620
    return train, test


def kept(root):
    """The hidden directories below a folder: indices, and what is left of their making."""
    return sorted(path for path in root.rglob(".*") if path.is_dir())


def equal(a, b):
    """Whether two datasets have the same labels, and the same files (some in the middle aside)."""
    return (
        a.classes == b.classes
        and a.labels.dtype == b.labels.dtype
        and np.array_equal(a.labels, b.labels)
        and all(a.where(i) == b.where(i) for i in [*range(0, len(a), 53), *range(-20, 0)])
    )


def mapped(array):
    """Whether an array lies in a file that is mapped into memory, so that processes share it."""
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


@contextlib.contextmanager
def scans(monkeypatch):
    """The list of the directories that are listed meanwhile."""
    seen, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path=".": seen.append(str(path)) or scandir(path))
        yield seen


def test_index_of_50000_images_is_kept(large, monkeypatch):
    first = whole(large)
    assert len(first[0]) + len(first[1]) == 50_000
    (index,) = kept(large)
    assert large / "imagenet-21K" in index.parents or index.parent == large
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    with scans(monkeypatch) as seen:
        second = both(partial(load_21k, large))
    assert str(large / "imagenet-21K" / "n00000003") not in seen
    assert all(map(equal, first, second))
    for dataset in (*first, *second):
        assert mapped(dataset.labels) and not dataset.labels.flags.writeable
    i = places(second[0]).index(f"{large}/imagenet-21K/n00000003/{OWN[0]}")
    np.testing.assert_array_equal(second[0].read(i), pixels_of(jpeg(1, 2, 2)))
    assert kept(large) == [index]
    after = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    assert after == before


def test_index_of_fewer_images_is_not_kept(large, monkeypatch):
    (large / "imagenet-21K" / "n00000003" / OWN[0]).unlink()
    train, test = whole(large, cache_dir=str(large / "cache"))
    assert len(train) + len(test) == 49_999
    assert not mapped(train.labels)
    assert kept(large) == [] and not (large / "cache").exists()
    with scans(monkeypatch) as seen:
        load_21k(large)
    assert str(large / "imagenet-21K" / "n00000003") in seen


def test_cache_dir(large, tmp_path, monkeypatch):
    cache = tmp_path / "to" / "cache"
    first = whole(large, cache_dir=str(cache))
    assert kept(large) == [] and len(kept(cache)) == 1
    with scans(monkeypatch) as seen:
        second = both(partial(load_21k, large, cache_dir=cache))
    assert str(large / "imagenet-21K" / "n00000003") not in seen
    assert all(map(equal, first, second))
    assert mapped(second[0].labels)
    assert equal(first[0], load_21k(large)) and len(kept(large)) == 1  # beside the data now, too
    assert len(kept(cache)) == 1


def test_cache_dir_of_several_sets(large, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    own = tmp_path / "own"
    for part in ("train", "test"):
        shutil.copytree(large / "imagenet-21K", own / part, symlinks=True)
    (own / "test" / "n00000003" / "n00000003_x.JPEG").write_bytes(jpeg(0))

    def load():
        load_21k(large, cache_dir=cache)
        return both(partial(data.load_dataset, f"folder:{own}", cache_dir=cache))

    train, test = load()
    assert (len(train), len(test)) == (50_000, 50_001)
    found = kept(cache)
    assert len(found) == 3
    with scans(monkeypatch) as seen:
        train, test = load()
    assert kept(cache) == found and not [path for path in seen if "n00000003" in path]
    assert (len(train), len(test)) == (50_000, 50_001)
    assert train.where(0) == f"{own}/train/n00000001/n00000001_0.JPEG"
    assert test.where(-1) == f"{own}/test/n00000003/n00000003_x.JPEG"


def test_one_folder_as_two_sets(large, tmp_path):
    (tmp_path / "own").mkdir()
    for part in ("train", "test"):
        (tmp_path / "own" / part).symlink_to(large / "imagenet-21K")
    for _ in range(2):
        whole(large, cache_dir=tmp_path / "cache")
        name = f"folder:{tmp_path}/own"
        dataset = data.load_dataset(name, cache_dir=tmp_path / "cache")
        assert len(dataset) == 50_000
        assert dataset.labels.tolist() == sorted(dataset.labels.tolist())


def new_file(folder):
    (folder / "n00000003" / "n00000003_new.JPEG").write_bytes(jpeg(0))


def lost_file(folder):
    (folder / "n00000003" / OWN[4]).unlink()
    (folder / "n00000003" / "n00000003_a.JPEG").write_bytes(jpeg(0))
    (folder / "n00000003" / "n00000003_b.JPEG").write_bytes(jpeg(0))


def renamed_file(folder):
    (folder / "n00000003" / OWN[4]).rename(folder / "n00000003" / "n00000003_zz.JPEG")


def new_class(folder):
    write_class(folder / "n00000000", {"n00000000_1.JPEG": jpeg(0)})


def lost_class(folder):
    write_class(folder / "n00000001b", {f"n00000001b_{i}.JPEG": jpeg(0) for i in range(10)})
    shutil.rmtree(folder / "n00000003")


def class_as_tar(folder):
    shutil.rmtree(folder / "n00000003")
    write_tar(folder / "n00000003.tar", dict.fromkeys(OWN, jpeg(0)))


def class_renamed(folder):
    (folder / "n00000003").rename(folder / "n00000004")
    for file in (folder / "n00000004").iterdir():
        file.rename(file.with_name(file.name.replace("n00000003", "n00000004")))


def new_file_in_an_old_directory(folder):
    # rsync and tar set the time of a directory to that of its original.
    time = (folder / "n00000003").stat().st_mtime_ns
    new_file(folder)
    os.utime(folder / "n00000003", ns=(time, time))


@pytest.mark.parametrize(
    "change",
    [
        new_file, lost_file, renamed_file, new_class, lost_class, class_as_tar, class_renamed,
        new_file_in_an_old_directory,
    ],
)  # fmt: skip
def test_changed_files_are_noticed(large, change):
    load_21k(large)
    (old,) = kept(large)
    change(large / "imagenet-21K")
    whole(large)
    (new,) = kept(large)
    assert new != old


def test_a_renamed_link_to_a_class_is_noticed(large):
    load_21k(large)
    (large / "imagenet-21K" / "n00000002").rename(large / "imagenet-21K" / "n00000002b")
    train = load_21k(large)
    assert train.classes == ("n00000001", "n00000002b", "n00000003")
    assert train.read(len(train) // 2).shape == (3, 1, 1)  # its path holds


@pytest.mark.parametrize(
    "size, time", [(True, True), (True, False), (False, True)], ids=["both", "size", "time"]
)
def test_replaced_tars_are_noticed(large, size, time):
    tar = large / "imagenet-21K" / "n00000003.tar"
    class_as_tar(large / "imagenet-21K")
    load_21k(large)
    (old,) = kept(large)
    stat = tar.stat()
    names = [name.replace("_", "_1") for name in OWN]
    more = [f"n00000003_x{i}.JPEG" for i in range(20 * size)]  # a tar is padded to 20 blocks
    write_tar(tar, dict.fromkeys(names + more, jpeg(7, 3, 3)))
    assert (tar.stat().st_size != stat.st_size) == size
    if not time:
        os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    train, test = whole(large)
    (new,) = kept(large)
    assert new != old
    i = places(train).index(f"{tar}: {names[0]}")
    np.testing.assert_array_equal(train.read(i), pixels_of(jpeg(7, 3, 3)))


def test_a_tar_replaced_by_its_like_is_noticed(large):
    tar = large / "imagenet-21K" / "n00000003.tar"  # of the same size, and of the same time
    class_as_tar(large / "imagenet-21K")
    os.utime(tar, ns=(10**18, 10**18))
    load_21k(large)
    write_tar(tar, dict.fromkeys([name.replace("_", "_1") for name in OWN], jpeg(0)))
    os.utime(tar, ns=(10**18, 10**18))
    whole(large)


def damage(file, how):
    if how == "lost":
        file.unlink()
    elif how == "emptied":  # as a power cut leaves what never reached the disk
        os.truncate(file, 0)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        content = bytearray(file.read_bytes())
        content[10:60] = b"(" * 50
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["lost", "emptied", "cut", "overwritten"])
def test_a_damaged_index_is_made_anew(large, monkeypatch, how):
    class_as_tar(large / "imagenet-21K")
    reference = whole(large)
    (index,) = kept(large)
    files = sorted(file.name for file in index.iterdir())
    assert len(files) >= 3
    for name in files:
        damage(index / name, how)
        assert all(map(equal, reference, both(partial(load_21k, large)))), name
        assert kept(large) == [index]
        with scans(monkeypatch) as seen:
            again = load_21k(large)
        assert not [path for path in seen if path.endswith("n00000002")], name
        assert mapped(again.labels)


def test_an_index_that_is_no_directory_of_arrays(large):
    reference = whole(large)
    (index,) = kept(large)
    for file in index.iterdir():
        file.unlink()
    assert all(map(equal, reference, both(partial(load_21k, large))))
    assert len(list(index.iterdir())) > 2
    shutil.rmtree(index)
    index.write_bytes(b"")  # so that none can be kept there
    assert all(map(equal, reference, both(partial(load_21k, large))))
    assert index.read_bytes() == b"" and kept(large) == []


def test_cache_dir_that_cannot_be_written(large, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"")
    for cache in (file, file / "below"):
        refuses(OSError, partial(load_21k, large, cache_dir=cache), f"--cache-dir {cache}")
        args = ["info", "imagenet21k", "--data-dir", str(large), "--cache-dir", str(cache)]
        assert data.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--cache-dir {cache}" in line
    assert file.read_bytes() == b"" and kept(large) == []


def bound_by_permissions():
    """What makes of a command one that permissions bind even for root."""
    if os.geteuid() != 0:
        return []
    setpriv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if not shutil.which("setpriv") or subprocess.run([*setpriv, "true"]).returncode:
        pytest.skip("permissions do not bind root")
    return setpriv


def test_read_only_directories(large, tmp_path):
    cache, closed = tmp_path / "cache", tmp_path / "closed"
    closed.mkdir()
    shutil.rmtree(large / "imagenet-21K" / "n00000003")
    write_class(large / "imagenet-21K" / "n00000003", dict.fromkeys(OWN, jpeg(1)))
    script = f"""
import data
large, cache, closed = {str(large)!r}, {str(cache)!r}, {str(closed)!r}
try:
    open(large + "/imagenet-21K/probe", "w")
except PermissionError:
    print("read only")
for options in ({{}}, {{"cache_dir": cache}}):
    print(len(data.load_dataset("imagenet21k", large, **options)))
args = ["--data-dir", large, "--cache-dir", closed]
print(data.main(["info", "imagenet21k", *args]))
"""
    expected = len(load_21k(large))
    shutil.rmtree(*kept(large))
    folders = [large / "imagenet-21K" / "n00000003", large / "imagenet-21K", large, closed]
    for folder in folders:
        folder.chmod(0o555)
    try:
        result = subprocess.run(
            [*bound_by_permissions(), sys.executable, "-c", script],
            cwd=ROOT, env=env(), capture_output=True, text=True,
        )  # fmt: skip
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result.stdout.split() == ["read", "only", str(expected), str(expected), "2"]
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and f"--cache-dir {closed}" in line
    assert kept(large) == kept(closed) == [] and len(kept(cache)) == 1


def test_list_takes_the_cache_dir(large, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert data.main(["list", "--data-dir", str(large), "--cache-dir", str(cache)]) == 0
    assert "imagenet21k" in capsys.readouterr().out
    assert kept(large) == [] and len(kept(cache)) == 1


def test_other_readers_see_no_index(large):
    load_21k(large)
    assert len(kept(large)) == 1
    reference = torchvision.datasets.ImageFolder(large / "imagenet-21K")
    assert reference.classes == ["n00000001", "n00000002", "n00000003"]


# ------------------------------------------------------------------------------------------------
# Several processes, and processes that die
# ------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def fingerprint(root):
    content = hashlib.sha256()
    for dataset in both(partial(load_21k, root)):
        content.update(dataset.labels.tobytes())
        content.update("\n".join(places(dataset)).encode())
    return content.hexdigest()


def _load_together(root, barrier, answers):
    barrier.wait()
    try:
        answers.put(fingerprint(root))
    except Exception as error:
        answers.put(repr(error))


@pytest.mark.parametrize("state", ["new", "damaged", "outdated"])
def test_processes_that_build_at_once(large, state):
    class_as_tar(large / "imagenet-21K")
    reference = fingerprint(large)
    (index,) = kept(large)
    if state == "new":
        shutil.rmtree(index)
    elif state == "damaged":
        for file in index.iterdir():
            os.truncate(file, file.stat().st_size // 2)
    else:
        os.utime(large / "imagenet-21K" / "n00000003.tar")
    barrier, answers = FORK.Barrier(4), FORK.Queue()
    processes = [
        FORK.Process(target=_load_together, args=(large, barrier, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [reference] * 4
    for process in processes:
        process.join()
    old, (index,) = index, kept(large)
    assert (index != old) == (state == "outdated")
    assert mapped(load_21k(large).labels)


def _die_at(root, module, name, call, before):
    """Loads, and is killed before or after the `call`-th call of a function."""
    function, count = getattr(module, name), 0

    def counted(*args, **options):
        nonlocal count
        count += 1
        if count == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, counted)
    load_21k(root)


def test_killed_while_building(large):
    class_as_tar(large / "imagenet-21K")
    reference = both(partial(load_21k, large))
    (index,) = kept(large)
    files = len(list(index.iterdir()))
    moments = [(np, "save", call, False) for call in (1, files // 2, files - 1, files)]
    for moment in [*moments, (os, "rename", 1, True), (os, "rename", 1, False)]:
        for path in kept(large):
            shutil.rmtree(path)
        process = FORK.Process(target=_die_at, args=(large, *moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        for _ in range(2):
            assert all(map(equal, reference, both(partial(load_21k, large)))), moment
        assert index in kept(large)


def test_killed_at_any_time(large):
    class_as_tar(large / "imagenet-21K")
    reference = both(partial(load_21k, large))
    for delay in np.linspace(0.02, 0.3, 5):
        for path in kept(large):
            shutil.rmtree(path)
        process = FORK.Process(target=load_21k, args=(large,))
        process.start()
        process.join(delay)
        process.kill()
        process.join()
        assert equal(reference[0], load_21k(large))
        assert equal(reference[1], load_21k(large, "test"))
