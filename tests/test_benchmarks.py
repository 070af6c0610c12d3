"""The benchmarks measure what they say; their figures are for a quiet machine, not for a test."""

import json
import subprocess

import pytest
from conftest import command, env


def bench(name, *args, folder):
    """(the record, what it printed, its status)."""
    args = (name, *args, "--rounds", 1, "--json", folder / "bench.json")
    result = subprocess.run(command("benchmarks", *args), capture_output=True, text=True, env=env())
    assert result.returncode in (0, 1), result.stderr
    record = json.loads((folder / "bench.json").read_text())
    assert record["kind"] == f"bench-{name}" and record["config"]["rounds"] == 1
    assert result.returncode == (0 if all(r["reached"] for r in record["required"]) else 1)
    return record, result.stdout


def test_train_measures_every_arm(tmp_path):
    args = ("--image-size", 32, "--batch-size", 2, "--steps", 1, "--no-compile", "--threads", 1)
    record, printed = bench("train", *args, folder=tmp_path)
    speeds = record["images_per_second"]
    arms = {f"{p}, eager, {b}" for p in ("ours", "timm") for b in ("fp32", "bf16")}
    assert speeds.keys() == arms | {"ours, defaults"}
    assert all(speed > 0 for speed in speeds.values())
    defaults, best = record["required"]
    assert defaults["ratio"] == speeds["ours, defaults"] / speeds["timm, eager, fp32"]
    assert best["ratio"] == speeds[best["of"]] / speeds[best["to"]]
    assert all(arm in printed for arm in speeds)


def test_load_measures_every_arm(tmp_path):
    record, printed = bench("load", folder=tmp_path)
    speeds = record["images_per_second"]
    assert {"study, Pillow", "ours, decoding", "ours, pack, training", "ours, pack, test"} < set(
        speeds
    )
    assert {f"{p}, {side} px JPEG" for p in ("ours", "torchvision") for side in (32, 256)} < set(
        speeds
    )
    assert all(speed > 0 for speed in speeds.values()) and all(arm in printed for arm in speeds)
    assert [r["least"] for r in record["required"]] == [1.2, 8, 30, 1.2, 1.2]
    for required in record["required"]:
        assert required["ratio"] == speeds[required["of"]] / speeds[required["to"]]


def test_index_measures_what_it_made(tmp_path):
    pytest.importorskip("pandas")
    args = ("--rows", 3000, "--images", 70_000, "--listed", 500)
    record, printed = bench("index", *args, folder=tmp_path)
    measured = record["measured"]
    assert measured.keys() == {"ours, mimic", "pandas, mimic", "listing", "building", "opening"}
    assert all(m["seconds"] > 0 and m["megabytes"] > 0 for m in measured.values())
    assert measured["ours, mimic"]["digest"] == measured["pandas, mimic"]["digest"]
    assert "70,000 paths" in printed
    time, memory, worker, opening = record["required"]
    ours, pandas = measured["ours, mimic"], measured["pandas, mimic"]
    assert time["ratio"] == pandas["seconds"] / ours["seconds"]
    assert memory["ratio"] == pandas["megabytes"] / ours["megabytes"]
    assert worker["ratio"] == 100 / measured["opening"]["megabytes"]
    assert opening["ratio"] == 2 / measured["opening"]["seconds"]
