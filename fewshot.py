"""Few-shot transfer: the grid of checkpoints x targets x shots x seeds, on a few images a class.

    python fewshot.py                     # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 fewshot.py --checkpoint runs/* scratch --target cifar10 pets \\
        --shots 1 5 10 --seeds 5
    python fewshot.py --method linear     # logistic regression on frozen features instead

Each cell writes results/TARGET/SOURCE-MODEL/Nshot-seedS.json when it is finished; started again,
the script does what is missing. The processes of torchrun share the cells out, the longest first;
a cell that fails is named at the end and stops no other.
"""

import grid
from engine import console
from engine import grid as runner
from engine import processes as engine


def main():
    parser = console.Parser(__doc__)
    grid.add_options(parser)
    parser.add_argument("--shots", type=console.positive(int), nargs="+", default=[1, 10, 100],
        help="training images of each class; the study: 1 5 10 100 500")  # fmt: skip
    parser.add_argument("--seeds", type=console.positive(int), default=3,
        help="runs of each, on other images with another head; the study: 5")  # fmt: skip
    args = parser.parse_args()
    env = engine.setup(args.precision, runner.PATIENCE)
    targets = grid.open_targets(args, env, few_shot=True)
    cells = grid.make_grid(args, env.alone(), targets, sorted(set(args.shots)))
    return runner.run(cells, targets, args, env)


if __name__ == "__main__":
    engine.run(main)
