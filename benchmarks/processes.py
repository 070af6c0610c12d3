"""Two processes of one thread beside one: the cells of a few-shot grid."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import speed_report

CELLS = 6  # a seed, of fewshot.py with one network and its own defaults: two targets, three shots


def grid(args, env):
    """Cells a second of fewshot.py under torchrun with one process and with two, a thread each:
    the whole command, from its start to its closing table.
    """
    speeds = {"1 process": 0.0, "2 processes": 0.0}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(args.rounds):
        for ranks, name in enumerate(speeds, 1):
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={ranks}", Path(__file__).parent.parent / "fewshot.py"]
            words = f"--checkpoint scratch --seeds {args.seeds} --out".split()
            with tempfile.TemporaryDirectory() as out:
                began, command = time.perf_counter(), [*launch, *words, out]
                subprocess.run(command, env=environment, check=True, capture_output=True)
                speed = CELLS * args.seeds / (time.perf_counter() - began)
            speeds[name] = max(speeds[name], speed)
    return speed_report(speeds, "1 process", [("2 processes", "1 process", 1.8)], "cells/s")
