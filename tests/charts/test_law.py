"""charts.law: coverage of its intervals and the level of its test on data from a known law; least
squares beside scikit-learn; exponents by hand."""

import math

import numpy as np
import pytest
import torch
from result_files import PUBLISHED, write_seeds
from sklearn.linear_model import LinearRegression

import models
from charts import law, results
from charts.results import Target

DRAWS = 1000
FAMILIES = (("natural", "natural"), ("medical", "natural"))


def known_rows(tasks, seed=0):
    """Rows of tasks with two to five targets each, two families, three numbers of shots."""
    rng, rows = np.random.default_rng(seed), []
    for task in range(tasks):
        for gap in range(2 + task % 4):
            target = Target(f"t{task}~{gap}", "natural", "own")
            for family in FAMILIES:
                distance = rng.uniform(0, 1.2)
                for shots in (1, 10, 100):
                    decades = math.log10(shots / 10), distance
                    rows.append(law.Row(target, f"t{task}", family, shots, {}, *decades))
    return rows


def drawn(rows, x, coefficients, slope=0.05, seed=1):
    """Exponents (N, DRAWS) of a law; a task is off by a constant and by a slope of the distance."""
    rng = np.random.default_rng(seed)
    noise = {row.task: rng.normal(size=(3, DRAWS)) for row in rows}
    y = np.tile((x @ coefficients)[:, None], DRAWS)
    y += [0.05 * noise[row.task][0] + slope * row.d * noise[row.task][1] for row in rows]
    return y + 0.02 * rng.normal(size=y.shape)


@pytest.mark.parametrize("tasks", (5, 7, 10))
def test_intervals_cover_and_the_permutation_keeps_its_level(tasks):
    rows = known_rows(tasks)
    names = np.array([row.task for row in rows])
    terms, x = law.design(rows)
    true = np.array([{"a": 0.15, "b": 0.05, "c": -0.12, "e": -0.03}[letter] for letter, _ in terms])
    y = drawn(rows, x, true)
    found = law.solve(x, y)
    without = [law.solve(x[names != task], y[names != task]) for task in np.unique(names)]
    changes, errors = np.stack(without) - found, found - true[:, None]
    covered = []
    for contrast in (*np.eye(len(terms)), *(x[:2] - x[-2:])):
        half = law.half_width(changes, contrast, terms, rows)
        covered.append(np.mean(np.abs(contrast @ errors) <= half))
    assert 0.92 <= np.mean(covered) <= 0.98 and 0.92 <= min(covered) <= max(covered) <= 0.99
    reach = law.prediction_reach(x, y, names)
    assert 0.92 <= np.mean(np.abs(law.predict_tasks(x, y, names) - y) <= reach) <= 0.98
    free = np.where([letter in "ce" for letter, _ in terms], 0, true)
    p = law.permutation_p(rows, drawn(rows, x, free, 0, seed=2), draws=99)
    assert 0.03 <= np.mean(p <= 0.05) <= 0.07


def test_fit_and_left_out_tasks_are_those_of_scikit_learn():
    rows = known_rows(5)
    _, x = law.design(rows)
    y = drawn(rows, x, np.ones(x.shape[1]))[:, 0]
    by_seed = [{0: value - 0.01, 1: value + 0.01} for value in y]
    rows = [row._replace(by_seed=values) for row, values in zip(rows, by_seed)]
    found = law.law((), rows)
    assert "".join(letter for letter, _ in found.terms) == "ababce"
    families = [family for _, family in found.terms]
    assert families == [*FAMILIES[1:] * 2, *FAMILIES[:1] * 2, None, None]
    line = LinearRegression(fit_intercept=False)
    assert found.coefficients == pytest.approx(line.fit(x, y).coef_)
    names = np.array([row.task for row in rows])
    columns = {"B0": np.stack([np.ones(len(x)), x[:, 1] + x[:, 3]], 1), "B1": x[:, :4], "law": x}
    for name, part in columns.items():
        squares = []
        for task in set(names):
            out = names == task
            squares += list((line.fit(part[~out], y[~out]).predict(part[out]) - y[out]) ** 2)
        assert found.rmse[name] == pytest.approx(np.mean(squares) ** 0.5)
    assert found.p < 0.05 and found.coverage > 0.8
    moved = (x @ found.changes.T) ** 2  # of each fitted value, by unit
    expected = np.median(moved[:, -2:].sum(1) / moved.sum(1))
    assert found.seed_share == pytest.approx(expected) and 0 < expected < 1
    without = [line.fit(x[names != task], y[names != task]).coef_ for task in np.unique(names)]
    assert found.changes[:-2] == pytest.approx(np.stack(without) - found.coefficients, abs=1e-7)
    # Each seed alone moves both constants by 0.01, and nothing else.
    expected = np.outer([1, -1], [0.01, 0, 0.01, 0, 0, 0])
    assert found.changes[-2:] == pytest.approx(expected, abs=1e-9)


def test_networks_are_as_large_as_their_parameters():
    by_size = sorted(law.PARAMETERS, key=law.PARAMETERS.get)
    assert sorted(by_size, key=results.size_order) == by_size


def test_a_family_of_one_task_has_no_interval_and_is_not_predicted():
    rows = [row for row in known_rows(6) if row.task == "t0" or row.family == FAMILIES[0]]
    rows = [row._replace(by_seed={None: row.s}) for row in rows]
    found = law.law((), rows)
    alone = [row.family == FAMILIES[1] for row in found.rows]
    assert np.isnan(found.predicted).tolist() == alone
    families = [family for _, family in found.terms]
    assert np.isnan(found.ci95).tolist() == [family == FAMILIES[1] for family in families]
    assert math.isnan(found.seed_share)
    few = law.law((), [r for r in rows if r.task in ("t1", "t2", "t3")])
    assert not few.terms and few.rows and math.isnan(few.coverage)


def test_distances_are_traded_within_tasks():
    rows = known_rows(7)
    lists = law.trading(rows)
    assert sorted(map(len, lists)) == [2, 2, 3, 3, 4, 4, 5]
    assert all(len({target.name.split("~")[0] for target in targets}) == 1 for targets in lists)
    lone = [row for row in rows if row.target.name.endswith("~0")]  # tasks of one target
    lone = [row for row in lone if row.task != "t0" or row.family == FAMILIES[0]]
    assert sorted(map(len, law.trading(lone))) == [1, 6]


def test_exponents_by_hand(tmp_path):
    about = {"config": {"test_images": 100, "train_images": 4000}, "target": "pets~0.4"}
    seeds = {"": ([0.5, 0.7], [0.6, 0.8]), "-seed1": ([0.6, 0.6], [1.0, 1.0])}  # of pre-training
    for number, (seed, (small, large)) in enumerate(seeds.items()):
        for model, scores in (("R14x0.5", small), ("R26x1", large)):
            more = {"model": model, "distance": {"frechet_relative": 10 + number}}
            more |= {"run": f"nih-{model}{seed}", "shots": None}
            write_seeds(tmp_path, scores, **about, **more)
    write_seeds(tmp_path, {0: 0.1}, **about, model="R26x0.5", source="else")
    (found,) = law.laws(results.load([tmp_path])[0], "auto")
    (row,) = found.rows
    decades = math.log10(13_938_496 / 2_007_328)
    # 0.4 -> 0.3; and 0.4 -> 0, that is half a test image in 100
    by_seed = {"": math.log10(0.4 / 0.3) / decades, "seed1": math.log10(0.4 / 0.005) / decades}
    assert row.by_seed == pytest.approx(by_seed) and row.exponent == sum(row.by_seed.values()) / 2
    assert row.task == "pets"
    assert row.s == pytest.approx(2)  # 4000 images of 4 classes
    assert row.d == pytest.approx(math.log10(110) / 2)


def test_exponents_of_the_study():
    found = law.laws(results.load([PUBLISHED])[0], "auto")
    assert [one.about[0] for one in found] == ["network", "source"]
    rows = found[0].rows
    few = [r.exponent for r in rows if (r.target.name, r.shots) == ("pets", 10)]
    # Mean over both ImageNets of log10 of the ratio of errors, over log10(928.3 M / 23.5 M).
    assert few == pytest.approx([0.157], abs=5e-4)
    families = {("natural", "natural"), ("natural", "medical"), ("medical", "medical")}
    assert {row.family for row in rows} == families


def test_parameters_are_those_of_the_networks():
    with torch.device("meta"):
        networks = {name: models.create_model(name, 1) for name in models.MODELS}
    assert law.PARAMETERS == {
        name: sum(p.numel() for key, p in network.named_parameters() if "head.conv" not in key)
        for name, network in networks.items()
    }
