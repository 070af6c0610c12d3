"""Numbers of the figures: reads result files and published ones; averages and
intervals over seeds; Markdown and CSV. numpy alone: it draws nothing.
"""

import csv
import json
import math
import re

import numpy as np

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

DOMAINS = ("natural", "medical", None)  # of sources; None without pre-training
# Metric -> name at the axis, factor from fraction to shown number, decimals in the table.
METRICS = {
    "accuracy": ("accuracy (%)", 100, 1),
    "mean_auc": ("mean AUC", 1, 3),
    "mean_ap": ("mean average precision", 1, 3),
}
AUTO = {"natural": "accuracy", "medical": "mean_auc"}  # domain of the target -> metric
DISTANCES = ("frechet_relative", "energy")  # of "distance" in a result file, where it has one
FIELDS = {  # what a result file must hold: type -> keys, those of "metrics" included
    str: ("source", "model", "target", "target_domain", "method"),
    str | None: ("source_domain", "recipe"),
    int: ("seed",),
    int | None: ("source_images", "shots"),
    int | float | None: tuple(METRICS),
}
# What published.json leaves out. Source -> domain, images; target -> domain, classes (0: several).
SOURCES = {
    "imagenet1k": ("natural", 1_281_167),
    "imagenet21k": ("natural", 14_197_122),
    "chexpert": ("medical", 224_316),
    "mimic": ("medical", 377_110),
    "nih": ("medical", 112_120),
    "padchest": ("medical", 160_861),
}
TARGETS = {
    "cifar10": ("natural", 10),
    "cifar100": ("natural", 100),
    "pets": ("natural", 37),
    "flowers102": ("natural", 102),
    "padchest": ("medical", 0),
    "covidx": ("medical", 2),
    "tuberculosis": ("medical", 2),
}
TARGET = ("target", "target_domain", "origin")  # one panel, one table; origin: own or published
LINE = ("source", "source_domain", "model", "method", "recipe")  # one line, one row
CELL = (*TARGET, *LINE, "shots")  # one point: its runs differ in the seed alone
COLUMNS = (*CELL, "metric", "mean", "sd", "ci95", "n")  # of the CSV


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def check(values):
    """Values of a run -> dict of the keys of FIELDS. Raises TypeError or ValueError."""
    for kind, keys in FIELDS.items():
        for key in keys:
            if key not in values:
                raise ValueError(f"no {key}")
            if not isinstance(values[key], kind) or isinstance(values[key], bool):
                raise TypeError(f"{key} is {values[key]!r:.40}")
    if values["source_domain"] not in DOMAINS or values["target_domain"] not in AUTO:
        raise ValueError(f"a domain is none of {', '.join(AUTO)}")
    if values["shots"] is not None and values["shots"] < 1:
        raise ValueError(f"shots is {values['shots']}")
    for key in METRICS:
        if values[key] is not None and not 0 <= values[key] <= 1:  # catches NaN too
            raise ValueError(f"{key} is {values[key]}, not a fraction")
    return {key: values[key] for keys in FIELDS.values() for key in keys}


def read_distance(data):
    """Content of a result file -> its domain distances (None where it has none)."""
    distance = data.get("distance") or {}
    if not isinstance(distance, dict):
        raise TypeError(f"distance is {distance!r:.40}")
    values = {key: distance.get(key) for key in DISTANCES}
    for key, value in values.items():
        # The energy coefficient is without bias: a little below 0 where nothing differs.
        if value is not None and (type(value) not in (int, float) or not abs(value) < 1e300):
            raise ValueError(f"distance {key} is {value!r:.40}")
    return values


def read_result(path):
    """One result file -> record: the keys of FIELDS (metrics as fractions or None), classes (0 when
    unknown), origin, distances, path, modified (s). Raises OSError, TypeError or ValueError.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise ValueError('not a result file of "schema": 1')
    if data.get("kind") not in ("fewshot", "transfer"):
        raise ValueError(f"kind is {data.get('kind')!r}, not fewshot or transfer")
    metrics = data["metrics"] if isinstance(data.get("metrics"), dict) else {}
    record = check({**data, **{key: metrics[key] for key in METRICS if key in metrics}})
    record |= read_distance(data)
    record |= {"origin": "own", "classes": len(metrics.get("per_class") or ())}
    return {**record, "path": path, "modified": path.stat().st_mtime}


def published_runs(entry):
    """One record of a published file -> runs as of `check`; a seed is the place in the lists."""
    parts = [SOURCES[part] for part in entry["source"].split("+")]
    (domain,) = {domain for domain, _ in parts}
    target_domain, classes = TARGETS[entry["target"]]
    about = {"source_domain": domain, "source_images": sum(images for _, images in parts)}
    about |= {"target_domain": target_domain, "method": "finetune", "recipe": "paper"}
    about |= {"shots": None if entry["shots"] == "full" else entry["shots"]}
    scores = {key: entry["metrics"].get(key, []) for key in METRICS}
    (seeds,) = {len(values) for values in scores.values() if values}
    runs = []
    for seed in range(seeds):
        values = {key: values[seed] if values else None for key, values in scores.items()}
        run = check({**entry, **about, **values, "seed": seed})
        runs.append({**run, "origin": "published", "classes": classes})
    return runs


def read_published(path):
    """A file of published numbers -> (records as of `read_result`, notices on those skipped)."""
    mend = 'it must hold {"about": …, "records": […]} as published.json does, or name a folder'
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = list(data["records"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds no published numbers: {mend}") from None
    extras = {"path": path, "modified": path.stat().st_mtime, **dict.fromkeys(DISTANCES)}
    records, skipped = [], []
    for place, entry in enumerate(entries, start=1):
        try:
            records += [{**run, **extras} for run in published_runs(entry)]
        except KeyError as error:
            skipped.append(f"skipped {path} record {place}: {error} is not known")
        except (AttributeError, TypeError, ValueError) as error:
            skipped.append(f"skipped {path} record {place}: {error}")
    return records, skipped


def load(paths):
    """Folders of result files, and published files -> (records, notices on what is skipped, notices
    on runs with two differing results).

    Raises ValueError when one is missing. Of several results of one run the newest is kept.
    """
    files, records, skipped, doubled, kept = {}, [], [], [], {}
    for path in paths:  # by their true place: a folder named twice is read once
        if path.is_file():
            files[path.resolve()] = path
        elif path.is_dir():
            files |= {file.resolve(): file for file in path.rglob("*.json")}
        elif path.suffix == ".json":
            raise ValueError(f"no file {path}: give published.json, or a folder of result files")
        else:
            raise ValueError(f"no folder {path}: `python fewshot.py --out {path}` fills it")
    named = {path.resolve() for path in paths}
    for place, path in sorted(files.items(), key=lambda item: item[1]):
        try:
            more, faults = read_published(path) if place in named else ([read_result(path)], [])
            records += more
            skipped += faults
        except (OSError, TypeError, ValueError, RecursionError) as error:
            if place in named:
                raise
            skipped.append(f"skipped {path}: {' '.join(str(error).split())}")
    for record in sorted(records, key=lambda record: record["modified"]):
        run = tuple(record[key] for key in (*CELL, "seed"))
        older = kept.get(run, record)
        if any(older[metric] != record[metric] for metric in METRICS):
            doubled.append(f"same run twice: kept {record['path']}, newer than {older['path']}")
        kept[run] = record
    return list(kept.values()), skipped, doubled


# ------------------------------------------------------------------------------------------------
# Averages
# ------------------------------------------------------------------------------------------------


def group(items, keys):
    """Split dicts into {values of keys: list of dicts}, in the order in which they come."""
    groups = {}
    for item in items:
        groups.setdefault(tuple(item[key] for key in keys), []).append(item)
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
    """Mean, standard deviation (over n - 1), half-width of the 95 % interval of the mean, and n.

    nan where undefined: the first three of no value, two of them of one value.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    sd = float(np.std(values, ddof=1)) if n > 1 else math.nan
    ci95 = t_quantile(n - 1) * sd / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "sd": sd, "ci95": ci95, "n": n}


def size_order(model):
    """Sort key that puts R50x1 before R50x3 and R152x2: the numbers in the name, then the name."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", model)], model


def plain_name(name):
    """Name of a source or target without its pack: nih@256+chexpert@256 -> chexpert+nih."""
    return "+".join(sorted(re.sub(r"@\d+", "", part) for part in name.split("+")))


def line_order(cell):
    """Sort key of lines: natural, medical, none; small sources and small models first."""
    source = (DOMAINS.index(cell["source_domain"]), cell["source_images"], cell["source"])
    return source, size_order(cell["model"]), cell["method"], cell["recipe"] or ""


def chosen_metric(run, metric):
    """The metric that --metric means for the target of a run or cell."""
    return AUTO[run["target_domain"]] if metric == "auto" else metric


def summarise(records, metric):
    """Average over seeds: records -> {target: list of cells}, natural targets first.

    A cell holds the keys of COLUMNS (fractions; runs whose metric is null are left out, n counts
    the others), source_images and classes (0 when unknown or when its runs differ).
    """
    images, cells = {}, []
    for run in records:  # the baseline has no images; neither may a checkpoint from elsewhere
        images[run["source"]] = max(images.get(run["source"], 0), run["source_images"] or 0)
    for key, runs in group(records, CELL).items():
        cell = dict(zip(CELL, key))
        cell["metric"] = chosen_metric(cell, metric)
        cell |= spread([run[cell["metric"]] for run in runs if run[cell["metric"]] is not None])
        classes = {run["classes"] for run in runs}
        cell["classes"] = classes.pop() if len(classes) == 1 else 0
        cells.append({**cell, "source_images": images[cell["source"]]})
    cells.sort(key=lambda cell: (line_order(cell), cell["shots"] or math.inf))
    panels = group(cells, TARGET)
    return {key: panels[key] for key in sorted(panels, key=lambda key: (key[1] != "natural", key))}


def all_cells(records, metric):
    """As `summarise`, the cells of all targets in one list."""
    return [cell for panel in summarise(records, metric).values() for cell in panel]


def full_shot(records, metric):
    """As `summarise`, of the runs on all training images alone, where a target has a number."""
    panels = summarise([run for run in records if run["shots"] is None], metric)
    return {key: cells for key, cells in panels.items() if any(cell["n"] for cell in cells)}


def differing(cells):
    """Those of method and recipe in which lines differ: only these need to be said."""
    return [key for key in ("method", "recipe") if len(group(cells, (key,))) > 1]


# ------------------------------------------------------------------------------------------------
# Markdown and CSV
# ------------------------------------------------------------------------------------------------

RULE = """\
Cells: mean ± standard deviation over seeds (number of seeds). Bold: the best mean of a column and \
every mean no further below it than √(a² + b²), where a and b are the half-widths of the two 95 % \
intervals (Student t over seeds). One seed has no interval: such a cell is bold only as the best."""


def words(shots):
    """Number of shots in words."""
    return f"{shots}-shot" if shots else "full"


def table_text(rows):
    """Rows of words, the first the heading -> lines of a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]


def escaped(name):
    """A name as it may stand in a Markdown table."""
    return (name or "–").replace("|", r"\|")


def within_noise(one, other):
    """Whether two means lie no further apart than sqrt(a² + b²), of their half-widths a and b."""
    gap = abs(one["mean"] - other["mean"])  # nothing is within nan: no interval, no claim
    return gap == 0 or gap <= math.hypot(one["ci95"], other["ci95"])


def is_bold(cell, column):
    """Whether a cell has the best mean of its column, or one within noise of it as RULE says."""
    best = max(column, key=lambda other: other["mean"])
    return len(column) > 1 and within_noise(best, cell)


def plain_text(cell, sign=""):
    """A cell as 61.2 ± 3.1 (5)."""
    _, factor, decimals = METRICS[cell["metric"]]
    values = [cell["mean"], cell["sd"]][: cell["n"]]  # one seed has no deviation
    signs = [sign, ""]
    texts = [f"{factor * value:{sign}.{decimals}f}" for value, sign in zip(values, signs)]
    return f"{' ± '.join(texts)} ({cell['n']})"


def cell_text(cell, column):
    """A cell as **61.2 ± 3.1 (5)**, a dash where nothing was run; gains with sign and verdict."""
    if cell is None or cell["n"] == 0:
        return "undefined (0)" if cell else "–"
    text = plain_text(cell, "+" if "verdict" in cell else "")
    text = f"**{text}**" if is_bold(cell, column) else text
    return text + {"above": " ▲", "below": " ▼"}.get(cell.get("verdict"), "")


def mark(origin):
    """What follows a name whose numbers are published ones."""
    return ", published" if origin == "published" else ""


def target_heading(target):
    """(target, domain, origin) in words."""
    return f"{target[0]} ({target[1]} target{mark(target[2])})"


def shots_table(cells, line, head):
    """Cells of one target -> lines of a table: a row for each `line` (keys), named by head(cell), a
    dict, and a column for each number of shots."""
    shots = sorted({cell["shots"] for cell in cells}, key=lambda shot: shot or math.inf)
    columns = [[c for c in cells if c["shots"] == shot and c["n"]] for shot in shots]
    rows = [[*head(cells[0]), *map(words, shots)]]
    for members in group(cells, line).values():
        at = {cell["shots"]: cell for cell in members}
        texts = [cell_text(at.get(s), c) for s, c in zip(shots, columns)]
        rows.append([*map(escaped, head(members[0]).values()), *texts])
    return table_text(rows)


def markdown(panels):
    """{target: cells} -> Markdown text: a table a target, rows source x model, columns shots."""
    parts = []
    for target, cells in panels.items():
        names = ["source", "model", *differing(cells)]
        parts.append(f"### {target_heading(target)}: {METRICS[cells[0]['metric']][0]}\n")
        head = {"line": LINE, "head": lambda cell, names=names: {n: cell[n] for n in names}}
        parts += [*shots_table(cells, **head), ""]
    return "\n".join([*parts, RULE, ""])


def full_markdown(panels):
    """{target: full-shot cells} -> Markdown: rows source x model, a column a target."""
    parts = []
    for origin in ("own", "published"):
        shown = {target: cells for target, cells in panels.items() if target[2] == origin}
        cells = sorted((c for panel in shown.values() for c in panel), key=line_order)
        names = ["source", "model", *differing(cells)]
        metrics = [METRICS[panel[0]["metric"]][0] for panel in shown.values()]
        rows = [[*names, *(f"{key[0]}, {metric}" for key, metric in zip(shown, metrics))]]
        for line, members in group(cells, LINE).items():
            texts = []
            for panel in shown.values():
                at = {tuple(cell[key] for key in LINE): cell for cell in panel}
                texts.append(cell_text(at.get(line), [cell for cell in panel if cell["n"]]))
            rows.append([*(escaped(members[0][name]) for name in names), *texts])
        title = f"### full-shot{mark(origin)}\n"
        parts += [title, *table_text(rows), ""] if shown else []
    return "\n".join([*parts, RULE, ""])


def write_csv(path, rows):
    """Dicts of equal keys -> CSV: fractions, undefined empty, no shots as full."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            undefined = [k for k, v in row.items() if isinstance(v, float) and math.isnan(v)]
            writer.writerow({**row, **dict.fromkeys(undefined)})


def csv_rows(cells, columns):
    """Cells -> rows for `write_csv`: the columns, origin left out where all is one's own."""
    own = all(cell["origin"] == "own" for cell in cells)
    rows = [{key: cell[key] for key in columns if key != "origin" or not own} for cell in cells]
    for row in rows:
        row["shots"] = row["shots"] or "full"
        if "partners" in row:
            row["partners"] = ";".join(row["partners"])
    return rows


def panel_rows(panels):
    """{target: cells} -> rows for `write_csv`, a row a cell; ci95 is the half-width."""
    return csv_rows([cell for cells in panels.values() for cell in cells], COLUMNS)
