"""The looks that figures share: hues, markers and dashes of lines, y axis, legend, footnote."""

import itertools
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from charts import results


class Look(NamedTuple):
    heading: str  # in the legend
    hues: tuple  # from the smallest to the largest source
    filling: str | None = None  # of markers; None: the hue


# Orange and blue stay apart for colour-blind readers; the filling parts the domains in grey.
LOOKS = {
    "natural": Look("pre-trained on natural images:", ("#f7b267", "#d9730d", "#5c1f00")),
    "medical": Look("pre-trained on medical images:", ("#8cc8ee", "#2f7fc1", "#071d49"), "white"),
    None: Look("no pre-training:", ("#858585", "#858585"), "#d9d9d9"),
}
MARKERS = "osD^vPX*"  # one a model, the smallest first
DASHES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (2, 1)))  # the largest model first
PANEL = (2.7, 2.4)  # inches; two in a row stay readable when the figure is set 3.3 in wide
BARS = {"elinewidth": 0.6, "capsize": 1.2, "capthick": 0.6}  # of intervals
SETTINGS = {  # of matplotlib
    "font.size": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "figure.titlesize": 10,
    "svg.fonttype": "none",  # text stays text, to search and to edit
    "svg.hashsalt": "plot",  # same input, same file
    "text.parse_math": False,  # a name with $ is a name
}
NOTE = """\
Mean and its 95 % interval over seeds (Student t); no interval with one seed. Darker and thicker: \
more images in pre-training, where their number is known."""
BLANK = Line2D([], [], linestyle="none")  # of a heading in a legend


def shades(names):
    """Names, of small sources first -> {name: from 0, the lightest, to 1}."""
    names = list(dict.fromkeys(names))
    return dict(zip(names, np.linspace(0, 1, len(names)) if len(names) > 1 else [0.5]))


def line_style(look, shade, marker, dashes):
    """Keywords of Line2D; shade from 0 to 1."""
    colour = LinearSegmentedColormap.from_list("", look.hues)(shade)
    return {
        "color": colour,
        "markerfacecolor": look.filling or colour,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": 0.9 + 0.9 * shade,
        "markersize": 3.8,
    }


def line_styles(cells):
    """Cells -> {line: keywords of Line2D}, in the order of the legend. Hue and filling tell the
    domain; shade and width the source, darker and thicker is larger; marker and dashes the model
    (with its method and recipe)."""
    lines = list(results.group(sorted(cells, key=results.line_order), "line"))
    networks = [
        (results.size_order(line.model), str((line.method, line.recipe, line.pretraining)))
        for line in lines
    ]
    ranks = sorted(set(networks))  # small ones first
    styles = {}
    for line, network in zip(lines, networks):
        peers = [other.source for other in lines if other.source_domain == line.source_domain]
        # A pack looks as what it holds.
        shade = shades(map(results.plain_name, peers))[results.plain_name(line.source)]
        rank = ranks.index(network)
        dashes = DASHES[(len(ranks) - 1 - rank) % len(DASHES)]
        marker = MARKERS[rank % len(MARKERS)]
        styles[line] = line_style(LOOKS[line.source_domain], shade, marker, dashes)
    return styles


def log_ticks(axis, low, high):
    """Plain numbers along a logarithmic axis: the fewer decades, the more of each."""
    subs = (1,) if high > 300 * low else (1, 3) if high > 10 * low else (1, 2, 3, 5)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def line_columns(handles):
    """{line: its handle} -> the two columns of a legend, natural and no sources on the left,
    medical on the right: under each domain (handle, source and network)."""
    columns, (_, differing) = [[], []], results.differing(handles)
    for domain, look in LOOKS.items():
        entries = [
            (handle, ", ".join([line.source, line.model, *differing[line]]))
            for line, handle in handles.items()
            if line.source_domain == domain
        ]
        columns[domain == "medical"] += [(BLANK, look.heading), *entries] if entries else []
    return columns


def draw_foot(fig, notes, columns=()):
    """Draw under the panels a legend of two lists of (handle, label), side by side where they fit,
    and below it small text, wrapped to the width of the figure."""
    top = 0  # of the text, in heights of the figure
    if columns:
        widths = [max((len(label) for _, label in column), default=0) for column in columns]
        fits = all(widths) and 0.06 * sum(widths) + 1 < fig.get_figwidth()  # inches
        if fits:
            columns = zip(*itertools.zip_longest(*columns, fillvalue=(BLANK, "")))
        handles, labels = zip(*itertools.chain(*columns))
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
        place |= {"ncols": 2 if fits else 1, "handlelength": 3.2, "fontsize": 7.5}
        legend = fig.legend(handles, labels, **place)
        fig.draw_without_rendering()  # places the legend
        bottom = legend.get_window_extent().transformed(fig.transFigure.inverted()).y0
        top = bottom - 0.05 / fig.get_figheight()
    text = textwrap.fill(" ".join(notes), round(20 * fig.get_figwidth()), break_on_hyphens=False)
    fig.text(0.5, top, text, ha="center", va="top", fontsize=6.5)
