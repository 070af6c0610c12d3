"""The same pre-training in any layout; what decides a run, and the files that it leaves."""

import functools
import signal
import types

import interruption
import numpy as np
import pytest
import torch
from conftest import run
from grids import call, outputs
from interruption import EPOCHS, Training, assert_same_tensors, at_step, die, undisturbed
from packing import rows_of

import data
import models
import pretrain
from engine import memory
from engine.metrics import compute_metrics
from readers import transforms
from readers.images import ImageDataset

CHESTS = 96
LAYOUTS = {  # ranks, options
    "one": (1, ()),
    "two": (2, ()),
    "two-accumulate": (2, ("--accumulate", 2)),
    "accumulate": (1, ("--accumulate", 3)),
    "recompute": (1, ("--checkpoint-activations",)),
    "workers": (1, ("--workers", 2)),
}
# On every rank and in every part another number of images: 13 is 7 + 6, 5 + 5 + 3, 4 + 3 + 3 + 3.
SOURCES = {
    "folder": ("--batch-size", 13, "--epochs", 3.25, "--lr", 0.1),
    "chests": ("--source", "nih", "--batch-size", 12, "--epochs", 1.875, "--lr", 0.03),
}
PAIRS = [("folder", layout) for layout in LAYOUTS if layout != "one"]
PAIRS += [("chests", "two"), ("chests", "two-accumulate")]


def chests(*args, **options):
    """X-rays: every second one of the first epoch has no label at all, the others have some."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (CHESTS, 1, 20, 18), dtype=np.uint8))
    labels = rng.choice(np.float32([0, 1, np.nan]), (CHESTS, 5), p=(0.3, 0.2, 0.5))
    labels[np.arange(CHESTS), rng.integers(5, size=CHESTS)] = 1
    order, _ = data.batch_indices(0, CHESTS, CHESTS, seed=0)
    labels[order[1::2]] = np.nan
    about = labels, tuple("abcde"), "multilabel", "medical"
    return ImageDataset("chests", lambda i, size: images[i], *about)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Function of (source, layout) -> its Training, of 15 steps."""

    @functools.cache
    def train(source, layout):
        ranks, more = LAYOUTS[layout]
        training = Training(folder, tmp_path_factory.mktemp(layout), *SOURCES[source], *more)
        patch = functools.partial(setattr, data, "load_dataset", chests)
        training.go(patch=patch if source == "chests" else None, ranks=ranks)
        return training

    return train


@pytest.mark.parametrize("source, layout", PAIRS)
def test_any_layout_gives_the_same_training(source, layout, trained):
    one, other = trained(source, "one"), trained(source, layout)

    losses = one.losses().values()
    assert len(losses) == 15 and max(losses) > 1.1 * min(losses)
    for mine, its in zip(one.lines(), other.lines(), strict=True):
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=3e-3)
        # Rounding may carry one of the 590 units over its bound.
        assert its["clipped"] == pytest.approx(mine["clipped"], abs=0.004)
        assert its["lr"] == mine["lr"]
    a, b = one.result()["metrics"], other.result()["metrics"]
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for name in ("accuracy", "mean_auc", "mean_ap"):
        assert b[name] == pytest.approx(a[name], abs=1e-3), name
    assert other.result()["environment"]["world_size"] == LAYOUTS[layout][0]
    if layout == "workers":
        other.assert_same(one)


@pytest.mark.slow
def test_compiled_runs_have_the_same_losses(folder, tmp_path):
    compiled = Training(folder, tmp_path, "--compile")
    run(*compiled.argv, cwd=tmp_path)
    assert compiled.result()["config"]["compile"] is True
    assert compiled.losses() == pytest.approx(undisturbed(folder, 1).losses(), rel=1e-3)


def test_batch_size_auto_changes_no_result(folder, tmp_path, monkeypatch):
    """A batch of 64, the recipe's, in one part and in 64; the same run by another name."""
    found, words = [], ("--recipe", "synthetic", "--batch-size")
    for free, parts in ((2**50, 1), (0, 64)):
        auto = Training(folder, tmp_path, *words, "auto", out=tmp_path / str(parts))
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        ((out, _),) = auto.go()
        assert f"{64 // parts} images at a time" in out
        record = auto.result()
        assert (record["config"]["batch_size"], record["layout"]["accumulate"]) == (64, parts)
        assert len(auto.losses()) == 3
        found.append(auto)
        before = {path: path.stat().st_mtime_ns for path in auto.paths("*")}
        ((out, _),) = Training(folder, tmp_path, *words, 64, out=auto.out).go()
        assert "finished already" in out
        assert {path: path.stat().st_mtime_ns for path in auto.paths("*")} == before
    assert found[1].losses() == pytest.approx(found[0].losses(), rel=1e-4)


COSINE = "--schedule cosine --warmup 1 --epochs 5 --lr 0.4".split()


@pytest.mark.parametrize(
    "source, batch_size, more, expected",
    (
        # 60 natural images in 9 epochs of 90: half an epoch of warm-up, a tenth from the steps that
        # end at 3, 6 and 8 epochs on. A batch below that of one worker has no warm-up.
        ("folder", 12, (), [46875e-7] * 14 + [46875e-8] * 15 + [46875e-9] * 10 + [46875e-10] * 6),
        ("folder", 48, (), [0.01875] * 3 + [1875e-6] * 4 + [1875e-7] * 2 + [1875e-8] * 3),
        # 40 X-rays in 18 epochs of 90: three epochs of warm-up from a batch of 16.
        ("nih", 40, (), [0.0009375, 0.00125, *[15625e-7] * 3, *[15625e-8] * 6, 15625e-9]),
        ("nih", 80, (), [0.002291667, 0.003125] + [3125e-7] * 3 + [3125e-8] * 2 + [3125e-9] * 2),
        # Four epochs from the end of the warm-up on: cosines of a quarter of pi, of a half, ...
        ("folder", 60, COSINE, [0.09375, 0.08002061, 0.046875, 0.01372937, 0]),
        # The last batch goes beyond the fifth epoch.
        ("folder", 48, COSINE, [0.07, 0.07091275, 0.05452464, 0.03163371, 0.0109835, 461687e-9, 0]),
    ),
)
def test_rate_of_each_step(source, batch_size, more, expected, folder, nih_root, tmp_path):
    options = ("--batch-size", batch_size, "--image-size", 16, "--epochs", 9, *more)
    if source == "nih":
        options += ("--source", "nih", "--data-dir", nih_root, "--epochs", 18)
    training = Training(folder, tmp_path, options=options)
    training.go()
    rates = [line["lr"] for line in training.lines()]
    assert rates[: len(expected)] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_result(nih_root, tmp_path):
    words = ("--source", "nih", "--data-dir", nih_root)
    options = ("--epochs", 2, "--batch-size", 16, "--image-size", 16)
    training = Training(None, tmp_path, *words, options=options)
    ((out, _),) = training.go()
    (path,) = training.paths("result.json")
    record = interruption.strict(path.read_text())
    assert (record["schema"], record["kind"], record["recipe"]) == (1, "pretrain", "paper")
    assert (record["source"], record["source_domain"]) == ("nih", "medical")
    assert record["config"]["clipping"] == 0.01 and record["config"]["warmup"] == 15 * 2 / 90
    assert record["metrics"]["per_class"]["Edema"]["auc"] is None
    assert record["metrics"]["top5"] is None
    assert record["environment"]["torch"] == torch.__version__
    train, flops = record["train"], 3 * models.forward_flops("R14x0.5", 14, 16)
    assert (train["images"], record["source_images"], train["steps"]) == (40, 40, 5)
    assert train["flops_per_second"] == pytest.approx(flops * 5 * 16 / train["seconds"])
    assert f"{train['flops_per_second'] / 1e9:.1f} " in out and train["peak_share"] > 0


def test_a_dry_run_says_steps_memory_and_time(folder, tmp_path, monkeypatch, capsys):
    """Where a step were of 0.04 images a second; nothing is written."""
    monkeypatch.setattr(memory, "flops_per_second", lambda *args: 3 * args[3] * 0.04)
    words = ("--source", f"folder:{folder}", "--image-size", 32, "--batch-size", 8, "--epochs", 3)
    call(pretrain, *words, "--dry-run", "--out", tmp_path / "runs")
    rows = {key: cells[0] for key, cells in rows_of(capsys.readouterr().out).items()}
    expected = {"images": "60", "batch_size": "8", "lr": "0.1", "epochs": "3.0", "steps": "23"}
    expected["hours"] = "1.28"  # 23 * 8 / 0.04 / 3600
    assert expected.items() <= rows.items() and 0.1 < float(rows["GB of memory a process"]) < 20
    assert not (tmp_path / "runs").exists()


def test_model_file_says_what_it_is(folder):
    record = undisturbed(folder, 1).load("model.pt")
    sample, name = record.pop("sample"), f"folder-{folder.name}-R14x0.5"
    assert sample.isfinite().all() and len(sample) == interruption.IMAGES
    expected = {"name": "R14x0.5", "domain": "natural", "task": "multiclass", "image_size": 16}
    expected |= {"classes": ("blue", "green", "red"), "mean": (0.485, 0.456, 0.406), "run": name}
    assert (expected | {"recipe": "paper", "seed": 0}).items() <= record.items()


@pytest.mark.parametrize(
    "source, recipe, seed, name",
    [
        ("nih", "paper", 0, "nih-R50x1"),
        ("nih", "paper", 12, "nih-R50x1-seed12"),
        ("imagenet1k-0.1", "optimised", 0, "imagenet1k-0.1-R50x1-optimised"),
        ("imagenet1k", "optimised", 1, "imagenet1k-R50x1-optimised-seed1"),
        ("synthetic-natural", "synthetic", 0, "synthetic-natural-R50x1"),
        ("synthetic-natural", "paper", 0, "synthetic-natural-R50x1-paper"),
    ],
)
def test_a_run_is_named_after_what_is_not_its_default(source, recipe, seed, name):
    config = {"source": source.removesuffix("-0.1"), "model": "R50x1", "recipe": recipe}
    about = types.SimpleNamespace(name=source, domain=data.DATASETS[config["source"]].domain)
    assert pretrain.run_name(config | {"seed": seed}, about) == name


def test_the_weights_of_the_least_loss_are_kept_also_when_killed(folder, tmp_path, monkeypatch):
    """Of three epochs the last one climbs: the least loss is the second's."""
    rate = "learning_rate", lambda step, _: 0.003 if step < EPOCHS[1] else -0.01
    monkeypatch.setattr(pretrain, *rate)
    words = ("--keep", "best", "--save-minutes", 1e-6)
    one, other = (Training(folder, tmp_path, *words, out=tmp_path / name) for name in "ab")
    one.go()
    for step in (12, 20):
        other.go(-signal.SIGKILL, at_step(step, die))
    other.go()
    best, again = one.load("model-best.pt"), other.load("model-best.pt")
    losses = {line["step"]: line["test"]["loss"] for line in one.lines("test")}
    least = min(losses, key=losses.get)
    assert (best["step"], best["loss"]) == (least, losses[least]) and least == EPOCHS[1]
    assert_same_tensors(best["model"], again["model"])
    assert torch.equal(best["sample"], again["sample"]) and best["classes"] == again["classes"]
    test = data.load_dataset(f"folder:{folder}", split="test")
    shown = types.SimpleNamespace(read=lambda i: transforms.resize_center_crop(test.read(i), 16))
    (path,) = one.paths("model-best.pt")
    found = compute_metrics(outputs(path, shown, range(21), "forward"), test.labels, test.classes)
    assert found["loss"] == pytest.approx(losses[least], rel=1e-5)
    path.unlink()
    ((_, err),) = one.go(2)
    assert f"no weights at {path}, though" in err and f"finished; remove {path.parent}\n" in err
    one.paths("result.json")[0].unlink()
    ((_, err),) = one.go(2)
    assert f"no weights at {path}" in err


def test_options_that_shape_a_source(nih_root, tmp_path):
    more = ("--source", "nih", "--data-dir", nih_root, "--epochs", 1, "--fraction", 0.25)
    training = Training(None, tmp_path, *more, "--views", "PA", "--single-label", "--balanced")
    training.go()
    assert [path.name for path in training.out.iterdir()] == ["nih-0.25-R14x0.5"]
    record = training.result()
    # Of 40 images, every sixteenth shows nothing and every sixteenth two findings.
    assert (record["source"], record["source_images"]) == ("nih-0.25", round(0.25 * 34))
    options = {"views": ["PA"], "single_label": True, "fraction": 0.25, "fraction_seed": 0}
    assert record["config"]["source_options"] == options and record["config"]["balanced"]
    assert training.load("model.pt")["task"] == "multiclass"
