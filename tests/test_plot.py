"""plot.py: the numbers in the table, the figures' lines, and what it does with bad input."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from scipy import stats

import plot
from charts import curves
from charts import panels as figures
from charts import results as tables

FILES = ["fewshot.csv", "fewshot.md", "fewshot.png", "fewshot.svg"]


def write(folder, name="run.json", metrics=(), **values):
    """Write one result file of the schema and return its path; values replace its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"accuracy": 0.5, "mean_auc": 0.6, "mean_ap": 0.4, "top5": None, "loss": 1.0}
    scores["per_class"] = {str(label): {"auc": 0.6} for label in range(4)}
    result = {
        "schema": 1,
        "kind": "fewshot",
        "source": "synthetic-natural",
        "source_domain": "natural",
        "source_images": 4000,
        "model": "R14x0.5",
        "target": "synthetic-natural-target",
        "target_domain": "natural",
        "shots": 10,
        "seed": 0,
        "method": "finetune",
        "recipe": "paper",
        "metrics": {**scores, **dict(metrics)},
        **values,
    }
    path = folder / name
    path.write_text(json.dumps({k: v for k, v in result.items() if v is not ...}))
    return path


def write_seeds(folder, scores, metric="accuracy", **values):
    """One file a seed, under a name of its own."""
    for seed, score in enumerate(scores):
        name = "-".join(str(value) for value in [*values.values(), seed]) + ".json"
        write(folder, name.replace("/", "_"), {metric: score}, seed=seed, **values)


def write_grid(folder):
    """Two targets x (none, natural, medical) x 2 models x (1, 10, full) x 2 seeds."""
    sources = [("scratch", None), ("synthetic-natural", "natural"), ("synthetic-xray", "medical")]
    targets = [("synthetic-natural-target", "natural"), ("synthetic-xray-target", "medical")]
    for target, target_domain in targets:
        for source, source_domain in sources:
            for model in ("R14x0.5", "R26x1"):
                for shots in (1, 10, None):
                    about = {"target": target, "target_domain": target_domain, "source": source}
                    about |= {"source_domain": source_domain, "model": model, "shots": shots}
                    write_seeds(folder, (0.3, 0.4), **about)


def read_csv(path="figures/fewshot.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 10, 29, 100, 999])
def test_t_quantile_is_that_of_scipy(degrees):
    assert tables.t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


def test_table_and_csv_hold_mean_deviation_interval_and_count(call, tmp_path):
    scores = [0.50, 0.60, 0.70, 0.40]  # mean 0.55, squared deviations 0.05, sd sqrt(0.05 / 3)
    write_seeds(tmp_path / "results", scores)
    status, out, err = call()
    assert (status, err) == (0, "")
    assert "55.0 ± 12.9 (4)" in out
    assert out.startswith("### synthetic-natural-target (natural target): accuracy (%)")
    (row,) = read_csv()
    sd = math.sqrt(0.05 / 3)
    assert float(row["mean"]) == pytest.approx(0.55)
    assert float(row["sd"]) == pytest.approx(sd)
    low, high = stats.t.interval(0.95, 3, loc=0.55, scale=sd / 2)
    assert float(row["ci95"]) == pytest.approx((high - low) / 2)
    del row["mean"], row["sd"], row["ci95"]
    assert row == {
        "target": "synthetic-natural-target",
        "target_domain": "natural",
        "source": "synthetic-natural",
        "source_domain": "natural",
        "model": "R14x0.5",
        "method": "finetune",
        "recipe": "paper",
        "shots": "10",
        "metric": "accuracy",
        "n": "4",
    }


def test_medical_targets_show_auc_with_three_decimals_unless_told(call, tmp_path):
    write_seeds(tmp_path / "results", [0.8, 0.9], "mean_auc", target_domain="medical", shots=None)
    out = call()[1]
    assert "mean AUC" in out and "0.850 ± 0.071 (2)" in out
    assert re.search(r"\| source +\| model +\| full +\|", out)
    assert "40.0" not in out and "0.400 ± 0.000 (2)" in call("--metric", "mean_ap")[1]


def test_one_seed_has_no_interval(call, tmp_path):
    write(tmp_path / "results")
    out = call()[1]
    assert "| 50.0 (1) |" in out
    (row,) = read_csv()
    assert (row["mean"], row["sd"], row["ci95"], row["n"]) == ("0.5", "", "", "1")
    assert "no interval with one seed" in Path("figures/fewshot.svg").read_text()


def test_null_metrics_are_left_out_and_not_counted(call, tmp_path):
    write_seeds(tmp_path / "results", [0.2, None, 0.4])
    write_seeds(tmp_path / "results", [None, None], source="synthetic-xray")
    out = call()[1]
    assert "30.0 ± 14.1 (2)" in out
    assert "undefined (0)" in out
    counts = {row["source"]: (row["n"], row["mean"]) for row in read_csv()}
    assert counts["synthetic-natural"][0] == "2"
    assert counts["synthetic-xray"] == ("0", "")


def test_bold_marks_the_best_and_what_its_noise_covers(call, tmp_path):
    results = tmp_path / "results"
    write_seeds(results, [0.70, 0.72, 0.74], source="best")
    write_seeds(results, [0.66, 0.70, 0.74], source="near")  # gap 0.02 < sqrt(0.05² + 0.10²)
    write_seeds(results, [0.51, 0.52, 0.53], source="far")  # gap 0.20 > sqrt(0.05² + 0.02²)
    write_seeds(results, [0.719], source="single")  # nearest of all, but its noise is unknown
    bold = {line.split("|")[1].strip() for line in call()[1].splitlines() if "**" in line}
    assert bold == {"best", "near"}
    assert "Bold: the best mean of a column" in Path("figures/fewshot.md").read_text()


def test_a_single_seed_is_bold_only_as_the_best(call, tmp_path):
    write_seeds(tmp_path / "results", [0.9], source="single")
    write_seeds(tmp_path / "results", [0.1, 0.99], source="noisy")
    bold = [line for line in call()[1].splitlines() if "**" in line]
    assert len(bold) == 1 and "single" in bold[0]


@pytest.mark.parametrize("field", ["method", "recipe"])
def test_methods_and_recipes_part_lines_and_are_named_only_when_they_differ(call, tmp_path, field):
    write(tmp_path / "results", "a.json", {"accuracy": 0.2})
    assert f"| {field}" not in call()[1]
    assert "R14x0.5, " not in Path("figures/fewshot.svg").read_text()
    write(tmp_path / "results", "b.json", {"accuracy": 0.6}, **{field: "other"})
    out = call()[1]
    assert f"| {field}" in out and "20.0 (1)" in out and "60.0 (1)" in out
    assert "synthetic-natural, R14x0.5, other" in Path("figures/fewshot.svg").read_text()


# -------------------------------------------------------------------------------------- figures


def test_figure_has_one_line_a_source_and_model_and_names_in_text(tmp_path):
    """As a user runs it: a process of its own, no argument, results in the working folder."""
    write_grid(tmp_path / "results")
    command = [sys.executable, ROOT / "plot.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(FILES) < {path.name for path in (tmp_path / "figures").iterdir()}
    assert all(f"wrote figures/{name}" in done.stdout for name in FILES)
    png = (tmp_path / "figures/fewshot.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    svg = (tmp_path / "figures/fewshot.svg").read_text()
    lines = re.findall(r'id="line (\S+) (\S+) ', svg)
    assert len(lines) == 2 * 3 * 2 and len(set(lines)) == 2 * 3
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for source in ("scratch", "synthetic-natural", "synthetic-xray"):
        assert [texts.count(f"{source}, {model}") for model in ("R14x0.5", "R26x1")] == [1, 1]
    for text in ("synthetic-xray-target", "medical target", "accuracy (%)", "mean AUC", "full"):
        assert text in texts
    assert "(1/4)" in texts and "(0.5)" in texts  # chance


def test_lines_are_drawn_at_the_means_and_bars_at_the_intervals(tmp_path):
    write_seeds(tmp_path, (0.2, 0.3), shots=1)
    write_seeds(tmp_path, (0.6, 0.7), shots=None)
    panels = tables.summarise(tables.load([tmp_path])[0], "auto")
    ax = figures.draw_curves(panels, "").axes[0]
    (drawn,) = ax.containers
    assert drawn.lines[0].get_ydata() == pytest.approx([25, 65])
    half = 100 * stats.t.ppf(0.975, 1) * 0.05  # sd / sqrt(2) is half the difference
    (bars,) = drawn.lines[2]
    (low, high), (_, last) = ([y for _, y in segment] for segment in bars.get_segments())
    assert (low, high, last) == pytest.approx((25 - half, 25 + half, 65 + half))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "full"]


@pytest.mark.parametrize("count", range(1, 8))
def test_one_to_seven_panels_stand_apart(tmp_path, count):
    for place in range(count):
        write(tmp_path, f"{place}.json", target=f"target{place}")
    figure = figures.draw_curves(tables.summarise(tables.load([tmp_path])[0], "auto"), "")
    boxes = [ax.get_tightbbox() for ax in figure.axes]  # with their labels, as drawn
    assert len(boxes) == count
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= min(box.y0 for box in boxes)


def test_same_input_gives_the_same_bytes_and_the_title_is_shown(call, tmp_path):
    write(tmp_path / "results")
    figures = []
    for title in ("A $title$", "", ""):
        assert call("--title", title)[0] == 0
        figures.append(Path("figures/fewshot.svg").read_bytes())
    assert b">A $title$</text>" in figures[0] and b"A $title$" not in figures[1]
    assert figures[1] == figures[2]


def test_domains_differ_in_hue_and_filling_models_in_marker_and_dashes(tmp_path):
    write_grid(tmp_path)
    panels = tables.summarise(tables.load([tmp_path])[0], "auto")
    cells = [cell for panel in panels.values() for cell in panel]
    styles = {(line[1], line[2]): style for line, style in figures.line_styles(cells).items()}
    small, large = styles["natural", "R14x0.5"], styles["natural", "R26x1"]
    assert small["color"] == large["color"]
    assert small["marker"] != large["marker"] and small["linestyle"] != large["linestyle"]
    faces = {styles[domain, "R26x1"]["markerfacecolor"] for domain in ("natural", "medical", None)}
    assert len(faces) == 3
    red, _, blue, _ = small["color"]
    assert red > blue
    red, _, blue, _ = styles["medical", "R14x0.5"]["color"]
    assert blue > red


# ------------------------------------------------------------------------------------ bad input


def test_unusable_files_are_skipped_named_and_counted(call, tmp_path):
    results = tmp_path / "results"
    write(results, "good.json")
    (results / "broken.json").write_text('{"schema": 1')
    (results / "foreign.json").write_text("[1, 2]")
    write(results, "later.json", schema=2)
    write(results, "lacking.json", model=...)
    write(results, "text.json", {"accuracy": "0.5"})
    status, out, err = call()
    assert status == 0 and "50.0 (1)" in out
    *named, closing = err.splitlines()
    assert [Path(line.split(": ")[0].split()[1]).stem for line in named] == [
        "broken",
        "foreign",
        "lacking",
        "later",
        "text",
    ]
    assert "no model" in named[2] and "schema" in named[3] and "accuracy is '0.5'" in named[4]
    assert closing == "files skipped: 5"


@pytest.mark.parametrize(
    ("metrics", "values"),
    [
        ({"accuracy": math.nan}, {}),
        ({"accuracy": True}, {}),
        ({"accuracy": 55.0}, {}),
        ({}, {"metrics": {"accuracy": 0.5}}),
        ({}, {"metrics": None}),
        ({}, {"kind": "pretrain"}),
        ({}, {"shots": 0}),
        ({}, {"shots": "10"}),
        ({}, {"target_domain": "satellite"}),
        ({}, {"source": None}),
    ],
)
def test_each_fault_is_found(tmp_path, metrics, values):
    assert tables.read_result(write(tmp_path))["accuracy"] == 0.5
    with pytest.raises((TypeError, ValueError)):
        tables.read_result(write(tmp_path, metrics=metrics, **values))


def test_after_five_names_only_the_number_is_said(call, tmp_path):
    write(tmp_path / "results", "good.json")
    for place in range(8):
        (tmp_path / f"results/bad{place}.json").write_text("{}")
    err = call()[2].splitlines()
    assert len(err) == 6 and err[-1] == "files skipped: 8"


def test_newest_of_two_files_of_one_run_is_kept_and_said(call, tmp_path):
    older = write(tmp_path / "results", "b.json", {"accuracy": 0.9})
    newer = write(tmp_path / "results", "c.json", {"accuracy": 0.2})
    oldest = write(tmp_path / "results", "d.json", {"accuracy": 0.9})
    for place, path in enumerate((oldest, older, newer)):
        os.utime(path, (1_000_000 + place, 1_000_000 + place))
    status, out, err = call()
    assert status == 0 and "20.0 (1)" in out
    first, closing = err.splitlines()  # the two old ones agree: nothing to say of them
    assert "kept results/c.json" in first and "results/b.json" in first
    assert closing.endswith("the newest counts: 1")


def test_a_folder_named_twice_is_read_once(call, tmp_path):
    write_seeds(tmp_path / "results", [0.2, 0.4])
    (tmp_path / "results/bad.json").write_text("{}")
    status, out, err = call("results", "--results", "results", tmp_path / "results")
    assert status == 0 and "(2)" in out
    assert err.endswith("files skipped: 1\n")


@pytest.mark.parametrize("present", [False, True])
def test_no_results_is_an_error_that_writes_nothing(call, tmp_path, present):
    if present:
        (tmp_path / "runs").mkdir()
    status, out, err = call("runs")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "runs" in err and "python fewshot.py --out runs" in err
    assert not (tmp_path / "figures").exists()


def test_unknown_target_and_metric_name_the_nearest(call, tmp_path):
    write(tmp_path / "results", target="cifar10")
    for argv, near in ((("--target", "cifa10"), "cifar10"), (("--metric", "acuracy"), "accuracy")):
        status, out, err = call(*argv)
        assert (status, out) == (2, "")
        assert err == f"error: {argv[0]} {argv[1]} is unknown: did you mean {near}?\n"
    assert not (tmp_path / "figures").exists()


def test_target_filters(call, tmp_path):
    for target in ("pets", "cifar10", "cifar100"):
        write(tmp_path / "results", f"{target}.json", target=target)
    call("--target", "pets", "cifar10", "--out", "a/b")
    assert {row["target"] for row in read_csv("a/b/fewshot.csv")} == {"pets", "cifar10"}


def test_a_failure_leaves_the_old_files_and_no_others(call, tmp_path, monkeypatch):
    write(tmp_path / "results")
    call()
    before = {path.name: path.read_bytes() for path in Path("figures").iterdir()}
    assert sorted(before) == FILES
    write(tmp_path / "results", metrics={"accuracy": 0.9})

    def full(path, panels):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(plot, "write_csv", full)
    assert call()[0::2] == (2, "error: disk full\n")
    assert {path.name: path.read_bytes() for path in Path("figures").iterdir()} == before


# --------------------------------------------------------------------------- curves of training

OLD = {"loss": 2.5, "lr": 0.1, "images_per_second": 800.0}
NEW = {**OLD, "grad_norm": 1.5, "clipped": 0.25, "data_wait": 0.02, "memory": 1234567890}
TEST = {"accuracy": 0.4, "top5": 0.8, "mean_auc": 0.9, "mean_ap": 0.3, "loss": 1.9}
MULTILABEL = {key: value for key, value in TEST.items() if key != "top5"}


def write_log(folder, *lines, domain=None, images=1000):
    """Write log.jsonl of these objects (or raw lines), and result.json if a domain is given."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "log.jsonl").write_text("".join(text))
    if domain:
        result = {"schema": 1, "kind": "pretrain", "source_images": images}
        (folder / "result.json").write_text(json.dumps({**result, "source_domain": domain}))
    return folder


def drawn(*folders):
    """{title of a panel: [(steps, values) of each line]} of the figure of these runs."""
    figure = curves.draw_logs(curves.load_runs(folders), "")
    return {
        ax.get_title(loc="left"): [tuple(map(list, line.get_data())) for line in ax.lines]
        for ax in figure.axes
    }


def test_curves_hold_the_logged_values(tmp_path):
    first, second = {"step": 50, **NEW}, {"step": 100, **NEW, "loss": 1.25, "lr": 0.01}
    second |= {"grad_norm": 0.5, "clipped": 0.0, "images_per_second": 900, "data_wait": 0.5}
    evaluations = {"step": 75, "test": TEST}, {"step": 100, "test": {**TEST, "accuracy": 0.55}}
    run = write_log(tmp_path / "a-R50x1", first, evaluations[0], second, evaluations[1])
    panels = drawn(run)
    assert list(panels) == [
        "training loss",
        "test accuracy (%)",
        "learning rate",
        "gradient norm",
        "units with clipped gradients (%)",
        "images per second",
        "share of time waiting for data (%)",
    ]
    steps = [50, 100]
    assert [line for (line,) in panels.values()] == [
        (steps, [2.5, 1.25]),
        ([75, 100], pytest.approx([40, 55])),
        (steps, [0.1, 0.01]),
        (steps, [1.5, 0.5]),
        (steps, [25, 0]),
        (steps, [800, 900]),
        (steps, [2, 50]),
    ]


def test_panels_without_data_are_left_out(tmp_path):
    old = write_log(tmp_path / "old", {"step": 10, **OLD})
    assert list(drawn(old)) == ["training loss", "learning rate", "images per second"]
    plain = write_log(tmp_path / "plain", {"step": 20, **NEW, "clipped": None})
    panels = drawn(old, plain)
    assert "units with clipped gradients (%)" not in panels
    assert panels["gradient norm"] == [([20], [1.5])]  # of one run alone
    assert panels["training loss"] == [([10], [2.5]), ([20], [2.5])]


@pytest.mark.parametrize(
    ("domain", "test", "title", "value"),
    [
        (None, TEST, "test accuracy (%)", 40),
        (None, MULTILABEL, "test mean AUC", 0.9),  # multi-label runs log an accuracy too
        ("natural", MULTILABEL, "test accuracy (%)", 40),  # up to five classes: no top5
        ("medical", MULTILABEL, "test mean AUC", 0.9),
        ("medical", {"accuracy": 0.4}, "test accuracy (%)", 40),  # no AUC was defined
        ("natural", {"mean_auc": 0.9}, "test mean AUC", 0.9),
    ],
)
def test_one_test_metric_a_run_that_of_its_task(tmp_path, domain, test, title, value):
    panels = drawn(write_log(tmp_path / "run", {"step": 7, "test": test}, domain=domain))
    assert panels == {title: [([7], [pytest.approx(value)])]}


def test_multiclass_and_multilabel_runs_have_panels_of_their_own(tmp_path):
    natural = write_log(tmp_path / "a", {"step": 1, "test": TEST})
    medical = write_log(tmp_path / "b", {"step": 2, "test": MULTILABEL})
    assert drawn(natural, medical) == {
        "test accuracy (%)": [([1], [40])],
        "test mean AUC": [([2], [0.9])],
    }


def test_many_points_are_drawn_faint_below_medians_of_a_hundred_parts(tmp_path):
    lines = [{"step": step, "loss": float(step % 4), "lr": 0.1} for step in range(400)]
    panels = drawn(write_log(tmp_path / "run", *lines))
    steps = list(range(400))
    points, medians = panels["training loss"]
    assert points == (steps, [0, 1, 2, 3] * 100)
    assert medians == ([4 * part + 1.5 for part in range(100)], [1.5] * 100)
    assert panels["learning rate"] == [(steps, [0.1] * 400)]  # no noise, and steps stay steps
    figure = curves.draw_logs(curves.load_runs([tmp_path / "run"]), "")
    faint, line = figure.axes[0].lines
    assert faint.get_alpha() < 0.5 and line.get_alpha() is None
    assert faint.get_zorder() <= line.get_zorder()
    assert any("medians" in text.get_text() for text in figure.texts)


def test_axes_share_the_steps_and_are_logarithmic_over_decades(tmp_path):
    rates = [{"step": step, **OLD, "lr": 0.1**step} for step in (1, 2, 3)]
    axes = curves.draw_logs(curves.load_runs([write_log(tmp_path / "run", *rates)]), "").axes
    assert [ax.get_yscale() for ax in axes] == ["linear", "log", "linear"]
    assert [ax.get_ylim()[0] for ax in axes[::2]] == [0, 0]
    assert len({ax.get_xlim() for ax in axes}) == 1
    assert [ax.get_xlabel() for ax in axes] == ["", "", "step"]
    low, high = axes[1].get_ylim()
    assert 0.0005 < low < 0.001 and 0.1 < high < 0.2
    zero = write_log(tmp_path / "zero", *rates, {"step": 4, **OLD, "lr": 1e-9})
    low, high = curves.draw_logs(curves.load_runs([zero]), "").axes[1].get_ylim()
    assert 1e-6 < low < 1e-5  # four decades below 0.1, not eight: a cosine ends near zero


@pytest.mark.parametrize("count", [1, 12, 30])
@pytest.mark.parametrize("domain", [None, "medical"])
def test_each_run_has_its_marker_and_dashes_and_its_name_in_the_legend(tmp_path, count, domain):
    names = [f"nih-R{place + 1}x1" for place in range(count)]
    for name in names:
        write_log(tmp_path / name, *({"step": s, **NEW} for s in range(20)), domain=domain)
    figure = curves.draw_logs(curves.load_runs([tmp_path / name for name in reversed(names)]), "")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names  # R2x1 before R10x1
    for ax in figure.axes:
        assert [line.get_gid().split()[-1] for line in ax.lines] == names
    styles = curves.run_styles(curves.load_runs([tmp_path / name for name in names]))
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == count
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for above, below in zip(boxes, boxes[1:]):
        assert above.y0 >= below.y1
    assert legend.get_window_extent().y1 <= boxes[-1].y0


def test_colours_are_those_of_the_domains(tmp_path):
    about = {"zoo": ("natural", 9), "art": ("natural", 10), "nih": ("medical", 5), "new": (None, 0)}
    for name, (domain, images) in about.items():
        write_log(tmp_path / name, {"step": 1, **OLD}, domain=domain, images=images)
    (tmp_path / "new/result.json").write_text("{")  # tells the colour alone: no error
    runs = curves.load_runs([tmp_path / name for name in sorted(about)])
    assert [run["name"] for run in runs] == ["zoo", "art", "nih", "new"]
    figure = curves.draw_logs(runs, "")
    zoo, art, nih, new = (line.get_color() for line in figure.axes[0].lines)
    assert sum(zoo[:3]) > sum(art[:3])  # darker is larger
    assert zoo[0] > zoo[2] and art[0] > art[2] and nih[2] > nih[0]
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines]
    assert faces == [zoo, art, "white", new]
    note = figure.texts[-1].get_text()
    assert "natural images" in note and "medical images" in note and "no result.json" in note


def test_equal_names_are_told_apart_by_their_parents(tmp_path):
    for path in ("x/runs/a", "y/runs/a", "y/old/a", "b"):
        write_log(tmp_path / path, {"step": 1, **OLD})

    def names(*paths):
        return {run["name"] for run in curves.load_runs([tmp_path / path for path in paths])}

    assert names("x/runs/a", "b") == {"a", "b"}
    assert names("y/runs/a", "y/old/a", "b") == {"runs/a", "old/a", "b"}
    assert names("x/runs/a", "y/runs/a", "y/old/a") == {"x/runs/a", "y/runs/a", "old/a"}
    assert len(curves.load_runs([tmp_path / "b", tmp_path / "x/../b"])) == 1  # named twice


def test_curves_writes_two_files_and_nothing_of_results(call, tmp_path):
    write_log(tmp_path / "runs/a-$R50x1$", {"step": 1, **OLD})
    write_log(tmp_path / "runs/b-R50x1", {"step": 1, **OLD})
    write(tmp_path / "results")
    argv = "--curves", "runs/a-$R50x1$", "runs/b-R50x1"
    assert call(*argv) == (0, "wrote figures/curves.png\nwrote figures/curves.svg\n", "")
    figures = tmp_path / "figures"
    assert sorted(path.name for path in figures.iterdir()) == ["curves.png", "curves.svg"]
    assert (figures / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (figures / "curves.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"a-$R50x1$", "b-R50x1", "training loss", "step"} <= set(texts)
    assert call(*argv, "--out", "again", "--title", "A title")[0] == 0
    assert ">A title<" in Path("again/curves.svg").read_text()
    call(*argv, "--out", "again")
    assert Path("again/curves.svg").read_text() == svg  # same input, same file


@pytest.mark.parametrize(
    "more", [["--target", "pets"], ["--metric", "mean_ap"], ["--results", "r"]]
)
def test_curves_refuses_the_options_of_results(call, tmp_path, more):
    write_log(tmp_path / "a", {"step": 1, **OLD})
    status, out, err = call("--curves", "a", *more)
    assert (status, out) == (2, "")
    assert err == "error: --curves draws run folders alone: no results, --metric or --target\n"


def test_a_last_line_cut_short_is_passed_over(call, tmp_path):
    whole = [{"step": 1, **OLD}, {"step": 2, **OLD}]
    run = write_log(tmp_path / "a", *whole, '{"step": 3, "lo')
    assert drawn(run)["training loss"] == [([1, 2], [2.5, 2.5])]
    assert call("--curves", "a")[0::2] == (0, "")
    run = write_log(tmp_path / "a", *whole, json.dumps({"step": 3, **OLD}))  # but its newline
    assert drawn(run)["training loss"] == [([1, 2, 3], [2.5] * 3)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"step": 3, "lo\n', "not JSON"),  # cut short, but another line follows
        ("\n", "not JSON"),
        ("[" * 100_000 + "\n", "not JSON"),
        ("[1]\n", 'neither {"step", "loss", ...} nor {"step", "test"}'),
        ({"step": 1}, 'neither {"step", "loss", ...} nor {"step", "test"}'),
        ({"loss": 1.0}, "step is None"),
        ({**OLD, "step": 1.5}, "step is 1.5"),
        ({**OLD, "step": -1}, "step is -1"),
        ({**OLD, "step": True}, "step is True"),
        ({"step": 1, "test": 0.5}, "test is 0.5"),
        ({"step": 1, "loss": "2.5"}, "loss is '2.5'"),
        ({"step": 1, "loss": math.nan}, "loss is nan"),
        ({"step": 1, "loss": 10**400}, "loss is 1000000000"),
        ({**NEW, "step": 1, "clipped": True}, "clipped is True"),
        ({**NEW, "step": 1, "grad_norm": math.inf}, "grad_norm is inf"),
        ({"step": 1, "test": {"accuracy": [1]}}, "accuracy is [1]"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_line_is_refused_by_file_and_line(call, tmp_path, line, fault, last):
    after = [] if last else [{"step": 9, **OLD}]
    write_log(tmp_path / "runs/a", {"step": 1, **OLD}, {"step": 1, "test": TEST}, line, *after)
    status, out, err = call("--curves", "runs/a")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: runs/a/log.jsonl line 3: {fault}")
    assert err.endswith("; remove that line, or train anew in another folder\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "no log.jsonl in runs/b: --curves takes folders that pretrain.py filled"),
        ("", "runs/b/log.jsonl is empty: wait for its run to log, or leave the folder out"),
        ('{"step": 1, "l', "runs/b/log.jsonl is empty: "),  # nothing but a line cut short
        (..., "no log.jsonl in runs/b: "),  # no folder at all
    ],
)
def test_a_folder_without_a_log_is_refused_by_name(call, tmp_path, text, fault):
    write_log(tmp_path / "runs/a", {"step": 1, **OLD})
    if text is not ...:
        (tmp_path / "runs/b").mkdir()
    if isinstance(text, str):
        (tmp_path / "runs/b/log.jsonl").write_text(text)
    status, out, err = call("--curves", "runs/a", "runs/b")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {fault}") and err.count("\n") == 1
    assert not (tmp_path / "figures").exists()


def test_logs_without_a_number_are_refused(call, tmp_path):
    write_log(tmp_path / "a", {"step": 1, "loss": None}, {"step": 1, "test": {"loss": 1.0}})
    status, out, err = call("--curves", "a")
    assert (status, out) == (2, "")
    assert err == "error: the logs hold no number: let the runs train on, and draw again\n"
