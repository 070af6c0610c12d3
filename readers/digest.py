"""What tells a dataset from another of its name and size: short digests of what it holds."""

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from readers.images import Joined

SAMPLE = 256  # images of a set whose content is read


def data_digest(**sets):
    """What these datasets hold, by split: {"train names": 16 hexadecimal digits of SHA-256, ...}.

    names: of the images, wherever they lie; labels; classes; content: the bytes of SAMPLE images,
    evenly spaced, as they are stored, for decoders round otherwise elsewhere. What is made when it
    is read has neither names nor content. Raises OSError where an image cannot be read.
    """
    digests = {}
    for split, dataset in sets.items():
        sample = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(np.int64))
        with ThreadPoolExecutor(16) as pool:  # a file of a network's disk is waited for
            content = pool.map(functools.partial(_content, dataset.reader), sample)
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
    if isinstance(reader, Joined):
        return _content(*reader.find(i))
    return reader.content(i) if hasattr(reader, "content") else reader(i, None).numpy()
