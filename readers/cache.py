"""Batches that any layout repeats: the global batch of step s is a function of (seed, s) alone.

`preload` decodes a small dataset once, `decode_once` any that fits on the disk for all processes
of a machine; `Batches` is the global batch of a step, or one rank's part of it; `loader` reads
ahead with worker processes.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from engine.memory import available_cores
from readers.images import Decoded, Joined, Subset
from readers.transforms import keep


class Stream:
    """What a random number is for: the second word of the seed of every generator."""

    SHOTS, ORDER, DRAW, AUGMENT, MIXUP, FRACTION = range(6)


def generator(seed, *purpose):
    """numpy's generator for a seed, a Stream and what else tells its draws from others."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: must be 0 or more")
    return np.random.default_rng([seed, *purpose])


_ORDER = {}  # {(images, seed, epoch): order}, of one epoch: every worker of every rank holds it


def _permutation(num_images, seed, epoch):
    """The order of an epoch; half the memory of generator.permutation."""
    key = num_images, seed, epoch
    if key not in _ORDER:
        _ORDER.clear()  # before the next is made
        order = np.arange(num_images, dtype=np.int32 if num_images < 2**31 else np.int64)
        generator(seed, Stream.ORDER, epoch).shuffle(order)
        _ORDER[key] = order
    return _ORDER[key]


def by_class(labels):
    """(images sorted by class (N,), first place (C,) and number (C,) of each class present)."""
    _, counts = np.unique(labels, return_counts=True)
    return np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, counts


def batch_indices(step, num_images, batch_size, seed, sampling="shuffle", classes=None):
    """Which images make up the global batch of a step, a function of (seed, step) alone.

    sampling: "shuffle" walks through one permutation an epoch after the other, so that each image
    comes once an epoch and no batch is short; "replacement" draws each image anew; "balanced"
    does so with probability inverse to the frequency of its class in classes = by_class(labels);
    "sequential" is the test order, with a short last batch.
    Returns (indices, draws), both (B,) int64; (draw, image) is never the same twice in a run.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    if sampling == "sequential":
        places = places[places < num_images]
        return places, np.zeros_like(places)
    if sampling == "shuffle":
        epochs = places // num_images
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(num_images, seed, int(epoch))[places[here] % num_images]
        return indices, epochs
    rng = generator(seed, Stream.DRAW, step)
    if sampling == "replacement":
        return rng.integers(num_images, size=batch_size), places
    if sampling == "balanced":
        images, starts, counts = classes
        drawn = rng.integers(len(counts), size=batch_size)
        return images[starts[drawn] + rng.integers(counts[drawn])], places
    raise ValueError(f"unknown sampling {sampling!r}")


def preload(dataset, pipeline, limit=2**30):
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
    return dataset.replace(reader=_decoded(pixels, shapes, dataset.reader)), _as_prepared(pipeline)


def _prepared(dataset, pipeline, threads, ahead=256):
    """The images of a dataset, prepared, in order; `threads` at once, at most `ahead` waiting."""
    with ThreadPoolExecutor(min(16, threads)) as pool:
        try:
            for start in range(0, len(dataset), ahead):
                yield from pool.map(
                    lambda i: pipeline.read(dataset, i).contiguous(),
                    range(start, min(start + ahead, len(dataset))),
                )
        finally:
            pool.shutdown(cancel_futures=True)


def _decoded(pixels, shapes, original):
    sizes = shapes.prod(1)
    return Decoded(pixels, np.cumsum(sizes) - sizes, shapes, original)


def _as_prepared(pipeline):
    return pipeline._replace(prepare=keep)


def decode_once(dataset, pipeline, env, folder=None):
    """Reads and prepares every image once, for all processes of this machine together.

    One process keeps what fits as `preload` does. All else goes to files below `folder` (default:
    the system's for temporary files): each process writes its share, all map them into their
    memory. The files have no name, so that none outlives the processes, however these end. Returns
    (dataset, pipeline), both as they were where the files would take more than half of what is
    free there. Raises on all processes what one met: ValueError for a broken image, OSError.
    """
    if env.ranks == 1:
        kept = preload(dataset, pipeline)
        if kept[0] is not dataset:
            return kept
    folder = folder or tempfile.gettempdir()
    ranks, rank, node = _place(env)
    starts = np.arange(ranks + 1) * len(dataset) // ranks
    file, part = None, None
    try:
        if pipeline.read(dataset, 0).numel() * len(dataset) < _free(folder) / 2:
            share = dataset.subset(np.arange(starts[rank], starts[rank + 1]))
            file, shapes = _write_prepared(share, pipeline, folder, available_cores() // ranks)
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
    parts = [part for place, part in parts if place == node]
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
    return dataset.replace(reader=Joined(readers, starts[1:])), _as_prepared(pipeline)


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


def _free(folder):
    """Bytes free in a folder, which is made; 0 where other processes could not map our files."""
    with _writing(folder):
        os.makedirs(folder, exist_ok=True)
    return shutil.disk_usage(folder).free if os.path.isdir("/proc/self/fd") else 0


def _place(env):
    """(processes on this machine, which of them this is, which machine this is)."""
    if env.ranks == 1:
        return 1, 0, 0
    return tuple(int(os.environ[k]) for k in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"))


def _write_prepared(dataset, pipeline, folder, threads):
    """Writes the prepared images, one after the other, to a file without a name.

    Returns (file, shapes (N,3)). Raises ValueError for a broken image, OSError for a full disk.
    """
    shapes = np.zeros((len(dataset), 3), np.int64)
    with _writing(folder):
        file = tempfile.TemporaryFile(dir=folder)
    for i, image in enumerate(_prepared(dataset, pipeline, max(1, threads))):
        shapes[i] = image.shape
        with _writing(folder):
            file.write(memoryview(image.numpy()))
            file.flush()
    return file, shapes


def _mapped(path, shapes):
    """The bytes of a file of such images, (M,) uint8; what is written to them stays here."""
    size = int(shapes.prod(1).sum())
    return (
        torch.from_file(path, size=size, dtype=torch.uint8)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )


class Batches(torch.utils.data.Dataset):
    """[step] -> (images uint8 (b,C,H,W), labels (b,) or (b,C), count) for one rank.

    The rank's part is every `ranks`-th image of the global batch (with pairs: every `ranks`-th two
    neighbours, which MixUp mixes, so that this too is the same on any number of ranks). count:
    labels that are not NaN in the whole global batch (the denominator of its mean loss), known to
    each rank without communication. Augmentation depends on (seed, draw, image) alone.
    """

    def __init__(
        self,
        dataset,
        pipeline,
        batch_size,
        seed=0,
        sampling="shuffle",
        rank=0,
        ranks=1,
        pairs=False,
    ):
        self.dataset, self.pipeline = dataset, pipeline
        self.batch_size, self.seed, self.sampling = batch_size, seed, sampling
        self.rank, self.ranks, self.unit = rank, ranks, 1 + pairs
        self.classes = by_class(dataset.labels) if sampling == "balanced" else None

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, step):
        labels = self.dataset.labels
        indices, draws = batch_indices(
            step, len(self.dataset), self.batch_size, self.seed, self.sampling, self.classes
        )
        count = int(np.count_nonzero(~np.isnan(labels[indices])))
        mine = np.arange(len(indices)) // self.unit % self.ranks == self.rank
        indices, draws = indices[mine], draws[mine]
        images = [self._image(int(i), int(draw)) for i, draw in zip(indices, draws)]
        images = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return images, torch.from_numpy(labels[indices]), count

    def _image(self, i, draw):
        image = self.pipeline.read(self.dataset, i)
        if self.pipeline.augment is keep:
            return image
        rng = generator(self.seed, Stream.AUGMENT, draw, i)
        return self.pipeline.augment(image, rng)


def _worker_init(worker):
    """A worker ends when its parent does; signals to the whole group are for the parent alone."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Python's own exit sends SIGTERM to the workers that are left and waits; ours ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def loader(batches, start, stop, workers=0, pin_memory=False):
    """Iterator over batches[start:stop]; `workers` processes read ahead (0: none)."""
    return iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            worker_init_fn=_worker_init,
            pin_memory=pin_memory,
        )
    )
