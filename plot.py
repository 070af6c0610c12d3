"""Figures and tables from result files: what pre-training gives at each number of shots; and how
training went, from its logs.

    python plot.py                                          # results/ to figures/fewshot.*
    python plot.py results other/results --target nih pets  # two folders, two targets
    python plot.py --metric mean_ap --out paper             # another metric, another place
    python plot.py --curves runs/*                          # logs of training to figures/curves.*

It reads every JSON file under the folders (schema 1, as transfer.py and fewshot.py write them) and
trains nothing. The figure has a panel for each target and a line for each source and model: the
mean over seeds with its 95 % interval. A Markdown table and a CSV hold the same numbers.

With --curves it reads log.jsonl in the folders of pretrain.py instead, of finished runs and of runs
under way, and draws panels over the step for what is logged there: loss, test metric, learning
rate, gradient norm, share of clipped units, images a second, share of time spent waiting for data.
"""

import argparse
import csv
import difflib
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # without pyplot: writes files, needs no display
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

# Domain -> heading in the legend, hue from the smallest to the largest source, marker filling.
# Orange and blue stay apart for colour-blind readers; the filling parts the domains in grey.
DOMAINS = {
    "natural": ("pre-trained on natural images:", ("#f7b267", "#d9730d", "#5c1f00"), None),
    "medical": ("pre-trained on medical images:", ("#8cc8ee", "#2f7fc1", "#071d49"), "white"),
    None: ("no pre-training:", ("#858585", "#858585"), "#d9d9d9"),
}
MARKERS = "osD^vPX*"  # one a model, the smallest first
LINES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (2, 1)))  # the largest model first
# Metric -> name at the axis, factor from fraction to shown number, decimals in the table.
METRICS = {
    "accuracy": ("accuracy (%)", 100, 1),
    "mean_auc": ("mean AUC", 1, 3),
    "mean_ap": ("mean average precision", 1, 3),
}
AUTO = {"natural": "accuracy", "medical": "mean_auc"}  # domain of the target -> metric
PANEL = (2.7, 2.4)  # inches; two in a row stay readable when the figure is set 3.3 in wide
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text, to search and to edit
    "svg.hashsalt": "plot",  # same input, same file
    "text.parse_math": False,  # a name with $ is a name
}
NAMED = 5  # files named in a notice; of the others the number is said
FIELDS = {  # what a result file must hold: type -> keys, those of "metrics" included
    str: ("source", "model", "target", "target_domain", "method"),
    str | None: ("source_domain", "recipe"),
    int: ("seed",),
    int | None: ("source_images", "shots"),
    int | float | None: tuple(METRICS),
}
TARGET = ("target", "target_domain")  # one panel, one table
LINE = ("source", "source_domain", "model", "method", "recipe")  # one line, one row
CELL = (*TARGET, *LINE, "shots")  # one point: its runs differ in the seed alone
COLUMNS = (*CELL, "metric", "mean", "sd", "ci95", "n")  # of the CSV
# Key in log.jsonl -> title of its panel, factor from logged to shown number, height in inches.
CURVES = {
    "loss": ("training loss", 1, 1.3),
    "accuracy": ("test accuracy (%)", 100, 1.3),
    "mean_auc": ("test mean AUC", 1, 1.3),
    "lr": ("learning rate", 1, 0.9),
    "grad_norm": ("gradient norm", 1, 0.9),
    "clipped": ("units with clipped gradients (%)", 100, 0.9),
    "images_per_second": ("images per second", 1, 0.9),
    "data_wait": ("share of time waiting for data (%)", 100, 0.9),
}
# Domain, None while a run has no result.json -> words in the footnote, hue, marker filling.
RUNS = {
    "natural": ("orange, natural images", *DOMAINS["natural"][1:]),
    "medical": ("blue with hollow markers, medical images", *DOMAINS["medical"][1:]),
    None: (
        "yellow to violet, no result.json yet",
        ("#cbc31b", "#2f9f5a", "#7b3fae", "#270742"),
        None,
    ),
}
MARKS = 8  # about so many markers a line
DENSE = 200  # more points than that are noise to the eye: their medians are drawn over them


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_result(path):
    """One result file -> record: the keys of FIELDS (metrics as fractions or None), classes (0 when
    unknown), path, modified (s). Raises OSError, TypeError or ValueError that says what is wrong.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise ValueError('not a result file of "schema": 1')
    if data.get("kind") not in ("fewshot", "transfer"):
        raise ValueError(f"kind is {data.get('kind')!r}, not fewshot or transfer")
    metrics = data["metrics"] if isinstance(data.get("metrics"), dict) else {}
    values = {**data, **{key: metrics[key] for key in METRICS if key in metrics}}
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
    record = {key: values[key] for keys in FIELDS.values() for key in keys}
    classes = len(metrics.get("per_class") or ())
    return {**record, "classes": classes, "path": path, "modified": path.stat().st_mtime}


def load(folders):
    """Folders -> (records, notices on files skipped, notices on runs with two differing files).

    Raises ValueError when a folder is missing. Of several files of one run the newest is kept.
    """
    paths = {}  # by their true place: a folder named twice is read once
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: `python fewshot.py --out {folder}` fills it")
        paths |= {path.resolve(): path for path in folder.rglob("*.json")}
    records, skipped, doubled, kept = [], [], [], {}
    for path in sorted(paths.values()):
        try:
            records.append(read_result(path))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            skipped.append(f"skipped {path}: {' '.join(str(error).split())}")
    for record in sorted(records, key=lambda record: record["modified"]):
        run = tuple(record[key] for key in (*CELL, "seed"))
        older = kept.get(run, record)
        if any(older[metric] != record[metric] for metric in METRICS):
            doubled.append(f"same run twice: kept {record['path']}, newer than {older['path']}")
        kept[run] = record
    return list(kept.values()), skipped, doubled


def tell(notices, closing):
    """Print the first notices and the closing line to stderr; nothing if there is none."""
    for line in [*notices[:NAMED], closing] if notices else []:
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# Numbers
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


def line_order(cell):
    """Sort key of lines: natural, medical, none; small sources and small models first."""
    source = (list(DOMAINS).index(cell["source_domain"]), cell["source_images"], cell["source"])
    return source, size_order(cell["model"]), cell["method"], cell["recipe"] or ""


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
        cell["metric"] = AUTO[cell["target_domain"]] if metric == "auto" else metric
        cell |= spread([run[cell["metric"]] for run in runs if run[cell["metric"]] is not None])
        classes = {run["classes"] for run in runs}
        cell["classes"] = classes.pop() if len(classes) == 1 else 0
        cells.append({**cell, "source_images": images[cell["source"]]})
    cells.sort(key=lambda cell: (line_order(cell), cell["shots"] or math.inf))
    panels = group(cells, TARGET)
    return {key: panels[key] for key in sorted(panels, key=lambda key: (key[1] != "natural", key))}


def differing(cells):
    """Those of method and recipe in which lines differ: only these need to be said."""
    return [key for key in ("method", "recipe") if len(group(cells, (key,))) > 1]


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

RULE = """\
Cells: mean ± standard deviation over seeds (number of seeds). Bold: the best mean of a column and \
every mean no further below it than √(a² + b²), where a and b are the half-widths of the two 95 % \
intervals (Student t over seeds). One seed has no interval: such a cell is bold only as the best."""


def is_bold(cell, column):
    """Whether a cell has the best mean of its column, or one within noise of it as RULE says."""
    best = max(column, key=lambda other: other["mean"])
    gap = best["mean"] - cell["mean"]  # nothing is within nan: no interval, no claim
    return len(column) > 1 and (gap == 0 or gap <= math.hypot(best["ci95"], cell["ci95"]))


def cell_text(cell, column):
    """A cell as **61.2 ± 3.1 (5)**, a dash where nothing was run."""
    if cell is None or cell["n"] == 0:
        return "undefined (0)" if cell else "–"
    _, factor, decimals = METRICS[cell["metric"]]
    values = [cell["mean"], cell["sd"]][: cell["n"]]  # one seed has no deviation
    text = " ± ".join(f"{factor * value:.{decimals}f}" for value in values) + f" ({cell['n']})"
    return f"**{text}**" if is_bold(cell, column) else text


def markdown(panels):
    """{target: cells} -> Markdown text: a table a target, rows source x model, columns shots."""
    parts = []
    for (target, domain), cells in panels.items():
        names = ["source", "model", *differing(cells)]
        shots = sorted({cell["shots"] for cell in cells}, key=lambda shot: shot or math.inf)
        columns = [[c for c in cells if c["shots"] == shot and c["n"]] for shot in shots]
        rows = [names + [f"{shot}-shot" if shot else "full" for shot in shots]]
        for line in group(cells, LINE).values():
            at = {cell["shots"]: cell for cell in line}
            head = [(line[0][name] or "–").replace("|", r"\|") for name in names]
            rows.append(head + [cell_text(at.get(s), c) for s, c in zip(shots, columns)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, ["-" * width for width in widths])
        parts.append(f"### {target} ({domain} target): {METRICS[cells[0]['metric']][0]}\n")
        parts += [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows] + [""]
    return "\n".join([*parts, RULE, ""])


def write_csv(path, panels):
    """{target: cells} -> CSV, a row a cell: fractions, ci95 the half-width, undefined empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for cell in [cell for cells in panels.values() for cell in cells]:
            undefined = [key for key in ("mean", "sd", "ci95") if math.isnan(cell[key])]
            full = {"shots": cell["shots"] or "full"}
            writer.writerow({**cell, **full, **dict.fromkeys(undefined)})


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def line_style(hue, filling, shade, marker, dashes):
    """Keywords of Line2D; shade from 0 to 1, the others as in the settings."""
    colour = LinearSegmentedColormap.from_list("", hue)(shade)
    return {
        "color": colour,
        "markerfacecolor": filling or colour,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": 0.9 + 0.9 * shade,
        "markersize": 3.8,
    }


def line_styles(cells):
    """Cells -> {line: keywords of Line2D}, in the order of the legend.

    Hue and filling tell the domain; shade and width the source, darker and thicker is larger;
    marker and dashes the model (with its method and recipe).
    """
    lines = list(group(sorted(cells, key=line_order), LINE))
    models = sorted({line[2:] for line in lines}, key=lambda m: (size_order(m[0]), str(m[1:])))
    styles = {}
    for line in lines:
        sources = list(dict.fromkeys(other[0] for other in lines if other[1] == line[1]))
        shade = sources.index(line[0]) / (len(sources) - 1) if len(sources) > 1 else 0.5
        model = models.index(line[2:])
        marker = MARKERS[model % len(MARKERS)]
        dashes = LINES[(len(models) - 1 - model) % len(LINES)]
        styles[line] = line_style(*DOMAINS[line[1]][1:], shade, marker, dashes)
    return styles


def draw_x_axis(ax, cells):
    """Log axis of shots, full-shot set apart at its end; returns {shots: place on the axis}."""
    shots = sorted({cell["shots"] for cell in cells if cell["shots"]})
    places = {shot: float(shot) for shot in shots}
    decades = math.log10(shots[-1] / shots[0]) if shots else 0.0
    gap = 10 ** max(0.3, 0.2 * decades)  # factor from the last shots to "full"
    ax.set_xscale("log")
    if any(cell["shots"] is None for cell in cells):
        full = places[None] = shots[-1] * gap if shots else 1.0
        ax.axvspan(full / gap**0.5, full * gap**0.5, color="#efefef", linewidth=0)
    width = decades + 2 * math.log10(gap)  # of the axis, in decades
    labels, last = [], 0.0
    for shot, place in places.items():  # crowded ticks stay, their labels do not
        fits = not last or math.log10(place / last) > 0.07 * width
        labels.append(str(shot or "full") if fits else "")
        last = place if fits else last
    ax.set_xticks(list(places.values()), labels)
    ax.minorticks_off()
    ax.set_xlim(min(places.values()) / gap**0.5, max(places.values()) * gap**0.5)
    return places


def chance(cells):
    """Score of guessing as (fraction, its name); None for average precision, and for accuracy
    when the runs of the target do not agree on its number of classes."""
    classes = max(cell["classes"] for cell in cells)
    if cells[0]["metric"] == "accuracy" and {classes} == {c["classes"] for c in cells} != {0}:
        return 1 / classes, f"1/{classes}"
    return (0.5, "0.5") if cells[0]["metric"] == "mean_auc" else None


def draw_y_axis(ax, cells):
    """Name and limits of the metric, and the level of chance, labelled in the right margin."""
    name, factor, _ = METRICS[cells[0]["metric"]]
    bars = [(cell["mean"], np.nan_to_num(cell["ci95"])) for cell in cells if cell["n"]]
    ends = [mean + side * bar for mean, bar in bars for side in (-1, 1)]
    if not ends:
        ends = [0, 1]
        ax.text(0.5, 0.7, "undefined in every run", transform=ax.transAxes, ha="center")
    if level := chance(cells):
        ends.append(level[0])
        ax.axhline(factor * level[0], color="black", linewidth=0.8, linestyle=":", zorder=1)
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 6.5}
        ax.text(1.02, factor * level[0], f"chance\n({level[1]})", **place)
    # A t interval of few seeds can leave [0, 1]; the axis does not follow it there.
    low, high = max(0, min(ends)), min(1, max(ends))
    margin = 0.05 * (high - low) or 0.05
    ax.set_ylim(factor * (low - margin), factor * (high + margin))
    ax.set_ylabel(name)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)


def draw_panel(ax, target, cells, styles):
    """Draw the lines of one target, each moved sideways a little so that the intervals part."""
    title = f"{textwrap.fill(target[0], 40)}\n{target[1]} target"
    ax.set_title(title, color=DOMAINS[target[1]][1][-1], fontsize=8.5)
    places = draw_x_axis(ax, cells)
    draw_y_axis(ax, cells)
    factor = METRICS[cells[0]["metric"]][1]
    lines = group([cell for cell in cells if cell["n"]], LINE)
    step = min(0.008, 0.06 / len(lines)) if lines else 0  # of the axis, 6 % for them all
    step *= np.ptp(np.log10(ax.get_xlim()))  # decades
    for place, (line, points) in enumerate(lines.items()):
        shift = 10 ** (step * (place - (len(lines) - 1) / 2))
        x = [places[point["shots"]] * shift for point in points]
        y, bars = ([factor * point[key] for point in points] for key in ("mean", "ci95"))
        look = {"elinewidth": 0.6, "capsize": 1.2, "capthick": 0.6, "zorder": 3}
        drawn = ax.errorbar(x, y, yerr=bars, **styles[line], **look)
        for bar in (*drawn.lines[1], *drawn.lines[2]):
            bar.set_alpha(0.6)  # where many bars cross, the lines stay in front
        drawn.lines[0].set_gid(" ".join(["line", target[0], *filter(None, line)]))  # for the SVG


def draw_legend(fig, cells, styles):
    """One legend under the panels: natural and no sources on the left, medical on the right."""
    differ = [LINE.index(key) for key in differing(cells)]
    blank = Line2D([], [], linestyle="none")
    columns = [[], []]
    for domain, (heading, *_) in DOMAINS.items():
        lines = [line for line in styles if line[1] == domain]
        column = columns[domain == "medical"]
        column += [(blank, heading)] if lines else []
        for line in lines:
            words = [line[0], line[2], *(line[place] or "–" for place in differ)]
            column.append((Line2D([], [], **styles[line]), ", ".join(words)))
    widths = [max((len(label) for _, label in column), default=0) for column in columns]
    rows = max(map(len, columns))
    if all(widths) and 0.06 * sum(widths) + 1 < fig.get_figwidth():  # inches: they fit in one row
        columns = [column + [(blank, "")] * (rows - len(column)) for column in columns]
    else:
        rows = 0
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "fontsize": 7.5}
    entries = zip(*(columns[0] + columns[1]))
    return fig.legend(*entries, ncols=2 if rows else 1, handlelength=3.2, **place)


def footnote(cells):
    """What a reader of the figure must be told: seeds, intervals, shades."""
    counts = {cell["n"] for cell in cells if cell["n"]}
    several = sorted(counts - {1})
    seeds = " to ".join(str(n) for n in dict.fromkeys(several[:1] + several[-1:]))
    parts = []
    if several:
        parts.append(f"Mean and its 95 % interval over {seeds} seeds (Student t).")
    if 1 in counts:
        parts.append("Points without a bar: no interval with one seed.")
    cells = [cell for cell in cells if cell["source_domain"]]
    sizes, sources, domains = (
        group(cells, ("source_domain", *keys)) for keys in (["source_images"], ["source"], [])
    )
    if all(images for _, images in sizes) and len(sizes) == len(sources) > len(domains):
        parts.append("Darker and thicker: more images in pre-training.")
    return " ".join(parts)


def draw_footnote(fig, legend, text):
    """Write the text below the legend."""
    fig.draw_without_rendering()  # places the legend
    bottom = legend.get_window_extent().transformed(fig.transFigure.inverted()).y0
    note = textwrap.fill(text, round(20 * fig.get_figwidth()), break_on_hyphens=False)
    fig.text(0.5, bottom, note, ha="center", va="top", fontsize=6.5)


def draw_curves(panels, title):
    """Few-shot curves: {target: cells} -> Figure with a panel a target, a legend and a footnote."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(3.3, PANEL[0] * columns)
    fig = Figure(figsize=(width, PANEL[1] * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).flat
    cells = [cell for panel in panels.values() for cell in panel]
    styles = line_styles(cells)
    for ax, (target, panel) in zip(axes, panels.items()):
        draw_panel(ax, target, panel, styles)
    for ax in axes[len(panels) :]:
        ax.remove()
    fig.supxlabel("training images per class (shots)", fontsize=8)
    fig.suptitle(title, fontsize=10)
    draw_footnote(fig, draw_legend(fig, cells, styles), footnote(cells))
    return fig


FIGURES = {"fewshot": draw_curves}  # stem of the files -> ({target: cells}, title) -> Figure


# ------------------------------------------------------------------------------------------------
# Curves of training
# ------------------------------------------------------------------------------------------------


def log_record(data):
    """One line of log.jsonl, parsed -> {"step" and those keys of CURVES, and top5, that it has a
    number for}. Raises ValueError that says what is wrong."""
    if not isinstance(data, dict) or not data.keys() & {"loss", "test"}:
        raise ValueError('neither {"step", "loss", ...} nor {"step", "test"}')
    step, test = data.get("step"), data.get("test", {})
    if type(step) is not int or not 0 <= step < 1e15:
        raise ValueError(f"step is {step!r:.40}")
    if not isinstance(test, dict):
        raise ValueError(f"test is {test!r:.40}")
    values = {key: data.get(key) for key in CURVES if key not in METRICS}
    values |= {key: test.get(key) for key in ("accuracy", "mean_auc", "top5")}
    values = {key: value for key, value in values.items() if value is not None}
    for key, value in values.items():
        if type(value) not in (int, float) or not abs(value) < 1e300:  # catches NaN too
            raise ValueError(f"{key} is {value!r:.40}")
    return {"step": step, **values}


def read_log(path):
    """log.jsonl -> list of `log_record`s. Raises ValueError naming the first bad line.

    A last line that a kill cut short, known by its lack of a newline, is passed over.
    """
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        mend = "remove that line, or train anew in another folder"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number}: not JSON; {mend}") from None
        try:
            records.append(log_record(data))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}; {mend}") from None
    if not records:
        raise ValueError(f"{path} is empty: wait for its run to log, or leave the folder out")
    return records


def read_source(folder):
    """Domain and number of images of a run's source by its result.json; (None, 0) without."""
    try:
        data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        domain, images = data["source_domain"], data["source_images"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, 0  # it tells the colour alone
    return (domain, images) if domain in list(RUNS) and type(images) is int else (None, 0)


def run_points(log, domain):
    """Records of a log -> {key of CURVES: [(step, value)]}, one test metric among them: that of
    the domain or, before it is known, accuracy where only multi-class runs have a top5."""
    keys = [*CURVES, "top5"]
    points = {key: [(r["step"], r[key]) for r in log if key in r] for key in keys}
    wanted = AUTO.get(domain, "accuracy" if points.pop("top5") else "mean_auc")
    spare = {"accuracy": "mean_auc", "mean_auc": "accuracy"}[wanted]
    if points[wanted]:
        points[spare] = []
    return points


def load_runs(folders):
    """Folders -> runs (dicts of name, domain, images, points) in the order of the legend: by
    domain, small sources and small models first. The name is the folder's, with as many of its
    parents as tell it apart. Raises ValueError for a folder without a good log.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # of a link: its own name
    runs = []
    for folder, own in zip(folders, parts):
        if not (folder / "log.jsonl").is_file():
            mend = "--curves takes folders that pretrain.py filled, runs/SOURCE-MODEL"
            raise ValueError(f"no log.jsonl in {folder}: {mend}")
        depth = 1
        while sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        domain, images = read_source(folder)
        points = run_points(read_log(folder / "log.jsonl"), domain)
        about = {"name": "/".join(own[-depth:]), "domain": domain, "images": images}
        runs.append({**about, "points": points})
    order = list(RUNS)
    return sorted(
        runs, key=lambda run: (order.index(run["domain"]), run["images"], size_order(run["name"]))
    )


def run_styles(runs):
    """Runs -> keywords of Line2D of each: hue and filling tell the domain, shade and marker the
    run, dashes too where the markers are used up (dashes garble a noisy line)."""
    styles = []
    for place, run in enumerate(runs):
        peers = [other["name"] for other in runs if other["domain"] == run["domain"]]
        shade = peers.index(run["name"]) / (len(peers) - 1) if len(peers) > 1 else 0.5
        cycle, marker = divmod(place, len(MARKERS))
        dashes = LINES[cycle % len(LINES)]
        styles.append(line_style(*RUNS[run["domain"]][1:], shade, MARKERS[marker], dashes))
    return styles


def draw_log_axis(ax, key, values):
    """Title and y axis of a panel: from 0 up, but logarithmic where the values span decades."""
    ax.set_title(CURVES[key][0], loc="left", fontsize=8, pad=3)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.locator_params(axis="y", nbins=4)
    if key in METRICS:
        return
    low, high = min((v for v in values if v > 0), default=0), max(values)
    if key == "lr":
        low = max(low, 1e-4 * high)  # a cosine's last steps come near 0: the line leaves below
    if key not in ("loss", "lr", "grad_norm") or high <= 30 * low or low <= 0:
        ax.set_ylim(min(0, *values), 1.1 * high if high > 0 else None)
        return
    ax.set_yscale("log")
    margin = (high / low) ** 0.08
    ax.set_ylim(low / margin, high * margin)
    subs = (1, 3) if high < 300 * low else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()


def draw_run(ax, key, run, style, lag):
    """Draw a run's line, its markers shifted by the share `lag` of their distance. Of many noisy
    points it is that of their medians in a hundred parts, over a faint line through them all."""
    x, y = np.array(run["points"][key], float).T
    y = CURVES[key][1] * y
    name = f"{key} {run['name']}"
    if len(x) > DENSE and key != "lr":
        ax.plot(x, y, color=style["color"], linewidth=0.4, alpha=0.25, gid=f"points {name}")
        x, y = ([np.median(part) for part in np.array_split(v, 100)] for v in (x, y))
    every = math.ceil(len(x) / MARKS)
    ax.plot(x, y, **style, markevery=(int(lag * every), every), gid=f"line {name}")


def draw_logs(runs, title):
    """Runs -> Figure with a panel for each key of CURVES that a run has, over a common step axis,
    and a line a run. Raises ValueError when there is nothing to draw."""
    keys = [key for key in CURVES if any(run["points"][key] for run in runs)]
    if not keys:
        raise ValueError("the logs hold no number: let the runs train on, and draw again")
    heights = [CURVES[key][2] for key in keys]
    fig = Figure(figsize=(2 * PANEL[0], sum(heights) + 0.3), layout="constrained")
    axes = fig.subplots(len(keys), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    styles = run_styles(runs)
    for ax, key in zip(axes, keys):
        for place, (run, style) in enumerate(zip(runs, styles)):
            if run["points"][key]:
                draw_run(ax, key, run, style, place / len(runs))  # those that coincide stay seen
        draw_log_axis(ax, key, np.concatenate([line.get_ydata() for line in ax.lines]))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, not 20000
    axes[-1].set_xlabel("step")
    fig.suptitle(title, fontsize=10)
    lines = [Line2D([], [], **style) for style in styles]
    names = [run["name"] for run in runs]
    columns = int(fig.get_figwidth() / (0.06 * max(map(len, names)) + 0.6))  # that fit, in inches
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "fontsize": 7.5}
    legend = fig.legend(lines, names, ncols=max(1, min(columns, 4)), handlelength=3.2, **place)
    domains = [domain for domain in RUNS if any(run["domain"] == domain for run in runs)]
    notes = []
    if len(domains) > 1:
        words = "; ".join(RUNS[domain][0] for domain in domains)
        notes.append(f"Source of pre-training: {words}.")
    if any((line.get_gid() or "").startswith("points") for ax in axes for line in ax.lines):
        notes.append("Faint: every logged value; over it: medians of 100 equal parts of a run.")
    draw_footnote(fig, legend, " ".join(notes))
    fig.set_layout_engine("none")  # its last digits vary: same input, same file
    for ax in axes:
        ax.set_position([round(float(side), 5) for side in ax.get_position().bounds])
    return fig


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def save(folder, stem, fig, panels=None):
    """Write folder/stem.{png,svg} and, of panels, .{md,csv}: beside first, then renamed. Returns
    the paths."""
    look = {"bbox_inches": "tight", "dpi": 200}
    writers = {
        "png": lambda path: fig.savefig(path, format="png", **look),
        "svg": lambda path: fig.savefig(path, format="svg", metadata={"Date": None}, **look),
    }
    tables = {
        "md": lambda path: path.write_text(markdown(panels), encoding="utf-8"),
        "csv": lambda path: write_csv(path, panels),
    }
    writers |= tables if panels is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"{stem}.{end}": folder / f".{stem}.{end}.{os.getpid()}" for end in writers}
    try:
        for write, beside in zip(writers.values(), paths.values()):
            write(beside)
        for path, beside in paths.items():
            beside.replace(path)
    finally:
        for beside in paths.values():
            beside.unlink(missing_ok=True)
    return list(paths)


def known(name, choices, option):
    """Return name if it is among choices, else raise ValueError with the nearest of them."""
    if name in choices:
        return name
    near = difflib.get_close_matches(name, choices, n=1)
    mend = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
    raise ValueError(f"{option} {name} is unknown: {mend}")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ordinary errors, for `main` to say in one line."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """Command line -> Namespace; folders unites the positional ones and --results."""
    help_format = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=help_format, allow_abbrev=False)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="folders of result files (default: results)")
    add("--results", nargs="+", type=Path, default=[], help="the same, as an option")
    text = "run folders, which hold log.jsonl: draw how their training went, and nothing else"
    add("--curves", nargs="+", type=Path, default=[], metavar="RUN", help=text)
    text = "folder for fewshot.* or curves.* (default: figures)"
    add("--out", type=Path, default="figures", help=text)
    text = "accuracy (shown in percent), mean_auc, mean_ap (fractions from 0 to 1) or auto: "
    text += "accuracy for natural targets, mean_auc for medical ones (default: auto)"
    add("--metric", default="auto", help=text)
    add("--target", nargs="+", default=[], help="targets to show (default: all that are there)")
    add("--title", default="", help="title over the figure (default: none)")
    args = parser.parse_args(argv)
    args.folders += args.results
    if args.curves and (args.folders or args.target or args.metric != "auto"):
        raise ValueError("--curves draws run folders alone: no results, --metric or --target")
    args.folders = args.folders or [Path("results")]
    return args


def run(args):
    """Read, average, draw, write; raises OSError or ValueError with one line for the user."""
    if args.curves:
        runs = load_runs(args.curves)
        with matplotlib.rc_context(STYLE):
            written = save(args.out, "curves", draw_logs(runs, args.title))
        print(*(f"wrote {path}" for path in written), sep="\n")
        return
    known(args.metric, ["auto", *METRICS], "--metric")
    records, skipped, doubled = load(args.folders)
    tell(skipped, f"files skipped: {len(skipped)}")
    tell(doubled, f"runs of which two files differ, the newest counts: {len(doubled)}")
    if not records:
        fill = f"no usable result file in {', '.join(map(str, args.folders))}: "
        raise ValueError(f"{fill}`python fewshot.py --out {args.folders[0]}` writes some")
    targets = sorted({record["target"] for record in records})
    wanted = [known(target, targets, "--target") for target in args.target] or targets
    panels = summarise([r for r in records if r["target"] in wanted], args.metric)
    with matplotlib.rc_context(STYLE):
        written = [
            path
            for stem, draw in FIGURES.items()
            for path in save(args.out, stem, draw(panels, args.title), panels)
        ]
    print(markdown(panels), *(f"wrote {path}" for path in written), sep="\n")


def main(argv=None):
    """Run the command line; returns the exit status, 2 after a line that says what is wrong."""
    try:
        run(parse(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
