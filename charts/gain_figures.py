"""Gains from scale: paired differences by group; their law: its fit, and tasks left out of it."""

import itertools
import math

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from charts import gains as numbers
from charts import law as fits
from charts import results, style

SHADES = LinearSegmentedColormap.from_list("", ("#8fd0a0", "#1f9069", "#06301f"))  # few shots first
MARKERS = {  # of families; hollow across domains
    ("natural", "natural"): "o",
    ("medical", "medical"): "s",
    ("natural", "medical"): "^",
    ("medical", "natural"): "D",
}
POINT = {"markersize": 3, "markeredgewidth": 0.6, "zorder": 2}
LAW_PANEL = (2.9, 2.8)  # inches
ROW, HEAD = 0.13, 1.1  # inches: a row of a panel, its titles and axis
GAIN_NOTE = """\
Row: target and shots. ▲ 95 % interval above zero, ○ not off zero, ▼ below zero, × one seed; on \
the right: cells above zero by number of shots. Larger minus smaller network (source), run by run \
of the same source (network) and seed, averaged over these for each seed; Student t over seeds. A \
seed that one arm lacks counts in neither"""


def draw_gain_panel(ax, rows, gains):
    """The gains of one kind in one group: a row a cell, rows [(shots, target)] from the top; the
    marker tells where the interval lies, without colour too."""
    regimes = [numbers.regime(shots) for shots, _ in rows]
    for place, name in enumerate(dict.fromkeys(regimes)):  # a band each, and their count
        first, size = regimes.index(name), regimes.count(name)
        if place % 2 == 0:
            ax.axhspan(first - 0.5, first + size - 0.5, color="#ececec", linewidth=0, zorder=0)
        part = [gain for gain in gains if numbers.regime(gain.shots) == name]
        if part:
            found = numbers.counts(part)
            known = len(part) - found["no interval"]
            text = f"{found['above']} of {known}" if known else "–"
            text += f"\n{name}" if size > 1 else ""
            look = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1.05}
            ax.text(1.03, first + (size - 1) / 2, text, fontsize=6.5, **look)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    metric = results.METRICS[gains[0].metric]
    for gain in gains:
        look = {"fmt": numbers.VERDICTS[gain.verdict][1], "markersize": 3.6, "elinewidth": 0.9}
        look["color"] = style.LOOKS[gain.line.source_domain].hues[-2]
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
    ax.set_xlabel(f"gain in {metric.axis.replace('%', 'points')}")
    found = numbers.counts(gains)
    known = len(gains) - found["no interval"]
    title = f"larger {gains[0].line.kind} better\nin {found['above']} of {known} cells\n"
    title += "   ".join(f"{numbers.VERDICTS[name][2]} {count}" for name, count in found.items())
    ax.set_title(title, fontsize=7.5)
    ax.spines["left"].set_visible(False)
    ax.grid(False)


def draw_gains(gains, styles, title="", notes=()):
    """Gains -> Figure: a row of panels for each group, a column for each kind of gain (and
    origin), a row in a panel for each target and number of shots."""
    kinds = {
        origin: [kind for kind in numbers.KINDS if kind in results.group(part, "line.kind")]
        for origin, part in sorted(results.group(gains, "target.origin").items())
    }
    alike = "line.source_domain", "target.domain"
    alike += "line.method", "line.recipe", "line.pretraining"
    blocks, heights = [], []  # inches
    for members in results.group(gains, *alike).values():
        blocks.append(results.group(members, "target.origin"))
        panels = [{(gain.shots, gain.target) for gain in part} for part in blocks[-1].values()]
        heights.append(HEAD + ROW * max(2, *map(len, panels)))
    widths = [2.15 * len(part) + 1 for part in kinds.values()]  # inches
    fig = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    shape = {"squeeze": False, "height_ratios": heights, "width_ratios": widths}
    _, differing = results.differing([gain.line for gain in gains])
    for block, row in zip(blocks, fig.subfigures(len(blocks), len(kinds), **shape)):
        for origin, part in zip(kinds, row):
            if origin not in block:
                continue
            members, first = results.group(block[origin], "line.kind"), block[origin][0]
            rows = {(gain.shots, gain.target.name) for gain in block[origin]}
            rows = sorted(rows, key=lambda row: (row[0] or math.inf, row[1]))  # few shots first
            heading = ", ".join([first.group, *differing[first.line]])
            part.suptitle(heading + results.mark(origin), fontsize=8.5, fontweight="bold")
            axes = part.subplots(1, len(kinds[origin]), squeeze=False, sharey=True)[0]
            for ax, panel in itertools.zip_longest(axes, members.values()):
                if panel:
                    draw_gain_panel(ax, rows, panel)
                else:
                    ax.set_axis_off()
    key = "▲ better (95 % interval above zero)   ○ not off zero   ▼ worse"
    fig.suptitle(f"{title}\n{key}".strip(), fontsize=8)
    note = f"{GAIN_NOTE} ({sum(gain.lacking for gain in gains)} cells)."
    style.draw_foot(fig, [note, *numbers.seeds_note(gains), *notes])
    return fig


def look_of(family, colour):
    """Keywords of Line2D for the points of a family, hollow across domains."""
    look = {"marker": MARKERS[family], "linestyle": "none", "color": colour}
    return look | {"markerfacecolor": colour if family[0] == family[1] else "white"}


def draw_fit(ax, beside, law, looks):
    """A fit, its rows in these looks: exponents against distance, with a line and its band a family
    at its middle number of shots; beside them left-out tasks, observed against predicted."""
    for row, look in zip(law.rows, looks):
        ax.plot(10**row.d, row.exponent, **look)
    for family in sorted({row.family for row in law.rows}):
        rows = [row for row in law.rows if row.family == family]
        shots = sorted({row.shots or math.inf for row in rows})
        middle = shots[len(shots) // 2]
        s = np.mean([row.s for row in rows if (row.shots or math.inf) == middle])
        distances = [row.d for row in rows]
        grid = np.linspace(min(distances), max(distances), 30)
        values = {("a", family): 1, ("b", family): s, ("c", None): grid, ("e", None): s * grid}
        x = np.stack([np.zeros(30) + values.get(term, 0) for term in law.terms], 1)
        line, dashes = x @ law.coefficients, "-" if family[0] == family[1] else "--"
        half = np.array([fits.half_width(law.changes, at, law.terms, law.rows) for at in x])
        ax.plot(10**grid, line, color="black", linewidth=1, linestyle=dashes, zorder=3)
        ax.fill_between(10**grid, line - half, line + half, color="#888888", alpha=0.2, linewidth=0)
    c = [letter for letter, _ in law.terms].index("c")
    at = "10-shot" if ("e", None) in law.terms else results.shots_words(law.rows[0].shots)
    change = f"{law.coefficients[c]:+.3f} ± {law.ci95[c]:.3f}"
    ax.set_title(f"ten times the distance, {at}:\nexponent changes by {change}", fontsize=7.5)
    ax.set_xscale("log")
    style.log_ticks(ax.xaxis, *ax.dataLim.intervalx)
    ax.set_xlabel("relative Fréchet distance of source and target")
    observed = [row.exponent for row in law.rows]
    bars = {"fmt": "none", "ecolor": "#bbbbbb", "elinewidth": 0.5, "zorder": 1}
    beside.errorbar(law.predicted, observed, xerr=law.reach, **bars)
    for x, y, look in zip(law.predicted, observed, looks):
        beside.plot(x, y, **look)
    beside.axline((0, 0), slope=1, color="black", linewidth=0.8)
    beside.set_title(f"{law.tasks} tasks, each predicted\nby a fit of the others", fontsize=7.5)
    b0, b1, own = law.rmse.values()
    text = f"RMSE {own:.3f}, of B0 {b0:.3f}, of B1 {b1:.3f}\n"
    text += f"ratios to these {own / b0:.2f} and {own / b1:.2f}, p = {law.p:.3f}\n"
    text += f"{100 * law.coverage:.0f} % of {len(law.rows)} cells within their 95 % intervals\n"
    noise = "one pre-training seed: its noise is not in the band"
    if not math.isnan(law.seed_share):
        noise = f"pre-training seeds: {100 * law.seed_share:.0f} % of the band's variance (median)"
    beside.set_xlabel(f"predicted exponent\n{text}{noise}", fontsize=7)
    beside.set_ylabel("observed exponent")


def draw_law(laws, styles, title="", notes=()):
    """Laws -> Figure: a row a law, exponents on the left, predictions on the right; where none has
    a fit, a panel each with the means by relation of domains."""
    fitted = [law for law in laws if law.terms]
    shots = sorted({row.shots for law in fitted for row in law.rows}, key=lambda k: k or math.inf)
    colours = {name: SHADES(shade) for name, shade in style.shades(shots).items()}
    rows, columns = (len(laws), 2) if fitted else (1, len(laws))
    fig = Figure(figsize=(columns * LAW_PANEL[0], rows * LAW_PANEL[1]), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False).reshape(len(laws), -1)
    several = len({law.about[1:] for law in laws}) > 1
    for (ax, *beside), law in zip(panels, laws):
        words = " ".join(filter(None, law.about[1:])) if several else ""
        ax.set_ylabel(f"exponent of the {law.about[0]}\n{words}".strip())
        ax.axhline(0, color="black", linewidth=0.7, linestyle=":", zorder=1)
        if law.terms:
            looks = [look_of(row.family, colours[row.shots]) | POINT for row in law.rows]
            draw_fit(ax, *beside, law, looks)
        else:
            for empty in beside:
                empty.set_axis_off()
            found = fits.relations(law.rows)  # {(family, regime): mean exponent}
            families, regimes = ([*dict.fromkeys(part)] for part in zip(*found))
            regimes.sort(key=list(numbers.REGIMES).index)
            for (family, regime), cell in found.items():
                middle = (len(families) - 1) / 2
                x = regimes.index(regime) + 0.18 * (families.index(family) - middle)
                look = look_of(family, "#333333") | {"markersize": 4} | style.BARS
                ax.errorbar(x, cell["mean"], cell["ci95"], **look)
            words = [name.replace(" and", "\nand") for name in regimes]
            ax.set_xticks(range(len(regimes)), words)
    fig.suptitle(title)
    families = {row.family for law in laws for row in law.rows}
    legend = [[(style.BLANK, "pre-trained on → target:")], []]
    for family in [family for family in MARKERS if family in families]:
        handle = Line2D([], [], **look_of(family, "#555555"), markersize=4)
        legend[0].append((handle, " → ".join(family)))
    for name, colour in colours.items():
        handle = Line2D([], [], marker="o", color=colour, linestyle="none", markersize=4)
        legend[1].append((handle, results.shots_words(name)))
    about = [fits.FIT_NOTE, "Lines: at the middle number of shots."] if fitted else []
    about += [fits.RELATION_NOTE] if len(fitted) < len(laws) else []
    style.draw_foot(fig, [fits.NOTE, *about, *notes], legend)
    return fig
