"""Markdown tables and CSV of the numbers of each figure."""

import csv
import io
import math

from charts import results
from charts.gains import REGIMES, VERDICTS, counts, regime, seeds_note
from charts.law import FIT_NOTE, NOTE, RELATION_NOTE, relations
from charts.results import METRICS, differing, group, mark, shots_words, words
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


def score_table(cells, unit, heads, rows):
    """Cells or gains of a target -> heading and table: of each line the words of its row {line:
    [word]} under the heads, and for each number of shots mean ± deviation (seeds), bold as RULE
    says."""
    columns = group(sorted(cells, key=lambda cell: cell.shots or math.inf), "shots")
    target, metric = cells[0].target, METRICS[cells[0].metric]
    factor, decimals = metric.factor, metric.decimals
    for members in columns.values():
        known = [cell for cell in members if cell.n]
        best = max(known, key=lambda cell: cell.mean, default=None)
        texts = {cell.line: "undefined (0)" for cell in members}
        for cell in known:
            verdict = getattr(cell, "verdict", None)  # of gains
            text = f"{factor * cell.mean:{'+' if verdict else ''}.{decimals}f}"
            text += f" ± {factor * cell.sd:.{decimals}f}" if cell.n > 1 else ""
            gap = abs(best.mean - cell.mean)  # nothing is within nan: no interval, no claim
            near = gap == 0 or gap <= math.hypot(best.ci95, cell.ci95)
            bold = "**" if len(known) > 1 and near else ""
            sign = f" {VERDICTS[verdict][2]}" if verdict in ("above", "below") else ""
            texts[cell.line] = f"{bold}{text} ({cell.n}){bold}{sign}"
        for line, row in rows.items():
            row.append(texts.get(line, "–"))
    heading = f"### {target.name} ({target.domain} target{mark(target.origin)}): {unit}\n"
    return [heading, table(rows.values(), [*heads, *map(shots_words, columns)]), ""]


def few_shot(cells):
    """Cells -> Markdown: a table a target, rows source x model, columns shots."""
    parts = []
    for panel in group(cells, "target").values():
        lines = group(panel, "line")
        names = ["source", "model", *differing(lines)]
        rows = {line: words(line, names) for line in lines}
        parts += score_table(panel, METRICS[panel[0].metric].axis, names, rows)
    return "\n".join([*parts, RULE, ""])


def count_table(gains):
    """Gains -> table of verdicts: a row for each kind, group and regime of shots."""
    differ, rows = differing([gain.line for gain in gains]), []
    for members in group(gains, "line", "target.domain", "target.origin").values():
        first = members[0]
        about = [f"larger {first.line.kind}", first.group, first.target.origin]
        about += words(first.line, differ)
        for name in (*REGIMES, "all"):
            part = [gain for gain in members if name in (regime(gain.shots), "all")]
            rows += [[*about, name, len(part), *counts(part).values()]] if part else []
    heads = [heading for heading, *_ in VERDICTS.values()]
    return table(rows, ["gain", "group", "origin", *differ, "shots", "cells", *heads])


def gains(cells):
    """Gains -> Markdown: counts, and a table a target."""
    parts = ["### gain from scale: in how many cells (target x shots)\n", count_table(cells), ""]
    for panel in group(sorted(cells, key=results.target_order), "target").values():
        lines = group(panel, "line")
        names = differing(lines)
        rows = {
            line: [f"larger {line.kind}", line.source_domain or "none", *words(line, names)]
            for line in lines
        }
        unit = f"gain in {METRICS[panel[0].metric].axis.replace('%', 'points')}"
        parts += score_table(panel, unit, ["gain", "pre-trained on", *names], rows)
    return "\n".join([*parts, *seeds_note(cells), GAIN_RULE, "", RULE, ""])


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


def cell_row(cell):
    """Cell or Gain -> {column of a CSV: value}."""
    target = {"target": cell.target.name, "target_domain": cell.target.domain}
    row = {**vars(cell), **cell.line._asdict(), **target, "origin": cell.target.origin}
    return row | {"shots": cell.shots or "full"}


def csv_text(rows, columns):
    """Rows {column: value} -> CSV: fractions, undefined empty; without origin where all is one's
    own."""
    rows = [{key: "" if value != value else value for key, value in row.items()} for row in rows]
    needless = {"origin": all(row["origin"] == "own" for row in rows)}
    for head in ("pretraining", "pretraining_seeds", "seed_share"):
        needless[head] = not any(row.get(head) for row in rows)
    heads = [head for head in columns.split() if not needless.get(head)]
    file = io.StringIO()
    writer = csv.DictWriter(file, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def cell_csv(cells):
    columns = "target target_domain origin source source_domain model method recipe pretraining"
    return csv_text(map(cell_row, cells), f"{columns} shots metric mean sd ci95 n")


def gain_csv(gains):
    rows = []
    for gain in gains:
        about = {"partners": ";".join(gain.partners), "verdict": gain.verdict}
        several = gain.pretraining_seeds if len(gain.pretraining_seeds) > 1 else ()
        rows.append(cell_row(gain) | about | {"pretraining_seeds": ";".join(several)})
    columns = "kind target target_domain origin source_domain method recipe pretraining shots"
    columns += (
        " metric small large partners pretraining_seeds pairs mean sd ci95 seed_share n verdict"
    )
    return csv_text(rows, columns)


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
    columns = "kind method recipe origin target task source_domain target_domain shots seeds"
    return csv_text(rows, f"{columns} log10_distance exponent predicted reach")
