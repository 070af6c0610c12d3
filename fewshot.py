"""Few-shot transfer: the grid of checkpoints x targets x shots x seeds, on a few images a class.

    python fewshot.py                     # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 fewshot.py --checkpoint runs/nih-R50x1 --target cifar10 --shots 1 10

Each cell writes results/TARGET/SOURCE-MODEL/Nshot-seedS.json when it is finished; started again,
the script does what is missing. The processes of torchrun share the cells out.
"""

import datetime
import time

import torch.distributed as dist
from tqdm import tqdm

import console
import engine
import transfer


def main():
    parser = console.Parser(__doc__)
    transfer.add_options(parser)
    parser.add_argument("--shots", type=console.positive(int), nargs="+", default=[1, 10, 100],
        help="training images of each class; the study: 1 5 10 100 500")  # fmt: skip
    parser.add_argument("--seeds", type=console.positive(int), default=3,
        help="runs of each, on other images with another head; the study: 5")  # fmt: skip
    args = parser.parse_args()
    # One process may wait long for the others at the end: the cells are shared out beforehand.
    env = engine.setup(args.precision, timeout=datetime.timedelta(days=30))
    targets = transfer.open_targets(args, env, few_shot=True)
    cells = transfer.make_grid(args, env.alone(), targets, sorted(set(args.shots)))
    todo = transfer.unfinished(cells, "fewshot")
    if env.ranks > 1:
        dist.barrier()  # every process has its list before the first result is written
    console.say(env, f"{len(cells)} cells, {len(cells) - len(todo)} finished already")
    run_cells(todo, targets, env, args.time_limit)
    if env.ranks > 1:
        dist.barrier()
    if env.main:
        transfer.report(cells, "fewshot")


def run_cells(cells, targets, env, minutes=None):
    """This process's share of the grid, one cell after the other."""
    signals, share = engine.StopSignal(env.alone(), minutes), range(env.rank, len(cells), env.ranks)
    with engine.progress_bar(env, len(share), title="cells", unit="cell") as bar:
        for number in share:
            cell, began = cells[number], time.monotonic()
            record = transfer.run_cell(cell, targets[cell.target], "fewshot", env.alone(), signals)
            accuracy = record["metrics"]["accuracy"]
            tqdm.write(
                f"[{number + 1}/{len(cells)}] {cell.target} from {cell.pretrained.name}, "
                f"{cell.shots} shots, seed {cell.seed}: accuracy {accuracy:.3f}, "
                f"{time.monotonic() - began:.1f} s"
            )
            if bar is not None:
                bar.update()


if __name__ == "__main__":
    engine.run(main)
