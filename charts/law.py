"""The law of transfer: what a decade of scale buys, against the distance of source and target, and
how well that predicts tasks that it has not seen.

Error: 1 - metric, its mean over few-shot seeds, at least half a test image. Exponent: decades of
error that a decade of scale (parameters, or images of the source) takes off. Of a family f (domain
of the source -> of the target), with s = log10(images a class / 10) and d = log10 of the relative
Fréchet distance, the law is

    exponent = a_f + b_f s + (c + e s) d

by ordinary least squares; beside it B0, which knows neither family nor distance, and B1, which
knows no distance. Targets of one task (gaps of the same classes) are not independent: intervals
leave out task by task.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from charts import results
from charts.gains import KINDS, widest
from charts.results import Target, group, t_quantile
from engine.console import MAIN_METRIC

PARAMETERS = {  # of models.MODELS, without a head
    "R14x0.5": 2_006_304,
    "R26x0.5": 3_491_744,
    "R26x1": 13_938_496,
    "R50x1": 23_500_352,
    "R50x3": 211_174_080,
    "R101x1": 42_492_480,
    "R101x3": 381_789_888,
    "R152x2": 232_238_144,
    "R152x4": 928_340_224,
}
PERMUTATIONS = 999
BASELINES = {"B0": (False, False), "B1": (True, False), "law": (True, True)}  # relation, distance


class Row(NamedTuple):
    """The exponent of one target, family and number of shots. decades: log10(images a class / 10)
    and log10 of the distance; nan where unknown."""

    target: Target
    task: str  # the target without its gap
    family: tuple  # domain of the source, of the target
    shots: int | None
    arms: tuple  # small, large
    by_seed: dict  # pre-training seed -> exponent, mean over partners
    shot_decades: float
    distance_decades: float

    @property
    def exponent(self):
        return float(np.mean(list(self.by_seed.values())))


class Law(NamedTuple):
    """What the rows of one kind, method and recipe say. Arrays go with rows or terms; nan where
    there are too few tasks. predicted, reach: of each row by a fit without its task, and half-width
    of its 95 % interval. seed_share: of the variances of all terms, by pre-training seeds."""

    kind: str  # of KINDS
    method: str
    recipe: str | None
    origin: str
    rows: list
    terms: list  # (letter, family or None)
    coefficients: np.ndarray
    ci95: np.ndarray  # half-widths
    seed_share: float
    predicted: np.ndarray
    reach: np.ndarray
    rmse: dict  # of BASELINES, of left-out tasks
    p: float  # of the distances, by permutation
    changes: np.ndarray  # of the coefficients, without each task and each pre-training seed

    @property
    def tasks(self):
        return sorted({row.task for row in self.rows})

    @property
    def coverage(self):
        """Share of rows whose interval holds what was observed."""
        errors = np.abs(self.predicted - [row.exponent for row in self.rows])
        known = ~np.isnan(errors + self.reach)
        return float((errors <= self.reach)[known].mean()) if known.any() else math.nan


def distances(runs):
    """Results -> {(target, domain of the source): mean of log10 distance over networks}."""
    found = {}
    for run in runs:
        value = run.distances["frechet_relative"]
        if value is not None and value > 0:
            networks = found.setdefault((run.target, run.line.source_domain), {})
            networks[run.line] = math.log10(value)  # of every run the same
    return {key: float(np.mean(list(networks.values()))) for key, networks in found.items()}


def exponent_rows(kind, runs, metric, distance):
    """Results of one target, family and number of shots -> [Row], [] where no arms can be paired.

    Arms are the furthest apart that share the most partners, a partner being what else pre-training
    was, its seed included; of these the seeds of transfer that both arms have."""
    differing, sharing = KINDS[kind]
    first, errors = runs[0], {}  # arm -> partner -> seed -> error
    name = MAIN_METRIC[first.target.domain] if metric == "auto" else metric
    for run in runs:
        if run.metrics[name] is not None and run.line.model in PARAMETERS:
            partner = getattr(run.line, sharing), run.source_seed
            partners = errors.setdefault(getattr(run.line, differing), {})
            partners.setdefault(partner, {})[run.seed] = 1 - run.metrics[name]
    arms = widest(runs, differing, errors)
    if arms is None:
        return []
    scales = {run.line.source: run.source_images for run in runs}
    small, large = (PARAMETERS[arm] if kind == "network" else scales[arm] for arm in arms)
    floor = 0.5 / first.test_images if first.test_images else 1e-9
    by_seed = {}
    for partner in errors[arms[0]].keys() & errors[arms[1]].keys():
        both = [errors[arm][partner] for arm in arms]
        seeds = both[0].keys() & both[1].keys()
        if seeds:
            low, high = (max(np.mean([arm[seed] for seed in seeds]), floor) for arm in both)
            exponent = (math.log10(low) - math.log10(high)) / math.log10(large / small)
            by_seed.setdefault(partner[1], []).append(exponent)
    if not by_seed:
        return []
    a_class = first.shots
    if a_class is None:
        a_class = (first.train_images or math.nan) / (first.classes or math.nan)
    task = re.sub(r"~[\d.]+", "", results.plain_name(first.target.name))
    family = first.line.source_domain, first.target.domain
    means = {seed: float(np.mean(values)) for seed, values in by_seed.items()}
    decades = math.log10(a_class / 10), distance
    return [Row(first.target, task, family, first.shots, arms, means, *decades)]


def laws(runs, metric):
    """Results -> list of Law, of each kind, origin, method and recipe."""
    known, found = distances(runs), {}
    alike = "target", "shots", "line.source_domain", "line.method", "line.recipe"
    for (target, _, domain, method, recipe), members in group(runs, *alike).items():
        if domain is not None:
            for kind in KINDS:
                distance = known.get((target, domain), math.nan)
                key = kind, method, recipe, target.origin
                rows = exponent_rows(kind, members, metric, distance)
                found.setdefault(key, []).extend(rows)
    order = sorted(found, key=lambda key: (key[3], *map(str, key[1:3]), list(KINDS).index(key[0])))
    return [law(*key, found[key]) for key in order if found[key]]


# ------------------------------------------------------------------------------------------------
# Fits
# ------------------------------------------------------------------------------------------------


def design(rows, relation=True, distance=True):
    """Rows -> (terms [(letter, family)], matrix (N, terms)). Without two numbers of shots there are
    no terms of shots."""
    s = np.array([row.shot_decades for row in rows])
    d = np.array([row.distance_decades for row in rows])
    columns = {}
    for family in sorted({row.family for row in rows}) if relation else [None]:
        among = np.array([family in (None, row.family) for row in rows], float)
        columns |= {("a", family): among, ("b", family): among * s}
    columns |= {("c", None): d, ("e", None): d * s} if distance else {}
    if np.ptp(s) == 0:
        columns = {term: column for term, column in columns.items() if term[0] in "ac"}
    return list(columns), np.stack(list(columns.values()), 1)


def solve(x, y):
    """Least squares of y (N,) or (N, draws) on x (N, terms): (terms,) or (terms, draws)."""
    return np.linalg.lstsq(x, y, rcond=None)[0]


def changes_without(x, y, tasks):
    """What leaving out each task changes in the coefficients: (K, terms[, draws]). tasks: (N,)."""
    whole = solve(x, y)
    return np.stack([solve(x[tasks != k], y[tasks != k]) - whole for k in np.unique(tasks)])


def without_seed(rows, seed):
    """Exponents (N,) of the other pre-training seeds, of all where there is no other."""
    means = []
    for row in rows:
        others = [value for other, value in row.by_seed.items() if other != seed]
        means.append(np.mean(others) if others else row.exponent)
    return np.array(means)


def degrees(terms, contrast, rows):
    """Degrees of freedom of a contrast (terms,) of the coefficients: tasks - 2, or, of a family
    that fewer tasks carry, those - 1."""
    tasks = len({row.task for row in rows})
    carriers = [tasks - 1]
    for (_, family), weight in zip(terms, contrast):
        if family and weight:
            carriers.append(len({row.task for row in rows if row.family == family}))
    return min(carriers) - 1


def half_width(changes, contrast, freedom):
    """Of the 95 % interval of a contrast (terms,) of the coefficients, from their changes (K,
    terms[, draws]) without each unit: t times the root of their sum of squares."""
    if freedom < 1:
        return np.full(changes.shape[2:], math.nan)
    moved = np.tensordot(changes, contrast, (1, 0))
    return t_quantile(freedom) * np.sqrt(np.sum(moved**2, 0))


def predict(x, y, training, wanted):
    """Rows `wanted`, by a fit of the rows `training` (masks): nan where a term of theirs is not in
    the training at all, as that of a new family."""
    predicted = x[wanted] @ solve(x[training], y[training])
    new = (x[wanted][:, ~x[training].any(0)] != 0).any(1)
    predicted[new] = math.nan
    return predicted


def predict_tasks(x, y, tasks):
    """Each task by a fit of all others, (N[, draws])."""
    predicted = np.empty(np.shape(y))
    for k in np.unique(tasks):
        predicted[tasks == k] = predict(x, y, tasks != k, tasks == k)
    return predicted


def prediction_reach(x, y, tasks):
    """Half-widths of the 95 % prediction intervals of predict_tasks, (N[, draws]): of task k
    t(K - 2) times the root of the mean, over the other tasks, of the squared error of each as
    predicted without it and without k."""
    reach, names = np.full(np.shape(y), math.nan), np.unique(tasks)
    for k in names if len(names) > 3 else []:
        squares = []
        for j in names[names != k]:
            predicted = predict(x, y, (tasks != j) & (tasks != k), tasks == j)
            squares.append(np.nanmean((predicted - y[tasks == j]) ** 2, 0))
        reach[tasks == k] = t_quantile(len(names) - 2) * np.sqrt(np.nanmean(squares, 0))
    return reach


def permuted(rows, rng):
    """Rows with their distances traded among the targets of a task, of all families alike; tasks of
    one target trade with each other."""
    of_target = group(rows, "target")
    pools = {}
    for target, members in of_target.items():
        families = frozenset(row.family for row in members)
        pools.setdefault((members[0].task, families), []).append(target)
    for (task, families), targets in list(pools.items()):
        if len(targets) == 1:
            pools.setdefault(families, []).extend(pools.pop((task, families)))
    given = {}
    for targets in pools.values():
        for target, place in zip(targets, rng.permutation(len(targets))):
            given[target] = {row.family: row.distance_decades for row in of_target[targets[place]]}
    return [row._replace(distance_decades=given[row.target][row.family]) for row in rows]


def permutation_p(rows, y, draws=PERMUTATIONS):
    """Share of distances traded at random (the observed ones among them) that predict left-out
    tasks as well as the observed ones: () or (draws of y,)."""
    tasks = np.array([row.task for row in rows])
    rng = np.random.default_rng(0)

    def error(rows):
        return np.nansum((predict_tasks(design(rows)[1], y, tasks) - y) ** 2, 0)

    observed = error(rows)
    as_good = sum(error(permuted(rows, rng)) <= observed * (1 + 1e-9) for _ in range(draws))
    return (1 + as_good) / (1 + draws)


def law(kind, method, recipe, origin, rows):
    """Rows of one kind -> Law."""
    known = [row for row in rows if not math.isnan(row.distance_decades + row.shot_decades)]
    about = kind, method, recipe, origin
    y, tasks = np.array([row.exponent for row in known]), np.array([row.task for row in known])
    terms, x = design(known) if known else ([], np.empty((0, 0)))
    if len(np.unique(tasks)) < 4 or len(known) <= len(terms):
        none = np.empty(0)
        return Law(*about, rows, [], none, none, math.nan, none, none, {}, math.nan, none)
    seeds = {seed for row in known for seed in row.by_seed}
    by_task, by_seed = changes_without(x, y, tasks), np.zeros((0, len(terms)))
    if len(seeds) > 1:
        by_seed = np.stack([solve(x, without_seed(known, seed)) - solve(x, y) for seed in seeds])
    changes = np.concatenate([by_task, by_seed])
    unit = np.eye(len(terms))
    ci95 = [half_width(changes, one, degrees(terms, one, known)) for one in unit]
    predicted, rmse = predict_tasks(x, y, tasks), {}
    for name, columns in BASELINES.items():
        error = predict_tasks(design(known, *columns)[1], y, tasks) - y
        rmse[name] = math.sqrt(np.mean(error[~np.isnan(predicted)] ** 2))
    share = float(np.sum(by_seed**2) / np.sum(changes**2)) if len(seeds) > 1 else math.nan
    reach, p = prediction_reach(x, y, tasks), float(permutation_p(known, y))
    estimates = solve(x, y), np.array(ci95), share, predicted, reach, rmse, p, changes
    return Law(*about, known, terms, *estimates)
