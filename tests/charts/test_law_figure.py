"""charts.law_figure and its tables: what is drawn and said of a law that is known."""

import math

import numpy as np
import pytest
from result_files import read_csv, texts, write

from charts import law, law_figure, results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of a law without noise: a decade of parameters takes off 0.2 - 0.1 d decades within
    and 0.1 - 0.1 d across domains, a decade of images as much."""
    folder, rng = tmp_path_factory.mktemp("law"), np.random.default_rng(0)
    for task, gap in ((task, gap) for task in range(4) for gap in ("0", "0.5")):
        for source in ("natural", "medical"):
            distance = float(rng.uniform(1, 12))
            power = (0.2 if source == "natural" else 0.1) - 0.1 * math.log10(distance)
            for images in (100, 1000):
                for model in ("R14x0.5", "R26x1"):
                    for shots in (1, 10):
                        scale = images / 100 * law.PARAMETERS[model] / law.PARAMETERS["R14x0.5"]
                        about = {"source": f"{source}-{images}", "source_domain": source}
                        about |= {"source_images": images, "target": f"t{task}~{gap}"}
                        about |= {"model": model, "shots": shots, "method": "linear"}
                        about |= {"distance": {"frechet_relative": distance}, "recipe": None}
                        name = "-".join(map(str, (*about.values(),))).replace("/", "")[:80]
                        scores = {"accuracy": 1 - 0.8 * scale**-power}
                        write(folder, f"{name}.json", scores, **about)
    return folder


def test_the_law_is_found_and_said(call, folder):
    status, out, err = call(folder, "--figure", "law")
    assert (status, err) == (0, "")
    for line in ("| a           | natural → natural       | +0.200 ", "| c           | all "):
        assert out.count(line) == 2  # of the network and of the source
    assert out.count("| c           | all                     | -0.100   | ± 0.000 ") == 2
    # Of the 16 trades of two gaps in four tasks the observed one is the best.
    assert out.count("| 0.000 | 0.000  | 0.000  | 0.061 | 100 %             | –  ") == 2
    words = " ".join(texts("figures/law.svg"))
    assert "ten times the distance: -0.100 ± 0.000" in words and "p = 0.061" in words
    assert "one pre-training seed: its noise is not in the band" in words
    rows = read_csv("figures/law.csv")
    assert len(rows) == 64 and {row["kind"] for row in rows} == {"network", "source"}
    for row in rows:
        expected = (0.2 if row["source_domain"] == "natural" else 0.1) - 0.1 * float(
            row["log10_distance"]
        )
        assert float(row["exponent"]) == pytest.approx(expected)
        assert float(row["predicted"]) == pytest.approx(expected, abs=1e-6)


def test_points_lie_where_they_should(folder):
    (network, _) = laws = law.laws(results.load([folder])[0], "auto")
    left, right = law_figure.draw_law(laws, {}).axes[:2]
    points = [line.get_xydata()[0] for line in left.lines if line.get_marker() in "oD"]
    assert np.array(points) == pytest.approx(
        np.array([(10**row.d, row.exponent) for row in network.rows])
    )
    faces = {(ln.get_marker(), ln.get_markerfacecolor() == "white") for ln in right.lines[:-1]}
    assert {("o", False), ("D", True)} == {face for face in faces if face[0] in "oD"}
