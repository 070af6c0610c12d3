"""charts.results: what is read, what is refused, averages and intervals."""

import json
import math
import os
from collections import Counter

import pytest
from result_files import METRICS, PUBLISHED, RESULT, write, write_seeds
from scipy import stats

from charts import results


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 10, 29, 100, 999])
def test_t_quantile_is_that_of_scipy(degrees):
    assert results.t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


@pytest.mark.parametrize(
    "values",
    [
        {"metrics": {"accuracy": math.nan}},
        {"metrics": {"accuracy": 55.0}},
        {"metrics": {"loss": 0.5}},
        {"kind": "pretrain"},
        *({"shots": shots} for shots in (0, -1, 10**400, 1.5, "1")),
        *({"seed": seed} for seed in (-1, 10**400, None, "0", True)),
        *({"source_images": images} for images in (-1, 10**400, "many")),
        *({key: "a\nb"} for key in ("model", "target", "source", "method", "recipe", "run")),
        {"run": 3},
        {"target_domain": "satellite"},
        {"source": None},
        *({"distance": {"frechet_relative": number}} for number in (1e301, "3")),
        {"distance": [1]},
        {"config": [1]},
    ],
)
def test_each_fault_is_found_and_features_hold_no_result(tmp_path, values):
    good = {**RESULT, "metrics": METRICS}
    features = {**RESULT, "kind": "features", "metrics": {}}
    for name, record in {"good": good, "bad": good | values, "features": features}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (run,), (fault,), _ = results.load([tmp_path])
    assert run.metrics["accuracy"] == 0.5 and fault.startswith(f"skipped {tmp_path}/bad.json: ")


def test_results_older_than_a_metric_or_without_distance_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setitem(results.METRICS, "f1", results.Metric("F1", 1, 2))
    write_seeds(tmp_path, [0.25, 0.75])
    write(tmp_path, metrics={"f1": 0.5}, seed=2, distance={"frechet_relative": 2.5}, early="no")
    runs, skipped, doubled = results.load([tmp_path])
    assert (len(runs), skipped, doubled) == (3, [], [])
    assert {run.seed: run.metrics["f1"] for run in runs} == {0: None, 1: None, 2: 0.5}
    assert {run.distance for run in runs} == {None, 2.5}
    assert not any(run.early for run in runs)  # published ones alone end early
    (cell,) = results.summarise(runs, "f1")
    assert (cell.mean, cell.n) == (0.5, 1)
    (cell,) = results.summarise(runs, "auto")
    assert (cell.mean, cell.n) == (0.5, 3)


@pytest.fixture(scope="module")
def published():
    return results.load([PUBLISHED])[0]


@pytest.mark.parametrize(
    ("target", "source", "model", "shots", "mean"),
    [
        ("cifar10", "imagenet21k", "R152x4", 1, 0.6619),
        ("cifar10", "imagenet1k", "R50x1", 1, 0.4893),
        ("tuberculosis", "chexpert+mimic+nih+padchest", "R152x4", None, 0.9588),
        ("padchest", "imagenet21k", "R152x4", None, 0.8402),
    ],
)
def test_published_means(published, target, source, model, shots, mean):
    cells = results.summarise(published, "auto")
    found = results.group(cells, "target.name", "line.source", "line.model", "shots")
    (cell,) = found[target, source, model, shots]
    assert round(cell.mean, 4) == mean and cell.n == 5


def test_published_runs_have_domains_sizes_and_places_as_seeds(published):
    assert len(results.group(published, "target", "line", "shots")) == 289
    about = {run.line.source: (run.line.source_domain, run.source_images) for run in published}
    assert about["imagenet21k"] == ("natural", 14_197_122)
    assert about["chexpert+mimic"] == ("medical", 224_316 + 377_110)
    assert about["chexpert+mimic+nih+padchest"] == ("medical", 874_407)
    natural = {run.target.name for run in published if run.target.domain == "natural"}
    assert natural == {"cifar10", "cifar100", "pets", "flowers102"}
    assert Counter(run.seed for run in published) == {0: 289, 1: 289, 2: 289, 3: 289, 4: 284}
    assert Counter(r.target.name for r in published if r.early) == {"covidx": 1, "tuberculosis": 8}
    about = {(run.line.method, run.target.origin) for run in published}
    assert about == {("finetune", "published")}
    assert "arXiv:2106.00116" in json.loads(PUBLISHED.read_text())["about"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"source": "imagenet22k"}, "'imagenet22k'"),
        ({"target": "mnist"}, "'mnist'"),
        ({"shots": 0}, "shots is 0"),
        ({"metrics": {"accuracy": [0.5, 1.5]}}, "accuracy is 1.5, not from 0 to 1"),
        ({"metrics": {"accuracy": [0.5], "mean_ap": [0.5, 0.5]}}, "longer"),
        ({"source": "imagenet1k+nih"}, "imagenet1k+nih"),
        ({"metrics": None}, "None"),
    ],
)
def test_a_bad_record_of_published_numbers_refuses_the_file(call, tmp_path, change, fault):
    entry = {"target": "pets", "source": "imagenet1k", "model": "R50x1", "shots": 1}
    entry["metrics"] = {"accuracy": [0.5, 0.6]}
    (tmp_path / "p.json").write_text(json.dumps({"records": [entry]}))
    assert "55.0 ± 7.1 (2)" in call("p.json", "--figure", "fewshot")[1]
    (tmp_path / "p.json").write_text(json.dumps({"records": [entry, {**entry, **change}]}))
    status, out, err = call("p.json")
    assert (status, out) == (2, "") and err.startswith("error: p.json holds no published numbers")
    assert fault in err


@pytest.mark.parametrize(
    ("target", "single_label", "shown"),
    [
        ("padchest", True, "padchest"),
        ("padchest@256", False, "padchest@256 (all labels)"),
        ("nih", False, "nih"),
        ("nih@224", True, "nih@224 (single-label)"),
    ],
)
def test_two_tasks_of_a_dataset_are_two_targets(tmp_path, target, single_label, shown):
    options = {"single_label": True} if single_label else {"views": ["PA"]}
    about = {"target": target, "target_domain": "medical", "config": {"target_options": options}}
    write(tmp_path, "a.json", {"mean_auc": 0.7}, **about)
    assert results.load([tmp_path])[0][0].target.name == shown


def test_runs_of_other_weights_or_data_are_never_averaged(call, tmp_path):
    """The newest say which; of older files nothing is known."""
    made = {"weights": "a", "data": {"train content": "b"}}
    configs = [made, made | {"weights": "c"}, made | {"data": {"train content": "d"}}, {}]
    configs += [made | change for change in ({"lr": 5}, {"steps": 9}, {"seed": 5, "images": 3})]
    configs[0] = made | {"compile": False, "square": True}  # not named by an older file
    configs[5] |= {"square": False}
    configs[6] |= {"square": True}
    for seed, config in enumerate(configs):
        path = write(tmp_path / "results", f"{seed}.json", seed=seed, config=config)
        os.utime(path, (seed, seed))
    found, skipped, _ = results.load([tmp_path / "results"])
    assert sorted(run.seed for run in found) == [0, 3, 6]
    folder = tmp_path / "results"
    assert skipped == [
        f"skipped {folder}/{seed}.json: of other weights, data or settings than {folder}/6.json"
        for seed in (1, 2, 4, 5)
    ]
    newer = made | {"seed": 9, "square": False}
    write(tmp_path / "results", "9.json", seed=9, config=newer)  # of now
    assert sorted(run.seed for run in results.load([tmp_path / "results"])[0]) == [3, 9]
    write(tmp_path / "results", "5.json", seed=0, shots=1, config=made | {"weights": "c"})
    assert len(results.load([tmp_path / "results"])[0]) == 3  # another cell


def test_results_of_validation_stay_apart(call, tmp_path):
    about = {"kind": "fewshot-validation", "config": {"target_options": {"validation": 0.2}}}
    write(tmp_path / "held", "a.json", target="pets", **about)
    write(tmp_path / "results", "a.json", target="pets")
    status, out, _ = call("held", "--figure", "fewshot")
    assert status == 0 and "pets (validation 0.2)" in out
    for folders in (["held", "results"], ["."]):
        assert "held out by --validation: name their folders one at" in call(*folders)[2]


@pytest.mark.parametrize("text", ["{", "[1]", '{"about": 1}', None])
def test_a_file_without_published_numbers_is_refused(call, tmp_path, text):
    if text:
        (tmp_path / "p.json").write_text(text)
    status, out, err = call("p.json")
    assert (status, out) == (2, "") and "error: " in err and "p.json" in err
    assert "published.json" in err and not (tmp_path / "figures").exists()
