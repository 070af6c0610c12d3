"""The peak of memory in a training step."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from benchmarks.measure import Report, Required, seconds
from benchmarks.train import training
from engine.console import say
from engine.memory import peak_memory
from engine.processes import setup

ARMS = ("ours, fp32", "ours, bf16", "ours, checkpointed, fp32", "ours, checkpointed, bf16")
GIBIBYTES = 20.0  # that the leanest arm may take


def memory(args, env):
    """Peak memory of a process that makes the network and trains it for two steps, with AGC.

    Plain and with activations computed again in the backward pass, in fp32 and under bf16.
    """
    rows = []
    for arm in ARMS:
        say(env, f"measuring: {arm}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append({"arm": arm} | pool.submit(peak, args, arm).result())
    leanest = min(rows, key=lambda row: row["GiB"])
    ratio = GIBIBYTES / leanest["GiB"]
    return Report(rows, [Required(f"{GIBIBYTES:g} GiB", leanest["arm"], ratio, 1.0)])


def peak(args, arm):
    """Of this process, which does nothing else."""
    env = setup()
    loop = training(arm, args, env, args.classes, clipping=0.01)
    next(loop)  # makes the momentum
    step = seconds(loop, 1, env.device)
    return {"GiB": peak_memory(env.device) / 2**30, "seconds a step": step}
