"""Markdown tables and CSV of the numbers of each figure."""

import csv
import io
import math

from charts.gains import REGIMES, VERDICTS, Gain, counts, regime, seeds_note
from charts.law import FIT_NOTE, NOTE, RELATION_NOTE, relations
from charts.results import METRICS, differing, group, mark, shots_words
from engine.console import table

RULE = """\
Cells: mean ± standard deviation over seeds (number of seeds). Bold: the best mean of a column and \
every mean no further below it than √(a² + b²), where a and b are the half-widths of the two 95 % \
intervals (Student t over seeds). One seed has no interval: such a cell is bold only as the best."""
GAIN_RULE = """\
Gain: the larger arm minus the smaller one, run by run: same target, shots, seed, method, recipe, \
and same source (larger network) or network (larger source, of one domain); the largest and the \
smallest of those that share the most. Differences are averaged over these for each seed; the 95 % \
interval is Student's t over seeds. ▲ interval above zero, ▼ below zero, neither: not off zero, or \
one seed and no interval. A seed that one arm lacks counts in neither."""
# Of the CSV of cells and of gains; those that neither has are left out.
CELL_COLUMNS = (
    "kind target target_domain origin source source_domain model method recipe pretraining shots "
    "metric small large partners pretraining_seeds pairs mean sd ci95 seed_share n verdict"
).split()
LAW_COLUMNS = (
    "kind method recipe origin target task source_domain target_domain shots seeds log10_distance "
    "exponent predicted reach"
).split()


def scores(cells):
    """Cells, or gains and how many of each verdict, -> Markdown: a table a target, in it for each
    line and number of shots mean ± deviation (seeds), bold as RULE says."""
    parts, notes, paired = [], [RULE], isinstance(cells[0], Gain)
    if paired:
        title = "### gain from scale: in how many cells (target x shots)\n"
        parts, notes = [title, count_table(cells), ""], [*seeds_note(cells), GAIN_RULE, "", RULE]
        cells = sorted(cells, key=lambda cell: (cell.target.domain != "natural", cell.target))
    for panel in group(cells, "target").values():
        target, metric, lines = panel[0].target, METRICS[panel[0].metric], group(panel, "line")
        if paired:
            unit = f"gain in {metric.axis.replace('%', 'points')}"
            heads = ["gain", "pre-trained on"]
            rows = {line: [f"larger {line.kind}", line.source_domain or "none"] for line in lines}
        else:
            unit, heads = metric.axis, ["source", "model"]
            rows = {line: [line.source or "–", line.model or "–"] for line in lines}
        differ, more = differing(lines)
        rows = {line: [*row, *more[line]] for line, row in rows.items()}
        columns = group(sorted(panel, key=lambda cell: cell.shots or math.inf), "shots")
        for members in columns.values():
            known = [cell for cell in members if cell.n]
            best = max(known, key=lambda cell: cell.mean, default=None)
            texts = {cell.line: "undefined (0)" for cell in members}
            for cell in known:
                text = f"{metric.factor * cell.mean:{'+' if paired else ''}.{metric.decimals}f}"
                if cell.n > 1:
                    text += f" ± {metric.factor * cell.sd:.{metric.decimals}f}"
                gap = abs(best.mean - cell.mean)  # nothing is within nan: no interval, no claim
                near = gap == 0 or gap <= math.hypot(best.ci95, cell.ci95)
                bold = "**" if len(known) > 1 and near else ""
                texts[cell.line] = f"{bold}{text} ({cell.n}){bold}"
                if paired and cell.verdict in ("above", "below"):
                    texts[cell.line] += f" {VERDICTS[cell.verdict][2]}"
            for line, row in rows.items():
                row.append(texts.get(line, "–"))
        heading = f"### {target.name} ({target.domain} target{mark(target.origin)}): {unit}\n"
        names = [*heads, *differ, *map(shots_words, columns)]
        parts += [heading, table(rows.values(), names), ""]
    return "\n".join([*parts, *notes, ""])


def count_table(gains):
    """Gains -> table of verdicts: a row for each kind, group and regime of shots."""
    (differ, more), rows = differing([gain.line for gain in gains]), []
    for members in group(gains, "line", "target.domain", "target.origin").values():
        first = members[0]
        about = [f"larger {first.line.kind}", first.group, first.target.origin, *more[first.line]]
        for name in (*REGIMES, "all"):
            part = [gain for gain in members if name in (regime(gain.shots), "all")]
            rows += [[*about, name, len(part), *counts(part).values()]] if part else []
    heads = [heading for heading, *_ in VERDICTS.values()]
    return table(rows, ["gain", "group", "origin", *differ, "shots", "cells", *heads])


def laws(found):
    """Laws -> Markdown: of each the exponents by relation, the coefficients and their test."""
    parts = []
    for law in found:
        kind, *about, origin = law.about
        about, rows = ", ".join([f"larger {kind}", *filter(None, about)]), []
        for (family, name), cell in relations(law.rows).items():
            half = "–" if cell["n"] == 1 else f"{cell['ci95']:.3f}"
            rows.append([" → ".join(family), name, f"{cell['mean']:+.3f} ± {half}", cell["n"]])
        text = table(rows, ["pre-trained on → target", "shots", "exponent", "tasks"])
        parts += [f"### {about}{mark(origin)}: exponents\n", text, ""]
        if not law.terms:
            parts += ["No law: fewer than four tasks of known distance.", ""]
            continue
        rows = [
            [letter, " → ".join(family or ["all"]), f"{value:+.3f}", f"± {half:.3f}"]
            for (letter, family), value, half in zip(law.terms, law.coefficients, law.ci95)
        ]
        heads = ["coefficient", "pre-trained on → target", "estimate", "95 % interval"]
        parts += ["### its coefficients\n", table(rows, heads), ""]
        b0, b1, own = law.rmse.values()
        row = [f"{value:.3f}" for value in (b0, b1, own, own / b0, own / b1, law.p)]
        shares = law.coverage, law.seed_share
        row += ["–" if math.isnan(share) else f"{100 * share:.0f} %" for share in shares]
        heads = ["tasks", "cells", "RMSE B0", "B1", "law", "law/B0", "law/B1", "p"]
        heads += ["in their interval", "variance by pre-training seeds"]
        text = table([[law.tasks, len(law.rows), *row]], heads)
        parts += ["### tasks left out\n", text, ""]
    return "\n".join([*parts, NOTE, RELATION_NOTE, FIT_NOTE, ""])


def csv_text(rows, columns):
    """Rows {column: value} -> CSV: fractions, undefined empty; a column that says nothing goes."""
    rows = [{key: "" if value != value else value for key, value in row.items()} for row in rows]
    unsaid = ["origin"] if all(row["origin"] == "own" for row in rows) else []
    for head in ("pretraining", "pretraining_seeds", "seed_share"):
        unsaid += [] if any(row.get(head) for row in rows) else [head]
    heads = [head for head in columns if head not in unsaid]
    file = io.StringIO()
    writer = csv.DictWriter(file, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def cell_csv(cells):
    """Cells or gains -> CSV."""
    rows = []
    for cell in cells:
        row = {**vars(cell), **cell.line._asdict(), "shots": cell.shots or "full"}
        row |= {"target": cell.target.name, "target_domain": cell.target.domain}
        row["origin"] = cell.target.origin
        if isinstance(cell, Gain):
            several = cell.pretraining_seeds if len(cell.pretraining_seeds) > 1 else ()
            row |= {"partners": ";".join(cell.partners), "pretraining_seeds": ";".join(several)}
            row["verdict"] = cell.verdict
        rows.append(row)
    return csv_text(rows, [name for name in CELL_COLUMNS if name in rows[0]])


def law_csv(found):
    rows = []
    for law in found:
        about = dict(zip(("kind", "method", "recipe", "origin"), law.about))
        for place, row in enumerate(law.rows):
            more = {"target": row.target.name, "task": row.task, "shots": row.shots or "full"}
            more |= zip(("source_domain", "target_domain"), row.family)
            more |= {"log10_distance": row.d, "exponent": row.exponent, "seeds": len(row.by_seed)}
            if law.terms:
                more |= {"predicted": law.predicted[place], "reach": law.reach[place]}
            rows.append(about | more)
    return csv_text(rows, LAW_COLUMNS)
