"""Distances: do they follow a gap that is known, and what do they cost?"""

import itertools
from types import SimpleNamespace

import numpy as np

import data
import models
import transfer
from benchmarks.measure import Report, Required, best_speeds, import_peer, repeat
from engine.console import progress_bar, say
from engine.distance import SAMPLE, compare, project, sample
from engine.evaluate import predict
from engine.grid import open_networks
from readers.transforms import Pipeline, keep
from readers.workers import in_order

GAPS = (0, 0.2, 0.4, 0.6, 0.8, 1)
MEASURES = ("frechet_relative", "energy")
TARGETS = {"natural": "synthetic-natural-target", "medical": "synthetic-xray-target"}
SHOTS = 10  # of the transfer whose time a distance's is compared with
# Of each measure and network: rank correlation with the gap, smallest step from one gap to the next
# in units of its spread over seeds, time of a transfer in units of the distance's.
RANKS, STEPS, TIME = 0.95, 3, 20


class Options(SimpleNamespace):
    """Options of fewshot.py; None where not given."""

    def __getattr__(self, name):
        return None


def distance(args, env):
    """Distances of synthetic targets from each network's own source, from gap 0 to 1 of the target.

    Each row: mean ± standard deviation over seeds, other images each. A step is what a measure
    gains from a gap to the next, its spread the larger standard deviation of the two gaps. The time
    of a distance, without reading, is compared with that of the run of fewshot.py that measures it.
    """
    options = Options(checkpoint=args.checkpoint, method="linear")  # which leaves scratch out
    networks = open_networks(options, transfer.open_network)
    for network in networks:
        if not network.source.startswith("synthetic-") or network.sample is None:
            where = f"{network.path}: no sample of a synthetic source in it"
            raise ValueError(f"{where}; run pretrain.py again")
    measured, rows, required = {}, [], []
    for network in networks:
        say(env, f"measuring: {network.path}")
        name = network.path if network.name in measured else network.name
        record = models.read_weights(network.path)
        model = models.create_model(network.model, len(record["classes"]), device=env.device)
        models.load_weights(model, network.path)
        found = distances(network, model.eval(), record["image_size"], args.seeds, env)
        for measure, values in found.items():
            spread = values.std(axis=1, ddof=min(1, args.seeds - 1))
            rows.append({"network": name, "measure": measure})
            for gap, mean, sd in zip(GAPS, values.mean(1), spread):
                rows[-1][f"gap {gap}"] = f"{mean:.3f} ± {sd:.3f}"
            required += requirements(f"{measure} of {name}", values)
        seconds = times(network, model, record["image_size"], args.rounds, env)
        ratio = seconds["transfer"] / seconds["distance"]
        required.append(Required(f"a transfer of {name}", "its distance", ratio, TIME))
        measured[name] = {measure: values.tolist() for measure, values in found.items()}
        measured[name]["seconds"] = seconds
    return Report({"gaps": GAPS, "measured": measured}, rows, required)


def distances(network, model, size, seeds, env):
    """{measure: (gaps, seeds)} of the target of the network's domain, at this size in pixels."""
    found = {measure: np.empty((len(GAPS), seeds)) for measure in MEASURES}
    places = list(itertools.product(range(len(GAPS)), range(seeds)))
    with progress_bar(env, len(places), title=network.source, unit="target") as bar:
        for row, seed in places:
            name = TARGETS[network.domain]
            target = data.load_dataset(name, seed=seed, size=size, gap=GAPS[row])
            target = target.subset(sample(len(target), SAMPLE // 2))
            stream = in_order(target, Pipeline(keep, keep), 256)
            about = model.head.conv.in_channels, stream, len(target), env, network.normalization
            result = compare(network.sample, project(predict(model.features, *about)))
            for measure in MEASURES:
                found[measure][row, seed] = result[measure]
            bar.update()
    return found


def requirements(what, values):
    """Yields what is Required of (gaps, seeds): rank correlation, and steps beside their spread."""
    gaps = np.repeat(np.arange(len(values)), values.shape[1])
    ranks = import_peer("scipy.stats").spearmanr(gaps, values.ravel()).statistic
    yield Required(f"ranks of {what}", "ranks of the gap", float(ranks), RANKS)
    if values.shape[1] > 1:
        spread, extent = values.std(axis=1, ddof=1), np.ptp(values, axis=1)
        for name, unit, least in (
            ("spread over seeds", spread, STEPS),
            ("largest less smallest of the seeds", extent, 0),
        ):
            steps = np.diff(values.mean(1)) / np.maximum(unit[1:], unit[:-1])
            yield Required(f"smallest step of {what}", name, float(steps.min()), least)


def times(network, model, size, rounds, env):
    """{"transfer", "distance"}: seconds of one run on SHOTS images a class, its evaluation and its
    distance included, and of a distance alone; the fastest.
    """
    options = Options(target=[TARGETS[network.domain]], image_size=size, method="finetune")
    options.data_dir, options.workers = "datasets", 0
    options.log_every, options.save_minutes = 50, 10.0
    (target,) = transfer.open_targets(options, env)
    chosen = data.few_shot_indices(target.train_set.labels, SHOTS, 0)
    cell = transfer.make_cell(network, target, SHOTS, 0, chosen, options, env)
    target.decode([cell], options, env)
    never = SimpleNamespace(agreed=lambda: None)  # in place of a StopSignal

    def run():
        target.distances.clear()
        transfer.fine_tune(cell, never, options, env)

    def measure():
        features = transfer.extract(model, cell, target.sample, options, env)
        compare(network.sample, project(features))

    arms = {"transfer": repeat(run), "distance": repeat(measure)}
    speeds = best_speeds(arms, rounds, 1, 1, env)
    return {arm: 1 / speed for arm, speed in speeds.items()}
