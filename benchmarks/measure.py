"""How the benchmarks measure: all arms by turns, each memory in a process of its own."""

import importlib
import math
import multiprocessing
import time
from typing import NamedTuple

import torch

from engine import memory as hardware
from engine import processes as engine


def best_speeds(arms, rounds, steps, images, env, clock=time.perf_counter):
    """{name: images a second} of each arm's fastest round.

    arms: {name: callable(steps)}. In each round every arm takes its turn of `steps` steps of
    `images` images. The best round counts: other work on a machine only ever slows one down.
    """
    seconds = dict.fromkeys(arms, math.inf)
    with engine.progress_bar(env, rounds * len(arms), title="turns", unit="turn") as bar:
        for _ in range(rounds):
            for name, run in arms.items():
                _synchronize(env.device)
                began = clock()
                run(steps)
                _synchronize(env.device)
                seconds[name] = min(seconds[name], clock() - began)
                if bar is not None:
                    bar.update()
    return {name: steps * images / best for name, best in seconds.items()}


def _synchronize(device):
    """Waits for the work that was only queued, so that the clock tells when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Report(NamedTuple):
    """A benchmark's outcome: values for the record, a table, and what was required of it.

    required: [(what, against what, ratio reached, least ratio)].
    """

    values: dict
    header: list
    rows: list
    required: list


def speed_report(speeds, peer, required, unit="images/s"):
    """Report of {arm: images, or what else `unit` says, a second}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    rows = [
        [name, f"{speed:.3g}" if speed < 10 else f"{speed:.1f}", f"{speed / speeds[peer]:.2f}"]
        for name, speed in speeds.items()
    ]
    ratios = []
    for numerator, denominator, least in required:
        over, under = (fastest(speeds, prefix) for prefix in (numerator, denominator))
        ratios.append((over, under, speeds[over] / speeds[under], least))
    values = {unit.replace("/s", "_per_second"): speeds}
    return Report(values, ["arm", unit, f"ratio to {peer}"], rows, ratios)


def fastest(speeds, prefix):
    return max((name for name in speeds if name.startswith(prefix)), key=speeds.get)


def import_peer(name):
    """The peer's module. Raises ValueError with the mend when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is not installed; pip install {name}") from error


def apart(measure, *args):
    """measure(*args) in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def memory(field):
    """A figure of this process's own, in MB: VmHWM is its peak, RssAnon what it alone holds."""
    return hardware.proc_bytes("/proc/self/status", field) / 1e6


def timed(work, field="VmHWM"):
    """(what work() returns, {"seconds", "megabytes"} that it took)."""
    before, began = memory(field), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    return result, {"seconds": seconds, "megabytes": max(memory(field) - before, 0.1)}
