"""Decoded once: a small dataset in memory, any that fits on the disk for all processes there."""

import contextlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from readers.images import Decoded, Joined, Subset
from readers.transforms import keep
from readers.workers import available_cores

IN_MEMORY = 2**30  # bytes of prepared images that one process keeps


def preload(dataset, pipeline, limit=IN_MEMORY):
    """Reads and prepares every image once, into memory, when that takes at most `limit` bytes.

    Returns (dataset, pipeline): the prepared images with nothing left to prepare, or both as they
    were. A broken image is so met before training.
    """
    # The first image tells the size of all, mostly: a large dataset is not read in vain.
    if pipeline.read(dataset, 0).numel() * len(dataset) > limit:
        return dataset, pipeline
    images, total = [], 0
    for image in _prepared(dataset, pipeline, available_cores()):
        images.append(image)
        total += image.numel()
        if total > limit:
            return dataset, pipeline
    shapes = np.array([image.shape for image in images])
    pixels = torch.cat([image.flatten() for image in images])  # workers share it without copies
    reader = _decoded(pixels, shapes, dataset.reader)
    return dataset.replace(reader=reader), pipeline._replace(prepare=keep)


def decode_once(dataset, pipeline, env, folder=None):
    """Reads and prepares every image once, for all processes of this machine together.

    One process keeps what fits as `preload` does. All else goes to files below `folder` (default:
    the system's for temporary files): each process writes its share, all map them into their
    memory. The files have no name, so that none outlives the processes, however these end. Returns
    (dataset, pipeline), both as they were where the files would take more than half of what is
    free there. Raises on all processes what one met: ValueError for a broken image, OSError.
    """
    folder = folder or tempfile.gettempdir()
    ranks, rank, node = 1, 0, 0  # processes of this machine, which of them this is, which machine
    if env.ranks > 1:
        here = ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
        ranks, rank, node = (int(os.environ[name]) for name in here)
    starts = np.arange(ranks + 1) * len(dataset) // ranks
    file, part = None, None
    try:
        if env.ranks == 1:
            kept = preload(dataset, pipeline, IN_MEMORY)
            if kept[0] is not dataset:
                return kept
        with _writing(folder):
            os.makedirs(folder, exist_ok=True)
        # Elsewhere other processes could not map our files.
        free = shutil.disk_usage(folder).free if os.path.isdir("/proc/self/fd") else 0
        if pipeline.read(dataset, 0).numel() * len(dataset) < free / 2:
            share = dataset.subset(np.arange(starts[rank], starts[rank + 1]))
            threads = max(1, available_cores() // ranks)
            images = _prepared(share, pipeline, threads)
            file, shapes = _write(images, len(share), folder)
            part = f"/proc/{os.getpid()}/fd/{file.fileno()}", shapes
    except (ValueError, OSError) as error:
        part = error
    parts = [(node, part)]
    if env.ranks > 1:
        parts = [None] * env.ranks
        dist.all_gather_object(parts, (node, part))
    for _, part in parts:
        if isinstance(part, Exception):
            raise part
    parts = [part for machine, part in parts if machine == node]
    try:
        if None in parts:
            return dataset, pipeline
        readers = [
            _decoded(_mapped(path, shapes), shapes, Subset(dataset.reader, np.arange(a, b)))
            for (path, shapes), a, b in zip(parts, starts, starts[1:])
        ]
    finally:
        if env.ranks > 1:
            dist.barrier()  # all have mapped them
        if file:
            file.close()
    reader = Joined(readers, starts[1:])
    return dataset.replace(reader=reader), pipeline._replace(prepare=keep)


def _prepared(dataset, pipeline, threads, ahead=256):
    """The images of a dataset, prepared, in order; `threads` at once, at most `ahead` waiting."""

    def read(i):
        return pipeline.read(dataset, i).contiguous()

    with ThreadPoolExecutor(min(16, threads)) as pool:
        try:
            for start in range(0, len(dataset), ahead):
                yield from pool.map(read, range(start, min(start + ahead, len(dataset))))
        finally:
            pool.shutdown(cancel_futures=True)


def _decoded(pixels, shapes, original):
    sizes = shapes.prod(1)
    return Decoded(pixels, np.cumsum(sizes) - sizes, shapes, original)


@contextlib.contextmanager
def _writing(folder):
    """Errors of writing become an OSError that names the folder and the mend."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder}: cannot hold decoded images ({error.strerror}); free some space, or name "
            "another folder by --cache-dir"
        ) from error


def _write(images, count, folder):
    """Writes `count` images, one after the other, to a file without a name.

    Returns (file, shapes (count,3)). Raises OSError for a full disk.
    """
    shapes = np.zeros((count, 3), np.int64)
    with _writing(folder):
        file = tempfile.TemporaryFile(dir=folder)
    for i, image in enumerate(images):
        shapes[i] = image.shape
        with _writing(folder):
            file.write(memoryview(image.numpy()))
            file.flush()
    return file, shapes


def _mapped(path, shapes):
    """The bytes of a file of such images, (M,) uint8; what is written to them stays here."""
    size = int(shapes.prod(1).sum())
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(path, size=size, dtype=torch.uint8)
