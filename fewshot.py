"""Few-shot transfer: targets x shots x seeds x networks, on a few images a class.

    python fewshot.py                     # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 fewshot.py --checkpoint runs/* scratch --target cifar10 pets \\
        --shots 1 5 10 full --seeds 5
    python fewshot.py --method linear     # logistic regression on frozen features instead
    python fewshot.py --method features   # these features of all images, as a file
    python fewshot.py --eval-only --checkpoint runs/chexpert-R50x1 --target nih    # no training

Each cell writes results/TARGET/SOURCE-MODEL/Nshot-seedS.json (…-METHOD.json on frozen features,
full-seedS.json on all images) when it is finished; started again, the script does what is missing.
The processes of torchrun share the cells out, the longest first. At its end it prints means and
standard deviations over seeds, and names the cells that failed (status 1).
"""

import time

import numpy as np
import torch

import data
import models
from engine import linear, options
from engine.console import say
from engine.grid import PATIENCE, Grid, open_networks, unfinished, write_result
from engine.metrics import compute_metrics
from engine.outputs import image_names, save_arrays, save_predictions
from engine.processes import StopSignal, run_script, setup
from engine.weights import weights_of
from readers.labels import images_by_class
from transfer import (
    DEFAULTS,
    FLAGS,
    HELP,
    extract,
    fine_tune,
    make_cell,
    measure_distance,
    open_network,
    open_targets,
)

# Options of training, which mean nothing on frozen features; nor do these where nothing is drawn.
TRAINING = ("recipe", "steps", "lr", "batch_size", "balanced", "compile")
DRAWING = ("shots", "seeds")


def frozen_features(cell, args, env):
    """(training features (N,D), those of the test set (M,D), seconds that they took), float32 on
    the device; taken once for each network and target.
    """
    network, target = cell.network, cell.target
    found, began = target.features.get(network.name), time.monotonic()
    if not found:
        try:
            model = load_network(network, env)
            measure_distance(model, cell, args, env)
            found = [extract(model, cell, part, args, env) for part in (target.train, target.test)]
            found.append(time.monotonic() - began)
        except (ValueError, OSError) as error:  # of a broken image, say: the same for every cell
            found = error.with_traceback(None)
        target.features = {network.name: found}  # of one at a time
    if isinstance(found, Exception):
        raise found
    return found


def load_network(network, env, outputs=0):
    """The network on the device; outputs: of its own head, else it has none of use."""
    if not network.path:
        return models.create_model(network.model, 1, device=env.device)
    with torch.device("meta"):  # initialising what is loaded anyway takes as long as loading
        model = models.create_model(network.model, outputs or 1)
    model.to_empty(device="cpu")
    content, _ = weights_of(network.path, network.digest)
    models.load_weights(model, network.path, content, head=outputs > 0)
    return models.place(model, env.device)


def classify(cell, signals, args, env):
    """Fits a classifier of linear.CLASSIFIERS, which centres and scales features itself, on the
    network's frozen features of the cell's images, and evaluates it on the test set. Returns
    (metrics, what the result file says of the fit).
    """
    signals.raise_if_agreed()
    target, test_set = cell.target, cell.target.test_set
    train_features, test_features, seconds = frozen_features(cell, args, env)
    began, rows = time.monotonic(), target.rows(cell)
    fit = linear.CLASSIFIERS[cell.method]
    labels, classes = target.train[0].labels[rows], len(test_set.classes)
    logits, facts = fit(train_features[rows], labels, test_features, classes)
    metrics = compute_metrics(logits, test_set.labels, test_set.classes, groups=test_set.groups)
    save_predictions(cell, logits)
    about = {"images": len(rows), "steps": None, "seconds": time.monotonic() - began}
    return metrics, about | {"images_per_second": None, **facts, "features_seconds": seconds}


def write_features(cell, signals, args, env):
    """Writes the frozen features of all images, with labels and names, to one .npz."""
    signals.raise_if_agreed()
    *found, seconds = frozen_features(cell, args, env)
    arrays = {"classes": np.array(cell.target.test_set.classes)}
    for split, features in zip(data.SPLITS, found):
        dataset = getattr(cell.target, f"{split}_set")
        arrays[f"{split}_features"] = features.cpu().numpy()
        arrays[f"{split}_labels"], arrays[f"{split}_names"] = dataset.labels, image_names(dataset)
    save_arrays(cell.own_file("features"), **arrays)
    return {}, {"features_seconds": seconds}


def evaluate_only(cell, signals, args, env):
    """Evaluates the network as it is, by the classes that its head and the test set share."""
    signals.raise_if_agreed()
    network, test_set, shared = cell.network, cell.target.test_set, cell.config["labels"]
    began, classes = time.monotonic(), network.classes or shared
    model = load_network(network, env, len(classes))
    measure_distance(model, cell, args, env)
    own = [classes.index(name) for name in shared]
    logits = extract(model, cell, cell.target.test, args, env, logits=True)[:, own]
    labels = test_set.labels
    if test_set.task == "multilabel":
        labels = labels[:, [test_set.classes.index(name) for name in shared]]
    metrics = compute_metrics(logits, labels, shared, groups=test_set.groups)
    save_predictions(cell, logits, labels, shared)
    return metrics, {"images": 0, "steps": None, "seconds": time.monotonic() - began}


# (cell, signals, args, env) -> (metrics, what the result file says of the training)
METHODS = {"finetune": fine_tune, "features": write_features, "eval": evaluate_only}
METHODS |= dict.fromkeys(linear.CLASSIFIERS, classify)


def main():
    changes = {"method": dict(default="finetune", **options.words(*METHODS))}
    changes["shots"] = options.number_or("full")
    flags = f"{FLAGS} --shots --method --eval-only"
    args = options.parse(f"{__doc__}\n{HELP}", flags, **DEFAULTS | changes)
    if args.eval_only and args.method not in ("finetune", "eval"):
        raise ValueError(f"--eval-only: trains nothing; leave out it, or --method {args.method}")
    args.method = "eval" if args.eval_only else args.method
    frozen, once = args.method != "finetune", args.method in ("features", "eval")
    kept = {"finetune": ("predictions", "model"), "features": ()}.get(args.method, ("predictions",))
    useless = TRAINING * frozen + DRAWING * once
    refused = [f"--{o.replace('_', '-')}" for o in useless if getattr(args, o)]
    refused += [f"--save {what}" for what in args.save or () if what not in kept]
    if refused:
        raise ValueError(f"{refused[0]} means nothing for --method {args.method}; leave it out")
    if args.method == "features":
        args.save = ["features"]
    env = setup(args.precision, PATIENCE)
    alone = env.alone()  # each cell is run by one process
    wanted = args.shots or (["full"] if once else [1, 10, 100])
    shot_counts = sorted({shots for shots in wanted if shots != "full"})
    if "full" in wanted:
        shot_counts.append(None)
    seeds = args.seeds or range(args.seed, args.seed + (1 if once else 3))
    targets = open_targets(args, env)
    networks, cells = open_networks(args, open_network, env), []
    if args.method == "eval" and not args.image_size:  # at that which they were trained at
        sizes = {network.image_size for network in networks}
        if len(sizes) > 1:
            raise ValueError(f"--eval-only: networks of sides {sizes}; give one as --image-size")
        (args.image_size,) = sizes
    for target in targets:
        labels, classes = target.train_set.labels, target.train_set.classes
        counts = images_by_class(labels, len(classes))
        empty = [name for name, count in zip(classes, counts) if not count]
        if empty and any(shot_counts):
            without = ", ".join(empty)
            say(env, f"{target.name}: no training image shows {without}; no shots of it are drawn")
        for shots in shot_counts:  # None: all images
            for seed in seeds:
                chosen = np.arange(len(labels) if args.method != "eval" else 0)
                if shots:  # of each class (more hold the fewer), or of each finding at least
                    chosen = data.few_shot_indices(labels, shots, seed, classes)
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
