"""Speed and memory beside peers: the same work by this project and by what one would else take.

    python -m benchmarks train           # one training step: ours and timm's, eager and compiled
    python -m benchmarks train --peers   # the same from files to the loss, with timm's own loader
    python -m benchmarks gpu             # on a GPU: what agrees with a CPU, and how fast it is
    python -m benchmarks memory          # the peak of one step of R152x4, plain and checkpointed
    python -m benchmarks scaling         # two processes of one thread beside one: pre-training
    python -m benchmarks grid            # the same: the cells of a few-shot grid
    python -m benchmarks load            # from files to batches: decoding, packs, folders
    python -m benchmarks index           # the index of a dataset: mimic's tables, 14 million paths
    python -m benchmarks linear          # logistic regression on frozen features
    python -m benchmarks distance        # distances of targets at known gaps, and what they cost

All arms of a benchmark take turns in one process, so that noise of the machine meets all alike.
"""

import sys
from collections.abc import Callable
from inspect import getdoc
from typing import NamedTuple

import torch

from benchmarks.distance import distance
from benchmarks.gpu import gpu
from benchmarks.index import index
from benchmarks.linear import linear
from benchmarks.loading import load
from benchmarks.memory import memory
from benchmarks.processes import grid, scaling
from benchmarks.train import train
from engine.console import Parser, number, one_of, print_table, write_json
from engine.processes import environment, run_script, setup
from models import MODELS

NUMBER = number(int, 1)
# {flag: settings of add_argument}
OPTIONS = {
    "--model": dict(help=f"network: {', '.join(MODELS)}"),
    "--image-size": dict(type=NUMBER, help="side in pixels"),
    "--batch-size": dict(type=NUMBER, help="images a step, of each process"),
    "--classes": dict(type=NUMBER, help="outputs of the network"),
    "--rounds": dict(type=NUMBER, help="turns an arm; the best counts"),
    "--steps": dict(type=NUMBER, help="training steps a turn"),
    "--threads": dict(type=NUMBER, help="threads of the CPU, the same for all packages"),
    "--no-compile": dict(action="store_true", help="leave out the compiled arms, minutes each"),
    "--peers": dict(action="store_true", help="from files to the loss, with each one's own loader"),
    "--folder": dict(metavar="PATH", help="train/CLASS/* (default: 640 JPEGs are made)"),
    "--data-dir": dict(metavar="DIR", help="holds nih (default: 32 X-rays of 1024 px are made)"),
    "--checkpoint": dict(
        nargs="+", metavar="PATH", help="run folders of synthetic sources (default: those in runs/)"
    ),
    "--seeds": dict(type=NUMBER, help="of six cells each; of distances: draws of the images"),
    "--shots": dict(type=NUMBER, help="training images of each of 10 classes, up to 140"),
    "--rows": dict(type=NUMBER, help="images of made mimic tables"),
    "--images": dict(type=NUMBER, help="paths in the class index"),
    "--listed": dict(type=NUMBER, help="of them files really made, to time the listing"),
    "--minutes": dict(type=number(float, 1e-12), help="for all of it"),
    "--out": dict(metavar="DIR", help="holds gpu.jsonl, a line an arm"),
    "--json": dict(metavar="PATH", help="also write the result there (default: no)"),
}


class Benchmark(NamedTuple):
    """measure: (args, env) -> Report. options: {flag: its default}; a list takes several."""

    measure: Callable
    options: dict


NETWORK = {"--model": "R50x1", "--image-size": 64, "--batch-size": 32}
TRAINING = {"--rounds": 5, "--steps": 4, "--threads": torch.get_num_threads()}
TRAINING |= {"--no-compile": False, "--peers": False, "--folder": None}
LARGEST = {"--model": "R152x4", "--image-size": 224, "--batch-size": 1, "--classes": 21_841}
INDEX = {"--rows": 377_110, "--images": 14_000_000, "--listed": 100_000, "--rounds": 3}
FITS = {"--shots": [1, 10, 100], "--threads": [1], "--rounds": 3}
BENCHMARKS = {
    "train": Benchmark(train, NETWORK | TRAINING),
    "gpu": Benchmark(gpu, {"--minutes": 10.0, "--out": "gpu"}),
    "memory": Benchmark(memory, LARGEST),
    "scaling": Benchmark(scaling, NETWORK | {"--steps": 10, "--rounds": 3}),
    "grid": Benchmark(grid, {"--seeds": 10, "--rounds": 2}),
    "load": Benchmark(load, {"--data-dir": None, "--rounds": 5}),
    "index": Benchmark(index, INDEX),
    "linear": Benchmark(linear, FITS),
    "distance": Benchmark(distance, {"--checkpoint": None, "--seeds": 10, "--rounds": 5}),
}


def main():
    about = f"{__doc__}\nBENCHMARK --help states its options."
    parser = Parser(about, prog="python -m benchmarks")
    names = {"default": "train", "help": ", ".join(BENCHMARKS)}
    parser.add_argument("benchmark", nargs="?", type=one_of(*BENCHMARKS), **names)
    name = parser.parse_args(sys.argv[1:2]).benchmark
    measure, options = BENCHMARKS[name]
    parser = Parser(getdoc(measure), prog=f"{parser.prog} {name}")
    for flag, default in (options | {"--json": None}).items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(flag, default=default, **OPTIONS[flag], **several)
    args = parser.parse_args(sys.argv[2:])
    env = setup()
    report = measure(args, env)
    print_table([map(text, row.values()) for row in report.rows], report.rows[0])
    for found in report.required:
        verdict = "reached" if found.reached else "MISSED"
        ratio = f"{found.ratio:.2f}, required {found.least:.2f}"
        print(f"{found.of} / {found.to}: {ratio}: {verdict}")
    if args.json:
        required = [found._asdict() | {"reached": found.reached} for found in report.required]
        record = {"schema": 1, "kind": f"bench-{name}", **report.values, "required": required}
        record |= {"config": vars(args), "environment": environment(env)}
        write_json(args.json, record)
    return 0 if all(found.reached for found in report.required) else 1


def text(value):
    """A cell of the table: numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    run_script(main)
