"""Scores over shots, a panel a target; the study's own figures (arXiv:2106.00116), one a target."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure  # without pyplot: writes files, needs no display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from charts import results, style
from charts.style import BARS, BLANK, LOOKS, PANEL

CROWDED = 8  # a panel with more lines than that needs the width of two
STUDY_NOTE = "Mean ± standard deviation over seeds. Over networks: sources with several of them."


def draw_few_shot_lines(ax, cells, styles, half, chance=None):
    """Lines over shots, with intervals of this half-width: ci95 or sd; published ones beside own
    ones paler. chance: its level, as a fraction, and its name."""
    # A log axis of shots, with full-shot set apart at its end.
    places = {shots: shots for shots in sorted({cell.shots for cell in cells if cell.shots})}
    last = max(places, default=1)
    gap = max(2, (last / min(places, default=1)) ** 0.2)  # from the last shots to "full"
    if any(cell.shots is None for cell in cells):
        places[None] = last * gap
        ax.axvspan(last * gap**0.5, last * gap**1.5, color="#efefef", linewidth=0)
    ax.set_xscale("log")
    ax.set_xlim(min(places.values()) / gap**0.5, max(places.values()) * gap**0.5)
    ax.set_xticks(list(places.values()), [str(shots or "full") for shots in places])
    ax.minorticks_off()
    metric = results.METRICS[cells[0].metric]
    factor, known = metric.factor, [cell for cell in cells if cell.n]
    means = np.array([cell.mean for cell in known] or [0, 1])
    # A t interval of few seeds can be longer than all else, and leave [0, 1]: the axis follows the
    # means, and intervals as far as half their range beyond.
    bars = np.nan_to_num([cell.ci95 for cell in known] or [0, 0])
    reach = np.minimum(bars, 0.5 * np.ptp(means) or 1)
    low, high = max(0, min(means - reach)), min(1, max(means + reach))
    if chance:
        level, name = chance
        ax.axhline(factor * level, color="black", linewidth=0.8, linestyle=":", zorder=1)
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 6.5}
        ax.text(1.02, factor * level, f"chance\n({name})", **place)
        low, high = min(low, level), max(high, level)
    margin = 0.05 * (high - low) or 0.05
    ax.set(ylim=(factor * (low - margin), factor * (high + margin)), ylabel=metric.axis)
    lines = results.group(known, "line", "target.origin")
    both = len({origin for _, origin in lines}) > 1
    step = min(0.008, 0.06 / max(1, len(lines)))  # of the axis, 6 % for them all
    step *= np.ptp(np.log10(ax.get_xlim()))  # decades
    for place, ((line, origin), points) in enumerate(lines.items()):
        shift = 10 ** (step * (place - (len(lines) - 1) / 2))  # so that the intervals part
        x = [places[point.shots] * shift for point in points]
        y, bars = ([factor * getattr(point, key) for point in points] for key in ("mean", half))
        look = styles[line] | {"alpha": 0.5 if both and origin == "published" else 1}
        drawn = ax.errorbar(x, y, yerr=bars, zorder=3, **look, **BARS)
        for bar in (*drawn.lines[1], *drawn.lines[2]):
            bar.set_alpha(0.5)  # where many cross, the lines stay in front
        name = points[0].target.name
        drawn.lines[0].set_gid(" ".join(["line", name, *filter(None, line)]))  # for the SVG


def draw_few_shot(cells, styles, title="", notes=()):
    """Cells, {line: its style} -> Figure with a panel a target: two a row, or one where one of them
    is crowded."""
    panels = results.group(cells, "target")
    crowded = any(len({cell.line for cell in panel}) > CROWDED for panel in panels.values())
    columns = 1 if crowded or len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    width = 2 * PANEL[0] if crowded else max(3.3, PANEL[0] * columns)
    fig = Figure(figsize=(width, PANEL[1] * rows), layout="constrained")
    for place, (target, panel) in enumerate(panels.items(), start=1):
        ax = fig.add_subplot(rows, columns, place)
        heading = f"{textwrap.fill(target.name, 40)}\n{target.domain} target"
        heading += results.mark(target.origin)
        ax.set_title(heading, color=LOOKS[target.domain].hues[-1], fontsize=8.5)
        metric, classes = panel[0].metric, panel[0].classes
        chance = (0.5, "0.5") if metric == "mean_auc" else None  # of precision: unknown
        if metric == "accuracy" and {cell.classes for cell in panel} == {classes or None}:
            chance = 1 / classes, f"1/{classes}"
        draw_few_shot_lines(ax, panel, styles, "ci95", chance)
    fig.supxlabel("training images per class (shots)", fontsize=8)
    fig.suptitle(title)
    handles = {line: Line2D([], [], **look) for line, look in styles.items()}
    style.draw_foot(fig, [style.NOTE, *notes], style.line_columns(handles))
    return fig


def study_cells(runs, metric):
    """Results -> {target's name: its cells}, own and published together; metric auto: accuracy on
    the study's targets but PadChest, as there, and elsewhere as everywhere."""
    found = {}
    for target, members in results.group(runs, "target").items():
        name = results.plain_name(target.name).partition(" ")[0]
        accurate = metric == "auto" and name in results.TARGETS and name != "padchest"
        cells = results.summarise(members, "accuracy" if accurate else metric)
        found.setdefault(target.name, []).extend(cell for cell in cells if cell.n)
    return {name: cells for name, cells in sorted(found.items()) if cells}


def draw_study(cells, styles, title="", notes=()):
    """Cells of one target, {line: its style} -> Figure: bars by shots; under them lines over shots
    from natural sources, from medical ones, and over networks with all images; ± a deviation."""
    metric = results.METRICS[cells[0].metric]
    factor, lines = metric.factor, {cell.line for cell in cells}
    styles = {line: look for line, look in styles.items() if line in lines}
    networks, bars = sorted({line.model for line in lines}, key=results.size_order), {}
    for line, look in styles.items():
        # Hue and shade of the source; the largest network full, others hatched.
        rank, colour = networks[::-1].index(line.model), look["color"]
        bars[line] = {"facecolor": "white" if rank else colour, "edgecolor": colour}
        bars[line] |= {"hatch": ("", "////", "....", "xxxx")[min(rank, 3)], "linewidth": 0.6}
    fig = Figure(figsize=(7, 4.6), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.05))
    above.suptitle(title or f"{cells[0].target.name}: {metric.axis}")
    ax = above.subplots()
    # In a group the order of the legend, own bars before published ones, which are paler.
    found = {(cell.line, cell.target.origin) for cell in cells}
    kinds = sorted(found, key=lambda kind: (list(bars).index(kind[0]), kind[1]))
    pale = len({origin for _, origin in kinds}) > 1
    shots = sorted({cell.shots for cell in cells}, key=lambda shots: shots or math.inf)
    for cell in cells:
        line, origin = kind = cell.line, cell.target.origin
        x = shots.index(cell.shots) * (len(kinds) + 1.5) + kinds.index(kind)
        look = {"alpha": 0.5 if pale and origin == "published" else 1, "error_kw": BARS}
        ax.bar(x, factor * cell.mean, 0.85, yerr=factor * cell.sd, **look, **bars[line])
    middles = [place * (len(kinds) + 1.5) + (len(kinds) - 1) / 2 for place in range(len(shots))]
    ax.set_xticks(middles, [results.shots_words(number) for number in shots])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=metric.axis, ylim=(0, None), xmargin=0.01)
    few, full = results.group(cells, "line.source_domain"), [c for c in cells if c.shots is None]
    axes = below.subplots(1, len(few) + bool(full), squeeze=False)[0]
    few_axes = axes[: len(few)]
    for ax, domain in zip(few_axes, [domain for domain in LOOKS if domain in few]):
        draw_few_shot_lines(ax, few[domain], styles, "sd")
        ax.set(xlabel="training images per class", ylabel="")
        heading = LOOKS[domain].heading.removesuffix(":")
        ax.set_title(heading, fontsize=7.5, color=LOOKS[domain].hues[-1])
    lows, highs = zip(*(ax.get_ylim() for ax in few_axes))
    for ax in few_axes:
        ax.set_ylim(min(lows), max(highs))
    if full:
        places = [name for name in networks if name in {cell.line.model for cell in full}]
        alike = "line.source", "line.source_domain", "line.method", "line.recipe", "target.origin"
        for row in results.group(full, *alike).values():
            if len(row) == 1 < len(places):
                continue
            row = sorted(row, key=lambda cell: places.index(cell.line.model))
            x = [places.index(cell.line.model) for cell in row]
            y, sd = ([factor * getattr(cell, key) for cell in row] for key in ("mean", "sd"))
            look = styles[row[-1].line] | {"linestyle": "-", "marker": "."}
            axes[-1].errorbar(x, y, yerr=sd, **look, **BARS)
        axes[-1].set_xticks(range(len(places)), places)
        axes[-1].set(xlim=(-0.3, len(places) - 0.7))
        axes[-1].set_title("all training images, a scale of its own", fontsize=7.5)
    axes[0].set_ylabel(metric.axis)
    columns = style.line_columns({line: Patch(**look) for line, look in bars.items()})
    columns[0].append((BLANK, "lines:"))
    for name in networks:
        look = next(look for line, look in styles.items() if line.model == name)
        grey = look | {"color": "#555555", "markerfacecolor": "#555555", "linewidth": 1.2}
        columns[0].append((Line2D([], [], **grey), name))
    style.draw_foot(fig, [STUDY_NOTE, *notes], columns)
    return fig
