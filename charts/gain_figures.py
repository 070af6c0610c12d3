"""Two figures of gains from scale: paired differences by group, gain against domain distance."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from charts import gains as numbers
from charts import results, style
from charts.style import LOOKS, MARKERS

SIGNS = {  # verdict -> marker, the same as text
    "above": ("^", "▲"),
    "unclear": ("o", "○"),
    "below": ("v", "▼"),
    "no interval": ("x", "×"),
}
LONG = 30  # characters of a target's name beside its rows
ROW, WIDTH, COUNTS = 0.13, 1.3, 0.85  # inches: a row, a panel, the counts beside it
HEAD, FOOT = 0.65, 0.45  # inches: titles above a panel, axis below it
GAIN_NOTE = """\
Row: target and shots. ▲ 95 % interval above zero, ○ not off zero, ▼ below zero; on the right: \
cells above zero by number of shots. Larger minus smaller network (source), run by run of the same \
source (network) and seed, averaged over these for each seed; Student t over seeds."""
AXES = {  # distance -> name at the axis
    "frechet_relative": "Fréchet distance of source and target\n(1: of halves of the source)",
    "energy": "energy coefficient of source and target",
}


def draw_bands(ax, rows, gains):
    """Band and count of each regime of shots; rows: [(shots, target)] from the top."""
    regimes = [numbers.regime(shots) for shots, _ in rows]
    for place, name in enumerate(dict.fromkeys(regimes)):
        inside = [y for y, other in enumerate(regimes) if other == name]
        if place % 2 == 0:
            ax.axhspan(inside[0] - 0.5, inside[-1] + 0.5, color="#ececec", linewidth=0, zorder=0)
        part = [gain for gain in gains if numbers.regime(gain.shots) == name]
        found = numbers.counts(part)
        known = len(part) - found["no interval"]
        text = f"{found['above']} of {known}" if known else "–"
        text += f"\n{name}" if len(inside) > 1 else ""
        look = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1.05}
        if part:
            ax.text(1.03, (inside[0] + inside[-1]) / 2, text, fontsize=6.5, **look)


def panel_title(gains):
    """What a panel shows: two lines of words and one of counts."""
    words = f"larger {gains[0].line.kind}"
    found = numbers.counts(gains)
    single = found.pop("no interval")
    signs = [f"{SIGNS[name][1]} {count}" for name, count in found.items()]
    signs += [f"{SIGNS['no interval'][1]} {single}"] if single else []
    if single == len(gains):
        title = f"{words}:\nno interval in {single} cell{'s' if single > 1 else ''}"
    else:
        title = f"{words} better\nin {found['above']} of {len(gains) - single} cells"
    return f"{title}\n{'   '.join(signs)}"


def draw_gain_panel(ax, rows, gains, labelled):
    """The gains of one kind in one group: a row a cell, from few shots to all images; the marker
    tells where the interval lies, without colour too."""
    draw_bands(ax, rows, gains)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    metric = results.METRICS[gains[0].metric]
    for gain in gains:
        hues, verdict = LOOKS[gain.line.source_domain].hues, gain.verdict
        hue = hues[len(hues) // 2]
        look = {"fmt": SIGNS[verdict][0], "color": hue, "markersize": 3.6, "markeredgewidth": 0.8}
        look["markerfacecolor"] = "white" if verdict == "unclear" else hue
        bar = None if math.isnan(gain.ci95) else metric.factor * gain.ci95
        y = rows.index((gain.shots, gain.target.name))
        ax.errorbar(metric.factor * gain.mean, y, xerr=bar, elinewidth=0.9, **look)
    names = [f"{style.short(name, LONG)}, {results.shots_words(shots)}" for shots, name in rows]
    ax.set_yticks(range(len(rows)), names if labelled else [], fontsize=6.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    # Every mean is shown, and intervals up to three times the largest mean.
    top = 3 * max(abs(gain.mean) for gain in gains)
    ends = [gain.mean + s * np.nan_to_num(gain.ci95) for gain in gains for s in (-1, 1)]
    low, high = max(-top, min(0, *ends)), min(top, max(0, *ends))
    margin = 0.06 * (high - low) or 0.01
    ax.set_xlim(metric.factor * (low - margin), metric.factor * (high + margin))
    ax.locator_params(axis="x", nbins=3)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    ax.set_xlabel(f"gain in {metric.gain}")
    ax.set_title(panel_title(gains), fontsize=7.5)
    ax.spines["left"].set_visible(False)


def gain_rows(gains):
    """Gains -> rows of their panel, [(shots, target)] from few shots to all images."""
    rows = {(gain.shots, gain.target.name) for gain in gains}
    return sorted(rows, key=lambda row: (row[0] or math.inf, row[1]))


def draw_block(fig, top, gains, lefts, heading):
    """Draw the panels of a group below the height `top` (inches); lefts: {kind: left edge}."""
    width, height = fig.get_size_inches()
    rows = gain_rows(gains)
    tall = ROW * len(rows)
    kinds = results.group(gains, "line.kind")
    edges = [lefts[kind] for kind in kinds]
    for kind, members in kinds.items():
        box = lefts[kind] / width, (top - HEAD - tall) / height, WIDTH / width, tall / height
        draw_gain_panel(fig.add_axes(box), rows, members, labelled=lefts[kind] == min(edges))
    look = {"ha": "center", "va": "top", "fontsize": 8.5, "fontweight": "bold"}
    middle = (min(edges) + max(edges) + WIDTH) / 2
    fig.text(middle / width, (top - 0.02) / height, heading, **look)


def draw_gains(gains, styles, title="", notes=()):
    """Gains -> Figure: a row of panels for each group, a column for each kind of gain (and
    origin), a row in a panel for each target and number of shots."""
    lefts, width = {}, 0.0  # of the panels, in inches
    for origin in ("own", "published"):
        part = [gain for gain in gains if gain.target.origin == origin]
        names = [style.short(gain.target.name, LONG) for gain in part]
        width += 0.055 * max((len(name) + 10 for name in names), default=0)
        lefts[origin] = {}
        for kind in [kind for kind in numbers.KINDS if any(g.line.kind == kind for g in part)]:
            lefts[origin][kind] = width
            width += WIDTH + COUNTS
    alike = "line.source_domain", "target.domain", "line.method", "line.recipe"
    blocks = results.group(gains, *alike).values()
    blocks = [results.group(block, "target.origin") for block in blocks]
    rows = [max(len(gain_rows(part)) for part in block.values()) for block in blocks]
    top = sum(HEAD + FOOT + ROW * count for count in rows)
    fig = Figure(figsize=(width, top))
    differ = results.differing(gains)
    for block, count in zip(blocks, rows):
        for origin, members in block.items():
            methods = [getattr(members[0].line, key) or "–" for key in differ]
            heading = ", ".join([members[0].group, *methods]) + results.mark(origin)
            draw_block(fig, top, members, lefts[origin], heading)
        top -= HEAD + FOOT + ROW * count
    key = "▲ better (95 % interval above zero)   ○ not off zero   ▼ worse"
    fig.text(0.5, 1 + 0.08 / fig.get_figheight(), key, ha="center", va="bottom", fontsize=7.5)
    fig.text(0.5, 1 + 0.28 / fig.get_figheight(), title, ha="center", va="bottom", fontsize=10)
    parts = [GAIN_NOTE]
    if any(gain.verdict == "no interval" for gain in gains):
        parts.append("×: one seed, no interval.")
    lacking = sum(gain.lacking for gain in gains)
    if lacking:
        cells = f"{lacking} cell{'s' if lacking > 1 else ''}"
        parts.append(f"A seed that one arm lacks counts in neither ({cells}).")
    if lefts["published"]:
        parts.append("Published runs are paired by their place in the list.")
    style.draw_note(fig, 0, [*parts, *notes])
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
        text = f"slope {line.slope:+.3f} ± {line.ci95:.3f}\n{unit}".replace("-", "−")
    ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7)
    ax.set_title(f"larger {kind}", fontsize=8)
    ax.axhline(0, color="black", linewidth=0.7, linestyle=":", zorder=1)
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.minorticks_off()
    ax.set_xlabel(AXES[distance])
    ax.grid(color="#e4e4e4", linewidth=0.5)
    ax.set_axisbelow(True)
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
    fig.suptitle(title, fontsize=10)
    heads = "source (of a pair, the larger):", "target:"
    columns = [[(style.BLANK, head)] for head in heads]
    domains = {point.larger: point.gain.line.source_domain for point in points}
    look = {"linestyle": "none", "markersize": 4}
    for source, hue in colours.items():
        if source in domains:
            face = LOOKS[domains[source]].filling or hue
            handle = Line2D([], [], marker="o", color=hue, markerfacecolor=face, **look)
            columns[0].append((handle, source))
    for target, marker in markers.items():
        columns[1].append((Line2D([], [], marker=marker, color="#555555", **look), target))
    used = {point.gain.metric for point in points}
    metrics = " and ".join(
        metric.axis.replace(" (%)", "") for name, metric in results.METRICS.items() if name in used
    )
    note = f"""\
A point is a source (or pair of sources), target and number of shots; gain in {metrics}, from 0 to \
1. Line: least squares, with 95 % band and slope (Student t over points, which share sources, \
targets and seeds: true uncertainty is larger)."""
    style.draw_foot(fig, columns, [note, *notes])
    return fig
