"""Packs (NAME@SIZE): images decoded and resized once, mapped into memory and shared.

A pack holds the labels, classes and groups of its dataset and is used without the original. It is
a directory: pack.json says what it is, SPLIT.images holds one image after the other, and
SPLIT.{offsets,shapes,crc32,labels,names,groups}.npy their index.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shlex
import shutil
import textwrap
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.console import locked, write_json
from readers.archives import map_arrays, write_arrays
from readers.images import MODES, ImageDataset, read_image
from readers.inspect import data_digest
from readers.names import pack_folder, pack_of, without_place
from readers.transforms import resize_shorter, xray_square
from readers.workers import each_image

PACK_SCHEMA = 1
FLUSH = 2**26  # bytes of images that a stop may lose
JOURNAL = np.dtype([("bytes", "<i8"), ("crc32", "<u4"), ("shape", "<i4", 3)])  # of each image


class Packed(NamedTuple):
    """Images of a pack, mapped into memory and shared; each is checked when it is read."""

    name: str
    folder: str
    split: str
    codec: str
    mode: str
    made: int  # when, in ns: a pack made anew in its place is another

    def __call__(self, i, size=None):
        content, arrays = self.content(i), _arrays(self)
        if zlib.crc32(content) != arrays["crc32"][i]:
            raise ValueError(f"{self.where(i)}: damaged; remove {self.folder} and pack it again")
        if self.codec == "jpeg":
            return read_image(content.tobytes(), self.mode, size, self.where(i))
        return torch.from_numpy(content.copy()).view(*arrays["shapes"][i].tolist())

    @property
    def names(self):
        return _arrays(self)["names"]

    def content(self, i):
        start, end = _arrays(self)["offsets"][i : i + 2]
        return _arrays(self)["images"][start:end]

    def where(self, i):
        return f"{self.name} {self.split} image {i} ({os.fsdecode(self.names[i])})"


@functools.lru_cache(maxsize=64)
def _arrays(packed):
    """The arrays of a Packed, mapped once a process: {name: array}."""
    images = np.asarray(np.memmap(f"{packed.folder}/{packed.split}.images", mode="r"))
    return map_arrays(f"{packed.folder}/{packed.split}.") | {"images": images}


def open_pack(name, root, split, **options):
    """The dataset of a pack; options that shaped it must be those it was made with.

    Raises FileNotFoundError where there is no whole pack, ValueError where it is damaged.
    """
    original, size = pack_of(name)
    folder = pack_folder(original, size, root)
    facts = _read_facts(folder, original, size)
    unsaid = {"domain": facts["domain"], "uncertain": "ignore", "blank": "ignore"}
    for option, value in json.loads(json.dumps(options)).items():
        was = facts["options"].get(option, unsaid.get(option))
        if value != was and option not in ("cache_dir", "download"):  # these shape nothing
            mend = "leave the option out, or pack it again into another --data-dir"
            raise ValueError(f"{folder} was packed with {option} = {was}, not {value}; {mend}")
    made = (folder / "pack.json").stat().st_mtime_ns
    reader = Packed(name, str(folder), split, facts["codec"], facts["mode"], made)
    labels, groups = _arrays(reader)["labels"], _arrays(reader).get("groups")
    about = facts["classes"], facts["task"], facts["domain"], groups
    more = {"options": facts["options"], "dropped": facts["dropped"][split]}
    return ImageDataset(name, reader, labels, *about, **more)


def _read_facts(folder, original, size):
    """The content of pack.json. Raises ValueError or FileNotFoundError unless the pack is whole."""
    path, again = folder / "pack.json", f"remove {folder} and pack it again"
    if not path.exists():
        mend = f"`python data.py pack {shlex.quote(original)} --size {size}` makes or finishes it"
        raise FileNotFoundError(f"{folder}: no whole pack; {mend}")
    try:
        facts = json.loads(path.read_text())
        schema, files, found = facts["schema"], facts["files"], f"{facts['name']}@{facts['size']}"
        if schema == PACK_SCHEMA and facts.pop("crc32") != _crc32_of(facts):
            raise ValueError("its checksum is wrong")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {again}") from error
    if schema != PACK_SCHEMA:
        raise ValueError(f"{path}: of version {schema}, this program reads {PACK_SCHEMA}; {again}")
    if found != f"{without_place(original)}@{size}":
        raise ValueError(f"{path}: a pack of {found}; rename its directory so")
    for file, (count, checksum) in files.items():
        file = folder / file
        if not file.exists() or file.stat().st_size != count:
            raise ValueError(f"{file}: missing or not of {count} bytes; {again}")
        if checksum is not None and zlib.crc32(np.memmap(file, mode="r")) != checksum:
            raise ValueError(f"{file}: its checksum is wrong; {again}")
    return facts


def _crc32_of(facts):
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def pack(name, sets, size, target, codec="raw", quality=90, workers=None):
    """Decodes and resizes every image of a dataset once, into the directory `target`.

    sets: {split: ImageDataset}. size: pixels, of the central square (medical) or of the shorter
    side (natural). codec: "raw", or "jpeg" of that quality. workers: processes (default: one a
    core). Killed at any moment and called again it goes on, to the same bytes. Raises ValueError
    for a broken image or a pack begun with other settings, OSError when the disk is too small.
    """
    train, index = sets["train"], hashlib.sha256()
    for dataset in sets.values():
        index.update(np.ascontiguousarray(_names(dataset)))
        index.update(np.ascontiguousarray(dataset.labels))
    facts = {
        "schema": PACK_SCHEMA,
        "name": without_place(name),
        "size": size,
        "codec": codec,
        "quality": quality if codec == "jpeg" else None,
        "mode": MODES[train.domain],
        "task": train.task,
        "domain": train.domain,
        "classes": list(train.classes),
        "options": train.options,
        "dropped": {split: dataset.dropped for split, dataset in sets.items()},
        "images": {split: len(dataset) for split, dataset in sets.items()},
        **data_digest(**sets),
        "index": index.hexdigest(),  # of packs that have no digests
    }
    facts = json.loads(json.dumps(facts))  # as they are read back
    if target.exists():
        if not (target / "pack.json").exists():
            raise ValueError(f"{target}: holds no pack.json, so it is no pack; remove it")
        return _refuse_other_facts(target, _read_facts(target, name, size), facts)
    part = target.with_name(target.name + ".part")
    with locked(part):
        try:
            _fill(part, sets, facts, workers)
            for needless in ("train.journal", "test.journal", "begun.json"):
                (part / needless).unlink(missing_ok=True)
        except OSError as error:
            if str(part) in str(error):
                raise
            mend = "free space and run the same command again"
            raise OSError(f"{part}: cannot be written ({error}); {mend}") from error
    part.rename(target)


def _names(dataset):
    """What each image is called in its pack: (N,) bytes; those of archives have numbers."""
    names, archived = (getattr(dataset.reader, key, None) for key in ("names", "starts"))
    return np.arange(len(dataset)).astype("S") if names is None or archived is not None else names


def _refuse_other_facts(place, theirs, ours):
    """Raises ValueError for a fact that was another; an older pack may lack those of the data."""
    for key, value in ours.items():
        if theirs.get(key, value) != value:
            was, now = (textwrap.shorten(str(fact), 100) for fact in (theirs[key], value))
            mend = "remove it, or give another --out"
            raise ValueError(f"{place} was packed from another {key} ({was}, now {now}); {mend}")


def _fill(part, sets, facts, workers):
    """Writes all files of a pack into the directory where it is made, or goes on with it."""
    whole, begun = part / "pack.json", part / "begun.json"
    path = whole if whole.exists() else begun
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); remove {part}") from error
        _refuse_other_facts(part, theirs, facts)
    else:
        write_json(begun, facts)
    if path == whole:
        return

    encode = functools.partial(_encode, facts)
    needed = -sum(file.stat().st_size for file in part.glob("*.images"))
    for dataset in sets.values():  # judged by a sample of its images
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        index = JOURNAL.itemsize * 2 + dataset.labels[:1].nbytes + _names(dataset).itemsize
        size = np.mean([len(encode(dataset, i)[0]) for i in sample])
        needed += len(dataset) * (size + index)
    free = shutil.disk_usage(part).free
    if needed > free:
        room = f"packing needs about {needed / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free"
        raise OSError(f"{part}: {room}; give another --out, a smaller --size, or --codec jpeg")
    for split, dataset in sets.items():
        _write_images(part, split, dataset, encode, workers)

    files = {}  # {file name: [bytes, checksum]}
    for split, dataset in sets.items():
        records = np.fromfile(part / f"{split}.journal", JOURNAL)
        offsets = np.concatenate([[0], np.cumsum(records["bytes"])])
        images = np.memmap(part / f"{split}.images", mode="r")
        for i in tqdm(range(len(records)), f"{split} verified", unit="image", disable=None):
            if zlib.crc32(images[offsets[i] : offsets[i + 1]]) != records["crc32"][i]:
                raise ValueError(f"{part}: image {i} of {split} was not written well; remove it")
        arrays = {"offsets": offsets, "shapes": records["shape"], "crc32": records["crc32"]}
        arrays |= {"labels": dataset.labels, "names": _names(dataset)}
        if dataset.groups is not None:
            arrays["groups"] = dataset.groups
        write_arrays(f"{part}/{split}.", arrays)
        for key in arrays:
            file = part / f"{split}.{key}.npy"
            files[file.name] = [file.stat().st_size, zlib.crc32(np.memmap(file, mode="r"))]
        files[f"{split}.images"] = [images.size, None]  # each image has its own checksum
    facts = facts | {"files": files}
    write_json(whole, facts | {"crc32": _crc32_of(facts)})


def _encode(facts, dataset, i):
    """(bytes, shape) of an image as a pack holds it; a smaller image keeps its size."""
    try:
        image = dataset.read(i, facts["size"])
    except OSError as error:  # of the source, not of the disk that the pack is written to
        raise ValueError(str(error)) from error
    side = min(facts["size"], *image.shape[-2:])
    image = (xray_square if dataset.domain == "medical" else resize_shorter)(image, side)
    pixels, content = image.contiguous().numpy(), io.BytesIO()
    if facts["codec"] == "raw":
        return pixels.tobytes(), pixels.shape
    grey_or_colour = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(grey_or_colour).save(content, "JPEG", quality=facts["quality"])
    return content.getvalue(), pixels.shape


def _write_images(part, split, dataset, encode, workers):
    """Appends the images that are not there yet; the journal knows those that are on the disk."""
    path = part / f"{split}.journal"
    with open(part / f"{split}.images", "ab") as images, open(path, "ab") as journal:
        # Both are cut back to the images that both have whole.
        ends = np.cumsum(np.fromfile(path, JOURNAL)["bytes"])
        done = int(np.searchsorted(ends, os.fstat(images.fileno()).st_size, side="right"))
        journal.truncate(done * JOURNAL.itemsize)
        images.truncate(int(ends[done - 1]) if done else 0)
        records, pending = [], 0
        results = each_image(dataset, encode, f"{split} images", workers, done)
        with contextlib.closing(results):  # the bar ends above any message
            for number, result in enumerate(results, done + 1):
                if isinstance(result, Exception):
                    raise result
                content, shape = result
                images.write(content)
                records.append((len(content), zlib.crc32(content), shape))
                pending += len(content)
                if pending > FLUSH or number == len(dataset):
                    for file, rest in ((images, b""), (journal, np.array(records, JOURNAL))):
                        file.write(rest)
                        file.flush()
                        os.fsync(file.fileno())
                    records, pending = [], 0
