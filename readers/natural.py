"""Natural images: CIFAR, Flowers-102, Pets, ImageNet, and folders of one's own.

Each function is (name, root, split, **its options) -> ImageDataset. Large folders and archives
have an index of arrays, which is kept on disk.
"""

import hashlib
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torchvision
from tqdm import tqdm

from readers.images import IMAGE_ENDINGS, Array, Files, ImageDataset, Members, encoded, need

# ------------------------------------------------------------------------------------------------
# Through torchvision
# ------------------------------------------------------------------------------------------------


def _torchvision(dataset, name, root, download, **options):
    """torchvision's dataset; its 'not found' becomes a line that names directory and mend."""
    try:
        return dataset(root, download=download, **options)
    except ModuleNotFoundError as error:
        message = f"{name}: torchvision needs {error.name}: pip install {error.name}"
        raise ValueError(message) from error
    except (RuntimeError, OSError, ValueError) as error:
        message = f"{name}: not found or not whole below {root}; give --data-dir, or --download"
        if download:
            message = f"{name}: download to {root} failed ({error}); try again, or give --data-dir"
        raise FileNotFoundError(message) from error


def cifar(name, root, split, download=False):
    build = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    source = _torchvision(build[name], name, root, download, train=split == "train")
    labels = np.array(source.targets, np.int64)
    reader = Array(f"{name} {split}", source.data)
    return ImageDataset(name, reader, labels, source.classes, "multiclass", "natural")


def flowers(name, root, split, download=False):
    # The study trains on the official test list and tests on train + validation.
    parts = {"train": ("test",), "test": ("train", "val")}[split]
    build = torchvision.datasets.Flowers102
    sources = [_torchvision(build, name, root, download, split=part) for part in parts]
    paths = [path for source in sources for path in source._image_files]
    labels = [label for source in sources for label in source._labels]
    classes = getattr(build, "classes", [str(i) for i in range(102)])
    return _path_dataset(name, root, paths, labels, classes)


def pets(name, root, split, download=False):
    part = {"train": "trainval", "test": "test"}[split]
    source = _torchvision(torchvision.datasets.OxfordIIITPet, name, root, download, split=part)
    return _path_dataset(name, root, source._images, source._labels, source.classes)


def _path_dataset(name, root, paths, labels, classes):
    reader = Files(str(root), encoded(os.path.relpath(path, root) for path in paths), "RGB")
    return ImageDataset(name, reader, np.array(labels, np.int64), classes, "multiclass", "natural")


# ------------------------------------------------------------------------------------------------
# Folders of classes, and one archive a class
# ------------------------------------------------------------------------------------------------

CACHE_FROM = 50_000  # images: the index of such a set, and of any archives, is kept on disk


def imagenet1k(name, root, split, cache_dir=None):
    """ILSVRC 2012 (Russakovsky et al. 2015, arXiv:1409.0575); test is its validation set."""
    folder = root / "imagenet-1K"
    need(name, folder / "train", folder / "val")
    return _class_dataset(name, folder, {"train": "train", "test": "val"}[split], cache_dir)


def imagenet21k(name, root, split, cache_dir=None):
    """ImageNet-21k; one file in a hundred, by the hash of its name, is held out for the test."""
    folder = root / "imagenet-21K"
    need(name, folder)
    index = class_index(folder, cache_dir, held_out)
    part = slice(
        *{"train": (0, int(index["held_from"])), "test": (int(index["held_from"]), None)}[split]
    )
    return _indexed(name, folder, index, part)


def held_out(file):
    """Whether an image belongs to the test split of imagenet21k: by its file name alone."""
    return zlib.crc32(os.path.basename(file)) % 100 == 0


def folder(name, root, split, cache_dir=None):
    """PATH/train/CLASS/*, PATH/test/CLASS/*; classes are the sorted names below train/."""
    path = Path(name.removeprefix("folder:"))
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(
                f"{name}: no directory {path / part}; images belong in PATH/train/CLASS/ and "
                "PATH/test/CLASS/"
            )
    return _class_dataset(name, path, split, cache_dir)


def _class_dataset(name, folder, part, cache_dir):
    """FOLDER/PART/CLASS/* or FOLDER/PART/CLASS.tar; the classes are those below train/."""
    classes, found = ({cls for cls, _ in _class_entries(folder / p)} for p in ("train", part))
    for unknown in sorted(found - classes):
        raise ValueError(f"{folder / part / unknown}: no class of that name in {folder / 'train'}")
    for absent in sorted(classes - found):
        raise ValueError(f"{folder / part / absent}: the class has no image; add some or drop it")
    return _indexed(name, folder / part, class_index(folder / part, cache_dir), slice(None))


def _indexed(name, folder, index, part):
    classes = list(map(os.fsdecode, index["classes"]))
    names, labels = index["names"][part], index["labels"][part]
    if not len(names):
        raise ValueError(f"{name}: {folder} holds no image for this split")
    reader = Files(str(folder), names, "RGB")
    if "starts" in index:
        reader = Members(
            str(folder), classes, names, labels, index["starts"][part], index["sizes"][part]
        )
    return ImageDataset(name, reader, labels, classes, "multiclass", "natural")


def _class_entries(folder):
    """[(class, its directory entry)], sorted: directories, or archives CLASS.tar."""
    entries = {}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir() and not entry.name.endswith(".tar"):
            raise ValueError(
                f"{entry.path}: neither a class directory nor CLASS.tar; move it out of the dataset"
            )
        cls = entry.name if entry.is_dir() else entry.name.removesuffix(".tar")
        if cls in entries:
            raise ValueError(f"{entry.path}: {cls} and {cls}.tar are both there; remove one")
        entries[cls] = entry
    if not entries:
        raise ValueError(f"{folder}: holds no class directory")
    return sorted(entries.items())


def class_index(folder, cache_dir=None, held_out=None):
    """The images of a folder of classes as arrays, class by class and sorted by name.

    Returns {"classes": (C,) bytes, "names": (N,) bytes, "labels": (N,) int64} and, when classes
    are archives, "starts" and "sizes" (N,) int64: the bytes of the archive that an image takes.
    held_out: function of a name; such images come last, from "held_from" on. The arrays of
    archives, and from CACHE_FROM images on of directories, are kept in a directory beside the data,
    or below cache_dir, and mapped into memory; they are made anew when one of them has changed.
    """
    entries = _class_entries(folder)
    key = hashlib.sha256(f"1 {held_out and held_out.__name__} {bool(cache_dir)}\n".encode())
    for _, entry in entries:
        stat = entry.stat()
        size = None if entry.is_dir() else stat.st_size
        # rsync and tar set the time of the content, but none can set that of the change.
        key.update(os.fsencode(f"{entry.name} {size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"))
    # Not inside the folder, where torchvision and others would take it for a class.
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    stem = Path(cache_dir or folder.parent) / f".index-{place if cache_dir else folder.name}-"
    cache = Path(f"{stem}{key.hexdigest()[:24]}")
    archives = any(not entry.is_dir() for _, entry in entries)
    columns = {"classes", "names", "labels", *(("starts", "sizes") if archives else ())}
    columns |= {"held_from"} if held_out else set()
    index = _open_arrays(cache, columns)
    if index is None:
        index = _build_index(entries, held_out)
        if "starts" in index or len(index["names"]) >= CACHE_FROM:
            index = _keep_arrays(cache, stem, index, required=cache_dir is not None)
    return index


def _build_index(entries, held_out):
    archives = any(not entry.is_dir() for _, entry in entries)
    columns = []  # of each class: names, labels, starts, sizes
    for label, (_, entry) in enumerate(tqdm(entries, "index", disable=None, leave=False)):
        names, places = _class_images(entry)
        if not len(names):
            raise ValueError(f"{entry.path}: the class has no image; add some or drop it")
        columns.append((names, np.full(len(names), label, np.int64), *places.T))
    names, labels, starts, sizes = map(np.concatenate, zip(*columns))
    index = {"names": names, "labels": labels}
    if archives:
        index |= {"starts": starts, "sizes": sizes}
    if held_out:
        held = np.fromiter(map(held_out, names), bool, len(names))
        order = np.argsort(held, kind="stable")
        index = {key: values[order] for key, values in index.items()}
        index["held_from"] = np.array(len(held) - held.sum())
    return index | {"classes": np.array([os.fsencode(cls) for cls, _ in entries])}


def _class_images(entry):
    """(names (N,) bytes, places (N,2) int64: start and size in the archive, -1 for files)."""
    if entry.is_dir():
        names = [f"{entry.name}/{file}" for file in _image_names(entry.path)]
        return np.array(list(map(os.fsencode, names)), "S"), np.full((len(names), 2), -1)
    members = _tar_members(entry.path)
    names = np.array([os.fsencode(name) for name, _, _ in members], "S")
    return names, np.array([member[1:] for member in members], np.int64).reshape(-1, 2)


def _image_names(folder):
    """Sorted file names; hidden files are passed over, any other file must be an image."""
    names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    for name in names:
        _refuse_no_image(name, os.path.join(folder, name))
    return names


def _refuse_no_image(name, where):
    if not name.lower().endswith(IMAGE_ENDINGS):
        raise ValueError(
            f"{where}: not an image by its ending ({' '.join(IMAGE_ENDINGS)}); "
            "move it out of the dataset"
        )


def _tar_members(path):
    """[(name, start, size)] of a tar's images, by name; nothing is read or written but headers."""
    members = {}
    for member in _tar_headers(path):
        where = f"{path}: {member.name}"
        parts = member.name.split("/")
        if member.isdir() or any(part.startswith(".") and part.strip(".") for part in parts):
            continue
        if member.issparse():
            raise ValueError(f"{where}: a sparse file; make the tar anew, without --sparse")
        if not member.isreg():
            raise ValueError(f"{where}: a link or device, not a file; make the tar anew")
        if member.name.startswith("/") or ".." in parts:
            raise ValueError(f"{where}: names a place outside; make the tar anew")
        place = os.path.normpath(member.name)
        if place in members:
            raise ValueError(f"{where}: two members of that name; make the tar anew")
        _refuse_no_image(member.name, where)
        members[place] = (member.name, member.offset_data, member.size)
    return sorted(members.values())


def _tar_headers(path):
    """The headers of a tar, to its very end. Raises ValueError naming a damaged or cut tar."""
    with open(path, "rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")
            for member in archive:
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name}: {member.size} bytes")
                yield member
                archive.members.clear()  # tarfile would keep every header
            file.seek(archive.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no end of archive at byte {archive.offset}")
            while rest := file.read(2**20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more after its end")
        # tarfile itself raises these of absurd sizes.
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError) as error:
            raise ValueError(
                f"{path}: a damaged or cut tar ({error}); fetch it again, or decompress it"
            ) from error


def _open_arrays(cache, columns):
    """{name: array} of a directory of .npy files, mapped into memory; None where it is damaged."""
    try:
        arrays = {
            name: np.asarray(np.load(cache / f"{name}.npy", mmap_mode="r")) for name in columns
        }
        each = [arrays[name] for name in columns - {"classes", "held_from"}]
        return arrays if len({len(values) for values in each}) == 1 else None
    except Exception:  # of a damaged header numpy raises many kinds
        return None


def _keep_arrays(cache, stem, arrays, required):
    """Writes the arrays beside and renames, whichever process is first; returns them mapped.

    Where that cannot be written, it stays in memory; required: raises OSError instead.
    """
    beside = Path(f"{stem}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        beside.mkdir(parents=True)
        for name, values in arrays.items():
            with open(beside / f"{name}.npy", "wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())
        for old in stem.parent.glob(f"{stem.name}*"):
            finished = re.fullmatch(re.escape(stem.name) + "[0-9a-f]{24}", old.name)
            if finished and (old != cache or _open_arrays(cache, arrays.keys()) is None):
                shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(beside, cache)
        except OSError:
            if not cache.is_dir():
                raise
    except OSError as error:
        if required:
            raise OSError(f"--cache-dir {stem.parent}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return _open_arrays(cache, arrays.keys()) or arrays
