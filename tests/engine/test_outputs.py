"""What is kept beside results, against forward passes and metrics taken here."""

import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses
from grids import QUICK, call, outputs, results

import data
import fewshot
import models
from engine import options
from engine.grid import Network
from engine.metrics import compute_metrics
from readers.labels import shared_classes


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def grid(*words):
    """{path: record} of what fewshot.py has left in results/."""
    assert call(fewshot, *words, *QUICK) == 0
    return results(Path("results"))


def test_predictions_and_the_network_that_made_them(folder, checkpoint, capsys):
    words = ("--target", f"folder:{folder}", "--checkpoint")
    more = ("--shots", 2, "--seeds", 3, 5, "--steps", 3, "--batch-size", 8)
    more += ("--save", "predictions", "model")
    name = f"folder-{folder.name}/folder-{folder.name}-R14x0.5/2shot-seed3"
    record, test = grid(*words, checkpoint, *more)[f"{name}.json"], data.load_splits(words[1])[1]
    kept = np.load(f"results/{name}.npz")
    metrics = compute_metrics(torch.from_numpy(kept["logits"]), test.labels, test.classes)
    assert metrics == record["metrics"] and tuple(kept["classes"]) == ("blue", "green", "red")
    assert (kept["labels"] == test.labels).all()
    assert list(kept["names"]) == [test.where(i) for i in range(21)]
    model = Path(f"results/{name}.pt")
    np.testing.assert_allclose(
        outputs(model, test, kind="forward"), kept["logits"], rtol=1e-4, atol=1e-4
    )
    # It is a --checkpoint like any other, and as it is gives the same.
    own = f"folder-{folder.name}-to-folder-{folder.name}-2shot-seed3-R14x0.5"
    found = grid(*words, model, "--eval-only", "--save", "predictions")
    again = found[f"folder-{folder.name}/{own}/full-seed0-eval.json"]
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert (again["layout"]["sha256"], again["config"]["weights"]) == (digest, digest[:16])
    assert again["metrics"] == record["metrics"] and again["kind"] == "transfer"
    assert again["config"]["labels"] == ["blue", "green", "red"] and again["train"]["images"] == 0
    # What lies beside a result that was removed is not taken for the next one's.
    Path(f"results/{name}.json").unlink()
    assert grid(*words, checkpoint, *more[:-3])[f"{name}.json"]["metrics"] == record["metrics"]
    assert not Path(f"results/{name}.npz").exists() and not model.exists()
    assert grid(*words, checkpoint, *more)[f"{name}.json"]["metrics"] == record["metrics"]
    # A finished run that lacks a file is run again.
    Path(f"results/{name}.npz").unlink()
    capsys.readouterr()
    assert grid(*words, checkpoint, *more)[f"{name}.json"]["metrics"] == record["metrics"]
    said = capsys.readouterr().out
    assert "2 cells, 1 finished already" in said and "2shot-seed3.npz" in said
    assert (np.load(f"results/{name}.npz")["logits"] == kept["logits"]).all()


def test_frozen_methods_keep_predictions_and_features(folder, checkpoint, capsys):
    words = ("--target", f"folder:{folder}", "--checkpoint", checkpoint)
    keep = ("--method", "linear", "--shots", 2, "--seeds", 1, "--save", "predictions")
    (record,) = grid(*words, *keep).values()
    train, test = data.load_splits(words[1])
    (path,) = Path("results").glob("*/*/2shot-seed0-linear.npz")
    logits = torch.from_numpy(np.load(path)["logits"])
    assert compute_metrics(logits, test.labels, test.classes) == record["metrics"]
    capsys.readouterr()
    assert len(grid(*words, "--method", "features")) == 2
    assert re.search(r"seed 0: written, [\d.]+ s, 00:00 left\n$", capsys.readouterr().out)
    (path,) = Path("results").glob("*/*/full-seed0-features.npz")
    kept = np.load(path)
    for split, dataset in (("train", train), ("test", test)):
        expected = outputs(checkpoint / "model.pt", dataset)
        np.testing.assert_allclose(kept[f"{split}_features"], expected, rtol=1e-3, atol=1e-4)
        assert (kept[f"{split}_labels"] == dataset.labels).all()
        assert kept[f"{split}_names"][-1] == dataset.where(-1)


def test_a_network_is_evaluated_by_the_labels_that_it_shares(nih_root, tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    classes = ("Mass", "Fracture", "Effusion")
    about = {"name": "R14x0.5", "classes": classes, "task": "multilabel", "source": "chexpert"}
    about |= {"domain": "medical", "images": 9, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    state = models.create_model("R14x0.5", 3).state_dict()
    torch.save({"model": state, **about, "image_size": 48}, "model.pt")
    words = ("--checkpoint", "model.pt", "--target", "nih", "--data-dir", nih_root, "--eval-only")
    call(fewshot, *words, "--precision", "fp32")
    (record,) = results(Path("results"), "nih/chexpert-R14x0.5/full-seed0-eval.json").values()
    test = data.load_dataset("nih", nih_root, "test")
    logits = outputs("model.pt", test, kind="forward", domain="medical")
    found = record["metrics"]["per_class"]
    assert record["config"]["labels"] == list(found) == ["Effusion", "Mass"]
    for name, column in (("Effusion", 2), ("Mass", 0)):
        labels = test.labels[:, test.classes.index(name)]
        expected = metrics.roc_auc_score(labels, logits[:, column])
        assert found[name]["auc"] == pytest.approx(expected)
    single = data.load_dataset("nih", nih_root, "test", single_label=True)
    known = np.isin(test.classes, classes)
    unmarked = test.replace(labels=np.where(known, np.float32(np.nan), test.labels))
    for given, dataset, said in (
        ((None, None, 13), test, "names no classes, and has a head of 13 outputs for 14 classes"),
        ((classes, "multilabel"), single, "is multilabel, nih multiclass"),
        ((("Fracture",), "multilabel"), test, "it knows no 'Atelectasis'"),
        ((classes, "multiclass"), single, "it knows no 'Atelectasis'"),
        ((classes, "multilabel"), unmarked, "nih: no mark of Effusion, Mass, all that x knows"),
    ):
        about = zip(("classes", "task", "outputs"), given)
        network = Network(*["x"] * 3, **dict(about))
        refuses(ValueError, partial(shared_classes, network, dataset), said)


def test_weights_alone_are_evaluated_on_a_table_of_test_rows(folder, checkpoint, tmp_path):
    """Its head has as many outputs as the table has classes, and is taken to mean these."""
    (tmp_path / "img").symlink_to(folder)
    test = data.load_dataset(f"folder:{folder}", split="test")
    rows = ["path,split,label"]
    for i, label in enumerate(test.labels):
        rows.append(f"img/{Path(test.where(i)).relative_to(folder)},test,{test.classes[label]}")
    Path("t.csv").write_text("\n".join(rows))
    torch.save(torch.load(checkpoint / "model.pt", weights_only=True)["model"], "alone.pt")
    words = ("--target", f"table:{tmp_path}/t.csv", "--eval-only", "--image-size", 32)
    foreign = ("--checkpoint", "alone.pt", "--model", "R14x0.5", "--source", "cifar10")
    for checkpoints in foreign, ("--checkpoint", checkpoint):
        found = grid(*words, *checkpoints)
    (alone, named) = sorted(found.values(), key=lambda record: record["source"] != "cifar10")
    assert alone["metrics"] == named["metrics"] and alone["metrics"]["accuracy"] > 0.2
    assert alone["config"]["labels"] == ["blue", "green", "red"] and alone["source"] == "cifar10"
    assert alone["config"]["test_images"] == 21


def test_statistics_see_no_more_than_brightness(folder):
    images = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    found = models.create_model("statistics", 4).features(images).reshape(2, 3, 34)
    for image, row in zip(images.numpy().reshape(6, 35), found.reshape(6, 34)):
        shares = np.histogram(image, 32, (0, 1))[0] / 35
        assert row.tolist() == pytest.approx([image.mean(), image.std(), *shares], abs=1e-6)
    words = ("--target", f"folder:{folder}", "--checkpoint", "statistics", "--method", "linear")
    (record,) = grid(*words, "--shots", "full", "--seeds", 1).values()
    assert record["metrics"]["accuracy"] == 1  # the classes differ in colour
    assert record["source"] == "statistics" and record["source_images"] == 0
    assert record["distance"] is None


def test_seeds_are_a_count_or_a_list():
    assert options.seeds([2], 4) == [4, 5] and options.seeds([1], 0) == [0]
    assert options.seeds([7, 0], 0) == [7, 0]
