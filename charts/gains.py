"""Paired gains from scale, gain against distance of domains, agreement with published numbers, and
their tables. numpy alone: it draws nothing.
"""

import math

import numpy as np

from charts.results import (
    DISTANCES,
    DOMAINS,
    METRICS,
    RULE,
    TARGET,
    all_cells,
    chosen_metric,
    csv_rows,
    differing,
    escaped,
    group,
    plain_name,
    plain_text,
    shots_table,
    size_order,
    spread,
    t_quantile,
    table_text,
    target_heading,
    within_noise,
    words,
)

# ------------------------------------------------------------------------------------------------
# Gains from scale: paired differences
# ------------------------------------------------------------------------------------------------

# Kind of gain -> what differs between the two arms, what they share beside the seed, its words.
GAINS = {
    "network": ("model", "source", "larger network"),
    "source": ("source", "model", "larger source"),
}
PAIRED = (*TARGET, "source_domain", "method", "recipe", "shots")  # alike in both arms of a gain
GAIN_COLUMNS = ("kind", *PAIRED, "metric", "small", "large", "partners", "pairs", "mean", "sd")
GAIN_COLUMNS += ("ci95", "n", "verdict", "ci95_pairs", "ci95_normal")
VERDICTS = ("above", "unclear", "below", "no interval")
INTERVALS = {  # key of the half-width -> how it reads the differences of a cell
    "ci95": "Student t over seeds (means over the pairs of a seed)",
    "ci95_pairs": "Student t over all pairs",
    "ci95_normal": "1.96 standard errors over all pairs",
}
HEADS = {
    "above": "above zero",
    "unclear": "not off zero",
    "below": "below zero",
    "no interval": "no interval",
    "ci95_pairs": "t over pairs",
    "ci95_normal": "1.96 over pairs",
}
REGIMES = {  # name -> whether a number of shots (inf for full) falls in it
    "up to 10 shots": lambda shots: shots <= 10,
    "11 to 99 shots": lambda shots: 10 < shots < 100,
    "100 and more": lambda shots: 100 <= shots < math.inf,
    "full": lambda shots: shots == math.inf,
}


def regime(shots):
    """The regime of REGIMES of a number of shots (None: full)."""
    return next(name for name, holds in REGIMES.items() if holds(shots or math.inf))


def relation(cell):
    """How far a gain had to carry: within a domain, across domains, or without pre-training."""
    if cell["source_domain"] is None:
        return "no pre-training"
    return "within domain" if cell["source_domain"] == cell["target_domain"] else "across domains"


def arm_sizes(runs, kind):
    """{name of an arm: its size} from small to large: networks by the numbers in their names,
    sources by images (those of unknown size, and none at all, are no arms)."""
    if kind == "network":
        sizes = {run["model"]: size_order(run["model"])[0] for run in runs}
    else:
        pretrained = [run for run in runs if run["source_domain"] and run["source_images"]]
        sizes = {run["source"]: run["source_images"] for run in pretrained}
    return dict(sorted(sizes.items(), key=lambda item: (item[1], item[0])))


def widest(sizes, scores):
    """The two arms furthest apart in size among those that share the most partners: (small, large),
    or None. scores: {(arm, partner): {seed: score}}."""
    partners = {arm: {other for name, other in scores if name == arm} for arm in sizes}
    names = list(sizes)
    pairs = [
        (len(partners[small] & partners[large]), other - place, other, small, large)
        for place, small in enumerate(names)
        for other, large in enumerate(names)
        if sizes[small] < sizes[large] and partners[small] & partners[large]
    ]
    return max(pairs)[-2:] if pairs else None


def block(differences):
    """{partner: {seed: difference}} -> that part of it in which every partner has every seed and
    which holds the most pairs (then the most seeds): an average over partners of one seed would
    else shift where a partner lacks it."""
    sets = [frozenset(seeds) for seeds in differences.values()]
    sets.append(frozenset.intersection(*sets))

    def size(seeds):
        return len(seeds) * sum(seeds <= other for other in sets[:-1]), len(seeds)

    seeds = max(sets, key=size)
    return {
        partner: {seed: values[seed] for seed in sorted(seeds)}
        for partner, values in differences.items()
        if seeds <= set(values)
    }


def difference(scores, small, large):
    """Scores of the arms -> ({partner: {seed: large minus small}} of the seeds of both arms,
    [(arm that lacks them, partner, seeds)])."""
    differences, lacking = {}, []
    for partner in sorted({other for name, other in scores if name in (small, large)}):
        arms = {arm: scores.get((arm, partner), {}) for arm in (large, small)}
        both = sorted(set(arms[large]) & set(arms[small]))
        if arms[large] and arms[small]:
            for arm, other in ((large, small), (small, large)):
                gone = sorted(set(arms[other]) - set(arms[arm]))
                lacking += [(arm, partner, gone)] if gone else []
        if both:
            differences[partner] = {seed: arms[large][seed] - arms[small][seed] for seed in both}
    return differences, lacking


def gain_cell(kind, about, runs):
    """Runs alike in PAIRED -> (cell, notices), or (None, notices) where no runs can be paired.

    The differences are averaged over partners for each seed, and the interval is Student's t over
    seeds. The few-shot draw of a seed is common to all partners, so their differences are not
    independent; what is particular to a source cancels, as the same sources count in every seed.
    """
    arm, partner, _ = GAINS[kind]
    scores = {}
    for run in runs:
        if run[about["metric"]] is not None:
            key = run[arm], run[partner]
            scores.setdefault(key, {})[run["seed"]] = run[about["metric"]]
    arms = widest(arm_sizes(runs, kind), scores)
    differences, lacking = difference(scores, *arms) if arms else ({}, [])
    where = f"{about['target']}, {words(about['shots'])}, {GAINS[kind][2]}"
    notices = [
        f"{where}: {' with '.join((name, other))} lacks seed {', '.join(map(str, seeds))}"
        for name, other, seeds in lacking
    ]
    if not differences:
        return None, notices
    kept = block(differences)
    named = {seed for *_, seeds in lacking for seed in seeds}
    for name, seeds in differences.items():
        if gone := sorted(set(seeds) - set(kept.get(name, ())) - named):
            text = f"{where}: {name} counts without seed {', '.join(map(str, gone))}"
            notices.append(f"{text}, for want of it with another {partner}")
    table = np.array([list(seeds.values()) for seeds in kept.values()])  # partners x seeds
    pairs = spread(table.ravel())
    cell = {"kind": kind, **about, "small": arms[0], "large": arms[1], **spread(table.mean(0))}
    cell |= {"partners": tuple(kept), "pairs": pairs["n"], "ci95_pairs": pairs["ci95"]}
    cell["lacking"] = bool(notices)
    cell["by_partner"] = dict(zip(kept, table.mean(1).tolist()))
    cell["ci95_normal"] = 1.96 * pairs["sd"] / math.sqrt(pairs["n"])
    return {**cell, "verdict": verdict(cell, "ci95")}, notices


def verdict(cell, interval):
    """Where the interval of a gain lies: one of VERDICTS."""
    if math.isnan(cell["ci95"]):  # one seed: pairs of it alone say nothing of other seeds
        return "no interval"
    if abs(cell["mean"]) <= cell[interval]:
        return "unclear"
    return "above" if cell["mean"] > 0 else "below"


def gains(records, metric):
    """Records -> (gain cells, notices on seeds left out). Cells hold the keys of GAIN_COLUMNS and
    by_partner; they are sorted by kind, group and shots."""
    cells, notices = [], []
    for kind in GAINS:
        for key, runs in group(records, PAIRED).items():
            about = dict(zip(PAIRED, key))
            about["metric"] = chosen_metric(about, metric)
            cell, more = gain_cell(kind, about, runs)
            cells += [cell] if cell else []
            notices += more
    order = ("within domain", "across domains", "no pre-training")

    def place(cell):
        domains = cell["target_domain"] != "natural", DOMAINS.index(cell["source_domain"])
        rest = cell["shots"] or math.inf, cell["target"], cell["origin"], cell["method"]
        return list(GAINS).index(cell["kind"]), order.index(relation(cell)), domains, *rest

    return sorted(cells, key=lambda cell: (place(cell), cell["recipe"] or "")), notices


def gain_cells(records, metric):
    """The cells of `gains`."""
    return gains(records, metric)[0]


def counts(cells, interval="ci95"):
    """How many gains have their interval above zero, not off it, below it, or none: a dict."""
    found = [verdict(cell, interval) for cell in cells]
    return {name: found.count(name) for name in VERDICTS}


def group_words(cell):
    """The group of a gain in words: within domain, natural to natural."""
    if cell["source_domain"] is None:
        return f"no pre-training, on {cell['target_domain']}"
    return f"{relation(cell)}, {cell['source_domain']} to {cell['target_domain']}"


# ------------------------------------------------------------------------------------------------
# Distance of domains, and agreement with published numbers
# ------------------------------------------------------------------------------------------------

POINT_COLUMNS = ("kind", *TARGET, "source", "source_domain", "method", "recipe", "shots", "metric")
POINT_COLUMNS += ("gain", *DISTANCES)
DISTANCE_NAMES = {"frechet_relative": "log10 of relative Fréchet distance", "energy": "energy"}
AGREE = {True: "yes", False: "no", None: "no interval"}
DISTANCE_RULE = """\
Gain in fractions (accuracy, mean AUC or mean average precision from 0 to 1). Line and slope: \
ordinary least squares, 95 % confidence by Student's t over points; points that share a target, \
source or seed are not independent, so the true uncertainty is larger."""
SHARED_RULE = """\
Cells with the same target, source, network and shots, fine-tuned; packs count as what they hold \
(nih@256 as nih). They agree where the means lie no further apart than √(a² + b²), a and b being \
the half-widths of the two 95 % intervals (Student t over seeds)."""


def axis_points(points, kind, distance):
    """Points of a kind -> (x, y): the distance (Fréchet as its log10) and the gain, where known."""
    log = distance == "frechet_relative"
    known = [p for p in points if p["kind"] == kind and p[distance] > (0 if log else -math.inf)]
    x = [math.log10(p[distance]) if log else p[distance] for p in known]
    return x, [p["gain"] for p in known]


def distance_points(records, metric):
    """Records -> points of gain against distance: of each source for the network gain, of each
    pair of sources for the source gain (with the mean distance of the runs that it pairs)."""
    keys = ("origin", "target", "source", "model")
    known = group(records, keys)
    points = []
    for cell in gain_cells(records, metric):
        arms = [cell["small"], cell["large"]]
        units = [(f"{arms[0]} to {arms[1]}", arms, cell["partners"], cell["mean"])]
        if cell["kind"] == "network":
            units = [(name, [name], arms, gain) for name, gain in cell["by_partner"].items()]
        for name, sources, models, gain in units:
            runs = [
                run
                for source in sources
                for model in models
                for run in known[cell["origin"], cell["target"], source, model]
            ]
            values = {key: [r[key] for r in runs if r[key] is not None] for key in DISTANCES}
            means = {key: float(np.mean(v)) if v else math.nan for key, v in values.items()}
            if any(values.values()):
                points.append({**cell, "source": name, "last": sources[-1], "gain": gain, **means})
    return points


def fit(x, y):
    """Ordinary least squares of y on x, (N,) each -> dict of slope, its ci95 (Student t, N - 2),
    grid (100,), line (100,), band (100,) half-width of the 95 % confidence band of the line; None
    where fewer than three points or one x leave nothing to estimate."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n, spread_x = len(x), float(np.sum((x - x.mean()) ** 2)) if len(x) else 0.0
    if n < 3 or spread_x == 0:
        return None
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread_x)
    residual = y - y.mean() - slope * (x - x.mean())
    t, sigma = t_quantile(n - 2), math.sqrt(np.sum(residual**2) / (n - 2))
    grid = np.linspace(x.min(), x.max(), 100)
    band = t * sigma * np.sqrt(1 / n + (grid - x.mean()) ** 2 / spread_x)
    line = y.mean() + slope * (grid - x.mean())
    ci95 = t * sigma / math.sqrt(spread_x)
    return {"slope": slope, "ci95": ci95, "n": n, "grid": grid, "line": line, "band": band}


def shared_cells(records, metric):
    """Own fine-tuned cells that are published too -> list of {own, published, agree}; agree is None
    where one of them has no interval."""
    keys = ("target", "source", "model", "method", "shots")
    cells = [cell for cell in all_cells(records, metric) if cell["n"]]

    def key(cell):
        return tuple(plain_name(cell[k]) if k in keys[:2] else cell[k] for k in keys)

    published = {key(cell): cell for cell in cells if cell["origin"] == "published"}
    shared = []
    for own in cells:
        other = published.get(key(own))
        if own["origin"] == "own" and other:
            agree = within_noise(own, other) if own["n"] > 1 and other["n"] > 1 else None
            shared.append({"own": own, "published": other, "agree": agree})
    return shared


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

GAIN_RULE = """\
Gain: the larger arm minus the smaller one, run by run: same target, shots, seed, method, recipe, \
and same source (larger network) or network (larger source, of one domain). The arms are the \
largest and the smallest of those that share the most such partners. Each seed's differences are \
averaged over partners; the 95 % interval is Student's t over seeds, about these sources and \
networks: the draw of a seed is common to its pairs, so pairs do not count as independent. ▲ \
interval above zero, ▼ below zero, neither: not off zero, or one seed and no interval. A seed that \
one arm lacks counts in neither."""


def count_rows(cells):
    """Gain cells -> rows of counts: a dict for each kind, group and regime, and one for all shots.
    The last two keys count above / not off / below zero by the other INTERVALS."""
    keys = ("kind", "origin", "source_domain", "target_domain", "method", "recipe")
    rows = []
    for members in group(cells, keys).values():
        regimes = {name: [c for c in members if regime(c["shots"]) == name] for name in REGIMES}
        for name, part in {**regimes, "all": members}.items():
            if not part:
                continue
            row = {"gain": GAINS[part[0]["kind"]][2], "group": group_words(part[0])}
            row |= {key: part[0][key] for key in ("origin", "method", "recipe")}
            row |= {"shots": name, "cells": len(part), **counts(part)}
            for interval in list(INTERVALS)[1:]:
                row[interval] = "/".join(str(n) for n in list(counts(part, interval).values())[:3])
            rows.append(row)
    return rows


def count_table(cells):
    """Gain cells -> lines of the table of counts."""
    rows = count_rows(cells)
    names = ["gain", "group", *(["origin"] if len(group(rows, ("origin",))) > 1 else [])]
    names += [*differing(cells), "shots", "cells", *VERDICTS, *list(INTERVALS)[1:]]
    if not any(row["no interval"] for row in rows):
        names.remove("no interval")
    body = [[escaped(str(row[name])) for name in names] for row in rows]
    return table_text([[HEADS.get(name, name) for name in names], *body])


def flip_table(cells):
    """Gain cells -> lines of the table of those that another of INTERVALS judges otherwise."""
    rows = [["gain", "group", "target", "shots", "mean", *INTERVALS.values()]]
    for cell in cells:
        if len({verdict(cell, interval) for interval in INTERVALS}) == 1:
            continue
        _, factor, decimals = METRICS[cell["metric"]]
        row = [GAINS[cell["kind"]][2], group_words(cell), cell["target"], words(cell["shots"])]
        row.append(f"{factor * cell['mean']:+.{decimals + 1}f}")
        for interval in INTERVALS:
            half = f"± {factor * cell[interval]:.{decimals + 1}f}"
            row.append(f"{half}, {HEADS[verdict(cell, interval)]}")
        rows.append([*map(escaped, row)])
    return table_text(rows) if len(rows) > 1 else ["None."]


def gain_table(cells):
    """Gain cells of one target -> lines of a table: a row a kind and domain, a column a shot."""
    names = differing(cells)

    def head(cell):
        about = {"gain": GAINS[cell["kind"]][2], "pre-trained on": cell["source_domain"] or "none"}
        return {**about, **{name: cell[name] for name in names}}

    return shots_table(cells, ("kind", "source_domain", "method", "recipe"), head)


def gain_markdown(cells):
    """Gain cells -> Markdown: counts, where another interval says otherwise, a table a target."""
    parts = ["### gain from scale: in how many cells (target x shots)\n", *count_table(cells)]
    other = "; ".join(list(INTERVALS.values())[1:])
    parts.append(f"\nThe last two columns, above/not off/below zero by other intervals: {other}.\n")
    parts += ["### cells in which the interval decides\n", *flip_table(cells), ""]
    panels = group(cells, TARGET)
    for target in sorted(panels, key=lambda key: (key[1] != "natural", key)):
        unit = METRICS[panels[target][0]["metric"]][0].replace("(%)", "(points)")
        parts += [
            f"### {target_heading(target)}: gain in {unit}\n",
            *gain_table(panels[target]),
            "",
        ]
    return "\n".join([*parts, GAIN_RULE, "", RULE, ""])


def distance_markdown(points):
    """Points of gain against distance -> Markdown: the slopes, then a row a point."""
    rows = [["gain", "distance", "points", "slope", "95 % interval"]]
    for kind in GAINS:
        for distance in DISTANCES:
            line = fit(*axis_points(points, kind, distance))
            if line:
                half = f"± {line['ci95']:.3f}"
                name = DISTANCE_NAMES[distance]
                rows.append([GAINS[kind][2], name, str(line["n"]), f"{line['slope']:+.3f}", half])
    parts = ["### gain against domain distance: fitted slopes\n", *table_text(rows), ""]
    heads = ("target", "source", "shots", "metric", "gain", *DISTANCES)
    rows = [["gain of", *heads]]
    for point in points:
        numbers = [f"{point['gain']:+.3f}", *(f"{point[key]:.3g}" for key in DISTANCES)]
        about = [GAINS[point["kind"]][2], point["target"], point["source"], words(point["shots"])]
        rows.append([*map(escaped, [*about, point["metric"]]), *numbers])
    return "\n".join([*parts, "### points\n", *table_text(rows), "", DISTANCE_RULE, ""])


def shared_markdown(shared):
    """Cells of `shared_cells` -> Markdown: a row a cell."""
    rows = [["target", "source", "model", "recipe", "shots", "own", "published", "agree"]]
    for pair in shared:
        own = pair["own"]
        row = [own["target"], own["source"], own["model"], own["recipe"], words(own["shots"])]
        texts = [plain_text(own), plain_text(pair["published"]), AGREE[pair["agree"]]]
        rows.append([*map(escaped, row), *texts])
    return "\n".join(["### own against published\n", *table_text(rows), "", SHARED_RULE, ""])


def shared_rows(shared):
    """Cells of `shared_cells` -> rows for `write_csv`."""
    about = ("target", "source", "model", "recipe", "shots", "metric")
    rows = []
    for pair in shared:
        row = {key: pair["own"][key] for key in about}
        row["shots"] = row["shots"] or "full"
        for origin in ("own", "published"):
            row |= {f"{key}_{origin}": pair[origin][key] for key in ("mean", "sd", "ci95", "n")}
        rows.append({**row, "agree": AGREE[pair["agree"]]})
    return rows


def gain_rows(cells):
    """Gain cells -> rows for `write_csv`."""
    return csv_rows(cells, GAIN_COLUMNS)


def point_rows(points):
    """Points of gain against distance -> rows for `write_csv`."""
    return csv_rows(points, POINT_COLUMNS)
