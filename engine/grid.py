"""Many cells in one command: what a cell is, which process runs which, what failed."""

import argparse
import collections
import contextlib
import datetime
import functools
import heapq
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine import console
from engine.checkpoint import load_checkpoint, read_result
from engine.evaluate import can_hold
from engine.memory import flops_per_second, in_parts, out_of_memory
from engine.metrics import Diverged
from engine.outputs import ENDINGS
from engine.processes import Stopped, environment, gathered
from engine.weights import PUBLISHED, find_published

# A process whose share of the cells is done may wait long for the last ones of the others.
PATIENCE = datetime.timedelta(days=30)


class Network(NamedTuple):
    """A network to transfer; None: unknown."""

    name: str  # SOURCE-MODEL
    source: str
    model: str
    domain: str | None = None  # of its source
    images: int | None = 0  # of its source
    path: str | None = None  # of its weights, None for scratch
    digest: str | None = None  # SHA-256 of that file
    normalization: tuple | None = None
    sample: torch.Tensor | None = None  # projected features of the source (distance.project)
    steps: int | None = None  # of fine-tuning, in place of the recipe's
    classes: tuple | None = None
    task: str | None = None
    outputs: int = 0  # of a head whose classes are unknown
    image_size: int | None = None
    recipe: str | None = None
    seed: int | None = None


def open_networks(args, open_network, env=None):
    """The networks that --checkpoint names; none named: every finished run below runs/, and scratch
    (which has no features to classify). open_network: (path, args) -> Network; every file is
    opened, so that a wrong one is refused before any training: ValueError, FileNotFoundError.
    """
    frozen, checkpoints = args.method != "finetune", args.checkpoint
    if not checkpoints:
        checkpoints = sorted(str(path.parent) for path in Path("runs").glob("[!.]*/model.pt"))
        if not checkpoints:
            mend = "run pretrain.py first, or give --checkpoint"
            raise FileNotFoundError(f"no pre-trained network in runs/; {mend}")
        checkpoints += [] if frozen else ["scratch"]
    if frozen and "scratch" in checkpoints:
        raise ValueError(f"--method {args.method}: scratch has no features; leave it out")
    if args.scratch_steps and "scratch" not in checkpoints:
        raise ValueError("--scratch-steps: name scratch among --checkpoint too")
    if not frozen and "statistics" in checkpoints:
        raise ValueError("--checkpoint statistics: nothing to fine-tune; add --method linear")
    networks = []
    for path in checkpoints:
        if str(path).startswith(("bit:", "study:")):
            file = find_published(path, args, env)
            told = argparse.Namespace(**vars(args) | PUBLISHED[path]._asdict())
            networks.append(open_network(file, told))
        elif path not in ("scratch", "statistics"):
            networks.append(open_network(path, args))
    if "statistics" in checkpoints:  # of pixels from 0 to 1
        unchanged = (0.0,) * 3, (1.0,) * 3
        networks.append(Network(*["statistics"] * 3, normalization=unchanged))
    if "scratch" in checkpoints:
        found, steps = sorted({network.model for network in networks}), args.scratch_steps
        for model in [args.model] if args.model else found or ["R14x0.5"]:
            networks.append(Network(f"scratch-{model}", "scratch", model))
            if steps:
                source = f"scratch-{steps}steps"
                networks.append(Network(f"{source}-{model}", source, model, steps=steps))
    return networks


class Cell(NamedTuple):
    """One run of a network on a target."""

    network: Network
    target: object  # has name, train_set, test_set, data (digests) and distances
    shots: int | None  # None: all images
    seed: int
    method: str
    indices: np.ndarray  # its training images among the target's, sorted (M,) int64
    settings: dict  # of the method
    flops: int  # of an image's forward pass
    out: str  # folder of all results
    folder: str  # of the target's below it
    save: tuple = ()  # keys of outputs.ENDINGS

    @property
    def path(self):
        """Of the result file."""
        shots = f"{self.shots}shot" if self.shots else "full"
        ending = ".json" if self.method == "finetune" else f"-{self.method}.json"
        return Path(self.out, self.folder, self.network.name, f"{shots}-seed{self.seed}{ending}")

    @property
    def files(self):
        """{key of outputs.ENDINGS: path of that file beside the result}"""
        return {what: self.path.with_suffix(ENDINGS[what]) for what in self.save}

    def own_file(self, what):
        """Of files, one to be written now; ValueError as of write_result."""
        read_result(self.path, self.kind, self.config)
        return self.files[what]

    @property
    def config(self):
        """What decides the result."""
        return {
            "weights": self.network.digest and self.network.digest[:16],
            "source": self.network.source,
            "model": self.network.model,
            "target": self.target.name,
            "target_options": self.target.train_set.options,
            "data": self.target.data,
            "shots": self.shots,
            "seed": self.seed,
            "images": len(self.indices),
            "train_images": len(self.target.train_set),
            "test_images": len(self.target.test_set),
            **self.settings,
        }

    @property
    def metric(self):
        """The main one of such a target."""
        return console.MAIN_METRIC[self.target.train_set.domain]

    @property
    def kind(self):
        if self.method == "features":
            return "features"
        kind = "fewshot" if self.shots else "transfer"
        return f"{kind}-validation" if self.target.train_set.options.get("validation") else kind

    @property
    def checkpoint(self):
        """Where unfinished full-shot fine-tuning is kept; all else is short and starts anew."""
        kept = self.method == "finetune" and not self.shots
        return self.path.with_suffix(".checkpoint.pt") if kept else None

    def __str__(self):
        shots = console.counted(self.shots, "shot") if self.shots else "all images"
        return f"{self.target.name} from {self.network.name}, {shots}, seed {self.seed}"


def unfinished(cells, out, env):
    """(the cells without a result, {path: main metric} of the others), alike on all processes.

    A cell that lacks a file of --save is run again. Raises OSError where results cannot be written,
    ValueError for two cells of one path, a file made with other settings, predictions that are too
    many to be held, and processes that find different results.
    """
    for path, times in collections.Counter(cell.path for cell in cells).items():
        if times > 1:
            mend = "run them apart, one with another --out"
            raise ValueError(f"two checkpoints or targets would write {path}; {mend}")
    todo, results = [], {}
    for cell in cells:
        test_set = cell.target.test_set
        held = "predictions" in cell.save or cell.method == "eval"
        if held and not can_hold(len(test_set), len(test_set.classes)):
            raise ValueError(f"{cell.target.name}: too many scores for --save or --eval-only")
        record = read_result(cell.path, cell.kind, cell.config)
        missing = [path for path in cell.files.values() if not path.is_file()]
        if record and not missing:
            results[str(cell.path)] = record["metrics"].get(cell.metric)
            continue
        if record:
            console.say(env, f"{cell.path}: run again, as there is no {missing[0].name}")
        load_checkpoint(cell.checkpoint, cell.config)
        todo.append(cell)
    paths = (path for cell in todo for path in (cell.path, *cell.files.values()))
    console.refuse_unwritable("--out", *paths)
    paths = [str(cell.path) for cell in todo]
    if any(other != paths for other in gathered(paths, env)):
        mend = "name a folder that all nodes share"
        raise ValueError(f"--out {out}: the processes find different results there; {mend}")
    count = console.counted(len(cells), "cell")
    console.say(env, f"{count}, {len(cells) - len(todo)} finished already")
    return todo, results


def write_result(cell, metrics, train, workers, env):
    """Writes the result of a cell, on the main rank; train: what it says of the training. Raises
    ValueError where another process has meanwhile put one there that was made otherwise.
    """
    if not env.main:
        return
    network, target = cell.network, cell.target
    layout = {"checkpoint": network.path or "scratch", "sha256": network.digest, "workers": workers}
    record = {
        "schema": 1,
        "kind": cell.kind,
        "source": network.source,
        "source_domain": network.domain,
        "source_images": network.images,
        "source_recipe": network.recipe,
        "source_seed": network.seed,
        "model": network.model,
        "run": network.name,
        "target": target.name,
        "target_domain": target.train_set.domain,
        "shots": cell.shots,
        "seed": cell.seed,
        "method": cell.method,
        "recipe": cell.config.get("recipe"),
        "distance": target.distances.get(network.name),
        "metrics": metrics,
        "train": train,
        "config": cell.config,
        "layout": layout,
        "environment": environment(env),
    }
    if not cell.path.exists():  # what lies there of a result that was removed is of others
        for path in {cell.path.with_suffix(ending) for ending in ENDINGS.values()}:
            if path not in cell.files.values():
                path.unlink(missing_ok=True)
    if not console.write_json(cell.path, record, replace=False):
        read_result(cell.path, cell.kind, cell.config)
    if cell.checkpoint:
        cell.checkpoint.unlink(missing_ok=True)


# What an error says after which the device is of no use to this process: all cells would fail.
LOST = ("CUDA error", "CUDA driver error", "Triton Error", "cuDNN error", "CUBLAS_STATUS")
LOST += ("NCCL error", "NCCL Error", "device-side assert")


class Grid:
    """The cells still to be run, in turn: `for cell in grid: with grid.tolerating(cell): …`.

    jobs: lists of cells that one process runs one after the other, as they share features. results:
    {path: main metric} of the finished ones. together: every process runs every cell, in the order
    given; else each job goes to whichever process comes free, the longest first.
    """

    def __init__(self, jobs, results, env, together=False):
        self.jobs = list(jobs)
        if not together:
            # Of equal length those of one network in a row, whose weights are then read once.
            self.jobs.sort(key=lambda job: (-operations(job), job[0].network.name))
        self.env, self.together, self.results = env, together, results
        self.cells = [cell for job in self.jobs for cell in job]
        self.places = {cell.path: place for place, cell in enumerate(self.cells, 1)}
        self.failures, self.stopped = {}, None
        alone = together or env.ranks == 1
        # It counts the jobs that all processes together have taken.
        self.store = dist.HashStore() if alone else dist.distributed_c10d._get_default_store()

    def __iter__(self):
        if self.together:
            yield from self.cells
            return
        ends = np.cumsum([operations(job) for job in self.jobs])
        self.began = self.ended = time.monotonic()
        with console.progress_bar(self.env, len(self.cells), 0, "cells", "cell") as bar:
            while (number := self.store.add("jobs", 1) - 1) < len(self.jobs):
                self.ahead = ends[-1] / ends[number] - 1  # work that is left to work that is done
                for cell in self.jobs[number]:
                    if not self.stopped:
                        yield cell
                bar.update(self.places[self.jobs[number][-1].path] - bar.n)  # of all processes

    @contextlib.contextmanager
    def tolerating(self, cell):
        """A block whose error is noted as the reason why this cell failed, and stops no other."""
        # What one process of several alone meets leaves the others waiting: then the run ends, to
        # be continued.
        tolerated = Diverged if self.together and self.env.ranks > 1 else Exception
        try:
            yield
        except Stopped as stop:
            if self.together or self.env.ranks == 1:
                raise
            self.stopped = stop
            self.store.add("jobs", len(self.jobs))  # none is left: all stop after that in hand
        except tolerated as error:
            if os.environ.get("TRACEBACK"):
                raise
            reason, text = console.one_line(error), str(error)
            lost = isinstance(error, torch.AcceleratorError) or any(sign in text for sign in LOST)
            works = out_of_memory(error) or "NOT_SUPPORTED" in text
            if lost and not works and isinstance(error, RuntimeError):
                mend = "the same command runs what is unfinished"
                raise ValueError(f"{cell}: the device is lost ({reason}); {mend}") from error
            self.failures[str(cell.path)] = reason

    def title(self, cell):
        """Which of how many it is, and what."""
        return f"[{self.places[cell.path]}/{len(self.cells)}] {cell}"

    def done(self, cell, metrics):
        """A cell has its result; where cells are shared out, a line says so and what is left."""
        value = self.results[str(cell.path)] = metrics.get(cell.metric)
        if self.together:
            return
        seconds, self.ended = time.monotonic() - self.ended, time.monotonic()
        left = tqdm.format_interval((self.ended - self.began) * self.ahead)
        score = f"{cell.metric} {'undefined' if value is None else f'{value:.3f}'}"
        score = score if metrics else "written"
        # In one piece: unbuffered processes would glue their lines together.
        line = f"{self.title(cell)}: {score}, {seconds:.1f} s, {left} left\n"
        clear = "" if self.env.main or not sys.stdout.isatty() else "\r\x1b[K"  # the main one's bar
        tqdm.write(clear + line, end="")

    def finish(self, cells):
        """Once every process is through, or Stopped is raised on all: prints means ± sd over seeds
        (how many) of all cells, and why cells failed; returns the exit status.
        """
        found = self.results, self.failures, self.stopped and self.stopped.args
        for results, failures, stop in gathered(found, self.env):
            self.results |= results
            self.failures |= failures
            if stop:
                raise Stopped(*stop)
        if not self.env.main:
            return 0
        columns, values = [], {}
        for cell in cells:
            if str(cell.path) in self.results:
                column = console.counted(cell.shots, "shot") if cell.shots else "full"
                columns += [] if column in columns else [column]
                metric = cell.metric + " (validation)" * cell.kind.endswith("-validation")
                row = values.setdefault((cell.target.name, cell.network.name, metric), {})
                row.setdefault(column, []).append(self.results[str(cell.path)])
        rows = []
        for about, by_column in values.items():
            rows.append([*about])
            for column in columns:
                scores = [score for score in by_column.get(column, ()) if score is not None]
                text = f"{np.mean(scores):.3f}" if scores else ""
                text += f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
                rows[-1].append(f"{text} ({len(scores)})" if scores else "")
        if any(cell.kind != "features" for cell in cells):
            console.print_table(rows, ["target", "source-model", "metric", *columns])
        if self.failures:
            failed = console.counted(len(self.failures), "cell")
            print(f"{failed} failed; the same command tries again:")
            for path, reason in self.failures.items():
                print(f"{path}: {reason}")
        return int(bool(self.failures))

    def dry_run(self, cells, create_model):
        """Prints all cells, and how long what is unfinished would take without decoding: a training
        step of each network is timed. create_model: name -> a network on the device.
        """

        @functools.cache
        def speed(name, crop, batch, flops, precision):
            create, env = functools.partial(create_model, name), self.env.computing(precision)
            work = functools.partial(flops_per_second, create().train(), batch, crop, flops, env)
            return in_parts(work, create, crop, batch, env.alone(), wanted=1)

        each, busy = {}, [0.0] * (1 if self.together else self.env.ranks)
        for job in self.jobs:
            config = job[0].config
            batch = config.get("batch_size", 128) // (self.env.ranks if self.together else 1)
            batch = batch if self.env.device.type == "cuda" else min(batch, 32)
            about = config["model"], config["crop"], batch, job[0].flops, config["precision"]
            needed = operations(job) / speed(*about)
            each |= {cell.path: needed / len(job) for cell in job}
            heapq.heapreplace(busy, busy[0] + needed)
        if not self.env.main:
            return
        groups = {}
        for cell in cells:
            key = cell.target.name, cell.network.name, cell.shots or "full"
            groups.setdefault(key, []).append(cell.path)
        rows = []
        for key, paths in groups.items():
            left = [each[path] for path in paths if path in each]
            rows.append([*key, len(paths), len(paths) - len(left), f"{sum(left):.0f}"])
        header = ["target", "source-model", "shots", "cells", "finished", "seconds for the rest"]
        console.print_table(rows, header)
        total = max(busy) / (self.env.ranks if self.together else 1)
        processes = "one process" if self.env.ranks == 1 else f"{self.env.ranks} processes"
        print(f"about {tqdm.format_interval(total)} on {processes}")


def operations(job):
    """Floating-point operations of a job, about: forward passes, and training as three of them."""
    config = job[0].config
    images = config["test_images"] + max(cell.config["images"] for cell in job)
    if "steps" in config:
        images = config["test_images"] + 3 * config["steps"] * config["batch_size"]
    return images * job[0].flops
