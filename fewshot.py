"""Few-shot transfer: targets x shots x seeds x networks, on a few images a class.

    python fewshot.py                     # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 fewshot.py --checkpoint runs/* scratch --target cifar10 pets \\
        --shots 1 5 10 full --seeds 5
    python fewshot.py --method linear     # logistic regression on frozen features instead

Each cell writes results/TARGET/SOURCE-MODEL/Nshot-seedS.json (…-seedS-METHOD.json on frozen
features, full-seedS.json on all images) when it is finished; started again, the script does what
is missing. The processes of torchrun share the cells out, the longest first. At its end it prints
means and standard deviations over seeds, names the cells that failed, and leaves with status 1 if
any did.
"""

import time

import numpy as np
import torch

import models
from data import few_shot_indices
from engine import linear, options
from engine.console import say
from engine.grid import PATIENCE, Grid, open_networks, unfinished, write_result
from engine.metrics import compute_metrics
from engine.processes import StopSignal, run_script, setup
from readers.labels import images_by_class
from transfer import (
    DEFAULTS,
    FLAGS,
    extract,
    fine_tune,
    make_cell,
    measure_distance,
    open_network,
    open_targets,
    read_weights,
)

# Options of training, which mean nothing on frozen features.
TRAINING = ("recipe", "steps", "lr", "batch_size", "balanced", "compile")


def classify(cell, signals, args, env):
    """Fits a classifier of linear.CLASSIFIERS on the network's frozen features of the cell's images
    and evaluates it on the test set. Features are extracted once for each network and target.

    Returns (metrics, what the result file says of the fit).
    """
    signals.raise_if_agreed()
    network, target, test_set = cell.network, cell.target, cell.target.test_set
    if network.name not in target.features:
        began = time.monotonic()
        with torch.device("meta"):  # initialising what is loaded anyway takes as long as loading
            model = models.create_model(network.model, 1)
        model.to_empty(device="cpu")
        models.load_weights(model, network.path, read_weights(network.path), head=False)
        model = models.place(model, env.device)
        measure_distance(model, cell, args, env)
        found = [extract(model, cell, part, args, env) for part in (target.train, target.test)]
        target.features = {network.name: (*found, time.monotonic() - began)}  # of one at a time
    train_features, test_features, seconds = target.features[network.name]
    began, rows = time.monotonic(), target.rows(cell)
    fit = linear.CLASSIFIERS[cell.method]
    labels, classes = target.train[0].labels[rows], len(test_set.classes)
    logits, facts = fit(train_features[rows], labels, test_features, classes)
    metrics = compute_metrics(logits, test_set.labels, test_set.classes, groups=test_set.groups)
    about = {"images": len(rows), "steps": None, "seconds": time.monotonic() - began}
    return metrics, about | {"images_per_second": None, **facts, "features_seconds": seconds}


# (cell, signals, args, env) -> (metrics, what the result file says of the training)
METHODS = {"finetune": fine_tune} | dict.fromkeys(linear.CLASSIFIERS, classify)


def main():
    changes = {
        "shots": dict(default=[1, 10, 100], **options.number_or("full")),
        "seeds": dict(default=3),
        "method": dict(default="finetune", **options.words(*METHODS)),
    }
    args = options.parse(__doc__, f"{FLAGS} --shots --method", **DEFAULTS | changes)
    frozen = args.method != "finetune"
    for option in TRAINING:
        if frozen and getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} means nothing for --method {args.method}; leave it out")
    env = setup(args.precision, PATIENCE)
    alone = env.alone()  # each cell is run by one process
    shot_counts = sorted({shots for shots in args.shots if shots != "full"})
    if "full" in args.shots:
        shot_counts.append(None)
    targets = open_targets(args, env)
    networks, cells = open_networks(args, open_network), []
    for target in targets:
        labels, classes = target.train_set.labels, target.train_set.classes
        counts = images_by_class(labels, len(classes))
        empty = [name for name, count in zip(classes, counts) if not count]
        if empty and any(shot_counts):
            without = ", ".join(empty)
            say(env, f"{target.name}: no training image shows {without}; no shots of it are drawn")
        for shots in shot_counts:  # None: all images
            for seed in range(args.seed, args.seed + args.seeds):
                chosen = np.arange(len(labels))
                if shots:
                    chosen = few_shot_indices(labels, shots, seed, classes)
                for network in networks:
                    cells.append(make_cell(network, target, shots, seed, chosen, args, alone))

    todo, results = unfinished(cells, args.out, env)
    jobs = {}  # frozen features are extracted by one process for all their cells
    for cell in todo:
        key = (cell.target.name, cell.network.name) if frozen else cell.path
        jobs.setdefault(key, []).append(cell)
    grid = Grid(jobs.values(), results, env)
    if args.dry_run:
        return grid.dry_run(cells, lambda name: models.create_model(name, 2, device=env.device))
    for target in targets:
        if mine := [cell for cell in todo if cell.target is target]:
            target.decode(mine, args, env)
    signals = StopSignal(alone, args.time_limit)
    for cell in grid:  # as processes come free, the longest first
        with grid.tolerating(cell):
            metrics, train = METHODS[args.method](cell, signals, args, alone)
            write_result(cell, metrics, train, args.workers, alone)
            grid.done(cell, metrics)
    return grid.finish(cells)


if __name__ == "__main__":
    run_script(main)
