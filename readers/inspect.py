"""What a dataset holds, in tables, on a contact sheet and in digests; what of it is broken."""

import collections
import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from engine.console import print_table, refuse_unwritable, write_json
from readers.images import Joined
from readers.labels import images_by_class
from readers.transforms import resize_square
from readers.workers import each_image

SAMPLE = 256  # images of a set whose content goes into its digest


def info(name, sets, sheet=None):
    """Prints counts, patients, marks by class and image sizes. sets: {split: ImageDataset}.

    sheet: a PNG file, for a contact sheet: the first training images of each of the first 20
    classes, a row a class.
    """
    if sheet and Path(sheet).suffix.lower() != ".png":
        raise ValueError(f"--sheet {sheet}: must end in .png")
    refuse_unwritable("--sheet", sheet)
    train = sets["train"]
    print(f"{name}: {train.domain}, {train.task}, {len(train.classes)} classes")
    for option, value in train.options.items():
        print(f"{option}: {value}")
    splits, patients, header, columns = [], [], ["class"], [train.classes]
    for split, dataset in sets.items():
        count = "unknown"
        if dataset.groups is not None:
            patients.append(np.unique(dataset.groups))
            count = len(patients[-1])
        left_out = [f"{images} {why}" for why, images in dataset.dropped.items() if images]
        splits.append((split, len(dataset), count, ", ".join(left_out) or "none"))
        header.append(f"{split} positive")
        columns.append(images_by_class(dataset.labels, len(train.classes)))
        if train.task == "multilabel":
            header.append(f"{split} missing")
            columns.append(np.isnan(dataset.labels).sum(0))
    print_table(splits, ["split", "images", "patients", "left out"])
    if patients:
        print(f"patients on both sides: {len(np.intersect1d(*patients))}")
    print_table(zip(*columns), header)
    for split, dataset in sets.items():
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        sizes = collections.Counter(tuple(dataset.read(i).shape) for i in sample)
        shown = ", ".join(f"{w} x {h} x {c} ({n})" for (c, h, w), n in sizes.most_common(8))
        print(f"{split} images, of {len(sample)}: width x height x channels {shown}")
    if sheet:
        rows, columns, side = train.classes[:20], 8, 96
        canvas = Image.new("RGB", (180 + columns * side, len(rows) * side), "white")
        for row, label in enumerate(rows):
            ImageDraw.Draw(canvas).text((6, row * side + side // 2 - 6), label, fill="black")
            labels = train.labels
            shows = labels[:, row] == 1 if labels.ndim == 2 else labels == row
            for column, i in enumerate(np.flatnonzero(shows)[:columns]):
                image = resize_square(train.read(i, side), side - 2).expand(3, -1, -1)
                tile = Image.fromarray(image.permute(1, 2, 0).numpy())
                canvas.paste(tile, (180 + column * side, row * side))
        Path(sheet).parent.mkdir(parents=True, exist_ok=True)
        canvas.save(sheet)
        print(f"wrote {sheet}")


def check(name, sets, report=None, workers=None):
    """Opens every image; prints what is broken, missing or there twice. Returns 1 where any is.

    sets: {split: ImageDataset}. report: a JSON file for all that was found, of which 20 lines of a
    kind are printed. workers: processes (default: one a core).
    """
    refuse_unwritable("--report", report)
    found = {"missing": [], "broken": [], "duplicated": [], "in train and test": []}
    once, dark = [], []  # of each split: its fingerprints and the first image that has each
    for split, dataset in sets.items():
        prints, brightest = np.zeros(len(dataset), np.uint64), np.zeros(len(dataset), np.uint8)
        good = np.ones(len(dataset), bool)
        # The bar ends above any message.
        with contextlib.closing(each_image(dataset, _fingerprint, split, workers)) as results:
            for i, result in enumerate(results):
                if isinstance(result, Exception):
                    good[i] = False
                    kind = "missing" if isinstance(result, FileNotFoundError) else "broken"
                    found[kind].append(f"{split}: {result}")
                else:
                    prints[i], brightest[i] = result
        places = np.flatnonzero(good)
        if len(places) and np.median(brightest[places]) <= 16:
            dark.append(f"{split}: half of the images have no pixel above 16 of 255")
        prints, first, inverse = np.unique(prints[places], return_index=True, return_inverse=True)
        once.append((prints, places[first]))
        originals = places[first][inverse]
        again = places != originals
        for i, original in zip(places[again], originals[again]):
            same = f"{dataset.where(i)} is the same as {dataset.where(original)}"
            found["duplicated"].append(f"{split}: {same}")
    (prints, firsts), (others, other_firsts) = once
    _, a, b = np.intersect1d(prints, others, return_indices=True)
    train, test = sets.values()
    for i, j in zip(firsts[a], other_firsts[b]):
        found["in train and test"].append(f"{train.where(i)} is the same as {test.where(j)}")

    if dark:  # 4095 of 65535 is 16 of 255
        print(*dark, sep="; ", end=": 12-bit values in 16-bit files? multiply them by 16\n")
    for kind, lines in found.items():
        for line in lines[:20]:
            print(f"{kind}: {line}")
        if len(lines) > 20:
            print(f"{kind}: {len(lines) - 20} more; --report FILE.json lists all")
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in found.items())
    print(f"{name}: {len(train)} + {len(test)} images, {counts}")
    if report:
        images = {split: len(dataset) for split, dataset in sets.items()}
        write_json(report, {"name": name, "images": images, **found})
    return int(any(found.values()) or bool(dark))


def _fingerprint(dataset, i):
    """(64 bits of the pixels' hash, the brightest pixel)."""
    # Of 14 million images two are alike by chance in 5e-6 of cases.
    pixels = dataset.read(i).contiguous().numpy()
    content = hashlib.blake2b(str(pixels.shape).encode(), digest_size=8)
    content.update(pixels)
    return int.from_bytes(content.digest(), "little"), pixels.max()


def data_digest(**sets):
    """What tells datasets from others of their names and sizes: {"train names": digest, ...}.

    A digest is 16 hexadecimal digits of SHA-256. names: of the images, wherever they lie; labels;
    classes; content: the bytes of SAMPLE images, evenly spaced, as they are stored, for decoders
    round otherwise elsewhere. What is made when it is read has neither names nor content. Raises
    OSError where an image cannot be read.
    """
    digests = {}
    for split, dataset in sets.items():
        sample = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(np.int64))
        with ThreadPoolExecutor(16) as pool:  # a file of a network's disk is waited for
            content = pool.map(_content, [dataset.reader] * len(sample), sample)
        parts = {
            "names": _names(dataset.reader),
            "labels": [dataset.labels],
            "classes": [json.dumps(dataset.classes).encode()],
            "content": content,
        }
        for part, pieces in parts.items():
            digest = hashlib.sha256()
            for piece in pieces:
                piece = np.ascontiguousarray(piece)
                digest.update(f"{piece.dtype} {piece.shape} {piece.nbytes} ".encode())
                digest.update(piece)
            digests[f"{split} {part}"] = digest.hexdigest()[:16]
    return digests


def _names(reader):
    """Arrays that name the images of a reader; some of others as places among these."""
    if isinstance(reader, Joined):
        names = [names for member in reader.readers for names in _names(member)]
        return names if reader.chosen is None else [*names, reader.chosen]
    return [reader.names] if hasattr(reader, "names") else []


def _content(reader, i):
    """Image i as it is stored: the bytes of its file, or else its pixels."""
    while isinstance(reader, Joined):
        reader, i = reader.find(i)
    return reader.content(i) if hasattr(reader, "content") else reader(i, None).numpy()
