"""The figure of scores over shots: a panel a target."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure  # without pyplot: writes files, needs no display
from matplotlib.lines import Line2D

from charts import results, style
from charts.style import BARS, LOOKS, PANEL

CROWDED = 8  # a panel with more lines than that needs the width of two


def draw_shots_axis(ax, cells):
    """Log axis of shots, full-shot set apart at its end; returns {shots: place on the axis}."""
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
    return places


def draw_few_shot_panel(ax, target, cells, styles):
    """Draw the lines of one target, each moved sideways a little so that the intervals part."""
    words = f"{textwrap.fill(target.name, 40)}\n{target.domain} target{results.mark(target.origin)}"
    ax.set_title(words, color=LOOKS[target.domain].hues[-1], fontsize=8.5)
    chance = (0.5, "0.5") if cells[0].metric == "mean_auc" else None  # of precision: unknown
    classes = cells[0].classes
    if cells[0].metric == "accuracy" and {cell.classes for cell in cells} == {classes or None}:
        chance = 1 / classes, f"1/{classes}"
    draw_few_shot_lines(ax, cells, styles, "ci95", chance)


def draw_few_shot_lines(ax, cells, styles, half, chance=None):
    """Lines over shots, with intervals of this half-width: ci95 or sd; published ones beside own
    ones paler. chance: as of style.draw_y_axis."""
    places = draw_shots_axis(ax, cells)
    style.draw_y_axis(ax, cells, chance)
    factor = results.METRICS[cells[0].metric].factor
    lines = results.group([cell for cell in cells if cell.n], "line", "target.origin")
    both = len({origin for _, origin in lines}) > 1
    step = min(0.008, 0.06 / len(lines)) if lines else 0  # of the axis, 6 % for them all
    step *= np.ptp(np.log10(ax.get_xlim()))  # decades
    for place, ((line, origin), points) in enumerate(lines.items()):
        shift = 10 ** (step * (place - (len(lines) - 1) / 2))
        x = [places[point.shots] * shift for point in points]
        y, bars = ([factor * getattr(point, key) for point in points] for key in ("mean", half))
        look = styles[line] | {"alpha": 0.5 if both and origin == "published" else 1}
        drawn = ax.errorbar(x, y, yerr=bars, zorder=3, **look, **BARS)
        for bar in (*drawn.lines[1], *drawn.lines[2]):
            bar.set_alpha(0.5)  # where many cross, the lines stay in front
        name = points[0].target.name
        drawn.lines[0].set_gid(" ".join(["line", name, *filter(None, line)]))  # for the SVG


def draw_few_shot(cells, styles, title="", notes=()):
    """Cells -> Figure with a panel a target: two a row, or one where one of them is crowded."""
    panels = results.group(cells, "target")
    crowded = any(len({cell.line for cell in panel}) > CROWDED for panel in panels.values())
    columns = 1 if crowded or len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    width = 2 * PANEL[0] if crowded else max(3.3, PANEL[0] * columns)
    fig = Figure(figsize=(width, PANEL[1] * rows), layout="constrained")
    styles = style.styles_of(cells, styles)
    for place, (target, panel) in enumerate(panels.items(), start=1):
        draw_few_shot_panel(fig.add_subplot(rows, columns, place), target, panel, styles)
    fig.supxlabel("training images per class (shots)", fontsize=8)
    fig.suptitle(title)
    style.draw_foot(fig, line_columns(cells, styles), [style.NOTE, *notes])
    return fig


def line_columns(cells, styles):
    """The two columns of a legend of lines, named by source and network."""
    differ = results.differing(cells)

    def entry(line):
        return Line2D([], [], **styles[line]), f"{line.source}, {network_name(line, differ)}"

    return style.domain_columns(styles, entry)


def network_name(line, differ):
    """The network of a line, with its method and recipe where lines differ in them."""
    return ", ".join([line.model, *(getattr(line, key) or "–" for key in differ)])
