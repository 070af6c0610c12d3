"""Markdown tables and CSV of the numbers of each figure."""

import csv
import io
import math
from operator import attrgetter

from charts import gains as numbers
from charts import results
from charts.results import DISTANCES, METRICS, group, mark, shots_words

RULE = """\
Cells: mean ± standard deviation over seeds (number of seeds). Bold: the best mean of a column and \
every mean no further below it than √(a² + b²), where a and b are the half-widths of the two 95 % \
intervals (Student t over seeds). One seed has no interval: such a cell is bold only as the best."""
GAIN_RULE = """\
Gain: the larger arm minus the smaller one, run by run: same target, shots, seed, method, recipe, \
and same source (larger network) or network (larger source, of one domain). The arms are the \
largest and the smallest of those that share the most such partners. Each seed's differences are \
averaged over partners; the 95 % interval is Student's t over seeds, about these sources and \
networks: the draw of a seed is common to its pairs, so pairs do not count as independent. ▲ \
interval above zero, ▼ below zero, neither: not off zero, or one seed and no interval. A seed that \
one arm lacks counts in neither."""
DISTANCE_RULE = """\
Gain in fractions (accuracy, mean AUC or mean average precision from 0 to 1). Line and slope: \
ordinary least squares, 95 % confidence by Student's t over points; points that share a target, \
source or seed are not independent, so the true uncertainty is larger."""
SHARED_RULE = """\
Cells with the same target, source, network and shots, fine-tuned; packs count as what they hold \
(nih@256 as nih). They agree where the means lie no further apart than √(a² + b²), a and b being \
the half-widths of the two 95 % intervals (Student t over seeds)."""
SEEDS_INTERVAL = "Student t over seeds (means over the pairs of a seed)"
INTERVALS = {  # beside that over seeds: half-width of a Gain -> heading, how it reads the pairs
    "ci95_pairs": ("t over pairs", "Student t over all pairs"),
    "ci95_normal": ("1.96 over pairs", "1.96 standard errors over all pairs"),
}
AGREE = {True: "yes", False: "no", None: "no interval"}


# ------------------------------------------------------------------------------------------------
# Markdown
# ------------------------------------------------------------------------------------------------


def table(rows):
    """Rows of words (or None), the first the heading -> lines of a Markdown table."""
    rows = [["–" if word is None else str(word) for word in row] for row in rows]
    rows = [[word.replace("|", r"\|") for word in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]


def score(cell, sign=""):
    """A cell or gain as 61.2 ± 3.1 (5); one seed has no deviation."""
    metric = METRICS[cell.metric]
    text = f"{metric.factor * cell.mean:{sign}.{metric.decimals}f}"
    if cell.n > 1:
        text += f" ± {metric.factor * cell.sd:.{metric.decimals}f}"
    return f"{text} ({cell.n})"


def best_score(cell, column):
    """A cell or gain of a column as **61.2 ± 3.1 (5)**, bold as RULE says."""
    if cell.n == 0:
        return "undefined (0)"
    known = [other for other in column if other.n]
    best = max(known, key=lambda other: other.mean)
    bold = "**" if len(known) > 1 and results.within_noise(best, cell) else ""
    if not isinstance(cell, numbers.Gain):
        return f"{bold}{score(cell)}{bold}"
    verdict = {"above": " ▲", "below": " ▼"}.get(cell.verdict(), "")
    return f"{bold}{score(cell, '+')}{bold}{verdict}"


def score_table(cells, heads, words, columns, column):
    """Cells or gains -> lines of a table: a row for each of their lines, words(line) under the
    heads, and a column for each key of columns {key: heading}, of the cells where `column` is it."""
    members = group(cells, attrgetter(column))
    rows = [[*heads, *columns.values()]]
    for line in group(cells, attrgetter("line")):
        rows.append([*words(line)])
        for key in columns:
            found = [cell for cell in members[key] if cell.line == line]
            rows[-1].append(best_score(found[0], members[key]) if found else None)
    return table(rows)


def shots_columns(cells):
    """The numbers of shots of cells, as columns of `score_table`."""
    shots = sorted({cell.shots for cell in cells}, key=lambda shot: shot or math.inf)
    return {shot: shots_words(shot) for shot in shots}


def heading(target):
    return f"### {target.name} ({target.domain} target{mark(target.origin)})"


def few_shot_markdown(panels):
    """{target: cells} -> Markdown: a table a target, rows source x model, columns shots."""
    parts = []
    for target, cells in panels.items():
        names = ["source", "model", *results.differing([cell.line for cell in cells])]
        lines = score_table(cells, names, attrgetter(*names), shots_columns(cells), "shots")
        parts += [f"{heading(target)}: {METRICS[cells[0].metric].axis}\n", *lines, ""]
    return "\n".join([*parts, RULE, ""])


def full_shot_markdown(panels):
    """{target: full-shot cells} -> Markdown: rows source x model, a column a target."""
    parts = []
    for origin in ("own", "published"):
        shown = {target: cells for target, cells in panels.items() if target.origin == origin}
        if shown:
            cells = [cell for panel in shown.values() for cell in panel]
            cells.sort(key=results.line_order)
            names = ["source", "model", *results.differing([cell.line for cell in cells])]
            columns = {key: f"{key.name}, {METRICS[shown[key][0].metric].axis}" for key in shown}
            lines = score_table(cells, names, attrgetter(*names), columns, "target")
            parts += [f"### full-shot{mark(origin)}\n", *lines, ""]
    return "\n".join([*parts, RULE, ""])


def count_table(gains):
    """Gains -> lines of the table of verdicts: a row for each kind, group and regime of shots."""
    rows = []
    for members in group(gains, lambda g: (g.line, g.target.domain, g.target.origin)).values():
        first = members[0]
        for regime in (*numbers.REGIMES, "all"):
            part = [gain for gain in members if regime in (numbers.regime(gain.shots), "all")]
            row = {"gain": numbers.KINDS[first.line.kind].words, "group": first.group}
            row |= {"origin": first.target.origin, **first.line._asdict()}
            row |= {"shots": regime, "cells": len(part)}
            found = numbers.counts(part)
            row |= {head: found[verdict] for verdict, head in numbers.VERDICTS.items()}
            for interval, (head, _) in INTERVALS.items():
                above, unclear, below, _ = numbers.counts(part, interval).values()
                row[head] = f"{above}/{unclear}/{below}"
            rows += [row] if part else []
    heads = ["gain", "group", "origin", *results.differing([gain.line for gain in gains])]
    heads += [
        "shots",
        "cells",
        *numbers.VERDICTS.values(),
        *(head for head, _ in INTERVALS.values()),
    ]
    if len({row["origin"] for row in rows}) == 1:
        heads.remove("origin")
    if not any(row["no interval"] for row in rows):
        heads.remove("no interval")
    return table([heads, *([row[head] for head in heads] for row in rows)])


def flip_table(gains):
    """Gains -> lines of the table of those that another of INTERVALS judges otherwise."""
    rows = []
    for gain in gains:
        verdicts = {name: gain.verdict(name) for name in ("ci95", *INTERVALS)}
        if len(set(verdicts.values())) > 1:
            metric = METRICS[gain.metric]
            decimals = metric.decimals + 1
            words = numbers.KINDS[gain.line.kind].words
            row = [words, gain.group, gain.target.name, shots_words(gain.shots)]
            row.append(f"{metric.factor * gain.mean:+.{decimals}f}")
            for name, verdict in verdicts.items():
                half = f"± {metric.factor * getattr(gain, name):.{decimals}f}"
                row.append(f"{half}, {numbers.VERDICTS[verdict]}")
            rows.append(row)
    rules = [SEEDS_INTERVAL, *(rule for _, rule in INTERVALS.values())]
    return (
        table([["gain", "group", "target", "shots", "mean", *rules], *rows]) if rows else ["None."]
    )


def gain_markdown(gains):
    """Gains -> Markdown: counts, where another interval says otherwise, a table a target."""
    parts = ["### gain from scale: in how many cells (target x shots)\n", *count_table(gains)]
    other = "; ".join(rule for _, rule in INTERVALS.values())
    parts.append(f"\nThe last two columns, above/not off/below zero by other intervals: {other}.\n")
    parts += ["### cells in which the interval decides\n", *flip_table(gains), ""]
    panels = group(gains, attrgetter("target"))
    for target in sorted(panels, key=results.panel_order):
        cells = panels[target]
        names = results.differing([gain.line for gain in cells])

        def words(line, names=names):
            differ = [getattr(line, name) for name in names]
            return numbers.KINDS[line.kind].words, line.source_domain or "none", *differ

        heads = ["gain", "pre-trained on", *names]
        lines = score_table(cells, heads, words, shots_columns(cells), "shots")
        parts += [f"{heading(target)}: gain in {METRICS[cells[0].metric].gain}\n", *lines, ""]
    return "\n".join([*parts, GAIN_RULE, "", RULE, ""])


def distance_markdown(points):
    """Points of gain against distance -> Markdown: the slopes, then a row a point."""
    slopes = [["gain", "distance", "points", "slope", "95 % interval"]]
    for name, kind in numbers.KINDS.items():
        for distance, words in DISTANCES.items():
            line = numbers.fit(*numbers.axis_points(points, name, distance))
            if line:
                text = f"{line.slope:+.3f}", f"± {line.ci95:.3f}"
                slopes.append([kind.words, words, line.n, *text])
    rows = [["gain of", "target", "source", "shots", "metric", "gain", *DISTANCES]]
    for point in points:
        gain = point.gain
        about = [numbers.KINDS[gain.line.kind].words, gain.target.name, point.source]
        about += [shots_words(gain.shots), gain.metric, f"{point.value:+.3f}"]
        rows.append([*about, *(f"{value:.3g}" for value in point.distances.values())])
    parts = ["### gain against domain distance: fitted slopes\n", *table(slopes), ""]
    return "\n".join([*parts, "### points\n", *table(rows), "", DISTANCE_RULE, ""])


def shared_markdown(shared):
    """List of Shared -> Markdown: a row a cell."""
    rows = [["target", "source", "model", "recipe", "shots", "own", "published", "agree"]]
    for own, published, agree in shared:
        row = [own.target.name, own.line.source, own.line.model, own.line.recipe]
        rows.append([*row, shots_words(own.shots), score(own), score(published), AGREE[agree]])
    return "\n".join(["### own against published\n", *table(rows), "", SHARED_RULE, ""])


# ------------------------------------------------------------------------------------------------
# CSV
# ------------------------------------------------------------------------------------------------


def csv_text(rows):
    """Dicts of equal keys -> CSV: fractions, undefined empty, no shots as full; origin is left out
    where all is one's own."""
    own = all(row.get("origin") == "own" for row in rows)
    heads = [key for key in rows[0] if key != "origin" or not own]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        row = {**row, "shots": row["shots"] or "full"}
        writer.writerow(["" if row[key] != row[key] else row[key] for key in heads])  # nan
    return file.getvalue()


def target_row(target):
    return {"target": target.name, "target_domain": target.domain, "origin": target.origin}


def spread_row(cell):
    return {"mean": cell.mean, "sd": cell.sd, "ci95": cell.ci95, "n": cell.n}


def cell_rows(panels):
    """{target: cells} -> rows for `csv_text`, a row a cell; ci95 is the half-width."""
    rows = []
    for cell in [cell for cells in panels.values() for cell in cells]:
        about = {**target_row(cell.target), **cell.line._asdict(), "shots": cell.shots}
        rows.append({**about, "metric": cell.metric, **spread_row(cell)})
    return rows


def gain_rows(gains):
    """Gains -> rows for `csv_text`."""
    rows = []
    for gain in gains:
        line = gain.line._asdict()
        row = {"kind": line.pop("kind"), **target_row(gain.target), **line, "shots": gain.shots}
        row |= {"metric": gain.metric, "small": gain.small, "large": gain.large}
        row |= {"partners": ";".join(gain.by_partner), "pairs": gain.pairs, **spread_row(gain)}
        row["verdict"] = gain.verdict()
        rows.append({**row, **{name: getattr(gain, name) for name in INTERVALS}})
    return rows


def point_rows(points):
    """Points of gain against distance -> rows for `csv_text`."""
    rows = []
    for point in points:
        gain, line = point.gain, point.gain.line
        row = {"kind": line.kind, **target_row(gain.target), "source": point.source}
        row |= {"source_domain": line.source_domain, "method": line.method, "recipe": line.recipe}
        row |= {"shots": gain.shots, "metric": gain.metric, "gain": point.value}
        rows.append(row | point.distances)
    return rows


def shared_rows(shared):
    """List of Shared -> rows for `csv_text`."""
    rows = []
    for own, published, agree in shared:
        row = {"target": own.target.name, "source": own.line.source, "model": own.line.model}
        row |= {"recipe": own.line.recipe, "shots": own.shots, "metric": own.metric}
        row |= {f"{key}_own": value for key, value in spread_row(own).items()}
        row |= {f"{key}_published": value for key, value in spread_row(published).items()}
        rows.append({**row, "agree": AGREE[agree]})
    return rows
