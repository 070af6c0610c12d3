"""The figure of gains from scale: paired differences by group."""

import itertools
import math

import numpy as np
from matplotlib.figure import Figure

from charts import gains as numbers
from charts import results, style
from charts.style import LOOKS

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
    alike = "line.source_domain", "target.domain"
    alike += "line.method", "line.recipe", "line.pretraining"
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
