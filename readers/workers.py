"""Worker processes: those that read ahead of a loop, and those that share out all images once."""

import atexit
import functools
import multiprocessing
import os
import signal

import torch
from tqdm import tqdm

from readers.images import in_memory

CPU = torch.device("cpu")
CHUNK = 16  # images of a dataset that a process is given at a time


def available_cores():
    """Those that this process may use (fewer than the machine's under SLURM, say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def loader(batches, start, stop, workers=0, device=CPU):
    """Iterator over batches[start:stop], read ahead by so many processes, or as `_loader` says."""
    return iter(_loader(batches.__getitem__, range(start, stop), batches.dataset, workers, device))


def in_order(dataset, pipeline, batch_size, rank=0, ranks=1, workers=0, device=CPU):
    """This rank's part of a test set: iterating yields (rows (b,) int64, images uint8 (b,C,H,W)),
    as often as one likes, with the same worker processes.

    Of each `batch_size` images every `ranks`-th, so that one rank has each image; none is empty.
    """
    starts = range(rank, len(dataset), batch_size) if rank < batch_size else ()
    work = functools.partial(_part, dataset, pipeline, batch_size - rank, ranks)
    return _loader(work, starts, dataset, workers, device, keep=True)


def _part(dataset, pipeline, length, ranks, start):
    rows = torch.arange(start, min(start + length, len(dataset)), ranks)
    return rows, torch.stack([pipeline.read(dataset, i) for i in rows.tolist()])


def _loader(work, keys, dataset, workers, device, keep=False):
    """Yields work(key) of each key in turn. workers None: 0 for a CPU and where the images are
    decoded in memory; for a GPU, which takes thousands of images a second where a core reads
    hundreds, 8 or the process's share of the cores.
    """
    on_gpu = device.type == "cuda"
    if workers is None:
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, share) if on_gpu and not in_memory(dataset.reader) else 0
    return torch.utils.data.DataLoader(
        keys,
        batch_size=None,
        collate_fn=work,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=on_gpu,
        persistent_workers=keep and workers > 0,
    )


def _ignore_signals(worker):
    """A worker ends when its parent does; signals to the whole group are for the parent alone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Python's own exit sends SIGTERM to the workers that are left and waits; ours ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def each_image(dataset, work, title, workers=None, start=0):
    """Yields work(dataset, i), or its ValueError or OSError, for every image i from `start` on, by
    so many processes (default: one a core), under a progress bar of this title.
    """
    starts = range(start, len(dataset), CHUNK)
    workers = min(workers or available_cores(), max(1, len(starts)))
    chunk = functools.partial(_chunk, dataset, work)
    with tqdm(total=len(dataset), initial=start, desc=title, unit="image", disable=None) as bar:
        for results in _loader(chunk, starts, dataset, workers, CPU):
            yield from results
            bar.update(len(results))


def _chunk(dataset, work, start):
    results = []
    for i in range(start, min(start + CHUNK, len(dataset))):
        try:
            results.append(work(dataset, i))
        except (ValueError, OSError) as error:
            results.append(error)
    return results
