"""The benchmark measures what it says; its figures are for a quiet machine, not for a test."""

import json
import subprocess

from conftest import command, env


def test_train_measures_every_arm(tmp_path):
    args = ("train", "--image-size", 32, "--batch-size", 2, "--rounds", 1, "--steps", 1)
    args += ("--no-compile", "--threads", 1, "--json", tmp_path / "bench.json")
    result = subprocess.run(command("bench.py", *args), capture_output=True, text=True, env=env())
    record = json.loads((tmp_path / "bench.json").read_text())
    speeds = record["images_per_second"]
    arms = {f"{p}, eager, {b}" for p in ("ours", "timm") for b in ("fp32", "bf16")}
    assert speeds.keys() == arms | {"ours, defaults"}
    assert all(speed > 0 for speed in speeds.values())
    defaults, best = record["required"]
    assert defaults["ratio"] == speeds["ours, defaults"] / speeds["timm, eager, fp32"]
    assert best["ratio"] == speeds[best["of"]] / speeds[best["to"]]
    assert result.returncode == (0 if defaults["reached"] and best["reached"] else 1)
    assert all(arm in result.stdout for arm in speeds)
