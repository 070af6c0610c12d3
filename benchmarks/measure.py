"""How the benchmarks measure: all arms by turns, the best turn counts."""

import math
import time

import torch

from engine.console import progress_bar


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
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = clock()
    for _ in range(steps):
        next(arm)
    synchronize()
    return clock() - began


def bound(of, to, ratio, least):
    """A line of a report: that `of` is at least `least` times `to`; ratio: what was found."""
    return {"of": of, "to": to, "ratio": ratio, "least": least, "reached": ratio >= least}


def speed_report(speeds, peer, required, unit="images/s"):
    """(rows of the table {column: value}, [bound]) of {arm: so many `unit`}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    rows = [{"arm": k, unit: v, f"ratio to {peer}": v / speeds[peer]} for k, v in speeds.items()]
    by_speed, bounds = sorted(speeds, key=speeds.get, reverse=True), []
    for *prefixes, least in required:
        over, under = (next(k for k in by_speed if k.startswith(prefix)) for prefix in prefixes)
        bounds.append(bound(over, under, speeds[over] / speeds[under], least))
    return rows, bounds
