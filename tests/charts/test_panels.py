"""charts.panels and charts.style: what is drawn where, in which look; nothing overlaps."""

import json

import pytest
from conftest import ROOT
from result_files import read_csv, texts, write, write_seeds, write_worlds
from scipy import stats

from charts import panels, results, style


def cells_of(*paths):
    return results.summarise(results.load(paths)[0], "auto")


def drawn(cells, draw=panels.draw_few_shot):
    return draw(cells, style.line_styles(cells))


def test_lines_are_drawn_at_the_means_and_bars_at_the_intervals(tmp_path):
    write_seeds(tmp_path, [0.2, 0.3], shots=1)
    write_seeds(tmp_path, [0.6, 0.7], shots=None)
    ax = drawn(cells_of(tmp_path)).axes[0]
    (line,) = ax.containers
    assert line.lines[0].get_ydata() == pytest.approx([25, 65])
    half = 100 * stats.t.ppf(0.975, 1) * 0.05  # sd / sqrt(2) is half the difference
    (bars,) = line.lines[2]
    (low, high), (_, last) = ([y for _, y in segment] for segment in bars.get_segments())
    assert (low, high, last) == pytest.approx((25 - half, 25 + half, 65 + half))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "full"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_to_seven_panels_stand_apart(tmp_path, count):
    for place in range(count):
        write(tmp_path, f"{place}.json", target=f"target{place}")
    figure = drawn(cells_of(tmp_path))
    boxes = [ax.get_tightbbox() for ax in figure.axes]  # with their labels, as drawn
    assert len(boxes) == count
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= min(box.y0 for box in boxes)


def test_domains_differ_in_hue_and_filling_models_in_marker_and_dashes(tmp_path):
    write_worlds(tmp_path)
    lines = style.line_styles(cells_of(tmp_path))
    looks = {(line.source, line.model): look for line, look in lines.items()}
    small, large = looks["nat", "R14x0.5"], looks["nat", "R26x1"]
    assert small["color"] == large["color"]
    assert small["marker"] != large["marker"] and small["linestyle"] != large["linestyle"]
    (red, _, blue, _), medical = small["color"], looks["xray", "R14x0.5"]["color"]
    assert red > blue and medical[2] > medical[0]


def test_a_pack_has_the_colour_of_what_it_holds(tmp_path):
    for source in ("nat", "nat@64", "other"):
        write_seeds(tmp_path, [0.5], source=source)
    looks = {line.source: look for line, look in style.line_styles(cells_of(tmp_path)).items()}
    assert looks["nat"]["color"] == looks["nat@64"]["color"] != looks["other"]["color"]


def test_bars_and_lines_of_full_shot():
    cells = [c for c in cells_of(ROOT / "published.json") if c.target.name == "padchest"]
    cells = results.full_shot(cells)
    bars, lines = drawn(cells, panels.draw_full_shot).axes
    means = sorted(cell.mean for cell in cells)
    heights = sorted(patch.get_height() for patch in bars.patches)
    assert len(means) == 10 and heights == pytest.approx(means)
    assert [label.get_text() for label in bars.get_xticklabels()] == ["R50x1", "R152x4"]
    points = {line.get_xydata().shape[0] for line in lines.lines}
    assert {2, 3} <= points  # two natural sources, three medical ones
    assert max(line.get_xdata()[-1] for line in lines.lines) == 14_197_122


def test_own_cells_meet_published_ones_of_packs_too(call, tmp_path):
    entry = {"target": "tuberculosis", "model": "R50x1", "shots": "full"}
    values = {"mean_auc": [0.8, 0.82, 0.84]}
    records = [{**entry, "source": name, "metrics": values} for name in ("chexpert+nih", "nih")]
    records.append({**entry, "source": "chexpert", "metrics": values})
    records.append({**entry, "source": "mimic", "metrics": {"mean_auc": [0.8]}})
    (tmp_path / "p.json").write_text(json.dumps({"about": "", "records": records}))
    own = {"target": "tuberculosis@256", "target_domain": "medical", "source_domain": "medical"}
    own |= {"model": "R50x1", "shots": None}
    for source, scores, more in (
        ("nih@256+chexpert", [0.83, 0.84], {}),
        ("nih@224", [0.5, 0.51, 0.52], {}),
        # Half-widths of 0.0497: a gap of 0.085 is above the root of their squares, below their sum.
        ("chexpert", [0.885, 0.905, 0.925], {}),
        ("mimic", [0.8, 0.9], {}),
        ("nih", [0.8, 0.9], {"method": "linear"}),
    ):
        write_seeds(tmp_path / "results", scores, "mean_auc", **{**own, "source": source, **more})
    status, out, err = call("results", "p.json", "--figure", "published")
    assert (status, err) == (0, "")
    assert {row["source"]: row["agree"] for row in read_csv("figures/published.csv")} == {
        "nih@256+chexpert": "yes",
        "nih@224": "no",
        "mimic": "no interval",
        "chexpert": "no",
    }
    assert "agree in 1 of 3 cells; 1 without interval" in texts("figures/published.svg")
