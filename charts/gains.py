"""Gains from scale by paired differences."""

import itertools
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from charts import results
from charts.results import Cell, group
from engine.console import MAIN_METRIC

KINDS = {  # kind of gain -> what differs, and what is shared beside target, shots and seed
    "network": ("line.model", "line.source"),
    "source": ("line.source", "line.model"),
}
VERDICTS = {  # where an interval lies -> heading in a table, marker in a figure, the same as text
    "above": ("above zero", "^", "▲"),
    "unclear": ("not off zero", "o", "○"),
    "below": ("below zero", "v", "▼"),
    "no interval": ("no interval", "x", "×"),
}
# Regime of shots -> its most.
REGIMES = {"up to 10 shots": 10, "11 to 99 shots": 99, "100 and more": 10**9, "full": math.inf}


class GainLine(NamedTuple):
    kind: str  # of KINDS
    source_domain: str | None
    method: str
    recipe: str | None
    pretraining: str | None  # but for its seed


@dataclass(frozen=True, kw_only=True)
class Gain(Cell):
    """The larger arm minus the smaller one: a Cell of a GainLine, over the means of each seed."""

    small: str  # the arms
    large: str
    partners: tuple
    pairs: int  # seeds x partners x pre-training seeds
    pretraining_seeds: tuple  # the pre-trainings, which differ in their seed
    seed_share: float  # part of these in the interval's variance, nan of a single one
    lacking: bool  # whether a seed was left out, as an arm lacks it

    @property
    def group(self):
        """Its group in words: how far it had to carry."""
        source, target = self.line.source_domain, self.target.domain
        if source is None:
            return f"no pre-training, on {target}"
        relation = "within domain" if source == target else "across domains"
        return f"{relation}, {source} to {target}"

    @property
    def verdict(self):
        """Where its interval lies: one of VERDICTS."""
        if math.isnan(self.ci95):  # one seed: pairs of it alone say nothing of other seeds
            return "no interval"
        if abs(self.mean) <= self.ci95:
            return "unclear"
        return "above" if self.mean > 0 else "below"


def regime(shots):
    """The one of REGIMES that a number of shots (None: full) lies in."""
    return next(name for name, most in REGIMES.items() if (shots or math.inf) <= most)


def widest(kind, runs, metric):
    """The arms furthest apart in size among those that share the most partners: {arm: {(partner,
    its pre-training): {seed: score}}}, the small one first; {} without. Networks are as large as
    size_order says, sources as their images (those of unknown size, and none at all, are no arms).
    Both arms had the same pre-training, its seed included.
    """
    arm_of, partner_of = attrgetter(KINDS[kind][0]), attrgetter(KINDS[kind][1], "line.pretraining")
    scores, sizes = {}, {}
    for run in runs:
        if kind == "network":
            sizes[run.line.model] = results.size_order(run.line.model)[0]
        elif run.line.source_domain and run.source_images:
            sizes[run.line.source] = run.source_images
        if run.metrics[metric] is not None:
            partners = scores.setdefault(arm_of(run), {})
            partners.setdefault(partner_of(run), {})[run.seed] = run.metrics[metric]
    arms = sorted(sizes.keys() & scores.keys(), key=lambda name: (sizes[name], name))
    ranks = {}
    for (i, small), (j, large) in itertools.combinations(enumerate(arms), 2):
        shared = len(scores[small].keys() & scores[large].keys())
        if shared and sizes[small] < sizes[large]:
            ranks[small, large] = shared, j - i, j
    return {arm: scores[arm] for arm in max(ranks, key=ranks.get, default=())}


def paired_gain(line, runs, metric):
    """Results of a GainLine on a target, at a number of shots -> (Gain, notices on seeds left out),
    or (None, notices) where no two can be paired.

    The differences are averaged over partners for each seed, and the interval is Student's t over
    seeds. The few-shot draw of a seed is common to all partners, so their differences are not
    independent; what is particular to a source cancels, as the same sources count in every seed.
    Several pre-training seeds are a second level: the variances of both levels' means add up, with
    the degrees of freedom of Satterthwaite 1946, rounded down.
    """
    arms = widest(line.kind, runs, metric)
    if not arms:
        return None, []
    (small, low), (large, high) = arms.items()
    target, shots = runs[0].target, runs[0].shots
    where = f"{target.name}, {results.shots_words(shots)}, larger {line.kind}"
    partners = sorted(low.keys() & high.keys(), key=str)
    seeds = {seed for arm in (low, high) for partner in partners for seed in arm[partner]}
    differences, notices = {}, []
    for partner in partners:
        for name in (large, small):
            if lacking := ", ".join(map(str, sorted(seeds - arms[name][partner].keys()))):
                with_it = " ".join(filter(None, partner))
                notices.append(f"{where}: {name} with {with_it} lacks seed {lacking}")
        both = low[partner].keys() & high[partner].keys()
        if both:
            differences[partner] = {seed: high[partner][seed] - low[partner][seed] for seed in both}
    if not differences:
        return None, notices
    # The part in which every partner has every seed and which holds the most pairs, then the most
    # seeds: an average over partners of one seed would else shift where a partner lacks it.
    sets = [set(seeds) for seeds in differences.values()]
    seeds = max(
        [*sets, set.intersection(*sets)],
        key=lambda some: (len(some) * sum(some <= other for other in sets), len(some)),
    )
    kept = [partner for partner, values in differences.items() if seeds <= values.keys()]
    table = np.array([[differences[partner][seed] for seed in sorted(seeds)] for partner in kept])
    rows = {}
    for (_, pretraining), row in zip(kept, table):
        rows.setdefault(pretraining or "seed0", []).append(row)
    found = results.spread(table.mean(0))
    levels = found, results.spread([np.mean(part) for part in rows.values()])
    variances, share = [level["sd"] ** 2 / level["n"] for level in levels], math.nan
    if (total := sum(variances)) > 0:  # nor nan, of one seed or one pre-training
        parts = [part**2 / (level["n"] - 1) for part, level in zip(variances, levels)]
        found["ci95"] = results.t_quantile(max(1, int(total**2 / sum(parts)))) * math.sqrt(total)
        share = variances[1] / total
    about = {"small": small, "large": large, "pairs": table.size, "lacking": bool(notices)}
    about["partners"] = tuple(dict.fromkeys(partner for partner, _ in kept))
    about |= {"pretraining_seeds": tuple(sorted(rows)), "seed_share": share}
    return Gain(target, line, shots, metric, **found, **about), notices


def paired_gains(runs, metric):
    """Results -> (list of Gain by kind, group and shots, notices on seeds left out)."""
    alike = "target", "shots", "line.source_domain"
    alike += "line.method", "line.recipe", "line.pretraining_recipe"
    gains, notices = [], []
    for kind in KINDS:
        for (target, _, *line), members in group(runs, *alike).items():
            name = MAIN_METRIC[target.domain] if metric == "auto" else metric
            gain, more = paired_gain(GainLine(kind, *line), members, name)
            gains += [gain] if gain else []
            notices += more

    def order(gain):
        line, (name, target_domain, origin) = gain.line, gain.target
        far = line.source_domain is None, line.source_domain != target_domain
        domains = target_domain != "natural", results.DOMAINS.index(line.source_domain)
        about = name, origin, line.method, line.recipe or "", line.pretraining or ""
        return list(KINDS).index(line.kind), *far, *domains, gain.shots or math.inf, *about

    return sorted(gains, key=order), notices


def seeds_note(gains):
    """[What pre-training seeds make of the intervals, in words], [] where there is one of each."""
    shares = [gain.seed_share for gain in gains if not math.isnan(gain.seed_share)]
    if not shares:
        return []
    text = "Several pre-training seeds are a second level of the intervals, paired too; of their"
    return [f"{text} variance they make {100 * np.median(shares):.0f} % (median over cells)."]


def counts(gains):
    """How many gains have their interval above zero, not off it, below it, or none: a dict."""
    found = [gain.verdict for gain in gains]
    return {name: found.count(name) for name in VERDICTS}
