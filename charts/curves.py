"""How training went, from log.jsonl: panels over the step, a line a run."""

import json
import math
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator

from charts.panels import DOMAINS, LINES, MARKERS, PANEL, draw_footnote, line_style
from charts.results import AUTO, METRICS, size_order

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

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
