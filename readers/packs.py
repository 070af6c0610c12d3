"""Packs (NAME@SIZE): images decoded and resized once, mapped into memory and shared.

A pack holds the labels, classes and groups of its dataset and is used without the original.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.console import write_json
from engine.memory import available_cores
from readers.cache import loader
from readers.images import ImageDataset, read_image
from readers.transforms import resize_shorter, xray_square

PACK_SCHEMA = 1
PACK_CHUNK = 16  # images that one process prepares at a time


class Packed(NamedTuple):
    """Images of a pack, mapped into memory and shared; each is checked when it is read."""

    name: str
    folder: str
    split: str
    codec: str
    mode: str
    made: int  # when, in ns: a pack made anew in its place is another

    def __call__(self, i, size=None):
        pack = _mapped_pack(self.folder, self.split, self.made)
        content = pack["images"][pack["offsets"][i] : pack["offsets"][i + 1]]
        if zlib.crc32(content) != pack["crc32"][i]:
            raise ValueError(f"{self.where(i)}: damaged; remove {self.folder} and pack it again")
        if self.codec == "jpeg":
            return read_image(content.tobytes(), self.mode, size, self.where(i))
        return torch.from_numpy(content.copy()).view(*pack["shapes"][i].tolist())

    def where(self, i):
        name = _mapped_pack(self.folder, self.split, self.made)["names"][i]
        return f"{self.name} {self.split} image {i} ({os.fsdecode(name)})"


@functools.lru_cache(maxsize=64)
def _mapped_pack(folder, split, made):
    """The arrays of a pack's split, mapped once a process: {name: array}."""
    paths = Path(folder).glob(f"{split}.*.npy")
    arrays = {path.name.split(".")[1]: np.load(path, mmap_mode="r") for path in paths}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return arrays | {"images": np.asarray(np.memmap(Path(folder, f"{split}.images"), mode="r"))}


def pack_of(name, root="datasets"):
    """(name of the original, size, directory) that NAME@SIZE means, or (name, None, None)."""
    match = re.fullmatch(r"(.*[^/])/*@(\d+)", name)
    folder = (
        name.removeprefix("folder:") if name.startswith("folder:") else os.path.join(root, name)
    )
    # A directory of one's own images may have such a name too.
    if not match or (name.startswith("folder:") and os.path.isdir(os.path.join(folder, "train"))):
        return name, None, None
    return match[1], int(match[2]), Path(re.sub(r"/+@", "@", folder))


def open_pack(name, root, split, **options):
    """The dataset of a pack; options that shaped it must be those it was made with."""
    original, size, folder = pack_of(name, root)
    facts = _pack_facts(folder, original, size)
    for option in ("cache_dir", "download"):  # these shape nothing
        options.pop(option, None)
    for option, value in json.loads(json.dumps(options)).items():
        made_with = facts["options"].get(option)
        if value != made_with:
            raise ValueError(
                f"{folder} was packed with {option} = {made_with}, not {value}; leave the option "
                "out, or pack it again into another --data-dir"
            )
    made = (folder / "pack.json").stat().st_mtime_ns
    arrays = _mapped_pack(str(folder), split, made)
    reader = Packed(name, str(folder), split, facts["codec"], facts["mode"], made)
    return ImageDataset(
        name, reader, arrays["labels"], facts["classes"], facts["task"], facts["domain"],
        arrays.get("groups"), None, facts["options"], facts["dropped"][split],
    )  # fmt: skip


def _pack_facts(folder, original, size):
    """The content of pack.json. Raises ValueError or FileNotFoundError unless the pack is whole."""
    path, again = folder / "pack.json", f"remove {folder} and pack it again"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no whole pack; `python data.py pack {original} --size {size}` makes or "
            "finishes it"
        )
    try:
        facts = json.loads(path.read_text())
        schema, files = facts["schema"], facts["files"]
        found = facts["name"], facts["size"]
        if schema == PACK_SCHEMA and facts.pop("crc32") != _facts_crc32(facts):
            raise ValueError("its checksum is wrong")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {again}") from error
    if schema != PACK_SCHEMA:
        raise ValueError(f"{path}: of version {schema}, this program reads {PACK_SCHEMA}; {again}")
    if found != (pack_name(original), size):
        raise ValueError(f"{path}: a pack of {found[0]}@{found[1]}; rename its directory so")
    for name, (count, checksum) in files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != count:
            raise ValueError(f"{file}: missing or not of {count} bytes; {again}")
        if checksum is not None and _file_crc32(file) != checksum:
            raise ValueError(f"{file}: its checksum is wrong; {again}")
    return facts


def _facts_crc32(facts):
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def pack_name(name):
    """What a pack is called inside: the place of a folder does not matter."""
    if not name.startswith("folder:"):
        return name
    return f"folder:{Path(name.removeprefix('folder:')).resolve().name}"


def _file_crc32(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Each(torch.utils.data.Dataset):
    """[k] -> work(dataset, i) of the k-th PACK_CHUNK images; the error itself where it fails."""

    def __init__(self, dataset, work):
        self.dataset, self.work = dataset, work

    def __len__(self):
        return math.ceil(len(self.dataset) / PACK_CHUNK)

    def __getitem__(self, k):
        last = min((k + 1) * PACK_CHUNK, len(self.dataset))
        return [self.one(i) for i in range(k * PACK_CHUNK, last)]

    def one(self, i):
        try:
            return self.work(self.dataset, i)
        except (ValueError, OSError) as error:
            return error


def each_image(dataset, work, workers, title, first=0):
    """Yields work(dataset, i), or its error, for i from `first` (a multiple of PACK_CHUNK) on."""
    each, start = Each(dataset, work), first // PACK_CHUNK
    workers = min(workers or available_cores(), max(1, len(each) - start))
    with tqdm(total=len(dataset), initial=first, desc=title, unit="image", disable=None) as bar:
        for results in loader(each, start, len(each), workers):
            yield from results
            bar.update(len(results))


def _encode(dataset, i, size, codec, quality):
    """(bytes, shape) of an image as a pack holds it; a smaller image keeps its size."""
    image = dataset.read(i, size)
    side = min(size, *image.shape[-2:])
    image = (xray_square if dataset.domain == "medical" else resize_shorter)(image, side)
    pixels = image.contiguous().numpy()
    if codec == "raw":
        return pixels.tobytes(), pixels.shape
    content = io.BytesIO()
    pixels_last = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(pixels_last).save(content, "JPEG", quality=quality)
    return content.getvalue(), pixels.shape


JOURNAL = np.dtype([("bytes", "<i8"), ("crc32", "<u4"), ("shape", "<i4", 3)])


def pack(name, sets, size, target, codec="raw", quality=90, workers=None):
    """Decodes and resizes every image of a dataset once, into the directory `target`.

    sets: {split: ImageDataset} of the dataset of this name. size: pixels, of the central square
    (medical) or of the shorter side (natural). codec: "raw", or "jpeg" of that quality. workers:
    processes (default: one a core). Killed at any moment and called again it goes on, to the same
    bytes. Raises ValueError for a broken image or a pack begun with other settings, OSError when
    the disk is too small.
    """
    facts = _facts(name, sets, size, codec, quality)
    if target.exists() and not (target / "pack.json").exists():
        raise ValueError(f"{target}: holds no pack.json, so it is no pack; remove it")
    if target.exists():
        made = _pack_facts(target, name, size)
        _same_facts(target, made, facts)
        return
    part = target.with_name(target.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    with open(part / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{part}: another process is packing it") from error
        try:
            _fill(part, sets, facts, size, codec, quality, workers)
        except OSError as error:
            if str(part) in str(error):
                raise
            raise OSError(
                f"{part}: cannot be written ({error}); free space and run the same command again"
            ) from error
        part.rename(target)


def _fill(part, sets, facts, size, codec, quality, workers):
    """Writes all files of a pack into the directory where it is made."""
    _begin(part, facts)
    if not (part / "pack.json").exists():
        work = functools.partial(_encode, size=size, codec=codec, quality=quality)
        _refuse_small_disk(part, sets, work)
        for split, dataset in sets.items():
            _write_images(part, split, dataset, work, workers)
        _write_index(part, facts, sets)
    for name in ("train.journal", "test.journal", "begun.json", "lock"):
        (part / name).unlink(missing_ok=True)


def _facts(name, sets, size, codec, quality):
    """What pack.json says of a pack, beside its files."""
    train = sets["train"]
    digest = hashlib.sha256()
    for dataset in sets.values():
        for values in (_names(dataset), dataset.labels):
            digest.update(np.ascontiguousarray(values))
    return {
        "schema": PACK_SCHEMA,
        "name": pack_name(name),
        "size": size,
        "codec": codec,
        "quality": quality if codec == "jpeg" else None,
        "mode": "L" if train.domain == "medical" else "RGB",
        "task": train.task,
        "domain": train.domain,
        "classes": list(train.classes),
        "options": train.options,
        "dropped": {split: dataset.dropped for split, dataset in sets.items()},
        "images": {split: len(dataset) for split, dataset in sets.items()},
        "index": digest.hexdigest(),
    }


def _names(dataset):
    """What each image is called in its dataset: (N,) bytes."""
    names = getattr(dataset.reader, "names", None)
    return np.arange(len(dataset)).astype("S") if names is None else names


def _same_facts(place, theirs, ours):
    for key, value in json.loads(json.dumps(ours)).items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{place} was packed from another {key} ({_short(theirs.get(key))}, now "
                f"{_short(value)}); remove it, or give another --out"
            )


def _short(value):
    return textwrap.shorten(str(value), 100)


def _begin(part, facts):
    """Notes what is packed; a packing that was begun goes on only with the same."""
    for path in (part / "pack.json", part / "begun.json"):
        if path.exists():
            try:
                begun = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}); remove {part}") from error
            return _same_facts(part, begun, facts)
    write_json(path, facts)


def _refuse_small_disk(part, sets, work):
    """Raises OSError when the disk cannot hold the pack, judged by a sample of its images."""
    needed = 0
    for dataset in sets.values():
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        samples = [Each(dataset, work).one(int(i)) for i in sample]
        sizes = [len(result[0]) for result in samples if not isinstance(result, Exception)]
        if not sizes:
            raise ValueError(str(samples[0]))
        index = JOURNAL.itemsize * 2 + dataset.labels[:1].nbytes + _names(dataset).itemsize
        needed += len(dataset) * (np.mean(sizes) + index)
    written = sum(file.stat().st_size for file in part.iterdir())
    free = shutil.disk_usage(part).free
    if needed - written > free:
        raise OSError(
            f"{part}: packing needs about {(needed - written) / 1e9:.3g} GB more, the disk has "
            f"{free / 1e9:.3g} GB free; give another --out, a smaller --size, or --codec jpeg"
        )


def _write_images(part, split, dataset, work, workers):
    """Appends the images that are not there yet; the journal knows those that are on the disk."""
    journal_path = part / f"{split}.journal"
    with open(part / f"{split}.images", "ab") as images, open(journal_path, "ab") as journal:
        done = _trim(images, journal, len(dataset))
        if done == len(dataset):
            return
        records, pending = [], 0
        results = each_image(dataset, work, workers, f"{split} images", done)
        with contextlib.closing(results):  # the bar ends above any message
            for number, result in enumerate(results, done + 1):
                if isinstance(result, Exception):  # of the source, not of the disk
                    raise ValueError(str(result)) from result
                content, shape = result
                images.write(content)
                records.append((len(content), zlib.crc32(content), shape))
                pending += len(content)
                if pending > 2**26 or number == len(dataset):
                    images.flush()
                    os.fsync(images.fileno())
                    journal.write(np.array(records, JOURNAL).tobytes())
                    journal.flush()
                    os.fsync(journal.fileno())
                    records, pending = [], 0


def _trim(images, journal, total):
    """Cuts both files back to whole chunks of images that both have; returns how many images."""
    records = np.fromfile(journal.name, JOURNAL)
    ends = np.cumsum(records["bytes"])
    done = int(np.searchsorted(ends, os.fstat(images.fileno()).st_size, side="right"))
    done -= done % PACK_CHUNK if done < total else 0
    journal.truncate(done * JOURNAL.itemsize)
    images.truncate(int(ends[done - 1]) if done else 0)
    return done


def _write_index(part, facts, sets):
    """Reads the images back, writes the index and, last, pack.json."""
    files = {}
    for split, dataset in sets.items():
        records = np.fromfile(part / f"{split}.journal", JOURNAL)
        offsets = np.concatenate([[0], np.cumsum(records["bytes"])])
        images = np.memmap(part / f"{split}.images", mode="r")
        for i in tqdm(range(len(records)), f"{split} verified", unit="image", disable=None):
            if zlib.crc32(images[offsets[i] : offsets[i + 1]]) != records["crc32"][i]:
                raise ValueError(f"{part}: image {i} of {split} was not written well; remove it")
        arrays = {"offsets": offsets, "shapes": records["shape"], "crc32": records["crc32"]}
        arrays |= {"labels": dataset.labels, "names": _names(dataset)}
        arrays |= {} if dataset.groups is None else {"groups": dataset.groups}
        for key, values in arrays.items():
            np.save(part / f"{split}.{key}.npy", values)
            files[f"{split}.{key}.npy"] = None
        files[f"{split}.images"] = None
    for name in files:
        with open(part / name, "rb") as file:
            os.fsync(file.fileno())
        checksum = None if name.endswith(".images") else _file_crc32(part / name)
        files[name] = (part / name).stat().st_size, checksum
    facts = json.loads(json.dumps(facts | {"files": files}))
    write_json(part / "pack.json", facts | {"crc32": _facts_crc32(facts)})
