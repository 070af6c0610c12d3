"""Reads result files and published numbers; averages and intervals over seeds."""

import json
import math
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.console import MAIN_METRIC


class Metric(NamedTuple):
    axis: str  # its name at an axis
    factor: int  # from the fraction, as it is everywhere else, to the number shown
    decimals: int  # of that number in tables
    gain: str  # its name where two are subtracted


METRICS = {
    "accuracy": Metric("accuracy (%)", 100, 1, "accuracy (points)"),
    "mean_auc": Metric("mean AUC", 1, 3, "mean AUC"),
    "mean_ap": Metric("mean average precision", 1, 3, "mean average precision"),
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


class Target(NamedTuple):
    """One panel, one table."""

    name: str
    domain: str
    origin: str  # of its numbers: own or published


class Line(NamedTuple):
    """One line, one row."""

    source: str
    source_domain: str | None
    model: str
    method: str
    recipe: str | None
    pretraining: str | None = None  # its recipe and seed, where they are not the default: seed1


@dataclass(frozen=True)
class Result:
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
    train_images: int | None = None  # of the target; None where unknown
    test_images: int | None = None
    made_of: str = ""  # digests of weights and data; "" where unknown


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


KINDS = ("fewshot", "transfer", "fewshot-validation", "transfer-validation")
# What a result file must hold, and of what type; bounds of its numbers.
BOUNDS = {"seed": (0, 2**64), "source_images": (0, 10**12), "shots": (1, 10**9)}
FIELDS = {key: kind for key, kind in Line.__annotations__.items() if key != "pretraining"}
FIELDS |= {"target": str, "target_domain": str, "metrics": dict}
FIELDS |= {"seed": int, "source_images": int | None, "shots": int | None}


def number(values, key, low, high):
    """values[key] where it is a number within bounds, None where there is none. Raises
    ValueError."""
    value = values.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value <= high):
        raise ValueError(f"{key} is {value!r:.40}, not from {low:g} to {high:g}")  # nor NaN
    return value


def checked_result(data, path, origin="own", classes=0):
    """Content of a result file -> Result. Raises ValueError."""
    data = {"distance": None, **data}
    for key, kind in {**FIELDS, "distance": dict | None}.items():
        if key not in data:
            raise ValueError(f"no {key}")
        wrong = not isinstance(data[key], kind) or isinstance(data[key], bool)
        if wrong or not str(data[key]).isprintable():
            raise ValueError(f"{key} is {data[key]!r:.40}")
    for key, bounds in BOUNDS.items():
        number(data, key, *bounds)
    metrics = {key: number(data["metrics"], key, 0, 1) for key in METRICS}
    if not data["metrics"].keys() & METRICS.keys():
        raise ValueError(f"metrics hold none of {', '.join(METRICS)}")
    if data["source_domain"] not in DOMAINS or data["target_domain"] not in MAIN_METRIC:
        raise ValueError(f"a domain is none of {', '.join(MAIN_METRIC)}")
    target = Target(data["target"], data["target_domain"], origin)
    pretraining = str(data.get("run")).partition(f"-{data['model']}")[2].lstrip("-") or None
    line = Line(*(data[key] for key in Line._fields[:-1]), pretraining)
    distance = number(data["distance"] or {}, "frechet_relative", -1e300, 1e300)
    rest = data["shots"], data["seed"], data["source_images"]
    per_class = data["metrics"].get("per_class")
    classes = classes or (len(per_class) if isinstance(per_class, dict) else 0)
    config = data.get("config") or {}
    sizes = (number(config, key, 1, 2**63) for key in ("train_images", "test_images"))
    made_of = json.dumps([config[key] for key in ("weights", "data")]) if "data" in config else ""
    return Result(target, line, *rest, metrics, distance, classes, path, *sizes, made_of)


def read_result(path):
    """One result file -> Result. Raises OSError, ValueError or, of deep nesting, RecursionError."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise ValueError('not a result file of "schema": 1')
    if data.get("kind") not in KINDS:
        raise ValueError(f"kind is {data.get('kind')!r}, not fewshot or transfer")
    options = data["config"].get("target_options") if isinstance(data.get("config"), dict) else None
    if isinstance(options, dict) and isinstance(data.get("target"), str):
        # One label an image is another task than all; of padchest it is the study's.
        usual = data["target"].split("@")[0] == "padchest"
        if bool(options.get("single_label")) != usual:
            data["target"] += " (all labels)" if usual else " (single-label)"
        if options.get("validation"):
            data["target"] += f" (validation {options['validation']:g})"
    return checked_result(data, path)


def read_published(path):
    """A file of published numbers -> list of Result. Without "seeds", a seed is the place
    in the lists. Raises ValueError."""
    results, entry = [], None
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["records"]:
            sources = [SOURCES[name] for name in entry["source"].split("+")]
            (domain,) = {domain for domain, _ in sources}
            target_domain, classes, test_images = TARGETS[entry["target"]]
            data = {**entry, "source_domain": domain, "target_domain": target_domain}
            data["config"] = {"test_images": test_images}
            data |= {"source_images": sum(images for _, images in sources)}
            data |= {"method": "finetune", "recipe": "paper"}
            data["shots"] = None if entry["shots"] == "full" else entry["shots"]
            runs = list(zip(*entry["metrics"].values(), strict=True))
            seeds = entry.get("seeds", range(len(runs)))
            for seed, scores in zip(seeds, runs, strict=True):
                data |= {"seed": seed, "metrics": dict(zip(entry["metrics"], scores))}
                results.append(checked_result(data, path, "published", classes))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        mend = 'it must hold {"about": …, "records": […]} as published.json does, or name a folder'
        where = f"{error!r:.80} in {entry!r:.60}"
        raise ValueError(f"{path} holds no published numbers: {where}; {mend}") from None
    return results


def load(paths):
    """Folders of result files, and published files -> (results, notices on what is skipped, notices
    on runs with two differing results).

    Raises ValueError when one is missing. Of several results of one run the newest is kept.
    """
    files = {}  # by their true place: a folder named twice is read once
    for path in paths:
        if path.is_file():
            files[path.resolve()] = path
        elif path.is_dir():
            found = path.rglob("*.json")
            shown = [file for file in found if "/." not in f"/{file.relative_to(path)}"]
            files |= {file.resolve(): file for file in shown}
        else:
            mend = "give published.json, or a folder that `python fewshot.py --out FOLDER` fills"
            raise ValueError(f"no file or folder {path}: {mend}")
    named = {path.resolve() for path in paths}
    results, skipped = [], []
    for place, path in sorted(files.items(), key=lambda item: item[1]):
        if place in named:
            results += read_published(path)
            continue
        try:
            results.append(read_result(path))
        except (OSError, TypeError, ValueError, RecursionError) as error:
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
        if result.made_of not in ("", other.made_of):
            skipped.append(f"skipped {result.path}: of other weights or data than {other.path}")
            del kept[run]
    return list(kept.values()), skipped, doubled


def group(items, *attributes):
    """Split items into {value of the attributes: list of items}, in the order in which they come;
    attributes: names, or paths as line.source."""
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
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # down to the spacing of floats
        angle, odd = (low + high) / 2, degrees % 2
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


def within_noise(one, other):
    """Whether two means lie no further apart than sqrt(a² + b²), of their half-widths a and b."""
    gap = abs(one.mean - other.mean)  # nothing is within nan: no interval, no claim
    return gap == 0 or gap <= math.hypot(one.ci95, other.ci95)


def size_order(model):
    """Sort key that puts R50x1 before R50x3 and R152x2: the numbers in the name, then the name."""
    return tuple(float(number) for number in re.findall(r"\d+(?:\.\d+)?", model)), model


def line_order(cell):
    """Sort key of lines: natural, medical, none; small sources and small models first."""
    line = cell.line
    source = DOMAINS.index(line.source_domain), cell.source_images, line.source
    return *source, size_order(line.model), line.method, line.recipe or "", line.pretraining or ""


def plain_name(name):
    """Name of a source or target without its pack: nih@256+chexpert@256 -> chexpert+nih."""
    return "+".join(sorted(re.sub(r"@\d+", "", part) for part in name.split("+")))


def shots_words(shots):
    """Number of shots in words."""
    return f"{shots}-shot" if shots else "full"


def mark(origin):
    """What follows a name whose numbers are published ones."""
    return ", published" if origin == "published" else ""


def differing(cells):
    """Those of method, recipe and pre-training in which cells or gains differ: these are said."""
    return [
        key for key in ("method", "recipe", "pretraining") if len(group(cells, f"line.{key}")) > 1
    ]


def target_order(item):
    """Sort key of cells and gains: natural targets first."""
    return item.target.domain != "natural", item.target


def summarise(results, metric):
    """Average over seeds: results -> list of Cell in the order of targets, lines and shots."""
    images = {}  # the baseline has none; neither may a checkpoint from elsewhere
    for result in results:
        source = result.line.source
        images[source] = max(images.get(source, 0), result.source_images or 0)
    cells = []
    for (target, line, shots), runs in group(results, "target", "line", "shots").items():
        name = MAIN_METRIC[target.domain] if metric == "auto" else metric
        scores = spread([run.metrics[name] for run in runs if run.metrics[name] is not None])
        classes = runs[0].classes if len({run.classes for run in runs}) == 1 else 0
        about = {"source_images": images[line.source], "classes": classes}
        cells.append(Cell(target, line, shots, name, **scores, **about))
    return sorted(cells, key=lambda c: (target_order(c), line_order(c), c.shots or math.inf))
