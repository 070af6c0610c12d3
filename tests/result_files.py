"""Result files and logs, as the scripts write them, and readers of what plot.py writes."""

import csv
import json
import re
from pathlib import Path

import numpy as np
from conftest import ROOT

PUBLISHED = ROOT / "published.json"
RESULT = {
    "schema": 1,
    "kind": "fewshot",
    "source": "synthetic-natural",
    "source_domain": "natural",
    "source_images": 4000,
    "model": "R14x0.5",
    "target": "synthetic-natural-target",
    "target_domain": "natural",
    "shots": 10,
    "seed": 0,
    "method": "finetune",
    "recipe": "paper",
}
METRICS = {"accuracy": 0.5, "mean_auc": 0.6, "mean_ap": 0.4, "top5": None, "loss": 1.0}
METRICS["per_class"] = {str(label): {"auc": 0.6} for label in range(4)}


def write(folder, name="run.json", metrics=(), **values):
    """Writes one result file of the schema and returns its path; values replace its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {**RESULT, "metrics": METRICS | dict(metrics), **values}
    path = folder / name
    path.write_text(json.dumps({k: v for k, v in result.items() if v is not ...}))
    return path


def write_seeds(folder, scores, metric="accuracy", **values):
    """Writes one file a seed of {seed: score} or [score], under names of their own."""
    for seed, score in scores.items() if isinstance(scores, dict) else enumerate(scores):
        name = "-".join(str(value) for value in [*values.values(), seed]) + ".json"
        write(folder, name.replace("/", "_"), {metric: score}, seed=seed, **values)


def write_worlds(folder):
    """Two sources a domain, two networks, scratch; two targets; 1 shot and full; three seeds."""
    rng = np.random.default_rng(0)
    sources = {"nat": ("natural", 900), "nat-0.1": ("natural", 90), "scratch": (None, 0)}
    sources |= {"xray": ("medical", 800), "xray-0.1": ("medical", 80)}
    for target, target_domain in {"t-natural": "natural", "t-xray": "medical"}.items():
        for source, (domain, images) in sources.items():
            about = {"target": target, "target_domain": target_domain, "source": source}
            about |= {"source_domain": domain, "source_images": images}
            if domain:
                about["distance"] = {"frechet_relative": 2.0 + (domain == target_domain)}
            for model in ("R14x0.5", "R26x1"):
                for shots in (1, None):
                    for seed in range(3):
                        scores = {"accuracy": rng.uniform(0.3, 0.9)}
                        scores["mean_auc"] = rng.uniform(0.5, 1)
                        more = {"model": model, "shots": shots, "seed": seed}
                        name = f"{target}-{source}-{model}-{shots}-{seed}.json"
                        write(folder, name, scores, **about, **more)


def texts(path):
    """The texts of an SVG."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", Path(path).read_text())


def read_csv(path="figures/fewshot.csv"):
    """The rows of a CSV, as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
