"""One script after the other, as in the study: pre-train, transfer, continue."""

import signal

import pytest
from conftest import run
from grids import call, results
from interruption import at_step, run_forked, send

import fewshot
import pretrain
import transfer
from engine.checkpoint import read_tensors

SMALL = ("--precision", "fp32", "--image-size", 16, "--batch-size", 8)


def test_few_shot_grid(checkpoint, folder, nih_root, tmp_path):
    """2 targets x 3 networks x 2 shot counts, shared by two processes."""
    medical = ("--source", "nih", "--data-dir", nih_root)
    call(pretrain, *medical, *SMALL, "--epochs", 1, "--out", tmp_path / "runs")
    networks = checkpoint, tmp_path / "runs" / "nih-R14x0.5"
    argv = ("fewshot.py", "--checkpoint", *networks, "scratch", "--target", f"folder:{folder}")
    argv += ("nih", "--data-dir", nih_root, "--shots", 1, 2, "--seeds", 1, "--steps", 4, *SMALL)
    ((said, _), _) = run_forked(fewshot.main, (*argv, "--out", tmp_path / "out"), tmp_path, ranks=2)
    assert len(results(tmp_path / "out")) == 12
    assert said.count("(1)") == 12  # the closing table
    (record,) = results(tmp_path / "out", "nih/folder*/1shot-seed0.json").values()
    assert record["kind"] == "fewshot" and record["source_domain"] == "natural"
    assert record["target_domain"] == "medical" and record["method"] == "finetune"
    assert record["train"]["steps"] == 4 and 7 <= record["train"]["images"] <= 14
    (record,) = results(tmp_path / "out", "folder*/nih*/2shot-seed0.json").values()
    assert record["train"]["images"] == 6 and record["config"]["sampling"] == "shuffle"


@pytest.mark.parametrize("ranks", (1, 2))
def test_full_shot_transfer_continues(ranks, checkpoint, folder, tmp_path):
    argv = ("transfer.py", "--checkpoint", checkpoint, "--target", f"folder:{folder}", *SMALL)
    argv += ("--steps", 40, "--log-every", 5, "--out")
    run_forked(transfer.main, (*argv, tmp_path / "a"), tmp_path, ranks=ranks)
    argv, stop = (*argv, tmp_path / "b"), at_step(20, send(signal.SIGTERM), ranks - 1)
    run_forked(transfer.main, argv, tmp_path, 75, stop, ranks)
    (path,) = (tmp_path / "b").glob("*/*/*")
    assert 20 <= read_tensors(path)["step"] <= 21
    ((said, _), *_) = run_forked(transfer.main, argv, tmp_path, ranks=ranks)
    assert "step 20/40" not in said and "step 25/40" in said
    (a,), (b,) = (results(tmp_path / name).values() for name in "ab")
    assert a["metrics"] == b["metrics"] and a["shots"] is None and a["kind"] == "transfer"
    assert a["metrics"]["accuracy"] > 0.6  # chance is a third
    assert [path.name for path in (tmp_path / "b").glob("*/*/*")] == ["full-seed0.json"]


def test_real_images_end_to_end(real_data, tmp_path):
    """CIFAR-10 images from a folder and NIH X-rays: pre-train on each, few-shot to the other."""
    (tmp_path / "NIH-ChestXRay-14").symlink_to(real_data / "nih-256")
    cifar = f"folder:{real_data / 'cifar10-folder'}"
    short = ("--data-dir", tmp_path, "--image-size", "32", "--batch-size", "64")
    for source in (cifar, "nih"):
        run("pretrain.py", "--source", source, "--epochs", 1, *short, cwd=tmp_path)
    shots = ("--shots", 1, "--seeds", 1, "--steps", 3)
    run("fewshot.py", "--target", cifar, "nih", *shots, *short, cwd=tmp_path)
    records = results(tmp_path / "results").values()
    assert len(records) == 6
    counts = {record["source"]: record["source_images"] for record in records}
    assert counts == {cifar: 2000, "nih": 558, "scratch": 0}
    for record in records:
        first = next(iter(record["metrics"]["per_class"].values()))
        total = {"natural": 1000, "medical": 129}[record["target_domain"]]
        assert first["positives"] + first["negatives"] == total
