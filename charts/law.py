"""The law of transfer: what a decade of scale buys, against the distance of source and target, and
how well that predicts tasks that it has not seen.

Error: 1 - metric, its mean over few-shot seeds, at least half a test image. Exponent: decades of
error that a decade of scale (parameters, or images of the source) takes off. Of a family f (domain
of the source, of the target), with s = log10(images a class / 10) and d = log10 of the relative
Fréchet distance, by ordinary least squares:

    B0   a + b s                           neither relation nor distance
    B1   a_f + b_f s                       no distance
    law  a_f + b_f s + (c + e s) d

Targets of one task (gaps of the same classes) are not independent: intervals leave out whole tasks.
Arrays y may be (N,), or (N, draws) for simulations.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from charts import results
from charts.gains import KINDS, REGIMES, regime, widest
from charts.results import Target, group, spread, t_quantile
from engine.console import MAIN_METRIC

PARAMETERS = {  # of the networks, without a head
    "R14x0.25": 504_464,
    "R14x0.5": 2_007_328,
    "R26x0.5": 3_492_768,
    "R26x1": 13_938_496,
    "R50x1": 23_500_352,
    "R50x3": 211_174_080,
    "R101x1": 42_492_480,
    "R101x3": 381_789_888,
    "R152x2": 232_238_208,
    "R152x4": 928_340_224,
}
PERMUTATIONS = 999
NOTE = """\
Exponent: decades of error (1 - accuracy, 1 - mean AUC; of the mean over seeds) that ten times the \
parameters, or images of the source, take off; 0.3 halves it. Mean over networks or sources and \
pre-training seeds."""
RELATION_NOTE = "By relation: mean over tasks with its 95 % interval (Student t over tasks)."
FIT_NOTE = """\
Law: exponent = a + b s + (c + e s) d; s = log10(images a class / 10), d = log10 of the relative \
Fréchet distance, a and b of each relation; 95 % intervals by leaving out tasks and pre-training \
seeds, of a task left out by leaving out two. B0: a + b s of all; B1: no distance; p: of distances \
traded at random within tasks."""
FEWEST = 4  # tasks of a fit: predicting one leaves out two


class Row(NamedTuple):
    """The exponent of one target, family and number of shots; s and d: nan where unknown."""

    target: Target
    task: str  # the target without its gap
    family: tuple  # domain of the source, of the target
    shots: int | None
    by_seed: dict  # pre-training, as of Line -> exponent, mean over partners
    s: float
    d: float

    @property
    def exponent(self):
        return float(np.mean(list(self.by_seed.values())))


class Law(NamedTuple):
    """A fit: arrays go with rows or with terms, nan where too few tasks carry them. None of it from
    terms on where there are fewer than FEWEST tasks of known distance."""

    about: tuple  # kind of KINDS, method, recipe, origin
    rows: list
    tasks: int
    terms: list = ()  # (letter, family or None)
    coefficients: np.ndarray = None
    ci95: np.ndarray = None  # half-widths of the coefficients' intervals
    changes: np.ndarray = None  # (units, terms): of the coefficients, without a task, or a seed
    seed_share: float = math.nan  # of these in the variance of fitted values, median over rows
    predicted: np.ndarray = None  # rows, by a fit without their task
    reach: np.ndarray = None  # half-widths of the intervals of predicted
    coverage: float = math.nan  # share of rows within reach
    rmse: dict = None  # B0, B1, law -> of left-out tasks
    p: float = math.nan  # of the distances, by permutation
    left_out: tuple = ()  # names of targets of which the distance or the images a class are unknown


def laws(runs, metric):
    """Results -> list of Law, of each kind, method, recipe and origin. The arms are as in
    gains.widest; a partner's errors are of the transfer seeds that both have."""
    distances, found = {}, {}  # (target, domain of the source) -> network -> log10
    for run in runs:
        if run.distance and run.distance > 0:
            networks = distances.setdefault((run.target, run.line.source_domain), {})
            networks[run.line] = math.log10(run.distance)  # of each of its runs the same
    alike = "target", "shots", "line.source_domain", "line.method", "line.recipe"
    for (target, shots, domain, *about), members in group(runs, *alike).items():
        task = re.sub(r"~[\d.]+", "", results.plain_name(target.name))
        first, networks = members[0], distances.get((target, domain), {})
        a_class = shots or (first.train_images or math.nan) / (first.classes or math.nan)
        decades = math.log10(a_class / 10), float(np.mean([*networks.values()] or [math.nan]))
        floor = 0.5 / (first.test_images or 1e9)
        name = MAIN_METRIC[target.domain] if metric == "auto" else metric
        known = [run for run in members if run.line.model in PARAMETERS]
        images = {run.line.source: run.source_images for run in members}
        for kind in KINDS if domain else ():
            arms, by_seed = widest(kind, known, name), {}
            if not arms:
                continue
            small, large = ((PARAMETERS if kind == "network" else images)[arm] for arm in arms)
            first_arm, second_arm = arms.values()
            for partner in filter(second_arm.get, first_arm):
                both = first_arm[partner], second_arm[partner]
                if seeds := both[0].keys() & both[1].keys():
                    low, high = (max(np.mean([1 - arm[s] for s in seeds]), floor) for arm in both)
                    exponent = math.log10(low / high) / math.log10(large / small)
                    by_seed.setdefault(partner[1] or "", []).append(exponent)
            by_seed = {seed: float(np.mean(values)) for seed, values in by_seed.items()}
            if by_seed:
                row = Row(target, task, (domain, target.domain), shots, by_seed, *decades)
                found.setdefault((kind, *about, target.origin), []).append(row)
    return [law(about, found[about]) for about in sorted(found, key=str)]


def relations(rows):
    """Rows -> {(family, regime of shots): spread over tasks of their mean exponents}."""
    found = {}
    for family, members in sorted(group(rows, "family").items(), reverse=True):
        for name in REGIMES:
            part = [row for row in members if regime(row.shots) == name]
            tasks = group(part, "task").values()
            if part:
                means = [np.mean([row.exponent for row in task]) for task in tasks]
                found[family, name] = spread(means)
    return found


def design(rows, relation=True, distance=True):
    """Rows -> (terms [(letter, family)], matrix (N, terms)). One number of shots tells nothing of
    more: no b and no e then."""
    s, d = np.array([(row.s, row.d) for row in rows]).T
    columns = {}
    for family in sorted({row.family for row in rows}) if relation else [None]:
        among = np.array([family in (None, row.family) for row in rows], float)
        columns |= {("a", family): among, ("b", family): among * s}
    columns |= {("c", None): d, ("e", None): d * s} if distance else {}
    terms = [term for term in columns if np.ptp(s) > 0 or term[0] in "ac"]
    return terms, np.stack([columns[term] for term in terms], 1)


def solve(x, y):
    """Least squares of y (N[, draws]) on x (N, terms): (terms[, draws]). The ridge, far below what
    counts, makes terms of absent families 0."""
    return np.linalg.solve(x.T @ x + 1e-9 * np.eye(x.shape[1]), x.T @ y)


def half_width(changes, contrast, terms, rows):
    """Of the 95 % interval of a contrast (terms,) of the coefficients, from their changes (units,
    terms[, draws]) without each task: t times the root of their sum of squares; t of tasks - 2, or,
    of a family that fewer tasks carry, of those - 1."""
    carriers = [len({row.task for row in rows}) - 1]
    for (_, family), weight in zip(terms, contrast):
        if family and weight:
            carriers.append(len({row.task for row in rows if row.family == family}))
    moved = np.sqrt(np.sum(np.tensordot(changes, contrast, (1, 0)) ** 2, 0))
    return moved * (t_quantile(min(carriers) - 1) if min(carriers) > 1 else math.nan)


def predict_tasks(x, y, tasks):
    """Each task by a fit of the others: (N[, draws]); nan where the others have nothing of a term,
    as of a new family."""
    predicted = np.empty_like(y)
    for task in np.unique(tasks):
        own, others = tasks == task, tasks != task
        predicted[own] = x[own] @ solve(x[others], y[others])
        predicted[own & (x[:, ~x[others].any(0)] != 0).any(1)] = math.nan
    return predicted


def prediction_reach(x, y, tasks):
    """Half-widths of the 95 % intervals of predict_tasks: of task k t(K - 2) times the root of the
    mean, over the others, of the squared error of each as predicted without it and without k."""
    reach, names = np.empty_like(y), np.unique(tasks)
    for k in names:
        rest = tasks != k
        errors = (predict_tasks(x[rest], y[rest], tasks[rest]) - y[rest]) ** 2
        parts = [errors[tasks[rest] == j] for j in names[names != k]]
        means = [np.nanmean(part, 0) for part in parts if not np.isnan(part).all()]
        reach[~rest] = t_quantile(len(names) - 2) * np.sqrt(np.mean(means, 0))
    return reach


def trading(rows):
    """Which targets may trade their distances: lists of those of a task; targets that are alone in
    theirs trade with each other. In a list all are in the same families."""
    lists = {}
    for task, members in group(rows, "task").items():
        targets = group(members, "target")
        for target, part in targets.items():
            key = frozenset(row.family for row in part), task if len(targets) > 1 else None
            lists.setdefault(key, []).append(target)
    return list(lists.values())


def permutation_p(rows, y, draws=PERMUTATIONS):
    """How often distances traded at random, in all families alike (or the observed ones) predict
    left-out tasks as well as the observed ones: fractions ([draws of y,])."""
    (terms, x), rng = design(rows), np.random.default_rng(0)
    _, tasks = np.unique([row.task for row in rows], return_inverse=True)
    d, s = {(row.target, row.family): row.d for row in rows}, np.array([row.s for row in rows])
    errors, lists = [np.nansum((predict_tasks(x, y, tasks) - y) ** 2, 0)], trading(rows)
    for _ in range(draws):
        given = {}
        for targets in lists:
            given |= zip(targets, (targets[place] for place in rng.permutation(len(targets))))
        traded = np.array([d[given[row.target], row.family] for row in rows])
        columns = {"c": traded, "e": traded * s}
        x = np.stack([columns.get(letter, x[:, i]) for i, (letter, _) in enumerate(terms)], 1)
        errors.append(np.nansum((predict_tasks(x, y, tasks) - y) ** 2, 0))
    return np.mean(np.array(errors) <= errors[0] * (1 + 1e-9), 0)


def law(about, rows):
    """Rows of one kind, method, recipe and origin -> Law.

    Pre-training seeds are a second level of its intervals, beside tasks: their networks are common
    to all tasks, so that leaving out tasks does not show them.
    """
    known = [row for row in rows if not math.isnan(row.s + row.d)]
    names, tasks = np.unique([row.task for row in known], return_inverse=True)
    if len(names) < FEWEST:
        return Law(about, rows, len({row.task for row in rows}))
    y, (terms, x) = np.array([row.exponent for row in known]), design(known)
    coefficients, seeds = solve(x, y), {seed for row in known for seed in row.by_seed}
    without = [solve(x[tasks != task], y[tasks != task]) for task in range(len(names))]
    for seed in sorted(seeds) if len(seeds) > 1 else ():
        others = [[value for key, value in row.by_seed.items() if key != seed] for row in known]
        others = [np.mean(rest or [*row.by_seed.values()]) for rest, row in zip(others, known)]
        without.append(solve(x, np.array(others)))
    changes, share = np.array(without) - coefficients, math.nan
    if len(changes) > len(names):
        moved = (changes @ x.T) ** 2  # of each fitted value
        share = float(np.median(moved[len(names) :].sum(0) / np.maximum(moved.sum(0), 1e-300)))
    ci95 = np.array([half_width(changes, one, terms, known) for one in np.eye(len(terms))])
    parts = {"B0": (False, False), "B1": (True, False), "law": (True, True)}
    guesses = {k: predict_tasks(design(known, *part)[1], y, tasks) for k, part in parts.items()}
    predicted, reach = guesses["law"], prediction_reach(x, y, tasks)
    seen = ~np.isnan(predicted)
    rmse = {k: math.sqrt(np.mean((guess - y)[seen] ** 2)) for k, guess in guesses.items()}
    coverage = np.mean(np.abs(predicted - y)[seen] <= reach[seen])
    fitted = coefficients, ci95, changes, share, predicted, reach, coverage, rmse
    left_out = tuple(dict.fromkeys(row.target.name for row in rows if math.isnan(row.s + row.d)))
    return Law(about, known, len(names), terms, *fitted, permutation_p(known, y), left_out)
