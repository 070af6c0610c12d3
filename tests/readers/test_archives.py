"""Folders of classes: directories, one tar a class read in place, and the kept index."""

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
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import refuses
from PIL import Image
from trees import noise, pixels_of

import data
from readers import archives

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(1024)  # two blocks of zeros end a tar


def jpeg(seed, height=1, width=1):
    """The bytes of a JPEG of noise."""
    stream = io.BytesIO()
    Image.fromarray(noise(np.random.default_rng(seed), height, width, 3)).save(stream, "JPEG")
    return stream.getvalue()


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
    path.write_bytes(b"".join(member(*file, format) for file in files.items()) + END)


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


# imagenet1k

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
ORDER = {  # label, file
    "train": [
        *((0, "n01440764_10026.JPEG"), (0, "n01440764_18.JPEG"), (0, "n01440764_9.JPEG")),
        *((1, "n01443537_16.JPEG"), (1, "n01443537_2.JPEG"), (2, "n02119789_1.JPEG")),
    ],
    "test": [
        *((0, "ILSVRC2012_val_00000293.JPEG"), (1, "ILSVRC2012_val_00000236.JPEG")),
        *((2, "ILSVRC2012_val_00000784.JPEG"), (2, "ILSVRC2012_val_00002138.JPEG")),
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
        assert len(dataset) == len(ORDER[split]) and dataset.labels.dtype == np.int64
        assert dataset.labels.tolist() == [label for label, _ in ORDER[split]]
        travelled = pickle.loads(pickle.dumps(dataset))  # as to a worker
        for i, (label, name) in enumerate(ORDER[split]):
            wnid = CLASSES[label]
            folder = tmp_path / "imagenet-1K" / part / wnid
            is_tar = f"{part}/{wnid}" in tars
            assert dataset.where(i) == (f"{folder}.tar: {name}" if is_tar else f"{folder}/{name}")
            image, number = dataset[i]
            np.testing.assert_array_equal(image, pixels_of(files[wnid][name]))
            np.testing.assert_array_equal(travelled.read(i), pixels_of(files[wnid][name]))
            assert number.item() == label
    assert everything(tmp_path) == before  # nothing is unpacked, nothing is kept


# Tars as others make them


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
    write_tar(path, {"n\udce9.JPEG": jpeg(1, 2, 3)}, format)  # no UTF-8
    holds(root, path, {"n\udce9.JPEG": jpeg(1, 2, 3)})


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_gnu_tars_of_a_directory(one_tar, format):
    root, path = one_tar
    hidden = {"._1.JPEG": b"not an image", ".DS_Store": b"nor this"}
    files = {"n_1.JPEG": jpeg(1, 3, 2), "n_2.JPEG": jpeg(2, 200, 91)}
    if format not in ("v7", "ustar"):
        files["n_3" + "x" * 150 + ".JPEG"] = jpeg(3, 4, 5)
    write_class(root / "n01440764", hidden | files)
    gnu_tar("-C", root / "n01440764", f"--format={format}", "-cf", path, ".")
    holds(root, path, {f"./{name}": content for name, content in files.items()})
    gnu_tar("-C", root, f"--format={format}", "-cf", path, "n01440764")
    holds(root, path, {f"n01440764/{name}": content for name, content in files.items()})


def test_tar_members_that_are_no_images_of_the_class(one_tar):
    root, path = one_tar
    path.write_bytes(
        member("./", type=tarfile.DIRTYPE)
        + member(".DS_Store", b"hidden")
        + member("n01440764/", type=tarfile.DIRTYPE)
        + member("n01440764/._n_1.JPEG", b"hidden")
        + member("n01440764/.thumbnails/n_1.JPEG", jpeg(2))
        + member("n01440764/n_1.JPEG", jpeg(1, 2, 3), type=tarfile.CONTTYPE)  # contiguous
        + member("empty.JPEG/", type=tarfile.DIRTYPE)
        + END
        + bytes(3 * 10240)  # padding
    )
    holds(root, path, {"n01440764/n_1.JPEG": jpeg(1, 2, 3)})


def test_symlinked_classes(tmp_path):
    write_imagenet1k(tmp_path, ["train/n01443537"])
    train = tmp_path / "imagenet-1K" / "train"
    for name in ("n01440764", "n01443537.tar"):
        (train / name).rename(tmp_path / name)
        (train / name).symlink_to(tmp_path / name)
    dataset = load_1k(tmp_path)
    for i, (label, name) in enumerate(ORDER["train"]):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(TRAIN[CLASSES[label]][name]))
    (tmp_path / "n01443537.tar").unlink()
    with pytest.raises(OSError, match="n01443537.tar"):
        load_1k(tmp_path)


# Bad tars: one line that names the tar, the member and the mend; nothing is written


def refused(root, path, content, *words):
    """A tar of this content is refused by its name, and nothing else comes to be."""
    path.write_bytes(content)
    before = everything(root)
    refuses(ValueError, partial(load_1k, root), path, *words)
    assert everything(root) == before


FIRST, LAST = member("a.JPEG", jpeg(1, 40, 40)), member("z.JPEG", jpeg(2))
REMADE, MOVED = "make the tar anew", "move it out of the dataset"


@pytest.mark.parametrize(
    "name, header, mend",
    [
        *((name, {}, REMADE) for name in ("/etc/n_1.JPEG", "../n_1.JPEG", "b/../../n_1.JPEG")),
        ("b.JPEG", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, REMADE),
        ("b.JPEG", {"type": tarfile.SYMTYPE, "linkname": "a.JPEG"}, REMADE),
        ("b.JPEG", {"type": tarfile.LNKTYPE, "linkname": "a.JPEG"}, REMADE),
        ("b.JPEG", {"type": tarfile.FIFOTYPE}, REMADE),
        ("b.JPEG", {"type": tarfile.GNUTYPE_SPARSE}, f"a sparse file; {REMADE}"),
        ("b.JPEG", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, REMADE),
        ("b.JPEG", {"type": tarfile.BLKTYPE, "devmajor": 8}, REMADE),
        *((name, {}, REMADE) for name in ("a.JPEG", "./a.JPEG")),  # the same place twice
        *((name, {}, MOVED) for name in ("notes.txt", "n01440764_1", "n01440764.tar", "a\nb.txt")),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_bad_members(one_tar, monkeypatch, capsys, name, header, mend, format):
    root, path = one_tar
    monkeypatch.chdir(root)  # a name relative to here would show
    content = b"" if "type" in header else jpeg(3)
    bad = member(name, content, format, **header)
    path.write_bytes(FIRST + bad + LAST + END)
    before = everything(root)
    assert data.main(["info", "imagenet1k", "--data-dir", str(root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: {name.replace(chr(10), ' ')}" in line and mend in line
    assert everything(root) == before


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
    harmless = []
    for place in range(512):
        damaged = bytearray(FIRST + LAST + END)
        damaged[len(FIRST) + place] ^= 1
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
    [("b.JPEG", tarfile.REGTYPE), ("._b.JPEG", tarfile.REGTYPE)]
    + [("././@LongLink", tarfile.GNUTYPE_LONGNAME), ("pax", tarfile.XHDTYPE)],
    ids=["file", "hidden", "long name", "pax"],
)
def test_absurd_sizes(one_tar, size, name, kind):
    """Nor do they make an endless loop."""
    refused(*one_tar, FIRST + with_size(name, size, kind) + LAST + END)


DAMAGED = {
    "no bytes": b"",
    "text": b"<html>404 Not Found</html>" * 50,
    "half a block": bytes(511),
    "gzipped": gzip.compress(FIRST + LAST + END),
    "no end": FIRST + LAST,
    "half an end": FIRST + bytes(511),
    "bytes for an end": FIRST + b"\x01" * 512 + END,
    # A download by pieces may leave one as zeros: what follows it must not be lost.
    "zeros inside": FIRST + bytes(len(LAST)) + LAST + END,
    "two tars in one": FIRST + END + LAST + END,
    "bytes after the end": FIRST + bytes(8192) + b"<html>" * 100,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_tars(one_tar, content):
    refused(*one_tar, content, "again")


@pytest.mark.parametrize(
    "content", [bytes(10240), END, member("d/", type=tarfile.DIRTYPE) + member(".x", b"x") + END]
)
def test_tars_without_an_image(one_tar, content):
    refused(*one_tar, content, "no image", "add some")


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


# Classes that are missing, superfluous, empty or there twice


@pytest.mark.parametrize("tars", [(), ["val/n01443537", "train/n02119789"]], ids=["", "tars"])
def test_classes_of_val_are_those_of_train(tmp_path, tars):
    val = write_imagenet1k(tmp_path, tars) / "imagenet-1K" / "val"
    lost = val / ("n01443537.tar" if tars else "n01443537")
    lost.rename(tmp_path / "away")
    refuses(ValueError, partial(load_1k, tmp_path, "test"), val / "n01443537", "add some or drop")
    assert len(load_1k(tmp_path)) == 6
    (tmp_path / "away").rename(lost)
    write_class(val / "n09999999", {"v.JPEG": jpeg(0)})
    words = val / "n09999999", f"no class of that name in {tmp_path}/imagenet-1K/train"
    refuses(ValueError, partial(load_1k, tmp_path, "test"), *words)
    shutil.rmtree(val / "n09999999")
    write_tar(val / "n09999999.tar", {"v.JPEG": jpeg(0)})
    refuses(ValueError, partial(load_1k, tmp_path, "test"), *words)


@pytest.mark.parametrize(
    "name, folder",
    [("imagenet1k", "imagenet-1K/train"), ("imagenet1k", "imagenet-1K/val")]
    + [("imagenet21k", "imagenet-21K")],
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


def test_missing_parts(tmp_path):
    for part in ("imagenet-1K/val", "imagenet-1K/train", "imagenet-1K"):
        shutil.rmtree(write_imagenet1k(tmp_path) / part)
        for split in ("train", "test"):
            call = partial(load_1k, tmp_path, split)
            refuses(FileNotFoundError, call, tmp_path / part, "--data-dir")
    load = partial(load_21k, tmp_path)
    refuses(FileNotFoundError, load, tmp_path / "imagenet-21K", "--data-dir")
    (tmp_path / "imagenet-21K" / ".hidden").mkdir(parents=True)
    refuses(ValueError, load, tmp_path / "imagenet-21K", "no class")


# imagenet21k: one image in a hundred is held out, by its name alone


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
    *(f"n01440764_{i}.JPEG" for i in (29, 30, 37, 338, 587, 590, 952)),
    *(f"n02124075_{i}.JPEG" for i in (54, 75, 116, 214, 260, 309, 363, 566, 713, 846)),
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


def test_a_class_may_lie_on_one_side_but_a_split_needs_an_image(tmp_path):
    root = write_21k(tmp_path / "two", {"a": ["n01440764_29.JPEG"], "b": ["n01440764_1.JPEG"]})
    train, test = both(partial(load_21k, root))
    assert train.classes == test.classes == ("a", "b")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1], [0])
    root = write_21k(tmp_path / "one", {"a": ["n01440764_1.JPEG"]})
    assert len(load_21k(root)) == 1
    refuses(ValueError, partial(load_21k, root, "test"), root / "imagenet-21K", "no image")


# The index of many images is kept

OWN = [f"n00000003_{i}.JPEG" for i in range(10)]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A data directory with imagenet21k of 100 images, as many as make an index that is kept.

    The last class is the one to be changed.
    """
    assert archives.CACHE_FROM == 50_000
    monkeypatch.setattr(archives, "CACHE_FROM", 100)
    names = {"n01440764": NAMES["n01440764"][:30], "n02124075": NAMES["n02124075"][:60]}
    return write_21k(tmp_path / "datasets", names | {"n00000003": OWN}, image=jpeg(1, 2, 2))


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
    assert {"n01440764_29.JPEG", "n02124075_54.JPEG"} <= {base(place) for place in places(test)}
    for dataset in (train, test):
        of_class = {cls: label for label, cls in enumerate(dataset.classes)}
        labels = [of_class[base(place).partition("_")[0]] for place in places(dataset)]
        np.testing.assert_array_equal(dataset.labels, labels)
    return train, test


def kept(root):
    """The hidden directories below a folder: indices, and what is left of their making."""
    return sorted(path for path in root.rglob(".*") if path.is_dir())


def equal(sets, others):
    """Whether two pairs of datasets have the same labels and the same files."""
    return all(
        a.classes == b.classes and np.array_equal(a.labels, b.labels) and places(a) == places(b)
        for a, b in zip(sets, others)
    )


def mapped(dataset):
    """Whether its labels lie in a file that is mapped into memory, so that processes share it."""
    array = dataset.labels
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


@contextlib.contextmanager
def scans(monkeypatch):
    """The list of the directories that are listed meanwhile."""
    seen, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path=".": seen.append(str(path)) or scandir(path))
        yield seen


def class_as_tar(folder):
    shutil.rmtree(folder / "n00000003")
    write_tar(folder / "n00000003.tar", dict.fromkeys(OWN, jpeg(0)))


def test_index_is_kept(large, monkeypatch):
    first = whole(large)
    (index,) = kept(large)
    assert index.parent == large
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    with scans(monkeypatch) as seen:
        second = both(partial(load_21k, large))
    assert set(seen) == {str(large / "imagenet-21K")}
    assert equal(first, second)
    for dataset in (*first, *second):
        assert mapped(dataset) and not dataset.labels.flags.writeable
    np.testing.assert_array_equal(second[0].read(0), pixels_of(jpeg(1, 2, 2)))
    assert kept(large) == [index]
    after = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    assert after == before
    reference = torchvision.datasets.ImageFolder(large / "imagenet-21K")
    assert reference.classes == ["n00000003", "n01440764", "n02124075"]  # others see no index


def test_its_name_and_content_hold_for_ever(tmp_path, monkeypatch):
    """Of an index that another version wrote; stat() gives the times of then."""
    root = write_21k(tmp_path, {"a": ["n01440764_29.JPEG", "n_1.JPEG"]}, ["a"])
    stat = os.stat(root / "imagenet-21K" / "a.tar")
    key = f"1 held_out False\na.tar {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
    load_21k(root)
    (index,) = kept(root)
    assert index.name == f".index-imagenet-21K-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    arrays = {file.stem: np.load(file) for file in index.iterdir()}
    assert arrays["names"].tolist() == [b"n_1.JPEG", b"n01440764_29.JPEG"]
    assert arrays["starts"].tolist() == [2 * 512 + -(-len(jpeg(0)) // 512) * 512, 512]
    assert arrays["sizes"].tolist() == [len(jpeg(0))] * 2 and arrays["labels"].tolist() == [0, 0]
    assert arrays["held_from"] == 1 and arrays["classes"].tolist() == [b"a"]
    assert len(arrays) == 6


def test_index_of_fewer_images_is_not_kept(large, monkeypatch):
    (large / "imagenet-21K" / "n00000003" / OWN[0]).unlink()
    train, test = whole(large, cache_dir=str(large / "cache"))
    assert len(train) + len(test) == 99 and not mapped(train)
    assert kept(large) == [] and not (large / "cache").exists()
    with scans(monkeypatch) as seen:
        load_21k(large)
    assert str(large / "imagenet-21K" / "n00000003") in seen


def test_cache_dir(large, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "to" / "cache"
    first = whole(large, cache_dir=str(cache))
    assert kept(large) == [] and len(kept(cache)) == 1
    with scans(monkeypatch) as seen:
        second = both(partial(load_21k, large, cache_dir=cache))
    assert str(large / "imagenet-21K" / "n00000003") not in seen
    assert equal(first, second) and mapped(second[0])
    assert data.main(["list", "--data-dir", str(large), "--cache-dir", str(cache)]) == 0
    assert "imagenet21k" in capsys.readouterr().out and kept(large) == []
    assert equal(first[:1], [load_21k(large)]) and len(kept(large)) == 1  # beside the data too now
    assert len(kept(cache)) == 1


def test_cache_dir_of_several_sets(large, tmp_path, monkeypatch):
    cache, own = tmp_path / "cache", tmp_path / "own"
    for part in ("train", "test"):
        shutil.copytree(large / "imagenet-21K", own / part)
    (own / "test" / "n00000003" / "n00000003_x.JPEG").write_bytes(jpeg(0))
    for again in (False, True):
        with scans(monkeypatch) as seen:
            load_21k(large, cache_dir=cache)
            train, test = both(partial(data.load_dataset, f"folder:{own}", cache_dir=cache))
        assert len(kept(cache)) == 3
        assert any("n00000003" in path for path in seen) != again
    assert (len(train), len(test)) == (100, 101)
    assert train.where(0) == f"{own}/train/n00000003/n00000003_0.JPEG"
    assert test.where(10) == f"{own}/test/n00000003/n00000003_x.JPEG"


def new_file(folder):
    (folder / "n00000003" / "n00000003_new.JPEG").write_bytes(jpeg(0))


def renamed_file(folder):
    (folder / "n00000003" / OWN[4]).rename(folder / "n00000003" / "n00000003_zz.JPEG")


def lost_class(folder):
    write_class(folder / "n00000001b", {f"n00000001b_{i}.JPEG": jpeg(0) for i in range(10)})
    shutil.rmtree(folder / "n00000003")


def new_file_in_an_old_directory(folder):
    # rsync and tar set the time of a directory to that of its original.
    time = (folder / "n00000003").stat().st_mtime_ns
    new_file(folder)
    os.utime(folder / "n00000003", ns=(time, time))


@pytest.mark.parametrize(
    "change",
    [new_file, renamed_file, lost_class, class_as_tar, new_file_in_an_old_directory],
)
def test_changed_files_are_noticed(large, change):
    load_21k(large)
    (old,) = kept(large)
    change(large / "imagenet-21K")
    whole(large)
    (new,) = kept(large)
    assert new != old


@pytest.mark.parametrize(
    "size, time",
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["both", "size", "time", "neither"],
)
def test_replaced_tars_are_noticed(large, size, time):
    tar = large / "imagenet-21K" / "n00000003.tar"
    class_as_tar(large / "imagenet-21K")
    load_21k(large)
    (old,) = kept(large)
    stat = tar.stat()
    names = [name.replace("_", "_1") for name in OWN]
    more = ["n00000003_x.JPEG"] if size else []
    write_tar(tar, dict.fromkeys(names + more, jpeg(7, 3, 3)))
    assert (tar.stat().st_size != stat.st_size) == size
    if not time:
        os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    train, _ = whole(large)
    (new,) = kept(large)
    assert new != old
    i = places(train).index(f"{tar}: {names[0]}")
    np.testing.assert_array_equal(train.read(i), pixels_of(jpeg(7, 3, 3)))


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
    assert len(files) == 6
    for name in files:
        damage(index / name, how)
        assert equal(reference, both(partial(load_21k, large))), name
        assert kept(large) == [index]
        with scans(monkeypatch) as seen:
            again = load_21k(large)
        assert not [path for path in seen if path.endswith("n02124075")], name
        assert mapped(again)


def test_an_index_that_is_no_directory_of_arrays(large):
    reference = whole(large)
    (index,) = kept(large)
    for file in index.iterdir():
        file.unlink()
    assert equal(reference, both(partial(load_21k, large)))
    assert len(list(index.iterdir())) == 4
    shutil.rmtree(index)
    index.write_bytes(b"")  # so that none can be kept there
    assert equal(reference, both(partial(load_21k, large)))
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


@pytest.mark.parametrize("module, name", [(Path, "mkdir"), (np, "save"), (os, "rename")])
def test_read_only_directories(large, tmp_path, monkeypatch, module, name):
    """Beside the data no index need be kept; below --cache-dir it must."""

    def refuse(*args, **options):
        raise PermissionError("read only")

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(module, name, refuse)
    assert not mapped(whole(large)[0])
    call = partial(load_21k, large, cache_dir=tmp_path / "cache")
    refuses(OSError, call, f"--cache-dir {tmp_path}/cache", "read only")
    assert kept(tmp_path) == []


# Several processes, and processes that die

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
    assert [answers.get() for _ in processes] == [reference] * 4
    for process in processes:
        process.join()
    old, (index,) = index, kept(large)
    assert (index != old) == (state == "outdated")
    assert mapped(load_21k(large))


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
    moments = [(np, "save", call, False) for call in range(1, files + 1)]
    for moment in [*moments, (os, "rename", 1, True), (os, "rename", 1, False)]:
        for path in kept(large):
            shutil.rmtree(path)
        process = FORK.Process(target=_die_at, args=(large, *moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        for _ in range(2):
            assert equal(reference, both(partial(load_21k, large))), moment
        assert index in kept(large)
