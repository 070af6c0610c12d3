"""Two processes of one thread beside one: pre-training, and the cells of a few-shot grid."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import speed_report
from readers.synthetic import WORLDS

REQUIRED = (("2 processes", "1 process", 1.8),)
CELLS = 6  # a seed, of fewshot.py with one network and its own defaults: two targets, three shots


def scaling(args, env):
    """Images a second of pretrain.py under torchrun with one process and with two, a thread each.

    Each process has the same batch, as each GPU has in the study.
    """
    arms = {"1 process": (1, args.batch_size), "2 processes": (2, 2 * args.batch_size)}
    return fastest_runs(args, pretraining_speed, arms, "images/s")


def fastest_runs(args, speed, arms, unit):
    """Report of speed(args, *setting) of {arm: setting} by turns."""
    speeds = dict.fromkeys(arms, 0.0)
    for _ in range(args.rounds):
        for name, setting in arms.items():
            speeds[name] = max(speeds[name], speed(args, *setting))
    return speed_report(speeds, "1 process", REQUIRED, unit)


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
    return fastest_runs(args, grid_speed, {"1 process": (1,), "2 processes": (2,)}, "cells/s")


def grid_speed(args, ranks):
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        options = "--checkpoint", "scratch", "--seeds", str(args.seeds)
        torchrun(ranks, "fewshot.py", *options, "--out", out)
    return CELLS * args.seeds / (time.perf_counter() - began)


def torchrun(ranks, script, *options):
    """A script of this project on so many processes of one thread, without GPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={ranks}", str(Path(__file__).parent.parent / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *options], env=environment, check=True, capture_output=True)
