"""Decoded once: a small dataset in memory, any that fits on the disk for all processes there."""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from readers.images import Decoded, Joined
from readers.transforms import keep
from readers.workers import available_cores

IN_MEMORY = 2**30  # bytes of prepared images that one process keeps


def preload(dataset, pipeline, limit=IN_MEMORY, first=None):
    """Reads and prepares every image once, into memory, when that takes at most `limit` bytes.

    first: the first image, prepared, where it has been read. Returns (dataset, pipeline): the
    prepared images with nothing left to prepare, or both as they were.
    """
    first = pipeline.read(dataset, 0) if first is None else first
    # The first image tells the size of all, mostly: a large dataset is not read in vain.
    if first.numel() * len(dataset) > limit:
        return dataset, pipeline
    images, starts, total = [], [], 0
    for image in _prepared(dataset, pipeline, available_cores(), first):
        images.append(image)
        starts.append(total)
        total += image.numel()
        if total > limit:
            return dataset, pipeline
    pixels = torch.cat([image.flatten() for image in images])  # workers share it without copies
    shapes = np.array([image.shape for image in images])
    reader = Decoded(pixels, np.array(starts), shapes, dataset.reader)
    return dataset.replace(reader=reader), pipeline._replace(prepare=keep)


def decode_once(dataset, pipeline, env, folder=None):
    """Reads and prepares every image once, for all processes of this machine together.

    One process keeps what fits as `preload` does. All else goes to files below `folder` (default:
    the system's for temporary files), of which each process writes its share and all map all. They
    have no name, so that none outlives the processes. Returns (dataset, pipeline), both as they
    were where the files would take more than half of what is free there. Raises on all processes
    what one met: ValueError for a broken image, OSError.
    """
    folder = folder or tempfile.gettempdir()
    ranks, rank, node = 1, 0, 0  # processes of this machine, which of them this is, which machine
    if env.ranks > 1:
        here = ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
        ranks, rank, node = (int(os.environ[name]) for name in here)
    starts = np.arange(ranks + 1) * len(dataset) // ranks
    file, part = None, None
    try:
        first = next(_prepared(dataset, pipeline, 1))
        if env.ranks == 1:
            kept = preload(dataset, pipeline, IN_MEMORY, first)
            if kept[0] is not dataset:
                return kept
        os.makedirs(folder, exist_ok=True)
        # Elsewhere other processes could not map our files.
        free = shutil.disk_usage(folder).free if os.path.isdir("/proc/self/fd") else 0
        if first.numel() * len(dataset) < free / 2:
            share = dataset.subset(slice(*starts[rank : rank + 2]))
            shapes, threads = np.zeros((len(share), 3), np.int64), available_cores() // ranks
            file = tempfile.TemporaryFile(dir=folder)
            images = _prepared(share, pipeline, threads, None if rank else first)
            for i, image in enumerate(images):
                shapes[i] = image.shape
                file.write(memoryview(image.numpy()))
            file.flush()
            part = f"/proc/{os.getpid()}/fd/{file.fileno()}", shapes
    except ValueError as error:
        part = error
    except OSError as error:
        mend = "free some space, or name another folder by --cache-dir"
        part = OSError(f"{folder}: cannot hold decoded images ({error.strerror}); {mend}")
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
        readers = []
        for (path, shapes), a, b in zip(parts, starts, starts[1:]):
            ends = shapes.prod(1).cumsum()
            # What is written to the mapped bytes stays here.
            pixels = torch.from_file(path, size=int(ends[-1]), dtype=torch.uint8) if a < b else None
            original = dataset.subset(slice(a, b)).reader
            readers.append(Decoded(pixels, ends - shapes.prod(1), shapes, original))
    finally:
        if env.ranks > 1:
            dist.barrier()  # all have mapped them
        if file:
            file.close()
    reader = Joined(readers, starts[:-1].tolist())
    return dataset.replace(reader=reader), pipeline._replace(prepare=keep)


def _prepared(dataset, pipeline, threads, first=None, ahead=256):
    """The images of a dataset, prepared, in order; `threads` at once, at most `ahead` waiting."""

    def read(i):
        try:
            return pipeline.read(dataset, i).contiguous()
        except OSError as error:  # of the source, not of the disk that shall hold the images
            raise ValueError(str(error)) from error

    if len(dataset):
        yield read(0) if first is None else first.contiguous()
    with ThreadPoolExecutor(min(16, max(1, threads))) as pool:
        try:
            for start in range(1, len(dataset), ahead):
                yield from pool.map(read, range(start, min(start + ahead, len(dataset))))
        finally:
            pool.shutdown(cancel_futures=True)
