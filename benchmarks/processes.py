"""Two processes of one thread beside one: pre-training, and the cells of a few-shot grid."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import best_speeds, repeat, speed_report
from readers.synthetic import WORLDS

REQUIRED = (("2 processes", "1 process", 1.8),)
CELLS = 6  # a seed, of fewshot.py with one network and its own defaults: two targets, three shots


def scaling(args, env):
    """Images a second of pretrain.py under torchrun with one process and with two, a thread each.

    Each process has the same batch, as each GPU has in the study. One process with the batch of
    two shows what of the rest is owed to larger batches.
    """
    arms = {
        "1 process": (1, args.batch_size),
        "2 processes": (2, 2 * args.batch_size),
        "twice the batch on 1 process": (1, 2 * args.batch_size),
    }
    speeds = dict.fromkeys(arms, 0.0)
    for _ in range(args.rounds):
        for name, (ranks, batch_size) in arms.items():
            speeds[name] = max(speeds[name], pretraining_speed(args, ranks, batch_size))
    return speed_report(speeds, "1 process", REQUIRED)


def pretraining_speed(args, ranks, batch_size):
    """The fastest two steps of a short run, after the first two."""
    epochs = (args.steps + 2) * batch_size / WORLDS["synthetic-natural"].train
    options = f"--model {args.model} --image-size {args.image_size} --batch-size {batch_size}"
    options += f" --epochs {epochs} --warmup 0 --log-every 2"
    with tempfile.TemporaryDirectory() as out:
        torchrun(ranks, "pretrain.py", *options.split(), "--out", out)
        (log,) = Path(out).glob("*/log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return max(line["images_per_second"] for line in lines if "loss" in line and line["step"] > 2)


def grid(args, env):
    """Cells a second of fewshot.py under torchrun with one process and with two, a thread each:
    the whole command, from its start to its closing table.
    """
    arms = {"1 process": repeat(partial(run_grid, 1, args.seeds))}
    arms["2 processes"] = repeat(partial(run_grid, 2, args.seeds))
    speeds = best_speeds(arms, args.rounds, 1, CELLS * args.seeds, env)
    return speed_report(speeds, "1 process", REQUIRED, "cells/s")


def run_grid(ranks, seeds):
    with tempfile.TemporaryDirectory() as out:
        options = "--checkpoint", "scratch", "--seeds", str(seeds)
        torchrun(ranks, "fewshot.py", *options, "--out", out)


def torchrun(ranks, script, *options):
    """A script of this project on so many processes of one thread, without GPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={ranks}", str(Path(__file__).parent.parent / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *options], env=environment, check=True, capture_output=True)
