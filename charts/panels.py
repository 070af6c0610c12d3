"""The looks of all figures, and three of them: few-shot curves, full-shot bars and lines, own
results against published ones.
"""

import math
import textwrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # without pyplot: writes files, needs no display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from charts.results import LINE, METRICS, differing, group, line_order, mark, plain_name, size_order

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

# Domain -> heading in the legend, hue from the smallest to the largest source, marker filling.
# Orange and blue stay apart for colour-blind readers; the filling parts the domains in grey.
DOMAINS = {
    "natural": ("pre-trained on natural images:", ("#f7b267", "#d9730d", "#5c1f00"), None),
    "medical": ("pre-trained on medical images:", ("#8cc8ee", "#2f7fc1", "#071d49"), "white"),
    None: ("no pre-training:", ("#858585", "#858585"), "#d9d9d9"),
}
MARKERS = "osD^vPX*"  # one a model, the smallest first
LINES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (2, 1)))  # the largest model first
PANEL = (2.7, 2.4)  # inches; two in a row stay readable when the figure is set 3.3 in wide
CROWDED = 8  # a panel with more lines than that is drawn twice as wide
BARS = {"elinewidth": 0.6, "capsize": 1.2, "capthick": 0.6}  # of intervals
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text, to search and to edit
    "svg.hashsalt": "plot",  # same input, same file
    "text.parse_math": False,  # a name with $ is a name
}


# ------------------------------------------------------------------------------------------------
# Styles, axes, legend
# ------------------------------------------------------------------------------------------------


def line_style(hue, filling, shade, marker, dashes):
    """Keywords of Line2D; shade from 0 to 1, the others as in the settings."""
    colour = LinearSegmentedColormap.from_list("", hue)(shade)
    return {
        "color": colour,
        "markerfacecolor": filling or colour,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": 0.9 + 0.9 * shade,
        "markersize": 3.8,
    }


def line_styles(cells):
    """Cells -> {line: keywords of Line2D}, in the order of the legend.

    Hue and filling tell the domain; shade and width the source, darker and thicker is larger;
    marker and dashes the model (with its method and recipe).
    """
    lines = list(group(sorted(cells, key=line_order), LINE))
    models = sorted({line[2:] for line in lines}, key=lambda m: (size_order(m[0]), str(m[1:])))
    styles = {}
    for line in lines:
        peers = [plain_name(other[0]) for other in lines if other[1] == line[1]]
        sources = list(dict.fromkeys(peers))  # a pack looks as what it holds
        shade = sources.index(plain_name(line[0])) / max(len(sources) - 1, 1)
        shade = shade if len(sources) > 1 else 0.5
        model = models.index(line[2:])
        marker = MARKERS[model % len(MARKERS)]
        dashes = LINES[(len(models) - 1 - model) % len(LINES)]
        styles[line] = line_style(*DOMAINS[line[1]][1:], shade, marker, dashes)
    return styles


def draw_x_axis(ax, cells):
    """Log axis of shots, full-shot set apart at its end; returns {shots: place on the axis}."""
    shots = sorted({cell["shots"] for cell in cells if cell["shots"]})
    places = {shot: float(shot) for shot in shots}
    decades = math.log10(shots[-1] / shots[0]) if shots else 0.0
    gap = 10 ** max(0.3, 0.2 * decades)  # factor from the last shots to "full"
    ax.set_xscale("log")
    if any(cell["shots"] is None for cell in cells):
        full = places[None] = shots[-1] * gap if shots else 1.0
        ax.axvspan(full / gap**0.5, full * gap**0.5, color="#efefef", linewidth=0)
    width = decades + 2 * math.log10(gap)  # of the axis, in decades
    labels, last = [], 0.0
    for shot, place in places.items():  # crowded ticks stay, their labels do not
        fits = not last or math.log10(place / last) > 0.07 * width
        labels.append(str(shot or "full") if fits else "")
        last = place if fits else last
    ax.set_xticks(list(places.values()), labels)
    ax.minorticks_off()
    ax.set_xlim(min(places.values()) / gap**0.5, max(places.values()) * gap**0.5)
    return places


def chance(cells):
    """Score of guessing as (fraction, its name); None for average precision, and for accuracy
    when the runs of the target do not agree on its number of classes."""
    classes = max(cell["classes"] for cell in cells)
    if cells[0]["metric"] == "accuracy" and {classes} == {c["classes"] for c in cells} != {0}:
        return 1 / classes, f"1/{classes}"
    return (0.5, "0.5") if cells[0]["metric"] == "mean_auc" else None


def draw_y_axis(ax, cells, with_chance=True):
    """Name and limits of the metric, and the level of chance, labelled in the right margin."""
    name, factor, _ = METRICS[cells[0]["metric"]]
    bars = [(cell["mean"], np.nan_to_num(cell["ci95"])) for cell in cells if cell["n"]]
    ends = [mean + side * bar for mean, bar in bars for side in (-1, 1)]
    if not ends:
        ends = [0, 1]
        ax.text(0.5, 0.7, "undefined in every run", transform=ax.transAxes, ha="center")
    level = chance(cells) if with_chance else None
    if level:
        ax.axhline(factor * level[0], color="black", linewidth=0.8, linestyle=":", zorder=1)
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 6.5}
        ax.text(1.02, factor * level[0], f"chance\n({level[1]})", **place)
    # A t interval of few seeds can be longer than all else, and leave [0, 1]: the axis follows the
    # means, and intervals as far as half their range beyond.
    means = [mean for mean, _ in bars] or ends
    reach = 0.5 * (max(means) - min(means)) or 1
    low, high = max(0, min(ends), min(means) - reach), min(1, max(ends), max(means) + reach)
    low, high = (min(low, level[0]), max(high, level[0])) if level else (low, high)
    margin = 0.05 * (high - low) or 0.05
    ax.set_ylim(factor * (low - margin), factor * (high + margin))
    ax.set_ylabel(name)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)


def short(name, width):
    """A name, or as much of its end as fits in `width` characters."""
    return name if len(name) <= width else "…" + name[1 - width :]


def draw_title(ax, target):
    """Name and domain of the target over its panel, and whether its numbers are published ones."""
    text = f"{textwrap.fill(target[0], 40)}\n{target[1]} target{mark(target[2])}"
    ax.set_title(text, color=DOMAINS[target[1]][1][-1], fontsize=8.5)


def draw_panel(ax, target, cells, styles):
    """Draw the lines of one target, each moved sideways a little so that the intervals part."""
    draw_title(ax, target)
    places = draw_x_axis(ax, cells)
    draw_y_axis(ax, cells)
    factor = METRICS[cells[0]["metric"]][1]
    lines = group([cell for cell in cells if cell["n"]], LINE)
    step = min(0.008, 0.06 / len(lines)) if lines else 0  # of the axis, 6 % for them all
    step *= np.ptp(np.log10(ax.get_xlim()))  # decades
    for place, (line, points) in enumerate(lines.items()):
        shift = 10 ** (step * (place - (len(lines) - 1) / 2))
        x = [places[point["shots"]] * shift for point in points]
        y, bars = ([factor * point[key] for point in points] for key in ("mean", "ci95"))
        drawn = ax.errorbar(x, y, yerr=bars, zorder=3, **styles[line], **BARS)
        for bar in (*drawn.lines[1], *drawn.lines[2]):
            # Where many bars cross, the lines stay in front.
            bar.set_alpha(0.6 if len(lines) <= CROWDED else 0.3)
        drawn.lines[0].set_gid(" ".join(["line", target[0], *filter(None, line)]))  # for the SVG


def pick(styles, cells):
    """Those of the styles whose lines are among the cells, in the order of the styles."""
    lines = group(cells, LINE)
    return {line: style for line, style in styles.items() if line in lines}


def two_columns(fig, columns):
    """Two lists of (handle, label) -> a legend under the panels, side by side where they fit."""
    blank = Line2D([], [], linestyle="none")
    widths = [max((len(label) for _, label in column), default=0) for column in columns]
    rows = max(map(len, columns))
    if all(widths) and 0.06 * sum(widths) + 1 < fig.get_figwidth():  # inches: they fit in one row
        columns = [column + [(blank, "")] * (rows - len(column)) for column in columns]
    else:
        rows = 0
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "fontsize": 7.5}
    entries = zip(*(columns[0] + columns[1]))
    return fig.legend(*entries, ncols=2 if rows else 1, handlelength=3.2, **place)


def draw_legend(fig, cells, styles):
    """One legend under the panels: natural and no sources on the left, medical on the right."""
    differ = [LINE.index(key) for key in differing(cells)]
    blank = Line2D([], [], linestyle="none")
    columns = [[], []]
    for domain, (heading, *_) in DOMAINS.items():
        lines = [line for line in styles if line[1] == domain]
        column = columns[domain == "medical"]
        column += [(blank, heading)] if lines else []
        for line in lines:
            words = [line[0], line[2], *(line[place] or "–" for place in differ)]
            column.append((Line2D([], [], **styles[line]), ", ".join(words)))
    return two_columns(fig, columns)


def footnote(cells):
    """What a reader of the figure must be told: seeds, intervals, shades."""
    counts = {cell["n"] for cell in cells if cell["n"]}
    several = sorted(counts - {1})
    seeds = " to ".join(str(n) for n in dict.fromkeys(several[:1] + several[-1:]))
    parts = []
    if several:
        parts.append(f"Mean and its 95 % interval over {seeds} seeds (Student t).")
    if 1 in counts:
        parts.append("Points without a bar: no interval with one seed.")
    cells = [cell for cell in cells if cell["source_domain"]]
    sizes, sources, domains = (
        group(cells, ("source_domain", *keys)) for keys in (["source_images"], ["source"], [])
    )
    if all(images for _, images in sizes) and len(sizes) == len(sources) > len(domains):
        parts.append("Darker and thicker: more images in pre-training.")
    return " ".join(parts)


def draw_footnote(fig, legend, text):
    """Write the text below the legend."""
    fig.draw_without_rendering()  # places the legend
    bottom = legend.get_window_extent().transformed(fig.transFigure.inverted()).y0
    write_note(fig, text, bottom - 0.05 / fig.get_figheight())


def write_note(fig, text, top):
    """Write small text below the height `top` (of the figure), wrapped to its width."""
    note = textwrap.fill(text, round(20 * fig.get_figwidth()), break_on_hyphens=False)
    fig.text(0.5, top, note, ha="center", va="top", fontsize=6.5)


# ------------------------------------------------------------------------------------------------
# Few-shot curves
# ------------------------------------------------------------------------------------------------


def panel_places(counts):
    """Numbers of lines of panels -> ([(row, column, whether it takes the whole row)], rows): two a
    row, those with more than CROWDED lines alone."""
    places, row, column = [], 0, 0
    for count in counts:
        wide = count > CROWDED
        row, column = (row + 1, 0) if column == 2 or (wide and column) else (row, column)
        places.append((row, column, wide))
        column += 2 if wide else 1
    return places, row + 1


def draw_curves(panels, title, styles=None, notes=()):
    """Few-shot curves: {target: cells} -> Figure with a panel a target, a legend and a footnote."""
    places, rows = panel_places([len(group(cells, LINE)) for cells in panels.values()])
    columns = 1 if len(panels) == 1 and not places[0][2] else 2
    width = max(3.3, PANEL[0] * columns)
    fig = Figure(figsize=(width, PANEL[1] * rows), layout="constrained")
    grid = fig.add_gridspec(rows, columns)
    cells = [cell for panel in panels.values() for cell in panel]
    styles = pick(styles or line_styles(cells), cells)
    for (row, column, wide), (target, panel) in zip(places, panels.items()):
        ax = fig.add_subplot(grid[row, :] if wide else grid[row, column])
        draw_panel(ax, target, panel, styles)
    fig.supxlabel("training images per class (shots)", fontsize=8)
    fig.suptitle(title, fontsize=10)
    draw_footnote(fig, draw_legend(fig, cells, styles), " ".join([footnote(cells), *notes]))
    return fig


# ------------------------------------------------------------------------------------------------
# Full-shot bars and lines
# ------------------------------------------------------------------------------------------------


def bar_style(line, style):
    """Keywords of a bar from those of a line: hatched where markers are hollow."""
    hatch = {"natural": None, "medical": "/////", None: "....."}[line[1]]
    return {"facecolor": style["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def model_name(line, differ):
    """The network of a line, with its method and recipe where lines differ in them."""
    words = dict(zip(LINE, line))
    return ", ".join([words["model"], *(words[key] or "–" for key in differ)])


def draw_bars(ax, cells, styles, differ):
    """Bars of the sources, grouped by network; every group has the same order of sources."""
    factor = METRICS[cells[0]["metric"]][1]
    lines = sorted(group(cells, LINE), key=lambda line: (size_order(line[2]), str(line[3:])))
    names = list(dict.fromkeys(model_name(line, differ) for line in lines))
    sources = list(dict.fromkeys(line[0] for line in styles if line in lines))
    for line, (cell,) in group(cells, LINE).items():
        x = names.index(model_name(line, differ)) * (len(sources) + 1) + sources.index(line[0])
        height, half = factor * cell["mean"], factor * cell["ci95"]
        ax.bar(x, height, 0.9, yerr=half, error_kw=BARS, **bar_style(line, styles[line]))
    middle = (len(sources) - 1) / 2
    fits = 0.065 * max(map(len, names)) * len(names) < PANEL[0]
    words = names if fits else [name.replace(", ", "\n") for name in names]
    ticks = [place * (len(sources) + 1) + middle for place in range(len(names))]
    ax.set_xticks(ticks, words, rotation=0 if fits else 90)
    ax.tick_params(axis="x", length=0)


def draw_lines(ax, cells, styles):
    """Lines over the number of images in pre-training, one a domain and network; without any, a
    level across the panel."""
    factor = METRICS[cells[0]["metric"]][1]
    for key, members in group(cells, LINE[1:]).items():
        members = sorted(members, key=lambda cell: cell["source_images"])
        looks = [styles[tuple(cell[key] for key in LINE)] for cell in members]
        hue = {"color": DOMAINS[key[0]][1][-1], "linestyle": looks[-1]["linestyle"]}
        if not members[0]["source_images"]:
            for cell in members:
                ax.axhline(factor * cell["mean"], linewidth=0.9, **hue)
            continue
        x = [cell["source_images"] for cell in members]
        y, bars = ([factor * cell[k] for cell in members] for k in ("mean", "ci95"))
        ax.plot(x, y, linewidth=0.9, zorder=2, **hue)
        for place, look in enumerate(looks):
            ax.errorbar(x[place], y[place], yerr=bars[place], zorder=3, **look, **BARS)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)


def draw_size_axis(ax, cells, labelled):
    """Log axis of images in pre-training, common to all panels."""
    sizes = [cell["source_images"] for cell in cells if cell["source_images"]] or [1]
    low, high = min(sizes), max(sizes)
    margin = max((high / low) ** 0.08, 1.3)
    ax.set_xscale("log")
    ax.set_xlim(low / margin, high * margin)
    steps = (1, 3) if high < 300 * low else (1,)
    ticks = [step * 10**power for power in range(16) for step in steps]
    ticks = [tick for tick in ticks if low / margin <= tick <= high * margin]
    ax.set_xticks(ticks if len(ticks) > 1 else [low, high] if high > low else [low])
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.minorticks_off()
    ax.tick_params(axis="x", labelbottom=labelled)
    ax.set_xlabel("images in pre-training" if labelled else "")


def full_legend(fig, cells, styles, differ):
    """Sources as patches by domain, networks as markers: under the panels."""
    blank = Line2D([], [], linestyle="none")
    columns = [[], []]
    for domain, (heading, *_) in DOMAINS.items():
        lines = {line[0]: line for line in styles if line[1] == domain}
        column = columns[domain == "medical"]
        column += [(blank, heading)] if lines else []
        column += [(Patch(**bar_style(line, styles[line])), name) for name, line in lines.items()]
    models = {
        model_name(line, differ): {**style, "color": "#555555", "markerfacecolor": "white"}
        for line, style in styles.items()
    }
    columns[0] += [(blank, "networks:")] + [
        (Line2D([], [], **look), name) for name, look in models.items()
    ]
    return two_columns(fig, columns)


def draw_full_shot(panels, title, styles=None, notes=()):
    """Full-shot: {target: cells} -> Figure, a row a target: bars by network, lines over images."""
    panels = {key: [c for c in cells if c["n"]] for key, cells in panels.items()}
    cells = [cell for panel in panels.values() for cell in panel]
    styles, differ = pick(styles or line_styles(cells), cells), differing(cells)
    fig = Figure(figsize=(2 * PANEL[0], 1.6 * len(panels) + 0.2), layout="constrained")
    shape = {"sharey": "row", "width_ratios": (1.15, 1)}
    axes = fig.subplots(len(panels), 2, squeeze=False, **shape)
    for (bars, lines), (target, panel) in zip(axes, panels.items()):
        draw_bars(bars, panel, styles, differ)
        draw_lines(lines, panel, styles)
        draw_y_axis(bars, panel, with_chance=False)
        look = {"loc": "left", "color": DOMAINS[target[1]][1][-1], "fontsize": 8.5}
        bars.set_title(f"{short(target[0], 30)} ({target[1]}{mark(target[2])})", **look)
        draw_size_axis(lines, cells, labelled=lines is axes[-1, 1])
    fig.suptitle(title, fontsize=10)
    note = f"{footnote(cells)} All training images of the target."
    cut = any(bars.get_ylim()[0] > 0 for bars in axes[:, 0])
    note += " Bars do not start at zero." if cut else ""
    draw_footnote(fig, full_legend(fig, cells, styles, differ), " ".join([note, *notes]))
    return fig


# ------------------------------------------------------------------------------------------------
# Own against published
# ------------------------------------------------------------------------------------------------


def draw_shared_panel(ax, pairs, styles):
    """The cells of one metric: own over published means, with both intervals and the diagonal."""
    name, factor, _ = METRICS[pairs[0]["own"]["metric"]]
    sides = ("published", "own")
    for pair in pairs:
        x, y = (factor * pair[side]["mean"] for side in sides)
        bars = dict(zip(("xerr", "yerr"), (factor * pair[side]["ci95"] for side in sides)))
        ax.errorbar(x, y, **bars, **styles[tuple(pair["own"][key] for key in LINE)], **BARS)
    known = [pair["agree"] for pair in pairs if pair["agree"] is not None]
    single = f"; {len(pairs) - len(known)} without interval" if len(known) < len(pairs) else ""
    targets = textwrap.fill(", ".join(sorted({pair["own"]["target"] for pair in pairs})), 45)
    text = f"agree in {sum(known)} of {len(known)} cells{single}"
    ax.set_title(f"{text}\n{targets}", fontsize=8)
    ends = [factor * pair[side]["mean"] for pair in pairs for side in sides]
    margin = 0.08 * (max(ends) - min(ends)) or 0.05 * factor
    limits = min(ends) - margin, max(ends) + margin
    ax.plot(limits, limits, color="black", linewidth=0.7, linestyle=":", zorder=1)
    ax.set(xlim=limits, ylim=limits, xlabel=f"published {name}", ylabel=f"own {name}")
    ax.set_aspect("equal")


def draw_shared(shared, title, styles=None, notes=()):
    """Cells of `paired.shared_cells` -> Figure: a panel a metric, a point a cell."""
    panels = {}
    for pair in shared:
        panels.setdefault(pair["own"]["metric"], []).append(pair)
    cells = [pair["own"] for pair in shared]
    styles = pick(styles or line_styles(cells), cells)
    styles = {line: {**style, "linestyle": "none"} for line, style in styles.items()}
    fig = Figure(figsize=(max(3.3, PANEL[0] * len(panels)), PANEL[0] + 0.5), layout="constrained")
    for ax, pairs in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.values()):
        draw_shared_panel(ax, pairs, styles)
    fig.suptitle(title, fontsize=10)
    note = """A point is a cell: target, source, network, shots; fine-tuned. Bars: 95 % intervals
    over seeds (Student t). Agree: means no further apart than √(a² + b²) of the half-widths."""
    draw_footnote(fig, draw_legend(fig, cells, styles), " ".join([*note.split(), *notes]))
    return fig
