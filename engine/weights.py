"""Weight files, also of others: formats, names of parameters, published ones and their download."""

import contextlib
import difflib
import functools
import http.client
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from engine.checkpoint import file_digest, load_plain, read_tensors
from engine.console import locked, progress_bar, say

# Names of others' files -> ours: regular expressions, replaced in this order.
NAMES = (
    (r"\b(_orig_mod|module)\.", ""),  # of torch.compile and DistributedDataParallel
    # timm's
    (r"^stem\.", "root."),
    (r"^stages\.(\d+)", lambda found: f"body.block{int(found[1]) + 1}"),
    (r"\.blocks\.(\d+)", lambda found: f".unit{int(found[1]) + 1:02d}"),
    (r"\.norm(\d)", r".gn\1"),
    (r"\.downsample\.conv", ".downsample"),
    (r"^norm", "head.gn"),
    (r"^head\.fc", "head.conv"),
    # BiT's, of TensorFlow
    (r"^resnet/block", "body/block"),
    (r"^resnet/root_block/standardized_conv2d", "root/conv"),
    (r"^resnet/group_norm", "head/gn"),
    (r"^resnet/head/conv2d", "head/conv"),
    (r"/a/proj/standardized_conv2d", "/downsample"),
    (r"/([abc])/standardized_conv2d", lambda found: f"/conv{'abc'.index(found[1]) + 1}"),
    (r"/([abc])/group_norm", lambda found: f"/gn{'abc'.index(found[1]) + 1}"),
    (r"/(kernel|gamma)$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/", "."),
)


def _read_npz(path):
    """BiT's .npz, kernels HWIO -> OIHW and vectors flat, without the optimiser's state of some."""
    with np.load(path, allow_pickle=False) as arrays:
        keys = [key for key in arrays.files if key.startswith("resnet/")]
        state = {key: torch.from_numpy(arrays[key]) for key in keys}
    for key, array in state.items():
        state[key] = array.permute(3, 2, 0, 1) if key.endswith("/kernel") else array.flatten()
    return {"model": state}


def read_weights(path):
    """The whole dict that a weight file holds, as read_tensors; of safetensors ValueError too."""
    if Path(path).suffix == ".safetensors":
        mend = f"torch.save(timm.models.load_state_dict({str(path)!r}), 'weights.pth')"
        raise ValueError(f"{path}: safetensors are not read; save it as a .pth: {mend}")
    return read_tensors(path, _read_npz if Path(path).suffix == ".npz" else load_plain)


@functools.lru_cache(maxsize=1)  # of the network in hand
def _read_once(path, state):
    return read_weights(path), file_digest(path)


def weights_of(path, digest=None):
    """(what a weight file holds, its digest), read anew when the file has changed. digest: of the
    file that was opened. Raises as read_weights, and ValueError for another file.
    """
    stat = os.stat(path) if os.path.exists(path) else None
    state = stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    content, found = _read_once(str(path), state)
    if digest not in (None, found):
        raise ValueError(f"{path}: is another file than when it was opened; give another --out")
    return content, found


def our_names(state):
    """A state dict under our names of parameters."""
    for theirs, ours in NAMES:
        state = {re.sub(theirs, ours, str(key)): value for key, value in state.items()}
    return state


def outputs_of(content):
    """How many outputs the head has in what a weight file holds; 0 without a head."""
    return len(our_names(content.get("model", content)).get("head.conv.bias", ()))


class Published(NamedTuple):
    """source: what it was trained on. model: its size, a key of models.MODELS."""

    source: str
    model: str
    url: str


BIT = "https://storage.googleapis.com/bit_models"
BIT_MODELS = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
# Fine-tuned on 1,000 images of these, three times; there is no R152x2 among them.
VTAB = """caltech101 cifar100 clevr-count clevr-distance diabetic_retinopathy dmlab
    dsprites-orientation dsprites-xpos dtd eurosat kitti-distance oxford_flowers102 oxford_iiit_pet
    patch_camelyon resisc45 smallnorb-azimuth smallnorb-elevation sun397 svhn"""
CIFAR = ("cifar10", "cifar100")
STUDY = "https://fz-juelich.sciebo.de/s/9kqbf6yBDyJnQfd/download"
STUDY_SOURCES = """imagenet1k imagenet21k chexpert chexpert+mimic chexpert+mimic+nih
    chexpert+mimic+nih+padchest"""

PUBLISHED = {}  # {name, as --checkpoint takes it: Published}
for model in BIT_MODELS:
    names = {f"BiT-S-{model}": "imagenet1k", f"BiT-M-{model}": "imagenet21k"}
    names[f"BiT-M-{model}-ILSVRC2012"] = "imagenet21k-to-imagenet1k"
    names |= {f"BiT-M-{model}-{task.upper()}": f"imagenet21k-to-{task}" for task in CIFAR}
    for name, source in names.items():
        PUBLISHED[f"bit:{name}"] = Published(source, model, f"{BIT}/{name}.npz")
for source in STUDY_SOURCES.split():
    for model in ("R50x1", "R152x4"):
        url = f"{STUDY}?path=%2F{source.replace('+', '_')}_bit{model[1:]}&files=model.pth.tar"
        PUBLISHED[f"study:{source}-{model}"] = Published(source, model, url)
for model in sorted({*BIT_MODELS} - {"R152x2"}):
    for run, task in itertools.product(range(3), VTAB.split()):
        name, source = f"BiT-M-{model}-run{run}-{task}", f"imagenet21k-to-{task}-run{run}"
        PUBLISHED[f"bit:{name}"] = Published(source, model, f"{BIT}/vtab/{name}.npz")


def published_path(name, folder=None):
    """Where the file of a name of PUBLISHED is kept: below --cache-dir, else torch.hub's."""
    ending = ".npz" if PUBLISHED[name].url.endswith(".npz") else ".pth.tar"
    return Path(folder or torch.hub.get_dir(), "networks", name.replace(":", "-") + ending)


def find_published(name, args, env=None):
    """The file of such a name; with --download the main rank fetches it if it is not here. Raises
    ValueError for an unknown name, or what is no weight file; FileNotFoundError, OSError.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0)[0]
        mend = f"did you mean {near!r}? python models.py list names all"
        raise ValueError(f"unknown network {name!r}; {mend}")
    path, url = published_path(name, args.cache_dir), PUBLISHED[name].url
    if not path.exists() and not args.download:
        raise FileNotFoundError(f"{name}: no {path}; add --download, or fetch {url} to there")
    if args.download and env:
        if env.main and not path.exists():
            fetch(url, path, env)
            say(env, f"{name}: {path}, SHA-256 {file_digest(path)}")
        if env.ranks > 1:
            dist.barrier()
    return path


TRIES = 5  # in a row that bring no byte more
PAUSE = 1.0  # seconds more before each of them


def fetch(url, path, env):
    """Fetches a weight file to a path: whole or not there. What came before a cut stays in
    part-of-NAME beside it, and is gone on from, also by a later call, while the server has the same
    version of the file. Raises ValueError for what is no weight file, which is removed, or while
    another process fetches to there; OSError for what else went wrong; both name URL or folder.
    """
    part = path.with_name(f"part-of-{path.name}")
    note = path.with_name(f"part-of-{path.name}.json")  # the version that it is of, and its length
    bar = progress_bar(env, None, 0, path.name, "B")
    bar.unit_scale = True
    with locked(path.parent), open(part, "ab") as file, bar:
        try:
            _until_whole(url, file, note, bar)
            read_weights(part)
            os.replace(part, path)
            note.unlink()
        except ValueError as error:
            part.unlink()
            note.unlink(missing_ok=True)
            raise ValueError(f"{url}: not the file that is meant ({error})") from error
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _until_whole(url, file, note, bar):
    """Reads on until all is there; gives up after TRIES that brought nothing."""
    known, most, tries, reason = {}, 0, 0, "too few bytes"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
    while True:
        headers, have = {}, file.seek(0, os.SEEK_END)
        if have and known.get("version"):
            headers = {"Range": f"bytes={have}-", "If-Range": known["version"]}
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.headers.get_content_type() == "text/html":
                    raise ValueError("a web page came")
                tag = answer.headers.get("ETag", "W/")  # a weak one does not tell bytes apart
                version = answer.headers.get("Last-Modified") if tag.startswith("W/") else tag
                span, _, length = answer.headers.get("Content-Range", "").partition("/")
                if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                    file.truncate(file.seek(0))
                    length = answer.headers.get("Content-Length")
                found = {"version": version, "length": length}
                if span and (known != found or not span.startswith(f"bytes {have}-")):
                    file.truncate(file.seek(0))  # what comes is the end of another file
                else:
                    note.write_text(json.dumps(found))
                    known = found
                    bar.total, bar.n = int(length) if length else None, file.tell()
                    while block := answer.read(2**20):
                        file.write(block)
                        bar.update(len(block))
                    if length is None or file.tell() == int(length):
                        file.flush()
                        os.fsync(file.fileno())
                        return
        except urllib.error.URLError as error:
            if getattr(error, "code", 0) != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise OSError(f"{url}: cannot be fetched ({error})") from error
            file.truncate(file.seek(0))
        except ValueError as error:  # of what came before nothing is lost
            raise OSError(f"{url}: not the file that is meant ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        tries = 0 if file.tell() > most else tries + 1
        most = max(most, file.tell())
        if tries == TRIES:
            cut = f"cut off after {file.tell():,} bytes ({reason})"
            again = "goes on from there" if known.get("version") else "begins anew"
            raise OSError(f"{url}: {cut}; the same command {again}")
        time.sleep(PAUSE * tries)
