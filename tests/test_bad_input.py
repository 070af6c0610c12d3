"""Each mistake is answered by one line that names it, exit 2, before training, and no file."""

import pytest
import torch
from conftest import run
from grids import call
from trees import noise, save

import fewshot
import models
import plot
import pretrain
import transfer
from engine.processes import run_script

SCRIPTS = {"pretrain": pretrain, "transfer": transfer, "fewshot": fewshot}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """Calls a script in an empty directory; returns its one line, having checked the rest."""
    monkeypatch.chdir(tmp_path)

    def refused(script, *words):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as left:
            run_script(lambda: call(SCRIPTS[script], *words))
        captured = capfd.readouterr()
        assert left.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert "step" not in captured.out
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return refused


SCRATCH = "fewshot --checkpoint scratch"


@pytest.mark.parametrize(
    "line, words",
    [
        ("pretrain --source synthetic-natral", "did you mean 'synthetic-natural'?"),
        ("pretrain --source cifar10", "--data-dir, or --download"),
        ("pretrain --source nih --data-dir nowhere", "nowhere/NIH-ChestXRay-14"),
        ("pretrain --source folder:nowhere", "no directory nowhere/train"),
        ("pretrain --epochs 2 --warmup 3", "--warmup 3 is not within --epochs 2"),
        ("pretrain --seed -1", "--seed"),
        ("pretrain --batch-size 3 --accumulate 4", "--batch-size 3 is less than 1 processes x"),
        ("pretrain --batch-size auto --accumulate 2", "--accumulate: --batch-size auto chooses"),
        ("pretrain --views PA", "--views means nothing for synthetic-natural"),
        ("pretrain --source nih --split-by image", "--split-by means nothing for nih"),
        ("pretrain --source nih --blank negative", "--blank means nothing for nih; leave it out"),
        ("transfer --checkpoint scratch --domain medical", "--domain means nothing for synthetic"),
        ("pretrain --validation 1.5", "--validation 1.5: must be above 0 and below 1"),
        ("pretrain --source table:none.csv", "no file none.csv; name a table that ends in .csv"),
        ("pretrain --source nih+nih", "nih+nih: a dataset occurs twice"),
        ("pretrain --source nih+mimik", "did you mean 'mimic'?"),
        ("pretrain --source synthetic-xray+synthetic-natural", "is not multi-label"),
        ("pretrain --fraction 1.5", "--fraction 1.5: must be above 0 and at most 1"),
        ("pretrain --single-label", "--single-label is for multi-label datasets"),
        ("pretrain --source synthetic-xray --balanced", "--balanced: synthetic-xray is multi"),
        ("pretrain --recipe optimised --source synthetic-xray", "is for natural sources, not"),
        ("transfer --checkpoint scratch --target petz", "did you mean 'pets'?"),
        ("transfer --checkpoint scratch --recipe papre", "did you mean paper?"),
        ("transfer --checkpoint scratch --model R50x2", "did you mean R50x"),
        ("fewshot", "run pretrain.py first"),
        ("fewshot --checkpoint scratch runs/none", "no weights at runs/none"),
        (f"{SCRATCH} --shots 7 9999", "--shots 9999: class"),
        (f"{SCRATCH} --batch-size 1", "--batch-size 1"),
        (f"{SCRATCH} --method lineal", "did you mean linear?"),
        (f"{SCRATCH} --method linear", "--method linear: scratch has no features; leave it out"),
        (f"{SCRATCH} --target synthetic-natural-target --single-label", "--single-label means not"),
        ("fewshot --checkpoint runs/none --scratch-steps 3", "--scratch-steps: name scratch"),
        *(
            (f"fewshot --method linear {option}", f"{option.split()[0]} means nothing for --method")
            for option in ("--steps 3", "--batch-size 3", "--balanced", "--recipe bit", "--lr 1")
        ),
    ],
)
def test_options(refuse, line, words):
    assert words in refuse(*line.split())


def test_weights(refuse, tmp_path):
    whole, cut = tmp_path / "model.pt", tmp_path / "cut.pt"
    torch.save({"model": models.create_model("R14x0.5", 3).state_dict()}, whole)
    line = refuse("transfer", "--checkpoint", whole, "--model", "R26x0.5", "--source", "nih")
    assert (
        "weights of another network (36 differences: body.block1.unit02" in line
        and "--model" in line
    )
    cut.write_bytes(whole.read_bytes()[:5000])
    assert f"{cut}: damaged" in refuse("fewshot", "--checkpoint", cut)


@pytest.fixture
def tiny(tmp_path, rng):
    """folder: dataset, 2 classes of 3 + 3 images, to be spoilt."""
    for split, name, i in ((s, c, i) for s in ("train", "test") for c in "ab" for i in range(3)):
        save(tmp_path / "set" / split / name / f"{i}.png", noise(rng, 32, 32, 3))
    return tmp_path / "set"


@pytest.mark.parametrize("split, workers", [("train", 0), ("test", 2)])
def test_truncated_image(refuse, tiny, split, workers):
    broken = tiny / split / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = ("--source", f"folder:{tiny}", "--image-size", 32, "--workers", workers)
    assert str(broken) in refuse("pretrain", *words)
    words = ("--target", f"folder:{tiny}", "--shots", 3, "--workers", workers)
    assert str(broken) in refuse(*SCRATCH.split(), *words)


def test_classes_and_targets(refuse, tiny):
    words = (*SCRATCH.split(), "--target", f"folder:{tiny}", "--shots")
    assert "--shots 4: class a has only 3 training images" in refuse(*words, 2, 4)
    words = (*SCRATCH.split(), "--target", f"folder:{tiny}", f"folder:{tiny}/.", "--shots", 1)
    assert "would write results/folder-set" in refuse(*words)
    (tiny / "train" / "c").mkdir()
    assert str(tiny / "train" / "c") in refuse("pretrain", "--source", f"folder:{tiny}")


def test_broken_and_foreign_result(refuse, tiny, tmp_path):
    path = tmp_path / "results" / "folder-set" / "scratch-R14x0.5" / "1shot-seed0.json"
    path.parent.mkdir(parents=True)
    for text in ('{"schema": 1', '{"schema": 2, "kind": "fewshot"}', "[]", "{}"):
        path.write_text(text)
        assert path.name in refuse(*SCRATCH.split(), "--target", f"folder:{tiny}", "--shots", 1)


def test_one_line_also_from_the_shell(tmp_path):
    _, stderr = run("pretrain.py", "--source", "cifar11", cwd=tmp_path, status=2)
    assert "did you mean 'cifar10'?" in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [*SCRIPTS.values(), plot], ids=lambda script: script.__name__)
def test_help_states_defaults(script, capsys):
    with pytest.raises(SystemExit) as left:
        call(script, "--help")
    output = capsys.readouterr().out
    assert left.value.code == 0 and f"{script.__name__}.py" in output
    assert "--out" in output and "default:" in output
