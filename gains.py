"""Two figures of gains from scale: paired differences by group, and gain against domain distance."""

import math

import numpy as np
from matplotlib.figure import Figure

from figures import DOMAINS
from paired import (
    GAINS,
    REGIMES,
    counts,
    group_words,
    regime,
)
from tables import METRICS, differing, group

LOOKS = {  # verdict -> marker, whether it is filled, words
    "above": ("^", True, "above zero"),
    "unclear": ("o", False, "not off zero"),
    "below": ("v", True, "below zero"),
    "no interval": ("x", True, "one pair, no interval"),
}
BLOCK = ("source_domain", "target_domain", "method", "recipe")  # one row of panels
ROW = ("shots", "target")  # one row of a panel
HEIGHTS = (0.115, 0.75)  # inches: of a row, of title and axis of a panel


def colour(cell):
    """The hue of the domain of the sources."""
    return DOMAINS[cell["source_domain"]][1][len(DOMAINS[cell["source_domain"]][1]) // 2]


def draw_gain(ax, y, cell):
    """One gain: its marker tells where the interval lies, without colour too."""
    factor = METRICS[cell["metric"]][1]
    marker, filled, _ = LOOKS[cell["verdict"]]
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
    for place, name in enumerate(REGIMES):
        inside = [y for y, (shots, _) in enumerate(rows) if regime(shots) == name]
        if not inside:
            continue
        if place % 2 == 0:
            ax.axhspan(inside[0] - 0.5, inside[-1] + 0.5, color="#f0f0f0", linewidth=0, zorder=0)
        part = [cell for cell in cells if regime(cell["shots"]) == name]
        found = counts(part)
        known = len(part) - found["no interval"]
        if part:
            text = f"{found['above']} of {known}"
            look = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7}
            ax.text(1.02, (inside[0] + inside[-1]) / 2, text, **look)


def gain_title(cells):
    """What a panel shows, in two lines of words and one of counts."""
    found = counts(cells)
    known = len(cells) - found["no interval"]
    better = f"{GAINS[cells[0]['kind']][2]} better\nin {found['above']} of {known} cells"
    signs = {"above": "▲", "unclear": "○", "below": "▼", "no interval": "×"}
    return better, "  ".join(
        f"{signs[k]} {found[k]}" for k in signs if found[k] or k in "above below"
    )


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
    names = [f"{target}  {shots or 'full'}" for shots, target in rows]
    ax.set_yticks(range(len(rows)), names if labelled else [], fontsize=6.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(gain_limits(cells))
    ax.locator_params(axis="x", nbins=5)
    unit = {"accuracy": "gain in accuracy (points)"}
    ax.set_xlabel(unit.get(cells[0]["metric"], f"gain in {METRICS[cells[0]['metric']][0]}"))
    better, signs = gain_title(cells)
    ax.set_title(f"{better}\n{signs}", fontsize=8)
    ax.spines["left"].set_visible(False)


def block_name(cells, differ):
    """The name of a row of panels."""
    return ", ".join([group_words(cells[0]), *(cells[0][key] or "–" for key in differ)])


def draw_gains(cells, title, styles=None, notes=()):
    """Gain cells -> Figure: a row of panels for each group, a column for each kind of gain (and
    origin), a row in a panel for each target and number of shots."""
    blocks, differ = group(cells, BLOCK), differing(cells)
    kinds = [(o, k) for o in ("own", "published") for k in GAINS]
    kinds = [pair for pair in kinds if any((c["origin"], c["kind"]) == pair for c in cells)]
    sides = list(dict.fromkeys(origin for origin, _ in kinds))
    rows = {
        (key, side): sorted(
            {(c["shots"], c["target"]) for c in members if c["origin"] == side},
            key=lambda row: (row[0] or math.inf, row[1]),
        )
        for key, members in blocks.items()
        for side in sides
    }
    heights = [
        HEIGHTS[0] * max(len(rows[key, side]) for side in sides) + HEIGHTS[1] for key in blocks
    ]
    names = [0.05 * max(len(c["target"]) + 5 for c in cells if c["origin"] == s) for s in sides]
    fig = Figure(figsize=(1.95 * len(kinds) + sum(names), sum(heights)), layout="constrained")
    parts = fig.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (key, members) in zip(parts, blocks.items()):
        axes = part.subplots(1, len(kinds), squeeze=False)[0]
        part.suptitle(block_name(members, differ), fontsize=9, fontweight="bold")
        for ax, (side, kind) in zip(axes, kinds):
            own = [c for c in members if (c["origin"], c["kind"]) == (side, kind)]
            if own:
                first = kind == next(k for s, k in kinds if s == side)
                draw_gain_panel(ax, rows[key, side], own, first)
            else:
                ax.axis("off")
    fig.suptitle(title, fontsize=10)
    return fig


def draw_distance(points, title, styles=None, notes=()):
    pass
