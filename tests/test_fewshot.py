"""Grids: who runs which cell, what fails, what is read, frozen features, distances, --dry-run."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import run
from grids import QUICK, call, pretrained, results

import data
import fewshot
import models
import transfer
from data import few_shot_indices
from engine import distance, linear
from engine.grid import PATIENCE
from engine.metrics import compute_metrics
from engine.processes import Stopped
from readers import images, transforms


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    return pretrained(folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where results/ is written."""
    monkeypatch.chdir(tmp_path)


def grid_args(folder, checkpoints, *more, method="finetune", shots=(1, 2), seeds=2):
    checkpoints = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
    short = ("--steps", 2, "--batch-size", 8) if method == "finetune" else ()
    return ("--checkpoint", *checkpoints, "--target", f"folder:{folder}", *QUICK, "--shots", *shots,
            "--seeds", seeds, "--method", method, *short, *more)  # fmt: skip


def run_grid(*args, **more):
    """Status of fewshot.py on these; see grid_args."""
    return call(fewshot, *grid_args(*args, **more))


def found():
    return results(Path("results"))


METHODS = pytest.mark.parametrize("method", ["finetune", "linear", "nearest-mean"])
FROZEN = pytest.mark.parametrize("method", ["linear", "nearest-mean"])


# ------------------------------------------------------------------------------------------------
# Failures
# ------------------------------------------------------------------------------------------------


@METHODS
def test_a_failing_cell_stops_no_other(folder, checkpoint, monkeypatch, capsys, method):
    original = fewshot.METHODS[method]

    def fails(cell, *args):
        if cell.seed == 1 and cell.shots == 2:
            raise RuntimeError("no memory\nis left")
        return original(cell, *args)

    monkeypatch.setitem(fewshot.METHODS, method, fails)
    assert run_grid(folder, checkpoint, method=method) == 1
    assert len(found()) == 3 and not any("2shot-seed1" in name for name in found())
    output = capsys.readouterr().out
    assert "1 cells failed" in output
    (line,) = (line for line in output.splitlines() if "no memory" in line)
    assert "2shot-seed1" in line and "no memory is left" in line
    assert re.search(r"\| 0\.\d{3} \(1\) +\|$", output, re.MULTILINE)  # two shots: one seed is left
    monkeypatch.setitem(fewshot.METHODS, method, original)
    assert run_grid(folder, checkpoint, method=method) == 0 and len(found()) == 4
    assert "4 cells, 3 finished already" in capsys.readouterr().out


@METHODS
def test_a_failing_distance_fails_each_cell_with_its_reason(
    folder, checkpoint, monkeypatch, capsys, method
):
    def fails(*args):
        raise RuntimeError("no distance")

    monkeypatch.setattr(distance, "compare", fails)
    assert run_grid(folder, checkpoint, method=method) == 1 and not found()
    assert capsys.readouterr().out.count("json: no distance") == 4


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------

# The second process dies in its second cell, once the first is in its third.
KILLED = """
import os, pathlib, signal, time
import fewshot
from engine.processes import run_script

fine_tune, cells = fewshot.METHODS["finetune"], []

def dies(cell, signals, *args):
    cells.append(cell)
    if os.environ["RANK"] == "1" and len(cells) == 2:
        while len(list(pathlib.Path("results").rglob("*.json"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    while len(cells) == 3 and not signals.name:  # torchrun ends it too
        time.sleep(0.01)
    return fine_tune(cell, signals, *args)

fewshot.METHODS["finetune"] = dies
run_script(fewshot.main)
"""


def test_a_killed_process_loses_the_cells_in_flight_alone(folder, checkpoint, tmp_path):
    """Two processes do the rest, and all is as one process does it, to the last bit."""
    args = grid_args(folder, (checkpoint, "scratch"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "killed.py").write_text(KILLED)
    run(tmp_path / "killed.py", *args, ranks=2, cwd=tmp_path, status=1)
    before = {path: path.stat() for path in tmp_path.glob("results/*/*/*.json")}
    assert len(before) == 3
    more = ("--cache-dir", tmp_path / "cache")
    output, _ = run("fewshot.py", *args, *more, ranks=2, cwd=tmp_path)
    assert "8 cells, 3 finished already" in output
    assert len(set(re.findall(r"^\[(\d)/5\]", output, re.MULTILINE))) == 5
    for path, stat in before.items():  # not written again
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert not list(tmp_path.glob("results/**/.*"))  # nor half of a file
    assert not list((tmp_path / "cache").iterdir())
    call(fewshot, *args, "--out", "alone")
    one, two = results(tmp_path / "alone"), found()
    assert one.keys() == two.keys() and len(one) == 8
    for name, record in one.items():
        assert record["metrics"] == two[name]["metrics"]
        assert record["distance"] == two[name]["distance"]


SEVERAL = """
import json, sys
import fewshot, transfer
from engine.processes import run_script

def main():
    for script, *words in json.loads(sys.argv[1]):
        sys.argv = [script, *words]
        print(script, "status", {"fewshot": fewshot, "transfer": transfer}[script].main())

run_script(main)
"""


def test_divergence_and_time_limit_are_alike_on_both_processes(folder, checkpoint, tmp_path):
    diverges = ("--checkpoint", checkpoint, "--target", f"folder:{folder}", "--recipe", "bit")
    diverges += (*QUICK, "--batch-size", 8, "--steps", 4, "--log-every", 1, "--seeds", 2)
    late = (*grid_args(folder, checkpoint, seeds=9), "--time-limit", 1e-9)
    jobs = [("transfer", *map(str, (*diverges, "--lr", 1e30))), ("fewshot", *map(str, late))]
    (tmp_path / "several.py").write_text(SEVERAL)
    output, errors = run(tmp_path / "several.py", json.dumps(jobs), ranks=2, cwd=tmp_path)
    assert "2 cells failed" in output and output.count("not finite") == 2
    assert "transfer status 1" in output and "fewshot status" not in output
    assert "stopped by --time-limit after step 1; the same command continues" in errors
    assert "Traceback" not in errors and not found()


# ------------------------------------------------------------------------------------------------
# What is used and read
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def cells_of(monkeypatch):
    """The cells of a command line, their targets decoded; none is run."""

    def prepare(*args, method="finetune", **more):
        cells = []

        def note(cell, *_):
            cells.append(cell)
            return {"accuracy": 0.5}, {}

        monkeypatch.setitem(fewshot.METHODS, method, note)
        run_grid(*args, method=method, **more)
        return cells

    return prepare


def test_the_config_says_what_is_used(folder, checkpoint, cells_of):
    cells = cells_of(folder, checkpoint, "--batch-size", 4)
    digest = hashlib.sha256((checkpoint / "model.pt").read_bytes()).hexdigest()[:16]
    always = {"batch_size": 4, "steps": 2, "weights": digest, "target_options": {}, "lr": 0.001}
    assert len(cells) == 4
    for cell in cells:
        sampling = "replacement" if cell.shots == 1 else "shuffle"  # of 3 or 6 images
        expected = always | {"sampling": sampling, "images": 3 * cell.shots, "seed": cell.seed}
        assert expected.items() <= cell.config.items()
    for record in found().values():  # what changes no result stands elsewhere
        assert not record["config"].keys() & {"workers", "out", "log_every", "checkpoint"}
        assert record["layout"] == {"checkpoint": str(checkpoint / "model.pt"), "workers": 0}


@pytest.mark.parametrize("method", ["finetune", "linear"])
def test_each_cell_reads_its_own_images(folder, checkpoint, cells_of, method):
    """Prepared for training, except that frozen features are of images prepared for testing."""
    cells = cells_of(folder, checkpoint, method=method)
    target = cells[0].target
    rule = transfer.hyperrule(6, 32)._replace(resize=40, crop=32)
    training, testing = (transfer.choose_pipeline(target, rule, train) for train in (True, False))
    own = training if method == "finetune" else testing
    dataset, pipeline = target.train
    assert str(pipeline.augment) == str(own.augment)
    for cell in cells:
        rows = target.rows(cell)
        assert (dataset.labels[rows] == target.train_set.labels[cell.indices]).all()
        for row, original in zip(rows, cell.indices, strict=True):
            expected = own.read(target.train_set, original)
            assert torch.equal(pipeline.read(dataset, row), expected)
    for part, original in ((target.test, target.test_set), (target.sample, target.train_set)):
        assert torch.equal(part[1].read(part[0], 7), testing.read(original, 7))


def test_each_image_is_read_once_for_the_whole_grid(folder, checkpoint, monkeypatch):
    reads, original = [], images.read_image

    def count(path, *options):
        reads.append(path)
        return original(path, *options)

    monkeypatch.setattr(images, "read_image", count)
    assert run_grid(folder, (checkpoint, "scratch")) == 0
    dataset = data.load_dataset(f"folder:{folder}")
    chosen = {
        dataset.where(i) for seed in (0, 1) for i in few_shot_indices(dataset.labels, 2, seed)
    }
    counts = {where: reads.count(where) for where in reads}
    tests = [count for where, count in counts.items() if "/test/" in where]
    # The first image of a set also tells the size of all; the distance looks at the training set.
    assert len(tests) == 21 and sum(tests) <= 21 + 1
    assert sum(counts[where] for where in chosen) <= 2 * len(chosen) + 3
    assert len(counts) == 21 + 60


@FROZEN
def test_frozen_features_are_extracted_once(folder, checkpoint, monkeypatch, method):
    passes, original = [], transfer.predict

    def count(forward, width, stream, num_images, *more):
        passes.append(num_images)
        return original(forward, width, stream, num_images, *more)

    monkeypatch.setattr(transfer, "predict", count)
    assert run_grid(folder, checkpoint, method=method, seeds=3) == 0
    name = f"folder-{folder.name}"
    assert sorted(found()) == sorted(
        f"{name}/{name}-R14x0.5/{shots}shot-seed{seed}-{method}.json"
        for shots, seed in itertools.product((1, 2), range(3))
    )
    labels = data.load_dataset(f"folder:{folder}").labels
    chosen = {i for seed in range(3) for i in few_shot_indices(labels, 2, seed)}
    assert sorted(passes) == sorted([len(chosen), 21, 60])  # 60: the sample of the distance
    record = found()[f"{name}/{name}-R14x0.5/2shot-seed1-{method}.json"]
    assert (record["method"], record["recipe"], record["kind"]) == (method, None, "fewshot")
    assert (record["train"]["images"], record["train"]["steps"]) == (6, None)
    assert not set(record["config"]) & set(fewshot.TRAINING)
    run_grid(folder, checkpoint, seeds=3)  # another method, another file
    assert len(found()) == 12


def features(checkpoint, dataset, indices):
    """Taken without the scripts: (N,D) float32."""
    model = models.create_model("R14x0.5", 1).eval()
    models.load_weights(model, checkpoint / "model.pt")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in transforms.NORMALIZATION["natural"])
    pixels = torch.stack([dataset.read(i) for i in indices]) / 255
    with torch.inference_mode():
        return model.features((pixels - mean) / std)


@FROZEN
def test_features_classify_as_by_hand(folder, checkpoint, monkeypatch, method):
    """Through the whole script, against features taken here; full: all training images."""
    waits, setup = [], fewshot.setup
    monkeypatch.setattr(fewshot, "setup", lambda *args: waits.append(args[1]) or setup(*args))
    assert run_grid(folder, checkpoint, method=method, shots=(1, 2, "full")) == 0
    assert waits == [PATIENCE]  # as one process may wait long for what another has to do
    train, test = (data.load_dataset(f"folder:{folder}", split=split) for split in data.SPLITS)
    tested, records = features(checkpoint, test, range(21)), found()
    for shots, seed in itertools.product((1, 2, None), (0, 1)):
        chosen = few_shot_indices(train.labels, shots, seed) if shots else range(60)
        logits, facts = linear.CLASSIFIERS[method](
            features(checkpoint, train, chosen), train.labels[chosen], tested, 3
        )
        expected = compute_metrics(logits, test.labels, test.classes)
        ending = f"/{shots}shot-seed{seed}-{method}" if shots else f"/full-seed{seed}-{method}"
        (record,) = (value for name, value in records.items() if f"{ending}.json" in name)
        assert record["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert record["metrics"]["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-3)
        assert record["train"].keys() >= facts.keys()
        assert (record["kind"], record["shots"]) == ("fewshot" if shots else "transfer", shots)
        assert record["train"]["images"] == len(chosen)


def test_frozen_cells_stop_between_two(folder, checkpoint, monkeypatch):
    """Asked in the middle of the first."""
    original = linear.CLASSIFIERS["nearest-mean"]

    def asked(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    monkeypatch.setitem(linear.CLASSIFIERS, "nearest-mean", asked)
    with pytest.raises(Stopped, match="SIGUSR1"):
        run_grid(folder, checkpoint, method="nearest-mean")
    assert len(found()) == 1


# ------------------------------------------------------------------------------------------------
# Baselines, distances, the dry run
# ------------------------------------------------------------------------------------------------


def test_scratch_is_trained_twice_with_scratch_steps(folder):
    assert run_grid(folder, "scratch", "--scratch-steps", 5, shots=(1,), seeds=1) == 0
    steps = {r["source"]: (r["train"]["steps"], r["config"]["warmup"]) for r in found().values()}
    assert steps == {"scratch": (2, 0), "scratch-5steps": (5, 1)}
    for record in found().values():
        about = record["source_domain"], record["source_images"], record["distance"]
        assert about == (None, 0, None) and record["layout"]["checkpoint"] == "scratch"


def test_distance_of_a_result_is_that_of_its_features(folder, checkpoint):
    run_grid(folder, checkpoint, method="nearest-mean", shots=(1,), seeds=1)
    (record,) = found().values()
    sample = torch.load(checkpoint / "model.pt", weights_only=True)["sample"]
    assert sample.shape == (60, distance.DIMENSIONS) and sample.dtype == torch.float32
    train = data.load_dataset(f"folder:{folder}")
    expected = distance.compare(sample, distance.project(features(checkpoint, train, range(60))))
    assert record["distance"] == pytest.approx(expected, rel=1e-3)
    assert record["distance"]["images"] == 60
    # The same images, but that pre-training crops what transfer shows whole.
    assert 0.5 < record["distance"]["frechet_relative"] < 2


@pytest.mark.parametrize("method", ["finetune", "nearest-mean"])
def test_distances_are_known_by_network_and_target(
    folder, checkpoint, monkeypatch, tmp_path, method
):
    """Each is measured once, by its own network on its own target."""
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "runs").mkdir()
    content = torch.load(checkpoint / "model.pt", weights_only=True)
    content["sample"] = content["sample"] + 1
    torch.save(content | {"source": "pets"}, tmp_path / "runs" / "model.pt")
    measured = []

    def compare(source, target):
        measured.append(f"{float(source.sum()):.2f}")
        return {"number": len(measured), "source": measured[-1]}

    monkeypatch.setattr(distance, "compare", compare)
    more = ("--target", f"folder:{folder}", f"folder:{tmp_path / 'other'}")
    assert run_grid(folder, (checkpoint, tmp_path / "runs"), *more, method=method) == 0
    by_pair = {}
    for record in found().values():
        by_pair.setdefault((record["source"], record["target"]), []).append(record["distance"])
    assert len(by_pair) == len(measured) == 4 and len(set(measured)) == 2
    assert all(len(same) == 4 and same == [same[0]] * 4 for same in by_pair.values())
    assert {same[0]["number"] for same in by_pair.values()} == {1, 2, 3, 4}
    assert len({(source, same[0]["source"]) for (source, _), same in by_pair.items()}) == 2


def test_a_dry_run_prints_the_grid_and_writes_nothing(
    folder, checkpoint, monkeypatch, tmp_path, capsys
):
    run_grid(folder, checkpoint, shots=(1,), seeds=1)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(transfer.Target, "decode", None)
    assert not run_grid(folder, (checkpoint, "scratch"), "--dry-run", seeds=3)
    output = capsys.readouterr().out
    assert "12 cells, 1 finished already" in output
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| folder")]
    counts = [tuple(column.strip() for column in row[2:5]) for row in rows[-4:]]
    assert counts == [("1", "3", "1"), ("1", "3", "0"), ("2", "3", "0"), ("2", "3", "0")]
    assert re.search(r"about \d\d:\d\d on one process", output)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "checkpoints, options, message",
    [
        ("", "--steps 3", "--steps means nothing for --method linear"),
        ("", "--batch-size 3", "--batch-size means nothing for --method linear"),
        ("", "--balanced", "--balanced means nothing for --method linear"),
        ("", "--recipe bit", "--recipe means nothing for --method linear"),
        ("", "--scratch-steps 3", "--scratch-steps: name scratch"),
        ("", "--single-label", "--single-label means nothing for folder:"),
        ("scratch", "", "--method linear: scratch has no features"),
    ],
)
def test_options_that_mean_nothing(folder, checkpoint, checkpoints, options, message):
    with pytest.raises(ValueError, match=message):
        run_grid(folder, (checkpoint, *checkpoints.split()), *options.split(), method="linear")
    assert not found()
