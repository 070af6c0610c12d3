"""The study's own figures (arXiv:2106.00116): a target a figure, ± one standard deviation."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from charts import panels, results, style
from charts.style import BARS, LOOKS

NOTE = """\
Mean ± standard deviation over seeds. Over networks: sources with several of them."""


def study_cells(runs, metric):
    """Results -> {target's name: its cells}, own and published together; metric auto: accuracy on
    the study's targets but PadChest, as there, and elsewhere as everywhere.
    """
    found = {}
    for target, members in results.group(runs, "target").items():
        name = results.plain_name(target.name).partition(" ")[0]
        accurate = metric == "auto" and name in results.TARGETS and name != "padchest"
        cells = results.summarise(members, "accuracy" if accurate else metric)
        found.setdefault(target.name, []).extend(cell for cell in cells if cell.n)
    return {name: cells for name, cells in sorted(found.items()) if cells}


def draw_target(cells, styles, title="", notes=()):
    """Cells of one target -> Figure: bars of all pre-trainings grouped by shots; under them lines
    over shots from natural sources, from medical ones, and over networks with all images.
    """
    styles = style.styles_of(cells, styles)
    domains = [domain for domain in LOOKS if any(c.line.source_domain == domain for c in cells)]
    full = [cell for cell in cells if cell.shots is None]
    few = {domain: [c for c in cells if c.line.source_domain == domain] for domain in domains}
    fig = Figure(figsize=(7, 4.6), layout="constrained")
    rows = fig.subfigures(2, 1, height_ratios=(1, 1.05))
    draw_bars(rows[0].subplots(), cells, styles)
    below = rows[1].subplots(1, len(few) + bool(full), squeeze=False)[0]
    for ax, (domain, members) in zip(below, few.items()):
        panels.draw_few_shot_lines(ax, members, styles, "sd")
        heading = LOOKS[domain].heading.removesuffix(":")
        ax.set(xlabel="training images per class", ylabel="")
        ax.set_title(heading, fontsize=7.5, color=LOOKS[domain].hues[-1])
    few_axes = below[: len(few)]
    lows, highs = zip(*(ax.get_ylim() for ax in few_axes))
    for ax in few_axes:
        ax.set_ylim(min(lows), max(highs))
    if full:
        draw_networks(below[-1], full, styles)
    first = cells[0]
    rows[0].suptitle(title or f"{first.target.name}: {results.METRICS[first.metric].axis}")
    below[0].set_ylabel(results.METRICS[first.metric].axis)
    style.draw_foot(fig, bar_columns(cells, styles), [NOTE, *notes])
    return fig


def bar_look(line, styles, networks):
    """Keywords of a bar: hue and shade of the source; the largest network full, others hatched."""
    colour, rank = styles[line]["color"], networks[::-1].index(line.model)
    hatch = ("", "////", "....", "xxxx")[min(rank, 3)]
    return {"facecolor": "white" if rank else colour, "edgecolor": colour, "hatch": hatch}


def draw_bars(ax, cells, styles):
    """Bars in groups of a number of shots, in the order of the legend; own ones before published
    ones, which are paler."""
    factor, networks = results.METRICS[cells[0].metric].factor, network_names(cells)
    kinds = [(line, origin) for line in styles for origin in ("own", "published")]
    kinds = [kind for kind in kinds if any((c.line, c.target.origin) == kind for c in cells)]
    groups = sorted({cell.shots for cell in cells}, key=lambda shots: shots or np.inf)
    both = len({cell.target.origin for cell in cells}) > 1
    for cell in cells:
        x = groups.index(cell.shots) * (len(kinds) + 1.5) + kinds.index(
            (cell.line, cell.target.origin)
        )
        alpha = 0.5 if both and cell.target.origin == "published" else 1
        look = {"alpha": alpha, "error_kw": BARS} | bar_look(cell.line, styles, networks)
        ax.bar(x, factor * cell.mean, 0.85, yerr=factor * cell.sd, linewidth=0.6, **look)
    middles = [place * (len(kinds) + 1.5) + (len(kinds) - 1) / 2 for place in range(len(groups))]
    ax.set_xticks(middles, [results.shots_words(shots) for shots in groups])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=results.METRICS[cells[0].metric].axis, ylim=(0, None), xmargin=0.01)


def draw_networks(ax, cells, styles):
    """A line a source over the networks, of cells with all training images."""
    factor, networks = results.METRICS[cells[0].metric].factor, network_names(cells)
    alike = "line.source", "line.source_domain", "line.method", "line.recipe", "target.origin"
    for members in results.group(cells, *alike).values():
        if len(members) == 1 < len(networks):
            continue
        members = sorted(members, key=lambda cell: networks.index(cell.line.model))
        x = [networks.index(cell.line.model) for cell in members]
        y, bars = ([factor * getattr(cell, key) for cell in members] for key in ("mean", "sd"))
        look = styles[members[-1].line] | {"linestyle": "-", "marker": "."}
        ax.errorbar(x, y, yerr=bars, **look, **BARS)
    ax.set_xticks(range(len(networks)), networks)
    ax.set(xlim=(-0.3, len(networks) - 0.7))
    ax.set_title("all training images, a scale of its own", fontsize=7.5)


def network_names(cells):
    """The networks of cells, small ones first."""
    return sorted({cell.line.model for cell in cells}, key=results.size_order)


def bar_columns(cells, styles):
    """The two columns of a legend of bars, as panels.line_columns."""
    networks, differ = network_names(cells), results.differing(cells)

    def entry(line):
        handle = Patch(**bar_look(line, styles, networks), linewidth=0.6)
        return handle, f"{line.source}, {panels.network_name(line, differ)}"

    columns = style.domain_columns(styles, entry)
    columns[0].append((style.BLANK, "lines:"))
    for name in networks:
        look = next(look for line, look in styles.items() if line.model == name)
        grey = look | {"color": "#555555", "markerfacecolor": "#555555", "linewidth": 1.2}
        columns[0].append((Line2D([], [], **grey), name))
    return columns
