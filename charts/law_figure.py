"""The figure of the law: exponents against distance; left-out tasks, observed and predicted."""

import math

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from charts import law as numbers
from charts import results, style
from charts.gains import REGIMES

SHADES = LinearSegmentedColormap.from_list("", ("#8fd0a0", "#1f9069", "#06301f"))  # few shots first
MARKERS = {  # of families; hollow across domains
    ("natural", "natural"): "o",
    ("medical", "medical"): "s",
    ("natural", "medical"): "^",
    ("medical", "natural"): "D",
}
PANEL = (2.9, 2.8)  # inches


def point_style(row, colours):
    """Keywords of Line2D for a row."""
    colour, within = colours[row.shots], row.family[0] == row.family[1]
    look = {"marker": MARKERS[row.family], "markersize": 3, "linestyle": "none", "color": colour}
    return look | {"markerfacecolor": colour if within else "white", "markeredgewidth": 0.6}


def draw_line(ax, law, family):
    """The law of a family over its distances, at its middle number of shots, with its band."""
    rows = [row for row in law.rows if row.family == family]
    shots = sorted({row.s for row in rows})
    s, distances = shots[len(shots) // 2], [row.d for row in rows]
    grid = np.linspace(min(distances), max(distances), 30)
    values = {("a", family): 1, ("b", family): s, ("c", None): grid, ("e", None): s * grid}
    x = np.stack([np.zeros(30) + values.get(term, 0) for term in law.terms], 1)
    line, dashes = x @ law.coefficients, "-" if family[0] == family[1] else "--"
    half = np.array([numbers.half_width(law.changes, at, law.terms, law.rows) for at in x])
    ax.plot(10**grid, line, color="black", linewidth=1, linestyle=dashes, zorder=3)
    ax.fill_between(10**grid, line - half, line + half, color="#888888", alpha=0.2, linewidth=0)


def draw_exponents(ax, law, colours):
    """Exponents against distance, with the fit."""
    for row in law.rows:
        ax.plot(10**row.d, row.exponent, **point_style(row, colours), zorder=2)
    for family in {row.family for row in law.rows}:
        draw_line(ax, law, family)
    c = [letter for letter, _ in law.terms].index("c")
    title = f"ten times the distance: {law.coefficients[c]:+.3f} ± {law.ci95[c]:.3f}\nat 10 shots"
    ax.set_title(title, fontsize=7.5)
    ax.set_xscale("log")
    style.log_ticks(ax.xaxis, *ax.dataLim.intervalx)
    ax.set_xlabel("relative Fréchet distance of source and target")


def draw_predictions(ax, law, colours):
    """Left-out tasks, observed against predicted, and in words how well that went."""
    observed = [row.exponent for row in law.rows]
    look = {"fmt": "none", "ecolor": "#bbbbbb", "elinewidth": 0.5, "zorder": 1}
    ax.errorbar(law.predicted, observed, xerr=law.reach, **look)
    for row, predicted in zip(law.rows, law.predicted):
        ax.plot(predicted, row.exponent, **point_style(row, colours), zorder=2)
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
    ax.set_title(f"{len(law.tasks)} tasks, each predicted\nby a fit of the others", fontsize=7.5)
    ax.set_xlabel(f"predicted exponent\n{summary(law)}", fontsize=7)
    ax.set_ylabel("observed exponent")


def summary(law):
    """How well left-out tasks were predicted, in three lines."""
    b0, b1, own = law.rmse.values()
    text = f"RMSE {own:.3f}: {own / b0:.2f} of B0's, {own / b1:.2f} of B1's, p = {law.p:.3f}\n"
    text += f"{100 * law.coverage:.0f} % of {len(law.rows)} cells within their 95 % intervals\n"
    if math.isnan(law.seed_share):
        return text + "one pre-training seed: its noise is not in the band"
    return text + f"pre-training seeds: {100 * law.seed_share:.0f} % of the band's variance"


def draw_relations(ax, law):
    """Mean exponents by regime of shots, where no distance is known."""
    found = numbers.relations(law.rows)
    families = list(dict.fromkeys(family for family, _ in found))
    regimes = [name for name in REGIMES if any(name == regime for _, regime in found)]
    for (family, regime), cell in found.items():
        x = regimes.index(regime) + 0.18 * (families.index(family) - (len(families) - 1) / 2)
        fill = "#333333" if family[0] == family[1] else "white"
        look = {"marker": MARKERS[family], "color": "#333333", "markerfacecolor": fill}
        ax.errorbar(x, cell["mean"], cell["ci95"], markersize=4, **look, **style.BARS)
    ax.set_xticks(range(len(regimes)), [name.replace(" and", "\nand") for name in regimes])


def draw_law(laws, styles, title="", notes=()):
    """Laws -> Figure: a row a law, exponents on the left, predictions on the right; where none has
    a fit, a panel each with the means by relation of domains."""
    fitted = [law for law in laws if law.terms]
    shots = sorted({row.shots for law in fitted for row in law.rows}, key=lambda k: k or math.inf)
    colours = {name: SHADES(shade) for name, shade in style.shades(shots).items()}
    rows, columns = (len(laws), 2) if fitted else (1, len(laws))
    fig = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False).reshape(len(laws), -1)
    several = len({law.about[1:] for law in laws}) > 1
    for (ax, *beside), law in zip(panels, laws):
        words = " ".join(filter(None, law.about[1:])) if several else ""
        ax.set_ylabel(f"exponent of the {law.about[0]}\n{words}".strip())
        ax.axhline(0, color="black", linewidth=0.7, linestyle=":", zorder=1)
        if law.terms:
            draw_exponents(ax, law, colours)
            draw_predictions(*beside, law, colours)
        else:
            draw_relations(ax, law)
            for empty in beside:
                empty.set_axis_off()
    fig.suptitle(title)
    look = {"linestyle": "none", "markersize": 4}
    legend = [[(style.BLANK, "pre-trained on → target:")], []]
    families = {row.family for law in laws for row in law.rows}
    for family in [family for family in MARKERS if family in families]:
        fill = "#555555" if family[0] == family[1] else "white"
        handle = Line2D([], [], marker=MARKERS[family], c="#555555", markerfacecolor=fill, **look)
        legend[0].append((handle, " → ".join(family)))
    for name, colour in colours.items():
        handle = Line2D([], [], marker="o", color=colour, **look)
        legend[1].append((handle, results.shots_words(name)))
    about = [numbers.FIT_NOTE, "Lines: at the middle number of shots."] if fitted else []
    about += [numbers.RELATION_NOTE] if len(fitted) < len(laws) else []
    style.draw_foot(fig, legend, [numbers.NOTE, *about, *notes])
    return fig
