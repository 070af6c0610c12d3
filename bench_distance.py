"""The benchmark of distances: do they follow a gap that is known, and what do they cost?"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import console
import data
import distance
import engine
import models
import transfer
import transforms
from measure import Report

# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


def projected(model, dataset, pipeline, indices, env, normalization, batch_size=256):
    """What the network's classifier reads of these images, projected: (n, DIMENSIONS) float32."""
    model.eval()
    features = []
    for start in range(0, len(indices), batch_size):
        batch = [pipeline.read(dataset, i) for i in indices[start : start + batch_size]]
        with torch.inference_mode(), env.autocast():
            inputs = engine.to_input(torch.stack(batch), normalization, env.device)
            features.append(model.features(inputs).float().cpu())
    return distance.project(torch.cat(features))


def source_sample(model, train_set, image_size, env):
    """The sample of a source that its networks are to carry: its training images, as at test."""
    own_size = train_set.size is not None
    pipeline = transforms.pretraining_pipeline(train_set.domain, image_size, False, own_size)
    chosen = distance.sample(len(train_set))
    normalization = transforms.NORMALIZATION[train_set.domain]
    return projected(model, train_set, pipeline, chosen, env, normalization)


def target_sample(model, train_set, normalization, env):
    """Half as many training images of a synthetic target."""
    chosen = distance.sample(len(train_set), distance.SAMPLE // 2)
    pipeline = transforms.Pipeline(transforms.keep, transforms.keep)
    return projected(model, train_set, pipeline, chosen, env, normalization)


# ------------------------------------------------------------------------------------------------
# distance: synthetic targets at known gaps
# ------------------------------------------------------------------------------------------------

GAPS = (0, 0.2, 0.4, 0.6, 0.8, 1)
MEASURES = ("frechet_relative", "energy")
TARGETS = {"natural": "synthetic-natural-target", "medical": "synthetic-xray-target"}
# Of each measure and network: rank correlation with the gap, smallest step from one gap to the next
# in units of its spread over seeds, time of a transfer in units of the distance's.
RANKS, STEPS, TIME = 0.95, 3, 20


def distance_options(parser):
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="PATH", help="run folders of synthetic sources "
        "(default: those in runs/)")  # fmt: skip
    add("--seeds", type=console.positive(int), default=10, help="draws of each target's images")
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")


def measure_distance(args, env):
    """Distances of synthetic targets from each network's own source, from gap 0 to 1 of the target.

    Each row: mean ± standard deviation over seeds, other images each. A step is what a measure
    gains from a gap to the next, its spread the larger standard deviation of the two gaps. The time
    of a distance, without reading the images, is compared with that of one run of fewshot.py.
    """
    folders = args.checkpoint or sorted(str(p.parent) for p in Path("runs").glob("*/model.pt"))
    if not folders:
        raise FileNotFoundError("no run in runs/; run pretrain.py first, or give --checkpoint")
    opened = [_open(folder, env) for folder in folders]
    rows, required, values = [], [], {}
    for folder, (model, record, source) in zip(folders, opened):
        console.say(env, f"measuring: {folder}")
        name = f"{record['source']}-{record['name']}"
        name = name if name not in values else folder
        table = _distances(model, record, source, args.seeds, env)
        rows += _rows(name, table)
        for measure in MEASURES:
            required += _required(f"{measure} of {name}", np.array(table[measure]))
        seconds = _seconds(folder, model, record, source, args.rounds, env)
        required.append(
            (
                f"a transfer of {name}",
                "its distance",
                seconds["transfer"] / seconds["distance"],
                TIME,
            )
        )
        values[name] = table | {"seconds": seconds}
    header = ["network", "measure", *(f"gap {gap}" for gap in GAPS)]
    return Report({"gaps": GAPS, "measured": values}, header, rows, required)


def _open(folder, env):
    """(network, what model.pt says of it, the sample of its source) of a run folder."""
    path = Path(folder)
    record = models.read_weights(path / "model.pt")
    config = json.loads((path / "result.json").read_text())["config"]
    if data.base_name(config["source"]) not in ("synthetic-natural", "synthetic-xray"):
        raise ValueError(f"{folder}: its source is {config['source']}; give runs of synthetic ones")
    model = models.create_model(record["name"], len(record["classes"]))
    models.load_weights(model, path / "model.pt")
    model = models.place(model, env.device)
    train_set = data.load_dataset(
        config["source"], size=config["image_size"], fraction=config["fraction"],
        fraction_seed=config["seed"],
    )  # fmt: skip
    return model, record, source_sample(model, train_set, config["image_size"], env)


def _distances(model, record, source, seeds, env):
    """{measure: a row a gap, a column a seed}."""
    table = {measure: [[] for _ in GAPS] for measure in MEASURES}
    normalization = tuple(record["mean"]), tuple(record["std"])
    with engine.progress_bar(env, len(GAPS) * seeds, title=record["source"], unit="target") as bar:
        for row, gap in enumerate(GAPS):
            for seed in range(seeds):
                target = data.load_dataset(
                    TARGETS[record["domain"]], seed=seed, size=record["image_size"], gap=gap
                )
                sample = target_sample(model, target, normalization, env)
                result = distance.compare(source, sample)
                for measure in MEASURES:
                    table[measure][row].append(result[measure])
                if bar is not None:
                    bar.update()
    return table


def _rows(name, table):
    for measure in MEASURES:
        values = np.array(table[measure])
        yield [name, measure, *(f"{v.mean():.3f} ± {_spread(v):.3f}" for v in values)]


def _spread(values):
    return values.std(axis=-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])


def _required(what, values):
    """The requirements of (gaps, seeds) values: rank correlation, and steps beside their spread."""
    gaps = np.repeat(np.arange(len(values)), values.shape[1])
    ranks = rank_correlation(gaps, values.ravel())
    yield f"ranks of {what}", "ranks of the gap", ranks, RANKS
    if values.shape[1] > 1:
        spread, steps = _spread(values), np.diff(values.mean(1))
        smallest = float((steps / np.maximum(spread[1:], spread[:-1])).min())
        yield f"smallest step of {what}", "spread over seeds", smallest, STEPS
        extent = np.ptp(values, axis=1)
        smallest = float((steps / np.maximum(extent[1:], extent[:-1])).min())
        yield f"smallest step of {what}", "largest less smallest of the seeds", smallest, 0


def rank_correlation(x, y):
    """Spearman's, ties sharing their mean rank: float."""
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def _seconds(folder, model, record, source, rounds, env):
    """Of fine-tuning on 10 images a class, evaluation included, and of a distance: the fastest."""
    name = TARGETS[record["domain"]]
    normalization = tuple(record["mean"]), tuple(record["std"])
    with tempfile.TemporaryDirectory() as out:
        parser = console.Parser("")
        transfer.add_options(parser)
        options = ["--checkpoint", folder, "--target", name, "--out", out]
        options = parser.parse_args([*options, "--image-size", str(record["image_size"])])
        options.seeds = 1
        targets = transfer.open_targets(options, env)
        (cell,) = transfer.make_grid(options, env, targets, [10])
        target = targets[name]
        arms = {
            "transfer": lambda: transfer.run_cell(cell, target, "fewshot", env, None),
            "distance": lambda: distance.compare(
                source, target_sample(model, target.train_set, normalization, env)
            ),
        }
        seconds = dict.fromkeys(arms, float("inf"))
        for _ in range(rounds):
            for arm, run in arms.items():
                began = time.perf_counter()
                run()
                seconds[arm] = min(seconds[arm], time.perf_counter() - began)
    return seconds
