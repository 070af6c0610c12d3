"""charts.gains: paired differences, by hand and by scipy."""

import json

import numpy as np
import pytest
from result_files import PUBLISHED, write_seeds
from scipy import stats

from charts import gains, results


def gains_of(*paths, kind="network"):
    found, notices = gains.paired_gains(results.load(paths)[0], "auto")
    return [gain for gain in found if gain.line.kind == kind], notices


def test_network_gains_of_the_study_are_those_of_scipy():
    """With scipy's test, on plain lists."""
    scores, found, verdicts = {}, {}, {}
    for entry in json.loads(PUBLISHED.read_text())["records"]:
        natural = entry["target"] in ("cifar10", "cifar100", "pets", "flowers102")
        key = entry["target"], entry["shots"], entry["source"]
        values = np.array(entry["metrics"]["accuracy" if natural else "mean_auc"])
        scores.setdefault(key, {})[entry["model"]] = values
    for (target, shots, source), arms in scores.items():
        if len(arms) == 2:
            n = min(map(len, arms.values()))
            domain = "natural" if "imagenet" in source else "medical"
            difference = arms["R152x4"][:n] - arms["R50x1"][:n]
            found.setdefault((target, shots, domain), []).append(difference)
    for key, lists in found.items():
        n = min(map(len, lists))
        test = stats.ttest_1samp(np.mean([values[:n] for values in lists], 0), 0)
        sign = "above" if test.statistic > 0 else "below"
        verdicts[key] = sign if test.pvalue < 0.05 else "unclear"
    assert verdicts == {
        (gain.target.name, gain.shots or "full", gain.line.source_domain): gain.verdict
        for gain in gains_of(PUBLISHED)[0]
    }


def test_gain_is_that_of_seed_means_over_sources(tmp_path):
    small = {"a": [0.50, 0.52, 0.49], "b": [0.30, 0.31, 0.35]}
    large = {"a": [0.60, 0.58, 0.62], "b": [0.33, 0.36, 0.36]}
    for source in "ab":
        write_seeds(tmp_path, small[source], source=source, model="R26x1")
        write_seeds(tmp_path, large[source], source=source, model="R152x4")
    (gain,), notices = gains_of(tmp_path)
    means = np.array([(0.10 + 0.03) / 2, (0.06 + 0.05) / 2, (0.13 + 0.01) / 2])
    low, high = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert gain.mean == pytest.approx(means.mean())
    assert gain.ci95 == pytest.approx((high - low) / 2)
    assert (gain.small, gain.large, gain.pairs, gain.n) == ("R26x1", "R152x4", 6, 3)
    assert gain.partners == ("a", "b") and np.isnan(gain.seed_share)
    assert gain.verdict == "above" and not notices
    assert not gains_of(tmp_path, kind="source")[0]  # both sources have 4000 images


def test_arms_without_a_common_seed_are_named(tmp_path):
    write_seeds(tmp_path, {0: 0.5}, model="R26x1")
    write_seeds(tmp_path, {1: 0.5}, model="R50x1")
    found, notices = gains_of(tmp_path)
    assert not found and [text.split("network: ")[1] for text in notices] == [
        "R50x1 with synthetic-natural lacks seed 0",
        "R26x1 with synthetic-natural lacks seed 1",
    ]


def test_a_partner_with_too_few_seeds_gives_way_and_is_named(tmp_path):
    for source, seeds in (("a", range(4)), ("b", range(4)), ("c", [0])):
        for model, score in (("R26x1", 0.3), ("R50x1", 0.4)):
            write_seeds(tmp_path, dict.fromkeys(seeds, score), source=source, model=model)
    (gain,), notices = gains_of(tmp_path)
    assert (gain.partners, gain.n, gain.pairs) == (("a", "b"), 4, 8)
    assert len(notices) == 2 and all("x1 with c lacks seed 1, 2, 3" in text for text in notices)


@pytest.mark.parametrize("key", ["method", "recipe"])
def test_methods_and_recipes_are_never_paired(tmp_path, key):
    write_seeds(tmp_path, [0.5, 0.6], model="R26x1", **{key: "one"})
    write_seeds(tmp_path, [0.7, 0.8], model="R50x1", **{key: "other"})
    assert gains_of(tmp_path) == ([], [])
    write_seeds(tmp_path, [0.8, 0.8], model="R50x1", **{key: "one"})
    (gain,), _ = gains_of(tmp_path)
    assert gain.mean == pytest.approx(0.25) and getattr(gain.line, key) == "one"


def test_pretraining_seeds_are_paired_and_a_second_level(tmp_path, rng):
    """Variances of both levels add up: y = gain + network's + draw's + rest, 3 networks, 5 draws;
    against scipy, and so that 95 % of intervals hold the gain."""
    inside = 0
    for _ in range(200):
        effects = rng.normal(0, 1, (3, 1)), rng.normal(0, 1, (1, 5)), rng.normal(0, 1, (3, 5))
        gain, seeds = 0.1 + 0.01 * sum(effects), [None, "seed1", "seed2"]
        runs = []
        for arm, model in ((np.zeros((3, 5)), "R26x1"), (gain, "R50x1")):
            for (place, seed), score in np.ndenumerate(arm):
                line = results.Line("a", "natural", model, "finetune", "x", seeds[place])
                about = results.Target("t", "natural", "own"), line, 1, seed, 10
                runs.append(results.Result(*about, {"accuracy": score}, *[None] * 6))
        (found,), _ = gains.paired_gains(runs, "auto")
        low, high = found.mean - found.ci95, found.mean + found.ci95
        inside += low < 0.1 < high
    parts = [stats.sem(gain.mean(axis)) ** 2 for axis in (0, 1)]  # of draws, of networks
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, int(degrees)) * sum(parts) ** 0.5
    assert (found.mean, found.ci95) == pytest.approx((gain.mean(), half))
    assert found.seed_share == pytest.approx(parts[1] / sum(parts))
    assert found.pretraining_seeds == ("seed0", "seed1", "seed2")
    assert (found.n, found.pairs, found.partners) == (5, 15, ("a",))
    assert 0.91 < inside / 200 <= 1  # 0.96 to 0.97 in 20,000 draws


@pytest.mark.parametrize(
    "pretraining, recipe",
    {"seed1": None, "optimised-seed12": "optimised", "seed1-best": "best", "best": "best"}.items(),
)
def test_a_seed_is_no_other_pretraining(pretraining, recipe):
    assert results.Line(*"abcde", pretraining).pretraining_recipe == recipe


def test_own_and_published_runs_are_never_paired(tmp_path):
    write_seeds(tmp_path, [0.1] * 5, model="R50x1", target="pets", shots=1, source="imagenet1k")
    both, alone = gains_of(tmp_path, PUBLISHED)[0], gains_of(PUBLISHED)[0]
    assert [gain.mean for gain in both] == [gain.mean for gain in alone]


def test_source_gain_takes_largest_and_smallest_of_a_domain_that_share_a_network(tmp_path):
    sources = {"s": (100, 0.1), "m": (200, 0.3), "l": (300, 0.6), "x": (None, 0.9)}
    for source, (images, score) in sources.items():
        about = {"source": source, "source_images": images, "model": "R26x1"}
        write_seeds(tmp_path, [score, score + 0.01], **about)
    about = {"source_images": 1, "model": "R26x1"}
    write_seeds(tmp_path, [0.0, 0.0], source="other", source_domain="medical", **about)
    write_seeds(tmp_path, [0.0, 0.0], source="scratch", source_domain=None, **about)
    alone = {"source": "xl", "source_images": 999, "model": "R50x1"}  # no network in common
    write_seeds(tmp_path, [0.9, 0.9], **alone)
    (gain,), _ = gains_of(tmp_path, kind="source")
    assert (gain.small, gain.large) == ("s", "l") and gain.mean == pytest.approx(0.5)


def test_groups_within_across_and_without_pretraining(tmp_path):
    for source, domain in (("a", "natural"), ("b", "medical"), ("scratch", None)):
        for model, score in (("R26x1", 0.5), ("R50x1", 0.4)):
            about = {"source": source, "source_domain": domain, "model": model}
            write_seeds(tmp_path, [score, score + 0.001], **about)
    found, _ = gains_of(tmp_path)
    assert [gain.group for gain in found] == [
        "within domain, natural to natural",
        "across domains, medical to natural",
        "no pre-training, on natural",
    ]
    assert {gain.verdict for gain in found} == {"below"}


def test_regimes():
    names = [gains.regime(shots) for shots in (1, 10, 11, 99, 100, 500, None)]
    few, some, many, full = gains.REGIMES
    assert names == [few, few, some, some, many, many, full]
