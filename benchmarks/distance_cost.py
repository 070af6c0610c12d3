"""The benchmark of distances: do they follow a gap that is known, and what do they cost?"""

import itertools
import tempfile
from pathlib import Path

import numpy as np

import data
import grid
import models
from benchmarks.measure import Report, best_speeds
from engine import console, distance
from engine import grid as runner
from engine import processes as engine
from readers import transforms

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
    of a distance, without reading the images, is compared with that of a run of fewshot.py that
    measures it; the other runs of that network and target take it from there.
    """
    folders = args.checkpoint or sorted(str(p.parent) for p in Path("runs").glob("*/model.pt"))
    if not folders:
        raise FileNotFoundError("no run in runs/; run pretrain.py first, or give --checkpoint")
    opened = [_open(folder, env) for folder in folders]
    rows, required, values = [], [], {}
    for folder, (model, record) in zip(folders, opened):
        console.say(env, f"measuring: {folder}")
        name = f"{record['source']}-{record['name']}"
        name = name if name not in values else folder
        table = _distances(model, record, args.seeds, env)
        rows += _rows(name, table)
        for measure in MEASURES:
            required += _required(f"{measure} of {name}", np.array(table[measure]))
        seconds = _seconds(folder, record, args.rounds, env)
        ratio = seconds["transfer"] / seconds["distance"]
        required.append((f"a transfer of {name}", "its distance", ratio, TIME))
        values[name] = table | {"seconds": seconds}
    header = ["network", "measure", *(f"gap {gap}" for gap in GAPS)]
    return Report({"gaps": GAPS, "measured": values}, header, rows, required)


def _open(folder, env):
    """(network, what model.pt says of it) of a run folder of a synthetic source."""
    file = Path(folder) / "model.pt"
    record = models.read_weights(file)
    if not record["source"].startswith("synthetic-") or record.get("sample") is None:
        raise ValueError(f"{folder}: no sample of a synthetic source in it; run pretrain.py again")
    model = models.create_model(record["name"], len(record["classes"]))
    models.load_weights(model, file)
    return models.place(model, env.device).eval(), record


def _distances(model, record, seeds, env):
    """{measure: a row a gap, a column a seed}."""
    table = {measure: [[] for _ in GAPS] for measure in MEASURES}
    normalization = tuple(record["mean"]), tuple(record["std"])
    pipeline = transforms.Pipeline(transforms.keep, transforms.keep)
    with engine.progress_bar(env, len(GAPS) * seeds, title=record["source"], unit="target") as bar:
        for (row, gap), seed in itertools.product(enumerate(GAPS), range(seeds)):
            target = data.load_dataset(
                TARGETS[record["domain"]], seed=seed, size=record["image_size"], gap=gap
            )
            chosen = target.subset(distance.sample(len(target), distance.SAMPLE // 2))
            features = engine.predict(
                model.features, model.head.conv.in_channels, chosen, pipeline, env, normalization
            )
            result = distance.compare(record["sample"], distance.project(features))
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


def _seconds(folder, record, rounds, env):
    """Of one run on 10 images a class, evaluation and distance included, and of a distance alone:
    the fastest."""
    name = TARGETS[record["domain"]]
    with tempfile.TemporaryDirectory() as out:
        parser = console.Parser("")
        grid.add_options(parser)
        options = ["--checkpoint", folder, "--target", name, "--out", out]
        options = parser.parse_args([*options, "--image-size", str(record["image_size"])])
        options.seeds = 1
        targets = grid.open_targets(options, env)
        (cell,) = grid.make_grid(options, env, targets, [10])
        images = grid.decode([cell], targets, options, env)[name]
        arms = {
            "transfer": lambda _: runner.fine_tune(cell, images, {}, env, None),
            "distance": lambda _: runner.measure_distance(cell, images, {}, env),
        }
        speeds = best_speeds(arms, rounds, 1, 1, env)
    return {arm: 1 / speed for arm, speed in speeds.items()}
