"""Reads result files and published numbers; averages and intervals over seeds."""

import json
import math
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.console import MAIN_METRIC, other_setting


class Metric(NamedTuple):
    axis: str  # its name at an axis
    factor: int  # from the fraction, as it is everywhere else, to the number shown
    decimals: int  # of that number in tables


METRICS = {
    "accuracy": Metric("accuracy (%)", 100, 1),
    "mean_auc": Metric("mean AUC", 1, 3),
    "mean_ap": Metric("mean average precision", 1, 3),
}
DOMAINS = ("natural", "medical", None)  # of sources; None without pre-training
# What published.json leaves out. Source -> domain, images; target -> domain, classes (0: several),
# test images.
SOURCES = {
    "imagenet1k": ("natural", 1_281_167),
    "imagenet21k": ("natural", 14_197_122),
    "chexpert": ("medical", 224_316),
    "mimic": ("medical", 377_110),
    "nih": ("medical", 112_120),
    "padchest": ("medical", 160_861),
}
TARGETS = {
    "cifar10": ("natural", 10, 10_000),
    "cifar100": ("natural", 100, 10_000),
    "pets": ("natural", 37, 3669),
    "flowers102": ("natural", 102, 2040),
    "padchest": ("medical", 0, 4153),
    "covidx": ("medical", 2, 400),
    "tuberculosis": ("medical", 2, 121),
}


class Target(NamedTuple):  # one panel, one table
    name: str
    domain: str
    origin: str  # of its numbers: own or published


class Line(NamedTuple):  # one line, one row
    source: str
    source_domain: str | None
    model: str
    method: str
    recipe: str | None
    pretraining: str | None = None  # its recipe and seed, where they are not the default: seed1

    @property
    def pretraining_recipe(self):
        """Its pre-training but for the seed."""
        return re.sub(r"-?\bseed\d+", "", self.pretraining or "").lstrip("-") or None


class Result(NamedTuple):
    """One run of a network on a target, at a number of shots, with one seed."""

    target: Target
    line: Line
    shots: int | None  # images per class; None: all
    seed: int
    source_images: int | None
    metrics: dict  # name of METRICS -> fraction; None where undefined, or unknown to an older file
    distance: float | None  # of source and target: frechet_relative
    classes: int  # of the target, 0 when unknown
    path: Path
    train_images: int | None  # of the target; None where unknown
    test_images: int | None
    made_of: dict  # settings, digests of weights and data; empty where unknown
    early: bool = False  # a published run that ended before its last step


@dataclass(frozen=True)
class Cell:
    """One point: the runs that differ in the seed alone. Fractions; nan where undefined."""

    target: Target
    line: Line
    shots: int | None
    metric: str
    mean: float
    sd: float
    ci95: float  # half-width of the 95 % interval
    n: int  # runs whose metric is defined
    source_images: int = 0  # 0 when unknown
    classes: int = 0  # 0 when unknown or when its runs differ


KINDS = ("fewshot", "transfer", "fewshot-validation", "transfer-validation", "features")
# What a result file must hold (older ones lack OPTIONAL), of what type; bounds of its numbers.
OPTIONAL = {"distance": None, "config": None, "run": None}
FIELDS = {key: kind for key, kind in Line.__annotations__.items() if key != "pretraining"}
FIELDS |= {"target": str, "target_domain": str, "metrics": dict, "seed": int}
FIELDS |= {"source_images": int | None, "shots": int | None}
FIELDS |= {"distance": dict | None, "config": dict | None, "run": str | None}
OF_A_SEED = {"seed", "images", "sampling"}  # of a config: what differs among the runs of a cell
BOUNDS = {"seed": (0, 2**64), "source_images": (0, 10**12), "shots": (1, 10**9)}


def number(values, key, low, high):
    """values[key], a number from low to high, or None without it. Raises ValueError."""
    value = values.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value <= high):
        raise ValueError(f"{key} is {value!r:.40}, not from {low:g} to {high:g}")  # nor NaN
    return value


def checked_result(data, path, origin="own", classes=0):
    """Content of a result file -> Result. Raises ValueError or, of a foreign config, others."""
    data = OPTIONAL | data
    for key, kind in FIELDS.items():
        if key not in data:
            raise ValueError(f"no {key}")
        wrong = not isinstance(data[key], kind) or isinstance(data[key], bool)
        if wrong or not str(data[key]).isprintable():
            raise ValueError(f"{key} is {data[key]!r:.40}")
    for key, bounds in BOUNDS.items():
        number(data, key, *bounds)
    scores, config, target = data["metrics"], data["config"] or {}, data["target"]
    metrics = {key: number(scores, key, 0, 1) for key in METRICS}
    if not scores.keys() & METRICS.keys():
        raise ValueError(f"metrics hold none of {', '.join(METRICS)}")
    if data["source_domain"] not in DOMAINS or data["target_domain"] not in MAIN_METRIC:
        raise ValueError(f"a domain is none of {', '.join(MAIN_METRIC)}")
    options = config.get("target_options")
    if options is not None:
        # One label an image is another task than all; of padchest it is the study's.
        usual = target.split("@")[0] == "padchest"
        if bool(options.get("single_label")) != usual:
            target += " (all labels)" if usual else " (single-label)"
        if options.get("validation"):
            target += f" (validation {options['validation']:g})"
    pretraining = (data["run"] or "").partition(f"-{data['model']}")[2].lstrip("-") or None
    per_class = scores.get("per_class")
    return Result(
        Target(target, data["target_domain"], origin),
        Line(*(data[key] for key in Line._fields[:-1]), pretraining),
        *(data[key] for key in ("shots", "seed", "source_images")),
        metrics,
        number(data["distance"] or {}, "frechet_relative", -1e300, 1e300),
        classes or (len(per_class) if isinstance(per_class, dict) else 0),
        path,
        *(number(config, key, 1, 2**63) for key in ("train_images", "test_images")),
        {key: config[key] for key in config.keys() - OF_A_SEED} if "data" in config else {},
    )


def read_published(path):
    """As load; a seed is, without "seeds", a place in the lists. Raises ValueError."""
    found, entry = [], None
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["records"]:
            domains, images = zip(*(SOURCES[name] for name in entry["source"].split("+")))
            (domain,) = set(domains)
            target_domain, classes, test_images = TARGETS[entry["target"]]
            data = {**entry, "method": "finetune", "recipe": "paper", "source_domain": domain}
            data |= {"source_images": sum(images), "target_domain": target_domain}
            data |= {"config": {"test_images": test_images}}
            data |= {"shots": None} if entry["shots"] == "full" else {}
            runs = list(zip(*entry["metrics"].values(), strict=True))
            seeds, steps = (entry.get(key, range(len(runs))) for key in ("seeds", "steps"))
            last = max(entry.get("steps", [0]))
            for seed, step, scores in zip(seeds, steps, runs, strict=True):
                data |= {"seed": seed, "metrics": dict(zip(entry["metrics"], scores))}
                result = checked_result(data, path, "published", classes)
                found.append(result._replace(early=step < last))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        mend = 'it must hold {"about": …, "records": […]} as published.json does, or name a folder'
        where = f"{error!r:.80} in {entry!r:.60}"
        raise ValueError(f"{path} holds no published numbers: {where}; {mend}") from None
    return found


def load(paths):
    """Folders of result files, and published files -> (list of Result, the newest of each run;
    notices on what is skipped; notices on runs with two differing results). Raises ValueError when
    one is missing."""
    files = {}  # by their true place: a folder named twice is read once
    for path in paths:
        if path.is_file():
            files[path.resolve()] = path
        elif path.is_dir():
            found = path.rglob("*.json")
            shown = [file for file in found if "/." not in f"/{file.relative_to(path)}"]
            files |= {file.resolve(): file for file in shown}
        else:
            mend = "name published.json or a folder that `python fewshot.py --out` fills"
            raise ValueError(f"no file or folder {path}: {mend}")
    named, results, skipped = {path.resolve() for path in paths}, [], []
    for place, path in sorted(files.items(), key=lambda item: item[1]):
        if place in named:
            results += read_published(path)
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("schema") != 1:
                raise ValueError('not a result file of "schema": 1')
            if data.get("kind") not in KINDS:
                raise ValueError(f"kind is {data.get('kind')!r}, not fewshot or transfer")
            if data["kind"] != "features":  # these hold no metrics
                results.append(checked_result(data, path))
        except (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError) as error:
            skipped.append(f"skipped {path}: {' '.join(str(error).split())}")
    if len({" (validation " in result.target.name for result in results}) > 1:
        mixed = "results on test images and on images held out by --validation"
        raise ValueError(f"{mixed}: name their folders one at a time")
    kept, doubled = {}, []
    for result in sorted(results, key=lambda result: result.path.stat().st_mtime):
        run = result.target, result.line, result.shots, result.seed
        older = kept.get(run, result)
        if older.metrics != result.metrics:
            doubled.append(f"same run twice: kept {result.path}, newer than {older.path}")
        kept[run] = result
    newest = {}  # of each cell, whose runs are averaged
    for result in filter(attrgetter("made_of"), kept.values()):  # as they were written
        newest[result.target, result.line, result.shots] = result
    for run, result in list(kept.items()):
        other = newest.get(run[:-1], result)
        pair = result.made_of, other.made_of
        if pair[0] and (other_setting(*pair) or other_setting(*pair[::-1])):
            why = f"of other weights, data or settings than {other.path}"
            skipped.append(f"skipped {result.path}: {why}")
            del kept[run]
    return list(kept.values()), skipped, doubled


def group(items, *attributes):
    """{value of the attributes, named or paths as line.source: list of its items}, as they come."""
    groups, key = {}, attrgetter(*attributes)
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def t_quantile(degrees):
    """97.5 % quantile of Student's t with `degrees` (a whole number from 1) degrees of freedom.

    With t = sqrt(degrees) tan(angle), P(|T| < t) is a finite sum of powers of cos(angle)
    (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4); it rises with the angle, so bisection finds
    P = 0.95.
    """
    low, high, odd = 0.0, math.pi / 2, degrees % 2
    for _ in range(60):  # down to the spacing of floats
        angle = (low + high) / 2
        term = math.cos(angle) if odd else 1.0
        total = term if degrees > 1 else 0.0
        for power in range(2 + odd, degrees, 2):
            term *= math.cos(angle) ** 2 * (power - 1) / power
            total += term
        total *= math.sin(angle)
        probability = 2 / math.pi * (angle + total) if odd else total
        low, high = (angle, high) if probability < 0.95 else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def spread(values):
    """Mean, standard deviation (over n - 1), half-width of the 95 % interval of the mean, and n;
    nan where undefined."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    sd = float(np.std(values, ddof=1)) if n > 1 else math.nan
    ci95 = t_quantile(n - 1) * sd / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "sd": sd, "ci95": ci95, "n": n}


def size_order(model):
    """Sort key that puts R101x1 before R50x3 and R152x2: depth times width squared, which grows as
    parameters do, then the name."""
    found = re.search(r"(\d+)x(\d+(?:\.\d+)?)", model)
    return float(found[1]) * float(found[2]) ** 2 if found else 0.0, model


def line_order(cell):
    """Sort key of lines: natural, medical, none; small sources and small models first."""
    line = cell.line
    source = DOMAINS.index(line.source_domain), cell.source_images, line.source
    return *source, size_order(line.model), line.method, line.recipe or "", line.pretraining or ""


def plain_name(name):
    """Name of a source or target without its pack: nih@256+chexpert@256 -> chexpert+nih."""
    return "+".join(sorted(re.sub(r"@\d+", "", part) for part in name.split("+")))


def shots_words(shots):
    return f"{shots}-shot" if shots else "full"


def mark(origin):
    """What follows a name whose numbers are published ones."""
    return ", published" if origin == "published" else ""


def differing(lines):
    """What tells lines apart beside source and network: (those of method, recipe and pre-training
    in which they differ, {line: its words for these})."""
    keys = "method", "recipe", "pretraining"
    keys = [key for key in keys if len({getattr(line, key) for line in lines}) > 1]
    return keys, {line: [getattr(line, key) or "–" for key in keys] for line in lines}


def summarise(results, metric):
    """Average over seeds: results -> list of Cell in the order of targets, lines and shots."""
    sources = group(results, "line.source")  # the baseline has no images, nor may a foreign one
    images = {name: max(run.source_images or 0 for run in sources[name]) for name in sources}
    cells = []
    for (target, line, shots), runs in group(results, "target", "line", "shots").items():
        name = MAIN_METRIC[target.domain] if metric == "auto" else metric
        scores = spread([run.metrics[name] for run in runs if run.metrics[name] is not None])
        classes = runs[0].classes if len({run.classes for run in runs}) == 1 else 0
        about = {"source_images": images[line.source], "classes": classes}
        cells.append(Cell(target, line, shots, name, **scores, **about))
    return sorted(  # natural targets first
        cells,
        key=lambda c: (c.target.domain != "natural", c.target, line_order(c), c.shots or math.inf),
    )
