"""charts.gain_figures: the gains and points as drawn, and what is said of them."""

from collections import Counter

import pytest
from conftest import ROOT
from result_files import read_csv, texts, write_seeds, write_worlds
from scipy import stats

from charts import gain_figures, gains, results

PUBLISHED = ROOT / "published.json"


def drawn(folder):
    """The axes of the only panel of the network gains of a folder."""
    found, _ = gains.paired_gains(results.load([folder])[0], "auto")
    (ax,) = gain_figures.draw_gains(found, {}).axes
    return ax


def test_gain_panels_hold_the_differences_the_marks_and_the_counts(tmp_path):
    for shots, gain in ((1, -0.2), (100, 0.0), (None, 0.3)):
        write_seeds(tmp_path, [0.5, 0.5], model="R26x1", shots=shots)
        write_seeds(tmp_path, [0.49 + gain, 0.51 + gain], model="R50x1", shots=shots)
    ax = drawn(tmp_path)
    places = [bar.lines[0].get_xydata()[0].tolist() for bar in ax.containers]
    assert places == [pytest.approx(p) for p in ([-20, 0], [0, 1], [30, 2])]
    assert [bar.lines[0].get_marker() for bar in ax.containers] == ["v", "o", "^"]
    half = 100 * stats.t.ppf(0.975, 1) * 0.01
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in ax.containers]
    assert ends[2] == pytest.approx([30 - half, 30 + half])
    assert ax.get_title() == "larger network better\nin 1 of 3 cells\n▲ 1   ○ 1   ▼ 1   × 0"
    assert [text.get_text() for text in ax.texts] == ["0 of 1", "0 of 1", "1 of 1"]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [f"synthetic-natural-target, {s}" for s in ("1-shot", "100-shot", "full")]


def test_one_pair_has_no_interval_and_that_is_said(call, tmp_path):
    write_seeds(tmp_path / "results", [0.5], model="R26x1")
    write_seeds(tmp_path / "results", [0.6], model="R50x1")
    status, out, err = call("--figure", "gain")
    assert status == 0 and "+10.0 (1)" in out
    assert "one seed, no interval: synthetic-natural-target, 10-shot, R50x1 minus R26x1" in err
    assert "▲ 0   ○ 0   ▼ 0   × 1" in texts("figures/gain.svg")
    (row,) = read_csv("figures/gain.csv")
    assert (row["ci95"], row["verdict"]) == ("", "no interval")


def test_published_gains_are_drawn_beside_own_ones(call, tmp_path):
    write_worlds(tmp_path / "results")
    status, out, err = call("results", PUBLISHED, "--figure", "gain")
    assert status == 0 and "| own " in out and "| published " in out
    assert "pets, 1-shot, larger network: R50x1 with imagenet1k lacks seed 4" in err
    words = texts("figures/gain.svg")
    assert "in 20 of 20 cells" in words and "0 of 9" in words
    headings = {f"within domain, natural to natural{end}" for end in ("", ", published")}
    assert headings <= set(words)
    assert "A seed that one arm lacks counts in neither (9 cells)." in " ".join(words)
    rows = [row for row in read_csv("figures/gain.csv") if row["origin"] == "published"]
    assert Counter(row["n"] for row in rows) == {"5": 95, "4": 9}
