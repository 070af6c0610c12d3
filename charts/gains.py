"""Gains from scale by paired differences, alone and against the distance of domains; agreement of
own with published numbers."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from charts.results import (
    DISTANCES,
    DOMAINS,
    Cell,
    Target,
    chosen_metric,
    group,
    plain_name,
    shots_words,
    size_order,
    spread,
    t_quantile,
    within_noise,
)


class Kind(NamedTuple):
    arm: str  # what differs, of a Line
    partner: str  # what is shared beside target, shots, seed, method and recipe
    words: str


KINDS = {
    "network": Kind("model", "source", "larger network"),
    "source": Kind("source", "model", "larger source"),
}
RELATIONS = ("within domain", "across domains", "no pre-training")
REGIMES = ("up to 10 shots", "11 to 99 shots", "100 and more", "full")
VERDICTS = {  # where an interval lies -> heading in a table
    "above": "above zero",
    "unclear": "not off zero",
    "below": "below zero",
    "no interval": "no interval",
}


class GainLine(NamedTuple):
    """One row: what gains share beside target and number of shots."""

    kind: str  # of KINDS
    source_domain: str | None
    method: str
    recipe: str | None


@dataclass(frozen=True)
class Gain:
    """The larger arm minus the smaller one, in fractions; nan where undefined."""

    target: Target
    line: GainLine
    shots: int | None
    metric: str
    small: str  # the arms
    large: str
    by_partner: dict  # partner -> mean difference
    mean: float  # over seeds, of means over partners, as the next three
    sd: float
    ci95: float
    n: int
    pairs: int  # seeds x partners, as the next two
    ci95_pairs: float  # half-width: Student t
    ci95_normal: float  # half-width: 1.96 standard errors
    lacking: bool  # whether a seed was left out

    @property
    def relation(self):
        """How far it had to carry: one of RELATIONS."""
        if self.line.source_domain is None:
            return "no pre-training"
        near = self.line.source_domain == self.target.domain
        return "within domain" if near else "across domains"

    @property
    def group(self):
        """Its group in words: within domain, natural to natural."""
        source, target = self.line.source_domain, self.target.domain
        return f"{self.relation}, {f'{source} to {target}' if source else f'on {target}'}"

    def verdict(self, interval="ci95"):
        """Where the interval lies: one of VERDICTS."""
        if math.isnan(self.ci95):  # one seed: pairs of it alone say nothing of other seeds
            return "no interval"
        if abs(self.mean) <= getattr(self, interval):
            return "unclear"
        return "above" if self.mean > 0 else "below"


def regime(shots):
    """The regime of REGIMES of a number of shots (None: full)."""
    if shots is None:
        return "full"
    if shots <= 10:
        return "up to 10 shots"
    return "11 to 99 shots" if shots < 100 else "100 and more"


def widest(results, kind, scores):
    """The arms furthest apart in size among those that share the most partners: (small, large), or
    None. Networks are as large as the numbers in their names, sources as their images (those of
    unknown size, and none at all, are no arms). scores: {arm: {partner: ...}}."""
    sizes = {}
    for result in results:
        if kind.arm == "model":
            sizes[result.line.model] = size_order(result.line.model)[0]
        elif result.line.source_domain and result.source_images:
            sizes[result.line.source] = result.source_images
    arms = sorted(sizes, key=lambda arm: (sizes[arm], arm))
    ranks = {}
    for small, large in itertools.combinations(arms, 2):
        shared = len(scores.get(small, {}).keys() & scores.get(large, {}).keys())
        if shared and sizes[small] < sizes[large]:
            place = arms.index(large)
            ranks[small, large] = shared, place - arms.index(small), place
    return max(ranks, key=ranks.get, default=None)


def block(differences):
    """{partner: {seed: difference}} -> that part of it in which every partner has every seed and
    which holds the most pairs (then the most seeds): an average over partners of one seed would
    else shift where a partner lacks it."""
    sets = [set(seeds) for seeds in differences.values()]

    def size(seeds):
        return len(seeds) * sum(seeds <= other for other in sets), len(seeds)

    seeds = max([*sets, set.intersection(*sets)], key=size)
    return {
        partner: {seed: values[seed] for seed in sorted(seeds)}
        for partner, values in differences.items()
        if seeds <= values.keys()
    }


def paired_gain(line, results, metric):
    """Results of a target, line and number of shots -> (Gain, notices on seeds left out), or (None,
    notices) where no two can be paired.

    The differences are averaged over partners for each seed, and the interval is Student's t over
    seeds. The few-shot draw of a seed is common to all partners, so their differences are not
    independent; what is particular to a source cancels, as the same sources count in every seed.
    """
    kind, target, shots = KINDS[line.kind], results[0].target, results[0].shots
    where = f"{target.name}, {shots_words(shots)}, {kind.words}"
    scores = {}  # arm -> partner -> seed -> score
    for result in results:
        if result.metrics[metric] is not None:
            partners = scores.setdefault(getattr(result.line, kind.arm), {})
            seeds = partners.setdefault(getattr(result.line, kind.partner), {})
            seeds[result.seed] = result.metrics[metric]
    arms = widest(results, kind, scores)
    if arms is None:
        return None, []
    small, large = arms
    differences, notices, named = {}, [], set()
    for partner in sorted(scores[small].keys() & scores[large].keys()):
        low, high = scores[small][partner], scores[large][partner]
        for arm, gone in ((large, low.keys() - high.keys()), (small, high.keys() - low.keys())):
            if gone:
                seeds = ", ".join(map(str, sorted(gone)))
                notices.append(f"{where}: {arm} with {partner} lacks seed {seeds}")
                named |= gone
        both = sorted(low.keys() & high.keys())
        if both:
            differences[partner] = {seed: high[seed] - low[seed] for seed in both}
    if not differences:
        return None, notices
    kept = block(differences)
    for partner, values in differences.items():
        gone = sorted(values.keys() - kept.get(partner, {}).keys() - named)
        if gone:
            text = f"{where}: {partner} counts without seed {', '.join(map(str, gone))}"
            notices.append(f"{text}, for want of it with another {kind.partner}")
    table = np.array([list(values.values()) for values in kept.values()])  # partners x seeds
    pairs = spread(table.ravel())
    return Gain(
        target,
        line,
        shots,
        metric,
        small,
        large,
        dict(zip(kept, table.mean(1).tolist())),
        **spread(table.mean(0)),
        pairs=pairs["n"],
        ci95_pairs=pairs["ci95"],
        ci95_normal=1.96 * pairs["sd"] / math.sqrt(pairs["n"]),
        lacking=bool(notices),
    ), notices


def paired_gains(results, metric):
    """Results -> (list of Gain by kind, group and shots, notices on seeds left out)."""
    gains, notices = [], []
    for kind in KINDS:

        def alike(result, kind=kind):
            line = result.line
            line = GainLine(kind, line.source_domain, line.method, line.recipe)
            return result.target, line, result.shots

        for (target, line, _), members in group(results, alike).items():
            gain, more = paired_gain(line, members, chosen_metric(target, metric))
            gains += [gain] if gain else []
            notices += more

    def order(gain):
        target, line = gain.target, gain.line
        place = list(KINDS).index(line.kind), RELATIONS.index(gain.relation)
        domains = target.domain != "natural", DOMAINS.index(line.source_domain)
        about = target.name, target.origin, line.method, line.recipe or ""
        return *place, *domains, gain.shots or math.inf, *about

    return sorted(gains, key=order), notices


def counts(gains, interval="ci95"):
    """How many gains have their interval above zero, not off it, below it, or none: a dict."""
    found = [gain.verdict(interval) for gain in gains]
    return {name: found.count(name) for name in VERDICTS}


class Point(NamedTuple):
    gain: Gain
    source: str  # or "SMALL to LARGE", two of them
    larger: str  # the larger one of two sources, or the one
    value: float  # the gain of these sources
    distances: dict  # name of DISTANCES -> mean over the runs, nan where none has one


def distance_points(results, gains):
    """Gains -> points against distance: of each source for the network gain, of each pair of
    sources for the source gain (with the mean distance of the runs that it pairs)."""
    runs = group(results, lambda run: (run.target, run.line.source, run.line.model))
    points = []
    for gain in gains:
        arms = [gain.small, gain.large]
        if gain.line.kind == "network":
            parts = [(name, [name], arms, value) for name, value in gain.by_partner.items()]
        else:
            parts = [(" to ".join(arms), arms, gain.by_partner, gain.mean)]
        for name, sources, models, value in parts:
            distances = {}
            for key in DISTANCES:
                known = [
                    run.distances[key]
                    for source, model in itertools.product(sources, models)
                    for run in runs[gain.target, source, model]
                    if run.distances[key] is not None
                ]
                distances[key] = float(np.mean(known)) if known else math.nan
            if not all(map(math.isnan, distances.values())):
                points.append(Point(gain, name, sources[-1], value, distances))
    return points


def axis_points(points, kind, distance):
    """Points of a kind -> (x, y): the distance (Fréchet as its log10) and the gain, where known."""
    points = [point for point in points if point.gain.line.kind == kind]
    if distance == "frechet_relative":
        points = [point for point in points if point.distances[distance] > 0]
        x = [math.log10(point.distances[distance]) for point in points]
    else:
        points = [point for point in points if not math.isnan(point.distances[distance])]
        x = [point.distances[distance] for point in points]
    return x, [point.value for point in points]


class Fit(NamedTuple):
    n: int  # points
    slope: float
    ci95: float  # half-width of the slope's interval, Student t of n - 2
    grid: np.ndarray  # (100,), as the next two: x, the line, half-width of its 95 % band
    line: np.ndarray
    band: np.ndarray


def fit(x, y):
    """Ordinary least squares of y on x, (N,) each -> Fit; None where fewer than three points or one
    x leave nothing to estimate."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n, spread_x = len(x), float(np.sum((x - x.mean()) ** 2)) if len(x) else 0.0
    if n < 3 or spread_x == 0:
        return None
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread_x)
    residual = y - y.mean() - slope * (x - x.mean())
    t, sigma = t_quantile(n - 2), math.sqrt(np.sum(residual**2) / (n - 2))
    grid = np.linspace(x.min(), x.max(), 100)
    line = y.mean() + slope * (grid - x.mean())
    band = t * sigma * np.sqrt(1 / n + (grid - x.mean()) ** 2 / spread_x)
    return Fit(n, slope, t * sigma / math.sqrt(spread_x), grid, line, band)


class Shared(NamedTuple):
    own: Cell
    published: Cell
    agree: bool | None  # None where one of them has no interval


def shared_cells(panels):
    """{target: cells} -> list of Shared, own cells that are published too; packs count as what they
    hold."""
    cells = [cell for panel in panels.values() for cell in panel if cell.n]

    def key(cell):
        names = plain_name(cell.target.name), plain_name(cell.line.source)
        return *names, cell.line.model, cell.line.method, cell.shots

    published = {key(cell): cell for cell in cells if cell.target.origin == "published"}
    shared = []
    for own in cells:
        other = published.get(key(own))
        if own.target.origin == "own" and other:
            agree = within_noise(own, other) if own.n > 1 and other.n > 1 else None
            shared.append(Shared(own, other, agree))
    return shared
