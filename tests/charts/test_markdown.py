"""charts.markdown: numbers in tables and CSV, what is bold, verdicts counted."""

import math
import re

import pytest
from result_files import PUBLISHED, read_csv, texts, write, write_seeds
from scipy import stats

from charts import gains, markdown, results
from engine import console


def test_table_and_csv_hold_mean_deviation_interval_and_count(call, tmp_path):
    write_seeds(tmp_path / "results", [0.50, 0.60, 0.70, 0.40])  # mean 0.55
    status, out, err = call()
    assert (status, err) == (0, "")
    assert "55.0 ± 12.9 (4)" in out
    assert out.startswith("### synthetic-natural-target (natural target): accuracy (%)")
    (row,) = read_csv()
    sd = math.sqrt(0.05 / 3)  # the sum of squared deviations is 0.05
    low, high = stats.t.interval(0.95, 3, loc=0.55, scale=sd / 2)
    numbers = [float(row.pop(key)) for key in ("mean", "sd", "ci95")]
    assert numbers == pytest.approx([0.55, sd, (high - low) / 2])
    about = "synthetic-natural-target natural synthetic-natural natural R14x0.5 finetune paper 10"
    assert list(row.values()) == [*about.split(), "accuracy", "4"]


def test_medical_targets_show_auc_with_three_decimals_unless_told(call, tmp_path):
    write_seeds(tmp_path / "results", [0.8, 0.9], "mean_auc", target_domain="medical", shots=None)
    out = call()[1]
    assert "mean AUC" in out and "0.850 ± 0.071 (2)" in out
    assert re.search(r"\| source +\| model +\| full +\|", out)
    assert "40.0" not in out and "0.400 ± 0.000 (2)" in call("--metric", "mean_ap")[1]


def test_one_seed_has_no_interval(call, tmp_path):
    write(tmp_path / "results")
    assert "| 50.0 (1) |" in call()[1]
    (row,) = read_csv()
    assert (row["mean"], row["sd"], row["ci95"], row["n"]) == ("0.5", "", "", "1")


def test_null_metrics_are_left_out_and_not_counted(call, tmp_path):
    write_seeds(tmp_path / "results", [0.2, None, 0.4])
    write_seeds(tmp_path / "results", [None, None], source="synthetic-xray")
    out = call()[1]
    assert "30.0 ± 14.1 (2)" in out and "undefined (0)" in out
    found = {row["source"]: (row["n"], row["mean"]) for row in read_csv()}
    assert found["synthetic-natural"][0] == "2" and found["synthetic-xray"] == ("0", "")


def test_bold_marks_the_best_and_what_its_noise_covers(call, tmp_path):
    def bold(folder, **sources):
        for source, scores in sources.items():
            write_seeds(tmp_path / folder, scores, source=source)
        lines = call(folder)[1].splitlines()
        return sorted(line.split("|")[1].strip() for line in lines if "**" in line)

    near = [0.66, 0.70, 0.74]  # gap 0.02 < sqrt(0.05² + 0.10²)
    far = [0.51, 0.52, 0.53]  # gap 0.20 > sqrt(0.05² + 0.02²)
    single = [0.719]  # nearest of all, but its noise is unknown
    best = [0.70, 0.72, 0.74]
    assert bold("a", best=best, near=near, far=far, single=single) == ["best", "near"]
    assert bold("b", single=[0.9], noisy=[0.1, 0.99]) == ["single"]  # bold only as the best


@pytest.mark.parametrize("field", ["method", "recipe"])
def test_methods_and_recipes_part_lines_and_are_named_only_when_they_differ(call, tmp_path, field):
    write(tmp_path / "results", "a.json", {"accuracy": 0.2})
    assert f"| {field}" not in call()[1]
    assert not any("R14x0.5, " in text for text in texts("figures/fewshot.svg"))
    write(tmp_path / "results", "b.json", {"accuracy": 0.6}, **{field: "other"})
    out = call()[1]
    assert f"| {field}" in out and "20.0 (1)" in out and "60.0 (1)" in out
    assert "synthetic-natural, R14x0.5, other" in texts("figures/fewshot.svg")


def test_counts_of_the_study():
    found, _ = gains.paired_gains(results.load([PUBLISHED])[0], "auto")
    head, _, *lines = markdown.count_table(found).splitlines()
    names, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in (head, *lines))
    rows = [dict(zip(names, row)) for row in rows]
    heads = "above zero", "not off zero", "below zero"
    found = {
        (row["gain"], row["group"].split(", ")[1], row["shots"]): " ".join(row[h] for h in heads)
        for row in rows
    }
    network, source = "larger network", "larger source"
    assert found[network, "natural to natural", "all"] == "20 0 0"
    assert found[network, "natural to medical", "up to 10 shots"] == "0 8 1"
    assert found[network, "natural to medical", "full"] == "2 1 0"
    assert found[network, "medical to medical", "all"] == "8 8 0"
    assert found[source, "natural to natural", "all"] == "17 0 3"
    assert found[source, "medical to medical", "all"] == "9 7 0"
    assert found[source, "natural to medical", "full"] == "3 0 0"
    assert sum(int(row["cells"]) for row in rows if row["shots"] != "all") == 2 * 52


def test_a_bar_in_a_name_stays_in_its_cell():
    assert console.table([[1]], ["a|b"]) == "| a\\|b |\n| ---- |\n| 1    |"
