"""Folders of classes, each a directory or one tar, as an index of arrays that is kept on disk."""

import glob
import hashlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from readers.images import IMAGE_ENDINGS, encoded

CACHE_FROM = 50_000  # images: the index of such a set, and of any archives, is kept on disk


def write_arrays(stem, arrays):
    """Writes arrays {key: array} as files STEM + KEY.npy that no loss of power can take away."""
    for key, values in arrays.items():
        with open(f"{stem}{key}.npy", "wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())


def map_arrays(stem):
    """{key: array} of all such files, mapped into memory."""
    folder, start = os.path.split(stem)
    paths = Path(folder).glob(f"{start}[!.]*.npy")
    return {p.stem.removeprefix(start): np.asarray(np.load(p, mmap_mode="r")) for p in paths}


def class_entries(folder):
    """{class: its os.DirEntry}, sorted by class: directories, or archives CLASS.tar."""
    entries = {}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir() and not entry.name.endswith(".tar"):
            raise ValueError(f"{entry.path}: neither a class directory nor CLASS.tar; move it away")
        cls = entry.name if entry.is_dir() else entry.name.removesuffix(".tar")
        if cls in entries:
            raise ValueError(f"{entry.path}: {cls} and {cls}.tar are both there; remove one")
        entries[cls] = entry
    if not entries:
        raise ValueError(f"{folder}: holds no class directory")
    return dict(sorted(entries.items()))


def class_index(folder, cache_dir=None, held_out=None, like=None):
    """The images of a folder of classes as arrays, class by class and sorted by name.

    Returns {"classes": (C,) bytes, "names": (N,) bytes, "labels": (N,) int64} and, of archives,
    "starts" and "sizes" (N,) int64: the bytes that an image takes. held_out: function of a name;
    such images come last, from "held_from" on. like: a folder that must have the same classes.
    The arrays of archives, or of CACHE_FROM images, are kept beside the data, or below cache_dir,
    and mapped into memory; they are made anew when one of them has changed.
    """
    entries = class_entries(folder)
    known = class_entries(like) if like else entries
    for unknown in sorted(entries.keys() - known):
        raise ValueError(f"{folder / unknown}: no class of that name in {like}")
    for absent in sorted(known.keys() - entries):
        raise ValueError(f"{folder / absent}: the class has no image; add some or drop it")
    key = hashlib.sha256(f"1 {held_out and held_out.__name__} {bool(cache_dir)}\n".encode())
    for entry in entries.values():
        stat = entry.stat()
        size = None if entry.is_dir() else stat.st_size
        # rsync and tar set the time of the content, but none can set that of the change.
        key.update(os.fsencode(f"{entry.name} {size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"))
    # Not inside the folder, where torchvision and others would take it for a class.
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    stem = Path(cache_dir or folder.parent) / f".index-{place if cache_dir else folder.name}-"
    cache = Path(f"{stem}{key.hexdigest()[:24]}")
    index = _kept_arrays(cache)
    if index is not None:
        return index

    archived = not all(entry.is_dir() for entry in entries.values())
    names, labels, places = [], [], []
    for label, entry in enumerate(tqdm(entries.values(), "index", disable=None, leave=False)):
        if entry.is_dir():
            files = sorted(f.name for f in os.scandir(entry.path) if not f.name.startswith("."))
            above, found = f"{folder}/", [(f"{entry.name}/{file}", -1, -1) for file in files]
        else:
            above, found = f"{entry.path}: ", _tar_members(entry.path)
        if not found:
            raise ValueError(f"{entry.path}: the class has no image; add some or drop it")
        for name, *_ in found:
            if not name.lower().endswith(IMAGE_ENDINGS):
                raise ValueError(f"{above}{name}: not an image by its ending; move it away")
        names.append(encoded(name for name, *_ in found))
        labels.append(np.full(len(found), label, np.int64))
        if archived:
            places.append(np.array([place for _, *place in found]))
    index = {"names": np.concatenate(names), "labels": np.concatenate(labels)}
    if archived:
        index["starts"], index["sizes"] = np.concatenate(places).T
    if held_out:
        held = np.fromiter(map(held_out, index["names"]), bool, len(index["names"]))
        order = np.argsort(held, kind="stable")
        index = {key: values[order] for key, values in index.items()}
        index["held_from"] = np.array(len(held) - held.sum())
    index["classes"] = encoded(entries)
    if archived or len(index["names"]) >= CACHE_FROM:
        index = _keep_arrays(cache, stem, index, required=cache_dir is not None)
    return index


def _tar_members(path):
    """[(name, start, size)] of a tar's images, by name; of it only the headers are read."""
    with open(path, "rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")
            headers = []
            for member in archive:
                if member.size < 0:  # tarfile would go round in a circle
                    raise tarfile.ReadError(f"{member.name}: {member.size} bytes")
                headers.append(member)
            file.seek(archive.offset)
            end = file.read()  # blocks of zeros; tarfile itself stops at any damage without a word
            if len(end) < 512 or end.strip(b"\0"):
                raise tarfile.ReadError(f"no end, or more after it, at byte {archive.offset}")
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, OSError) as error:
            mend = "fetch it again, or decompress it"
            raise ValueError(f"{path}: a damaged or cut tar ({error}); {mend}") from error
    members = {}
    for member in headers:
        parts = member.name.split("/")
        if member.isdir() or any(part.startswith(".") and part.strip(".") for part in parts):
            continue
        place, fault = os.path.normpath(member.name), None
        if member.issparse() or not member.isreg():
            fault = "a link, device or sparse file"
        elif place in members:
            fault = "two members of that name"
        if fault:
            raise ValueError(f"{path}: {member.name}: {fault}; make the tar anew")
        members[place] = (member.name, member.offset_data, member.size)
    return sorted(members.values())


def _kept_arrays(cache):
    """The arrays, None where one is lost or damaged."""
    try:
        arrays = map_arrays(f"{cache}/")
        sums = arrays.pop("crc32")
        # A header, which has no checksum, can only be wrong in how it says to read the bytes.
        good = all(
            values.dtype.kind == "S" or values.dtype == np.int64 for values in arrays.values()
        )
        return arrays if good and np.array_equal(sums, _checksums(arrays)) else None
    except Exception:  # of a damaged header numpy raises many kinds
        return None


def _checksums(arrays):
    """CRC-32 of each array, by the order of their keys."""
    return [zlib.crc32(np.ascontiguousarray(arrays[key])) for key in sorted(arrays)]


def _keep_arrays(cache, stem, arrays, required):
    """Writes the arrays, whichever process is first; returns them mapped, or if that fails and is
    not required as they are.
    """
    beside, fault = Path(f"{stem}{os.getpid()}-{os.urandom(4).hex()}"), None
    try:
        beside.mkdir(parents=True)
        write_arrays(f"{beside}/", arrays | {"crc32": np.array(_checksums(arrays))})
        for old in stem.parent.glob(glob.escape(stem.name) + "[0-9a-f]" * 24):
            if old != cache or _kept_arrays(cache) is None:
                shutil.rmtree(old, ignore_errors=True)
        os.rename(beside, cache)
    except OSError as error:
        fault = error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    kept = _kept_arrays(cache)
    if required and kept is None:
        raise OSError(f"--cache-dir {stem.parent}: cannot be written ({fault})") from fault
    return kept or arrays
