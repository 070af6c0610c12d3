"""Markdown tables and CSV of the numbers of each figure."""

import csv
import io
import math
from operator import attrgetter

from charts import results
from charts.gains import REGIMES, VERDICTS, counts, regime
from charts.law import FIT_NOTE, NOTE, RELATION_NOTE, relations
from charts.results import METRICS, group, mark, shots_words

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


def score_table(cells, heads, words):
    """Cells or gains -> lines of a table: a row for each of their lines, of words(line) under the
    heads and of scores, bold as RULE says; a column for each number of shots."""
    shots = sorted({cell.shots for cell in cells}, key=lambda shot: shot or math.inf)
    members = group(cells, "shots")
    columns = {shot: shots_words(shot) for shot in shots}
    rows = {line: [*words(line)] for line in group(cells, "line")}
    for key in columns:
        known = [cell for cell in members[key] if cell.n]
        best = max(known, key=lambda cell: cell.mean, default=None)
        texts = {cell.line: "undefined (0)" for cell in members[key]}
        for cell in known:
            verdict = getattr(cell, "verdict", None)  # of gains
            bold = "**" if len(known) > 1 and results.within_noise(best, cell) else ""
            texts[cell.line] = f"{bold}{score(cell, '+' if verdict else '')}{bold}"
            texts[cell.line] += {"above": " ▲", "below": " ▼"}.get(verdict, "")
        for line, row in rows.items():
            row.append(texts.get(line))
    return table([[*heads, *columns.values()], *rows.values()])


def target_heading(target):
    """The heading of a target's table."""
    return f"### {target.name} ({target.domain} target{mark(target.origin)})"


def few_shot(cells):
    """Cells -> Markdown: a table a target, rows source x model, columns shots."""
    parts = []
    for target, panel in group(cells, "target").items():
        names = ["source", "model", *results.differing(panel)]
        lines = score_table(panel, names, attrgetter(*names))
        parts += [f"{target_heading(target)}: {METRICS[panel[0].metric].axis}\n", *lines, ""]
    return "\n".join([*parts, RULE, ""])


def count_table(gains):
    """Gains -> lines of the table of verdicts: a row for each kind, group and regime of shots."""
    differ = results.differing(gains)
    rows = [["gain", "group", "origin", *differ, "shots", "cells", *VERDICTS.values()]]
    for members in group(gains, "line", "target.domain", "target.origin").values():
        first = members[0]
        about = [f"larger {first.line.kind}", first.group, first.target.origin]
        about += [getattr(first.line, key) for key in differ]
        for name in (*REGIMES, "all"):
            part = [gain for gain in members if name in (regime(gain.shots), "all")]
            row = [*about, name, len(part), *counts(part).values()]
            rows += [row] if part else []
    return table(rows)


def gains(cells):
    """Gains -> Markdown: counts, and a table a target."""
    parts = ["### gain from scale: in how many cells (target x shots)\n", *count_table(cells)]
    parts.append("")
    panels = group(sorted(cells, key=results.target_order), "target")
    for target, panel in panels.items():
        names = results.differing(panel)

        def words(line, names=names):
            differ = [getattr(line, name) for name in names]
            return f"larger {line.kind}", line.source_domain or "none", *differ

        lines = score_table(panel, ["gain", "pre-trained on", *names], words)
        unit = METRICS[panel[0].metric].gain
        parts += [f"{target_heading(target)}: gain in {unit}\n", *lines, ""]
    return "\n".join([*parts, GAIN_RULE, "", RULE, ""])


def laws(found):
    """Laws -> Markdown: of each the exponents by relation, the coefficients and their test."""
    parts = []
    for law in found:
        kind, *about, origin = law.about
        words = ", ".join([f"larger {kind}", *filter(None, about)])
        rows = [["pre-trained on → target", "shots", "exponent", "tasks"]]
        for (family, name), cell in relations(law.rows).items():
            half = "–" if cell["n"] == 1 else f"{cell['ci95']:.3f}"
            rows.append([" → ".join(family), name, f"{cell['mean']:+.3f} ± {half}", cell["n"]])
        parts += [f"### {words}{mark(origin)}: exponents\n", *table(rows), ""]
        if not law.terms:
            parts += ["No law: fewer than four tasks of known distance.", ""]
            continue
        rows = [["coefficient", "pre-trained on → target", "estimate", "95 % interval"]]
        for (letter, family), value, half in zip(law.terms, law.coefficients, law.ci95):
            rows.append([letter, " → ".join(family or ["all"]), f"{value:+.3f}", f"± {half:.3f}"])
        parts += ["### its coefficients\n", *table(rows), ""]
        rows = [["tasks", "cells", "RMSE B0", "B1", "law", "law/B0", "law/B1", "p"]]
        rows[0] += ["in their interval", "variance by pre-training seeds"]
        b0, b1, own = law.rmse.values()
        row = [*(f"{value:.3f}" for value in (b0, b1, own, own / b0, own / b1, law.p))]
        shares = law.coverage, law.seed_share
        row += [None if math.isnan(share) else f"{100 * share:.0f} %" for share in shares]
        rows.append([len(law.tasks), len(law.rows), *row])
        parts += ["### tasks left out\n", *table(rows), ""]
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
    needless |= {"pretraining": not any(row.get("pretraining") for row in rows)}
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
    rows = [
        {**cell_row(gain), "partners": ";".join(gain.by_partner), "verdict": gain.verdict}
        for gain in gains
    ]
    columns = "kind target target_domain origin source_domain method recipe pretraining shots"
    columns += " metric small large partners pairs mean sd ci95 n verdict"
    return csv_text(rows, columns)


def law_csv(found):
    rows = []
    for law in found:
        about = dict(zip(("kind", "method", "recipe", "origin"), law.about))
        for place, row in enumerate(law.rows):
            more = {"target": row.target.name, "task": row.task, "source_domain": row.family[0]}
            more |= {"target_domain": row.family[1], "shots": row.shots or "full"}
            more |= {"log10_distance": row.d, "exponent": row.exponent, "seeds": len(row.by_seed)}
            if law.terms:
                more |= {"predicted": law.predicted[place], "reach": law.reach[place]}
            rows.append({**about, **more})
    columns = "kind method recipe origin target task source_domain target_domain shots seeds"
    return csv_text(rows, f"{columns} log10_distance exponent predicted reach")
