"""Three figures: scores over shots, full-shot bars and lines, own against published numbers."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure  # without pyplot: writes files, needs no display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from charts import results, style
from charts.style import BARS, LOOKS, PANEL

CROWDED = 8  # a panel with more lines than that needs the width of two
SHARED_NOTE = """\
A point is a cell: target, source, network, shots; fine-tuned. Bars: 95 % intervals over seeds \
(Student t). Agree: means no further apart than √(a² + b²) of the half-widths."""


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
    places = draw_shots_axis(ax, cells)
    chance = (0.5, "0.5") if cells[0].metric == "mean_auc" else None  # of precision: unknown
    classes = cells[0].classes
    if cells[0].metric == "accuracy" and {cell.classes for cell in cells} == {classes or None}:
        chance = 1 / classes, f"1/{classes}"
    style.draw_y_axis(ax, cells, chance)
    factor = results.METRICS[cells[0].metric].factor
    lines = results.group([cell for cell in cells if cell.n], "line")
    step = min(0.008, 0.06 / len(lines)) if lines else 0  # of the axis, 6 % for them all
    step *= np.ptp(np.log10(ax.get_xlim()))  # decades
    for place, (line, points) in enumerate(lines.items()):
        shift = 10 ** (step * (place - (len(lines) - 1) / 2))
        x = [places[point.shots] * shift for point in points]
        y, bars = [factor * point.mean for point in points], [factor * p.ci95 for p in points]
        drawn = ax.errorbar(x, y, yerr=bars, zorder=3, **styles[line], **BARS)
        for bar in (*drawn.lines[1], *drawn.lines[2]):
            bar.set_alpha(0.5)  # where many cross, the lines stay in front
        drawn.lines[0].set_gid(" ".join(["line", target.name, *filter(None, line)]))  # for the SVG


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


def bar_style(line, styles):
    """Keywords of a bar: hatched where markers are hollow."""
    look = {"hatch": LOOKS[line.source_domain].hatch, "edgecolor": "white", "linewidth": 0}
    return {"facecolor": styles[line]["color"], **look}


def draw_bars(ax, cells, styles, differ):
    """Bars of the sources, grouped by network; every group has the same order of sources."""
    factor = results.METRICS[cells[0].metric].factor
    lines = {cell.line for cell in cells}
    order = sorted(lines, key=style.network_order)
    names = list(dict.fromkeys(network_name(line, differ) for line in order))
    sources = list(dict.fromkeys(line.source for line in styles if line in lines))
    for cell in cells:
        place = names.index(network_name(cell.line, differ)) * (len(sources) + 1)
        x, height = place + sources.index(cell.line.source), factor * cell.mean
        look = bar_style(cell.line, styles)
        ax.bar(x, height, 0.9, yerr=factor * cell.ci95, error_kw=BARS, **look)
    ticks = [place * (len(sources) + 1) + (len(sources) - 1) / 2 for place in range(len(names))]
    labels = [name.replace(", ", "\n") for name in names]
    ax.set_xticks(ticks, labels, rotation=90 if len(names) > 5 else 0)
    ax.tick_params(axis="x", length=0)


def draw_lines(ax, cells, styles, sizes):
    """Lines over the number of images in pre-training, one a domain and network; without any, a
    level across the panel. sizes: smallest and largest of all panels."""
    low, high = sizes
    margin = max((high / low) ** 0.08, 1.5)
    ax.set(xscale="log", xlim=(low / margin, high * margin), xlabel="images in pre-training")
    style.log_ticks(ax.xaxis, low, high, EngFormatter(sep=""))
    ax.label_outer()
    factor = results.METRICS[cells[0].metric].factor
    network = "line.source_domain", "line.model", "line.method", "line.recipe", "line.pretraining"
    for (domain, *_), members in results.group(cells, *network).items():
        members = sorted(members, key=lambda cell: cell.source_images)
        dashes = styles[members[-1].line]["linestyle"]
        look = {"color": LOOKS[domain].hues[-1], "linestyle": dashes, "linewidth": 0.9}
        if not members[0].source_images:
            for cell in members:
                ax.axhline(factor * cell.mean, **look)
            continue
        points = [(cell.source_images, factor * cell.mean) for cell in members]
        ax.plot(*zip(*points), zorder=2, **look)
        for point, cell in zip(points, members):
            ax.errorbar(*point, factor * cell.ci95, zorder=3, **styles[cell.line], **BARS)


def draw_full_shot(cells, styles, title="", notes=()):
    """Cells of all training images -> Figure, a row a target: bars by network, lines over the
    images in pre-training."""
    cells = [cell for cell in cells if cell.n]
    panels = results.group(cells, "target")
    styles = style.styles_of(cells, styles)
    differ = results.differing(cells)
    sizes = [cell.source_images for cell in cells if cell.source_images] or [1]
    fig = Figure(figsize=(2 * PANEL[0], 1.6 * len(panels) + 0.2), layout="constrained")
    axes = fig.subplots(len(panels), 2, squeeze=False, sharey="row", width_ratios=(1.15, 1))
    for (bars, lines), (target, panel) in zip(axes, panels.items()):
        draw_bars(bars, panel, styles, differ)
        draw_lines(lines, panel, styles, (min(sizes), max(sizes)))
        style.draw_y_axis(bars, panel)
        words = f"{target.name} ({target.domain}{results.mark(target.origin)})"
        bars.set_title(words, loc="left", color=LOOKS[target.domain].hues[-1], fontsize=8.5)
    fig.suptitle(title)

    def entry(line):
        return Patch(**bar_style(line, styles)), line.source

    sources = {(line.source_domain, line.source): line for line in styles}  # its largest network's
    columns = style.domain_columns(sources.values(), entry)
    grey = {"color": "#555555", "markerfacecolor": "white"}
    networks = {network_name(line, differ): {**look, **grey} for line, look in styles.items()}
    columns[0] += [(style.BLANK, "networks:")]
    columns[0] += [(Line2D([], [], **look), name) for name, look in networks.items()]
    note = f"{style.NOTE} All training images of the target."
    if any(bars.get_ylim()[0] > 0 for bars in axes[:, 0]):
        note += " Bars do not start at zero."
    style.draw_foot(fig, columns, [note, *notes])
    return fig


def draw_shared_panel(ax, pairs, styles):
    """The cells of one metric: own over published means, with both intervals and the diagonal."""
    name, factor, *_ = results.METRICS[pairs[0].own.metric]
    for own, published, _ in pairs:
        bars = {"xerr": factor * published.ci95, "yerr": factor * own.ci95, **BARS}
        look = {**styles[own.line], "linestyle": "none"}
        ax.errorbar(factor * published.mean, factor * own.mean, **look, **bars)
    known = [pair.agree for pair in pairs if pair.agree is not None]
    text = f"agree in {sum(known)} of {len(known)} cells"
    if len(known) < len(pairs):
        text += f"; {len(pairs) - len(known)} without interval"
    targets = ", ".join(sorted({pair.own.target.name for pair in pairs}))
    ax.set_title(f"{text}\n{textwrap.fill(targets, 45)}", fontsize=8)
    ends = [factor * side.mean for pair in pairs for side in (pair.own, pair.published)]
    margin = 0.08 * (max(ends) - min(ends)) or 0.05 * factor
    limits = min(ends) - margin, max(ends) + margin
    ax.plot(limits, limits, color="black", linewidth=0.7, linestyle=":", zorder=1)
    ax.set(xlim=limits, ylim=limits, xlabel=f"published {name}", ylabel=f"own {name}")
    ax.set_aspect("equal")


def draw_shared(shared, styles, title="", notes=()):
    """Cells of `gains.shared_cells` -> Figure: a panel a metric, a point a cell."""
    cells = [pair.own for pair in shared]
    styles = style.styles_of(cells, styles)
    panels = results.group(shared, "own.metric")
    size = max(3.3, PANEL[0] * len(panels)), PANEL[0] + 0.5
    fig = Figure(figsize=size, layout="constrained")
    for ax, pairs in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.values()):
        draw_shared_panel(ax, pairs, styles)
    fig.suptitle(title)
    points = {line: {**look, "linestyle": "none"} for line, look in styles.items()}
    style.draw_foot(fig, line_columns(cells, points), [SHARED_NOTE, *notes])
    return fig
