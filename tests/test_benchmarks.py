"""The benchmarks measure what they say; their figures are for a quiet machine, not for a test."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import command, env
from grids import call

import data
import models
import pretrain
from benchmarks import gpu, train
from engine.processes import setup


def bench(name, *args, folder, unit="images/s"):
    """(the record, {arm: its speed}): all are in the printed table, and the ratios are of these."""
    words = command("benchmarks", name, *args, "--json", folder / "bench.json")
    result = subprocess.run(words, capture_output=True, text=True, env=env())
    assert result.returncode in (0, 1), result.stderr
    record = json.loads((folder / "bench.json").read_text())
    assert record["kind"] == f"bench-{name}"
    speeds = {row["arm"]: row[unit] for row in record["rows"] if unit in row}
    assert all(speed > 0 and arm in result.stdout for arm, speed in speeds.items())
    for required in record["required"]:
        assert required["reached"] == (required["ratio"] >= required["least"])
        if speeds:
            assert required["ratio"] == speeds[required["of"]] / speeds[required["to"]]
    assert result.returncode == (0 if all(r["reached"] for r in record["required"]) else 1)
    return record, speeds


ARMS = {f"{p}, {b}" for p in ("ours", "timm") for b in ("defaults", "bf16")} | {"ours, fp32"}
ARMS |= {f"timm, {b}" for b in ("fp32, fused", "bf16, fused", "bf16, channels_last")}


@pytest.mark.parametrize("peers", (False, True))
def test_train_measures_every_arm(folder, tmp_path, peers):
    small = ("--image-size", 32, "--batch-size", 2, "--steps", 1, "--rounds", 1, "--threads", 1)
    args = ("--no-compile", "--folder", folder, *["--peers"] * peers)
    record, speeds = bench("train", *small, *args, folder=tmp_path)
    assert record["config"]["rounds"] == 1 and record["config"]["model"] == "R50x1"
    assert speeds.keys() == ARMS
    defaults, best = record["required"]
    assert (defaults["to"], defaults["least"]) == ("timm, defaults", 1.4 if peers else 1.5)
    assert best["of"] == max(filter(lambda arm: arm.startswith("ours"), speeds), key=speeds.get)


def test_our_defaults_train_as_pretrain_does(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "learning_rate", lambda *_: train.RECIPE.lr / 256 * 8)
    words = ("--source", f"folder:{folder}", "--recipe", "paper", "--image-size", 32)
    words += ("--batch-size", 8, "--epochs", 1, "--precision", "fp32", "--out", tmp_path)
    call(pretrain, *words)
    (path,) = tmp_path.glob("*/model.pt")
    torch.manual_seed(0)
    args = SimpleNamespace(model="R14x0.5", image_size=32, batch_size=8)
    dataset = data.load_dataset(f"folder:{folder}")
    arm = train.training("ours, fp32", args, setup(), len(dataset.classes), dataset)
    for _ in range(8):  # of 60 images
        next(arm)
    ours = arm.gi_frame.f_locals["network"].state_dict()
    for name, weights in models.read_weights(path)["model"].items():
        assert torch.equal(ours[name], weights), name


def test_load_measures_every_arm(tmp_path):
    pytest.importorskip("pandas")
    record, speeds = bench("load", "--rounds", 1, "--rows", 3000, folder=tmp_path)
    arms = {"study", "ours, decoding", "ours, pack, training", "ours, pack, test"}
    arms |= {f"{p}, {side} px JPEG" for p in ("ours", "torchvision") for side in (32, 256)}
    assert arms | {f"{p}, tables" for p in ("ours", "pandas")} <= speeds.keys()
    assert [r["least"] for r in record["required"]] == [1.2, 8, 30, 1.2, 1.2, 0.5]


def test_a_proof_that_cannot_be_made_has_failed(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("called a synchronizing CUDA operation")
        yield

    monkeypatch.setattr(gpu, "launches", fail)
    for part in "agreement repeated layouts out_of_memory compiled speed loading cells".split():
        monkeypatch.setattr(gpu, part, lambda *_: ())
    rows, bounds = gpu.gpu(SimpleNamespace(minutes=1, out=tmp_path), setup())
    reason = "RuntimeError: called a synchronizing CUDA operation"
    assert [(row["arm"], row["unit"]) for row in rows] == [(reason, "failed")]
    assert [found["reached"] for found in bounds] == [False]
    assert reason in (tmp_path / "gpu.jsonl").read_text() and reason in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_of_gpu_answers(tmp_path):
    record, _ = bench("gpu", "--minutes", 60, "--out", tmp_path, folder=tmp_path)
    about, *arms = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert about["torch"] == torch.__version__ and about["device"] == "cpu" and about["began"]
    assert len({arm["part"] for arm in arms}) == 13 and arms == record["rows"]
    assert sum(arm["most"] is not None for arm in arms) == 7
    assert [required["reached"] for required in record["required"]] == [True] * 7


@pytest.mark.slow
def test_processes_measure_every_arm(tmp_path):
    more = {"folder": tmp_path, "unit": "cells/s"}
    assert len(bench("grid", "--seeds", 1, "--rounds", 1, **more)[1]) == 2
