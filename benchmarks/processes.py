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

CELLS = 6  # a seed, of fewshot.py with one network and its own defaults: two targets, three shots


def scaling(args, env):
    """Images a second of pretrain.py under torchrun with one process and with two, a thread each:
    the fastest two steps of a short run, after the first two.

    Each process has the same batch, as each GPU has in the study.
    """

    def speed(ranks, out):
        batch_size = ranks * args.batch_size
        epochs = (args.steps + 2) * batch_size / WORLDS["synthetic-natural"].train
        options = f"--model {args.model} --image-size {args.image_size} --batch-size {batch_size}"
        torchrun(ranks, f"pretrain.py {options} --epochs {epochs} --warmup 0 --log-every 2", out)
        (log,) = Path(out).glob("*/log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return max(x["images_per_second"] for x in lines if "loss" in x and x["step"] > 2)

    return two_beside_one(args.rounds, speed, "images/s")


def grid(args, env):
    """Cells a second of fewshot.py under torchrun with one process and with two, a thread each:
    the whole command, from its start to its closing table.
    """

    def speed(ranks, out):
        began = time.perf_counter()
        torchrun(ranks, f"fewshot.py --checkpoint scratch --seeds {args.seeds}", out)
        return CELLS * args.seeds / (time.perf_counter() - began)

    return two_beside_one(args.rounds, speed, "cells/s")


def two_beside_one(rounds, speed, unit):
    """speed_report of speed(ranks, temporary folder) by turns."""
    speeds = {"1 process": 0.0, "2 processes": 0.0}
    for _ in range(rounds):
        for ranks, name in enumerate(speeds, 1):
            with tempfile.TemporaryDirectory() as out:
                speeds[name] = max(speeds[name], speed(ranks, out))
    return speed_report(speeds, "1 process", [("2 processes", "1 process", 1.8)], unit)


def torchrun(ranks, line, out):
    """A script of this project with its options, on processes of one thread, without GPUs."""
    script, *options = line.split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={ranks}", Path(__file__).parent.parent / script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, *options, "--out", out]
    subprocess.run(command, env=environment, check=True, capture_output=True)
