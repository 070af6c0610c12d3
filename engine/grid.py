"""How the cells of a grid are run: by all processes together, or shared out among them."""

import contextlib
import datetime
import heapq
import itertools
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import finetune
import grid
import models
from engine import checkpoint as records
from engine import console, distance, linear, metrics
from engine import processes as engine
from engine.optimizer import make_optimizer

# A process whose share of the cells is done may wait long for the last ones of the others.
PATIENCE = datetime.timedelta(days=30)


def run(cells, targets, args, env):
    """Runs what is unfinished, and reports all; returns the exit status, 1 where cells failed.

    Full-shot fine-tuning takes all processes for each cell; all else is shared out among them.
    """
    todo = grid.unfinished(cells)
    same_list(todo, args.out, env)
    console.say(env, f"{len(cells)} cells, {len(cells) - len(todo)} finished already")
    together = args.method == "finetune" and not cells[0].shots
    if args.dry_run:
        if env.main:
            dry_run(cells, todo, env, together)
        return 0
    images = grid.decode(todo, targets, args, env)
    signals = engine.StopSignal(env if together else env.alone(), args.time_limit)
    failures, stopped = {}, None
    try:
        (run_together if together else share_out)(todo, images, env, signals, failures)
    except engine.Stopped as stop:
        stopped = stop
    if env.ranks > 1:
        found = [None] * env.ranks
        dist.all_gather_object(found, (failures, stopped and stopped.args))
        failures = {path: reason for one, _ in found for path, reason in one.items()}
        stops = [args for _, args in found if args]
        stopped = engine.Stopped(*stops[0]) if stops else None
    if stopped:
        raise stopped
    if env.main:
        report(cells)
        report_failures(failures)
    return int(env.main and bool(failures))


def same_list(cells, out, env):
    """Returns when every process has its list, before the first result is written.

    Raises ValueError on all of them unless the lists are the same.
    """
    if env.ranks > 1:
        lists = [None] * env.ranks
        dist.all_gather_object(lists, [str(cell.path) for cell in cells])
        if any(one != lists[0] for one in lists):
            raise ValueError(
                f"--out {out}: the processes find different results there; name a folder that all "
                "nodes share"
            )


@contextlib.contextmanager
def tolerating(failures, cells, errors=Exception):
    """A block whose error is noted as the reason why these cells failed, {path: reason}."""
    try:
        yield
    except errors as error:
        if isinstance(error, engine.Stopped) or os.environ.get("TRACEBACK"):
            raise
        failures.update({str(cell.path): console.one_line(error) for cell in cells})


def run_together(cells, images, env, signals, failures):
    """One cell after the other, each on all processes."""
    distances = {}
    # What one process alone meets leaves the others waiting: then the run ends, to be continued.
    errors = metrics.Diverged if env.ranks > 1 else Exception
    for number, cell in enumerate(cells):
        steps, title = cell.config["steps"], f"[{number + 1}/{len(cells)}] {cell}"
        with engine.progress_bar(env, steps, title=title) as bar:
            log = records.Log(env, None, 0, steps, bar, title)
            with tolerating(failures, [cell], errors):
                record = fine_tune(cell, images[cell.target], distances, env, signals, log, bar)
                log.evaluation(steps, record["metrics"])


def share_out(cells, images, env, signals, failures):
    """This process's share: job after job, the longest first, until one process is to stop."""
    jobs, distances = make_jobs(cells), {}
    clear = "" if env.main or not sys.stdout.isatty() else "\r\x1b[K"  # the main rank's bar
    done = np.cumsum([work(job) for job in jobs])
    place = {cell.path: number for number, cell in enumerate(itertools.chain(*jobs), 1)}
    began = ended = time.monotonic()
    with (
        engine.progress_bar(env, len(cells), title="cells", unit="cell") as bar,
        contextlib.closing(engine.shared_out(len(jobs), env)) as numbers,
    ):
        for number in numbers:
            job = jobs[number]
            results = run_job(job, images[job[0].target], distances, env.alone(), signals, failures)
            for cell, record in results:
                seconds, ended = time.monotonic() - ended, time.monotonic()
                left = tqdm.format_interval((ended - began) * (done[-1] / done[number] - 1))
                metric = main_metric(record)
                score = f"{metric} {_shown(record['metrics'][metric])}"
                which = f"[{place[cell.path]}/{len(cells)}] {cell}"
                # In one piece: unbuffered processes would glue their lines together.
                tqdm.write(f"{clear}{which}: {score}, {seconds:.1f} s, {left} left\n", end="")
            if bar is not None:
                bar.update(place[job[-1].path] - bar.n)  # those of all processes


def make_jobs(cells):
    """Lists of cells that one process runs, the longest first: those of a checkpoint and target
    that read the same frozen features; each fine-tuned cell is a job of its own.
    """
    jobs = {}
    for cell in cells:
        shared = cell.method != "finetune"
        key = (cell.pretrained.name, cell.target) if shared else cell.path
        jobs.setdefault(key, []).append(cell)
    return sorted(jobs.values(), key=work, reverse=True)


def work(job):
    """Floating-point operations of a job, about: forward passes, and training as three of them."""
    config = job[0].config
    images = config["test_images"] + max(cell.config["images"] for cell in job)
    if "steps" in config:
        images = config["test_images"] + 3 * config["steps"] * config["batch_size"]
    return images * models.forward_flops(config["model"], 1, config["crop"])


def run_job(job, images, distances, env, signals, failures):
    """Yields (cell, its record) of each cell that did not fail."""
    if job[0].method != "finetune":
        yield from classify_frozen(job, images, distances, env, signals, failures)
        return
    record = None
    with tolerating(failures, job):
        record = fine_tune(job[0], images, distances, env, signals)
    if record:
        yield job[0], record


def fine_tune(cell, images, distances, env, signals, log=None, bar=None):
    """Fine-tunes one cell and writes its result; returns the record."""
    far = measure_distance(cell, images, distances, env)
    scores, train = finetune.fine_tune(
        cell, images.train_of(cell), images.test, env, signals, log, bar
    )
    record = make_record(cell, images, scores, train, far, env)
    if env.main:
        console.write_json(cell.path, record)
        if cell.checkpoint:
            cell.checkpoint.unlink(missing_ok=True)
    return record


# ------------------------------------------------------------------------------------------------
# Frozen features
# ------------------------------------------------------------------------------------------------


def classify_frozen(job, images, distances, env, signals, failures):
    """Extracts the features of a checkpoint and target once, then fits a classifier for each cell.

    Yields (cell, record), each written.
    """
    began, features = time.monotonic(), None
    with tolerating(failures, job):
        model = body(job[0], env)
        far = measure_distance(job[0], images, distances, env, model)
        features = [extract(model, job[0], part, env) for part in (images.train, images.test)]
    seconds = time.monotonic() - began
    for cell in job if features else ():
        record = None
        with tolerating(failures, [cell]):
            scores, train = classify(cell, images, features)
            train |= {"features_seconds": seconds}
            record = make_record(cell, images, scores, train, far, env)
            console.write_json(cell.path, record)
        if record:
            yield cell, record
        if stop := signals.agreed():
            raise engine.Stopped(f"stopped by {stop[0]}", stop[1])


def classify(cell, images, features):
    """Fits the cell's classifier; features: train (N,D), test (M,D). Returns (metrics, facts)."""
    began, rows, test_set = time.monotonic(), images.rows(cell), images.test[0]
    logits, facts = linear.CLASSIFIERS[cell.method](
        features[0][rows], images.train[0].labels[rows], features[1], len(test_set.classes)
    )
    scores = metrics.compute_metrics(logits, test_set.labels, test_set.classes)
    train = {"images": len(rows), "steps": None, "seconds": time.monotonic() - began}
    return scores, train | {"images_per_second": None, **facts}


def body(cell, env):
    """The pre-trained network in eval mode; its head holds nothing."""
    with torch.device("meta"):  # initialising what is loaded anyway takes as long as loading it
        model = models.create_model(cell.pretrained.model, 1)
    model.to_empty(device="cpu")
    models.load_weights(model, cell.pretrained.path)
    return models.place(model, env.device).eval()


def extract(model, cell, part, env):
    """The network's features of part = (dataset, pipeline): (N,D) float32."""
    return engine.predict(
        model.features, model.head.conv.in_channels, *part, env, cell.pretrained.normalization,
        finetune.images_at_once(cell.config["crop"]), cell.config["workers"],
    )  # fmt: skip


def measure_distance(cell, images, distances, env, model=None):
    """How far the target is from the network's source (distance.compare); None where unknown.

    distances: what is known already, {(network, target): distance}. model: the network, where it
    has been read already.
    """
    key = cell.pretrained.name, cell.target
    if cell.pretrained.sample is None:
        return None
    if key not in distances:
        features = extract(model or body(cell, env), cell, images.sample, env)
        distances[key] = distance.compare(cell.pretrained.sample, distance.project(features))
    return distances[key]


# ------------------------------------------------------------------------------------------------
# What is said of them
# ------------------------------------------------------------------------------------------------


def make_record(cell, images, scores, train, far, env):
    """The result file's content."""
    return {
        "schema": 1,
        "kind": cell.kind,
        "source": cell.pretrained.source,
        "source_domain": cell.pretrained.domain,
        "source_images": cell.pretrained.images,
        "model": cell.pretrained.model,
        "target": cell.target,
        "target_domain": images.test[0].domain,
        "shots": cell.shots,
        "seed": cell.seed,
        "method": cell.method,
        "recipe": cell.config.get("recipe"),
        "distance": far,
        "metrics": scores,
        "train": train,
        "config": cell.config,
        "environment": engine.environment(env),
    }


def _shown(value):
    return "undefined" if value is None else f"{value:.3f}"


def main_metric(record):
    return "mean_auc" if record["target_domain"] == "medical" else "accuracy"


def report(cells):
    """Mean and standard deviation over seeds, a row a target and network, a column a shot count."""
    values, columns = {}, []
    for cell in cells:
        record = records.read_result(cell.path, cell.kind)
        if record is None:
            continue
        metric = main_metric(record)
        column = f"{cell.shots} shots" if cell.shots else "full"
        if column not in columns:
            columns.append(column)
        row = cell.target, cell.pretrained.name, metric
        values.setdefault(row, {}).setdefault(column, []).append(record["metrics"][metric])
    rows = [
        [*row, *(describe(by_column.get(column, [])) for column in columns)]
        for row, by_column in values.items()
    ]
    console.print_table(rows, ["target", "source-model", "metric", *columns])


def describe(values):
    """mean ± sd (n) of what is not None."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.3f} (1)" if values else ""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} ({len(values)})"


def report_failures(failures):
    """Which cells failed and why, at the end."""
    if failures:
        print(f"{len(failures)} cells failed; the same command tries them again:")
        for path, reason in failures.items():
            print(f"{path}: {reason}")


def dry_run(cells, todo, env, together):
    """The grid, and how long what is unfinished would take: a training step of each network is
    timed. Decoding is not counted, and processes that share cores are slower than one alone.
    """
    speeds, rows, missing = {}, [], {cell.path for cell in todo}
    jobs = make_jobs(todo)
    seconds = [work(job) / speed(job[0], speeds, env) for job in jobs]
    each = {cell.path: s / len(job) for job, s in zip(jobs, seconds) for cell in job}
    groups = {}
    for cell in cells:
        groups.setdefault((cell.target, cell.pretrained.name, cell.shots or "full"), []).append(
            cell
        )
    for key, group in groups.items():
        left = [cell for cell in group if cell.path in missing]
        time_left = sum(each[cell.path] for cell in left)
        rows.append([*key, len(group), len(group) - len(left), f"{time_left:.0f}"])
    header = ["target", "source-model", "shots", "cells", "finished", "seconds for the rest"]
    console.print_table(rows, header)
    busy = [0.0] * (1 if together else env.ranks)
    for needed in seconds:
        heapq.heappush(busy, heapq.heappop(busy) + needed)
    total = max(busy) / (env.ranks if together else 1)
    processes = "one process" if env.ranks == 1 else f"{env.ranks} processes"
    print(f"about {tqdm.format_interval(total)} on {processes}")


def speed(cell, speeds, env):
    """Floating-point operations a second of a training step (of its forward pass on features)."""
    config = cell.config
    key = config["model"], config["crop"]
    if key not in speeds:
        batch = config.get("batch_size", 128) // (1 if cell.shots else env.ranks)  # of one process
        batch = batch if env.device.type == "cuda" else min(batch, 32)
        model = models.place(models.create_model(config["model"], 2), env.device).train()
        optimizer = make_optimizer(model, 0.0)
        images = torch.zeros(batch, 3, config["crop"], config["crop"], dtype=torch.uint8)
        labels = torch.zeros(batch, dtype=torch.int64)
        best = math.inf
        for _ in range(4):  # the first is slow
            began = time.perf_counter()
            loss = engine.train_step(
                model, optimizer, images, labels, batch, 0.0, "multiclass", env,
                cell.pretrained.normalization or ((0.5,) * 3,) * 2,
            )  # fmt: skip
            float(loss)
            best = min(best, time.perf_counter() - began)
        speeds[key] = 3 * batch * models.forward_flops(config["model"], 1, config["crop"]) / best
    return speeds[key]
