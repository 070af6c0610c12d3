"""Speed and memory beside peers: the same work by this project and by what one would else take.

    python -m benchmarks train           # one training step: ours and timm's, eager and compiled
    python -m benchmarks train --peers   # the same from files to the loss, with timm's own loader
    python -m benchmarks gpu             # on a GPU: what agrees with a CPU, and how fast it is
    python -m benchmarks grid            # cells of a few-shot grid: two processes beside one
    python -m benchmarks load            # from files to batches: decoding, packs, folders, tables

All arms of a benchmark take turns in one process, so that noise of the machine meets all alike.
"""

import sys
from inspect import getdoc

import torch

from benchmarks.gpu import gpu, grid
from benchmarks.loading import load
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
    "--rounds": dict(type=NUMBER, help="turns an arm; the best counts"),
    "--steps": dict(type=NUMBER, help="training steps a turn"),
    "--threads": dict(type=NUMBER, help="threads of the CPU, the same for all packages"),
    "--no-compile": dict(action="store_true", help="leave out the compiled arms, minutes each"),
    "--peers": dict(action="store_true", help="from files to the loss, with each one's own loader"),
    "--folder": dict(metavar="PATH", help="train/CLASS/* (default: 640 JPEGs are made)"),
    "--seeds": dict(type=NUMBER, help="of six cells each"),
    "--rows": dict(type=NUMBER, help="images of made mimic tables"),
    "--minutes": dict(type=number(float, 1e-12), help="for all of it"),
    "--out": dict(metavar="DIR", help="holds gpu.jsonl, a line an arm"),
    "--json": dict(metavar="PATH", help="also write the result there (default: no)"),
}
NETWORK = {"--model": "R50x1", "--image-size": 64, "--batch-size": 32}
TRAINING = {"--rounds": 5, "--steps": 4, "--threads": torch.get_num_threads()}
TRAINING |= {"--no-compile": False, "--peers": False, "--folder": None}
# {benchmark, (args, env) -> (rows of the table, bounds): {flag: its default}}
BENCHMARKS = {
    train: NETWORK | TRAINING,
    gpu: {"--minutes": 10.0, "--out": "gpu"},
    grid: {"--seeds": 10, "--rounds": 2},
    load: {"--rows": 377_110, "--rounds": 5},
}


def main():
    parser = Parser(f"{__doc__}\nBENCHMARK --help states its options.", prog="python -m benchmarks")
    names = {measure.__name__: measure for measure in BENCHMARKS}
    settings = {"default": "train", "help": ", ".join(names)}
    parser.add_argument("benchmark", nargs="?", type=one_of(*names), **settings)
    name = parser.parse_args(sys.argv[1:2]).benchmark
    measure = names[name]
    parser = Parser(getdoc(measure), prog=f"{parser.prog} {name}")
    for flag, default in (BENCHMARKS[measure] | {"--json": None}).items():
        parser.add_argument(flag, default=default, **OPTIONS[flag])
    args = parser.parse_args(sys.argv[2:])
    env = setup()
    try:
        rows, bounds = measure(args, env)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install {error.name}") from error
    print_table([map(text, row.values()) for row in rows], rows[0])
    for found in bounds:
        verdict = "reached" if found["reached"] else "MISSED"
        ratio = f"{found['ratio']:.2f}, required {found['least']:.2f}"
        print(f"{found['of']} / {found['to']}: {ratio}: {verdict}")
    if args.json:
        record = {"schema": 1, "kind": f"bench-{name}", "rows": rows, "required": bounds}
        write_json(args.json, record | {"config": vars(args), "environment": environment(env)})
    return 0 if all(found["reached"] for found in bounds) else 1


def text(value):
    """A cell of the table: numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"
    return "" if value is None else value


if __name__ == "__main__":
    run_script(main)
