"""charts.panels and charts.style: what is drawn where, in which look; nothing overlaps."""

import pytest
from result_files import write, write_seeds, write_worlds
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
    assert figure.texts[-1].get_window_extent().y1 <= legend.get_window_extent().y0


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
