"""plot.py: published numbers, full-shot, gains from scale, distance, own beside published."""

import csv
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from test_plot import write

from charts import gain_figures as gains
from charts import gains as paired
from charts import panels as figures
from charts import results as tables

PUBLISHED = ROOT / "published.json"
NATURAL = ("cifar10", "cifar100", "pets", "flowers102")


@pytest.fixture(scope="module")
def published():
    return tables.load([PUBLISHED])[0]


def runs(scores, folder, metric="accuracy", **values):
    """Write one file a seed of {seed: score}, below a folder of its own."""
    place = folder / "-".join(str(value) for value in values.values()).replace("/", "_")
    for seed, score in scores.items():
        write(place, f"{seed}.json", {metric: score}, seed=seed, **values)


def cells_of(folder, metric="auto", kind="network"):
    cells, notices = paired.gains(tables.load([folder])[0], metric)
    return [cell for cell in cells if cell["kind"] == kind], notices


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", Path(path).read_text())


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("target", "source", "model", "shots", "mean"),
    [
        ("cifar10", "imagenet21k", "R152x4", 1, 0.6619),
        ("cifar10", "imagenet1k", "R50x1", 1, 0.4893),
        ("tuberculosis", "chexpert+mimic+nih+padchest", "R152x4", None, 0.9588),
        ("padchest", "imagenet21k", "R152x4", None, 0.8402),
    ],
)
def test_published_means(published, target, source, model, shots, mean):
    wanted = {"target": target, "source": source, "model": model, "shots": shots}
    (cell,) = [c for c in tables.all_cells(published, "auto") if wanted.items() <= c.items()]
    assert round(cell["mean"], 4) == mean and cell["n"] == 5


def test_published_runs_have_domains_sizes_and_places_as_seeds(published):
    assert len({tuple(run[key] for key in tables.CELL) for run in published}) == 289
    about = {run["source"]: (run["source_domain"], run["source_images"]) for run in published}
    assert about["imagenet21k"] == ("natural", 14_197_122)
    assert about["chexpert+mimic"] == ("medical", 224_316 + 377_110)
    assert about["chexpert+mimic+nih+padchest"] == ("medical", 874_407)
    domains = {run["target"]: run["target_domain"] for run in published}
    assert {target for target, domain in domains.items() if domain == "natural"} == set(NATURAL)
    assert Counter(run["seed"] for run in published) == {0: 289, 1: 289, 2: 289, 3: 289, 4: 284}
    assert {(run["method"], run["origin"]) for run in published} == {("finetune", "published")}
    assert "arXiv:2106.00116" in json.loads(PUBLISHED.read_text())["about"]


def scipy_gains():
    """Network gains of the published file by other means: {(target, shots, domain): verdicts by
    seed means and by all pairs}, with scipy's tests on plain lists."""
    scores, found = {}, {}
    for entry in json.loads(PUBLISHED.read_text())["records"]:
        metric = "accuracy" if entry["target"] in NATURAL else "mean_auc"
        key = entry["target"], entry["shots"], entry["source"]
        scores.setdefault(key, {})[entry["model"]] = np.array(entry["metrics"][metric])
    for (target, shots, source), arms in scores.items():
        if len(arms) == 2:
            n = min(map(len, arms.values()))
            domain = "natural" if "imagenet" in source else "medical"
            difference = arms["R152x4"][:n] - arms["R50x1"][:n]
            found.setdefault((target, shots, domain), []).append(difference)
    verdicts = {}
    for key, lists in found.items():
        n = min(map(len, lists))
        table = np.stack([values[:n] for values in lists])
        both = []
        for values in (table.mean(0), table.ravel()):
            test = stats.ttest_1samp(values, 0)
            sure = test.pvalue < 0.05
            both.append(("above" if test.statistic > 0 else "below") if sure else "unclear")
        verdicts[key] = tuple(both)
    return verdicts


def test_network_gains_of_the_study_are_those_of_scipy(published):
    cells = [cell for cell in paired.gain_cells(published, "auto") if cell["kind"] == "network"]
    ours = {
        (c["target"], c["shots"] or "full", c["source_domain"]): (
            c["verdict"],
            paired.verdict(c, "ci95_pairs"),
        )
        for c in cells
    }
    assert ours == scipy_gains()


def test_counts_of_the_study(published):
    rows = paired.count_rows(paired.gain_cells(published, "auto"))
    found = {
        (row["gain"], row["group"].split(", ")[1], row["shots"]): (
            *(row[name] for name in ("above", "unclear", "below")),
            row["ci95_pairs"],
            row["ci95_normal"],
        )
        for row in rows
    }
    network, source = "larger network", "larger source"
    assert found[network, "natural to natural", "all"] == (20, 0, 0, "20/0/0", "20/0/0")
    assert found[network, "natural to medical", "up to 10 shots"] == (0, 8, 1, "0/6/3", "0/6/3")
    assert found[network, "natural to medical", "full"] == (2, 1, 0, "3/0/0", "3/0/0")
    assert found[network, "medical to medical", "all"] == (8, 8, 0, "8/8/0", "9/7/0")
    assert found[source, "natural to natural", "all"] == (17, 0, 3, "17/0/3", "17/0/3")
    assert found[source, "medical to medical", "all"] == (9, 7, 0, "9/7/0", "11/5/0")
    assert found[source, "natural to medical", "full"] == (3, 0, 0, "3/0/0", "3/0/0")
    assert sum(row["cells"] for row in rows if row["shots"] != "all") == 2 * 52


def test_published_file_alone_is_drawn_and_named(call):
    status, out, err = call(PUBLISHED, "--figure", "gain")
    assert status == 0 and "within domain, natural to natural" in out
    assert "pets, 1-shot, larger network: R50x1 with imagenet1k lacks seed 4" in err
    words = texts("figures/gain.svg")
    assert "in 20 of 20 cells" in words and "0 of 9" in words
    assert "within domain, natural to natural, published" in words
    assert "A seed that one arm lacks counts in neither (9 cells)." in " ".join(words)
    rows = read_csv("figures/gain.csv")
    assert len(rows) == 104 and {row["origin"] for row in rows} == {"published"}
    assert Counter(row["n"] for row in rows) == {"5": 95, "4": 9}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"source": "imagenet22k"}, "'imagenet22k' is not known"),
        ({"target": "mnist"}, "'mnist' is not known"),
        ({"shots": 0}, "shots is 0"),
        ({"metrics": {"accuracy": [0.5, 1.5]}}, "accuracy is 1.5, not a fraction"),
        ({"metrics": {"accuracy": [0.5], "mean_ap": [0.5, 0.5]}}, "skipped"),
        ({"source": "imagenet1k+nih"}, "skipped"),
        ({"metrics": None}, "skipped"),
    ],
)
def test_bad_published_records_are_skipped_and_named(call, tmp_path, change, fault):
    entry = {"target": "pets", "source": "imagenet1k", "model": "R50x1", "shots": 1}
    entry["metrics"] = {"accuracy": [0.5, 0.6]}
    (tmp_path / "p.json").write_text(json.dumps({"records": [entry, {**entry, **change}]}))
    status, out, err = call("p.json", "--figure", "fewshot")
    assert status == 0 and "55.0 ± 7.1 (2)" in out
    assert "skipped p.json record 2: " in err and fault in err and err.count("\n") == 2


def test_a_missing_published_file_is_named(call):
    assert call("p.json")[0::2] == (
        2,
        "error: no file p.json: give published.json, or a folder of result files\n",
    )


@pytest.mark.parametrize("text", ["{", "[1]", '{"about": 1}', '{"records": 3}'])
def test_a_file_without_published_numbers_is_refused(call, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    status, out, err = call("p.json")
    assert (status, out) == (2, "") and err.startswith("error: p.json holds no published numbers")


# ------------------------------------------------------------------------- paired gains, by hand


def test_gain_is_that_of_seed_means_over_sources(tmp_path):
    small = {"a": {0: 0.50, 1: 0.52, 2: 0.49}, "b": {0: 0.30, 1: 0.31, 2: 0.35}}
    large = {"a": {0: 0.60, 1: 0.58, 2: 0.62}, "b": {0: 0.33, 1: 0.36, 2: 0.36}}
    for source in "ab":
        runs(small[source], tmp_path, source=source, model="R26x1")
        runs(large[source], tmp_path, source=source, model="R152x4")
    (cell,), notices = cells_of(tmp_path)
    means = np.array([(0.10 + 0.03) / 2, (0.06 + 0.05) / 2, (0.13 + 0.01) / 2])
    low, high = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert cell["mean"] == pytest.approx(means.mean())
    assert cell["ci95"] == pytest.approx((high - low) / 2)
    pairs = [0.10, 0.06, 0.13, 0.03, 0.05, 0.01]
    assert cell["ci95_pairs"] == pytest.approx(stats.t.ppf(0.975, 5) * stats.sem(pairs))
    assert cell["ci95_normal"] == pytest.approx(1.96 * stats.sem(pairs))
    assert (cell["small"], cell["large"], cell["pairs"], cell["n"]) == ("R26x1", "R152x4", 6, 3)
    assert cell["by_partner"] == pytest.approx({"a": 0.29 / 3, "b": 0.03})
    assert cell["verdict"] == "above" and not notices
    assert not cells_of(tmp_path, kind="source")[0]  # both sources have 4000 images


def test_seeds_missing_in_an_arm_are_left_out_of_both_and_named(call, tmp_path):
    results = tmp_path / "results"
    runs({0: 0.5, 1: 0.5, 2: 0.9}, results, source="a", model="R26x1")
    runs({0: 0.6, 1: 0.7}, results, source="a", model="R50x1")
    runs({0: 0.4, 1: 0.4, 2: 0.4}, results, source="b", model="R26x1")
    runs({0: 0.5, 1: 0.5, 2: 0.5}, results, source="b", model="R50x1")
    (cell,), _ = cells_of(results)
    assert (cell["n"], cell["pairs"]) == (2, 4)
    assert cell["mean"] == pytest.approx((0.10 + 0.15) / 2)  # seed 2 of b would pull it down
    err = call("--figure", "gain")[2]
    assert err == (
        "synthetic-natural-target, 10-shot, larger network: R50x1 with a lacks seed 2\n"
        "seeds left out of paired differences, in so many places: 1\n"
    )
    assert "lacks counts in neither (1 cell)" in " ".join(texts("figures/gain.svg"))


def test_arms_without_a_common_seed_are_named(tmp_path):
    runs({0: 0.5}, tmp_path, model="R26x1")
    runs({1: 0.5}, tmp_path, model="R50x1")
    cells, notices = cells_of(tmp_path)
    assert not cells
    assert [line.split("network: ")[1] for line in notices] == [
        "R50x1 with synthetic-natural lacks seed 0",
        "R26x1 with synthetic-natural lacks seed 1",
    ]


def test_a_partner_with_too_few_seeds_gives_way_and_is_named(tmp_path):
    for source, seeds in (("a", range(4)), ("b", range(4)), ("c", [0])):
        for model, score in (("R26x1", 0.3), ("R50x1", 0.4)):
            runs(dict.fromkeys(seeds, score), tmp_path, source=source, model=model)
    (cell,), notices = cells_of(tmp_path)
    assert (cell["partners"], cell["n"], cell["pairs"]) == (("a", "b"), 4, 8)
    assert len(notices) == 1 and ": c counts without seed 0" in notices[0]


def test_one_pair_has_no_interval_and_that_is_said(call, tmp_path):
    runs({0: 0.5}, tmp_path / "results", model="R26x1")
    runs({0: 0.6}, tmp_path / "results", model="R50x1")
    status, out, err = call("--figure", "gain")
    assert status == 0 and "+10.0 (1)" in out
    assert "one seed, no interval: synthetic-natural-target, 10-shot, R50x1 minus R26x1" in err
    words = texts("figures/gain.svg")
    assert "no interval in 1 cell" in words and "0 of 1" not in words
    assert "×: one seed, no interval." in " ".join(words)
    (row,) = read_csv("figures/gain.csv")
    assert (row["ci95"], row["verdict"]) == ("", "no interval")


@pytest.mark.parametrize("key", ["method", "recipe"])
def test_methods_and_recipes_are_never_paired(tmp_path, key):
    runs({0: 0.5, 1: 0.6}, tmp_path, model="R26x1", **{key: "one"})
    runs({0: 0.7, 1: 0.8}, tmp_path, model="R50x1", **{key: "other"})
    assert cells_of(tmp_path) == ([], [])
    runs({0: 0.8, 1: 0.8}, tmp_path, model="R50x1", **{key: "one"})
    (cell,), _ = cells_of(tmp_path)
    assert cell["mean"] == pytest.approx(0.25) and cell[key] == "one"


def test_own_and_published_runs_are_never_paired_nor_doubled(published, tmp_path):
    about = {"target": "pets", "shots": 1, "source": "imagenet1k"}
    runs({seed: 0.1 for seed in range(5)}, tmp_path, model="R50x1", **about)
    records, skipped, doubled = tables.load([tmp_path, PUBLISHED])
    assert (len(records), skipped, doubled) == (5 + len(published), [], [])
    both, alone = (paired.gain_cells(part, "auto") for part in (records, published))
    assert [cell["mean"] for cell in both] == [cell["mean"] for cell in alone]


def test_source_gain_takes_largest_and_smallest_of_a_domain_that_share_a_network(tmp_path):
    sources = {"s": (100, 0.1), "m": (200, 0.3), "l": (300, 0.6), "x": (None, 0.9)}
    for source, (images, score) in sources.items():
        about = {"source": source, "source_images": images, "model": "R26x1"}
        runs({0: score, 1: score + 0.01}, tmp_path, **about)
    about = {"source_images": 1, "model": "R26x1"}
    runs({0: 0.0, 1: 0.0}, tmp_path, source="other", source_domain="medical", **about)
    runs({0: 0.0, 1: 0.0}, tmp_path, source="scratch", source_domain=None, **about)
    (cell,), _ = cells_of(tmp_path, kind="source")
    assert (cell["small"], cell["large"]) == ("s", "l") and cell["mean"] == pytest.approx(0.5)
    alone = {"source": "xl", "source_images": 999, "model": "R50x1"}  # no network in common
    runs({0: 0.9, 1: 0.9}, tmp_path, **alone)
    (cell,), _ = cells_of(tmp_path, kind="source")
    assert (cell["small"], cell["large"]) == ("s", "l")


def test_networks_are_the_largest_and_smallest_present(tmp_path):
    for model, score in (("R14x0.5", 0.1), ("R50x1", 0.4), ("R152x2", 0.5)):
        runs({0: score, 1: score}, tmp_path, model=model)
    (cell,), _ = cells_of(tmp_path)
    assert (cell["small"], cell["large"]) == ("R14x0.5", "R152x2")
    assert cell["mean"] == pytest.approx(0.4) and cell["verdict"] == "above"


def test_groups_within_across_and_without_pretraining(tmp_path):
    for source, domain in (("a", "natural"), ("b", "medical"), ("scratch", None)):
        for model, score in (("R26x1", 0.5), ("R50x1", 0.4)):
            about = {"source": source, "source_domain": domain, "model": model}
            runs({0: score, 1: score + 0.001}, tmp_path, **about)
    cells, _ = cells_of(tmp_path)
    assert [paired.group_words(cell) for cell in cells] == [
        "within domain, natural to natural",
        "across domains, medical to natural",
        "no pre-training, on natural",
    ]
    assert {cell["verdict"] for cell in cells} == {"below"}


@pytest.mark.parametrize(
    ("shots", "name"),
    [
        (1, "up to 10 shots"),
        (10, "up to 10 shots"),
        (11, "11 to 99 shots"),
        (99, "11 to 99 shots"),
        (100, "100 and more"),
        (500, "100 and more"),
        (None, "full"),
    ],
)
def test_regimes(shots, name):
    assert paired.regime(shots) == name


# --------------------------------------------------------------------------- figures of gains


def test_gain_panels_hold_the_differences_the_marks_and_the_counts(tmp_path):
    for shots, gain in ((1, -0.2), (100, 0.0), (None, 0.3)):
        runs({0: 0.5, 1: 0.5}, tmp_path, model="R26x1", shots=shots)
        runs({0: 0.49 + gain, 1: 0.51 + gain}, tmp_path, model="R50x1", shots=shots)
    cells, _ = cells_of(tmp_path)
    (ax,) = gains.draw_gains(cells, "").axes
    places = [bar.lines[0].get_xydata()[0].tolist() for bar in ax.containers]
    assert places == [pytest.approx(p) for p in ([-20, 0], [0, 1], [30, 2])]
    assert [bar.lines[0].get_marker() for bar in ax.containers] == ["v", "o", "^"]
    half = 100 * stats.t.ppf(0.975, 1) * 0.01
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in ax.containers]
    assert ends[2] == pytest.approx([30 - half, 30 + half])
    assert ax.get_title() == "larger network better\nin 1 of 3 cells\n▲ 1   ○ 1   ▼ 1"
    assert [text.get_text() for text in ax.texts] == ["0 of 1", "0 of 1", "1 of 1"]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [f"synthetic-natural-target, {s}" for s in ("1-shot", "100-shot", "full")]


def test_cells_without_interval_are_not_in_the_counts(tmp_path):
    for shots, seeds in ((1, [0]), (5, [0, 1])):
        for model, score in (("R26x1", 0.4), ("R50x1", 0.5)):
            runs(dict.fromkeys(seeds, score), tmp_path, model=model, shots=shots)
    cells, _ = cells_of(tmp_path)
    (ax,) = gains.draw_gains(cells, "").axes
    assert ax.get_title() == "larger network better\nin 1 of 1 cells\n▲ 1   ○ 0   ▼ 0   × 1"
    assert [text.get_text() for text in ax.texts] == ["1 of 1\nup to 10 shots"]


def write_worlds(folder, distances=True):
    """Two sources a domain, two networks, scratch; two targets; 1 shot and full; three seeds."""
    rng = np.random.default_rng(0)
    targets = {"t-natural": "natural", "t-xray": "medical"}
    sources = {"nat": ("natural", 900), "nat-0.1": ("natural", 90), "scratch": (None, 0)}
    sources |= {"xray": ("medical", 800), "xray-0.1": ("medical", 80)}
    for target, target_domain in targets.items():
        for source, (domain, images) in sources.items():
            near = domain == target_domain
            distance = {"frechet_relative": 2.0 + near, "energy": 0.3 - 0.31 * near + images / 1e4}
            for model in ("R14x0.5", "R26x1"):
                about = {"target": target, "target_domain": target_domain, "source": source}
                about |= {"source_domain": domain, "source_images": images, "model": model}
                about |= {"distance": distance} if distances and domain else {}
                for shots in (1, None):
                    place = folder / f"{target}/{source}-{model}"
                    for seed in range(3):
                        values = {
                            "accuracy": rng.uniform(0.3, 0.9),
                            "mean_auc": rng.uniform(0.5, 1),
                        }
                        write(
                            place, f"{shots}-{seed}.json", values, shots=shots, seed=seed, **about
                        )


def test_distance_points_and_line_are_those_of_scipy(call, tmp_path):
    write_worlds(tmp_path / "results")
    status, out, err = call("--figure", "distance")
    assert (status, err) == (0, "")
    rows = read_csv("figures/distance.csv")
    assert Counter(row["kind"] for row in rows) == {"network": 16, "source": 8}
    pair = [row for row in rows if row["source"] == "nat-0.1 to nat"][0]
    assert float(pair["energy"]) == pytest.approx(-0.01 + (900 + 90) / 2e4)
    for kind in ("network", "source"):
        known = [row for row in rows if row["kind"] == kind]
        y = [float(row["gain"]) for row in known]
        for key, x in (
            ("log10", [math.log10(float(row["frechet_relative"])) for row in known]),
            ("energy", [float(row["energy"]) for row in known]),
        ):
            line = stats.linregress(x, y)
            half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
            assert re.search(
                rf"{paired.GAINS[kind][2]} +\| {key}.*\| {len(x)} +"
                rf"\| {re.escape(f'{line.slope:+.3f}')} \| ± {half:.3f}",
                out,
            )
            text = f"slope {line.slope:+.3f} ± {half:.3f}".replace("-", "−")
            assert text in texts("figures/distance.svg")


def test_band_is_the_standard_error_of_the_line():
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 2, 9)
    y = 1 - 3 * x + rng.normal(size=9)
    line = paired.fit(x, y)
    (slope, offset), covariance = np.polyfit(x, y, 1, cov=True)
    design = np.stack([line["grid"], np.ones(100)], 1)
    error = np.sqrt(np.einsum("ni,ij,nj->n", design, covariance, design))
    assert line["line"] == pytest.approx(design @ [slope, offset])
    assert line["band"] == pytest.approx(stats.t.ppf(0.975, 7) * error)
    assert paired.fit([1, 2], [1, 2]) is None and paired.fit([1, 1, 1], [1, 2, 3]) is None
    assert paired.fit([], []) is None


def test_results_without_distance_say_so_in_one_line(call, tmp_path):
    write_worlds(tmp_path / "results", distances=False)
    status, out, err = call("--target", "t-natural")
    assert (status, err) == (0, "")
    assert out.count("no figure distance: no paired result has a distance") == 1
    assert "no figure published: it takes results and published.json together" in out
    assert not (tmp_path / "figures/distance.png").exists()
    assert (tmp_path / "figures/gain.png").exists() and "| larger network |" in out
    assert call("--figure", "distance", "--out", "x")[0::2] == (
        2,
        "error: no figure distance: no paired result has a distance\n",
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "value", [{"energy": 1e301}, {"frechet_relative": "3"}, [1], {"energy": True}]
)
def test_a_bad_distance_is_refused_by_file(tmp_path, value):
    with pytest.raises((TypeError, ValueError), match="distance"):
        tables.read_result(write(tmp_path, distance=value))
    assert tables.read_result(write(tmp_path, distance=None))["energy"] is None


# ---------------------------------------------------------------------- own against published


def test_own_cells_meet_published_ones_of_packs_too(call, tmp_path):
    entry = {"target": "tuberculosis", "model": "R50x1", "shots": "full"}
    values = {"mean_auc": [0.8, 0.82, 0.84]}
    records = [
        {**entry, "source": "chexpert+nih", "metrics": values},
        {**entry, "source": "nih", "metrics": values},
        {**entry, "source": "mimic", "metrics": {"mean_auc": [0.8]}},
        {**entry, "source": "chexpert", "metrics": values},
    ]
    (tmp_path / "p.json").write_text(json.dumps({"about": "", "records": records}))
    own = {"target": "tuberculosis@256", "target_domain": "medical", "source_domain": "medical"}
    own |= {"model": "R50x1", "shots": None}
    results = tmp_path / "results"
    runs({0: 0.83, 1: 0.84}, results, "mean_auc", source="nih@256+chexpert", **own)
    runs({0: 0.5, 1: 0.51, 2: 0.52}, results, "mean_auc", source="nih@224", **own)
    # Half-widths of 0.0497: a gap of 0.085 lies between the root of their squares and their sum.
    runs({0: 0.885, 1: 0.905, 2: 0.925}, results, "mean_auc", source="chexpert", **own)
    runs({0: 0.8, 1: 0.9}, results, "mean_auc", source="mimic", **own)
    runs({0: 0.8, 1: 0.9}, results, "mean_auc", source="nih", **own, method="linear")
    runs({0: 0.8, 1: 0.9}, results, "mean_auc", source="nih", **{**own, "shots": 5})
    status, out, err = call("results", "p.json", "--figure", "published")
    assert (status, err) == (0, "")
    found = {row["source"]: row["agree"] for row in read_csv("figures/published.csv")}
    assert found == {
        "nih@256+chexpert": "yes",
        "nih@224": "no",
        "mimic": "no interval",
        "chexpert": "no",
    }
    assert "agree in 1 of 3 cells; 1 without interval" in texts("figures/published.svg")
    shared = paired.shared_cells(tables.load([results, tmp_path / "p.json"])[0], "auto")
    (ax,) = figures.draw_shared(shared, "").axes
    points = {tuple(np.round(bar.lines[0].get_xydata()[0], 6)) for bar in ax.containers}
    assert points == {(0.82, 0.835), (0.82, 0.51), (0.8, 0.85), (0.82, 0.905)}


def test_both_stand_side_by_side(call, tmp_path):
    write_worlds(tmp_path / "results")
    status, out, _ = call("results", PUBLISHED, "--figure", "gain", "--target", "t-natural", "pets")
    assert status == 0 and "| own " in out and "| published " in out
    words = texts("figures/gain.svg")
    assert "within domain, natural to natural" in words
    assert "within domain, natural to natural, published" in words
    rows = read_csv("figures/gain.csv")
    assert {(row["origin"], row["target"]) for row in rows} == {
        ("own", "t-natural"),
        ("published", "pets"),
    }


# --------------------------------------------------------------------------------- full-shot


def test_bars_and_lines_of_full_shot(published):
    wanted = [run for run in published if run["target"] == "padchest"]
    panels = tables.full_shot(wanted, "auto")
    styles = figures.line_styles(tables.all_cells(wanted, "auto"))
    bars, lines = figures.draw_full_shot(panels, "", styles).axes
    (cells,) = panels.values()
    heights = sorted(patch.get_height() for patch in bars.patches)
    means = sorted(cell["mean"] for cell in cells)
    assert len(means) == 10 and heights == pytest.approx(means)
    assert [label.get_text() for label in bars.get_xticklabels()] == ["R50x1", "R152x4"]
    drawn = {line.get_xydata().shape[0] for line in lines.lines}
    assert {2, 3} <= drawn  # two natural sources, three medical ones
    assert lines.get_xscale() == "log"
    assert math.isclose(max(line.get_xdata()[-1] for line in lines.lines), 14_197_122)


def test_full_shot_table_has_a_column_a_target_and_the_best_in_bold(published):
    out = tables.full_markdown(tables.full_shot(published, "auto"))
    head = next(line for line in out.splitlines() if line.startswith("| source"))
    assert head.count("accuracy (%)") == 4
    assert "padchest, mean AUC" in head
    (row,) = [line for line in out.splitlines() if re.match(r"\| imagenet21k +\| R152x4", line)]
    assert "**0.840 ± 0.002 (5)**" in row and "0.928 ± 0.011 (5)" in row
    assert "**0.928" not in row
    rows = tables.panel_rows(tables.full_shot(published, "auto"))
    assert {row["shots"] for row in rows} == {"full"} and len(rows) == 55


def test_a_source_has_one_colour_in_all_figures(tmp_path):
    write_worlds(tmp_path)
    records = tables.load([tmp_path])[0]
    styles = figures.line_styles(tables.all_cells(records, "auto"))
    few = figures.draw_curves(tables.summarise(records, "auto"), "", styles)
    full = figures.draw_full_shot(tables.full_shot(records, "auto"), "", styles)
    far = gains.draw_distance(paired.distance_points(records, "auto"), "", styles)
    for legend in (few.legends[0], full.legends[0], far.legends[0]):
        colours = {}
        for handle, text in zip(legend.legend_handles, legend.get_texts()):
            colour = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
            colours[text.get_text().split(",")[0]] = tuple(colour)
        assert colours["nat"] == styles["nat", "natural", "R26x1", "finetune", "paper"]["color"]
        assert colours["xray-0.1"][2] > colours["xray-0.1"][0]
    packed = [{**run, "source": "nat@64"} for run in records if run["source"] == "nat"]
    both = figures.line_styles(tables.all_cells([*records, *packed], "auto"))
    names = [("nat", "natural", "R26x1"), ("nat@64", "natural", "R26x1")]
    assert len({both[(*name, "finetune", "paper")]["color"] for name in names}) == 1


# ---------------------------------------------------------------------------- input and options


def test_rules_on_bad_input_stand_under_the_figures(call, tmp_path):
    results = tmp_path / "results"
    write_worlds(results)
    write(results, "later.json", schema=2)
    first = sorted(results.rglob("1-0.json"))[0]
    again = results / "again.json"
    again.write_text(first.read_text().replace('"accuracy": 0.', '"accuracy": 0.1'))
    os.utime(first, (1_000_000, 1_000_000))
    status, _, err = call(
        "--target", "t-xray", "--figure", "fewshot", "fullshot", "gain", "distance"
    )
    assert status == 0 and 'later.json: not a result file of "schema": 1' in err
    assert (
        f"same run twice: kept results/again.json, newer than {first.relative_to(tmp_path)}" in err
    )
    for name in ("fewshot", "fullshot", "gain", "distance"):
        words = " ".join(texts(f"figures/{name}.svg"))
        assert "Left out, unreadable or of another schema: 1." in words
        assert "Runs with two results, of which the newer counts: 1." in words


def test_figure_option_draws_those_alone(call, tmp_path):
    write_worlds(tmp_path / "results")
    call("--figure", "gain", "fullshot")
    names = {path.name for path in Path("figures").iterdir()}
    assert names == {
        f"{n}.{end}" for n in ("gain", "fullshot") for end in ("png", "svg", "md", "csv")
    }
    assert call("--figure", "gains", "--out", "x")[2] == (
        "error: --figure gains is unknown: did you mean gain?\n"
    )
    first = Path("figures/gain.svg").read_bytes()
    call("--figure", "gain")
    assert Path("figures/gain.svg").read_bytes() == first
