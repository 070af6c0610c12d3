"""Grids: who runs which cell, what fails, what is read, frozen features, distances, --dry-run."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import run
from grids import QUICK, call, outputs, results
from interruption import die, free_port, run_forked, start, wait
from trees import Trees, save

import data
import fewshot
import pretrain
import transfer
from data import few_shot_indices
from engine import distance, evaluate, linear, memory
from engine.console import EXIT_STOPPED
from engine.grid import PATIENCE
from engine.metrics import compute_metrics
from engine.processes import Stopped
from readers import images, transforms
from readers.xrays import PADCHEST_CLASSES


def grid_args(folder, checkpoints, *more, method="finetune", shots=(1, 2), seeds=2, targets=()):
    checkpoints = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
    words = ("--checkpoint", *checkpoints, "--target", *(targets or [f"folder:{folder}"]), *QUICK)
    words += ("--shots", *shots, "--seeds", seeds, "--method", method)
    return (*words, *(("--steps", 2, "--batch-size", 8) if method == "finetune" else ()), *more)


@pytest.fixture(autouse=True)
def grid(folder, checkpoint, tmp_path, monkeypatch):
    """Runs fewshot.py on grid_args in a folder of its own; its status."""
    monkeypatch.chdir(tmp_path)

    def run(*more, folder=folder, checkpoints=checkpoint, **options):
        return call(fewshot, *grid_args(folder, checkpoints, *more, **options))

    return run


def found():
    return results(Path("results"))


@pytest.fixture
def spy(monkeypatch):
    """Notes the calls of a function of a module."""

    def spied(module, name):
        mock = Mock(wraps=getattr(module, name))
        monkeypatch.setattr(module, name, mock)
        return lambda place: [call.args[place] for call in mock.call_args_list]

    return spied


@pytest.mark.parametrize("method", ["finetune", "nearest-mean"])
def test_a_failing_cell_stops_no_other(grid, monkeypatch, capsys, method):
    original = fewshot.METHODS[method]

    def fails(cell, *args):
        if cell.seed == 1 and cell.shots == 2:
            raise RuntimeError("no memory\nis left")
        return original(cell, *args)

    monkeypatch.setitem(fewshot.METHODS, method, fails)
    assert grid(method=method) == 1
    assert len(found()) == 3 and not any("2shot-seed1" in name for name in found())
    output = capsys.readouterr().out
    assert "1 cell failed" in output
    (line,) = (line for line in output.splitlines() if "no memory" in line)
    assert "2shot-seed1" in line and "no memory is left" in line
    assert re.search(r"\| 0\.\d{3} \(1\) +\|$", output, re.MULTILINE)  # two shots: one seed is left
    monkeypatch.setitem(fewshot.METHODS, method, original)
    assert grid(method=method) == 0 and len(found()) == 4
    assert "4 cells, 3 finished already" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["finetune", "linear"])
def test_a_failing_distance_fails_each_cell(grid, monkeypatch, capsys, method):
    monkeypatch.setattr(distance, "compare", lambda *_: 1 // 0)
    assert grid(method=method) == 1 and not found()
    assert capsys.readouterr().out.count("json: integer division or modulo by zero") == 4


@pytest.mark.parametrize("split", ["train", "test"])
def test_cells_of_other_data_are_refused_but_by_older_ones(grid, folder, tmp_path, capsys, split):
    images = shutil.copytree(folder, tmp_path / "images")
    assert grid(folder=images, method="nearest-mean", shots=(1,)) == 0
    assert all(len(record["config"]["data"]) == 8 for record in found().values())
    shutil.copy(images / split / "red/00.png", images / split / "blue/01.png")
    said = f"1shot-seed0-nearest-mean.json was made of other data: {split} content changed since"
    with pytest.raises(ValueError, match=said):
        grid(folder=images, method="nearest-mean", shots=(1,), seeds=3)
    for name, record in found().items():
        del record["config"]["data"]
        Path("results", name).write_text(json.dumps(record))
    capsys.readouterr()
    assert grid(folder=images, method="nearest-mean", shots=(1,), seeds=3) == 0
    assert "3 cells, 2 finished already" in capsys.readouterr().out


def test_a_killed_process_loses_the_cell_in_flight_alone(folder, checkpoint, tmp_path):
    """Two processes of torchrun do the rest, and all is as one does it, to the last bit."""
    fine_tune, cells = fewshot.METHODS["finetune"], []

    def dies(cell, *args):
        """The second process in its second cell, once the first has done a cell too."""
        cells.append(cell)
        if os.environ["RANK"] == "1" and len(cells) == 2:
            while len(found()) < 2:
                time.sleep(0.01)
            die()
        return fine_tune(cell, *args)

    patch = partial(fewshot.METHODS.update, finetune=dies)
    args = grid_args(folder, (checkpoint, "scratch"))
    about = fewshot.main, ("fewshot.py", *args), tmp_path, patch
    port = free_port()
    pids = [start(*about, rank, 2, port) for rank in (0, 1)]
    assert [wait(pid) for pid in pids] == [2, -signal.SIGKILL]
    before = {path: path.stat() for path in tmp_path.glob("results/*/*/*.json")}
    assert len(before) == 7
    (tmp_path / "cache").mkdir()
    args = grid_args(folder, [checkpoint, "scratch"], seeds=3)
    more = ("--cache-dir", tmp_path / "cache")
    output, _ = run("fewshot.py", *args, *more, ranks=2, cwd=tmp_path)
    assert "12 cells, 7 finished already" in output
    assert len(set(re.findall(r"^\[(\d)/5\]", output, re.MULTILINE))) == 5
    for path, stat in before.items():  # not written again
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert not list(tmp_path.glob("results/**/.*"))  # nor half of a file
    assert not list((tmp_path / "cache").iterdir())
    call(fewshot, *args, "--out", "alone")
    one, two = results(tmp_path / "alone"), found()
    assert one.keys() == two.keys() and len(one) == 12
    for name, record in one.items():
        assert record["metrics"] == two[name]["metrics"]
        assert record["distance"] == two[name]["distance"]


def test_a_time_limit_stops_both_processes_in_one_line(folder, checkpoint, tmp_path):
    args = ("fewshot.py", *grid_args(folder, checkpoint, seeds=9), "--time-limit", 1e-9)
    (_, errors), (_, others) = run_forked(fewshot.main, args, tmp_path, EXIT_STOPPED, ranks=2)
    said = "stopped by --time-limit after step 1; the same command continues\n"
    assert errors.endswith(said) and "Traceback" not in errors + others and not found()


@pytest.mark.parametrize("method", ["finetune", "linear"])
def test_each_cell_reads_its_own_images_and_says_so(grid, checkpoint, monkeypatch, method):
    """Prepared for training, except that frozen features are of images prepared for testing."""
    note = Mock(return_value=({"accuracy": 0.5}, {}))
    monkeypatch.setitem(fewshot.METHODS, method, note)
    more = ("--batch-size", 4) if method == "finetune" else ()
    assert grid(*more, method=method) == 0
    cells = [made.args[0] for made in note.call_args_list]
    target, weights = cells[0].target, checkpoint / "model.pt"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    rule = transfer.hyperrule(6, 32)._replace(resize=40, crop=32)
    training, testing = (transfer.choose_pipeline(target, rule, train) for train in (True, False))
    own = training if method == "finetune" else testing
    dataset, pipeline = target.train
    assert str(pipeline.augment) == str(own.augment) and len(cells) == len(found()) == 4
    for cell in cells:
        rows = target.rows(cell)
        assert (dataset.labels[rows] == target.train_set.labels[cell.indices]).all()
        for row, original in zip(rows, cell.indices, strict=True):
            expected = own.read(target.train_set, original)
            assert torch.equal(pipeline.read(dataset, row), expected)
        expected = {"images": 3 * cell.shots, "seed": cell.seed, "target_options": {}, "crop": 32}
        expected["weights"] = digest[:16]
        if method == "finetune":
            expected |= {"batch_size": 4, "steps": 2, "lr": 0.001, "clipping": 0.01}
            expected["sampling"] = "replacement" if cell.shots == 1 else "shuffle"  # of 3 or 6
        assert expected.items() <= cell.config.items()
    for part, original in ((target.test, target.test_set), (target.sample, target.train_set)):
        assert torch.equal(part[1].read(part[0], 7), testing.read(original, 7))
    for record in found().values():  # what changes no result stands elsewhere
        assert not record["config"].keys() & {"workers", "out", "log_every", "checkpoint"}
        about = {"checkpoint": str(weights), "sha256": digest, "workers": None}
        assert record["layout"] == about


def test_each_image_is_read_once_for_the_whole_grid(grid, folder, checkpoint, spy):
    read_image = spy(images, "read_image")
    assert grid(checkpoints=(checkpoint, "scratch")) == 0
    reads = read_image(0)
    labels = data.load_dataset(f"folder:{folder}").labels
    chosen = {i for seed in (0, 1) for i in few_shot_indices(labels, 2, seed)}
    assert len(set(reads)) == 21 + 60 and sum("/test/" in where for where in reads) == 21
    # The distance looks at the training set, and its first image tells the size of all.
    assert len(reads) == 21 + 60 + len(chosen) + 1


@pytest.mark.parametrize("method", ["linear", "nearest-mean"])
def test_frozen_features_classify_as_by_hand(grid, folder, checkpoint, spy, method):
    """Through the whole script, against features taken here; full: all training images."""
    setup, predict = spy(fewshot, "setup"), spy(transfer, "predict")
    train, test = data.load_splits(f"folder:{folder}")
    cells = itertools.product((1, 2), (0, 1))
    chosen = {cell: few_shot_indices(train.labels, *cell) for cell in cells}
    few = len(set(np.concatenate(list(chosen.values()))))
    assert grid(method=method) == 0
    assert sorted(predict(3)) == sorted([few, 21, 60])  # 60: the sample of the distance
    assert grid(method=method, shots=(1, "full")) == 0
    assert sorted(predict(3)[3:]) == [21, 60, 60]
    assert setup(1) == [PATIENCE] * 2  # as one process may wait long for what another has to do
    assert grid() == 0 and len(found()) == 10  # another method, other files
    file, name = checkpoint / "model.pt", f"folder-{folder.name}"
    for (shots, seed), rows in (chosen | {(None, seed): range(60) for seed in (0, 1)}).items():
        features = outputs(file, train, rows), train.labels[rows], outputs(file, test)
        logits, facts = linear.CLASSIFIERS[method](*features, 3)
        expected = compute_metrics(logits, test.labels, test.classes)
        ending = f"{f'{shots}shot' if shots else 'full'}-seed{seed}-{method}.json"
        record = found()[f"{name}/{name}-R14x0.5/{ending}"]
        assert record["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert record["metrics"]["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-3)
        assert (record["method"], record["recipe"], record["shots"]) == (method, None, shots)
        assert record["kind"] == ("fewshot" if shots else "transfer")
        about = record["train"]
        assert (about["images"], about["steps"]) == (len(rows), None)
        assert about.keys() >= facts.keys()
        assert not set(record["config"]) & set(fewshot.TRAINING)


def test_frozen_cells_stop_between_two(grid, monkeypatch):
    """Asked in the middle of the first."""
    original = linear.CLASSIFIERS["nearest-mean"]

    def asked(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    monkeypatch.setitem(linear.CLASSIFIERS, "nearest-mean", asked)
    with pytest.raises(Stopped, match="SIGUSR1"):
        grid(method="nearest-mean")
    assert len(found()) == 1


@pytest.fixture(scope="module")
def padchest_root(tmp_path_factory):
    """Six images of each class, of Consolidation none alone: its name makes Infiltrations of them;
    and as many without labels.
    """
    trees = Trees(tmp_path_factory.mktemp("padchest"))
    texts = [f"['{cls.lower()}']" for cls in PADCHEST_CLASSES] + ["nan"]
    rows = []
    for k, text in enumerate(texts * 6):
        rows.append({"ImageID": f"{k}.png", "PatientID": f"{10**35 + k}", "Labels": text})
        if text != "nan":
            save(trees.padchest / f"{k}.png", trees.noise(10, 12, dtype=np.uint16))
    trees.write_padchest(rows)
    return trees.root


@pytest.mark.parametrize("method", ["finetune", "linear", "nearest-mean"])
def test_padchest_has_one_label_an_image(grid, padchest_root, spy, capsys, method):
    training, testing = spy(transfer, "to_input"), spy(evaluate, "to_input")
    more = "--data-dir", padchest_root, "--split-by", "image"
    assert grid(*more, targets=["padchest"], method=method, shots=(1, 3), seeds=1) == 0
    said = "padchest: no training image shows Consolidation; no shots of it are drawn"
    assert capsys.readouterr().out.count(said) == 1
    for record in found().values():
        config, consolidation = record["config"], record["metrics"]["per_class"]["Consolidation"]
        assert config["images"] == 26 * config["shots"]
        assert config["normalization"] == [[0.5] * 3, [0.5] * 3]
        assert config["train_images"] + config["test_images"] == 26 * 6
        assert config["target_options"]["single_label"] is True
        assert consolidation["positives"] == 0 and consolidation["auc"] is None
        assert record["distance"]["images"] == config["train_images"]
    used = training(1) + testing(1)
    assert len(found()) == 2 and set(used) == {transforms.NORMALIZATION["medical"]}
    grid(method=method, shots=(1,), seeds=1)
    assert testing(1)[-1] == transforms.NORMALIZATION["natural"]  # as the source's
    assert len({*training(1)}) == (2 if method == "finetune" else 0)


def test_all_of_padchest_with_one_label_or_with_27(padchest_root, checkpoint, capsys):
    words = ("--checkpoint", checkpoint, "--target", "padchest", "--data-dir", padchest_root)
    words += ("--split-by", "image", *QUICK, "--steps", 2, "--batch-size", 8)
    for more, count in ((), 156), (["--no-single-label"], 162):
        assert call(transfer, *words, *more, "--out", str(count)) == 0
        (record,) = results(Path(str(count))).values()
        config, per_class = record["config"], record["metrics"]["per_class"]
        assert config["train_images"] + config["test_images"] == count and len(per_class) == 27
        assert ("single_label" in config["target_options"]) == (not more)
        total = sum(about["positives"] for about in per_class.values())
        assert (total == config["test_images"]) == (not more)
    assert "no training image" not in capsys.readouterr().out


def test_scratch_is_trained_twice_with_scratch_steps(grid):
    assert grid("--scratch-steps", 5, checkpoints="scratch", shots=(1,), seeds=1) == 0
    steps = {r["source"]: (r["train"]["steps"], r["config"]["warmup"]) for r in found().values()}
    assert steps == {"scratch": (2, 0), "scratch-5steps": (5, 1)}
    for record in found().values():
        about = record["source_domain"], record["source_images"], record["distance"]
        assert about == (None, 0, None) and record["layout"]["checkpoint"] == "scratch"


def test_distance_of_a_result_is_that_of_its_features(grid, folder, checkpoint):
    grid(method="nearest-mean", shots=(1,), seeds=1)
    (record,) = found().values()
    file = checkpoint / "model.pt"
    sample = torch.load(file, weights_only=True)["sample"]
    assert sample.shape == (60, distance.DIMENSIONS) and sample.dtype == torch.float32
    train = data.load_dataset(f"folder:{folder}")
    expected = distance.compare(sample, distance.project(outputs(file, train)))
    assert record["distance"] == pytest.approx(expected, rel=1e-3)
    assert record["distance"]["images"] == 60
    # The same images, but that pre-training crops what transfer shows whole.
    assert 0.5 < record["distance"]["frechet_relative"] < 2


@pytest.mark.parametrize("method", ["finetune", "nearest-mean"])
def test_a_distance_is_measured_once(grid, folder, checkpoint, monkeypatch, tmp_path, method):
    shutil.copytree(folder, tmp_path / "other")
    content = torch.load(checkpoint / "model.pt", weights_only=True)
    torch.save(content | {"source": "pets", "run": "pets-R14x0.5"}, tmp_path / "pets.pt")
    numbers = itertools.count()
    monkeypatch.setattr(distance, "compare", lambda *_: next(numbers))
    targets, both = [folder, tmp_path / "other"], [checkpoint, tmp_path / "pets.pt"]
    targets = [f"folder:{target}" for target in targets]
    assert grid(targets=targets, checkpoints=both, method=method, shots=(1,)) == 0
    by_pair = {}
    for record in found().values():
        by_pair.setdefault((record["source"], record["target"]), set()).add(record["distance"])
    assert len(found()) == 8 and sorted(map(list, by_pair.values())) == [[0], [1], [2], [3]]


def test_features_that_cannot_be_had_are_tried_once(grid, monkeypatch, capsys):
    extract = Mock(side_effect=ValueError("a.png: unreadable image"))
    monkeypatch.setattr(fewshot, "extract", extract)
    assert grid(method="linear", shots=(1, 2), seeds=2) == 1
    out = capsys.readouterr().out
    assert extract.call_count == 1 and "4 cells failed" in out
    assert out.count("a.png: unreadable") == 4


def test_a_dry_run_writes_nothing(grid, checkpoint, monkeypatch, tmp_path, capsys):
    grid(shots=(1,), seeds=1)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(transfer.Target, "decode", None)
    step = Mock(side_effect=[torch.OutOfMemoryError, torch.OutOfMemoryError, *[None] * 99])
    monkeypatch.setattr(memory, "training_step", step)
    assert not grid("--dry-run", checkpoints=(checkpoint, "scratch"), seeds=3)
    assert "12 cells, 1 finished already" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    assert [call.args[1] for call in step.call_args_list[:4]] == [8, 4, 2, 2]


def test_few_shot_grid(checkpoint, folder, nih_root, tmp_path):
    """2 targets x 3 networks x 2 shot counts, shared by two processes."""
    small, medical = (*QUICK, "--batch-size", 8), ("--source", "nih", "--data-dir", nih_root)
    call(pretrain, *medical, *small, "--epochs", 1, "--out", tmp_path / "runs")
    networks = checkpoint, tmp_path / "runs" / "nih-R14x0.5"
    argv = ("fewshot.py", "--checkpoint", *networks, "scratch", "--target", f"folder:{folder}")
    argv += ("nih", "--data-dir", nih_root, "--shots", 1, 2, "--seeds", 1, "--steps", 4, *small)
    ((said, _), _) = run_forked(fewshot.main, (*argv, "--out", tmp_path / "out"), tmp_path, ranks=2)
    assert len(results(tmp_path / "out")) == said.count("(1)") == 12  # of the closing table
    (record,) = results(tmp_path / "out", "nih/folder*/1shot-seed0.json").values()
    assert record["kind"] == "fewshot" and record["source_domain"] == "natural"
    assert record["target_domain"] == "medical" and record["method"] == "finetune"
    assert record["train"]["steps"] == 4 and 7 <= record["train"]["images"] <= 14
    (record,) = results(tmp_path / "out", "folder*/nih*/2shot-seed0.json").values()
    assert record["train"]["images"] == 6 and record["config"]["sampling"] == "shuffle"


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
