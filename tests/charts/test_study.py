"""The study's own figures, of its published numbers and of own ones beside them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from result_files import write_seeds

from charts import results, study, style
from engine.weights import PUBLISHED

NAMES = "cifar10 cifar100 covidx flowers102 padchest pets tuberculosis".split()


def cells_of(*paths):
    return study.study_cells(results.load(paths)[0], "auto")


def drawn(cells):
    return study.draw_target(cells, style.line_styles(cells)).axes


def test_metrics_are_the_papers_and_every_cell_is_a_bar(tmp_path):
    found = cells_of(ROOT / "published.json")
    assert list(found) == NAMES and sum(map(len, found.values())) == 289
    metrics = {name: {cell.metric for cell in cells} for name, cells in found.items()}
    assert metrics == dict.fromkeys(NAMES, {"accuracy"}) | {"padchest": {"mean_auc"}}
    write_seeds(tmp_path, [0.7, 0.8], "mean_auc", target="nih", target_domain="medical")
    assert [cell.metric for cell in cells_of(tmp_path)["nih"]] == ["mean_auc"]

    bars, natural, medical, networks = drawn(found["padchest"])
    heights = sorted(patch.get_height() for patch in bars.patches)
    assert heights == pytest.approx(sorted(cell.mean for cell in found["padchest"]))
    assert [label.get_text() for label in bars.get_xticklabels()] == [
        *("1-shot", "5-shot", "10-shot", "100-shot", "full")
    ]
    assert len(natural.containers) == 2 * 2 and len(medical.containers) == 3 * 2
    # A line a source over the networks, ± one standard deviation.
    assert len(networks.containers) == 5
    (cell,) = (
        cell
        for cell in found["padchest"]
        if (cell.line.source, cell.line.model, cell.shots) == ("imagenet21k", "R152x4", None)
    )
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
                assert (known <= PUBLISHED.keys()) == (source not in ("mimic", "nih", "padchest"))
    runs = results.load([ROOT / "published.json"])[0]
    published = {(run.target.name, run.line.source, run.line.model, run.shots) for run in runs}
    assert len(cells) == len(published) == 289 and set(cells) == published


def test_own_results_stand_beside_published_ones(call, tmp_path):
    about = {"target": "cifar10", "source": "imagenet1k", "model": "R50x1", "shots": 10}
    write_seeds(tmp_path / "results", [0.7, 0.8], **about)
    found = cells_of(tmp_path / "results", ROOT / "published.json")["cifar10"]
    bars = drawn(found)[0].patches
    assert sorted({bar.get_alpha() for bar in bars}) == [0.5, 1] and len(bars) == 4 * 6 + 1
    (own,) = (bar for bar in bars if bar.get_alpha() == 1)
    assert own.get_height() == pytest.approx(75)
    published = "results", ROOT / "published.json", "--target", "cifar10"
    status, out, err = call(*published, "--style", "paper")
    assert (status, err) == (0, "") and "study-cifar10.png" in out
    assert "cifar10 (natural target, published)" in Path("figures/study-cifar10.md").read_text()
    assert call("--style", "paper", "--figure", "gain")[0] == 2
