"""How the benchmarks measure: all arms by turns, the best turn counts."""

import math
import time
from typing import NamedTuple

import torch

from engine.console import progress_bar


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
    """What a benchmark found. rows: of the table, {column: value} each. required: [Required]."""

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


def synchronize(device):
    """Waits for the work that was only queued, so that the clock tells when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat(work):
    """An arm, of which each step is work()."""
    while True:
        yield work()


def speed_report(speeds, peer, required, unit="images/s"):
    """Report of {arm: images, or what else `unit` says, a second}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    ratio, found = f"ratio to {peer}", []
    rows = [{"arm": name, unit: v, ratio: v / speeds[peer]} for name, v in speeds.items()]
    for numerator, denominator, least in required:
        over, under = fastest(speeds, numerator), fastest(speeds, denominator)
        found.append(Required(over, under, speeds[over] / speeds[under], least))
    return Report(rows, found)


def fastest(speeds, prefix):
    return max((name for name in speeds if name.startswith(prefix)), key=speeds.get)
