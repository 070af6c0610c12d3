"""How the benchmarks measure: all arms by turns, each memory in a process of its own."""

import importlib
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from engine.console import progress_bar
from engine.memory import proc_bytes


class Required(NamedTuple):
    """That `of` is at least `least` times as much as `to`; ratio: what was found."""

    of: str
    to: str
    ratio: float
    least: float

    @property
    def reached(self):
        return self.ratio >= self.least


class Report(NamedTuple):
    """What a benchmark found. values: for the record. rows: of the table, {column: value} each."""

    values: dict
    rows: list
    required: list


def best_speeds(arms, rounds, steps, images, env, clock=time.perf_counter):
    """{name: images a second} of each arm's fastest round.

    arms: {name: iterator}, of which each next() is a step of `images` images. In each round every
    arm takes its turn of `steps` steps. The best round counts: other work on a machine only ever
    slows one down.
    """
    best = dict.fromkeys(arms, math.inf)
    with progress_bar(env, rounds * len(arms), title="turns", unit="turn") as bar:
        for _ in range(rounds):
            for name, arm in arms.items():
                best[name] = min(best[name], seconds(arm, steps, env.device, clock))
                bar.update()
    return {name: steps * images / spent for name, spent in best.items()}


def seconds(arm, steps, device, clock=time.perf_counter):
    """Of so many steps of an arm, and the work they queued."""
    synchronize(device)
    began = clock()
    for _ in range(steps):
        next(arm)
    synchronize(device)
    return clock() - began


def repeat(work):
    """An arm, of which each step is work()."""
    while True:
        yield work()


def synchronize(device):
    """Waits for the work that was only queued, so that the clock tells when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_report(speeds, peer, required, unit="images/s"):
    """Report of {arm: images, or what else `unit` says, a second}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    ratio = f"ratio to {peer}"
    rows = [{"arm": name, unit: v, ratio: v / speeds[peer]} for name, v in speeds.items()]
    found = []
    for numerator, denominator, least in required:
        over, under = fastest(speeds, numerator), fastest(speeds, denominator)
        found.append(Required(over, under, speeds[over] / speeds[under], least))
    return Report({unit.replace("/s", "_per_second"): speeds}, rows, found)


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
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def megabytes(field):
    """Of this process's own memory: VmHWM is its peak, RssAnon what it alone holds."""
    return proc_bytes("/proc/self/status", field) / 1e6


def timed(work):
    """(what work() returns, {"seconds", "megabytes"} that it took)."""
    before, began = megabytes("VmHWM"), time.perf_counter()
    result, spent = work(), time.perf_counter() - began
    return result, {"seconds": spent, "megabytes": max(megabytes("VmHWM") - before, 0.1)}
