"""charts.law: coverage of its intervals and the level of its test on data from a known law; least
squares beside scikit-learn; exponents by hand."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from charts import law
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
                    rows.append(law.Row(target, f"t{task}", family, shots, ("s", "l"), {}, *decades))
    return rows


def drawn(rows, x, coefficients, slope=0.05, seed=1):
    """Exponents (N, DRAWS) of a law; a task is off by a constant and by a slope of the distance."""
    rng = np.random.default_rng(seed)
    noise = {row.task: rng.normal(size=(3, DRAWS)) for row in rows}
    y = np.tile((x @ coefficients)[:, None], DRAWS)
    y += [0.05 * noise[row.task][0] + slope * row.distance_decades * noise[row.task][1] for row in rows]
    return y + 0.02 * rng.normal(size=y.shape)


@pytest.mark.parametrize("tasks", (5, 7, 10))
def test_intervals_cover_and_the_permutation_keeps_its_level(tasks):
    rows = known_rows(tasks)
    names = np.array([row.task for row in rows])
    terms, x = law.design(rows)
    true = np.array([{"a": 0.15, "b": 0.05, "c": -0.12, "e": -0.03}[letter] for letter, _ in terms])
    y = drawn(rows, x, true)
    changes, found = law.changes_without(x, y, names), law.solve(x, y)
    contrasts = [*np.eye(len(terms)), *(x[:2] - x[-2:])]
    covered = []
    for contrast in contrasts:
        half = law.half_width(changes, contrast, law.degrees(terms, contrast, rows))
        covered.append(np.mean(np.abs(contrast @ (found - true[:, None])) <= half))
    print(tasks, np.round(covered, 3))
    predicted = law.predict_tasks(x, y, names)
    inside = np.abs(predicted - y) <= law.prediction_reach(x, y, names)
    print(inside.mean())
    free = np.array([0 if letter in "ce" else value for (letter, _), value in zip(terms, true)])
    p = law.permutation_p(rows, drawn(rows, x, free, 0, seed=2), draws=99)
    print(np.mean(p <= 0.05))
