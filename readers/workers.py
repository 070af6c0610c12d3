"""Worker processes: those that read ahead of a loop, and those that share out all images once."""

import atexit
import multiprocessing
import os
import signal

import numpy as np
import torch
from tqdm import tqdm

from readers.images import in_memory

CPU = torch.device("cpu")
CHUNK = 16  # images of a dataset that a process is given at a time


def available_cores():
    """Those that this process may use (fewer than the machine's under SLURM, say)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def loader(batches, start, stop, workers=0, device=CPU):
    """Iterator over batches[start:stop], read ahead by so many processes, or as `_loader` says."""
    return iter(_loader(batches, range(start, stop), workers, device))


class _Part(torch.utils.data.Dataset):
    """[k] -> (rows (b,) int64, their images uint8 (b,C,H,W)): a rank's part of the k-th batch."""

    def __init__(self, dataset, pipeline, batch_size, rank, ranks):
        self.dataset, self.pipeline = dataset, pipeline
        batches = np.split(np.arange(len(dataset)), range(batch_size, len(dataset), batch_size))
        parts = (batch[rank::ranks] for batch in batches)
        self.rows = [rows for rows in parts if len(rows)]

    def __getitem__(self, k):
        images = [self.pipeline.read(self.dataset, int(i)) for i in self.rows[k]]
        return self.rows[k], torch.stack(images)


def in_order(dataset, pipeline, batch_size, rank=0, ranks=1, workers=0, device=CPU):
    """This rank's part of a test set: iterating yields (rows (b,) int64, images uint8 (b,C,H,W)),
    as often as one likes, with the same worker processes.

    Of each `batch_size` images every `ranks`-th, so that one rank has each image; none is empty.
    """
    part = _Part(dataset, pipeline, batch_size, rank, ranks)
    return _loader(part, range(len(part.rows)), workers, device, keep=True)


def _loader(batches, sampler, workers, device, keep=False):
    """workers None: 0 for a CPU and where the images are decoded in memory; for a GPU, which takes
    thousands of images a second where a core reads hundreds, 8 or the process's share of the cores.
    """
    on_gpu = device.type == "cuda"
    if workers is None:
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, share) if on_gpu and not in_memory(batches.dataset.reader) else 0
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=on_gpu,
        persistent_workers=keep and workers > 0,
    )


def _ignore_signals(worker):
    """A worker ends when its parent does; signals to the whole group are for the parent alone."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def end_workers():
    """Python's own exit sends SIGTERM to the workers that are left and waits; ours ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class _Chunks(torch.utils.data.Dataset):
    """[start] -> [work(dataset, i), or the error that it raised] of CHUNK images from start on."""

    def __init__(self, dataset, work):
        self.dataset, self.work = dataset, work

    def __getitem__(self, start):
        results = []
        for i in range(start, min(start + CHUNK, len(self.dataset))):
            try:
                results.append(self.work(self.dataset, i))
            except (ValueError, OSError) as error:
                results.append(error)
        return results


def each_image(dataset, work, title, workers=None, start=0):
    """Yields work(dataset, i), or its ValueError or OSError, for every image i from `start` on.

    workers: processes (default: one a core). title: of the progress bar.
    """
    starts = range(start, len(dataset), CHUNK)
    workers = min(workers or available_cores(), max(1, len(starts)))
    with tqdm(total=len(dataset), initial=start, desc=title, unit="image", disable=None) as bar:
        for results in _loader(_Chunks(dataset, work), starts, workers, CPU):
            yield from results
            bar.update(len(results))
