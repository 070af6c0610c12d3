"""Two figures of gains from scale: paired differences by group, gain against domain distance."""

import itertools
import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from charts import gains as numbers
from charts import results, style
from charts.style import LOOKS, MARKERS

SIGNS = {  # verdict -> marker, the same as text
    "above": ("^", "▲"),
    "unclear": ("o", "○"),
    "below": ("v", "▼"),
    "no interval": ("x", "×"),
}
ROW, HEAD = 0.13, 1.1  # inches: a row of a panel, its titles and axis
GAIN_NOTE = """\
Row: target and shots. ▲ 95 % interval above zero, ○ not off zero, ▼ below zero, × one seed; on \
the right: cells above zero by number of shots. Larger minus smaller network (source), run by run \
of the same source (network) and seed, averaged over these for each seed; Student t over seeds. A \
seed that one arm lacks counts in neither"""
DISTANCE_NOTE = """\
A point is a source (or pair of sources), target and number of shots; gain in the metric of the \
target, from 0 to 1. Line: least squares, with 95 % band and slope (Student t over points, which \
share sources, targets and seeds: true uncertainty is larger)."""
AXES = {  # distance -> name at the axis
    "frechet_relative": "Fréchet distance of source and target\n(1: of halves of the source)",
    "energy": "energy coefficient of source and target",
}


def draw_bands(ax, rows, gains):
    """Band and count of each regime of shots; rows: [(shots, target)] from the top."""
    regimes = [numbers.regime(shots) for shots, _ in rows]
    for place, name in enumerate(dict.fromkeys(regimes)):
        first, count = regimes.index(name), regimes.count(name)
        if place % 2 == 0:
            ax.axhspan(first - 0.5, first + count - 0.5, color="#ececec", linewidth=0, zorder=0)
        part = [gain for gain in gains if numbers.regime(gain.shots) == name]
        if part:
            found = numbers.counts(part)
            known = len(part) - found["no interval"]
            text = f"{found['above']} of {known}" if known else "–"
            text += f"\n{name}" if count > 1 else ""
            look = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1.05}
            ax.text(1.03, first + (count - 1) / 2, text, fontsize=6.5, **look)


def draw_gain_panel(ax, rows, gains):
    """The gains of one kind in one group: a row a cell, from few shots to all images; the marker
    tells where the interval lies, without colour too."""
    draw_bands(ax, rows, gains)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    metric = results.METRICS[gains[0].metric]
    for gain in gains:
        hue = LOOKS[gain.line.source_domain].hues[-2]
        look = {"fmt": SIGNS[gain.verdict][0], "color": hue, "markersize": 3.6, "elinewidth": 0.9}
        look |= {"markerfacecolor": "white"} if gain.verdict == "unclear" else {}
        y = rows.index((gain.shots, gain.target.name))
        ax.errorbar(metric.factor * gain.mean, y, xerr=metric.factor * gain.ci95, **look)
    names = [f"{name}, {results.shots_words(shots)}" for shots, name in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=6.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    # Every mean is shown, and intervals up to three times the largest mean.
    top = 3 * max(abs(gain.mean) for gain in gains)
    ends = [gain.mean + s * np.nan_to_num(gain.ci95) for gain in gains for s in (-1, 1)]
    low, high = max(-top, min(0, *ends)), min(top, max(0, *ends))
    margin = 0.06 * (high - low) or 0.01
    ax.set_xlim(metric.factor * (low - margin), metric.factor * (high + margin))
    ax.locator_params(axis="x", nbins=3)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"gain in {metric.gain}")
    found = numbers.counts(gains)
    known = len(gains) - found["no interval"]
    title = f"larger {gains[0].line.kind} better\nin {found['above']} of {known} cells\n"
    title += "   ".join(f"{SIGNS[name][1]} {count}" for name, count in found.items())
    ax.set_title(title, fontsize=7.5)
    ax.spines["left"].set_visible(False)
    ax.grid(False)


def gain_rows(gains):
    """Gains -> rows of their panel, [(shots, target)] from few shots to all images."""
    rows = {(gain.shots, gain.target.name) for gain in gains}
    return sorted(rows, key=lambda row: (row[0] or math.inf, row[1]))


def draw_gains(gains, styles, title="", notes=()):
    """Gains -> Figure: a row of panels for each group, a column for each kind of gain (and
    origin), a row in a panel for each target and number of shots."""
    kinds = {
        origin: [kind for kind in numbers.KINDS if kind in results.group(part, "line.kind")]
        for origin, part in sorted(results.group(gains, "target.origin").items())
    }
    alike = "line.source_domain", "target.domain", "line.method", "line.recipe"
    blocks = results.group(gains, *alike).values()
    blocks = [results.group(block, "target.origin") for block in blocks]
    rows = [max(len(gain_rows(part)) for part in block.values()) for block in blocks]
    heights = [HEAD + ROW * count for count in rows]  # inches
    widths = [2.15 * len(part) + 1 for part in kinds.values()]  # inches
    fig = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    shape = {"squeeze": False, "height_ratios": heights, "width_ratios": widths}
    differ = results.differing(gains)
    for block, row in zip(blocks, fig.subfigures(len(blocks), len(kinds), **shape)):
        for origin, part in zip(kinds, row):
            if origin not in block:
                continue
            members, first = results.group(block[origin], "line.kind"), block[origin][0]
            methods = [getattr(first.line, key) or "–" for key in differ]
            heading = ", ".join([first.group, *methods]) + results.mark(origin)
            part.suptitle(heading, fontsize=8.5, fontweight="bold")
            rows = gain_rows(block[origin])
            axes = part.subplots(1, len(kinds[origin]), squeeze=False, sharey=True)[0]
            for ax, panel in itertools.zip_longest(axes, members.values()):
                if panel:
                    draw_gain_panel(ax, rows, panel)
                else:
                    ax.set_axis_off()
    key = "▲ better (95 % interval above zero)   ○ not off zero   ▼ worse"
    fig.suptitle(f"{title}\n{key}".strip(), fontsize=8)
    lacking = sum(gain.lacking for gain in gains)
    style.draw_note(fig, 0, [f"{GAIN_NOTE} ({lacking} cells).", *notes])
    return fig


def draw_distance_panel(ax, points, kind, distance, colours, markers):
    """The points of one kind of gain over one distance; the fitted line, its confidence band, and
    its slope in words."""
    log = distance == "frechet_relative"
    for point in points:
        if point.gain.line.kind == kind:
            hue = colours[point.larger]
            face = LOOKS[point.gain.line.source_domain].filling or hue
            look = {"color": hue, "markerfacecolor": face, "markersize": 4}
            marker = markers[point.gain.target.name]
            ax.plot(point.distances[distance], point.value, marker=marker, **look)
    line = numbers.fit(*numbers.axis_points(points, kind, distance))
    text = "too few points for a line"
    if line:
        x, low, high = line.grid, line.line - line.band, line.line + line.band
        x = 10**x if log else x
        ax.plot(x, line.line, color="black", linewidth=1, zorder=2)
        ax.fill_between(x, low, high, color="#cccccc", alpha=0.6, linewidth=0, zorder=1)
        unit = "for ten times the distance" if log else "from 0 to 1"
        text = f"slope {line.slope:+.3f} ± {line.ci95:.3f}\n{unit}"
    ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7)
    ax.set_title(f"larger {kind}", fontsize=8)
    ax.axhline(0, color="black", linewidth=0.7, linestyle=":", zorder=1)
    if log:
        ax.set_xscale("log")
        style.log_ticks(ax.xaxis, *ax.dataLim.intervalx)
    ax.set_xlabel(AXES[distance])
    ax.grid(axis="x")
    ax.label_outer()


def draw_distance(points, styles, title="", notes=()):
    """Points of `gains.distance_points` -> Figure: a row a kind of gain, a column a distance;
    sources (of a pair, the larger) by colour, targets by marker."""
    kinds = [kind for kind in numbers.KINDS if any(p.gain.line.kind == kind for p in points)]
    colours = {line.source: look["color"] for line, look in styles.items()}
    targets = list(dict.fromkeys(point.gain.target.name for point in points))
    markers = {target: MARKERS[place % len(MARKERS)] for place, target in enumerate(targets)}
    fig = Figure(figsize=(5.4, 2.1 * len(kinds) + 0.3), layout="constrained")
    axes = fig.subplots(len(kinds), 2, squeeze=False, sharey="row", sharex="col")
    for row, kind in zip(axes, kinds):
        row[0].set_ylabel("gain (fraction)")
        for ax, distance in zip(row, AXES):
            draw_distance_panel(ax, points, kind, distance, colours, markers)
    fig.suptitle(title)
    domains = {point.larger: point.gain.line.source_domain for point in points}
    look = {"linestyle": "none", "markersize": 4}
    columns = [[(style.BLANK, "source (of a pair, the larger):")], [(style.BLANK, "target:")]]
    for source in [source for source in colours if source in domains]:
        face = LOOKS[domains[source]].filling or colours[source]
        handle = Line2D([], [], marker="o", color=colours[source], markerfacecolor=face, **look)
        columns[0].append((handle, source))
    for target, marker in markers.items():
        columns[1].append((Line2D([], [], marker=marker, color="#555555", **look), target))
    style.draw_foot(fig, columns, [DISTANCE_NOTE, *notes])
    return fig
