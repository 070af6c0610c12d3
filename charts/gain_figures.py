"""Two figures of gains from scale: paired differences by group, gain against domain distance."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from charts.gains import GAINS, REGIMES, axis_points, counts, fit, group_words, regime
from charts.panels import DOMAINS, MARKERS, draw_footnote, short, two_columns, write_note
from charts.results import METRICS, differing, group, mark, words

LOOKS = {  # verdict -> marker, whether it is filled
    "above": ("^", True),
    "unclear": ("o", False),
    "below": ("v", True),
    "no interval": ("x", True),
}
LONG = 30  # characters of a target's name beside its rows
BLOCK = ("source_domain", "target_domain", "method", "recipe")  # one row of panels
SIGNS = {"above": "▲", "unclear": "○", "below": "▼", "no interval": "×"}  # of LOOKS, as text
# Inches: a row, a panel, the counts beside it, titles above and axis below a panel.
SIZES = {"row": 0.13, "panel": 1.3, "counts": 0.85, "head": 0.65, "foot": 0.45}


def colour(cell):
    """The hue of the domain of the sources."""
    return DOMAINS[cell["source_domain"]][1][len(DOMAINS[cell["source_domain"]][1]) // 2]


def draw_gain(ax, y, cell):
    """One gain: its marker tells where the interval lies, without colour too."""
    factor = METRICS[cell["metric"]][1]
    marker, filled = LOOKS[cell["verdict"]]
    hue = colour(cell)
    face = {
        "markerfacecolor": hue if filled else "white",
        "markersize": 3.6,
        "markeredgewidth": 0.8,
    }
    bar = None if math.isnan(cell["ci95"]) else factor * cell["ci95"]
    ax.errorbar(factor * cell["mean"], y, xerr=bar, fmt=marker, color=hue, elinewidth=0.9, **face)


def draw_bands(ax, rows, cells):
    """Band and count of each regime of shots; rows: [(shots, target)] from the top."""
    present = [name for name in REGIMES if any(regime(shots) == name for shots, _ in rows)]
    for place, name in enumerate(present):
        inside = [y for y, (shots, _) in enumerate(rows) if regime(shots) == name]
        if place % 2 == 0:
            ax.axhspan(inside[0] - 0.5, inside[-1] + 0.5, color="#ececec", linewidth=0, zorder=0)
        part = [cell for cell in cells if regime(cell["shots"]) == name]
        found = counts(part)
        known = len(part) - found["no interval"]
        count = f"{found['above']} of {known}" if known else "–"
        text = f"{count}\n{name}" if len(inside) > 1 else count
        look = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1.05}
        if part:
            ax.text(1.03, (inside[0] + inside[-1]) / 2, text, fontsize=6.5, **look)


def gain_title(cells):
    """What a panel shows: two lines of words and one of counts."""
    found = counts(cells)
    single = found["no interval"]
    signs = [f"{SIGNS[name]} {found[name]}" for name in list(SIGNS)[: 4 if single else 3]]
    scope = f"in {found['above']} of {len(cells) - single} cells"
    if single == len(cells):
        scope = f"no interval in {single} cell{'s' if single > 1 else ''}"
    better = f"{GAINS[cells[0]['kind']][2]}{' better' if single < len(cells) else ':'}\n"
    return f"{better}{scope}\n{'   '.join(signs)}"


def gain_limits(cells):
    """Limits of the axis: every mean, and intervals up to three times the largest mean."""
    factor = METRICS[cells[0]["metric"]][1]
    top = 3 * max(abs(cell["mean"]) for cell in cells)
    ends = [cell["mean"] + s * np.nan_to_num(cell["ci95"]) for cell in cells for s in (-1, 1)]
    low, high = max(-top, min(0, *ends)), min(top, max(0, *ends))
    margin = 0.06 * (high - low) or 0.01
    return factor * (low - margin), factor * (high + margin)


def draw_gain_panel(ax, rows, cells, labelled):
    """The gains of one kind in one group: a row a cell, from few shots to all images."""
    draw_bands(ax, rows, cells)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    for cell in cells:
        draw_gain(ax, rows.index((cell["shots"], cell["target"])), cell)
    names = [f"{short(target, LONG)}, {words(shots)}" for shots, target in rows]
    ax.set_yticks(range(len(rows)), names if labelled else [], fontsize=6.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(gain_limits(cells))
    ax.locator_params(axis="x", nbins=3)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    unit = {"accuracy": "gain in accuracy (points)"}
    ax.set_xlabel(unit.get(cells[0]["metric"], f"gain in {METRICS[cells[0]['metric']][0]}"))
    ax.set_title(gain_title(cells), fontsize=7.5)
    ax.spines["left"].set_visible(False)


def block_name(cells, differ):
    """The heading of the panels of a group."""
    methods = [cells[0][key] or "–" for key in differ]
    return ", ".join([group_words(cells[0]), *methods]) + mark(cells[0]["origin"])


def gain_columns(cells):
    """Gain cells -> ([(origin, kind, left edge of its panel in inches)], width of the figure)."""
    columns, x = [], 0.0
    for origin in ("own", "published"):
        part = [cell for cell in cells if cell["origin"] == origin]
        x += 0.055 * max((len(short(cell["target"], LONG)) + 10 for cell in part), default=0)
        for kind in [kind for kind in GAINS if any(cell["kind"] == kind for cell in part)]:
            columns.append((origin, kind, x))
            x += SIZES["panel"] + SIZES["counts"]
    return columns, x


def block_rows(members):
    """Gain cells of a group -> its rows, [(shots, target)] from few shots to all images."""
    rows = {(cell["shots"], cell["target"]) for cell in members}
    return sorted(rows, key=lambda row: (row[0] or math.inf, row[1]))


def draw_block(fig, top, members, columns, differ):
    """Draw the panels of a group of one origin below the height `top` (inches)."""
    width, height = fig.get_size_inches()
    rows, lefts = block_rows(members), []
    tall = SIZES["row"] * len(rows)
    for origin, kind, left in columns:
        cells = [cell for cell in members if cell["kind"] == kind]
        if origin == members[0]["origin"] and cells:
            box = left, top - SIZES["head"] - tall, SIZES["panel"], tall
            ax = fig.add_axes([side / whole for side, whole in zip(box, (width, height) * 2)])
            draw_gain_panel(ax, rows, cells, labelled=not lefts)
            lefts.append(left)
    middle = (lefts[0] + lefts[-1] + SIZES["panel"]) / 2
    look = {"ha": "center", "va": "top", "fontsize": 8.5, "fontweight": "bold"}
    fig.text(middle / width, (top - 0.02) / height, block_name(members, differ), **look)


def draw_gains(cells, title, styles=None, notes=()):
    """Gain cells -> Figure: a row of panels for each group, a column for each kind of gain (and
    origin), a row in a panel for each target and number of shots."""
    columns, width = gain_columns(cells)
    blocks, differ = group(cells, BLOCK), differing(cells)
    sides = {key: group(members, ("origin",)).values() for key, members in blocks.items()}
    heights = {
        key: SIZES["head"] + SIZES["foot"] + SIZES["row"] * max(map(len, map(block_rows, parts)))
        for key, parts in sides.items()
    }
    top = sum(heights.values())
    fig = Figure(figsize=(width, top))
    for key, parts in sides.items():
        for members in parts:
            draw_block(fig, top, members, columns, differ)
        top -= heights[key]
    key = "▲ better (95 % interval above zero)   ○ not off zero   ▼ worse"
    fig.text(0.5, 1 + 0.08 / fig.get_figheight(), key, ha="center", va="bottom", fontsize=7.5)
    fig.text(0.5, 1 + 0.28 / fig.get_figheight(), title, ha="center", va="bottom", fontsize=10)
    write_note(fig, " ".join([gain_note(cells), *notes]), 0)
    return fig


def gain_note(cells):
    """The rule of the figure in a few sentences."""
    parts = [
        "Row: target and shots. ▲ 95 % interval above zero, ○ not off zero, ▼ below zero; on the "
        "right: cells above zero by number of shots. Larger minus smaller network (source), run by "
        "run of the same source (network) and seed, averaged over these for each seed; Student t "
        "over seeds."
    ]
    if any(cell["verdict"] == "no interval" for cell in cells):
        parts.append("×: one seed, no interval.")
    if any(cell["lacking"] for cell in cells):
        count = sum(cell["lacking"] for cell in cells)
        where = f"{count} cell{'s' if count > 1 else ''}"
        parts.append(f"A seed that one arm lacks counts in neither ({where}).")
    if any(cell["origin"] == "published" for cell in cells):
        parts.append("Published runs are paired by their place in the list.")
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------
# Gain against distance
# ------------------------------------------------------------------------------------------------

AXES = {  # distance -> name at the axis
    "frechet_relative": "Fréchet distance of source and target\n(1: of halves of the source)",
    "energy": "energy coefficient of source and target",
}


def draw_fit(ax, points, kind, distance):
    """The fitted line, its confidence band, and its slope in words."""
    line = fit(*axis_points(points, kind, distance))
    log = distance == "frechet_relative"
    if line is None:
        text = "too few points for a line"
    else:
        x = 10 ** line["grid"] if log else line["grid"]
        ax.plot(x, line["line"], color="black", linewidth=1, zorder=2)
        edges = line["line"] - line["band"], line["line"] + line["band"]
        ax.fill_between(x, *edges, color="#cccccc", alpha=0.6, linewidth=0, zorder=1)
        unit = "for ten times the distance" if log else "from 0 to 1"
        text = f"slope {line['slope']:+.3f} ± {line['ci95']:.3f}\n{unit}".replace("-", "−")
    look = {"transform": ax.transAxes, "ha": "right", "va": "top", "fontsize": 7}
    ax.text(0.98, 0.97, text, **look)
    ax.set_title(GAINS[kind][2], fontsize=8)


def draw_distance_panel(ax, points, kind, distance, looks):
    """The points of one kind of gain over one distance; looks: (colours, markers)."""
    colours, markers = looks
    for point in points:
        if point["kind"] == kind:
            hue = colours[point["last"]]
            face = hue if point["source_domain"] != "medical" else "white"
            marker = {"marker": markers[point["target"]], "markersize": 4}
            ax.plot(point[distance], point["gain"], color=hue, markerfacecolor=face, **marker)
    draw_fit(ax, points, kind, distance)
    ax.axhline(0, color="black", linewidth=0.7, linestyle=":", zorder=1)
    if distance == "frechet_relative":
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.minorticks_off()
    ax.set_xlabel(AXES[distance])
    ax.grid(color="#e4e4e4", linewidth=0.5)
    ax.set_axisbelow(True)


def distance_legend(fig, points, colours, markers):
    """Sources (of a pair, the larger) by colour, targets by marker."""
    blank = Line2D([], [], linestyle="none")
    domains = {point["last"]: point["source_domain"] for point in points}
    columns = [[(blank, "source (of a pair, the larger):")], [(blank, "target:")]]
    for source in [source for source in colours if source in domains]:
        face = "white" if domains[source] == "medical" else colours[source]
        look = {"color": colours[source], "markerfacecolor": face, "markersize": 4}
        columns[0].append((Line2D([], [], marker="o", linestyle="none", **look), source))
    for target, marker in markers.items():
        look = {"color": "#555555", "markersize": 4, "linestyle": "none"}
        columns[1].append((Line2D([], [], marker=marker, **look), target))
    return two_columns(fig, columns)


def draw_distance(points, title, styles=None, notes=()):
    """Points of `paired.distance_points` -> Figure: a row a kind of gain, a column a distance."""
    kinds = [kind for kind in GAINS if any(point["kind"] == kind for point in points)]
    colours = {line[0]: style["color"] for line, style in styles.items()}
    targets = list(dict.fromkeys(point["target"] for point in points))
    markers = {target: MARKERS[place % len(MARKERS)] for place, target in enumerate(targets)}
    fig = Figure(figsize=(5.4, 2.1 * len(kinds) + 0.3), layout="constrained")
    axes = fig.subplots(len(kinds), 2, squeeze=False, sharey="row", sharex="col")
    for row, kind in zip(axes, kinds):
        row[0].set_ylabel("gain (fraction)")
        for ax, distance in zip(row, AXES):
            draw_distance_panel(ax, points, kind, distance, (colours, markers))
            ax.label_outer()
    fig.suptitle(title, fontsize=10)
    used = [name for name in METRICS if any(point["metric"] == name for point in points)]
    metrics = " and ".join(METRICS[name][0].replace(" (%)", "") for name in used)
    note = f"""\
A point is a source (or pair of sources), target and number of shots; gain in {metrics}, from 0 to \
1. Line: least squares, with 95 % band and slope (Student t over points, which share sources, \
targets and seeds: true uncertainty is larger)."""
    draw_footnote(fig, distance_legend(fig, points, colours, markers), " ".join([note, *notes]))
    return fig
