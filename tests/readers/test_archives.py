"""Folders of classes: directories, one tar a class read in place, and the kept index."""

import contextlib
import gzip
import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import refuses
from PIL import Image
from trees import noise, pixels_of, write

import data
from readers import archives

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(1024)  # two blocks of zeros end a tar


def jpeg(seed, height=1, width=1):
    """The bytes of a JPEG of noise."""
    stream = io.BytesIO()
    Image.fromarray(noise(np.random.default_rng(seed), height, width, 3)).save(stream, "JPEG")
    return stream.getvalue()


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
    write(path, b"".join(member(*file, format) for file in files.items()) + END)


def write_class(folder, files, tar=False):
    """FOLDER/NAME, or in FOLDER.tar, of {name: bytes}."""
    if tar:
        return write_tar(folder.with_suffix(".tar"), files)
    for name, content in files.items():
        write(folder / name, content)


def everything(folder):
    """{path: content} of all that lies below a folder but kept indexes; of a directory None."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if ".index-" not in str(path.relative_to(folder))
    }


def places(dataset):
    return [dataset.where(i) for i in range(len(dataset))]


load_1k = partial(data.load_dataset, "imagenet1k")  # (root, split, **options)
load_21k = partial(data.load_dataset, "imagenet21k")
both_21k = partial(data.load_splits, "imagenet21k")  # (root, **options)

CLASSES = ("n01440764", "n01443537", "n02119789")
ORDER = {  # label, file; 10026 sorts before 9 as text
    "train": [
        *((0, "n01440764_10026.JPEG"), (0, "n01440764_18.JPEG"), (0, "n01440764_9.JPEG")),
        *((1, "n01443537_16.JPEG"), (1, "n01443537_2.JPEG"), (2, "n02119789_1.JPEG")),
    ],
    "val": [
        *((0, "ILSVRC2012_val_00000293.JPEG"), (1, "ILSVRC2012_val_00000236.JPEG")),
        *((2, "ILSVRC2012_val_00000784.JPEG"), (2, "ILSVRC2012_val_00002138.JPEG")),
    ],
}
PICTURES = {name: jpeg(i, 5, 4) for i, (_, name) in enumerate(sum(ORDER.values(), []))}


def write_imagenet1k(root, tars=()):
    """The official layout, not in sorted order; `tars`: the PART/WNID that are one tar each."""
    for part, rows in ORDER.items():
        for i, wnid in reversed(list(enumerate(CLASSES))):
            files = {name: PICTURES[name] for label, name in reversed(rows) if label == i}
            write_class(root / "imagenet-1K" / part / wnid, files, f"{part}/{wnid}" in tars)
    return root


@pytest.mark.parametrize(
    "tars",
    [(), ["train/n01440764", "val/n02119789"], [f"train/{wnid}" for wnid in CLASSES]],
    ids=["directories", "mixed", "train tars"],
)
def test_imagenet1k(tmp_path, tars):
    write_imagenet1k(tmp_path, tars)
    before = everything(tmp_path)
    for dataset, part in zip(data.load_splits("imagenet1k", tmp_path), ORDER):
        assert dataset.name == "imagenet1k" and dataset.classes == CLASSES
        assert (dataset.task, dataset.domain, dataset.groups) == ("multiclass", "natural", None)
        assert (dataset.options, dataset.dropped) == ({}, {})
        assert dataset.labels.tolist() == [label for label, _ in ORDER[part]]
        assert dataset.labels.dtype == np.int64
        travelled = pickle.loads(pickle.dumps(dataset))  # as to a worker
        for i, (label, name) in enumerate(ORDER[part]):
            between = ".tar: " if f"{part}/{CLASSES[label]}" in tars else "/"
            place = f"{tmp_path}/imagenet-1K/{part}/{CLASSES[label]}{between}{name}"
            assert dataset.where(i) == place and dataset[i][1].item() == label
            for image in (dataset[i][0], travelled.read(i)):
                np.testing.assert_array_equal(image, pixels_of(PICTURES[name]))
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
    files = {"a b.JPEG": jpeg(1, 3, 2), deep: jpeg(2, 2, 5), "n\udce9.JPEG": jpeg(3)}  # no UTF-8
    if format != "ustar":
        files["x" * 200 + ".JPEG"] = jpeg(4, 30, 41)
    files["é漢.JPEG"] = jpeg(5, 6, 7)
    write_tar(path, dict(reversed(files.items())), format)
    holds(root, path, dict(sorted(files.items())))


def test_tar_members_that_are_no_images_of_the_class(one_tar):
    root, path = one_tar
    path.write_bytes(
        member("./", type=tarfile.DIRTYPE)
        + member("n01440764/._n_1.JPEG", b"hidden")
        + member("n01440764/.thumbnails/n_1.JPEG", jpeg(2))
        + member("n01440764/n_1.JPEG", jpeg(1, 2, 3), type=tarfile.CONTTYPE)  # contiguous
        + member("empty.JPEG/", type=tarfile.DIRTYPE)
        + END
        + bytes(3 * 10240)  # padding
    )
    holds(root, path, {"n01440764/n_1.JPEG": jpeg(1, 2, 3)})


# Bad tars: one line that names the tar, the member and the mend; nothing is written

FIRST, LAST = member("a.JPEG", jpeg(1, 40, 40)), member("z.JPEG", jpeg(2))
REMADE, MOVED = "make the tar anew", "move it away"


def negative(name):
    """A member of -256 bytes, in base 256: tarfile would go round in a circle."""
    header = bytearray(member(name))
    header[124:136] = b"\xff" * 11 + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


DAMAGED = {
    "text": (b"<html>404 Not Found</html>" * 50, "fetch it again"),
    "gzipped": (gzip.compress(FIRST + LAST + END), "decompress it"),
    "damaged header": (FIRST + b"y" + LAST[1:] + END, "fetch it again"),
    # A download by pieces may leave one as zeros: what follows it must not be lost.
    "zeros inside": (FIRST + bytes(len(LAST)) + LAST + END, "fetch it again"),
    "bytes after the end": (FIRST + bytes(8192) + b"<html>" * 100, "fetch it again"),
    "negative size": (negative("a.JPEG") + END, "(a.JPEG: -256 bytes); fetch it again"),
    "no image": (member("d/", type=tarfile.DIRTYPE) + member(".x", b"x") + END, "add some or drop"),
    "symbolic link": (FIRST + member("b.JPEG", type=tarfile.SYMTYPE, linkname="x") + END, REMADE),
    "hard link": (FIRST + member("b.JPEG", type=tarfile.LNKTYPE, linkname="x") + END, REMADE),
    "sparse": (FIRST + member("b.JPEG", type=tarfile.GNUTYPE_SPARSE) + END, REMADE),
    "twice": (FIRST + member("./a.JPEG", jpeg(3)) + END, REMADE),
    "other file": (FIRST + member("notes.txt", b"x") + END, MOVED),
}


@pytest.mark.parametrize("content, mend", DAMAGED.values(), ids=DAMAGED)
def test_bad_tars(one_tar, capsys, content, mend):
    root, path = one_tar
    path.write_bytes(content)
    before = everything(root)
    assert data.main(["info", "imagenet1k", "--data-dir", str(root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and mend in line
    assert everything(root) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_cut_anywhere_is_refused(one_tar, format):
    root, path = one_tar
    names = ["a.JPEG", "y" * 80 + "/" + "x" * 80 + ".JPEG", "z.JPEG"]
    parts = [member(name, jpeg(i, 9, 9), format) for i, name in enumerate(names)]
    body = b"".join(parts)
    path.write_bytes(body + END)
    assert len(load_1k(root)) == 3
    ends = np.cumsum([len(part) for part in parts])  # inside headers, data, and at their borders
    for cut in {*range(0, len(body) + 512, 100), *ends, *(ends + 1), *(ends - 1), *(ends + 511)}:
        path.write_bytes((body + END)[:cut])
        refuses(ValueError, partial(load_1k, root), path, "tar", "fetch it again")


def test_a_broken_member_is_named(one_tar):
    root, path = one_tar
    write_tar(path, {"a.JPEG": jpeg(1, 9, 9), "b.JPEG": jpeg(2, 9, 9)[:-300], "c.JPEG": b""})
    dataset = load_1k(root)
    assert dataset.read(0).shape == (3, 9, 9)
    refuses(ValueError, partial(dataset.read, 1), f"{path}: b.JPEG", "mend or remove")
    refuses(ValueError, partial(dataset.read, 2), f"{path}: c.JPEG", "mend or remove")


# Classes that are missing, superfluous, empty or there twice


@pytest.mark.parametrize("ending", ["", ".tar"])
def test_classes_of_val_are_those_of_train(tmp_path, ending):
    val = write_imagenet1k(tmp_path, ["val/n01443537"] if ending else ()) / "imagenet-1K" / "val"
    load = partial(load_1k, tmp_path, "test")
    (val / f"n01443537{ending}").rename(val / f"n09999999{ending}")
    refuses(ValueError, load, val / "n09999999", f"no class of that name in {val.parent}/train")
    (val / f"n09999999{ending}").rename(tmp_path / "away")
    refuses(ValueError, load, val / "n01443537", "add some or drop")
    assert len(load_1k(tmp_path)) == 6


def test_bad_class_entries(tmp_path):
    write_imagenet1k(tmp_path)
    folder, load = tmp_path / "imagenet-1K" / "train", partial(load_1k, tmp_path)
    first = folder / "n01440764"
    for stray, words in (
        (folder / "n01440764.tar", ["are both there", "remove one"]),
        (folder / "ILSVRC2012_val_00000001.JPEG", ["neither a class directory nor CLASS.tar"]),
        (first / "boxes.xml", ["not an image"]),
    ):
        stray.write_bytes(jpeg(0))
        refuses(ValueError, load, first if ".tar" in stray.name else stray, *words)
        stray.unlink()
    first.rename(tmp_path / "away")
    write_class(first, {".hidden.JPEG": jpeg(0)})
    refuses(ValueError, load, first, "no image", "add some or drop")
    shutil.rmtree(first)
    (tmp_path / "away").rename(first)
    (folder / ".cache").mkdir()
    (folder / ".n.tar").touch()
    assert load().classes == CLASSES
    shutil.rmtree(tmp_path / "imagenet-1K" / "val")
    refuses(FileNotFoundError, load, tmp_path / "imagenet-1K" / "val", "--data-dir")


# imagenet21k: one image in a hundred is held out, by its name alone


def base(place):
    return place.replace(": ", "/").rpartition("/")[2]


def held(root):
    """The file names of the test split."""
    return [base(place) for place in places(load_21k(root, "test"))]


NAMES = {wnid: [f"{wnid}_{i}.JPEG" for i in range(1, 1001)] for wnid in ("n01440764", "n02124075")}
# The names whose CRC-32 is a multiple of 100. Another rule would make other test sets of old ones.
HELD = [
    *(f"n01440764_{i}.JPEG" for i in (29, 30, 37, 338, 587, 590, 952)),
    *(f"n02124075_{i}.JPEG" for i in (54, 75, 116, 214, 260, 309, 363, 566, 713, 846)),
]


def write_21k(root, names, tars=(), image=None):
    """imagenet-21K/WNID/NAME of {wnid: names}; `tars`: the classes that are one tar each."""
    for wnid, files in names.items():
        files = dict.fromkeys(files, image or jpeg(0))
        write_class(root / "imagenet-21K" / wnid, files, wnid in tars)
    return root


@pytest.mark.parametrize("tars", [(), NAMES, ["n02124075"]], ids=["directories", "tars", "mixed"])
def test_imagenet21k(tmp_path, tars):
    root = write_21k(tmp_path, dict(reversed(NAMES.items())), tars)
    before = set(root.rglob("*"))
    train, test = both_21k(root)
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
    # In another class, with other content, and wherever the tar says that it lies.
    assert held(write_21k(tmp_path / "a", {"n99999999": names}, image=jpeg(9))) == reference
    root = write_21k(tmp_path / "b", {"x": [f"./deep/er/{name}" for name in names[::-1]]}, ["x"])
    assert held(root) == reference
    # A class may lie on one side; a split needs an image.
    root = write_21k(tmp_path / "c", {"a": reference[:1], "b": names[:1]})
    train, test = both_21k(root)
    assert train.classes == test.classes == ("a", "b")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1], [0])
    root = write_21k(tmp_path / "d", {"a": names[:1]})
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
    train, test = both_21k(root, **options)
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


def facts(sets):
    return [(dataset.classes, dataset.labels.tolist(), places(dataset)) for dataset in sets]


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
    (index / "._names.npy").write_bytes(b"of the Finder")
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    with scans(monkeypatch) as seen:
        second = both_21k(large)
    assert set(seen) - {str(index)} == {str(large / "imagenet-21K")}
    assert facts(first) == facts(second)
    for dataset in (*first, *second):
        assert mapped(dataset) and not dataset.labels.flags.writeable
    np.testing.assert_array_equal(second[0].read(0), pixels_of(jpeg(1, 2, 2)))
    assert kept(large) == [index]
    after = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in index.iterdir()]
    assert after == before
    reference = torchvision.datasets.ImageFolder(large / "imagenet-21K")
    assert reference.classes == ["n00000003", "n01440764", "n02124075"]  # others see no index


def test_cache_dir(large, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "to" / "cache"
    first = whole(large, cache_dir=str(cache))
    assert kept(large) == [] and len(kept(cache)) == 1
    with scans(monkeypatch) as seen:
        second = both_21k(large, cache_dir=cache)
    assert str(large / "imagenet-21K" / "n00000003") not in seen
    assert facts(first) == facts(second) and mapped(second[0])
    assert data.main(["list", "--data-dir", str(large), "--cache-dir", str(cache)]) == 0
    assert "imagenet21k" in capsys.readouterr().out and kept(large) == []
    own = tmp_path / "own"
    for part in ("train", "test"):  # other sets have indices of their own there
        shutil.copytree(large / "imagenet-21K", own / part)
    for part in ("train", "test"):
        assert len(data.load_dataset(f"folder:{own}", split=part, cache_dir=cache)) == 100
    assert len(kept(cache)) == 3
    monkeypatch.setattr(archives, "CACHE_FROM", 101)
    train, _ = whole(large)
    assert not mapped(train) and kept(large) == []  # an index of few images is not kept


def new_file_in_an_old_directory(folder):
    # rsync and tar set the time of a directory to that of its original.
    time = (folder / "n00000003").stat().st_mtime_ns
    (folder / "n00000003" / "n00000003_new.JPEG").write_bytes(jpeg(0))
    os.utime(folder / "n00000003", ns=(time, time))


def lost_class(folder):
    write_class(folder / "n00000001b", {f"n00000001b_{i}.JPEG": jpeg(0) for i in range(10)})
    shutil.rmtree(folder / "n00000003")


def replaced_tar(folder):
    class_as_tar(folder)
    load_21k(folder.parent)
    tar = folder / "n00000003.tar"
    stat = tar.stat()
    write_tar(tar, dict.fromkeys((name.replace("_", "_1") for name in OWN), jpeg(7, 3, 3)))
    os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert tar.stat().st_size == stat.st_size


@pytest.mark.parametrize(
    "change", [new_file_in_an_old_directory, lost_class, class_as_tar, replaced_tar]
)
def test_changes_are_noticed(large, change):
    whole(large)
    (old,) = kept(large)
    change(large / "imagenet-21K")
    whole(large)
    (new,) = kept(large)
    assert new != old


@pytest.mark.parametrize("how", ["lost", "emptied", "overwritten", "flipped", "retyped"])
def test_a_damaged_index_is_made_anew(large, monkeypatch, how):
    class_as_tar(large / "imagenet-21K")
    reference = whole(large)
    (index,) = kept(large)
    files = sorted(index.iterdir())
    assert len(files) == 7
    for file in files:
        if how == "lost":
            file.unlink()
        elif how == "emptied":  # as a power cut leaves what never reached the disk
            os.truncate(file, 0)
        elif how == "flipped":  # one bit of the last value
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 2]))
        elif how == "retyped":  # one bit of the header, of numbers
            file.write_bytes(file.read_bytes().replace(b"'<i8'", b"'>i8'"))
        else:
            file.write_bytes(b"(" * file.stat().st_size)
        assert facts(reference) == facts(both_21k(large)), file
        assert kept(large) == [index]
        with scans(monkeypatch) as seen:
            assert mapped(load_21k(large))
        assert not [path for path in seen if path.endswith("n02124075")], file


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


def test_processes_that_build_at_once(large):
    class_as_tar(large / "imagenet-21K")
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(4), fork.Queue()

    def work():
        barrier.wait()
        answers.put(facts(both_21k(large)))

    reference, (index,) = facts(both_21k(large)), kept(large)
    for file in index.iterdir():
        os.truncate(file, file.stat().st_size // 2)
    processes = [fork.Process(target=work, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [reference] * 4
    for process in processes:
        process.join()
    assert kept(large) == [index] and mapped(load_21k(large))
