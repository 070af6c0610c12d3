"""How training went, from log.jsonl: panels over the step, a line a run."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from charts import style
from charts.results import METRICS, size_order
from engine.console import MAIN_METRIC


class Curve(NamedTuple):
    title: str  # of its panel
    factor: int = 1  # from logged to shown number


TESTS = {
    key: Curve(f"test {METRICS[key].axis}", METRICS[key].factor) for key in MAIN_METRIC.values()
}
CURVES = {  # key in log.jsonl -> its panel
    "loss": Curve("training loss"),
    **TESTS,
    "lr": Curve("learning rate"),
    "grad_norm": Curve("gradient norm"),
    "clipped": Curve("units with clipped gradients (%)", 100),
    "images_per_second": Curve("images per second"),
    "data_wait": Curve("share of time waiting for data (%)", 100),
}
# Of the source's domain, None while a run has no result.json.
LOOKS = style.LOOKS | {None: style.Look("", ("#cbc31b", "#2f9f5a", "#7b3fae", "#270742"))}
NOTE = """\
Source of pre-training: orange, natural images; blue with hollow markers, medical images; yellow \
to violet, no result.json yet."""
MARKS = 8  # about so many markers a line
DENSE = 200  # more points are noise to the eye: medians of a hundred parts are drawn over them


class Log(NamedTuple):  # one training
    name: str  # of its folder, with as many of its parents as tell it apart
    domain: str | None  # of its source; None without result.json
    images: int  # of its source; 0 without
    points: dict  # key of CURVES -> [(step, value)]


def load_logs(folders):
    """Folders -> list of Log in the order of the legend: by domain, small sources and small models
    first. Raises ValueError for a folder without log.jsonl, and naming its first bad line."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # of a link: its own name
    logs, order = [], list(LOOKS)
    for folder, own in zip(folders, parts):
        path, records, fault = folder / "log.jsonl", [], None
        if not path.is_file():
            mend = "--curves takes folders that pretrain.py filled, runs/SOURCE-MODEL"
            raise ValueError(f"no log.jsonl in {folder}: {mend}")
        # A last line that a kill cut short, known by its lack of a newline, is passed over.
        *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                data = json.loads(line)
                values = {key: data.get(key) for key in ("step", *CURVES) if key not in TESTS}
                values |= {key: data.get("test", {}).get(key) for key in (*TESTS, "top5")}
                for key, value in values.items():
                    known = value is None or type(value) in (int, float) and abs(value) < 1e300
                    if not known or key == "step" and (type(value) is not int or value < 0):
                        fault = fault or f"{key} is {value!r:.40}"  # NaN is not known either
            except (AttributeError, ValueError, RecursionError):
                fault = 'no JSON of {"step", "loss", ...} or {"step", "test"}'
            if fault:
                mend = "remove that line, or train anew in another folder"
                raise ValueError(f"{path} line {number}: {fault}; {mend}")
            records.append({key: value for key, value in values.items() if value is not None})
        if not records:
            raise ValueError(f"{path} is empty: wait for its run to log, or leave the folder out")
        depth = 1
        while sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        try:
            data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            domain = order[order.index(data["source_domain"])]
            images = int(data["source_images"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            domain, images = None, 0  # they tell the colour alone
        points = {key: [(r["step"], r[key]) for r in records if key in r] for key in CURVES}
        # One test metric a run, that of its domain; before that is known, accuracy where only
        # multi-class runs have a top5.
        unknown = "accuracy" if any("top5" in record for record in records) else "mean_auc"
        wanted = MAIN_METRIC.get(domain, unknown)
        if points[wanted]:
            points |= {key: [] for key in TESTS if key != wanted}
        logs.append(Log("/".join(own[-depth:]), domain, images, points))
    return sorted(logs, key=lambda log: (order.index(log.domain), log.images, size_order(log.name)))


def draw_logs(logs, title=""):
    """Logs -> Figure with a panel for each key of CURVES that a run has, and a line a run. Raises
    ValueError when there is nothing to draw."""
    keys = [key for key in CURVES if any(log.points[key] for log in logs)]
    if not keys:
        raise ValueError("the logs hold no number: let the runs train on, and draw again")
    fig = Figure(figsize=(2 * style.PANEL[0], 1.1 * len(keys) + 0.3), layout="constrained")
    axes = fig.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    looks = []
    for place, log in enumerate(logs):
        # Hue and filling tell the domain, shade and marker the run; dashes too where the markers
        # are used up, as they garble a noisy line.
        shade = style.shades(other.name for other in logs if other.domain == log.domain)[log.name]
        cycle, marker = divmod(place, len(style.MARKERS))
        dashes = style.DASHES[cycle % len(style.DASHES)]
        looks.append(style.line_style(LOOKS[log.domain], shade, style.MARKERS[marker], dashes))
    for ax, key in zip(axes, keys):
        for place, (log, look) in enumerate(zip(logs, looks)):
            if not log.points[key]:
                continue
            x, y = np.array(log.points[key], float).T
            y, name = CURVES[key].factor * y, f"{key} {log.name}"
            if len(x) > DENSE and key != "lr":
                ax.plot(x, y, color=look["color"], linewidth=0.4, alpha=0.25, gid=f"points {name}")
                x, y = ([np.median(part) for part in np.array_split(v, 100)] for v in (x, y))
            every = math.ceil(len(x) / MARKS)
            shift = int(place / len(logs) * every)  # of the markers: runs that coincide stay seen
            ax.plot(x, y, **look, markevery=(shift, every), gid=f"line {name}")
        ax.set_title(CURVES[key].title, loc="left", fontsize=8, pad=3)
        ax.locator_params(axis="y", nbins=4)
        values = np.concatenate([line.get_ydata() for line in ax.lines])
        low, high = min(values[values > 0], default=0), max(values)
        if key == "lr":
            low = max(low, 1e-4 * high)  # a cosine's last steps come near 0: the line leaves below
        if key in ("loss", "lr", "grad_norm") and high > 30 * low > 0:
            margin = (high / low) ** 0.08
            ax.set(yscale="log", ylim=(low / margin, high * margin))
            style.log_ticks(ax.yaxis, low, high)
        elif key not in TESTS:  # from 0 up
            ax.set_ylim(min(0, *values), 1.1 * high if high > 0 else None)
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, not 20000
    axes[-1].set_xlabel("step")
    fig.suptitle(title)
    notes = [NOTE]
    if any(len(log.points[key]) > DENSE for log in logs for key in keys if key != "lr"):
        notes.append("Faint: every logged value; over it: medians of 100 equal parts of a run.")
    entries = [(Line2D([], [], **look), log.name) for log, look in zip(logs, looks)]
    half = math.ceil(len(entries) / 2)
    style.draw_foot(fig, notes, [entries[:half], entries[half:]])
    return fig
