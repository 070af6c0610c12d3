"""Full-shot transfer: fine-tunes pre-trained networks on targets with the BiT-HyperRule.

    python transfer.py                    # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 transfer.py --checkpoint runs/nih-R50x1 scratch --target cifar10
    python transfer.py --method linear    # logistic regression on frozen features instead

Each run of the grid checkpoints x targets x seeds writes results/TARGET/SOURCE-MODEL/
full-seedS.json when it is finished; started again, the script does what is missing. The processes
of torchrun train each run together (on frozen features they share the runs out).
"""

import grid
from engine import console
from engine import grid as runner
from engine import processes as engine
from finetune import HyperRule, hyperrule  # noqa: F401


def main():
    parser = console.Parser(__doc__)
    grid.add_options(parser)
    parser.add_argument("--seeds", type=console.positive(int), default=1,
        help="runs of each, with another head and order; the study: 5")  # fmt: skip
    args = parser.parse_args()
    timeout = None if args.method == "finetune" else runner.PATIENCE
    env = engine.setup(args.precision, timeout)
    targets = grid.open_targets(args, env)
    return runner.run(grid.make_grid(args, env, targets, [None]), targets, args, env)


if __name__ == "__main__":
    engine.run(main)
