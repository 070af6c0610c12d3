"""charts.panels and charts.style: what is drawn where, in which look; nothing overlaps; the study's
own figures."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from result_files import PUBLISHED, write, write_seeds
from scipy import stats

from charts import panels, results, style
from engine import weights

NAMES = "cifar10 cifar100 covidx flowers102 padchest pets tuberculosis".split()


def study_of(*paths):
    return panels.study_cells(results.load(paths)[0], "auto")


def drawn(cells, draw=panels.draw_few_shot):
    return draw(cells, style.line_styles(cells))


def test_lines_are_drawn_at_the_means_and_bars_at_the_intervals(tmp_path):
    write_seeds(tmp_path, [0.2, 0.3], shots=1)
    write_seeds(tmp_path, [0.6, 0.7], shots=None)
    ax = drawn(results.summarise(results.load([tmp_path])[0], "auto")).axes[0]
    (line,) = ax.containers
    assert line.lines[0].get_ydata() == pytest.approx([25, 65])
    half = 100 * stats.t.ppf(0.975, 1) * 0.05  # sd / sqrt(2) is half the difference
    (bars,) = line.lines[2]
    (low, high), (_, last) = ([y for _, y in segment] for segment in bars.get_segments())
    assert (low, high, last) == pytest.approx((25 - half, 25 + half, 65 + half))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "full"]


def test_metrics_are_the_papers_and_every_cell_is_a_bar(tmp_path):
    found = study_of(PUBLISHED)
    assert list(found) == NAMES and sum(map(len, found.values())) == 289
    metrics = {name: {cell.metric for cell in cells} for name, cells in found.items()}
    assert metrics == dict.fromkeys(NAMES, {"accuracy"}) | {"padchest": {"mean_auc"}}
    write_seeds(tmp_path, [0.7, 0.8], "mean_auc", target="nih", target_domain="medical")
    assert [cell.metric for cell in study_of(tmp_path)["nih"]] == ["mean_auc"]

    bars, natural, medical, networks = drawn(found["padchest"], panels.draw_study).axes
    heights = sorted(patch.get_height() for patch in bars.patches)
    assert heights == pytest.approx(sorted(cell.mean for cell in found["padchest"]))
    shots = [label.get_text() for label in bars.get_xticklabels()]
    assert shots == ["1-shot", "5-shot", "10-shot", "100-shot", "full"]
    assert len(natural.containers) == 2 * 2 and len(medical.containers) == 3 * 2
    # A line a source over the networks, ± one standard deviation.
    assert len(networks.containers) == 5
    cells = results.group(found["padchest"], "line.source", "line.model", "shots")
    (cell,) = cells["imagenet21k", "R152x4", None]
    ends = [line.lines[2][0].get_segments()[1][:, 1] for line in networks.containers]
    assert any(np.allclose(end, [cell.mean - cell.sd, cell.mean + cell.sd]) for end in ends)


def test_the_table_of_commands_names_each_published_cell_once():
    cells = []
    for line in (ROOT / "docs/results.md").read_text().splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if len(words) == 5 and words[0] in NAMES:
            target, sources, networks, shots, count = words
            row = [
                (target, source, network, int(shot) if shot != "full" else None)
                for source in sources.split(", ")
                for network in networks.split(", ")
                for shot in shots.split()
            ]
            assert len(row) == int(count)
            cells += row
            for source in sources.split(", "):  # what the command names, or what is said below it
                known = {f"study:{source}-{network}" for network in networks.split(", ")}
                assert (known <= weights.PUBLISHED.keys()) == (
                    source not in ("mimic", "nih", "padchest")
                )
    runs = results.load([PUBLISHED])[0]
    published = {(run.target.name, run.line.source, run.line.model, run.shots) for run in runs}
    assert len(cells) == len(published) == 289 and set(cells) == published


def test_own_results_stand_beside_published_ones(call, tmp_path):
    about = {"target": "cifar10", "source": "imagenet1k", "model": "R50x1", "shots": 10}
    write_seeds(tmp_path / "results", [0.7, 0.8], **about)
    found = study_of(tmp_path / "results", PUBLISHED)["cifar10"]
    bars = drawn(found, panels.draw_study).axes[0].patches
    assert sorted({bar.get_alpha() for bar in bars}) == [0.5, 1] and len(bars) == 4 * 6 + 1
    (own,) = (bar for bar in bars if bar.get_alpha() == 1)
    assert own.get_height() == pytest.approx(75)
    argv = "results", PUBLISHED, "--target", "cifar10", "--style", "paper"
    status, out, err = call(*argv)
    assert (status, err) == (0, "") and "study-cifar10.png" in out
    assert "cifar10 (natural target, published)" in Path("figures/study-cifar10.md").read_text()
    assert call("--style", "paper", "--figure", "gain")[0] == 2
    write(tmp_path / "none", metrics=dict.fromkeys(results.METRICS))
    for more in (), ("--style", "paper"), ("--figure", "gain"):
        status, _, err = call("none", *more)
        assert status == 2 and "none of the results has a metric that is defined" in err
