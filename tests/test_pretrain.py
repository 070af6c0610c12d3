"""The scripts as a user runs them: any layout, any interruption, the files they leave."""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import command, env, run

SMALL = ("--precision", "fp32", "--image-size", "32")


def pretrain_args(source, out, *more):
    options = ("--source", source, "--batch-size", "16", "--log-every", "1", *SMALL)
    return (*options, "--out", out, *more)


def losses(out):
    lines = [json.loads(line) for path in out.glob("*/log.jsonl") for line in open(path)]
    return [line["loss"] for line in lines if "loss" in line]


def weights(out, name="model.pt"):
    (path,) = out.glob(f"*/{name}")
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def result(out, pattern="*/result.json"):
    (path,) = out.glob(pattern)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def undisturbed(folder, nih_root, tmp_path_factory):
    """20 steps on one process, multi-class and multi-label."""
    out = tmp_path_factory.mktemp("undisturbed")
    more = ("--epochs", "5", "--lr", "0.05", "--clipping", "0.01")
    run("pretrain.py", *pretrain_args(f"folder:{folder}", out / "folder", *more), cwd=out)
    more = ("--epochs", "8", "--data-dir", nih_root)
    run("pretrain.py", *pretrain_args("nih", out / "nih", *more), cwd=out)
    return out


def folder_args(folder, out, *more):
    more = ("--epochs", "5", "--lr", "0.05", "--clipping", "0.01", *more)
    return pretrain_args(f"folder:{folder}", out, *more)


# ------------------------------------------------------------------------------------------------
# Property 2: stop anywhere
# ------------------------------------------------------------------------------------------------


def interrupt(args, out, number, after, ranks=1, script="pretrain.py"):
    """Starts a run and sends the signal once its log says `after` steps; returns its status."""
    process = subprocess.Popen(
        command(script, *args, ranks=ranks), cwd=out.parent, env=env(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        if f"  step {after}/" in line:
            process.send_signal(number)
            break
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def test_a_signal_saves_and_leaves(undisturbed, folder, tmp_path):
    args = folder_args(folder, tmp_path / "out", "--workers", "2")
    status, output = interrupt(args, tmp_path / "out", signal.SIGTERM, 6)
    assert status == 75, output
    assert "SIGTERM" in output and "Traceback" not in output
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoint.pt")
    assert 6 <= torch.load(checkpoint, weights_only=True)["step"] < 19
    stdout, _ = run("pretrain.py", *args, cwd=tmp_path)
    assert "continues after step" in stdout
    assert_same_weights(weights(tmp_path / "out"), weights(undisturbed / "folder"))
    assert losses(tmp_path / "out") == losses(undisturbed / "folder")


def test_two_ranks_stop_together_and_continue(undisturbed, folder, tmp_path):
    """On two ranks bitwise as two undisturbed ones; on one rank with the same losses."""
    args = folder_args(folder, tmp_path / "out")
    status, _ = interrupt(args, tmp_path / "out", signal.SIGTERM, 6, ranks=2)
    assert status != 0
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoint.pt")
    assert 6 <= torch.load(checkpoint, weights_only=True)["step"] < 19
    shutil.copytree(tmp_path / "out", tmp_path / "one")
    run("pretrain.py", *args, ranks=2, cwd=tmp_path)
    run("pretrain.py", *folder_args(folder, tmp_path / "whole"), ranks=2, cwd=tmp_path)
    assert_same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    run("pretrain.py", *folder_args(folder, tmp_path / "one"), cwd=tmp_path)
    assert losses(tmp_path / "one") == pytest.approx(losses(undisturbed / "folder"), rel=1e-4)


def test_a_finished_run_is_not_repeated(undisturbed, folder):
    before = result(undisturbed / "folder")
    started = time.time()
    stdout, _ = run("pretrain.py", *folder_args(folder, undisturbed / "folder"), cwd=undisturbed)
    assert "finished already" in stdout
    assert result(undisturbed / "folder") == before
    (path,) = (undisturbed / "folder").glob("*/result.json")
    assert path.stat().st_mtime < started


def test_other_options_do_not_continue_a_run(undisturbed, folder):
    args = folder_args(folder, undisturbed / "folder", "--seed", "1")
    _, stderr = run("pretrain.py", *args, cwd=undisturbed, status=2)
    assert "seed = 0, not 1" in stderr and len(stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# The files
# ------------------------------------------------------------------------------------------------


def test_result_of_pretraining(undisturbed):
    record = result(undisturbed / "nih")
    assert (record["schema"], record["kind"], record["recipe"]) == (1, "pretrain", "paper")
    assert (record["source"], record["source_domain"], record["model"]) == (
        "nih",
        "medical",
        "R14x0.5",
    )
    assert record["source_images"] == record["train"]["images"] == 40
    assert record["train"]["steps"] == 20
    assert record["config"]["clipping"] == 0.01 and record["config"]["warmup"] == 15 * 8 / 90
    assert record["metrics"]["per_class"]["Edema"]["auc"] is None
    assert record["metrics"]["top5"] is None
    assert record["environment"]["torch"] == torch.__version__


def test_options_that_shape_a_source(nih_root, tmp_path):
    more = ("--epochs", "1", "--data-dir", nih_root, "--fraction", "0.25")
    args = pretrain_args("nih", tmp_path, *more, "--views", "PA", "--single-label", "--balanced")
    run("pretrain.py", *args, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nih-0.25-R14x0.5"]
    record = result(tmp_path)
    # Of 40 images, every sixteenth shows nothing and every sixteenth two findings.
    assert (record["source"], record["source_images"]) == ("nih-0.25", round(0.25 * 34))
    options = {"views": ["PA"], "single_label": True, "fraction": 0.25, "fraction_seed": 0}
    assert record["config"]["source_options"] == options and record["config"]["balanced"]
    assert torch.load(*tmp_path.glob("*/model.pt"), weights_only=True)["task"] == "multiclass"


def test_model_file_says_what_it_is(undisturbed):
    (path,) = (undisturbed / "folder").glob("*/model.pt")
    record = torch.load(path, weights_only=True)
    assert record["name"] == "R14x0.5" and record["domain"] == "natural"
    assert record["classes"] == ("blue", "green", "red")
    assert record["image_size"] == 32 and record["mean"] == (0.485, 0.456, 0.406)


GRID = ("--steps", "4", "--batch-size", "8", *SMALL)


def grid_args(undisturbed, folder, nih_root, out):
    (a,) = (undisturbed / "folder").iterdir()
    (b,) = (undisturbed / "nih").iterdir()
    sources = ("--checkpoint", a, b, "scratch", "--target", f"folder:{folder}", "nih")
    return (*sources, "--data-dir", nih_root, "--out", out, *GRID)


def test_few_shot_grid(undisturbed, folder, nih_root, tmp_path):
    """2 targets x 3 networks x 2 shot counts x 2 seeds; two processes share them, one repairs."""
    args = grid_args(undisturbed, folder, nih_root, tmp_path / "out")
    args = (*args, "--shots", "1", "2", "--seeds", "2")
    stdout, _ = run("fewshot.py", *args, ranks=2, cwd=tmp_path)
    files = {path: path.read_text() for path in sorted((tmp_path / "out").glob("*/*/*.json"))}
    assert len(files) == 24
    assert stdout.count("(2)") == 12  # the closing table: means over two seeds
    record = result(tmp_path / "out", "nih/folder*/1shot-seed0.json")
    assert record["kind"] == "fewshot" and record["source_domain"] == "natural"
    assert record["target_domain"] == "medical" and record["method"] == "finetune"
    assert record["train"]["steps"] == 4 and 7 <= record["train"]["images"] <= 14
    record = result(tmp_path / "out", "folder*/nih*/2shot-seed1.json")
    assert record["train"]["images"] == 6 and record["config"]["sampling"] == "replacement"

    lost = list(files)[7]
    lost.unlink()
    stdout, _ = run("fewshot.py", *args, cwd=tmp_path)
    assert "24 cells, 23 finished already" in stdout
    again, first = json.loads(lost.read_text()), json.loads(files[lost])
    assert again["metrics"] == first["metrics"]
    assert all(path.read_text() == text for path, text in files.items() if path != lost)


def test_single_label_few_shot(nih_root, tmp_path):
    args = ("--checkpoint", "scratch", "--target", "nih", "--data-dir", nih_root, "--seeds", "1")
    args += ("--image-size", "32", "--steps", "2", "--batch-size", "4", "--shots", "1")
    run("fewshot.py", *args, "--single-label", cwd=tmp_path)
    record = result(tmp_path, "results/nih/*/1shot-seed0.json")
    assert record["config"]["target_options"] == {"single_label": True}
    assert record["train"]["images"] == 14 and record["config"]["crop"] == 32
    assert record["config"]["train_images"] == 34


def test_full_shot_transfer_continues(undisturbed, folder, tmp_path):
    (checkpoint,) = (undisturbed / "folder").iterdir()
    more = ("--checkpoint", checkpoint, "--target", f"folder:{folder}", "--steps", "60")
    args = ("--batch-size", "16", "--log-every", "5", *SMALL, *more)
    run("transfer.py", *args, "--out", tmp_path / "a", cwd=tmp_path)
    status, output = interrupt(
        (*args, "--out", tmp_path / "b"), tmp_path / "b", signal.SIGTERM, 20, script="transfer.py"
    )
    assert status == 75, output
    assert not list((tmp_path / "b").glob("*/*/*.json"))
    run("transfer.py", *args, "--out", tmp_path / "b", cwd=tmp_path)
    a, b = (result(tmp_path / name, "*/*/full-seed0.json") for name in "ab")
    assert a["metrics"] == b["metrics"] and a["shots"] is None and a["kind"] == "transfer"
    assert a["metrics"]["accuracy"] > 0.6  # chance is a third
    assert [path.name for path in (tmp_path / "b").glob("*/*/*")] == ["full-seed0.json"]


def test_real_images_end_to_end(real_data, tmp_path):
    """CIFAR-10 images from a folder and NIH X-rays: pre-train on each, few-shot to the other."""
    (tmp_path / "NIH-ChestXRay-14").symlink_to(real_data / "nih-256")
    cifar = f"folder:{real_data / 'cifar10-folder'}"
    short = ("--data-dir", tmp_path, "--image-size", "32", "--batch-size", "64")
    for source in (cifar, "nih"):
        args = ("--source", source, "--epochs", "1", "--log-every", "4", *short)
        run("pretrain.py", *args, cwd=tmp_path)
    run("fewshot.py", "--target", cifar, "nih", "--shots", "1", "--seeds", "1", "--steps", "3",
        *short, cwd=tmp_path)  # fmt: skip
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*.json")]
    assert len(records) == 6
    assert {r["source"] for r in records} == {cifar, "nih", "scratch"}
    counts = {r["source"]: r["source_images"] for r in records}
    assert counts == {cifar: 2000, "nih": 558, "scratch": 0}
    for record in records:
        first = next(iter(record["metrics"]["per_class"].values()))
        total = {"natural": 1000, "medical": 129}[record["target_domain"]]
        assert first["positives"] + first["negatives"] == total
