"""Each mistake is answered by one line that names it, exit 2, before training, and no file."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import fewshot
import models
import pretrain
import transfer
from engine import processes as engine

MAIN = {"pretrain.py": pretrain.main, "transfer.py": transfer.main, "fewshot.py": fewshot.main}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """Calls a script in an empty directory; returns its one line, having checked the rest."""
    monkeypatch.chdir(tmp_path)

    def call(script, *args):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as left:
            engine.run(MAIN[script])
        captured = capfd.readouterr()
        assert left.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert "step" not in captured.out
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return call


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("pretrain.py", "--source synthetic-natral", "did you mean 'synthetic-natural'?"),
        ("pretrain.py", "--source cifar10", "--data-dir, or --download"),
        ("pretrain.py", "--source nih --data-dir nowhere", "nowhere/NIH-ChestXRay-14"),
        ("pretrain.py", "--source folder:nowhere", "no directory nowhere/train"),
        ("pretrain.py", "--model R51x1", "did you mean 'R50x1'?"),
        ("pretrain.py", "--precision fp23", "did you mean fp32?"),
        ("pretrain.py", "--sauce nih", "did you mean --source?"),
        ("pretrain.py", "--epochs 0", "not above zero"),
        ("pretrain.py", "--lr fast", "--lr: invalid float value: 'fast'"),
        ("pretrain.py", "--epochs 2 --warmup 3", "--warmup 3 is not within --epochs 2"),
        ("pretrain.py", "--seed -1", "--seed"),
        ("pretrain.py", "--workers -1", "--workers"),
        ("pretrain.py", "--views PA", "--views means nothing for synthetic-natural"),
        ("pretrain.py", "--source nih --split-by image", "--split-by means nothing for nih"),
        ("pretrain.py", "--source nih --labels union", "--labels means nothing for nih"),
        ("pretrain.py", "--source nih+nih", "nih+nih: a dataset occurs twice"),
        ("pretrain.py", "--source nih+mimik", "did you mean 'mimic'?"),
        ("pretrain.py", "--source synthetic-xray+synthetic-natural", "is not multi-label"),
        ("pretrain.py", "--fraction 1.5", "--fraction 1.5: must be above 0 and at most 1"),
        ("pretrain.py", "--single-label", "--single-label is for multi-label datasets"),
        (
            "pretrain.py",
            "--source synthetic-xray --balanced",
            "--balanced: synthetic-xray is multi",
        ),
        ("fewshot.py", "--checkpoint scratch --split-by image", "--split-by means nothing for"),
        ("transfer.py", "--checkpoint scratch --target petz", "did you mean 'pets'?"),
        ("transfer.py", "--checkpoint scratch --recipe papre", "did you mean paper?"),
        ("transfer.py", "--checkpoint scratch --model R50x2", "did you mean"),
        ("fewshot.py", "", "run pretrain.py first"),
        ("fewshot.py", "--checkpoint runs/none", "no weights at runs/none"),
        ("fewshot.py", "--checkpoint scratch --shots 0", "not above zero"),
        ("fewshot.py", "--checkpoint scratch --shots 7 9999", "--shots 9999: class"),
        ("fewshot.py", "--checkpoint scratch --batch-size 1", "--batch-size 1"),
    ],
)
def test_options(refuse, script, args, words):
    assert words in refuse(script, *args.split())


def test_shots_name_class_and_count(refuse, folder):
    args = ("--checkpoint", "scratch", "--target", f"folder:{folder}", "--shots", "5", "21")
    assert "--shots 21: class blue has only 20 training images" in refuse("fewshot.py", *args)


def small_checkpoint(path, **more):
    model = models.create_model("R14x0.5", 3)
    path.mkdir(parents=True)
    torch.save({"model": model.state_dict(), **more}, path / "model.pt")
    return path


def test_checkpoint_of_another_network(refuse, tmp_path):
    path = small_checkpoint(tmp_path / "run") / "model.pt"
    args = ("--checkpoint", path, "--model", "R26x0.5", "--source", "nih")
    line = refuse("fewshot.py", *args)
    assert "weights of another network: body.block1.unit02" in line and "--model" in line


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoint_with_code(refuse, tmp_path):
    path = small_checkpoint(tmp_path / "run", epoch=Payload()) / "model.pt"
    assert "holds code" in refuse("fewshot.py", "--checkpoint", path)
    assert not (tmp_path / "executed").exists()


def test_truncated_checkpoint(refuse, tmp_path):
    path = small_checkpoint(tmp_path / "run") / "model.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in refuse("transfer.py", "--checkpoint", path)


def make_folder(root, classes=("a", "b")):
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((32, 32, 3), 40 * i, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_truncated_image(refuse, tmp_path, split, workers):
    root = make_folder(tmp_path / "set")
    broken = root / split / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    args = ("--source", f"folder:{root}", "--image-size", "32", "--workers", workers)
    assert str(broken) in refuse("pretrain.py", *args)
    args = ("--checkpoint", "scratch", "--target", f"folder:{root}", "--shots", "3")
    assert str(broken) in refuse("fewshot.py", *args)


def test_two_checkpoints_of_one_name(refuse, folder):
    args = ("--checkpoint", "scratch", "--target", f"folder:{folder}", f"folder:{folder}/.")
    assert "would write results/folder-" in refuse("fewshot.py", *args, "--shots", "1")


def test_empty_class(refuse, tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "train" / "c").mkdir()
    assert str(root / "train" / "c") in refuse("pretrain.py", "--source", f"folder:{root}")


def test_broken_and_foreign_result(refuse, folder, tmp_path):
    path = tmp_path / "results" / f"folder-{folder.name}" / "scratch-R14x0.5" / "1shot-seed0.json"
    path.parent.mkdir(parents=True)
    args = ("--checkpoint", "scratch", "--target", f"folder:{folder}", "--shots", "1")
    for text in ('{"schema": 1', '{"schema": 2, "kind": "fewshot"}', "[]", "{}"):
        path.write_text(text)
        assert path.name in refuse("fewshot.py", *args)


def test_one_line_also_from_the_shell(tmp_path):
    _, stderr = run("pretrain.py", "--source", "cifar11", cwd=tmp_path, status=2)
    assert "did you mean 'cifar10'?" in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [*MAIN, "plot.py"])
def test_help_states_defaults(script, tmp_path):
    stdout, _ = run(script, "--help", cwd=tmp_path)
    assert "--out" in stdout and "default:" in stdout
    assert subprocess.list2cmdline([script]) in stdout
