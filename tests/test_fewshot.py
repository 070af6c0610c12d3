"""The grid: who runs which cell, what fails, what is decoded, frozen features, --dry-run."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import command, env, run

import data
import fewshot
import finetune
import grid
import models
import transfer
from data import few_shot_indices
from engine import distance, linear
from engine import grid as runner
from engine import processes as engine
from readers import cache as loading
from readers import images, transforms

QUICK = ("--image-size", "32", "--batch-size", "8", "--precision", "fp32")


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A network of `folder` as pretrain.py leaves it after two steps."""
    out = tmp_path_factory.mktemp("pretrained")
    run("pretrain.py", "--source", f"folder:{folder}", "--epochs", "0.25", *QUICK, "--out", out,
        cwd=out)  # fmt: skip
    (path,) = out.iterdir()
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a script's main() in an empty directory: (its status, stdout)."""
    monkeypatch.chdir(tmp_path)

    def run_main(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        status = module.main()
        return status, capsys.readouterr().out

    return run_main


def results(root, pattern="*/*/*.json"):
    found = {path.relative_to(root / "results"): path for path in root.glob(f"results/{pattern}")}
    return {str(name): json.loads(path.read_text()) for name, path in found.items()}


def args_for(folder, checkpoints, *more, shots=(1, 2), seeds=2):
    checkpoints = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
    return ("--checkpoint", *checkpoints, "--target", f"folder:{folder}", "--image-size", "32",
            "--precision", "fp32", "--shots", *shots, "--seeds", seeds, *more)  # fmt: skip


def finetune_args(*args, **more):
    return (*args_for(*args, **more), "--steps", "2", "--batch-size", "8")


# ------------------------------------------------------------------------------------------------
# Failures
# ------------------------------------------------------------------------------------------------


def test_a_failing_cell_stops_no_other(call, folder, checkpoint, monkeypatch, tmp_path):
    original = finetune.fine_tune

    def fails(cell, *args):
        if cell.seed == 1 and cell.shots == 2:
            raise RuntimeError("no memory\nis left")
        return original(cell, *args)

    monkeypatch.setattr(finetune, "fine_tune", fails)
    status, output = call(fewshot, *finetune_args(folder, checkpoint))
    assert status == 1
    names = [name.split("/")[-1] for name in results(tmp_path)]
    assert sorted(names) == ["1shot-seed0.json", "1shot-seed1.json", "2shot-seed0.json"]
    assert "1 cells failed" in output
    (line,) = (line for line in output.splitlines() if "no memory" in line)
    assert "2shot-seed1.json" in line and "no memory is left" in line
    assert re.search(r"\| 0\.\d{3} \(1\) +\|$", output, re.MULTILINE)  # two shots: one seed is left

    monkeypatch.setattr(finetune, "fine_tune", original)
    status, output = call(fewshot, *finetune_args(folder, checkpoint))
    assert status == 0 and "4 cells, 3 finished already" in output
    assert len(results(tmp_path)) == 4


def test_a_full_shot_run_that_diverges_stops_no_other(call, folder, checkpoint, tmp_path):
    """All processes see alike that the loss is not finite, so that also two of them go on."""
    args = ("--checkpoint", checkpoint, "--target", f"folder:{folder}", "--recipe", "bit", *QUICK)
    args = (*args, "--steps", "4", "--log-every", "1", "--seeds", "2", "--lr", "1e30")
    status, output = call(transfer, *args)
    assert status == 1 and "2 cells failed" in output and output.count("not finite") == 2
    output, _ = run("transfer.py", *args, ranks=2, cwd=tmp_path, status=1)
    assert "2 cells failed" in output and output.count("not finite") == 2
    assert not results(tmp_path)


def test_what_happened_to_another_process_is_told(folder, monkeypatch, capsys):
    args, alone, targets, cells = grid_of((*args_for(folder, "scratch"), "--batch-size", "8"))
    theirs = {"other.json": "no memory"}, None

    def gather(found, mine):
        found[:] = mine, (mine if isinstance(mine, list) else theirs)

    monkeypatch.setattr(runner.dist, "all_gather_object", gather)
    monkeypatch.setattr(runner, "share_out", lambda *_: None)
    monkeypatch.setattr(grid, "decode", lambda *_: {})
    two = alone._replace(ranks=2)
    assert runner.run(cells, targets, args, two) == 1
    assert "1 cells failed" in (output := capsys.readouterr().out)
    assert "other.json: no memory" in output
    theirs = {}, ("stopped by SIGTERM", 75)
    with pytest.raises(engine.Stopped, match="stopped by SIGTERM") as stopped:
        runner.run(cells, targets, args, two)
    assert stopped.value.status == 75


@pytest.mark.parametrize("method", ["finetune", "linear"])
def test_a_failing_distance_fails_each_cell_with_its_reason(
    call, folder, checkpoint, monkeypatch, tmp_path, method
):
    def fails(*args):
        raise RuntimeError("no distance")

    monkeypatch.setattr(distance, "compare", fails)
    quick = finetune_args if method == "finetune" else args_for
    status, output = call(fewshot, *quick(folder, checkpoint, "--method", method))
    assert status == 1 and output.count("json: no distance") == 4 and not results(tmp_path)


def test_results_that_cannot_be_written_are_refused_before_any_cell(
    call, folder, checkpoint, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--out file/x: file is no directory"):
        call(fewshot, *finetune_args(folder, checkpoint), "--out", "file/x")
    monkeypatch.setattr(grid.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="--out results: . is no directory that can be written"):
        call(fewshot, *finetune_args(folder, checkpoint))


def test_processes_that_see_different_results_are_told_to_share_them(folder, monkeypatch):
    cells = cells_of((*args_for(folder, "scratch"), "--batch-size", "8"))

    def gather(lists, mine):
        lists[:] = mine, mine[1:]

    monkeypatch.setattr(runner.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match="--out r: .* share"):
        runner.same_list(cells, "r", engine.setup("fp32")._replace(ranks=2))


def test_an_undefined_metric_is_said_so(call, nih_root, tmp_path, monkeypatch):
    """The AUC of a test set that shows no finding."""
    original = engine.load_splits

    def without_findings(*args):
        train, test = original(*args)
        return train, test.replace(labels=0 * test.labels)

    monkeypatch.setattr(engine, "load_splits", without_findings)
    status, output = call(
        fewshot, "--checkpoint", "scratch", "--target", "nih", "--data-dir", nih_root, "--shots",
        "1", "--seeds", "1", "--steps", "1", *QUICK,
    )  # fmt: skip
    assert status == 0 and "mean_auc undefined" in output and len(results(tmp_path)) == 1


def test_unknown_target_and_missing_checkpoint_are_refused_before_any_cell(
    call, folder, checkpoint, tmp_path
):
    good = ("--shots", "1", "--seeds", "1", "--steps", "2")
    for args, word in (
        (("--checkpoint", checkpoint, "--target", f"folder:{folder}", "cifar11"), "cifar11"),
        (("--checkpoint", checkpoint, "runs/gone", "--target", f"folder:{folder}"), "runs/gone"),
    ):
        with pytest.raises((ValueError, OSError), match=word):
            call(fewshot, *args, *good)
        assert not list(tmp_path.glob("results/**/*.json"))


# ------------------------------------------------------------------------------------------------
# Sharing out
# ------------------------------------------------------------------------------------------------


def test_jobs_come_longest_first_and_frozen_ones_by_network_and_target(call, folder, checkpoint):
    args = args_for(folder, (checkpoint, "scratch"), "--scratch-steps", "5", "--batch-size", "8")
    cells = cells_of((*args, "--steps", "2"))
    jobs = runner.make_jobs(cells)
    assert [len(job) for job in jobs] == [1] * 12
    assert [job[0].config["steps"] for job in jobs] == [5] * 4 + [2] * 8
    # 3 x 8 images a step and 21 test images, forward passes of 32 x 32 pixels.
    flops = models.forward_flops("R14x0.5", 1, 32)
    assert runner.work(jobs[0]) == (3 * 5 * 8 + 21) * flops
    assert runner.work(jobs[-1]) == (3 * 2 * 8 + 21) * flops

    jobs = runner.make_jobs(cells_of(args_for(folder, checkpoint, "--method", "linear")))
    assert [len(job) for job in jobs] == [4]
    assert runner.work(jobs[0]) == (6 + 21) * flops  # 2 shots of 3 classes


def cells_of(args):
    """The cells of a command line."""
    return grid_of(args)[-1]


def grid_of(args):
    """(args, env, targets, cells) of a command line."""
    parser = fewshot.console.Parser()
    grid.add_options(parser)
    parser.add_argument("--shots", type=int, nargs="+")
    parser.add_argument("--seeds", type=int)
    args = parser.parse_args(list(map(str, args)))
    env = engine.setup("fp32")
    targets = grid.open_targets(args, env, True)
    return args, env, targets, grid.make_grid(args, env, targets, args.shots)


def test_the_config_says_what_is_used(folder, checkpoint):
    args = (*args_for(folder, checkpoint, "--batch-size", "4"), "--steps", "2")
    cells = cells_of(args)
    digest = hashlib.sha256((checkpoint / "model.pt").read_bytes()).hexdigest()[:16]
    always = {"batch_size": 4, "steps": 2, "weights": digest, "target_options": {}, "lr": 0.001}
    for cell in cells:
        sampling = "replacement" if cell.shots == 1 else "shuffle"  # of 3 or 6 images
        expected = always | {"sampling": sampling, "images": 3 * cell.shots, "seed": cell.seed}
        assert expected.items() <= cell.config.items()


def test_two_processes_share_the_cells_and_decode_for_each_other(folder, checkpoint, tmp_path):
    """The results of one process, to the last bit; nothing is left of the decoded images."""
    args = (*finetune_args(folder, (checkpoint, "scratch")), "--cache-dir", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        output, _ = run("fewshot.py", *args, ranks=ranks, cwd=tmp_path / str(ranks))
        assert len(set(re.findall(r"^\[(\d+)/8\]", output, re.MULTILINE))) == 8
    one, two = (results(tmp_path / ranks) for ranks in "12")
    assert one.keys() == two.keys() and len(one) == 8
    assert all(one[name]["metrics"] == two[name]["metrics"] for name in one)
    assert all(one[name]["distance"] == two[name]["distance"] for name in one)
    assert not list((tmp_path / "cache").iterdir())


def test_a_killed_process_loses_the_cells_in_flight_alone(folder, checkpoint, tmp_path):
    """SIGKILL of one of two processes: what was written stays, the same command does the rest."""
    args = finetune_args(folder, (checkpoint, "scratch"), seeds=4)
    args = (*args[:-4], "--steps", "12", "--batch-size", "8")
    process = subprocess.Popen(
        command("fewshot.py", *args, ranks=2), cwd=tmp_path, env=env(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("[3/16]"):
            break
    workers = [pid for pid in children(process.pid) if "fewshot.py" in cmdline(pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    before = {path: path.stat() for path in tmp_path.glob("results/*/*/*.json")}
    assert 2 <= len(before) < 16
    output, _ = run("fewshot.py", *args, ranks=2, cwd=tmp_path)
    assert f"16 cells, {len(before)} finished already" in output
    assert len(results(tmp_path)) == 16
    for path, stat in before.items():  # not written again
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert not list(tmp_path.glob("results/**/.*"))  # nor half of a file


def children(pid):
    """Processes below this one."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found + [below for child in found for below in children(child)]


def cmdline(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def test_shared_out_ends_on_all_ranks_when_one_stops(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    two = engine.setup("fp32")._replace(ranks=2)
    first, second, third = (engine.shared_out(9, two) for _ in range(3))
    assert [next(first), next(second), next(first)] == [0, 1, 2]
    assert list(second) == [3, 4, 5, 6, 7, 8] and list(first) == []
    store.delete_key("shared_out")
    assert next(third) == 0
    third.close()
    assert list(engine.shared_out(9, two)) == []


def test_a_time_limit_stops_both_processes_in_one_line(folder, checkpoint, tmp_path):
    args = (*args_for(folder, checkpoint, seeds=9), "--steps", "9999", "--batch-size", "8")
    output, errors = run("fewshot.py", *args, "--time-limit", "0.1", ranks=2, cwd=tmp_path)
    assert "--time-limit after step" in errors and "the same command continues" in errors
    assert "Traceback" not in errors and not results(tmp_path)


# ------------------------------------------------------------------------------------------------
# Decoding once
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["finetune", "linear"])
def test_each_cell_reads_its_own_images(folder, checkpoint, method):
    """Prepared for training, except that frozen features are of images prepared for testing."""
    more = ("--method", method, *(("--batch-size", "8") if method == "finetune" else ()))
    args, alone, targets, cells = grid_of(args_for(folder, checkpoint, *more))
    found = grid.decode(cells, targets, args, alone)[f"folder:{folder}"]
    train_set, test_set, _ = targets[f"folder:{folder}"]
    training, testing = (transforms.hyperrule_pipeline(40, 32, train) for train in (True, False))
    own = training if method == "finetune" else testing
    for cell in cells:
        dataset, pipeline = found.train_of(cell)
        assert (dataset.labels == train_set.labels[cell.indices]).all()
        for i, original in enumerate(cell.indices):
            assert torch.equal(pipeline.read(dataset, i), own.read(train_set, original))
        assert str(pipeline.augment) == str(own.augment)
    for (dataset, pipeline), original in ((found.test, test_set), (found.sample, train_set)):
        assert torch.equal(pipeline.read(dataset, 7), testing.read(original, 7))


def test_images_on_disk_are_those_in_memory(folder, tmp_path, monkeypatch):
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.hyperrule_pipeline(40, 32, train=True)
    alone = engine.setup("fp32")
    in_memory, prepared = loading.decode_once(dataset, pipeline, alone)
    assert isinstance(in_memory.reader, images.Decoded) and prepared.prepare is transforms.keep
    monkeypatch.setattr(loading, "preload", lambda *args: args)  # as if they did not fit
    mapped, prepared = loading.decode_once(dataset, pipeline, alone, tmp_path)
    assert prepared.prepare is transforms.keep and not list(tmp_path.iterdir())
    for i in (0, 19, 59):
        assert torch.equal(mapped.read(i), pipeline.read(dataset, i))
        assert mapped.where(i) == dataset.where(i)
    assert (mapped.labels == dataset.labels).all()
    usage = namedtuple("Usage", "free")(2 * 60 * 3 * 40 * 40)  # half of it would be taken
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    assert loading.decode_once(dataset, pipeline, alone, tmp_path) == (dataset, pipeline)


def test_a_full_disk_names_the_folder_and_the_mend(folder, tmp_path, monkeypatch):
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.hyperrule_pipeline(40, 32, train=True)
    monkeypatch.setattr(loading, "preload", lambda *args: args)

    def full(array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "memoryview", full, raising=False)
    with pytest.raises(OSError, match=f"^{tmp_path}: .*No space left.*--cache-dir"):
        loading.decode_once(dataset, pipeline, engine.setup("fp32"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_image_is_read_once_for_the_whole_grid(call, folder, checkpoint, monkeypatch):
    reads, original = [], images.read_image

    def count(path, *options):
        reads.append(path)
        return original(path, *options)

    monkeypatch.setattr(images, "read_image", count)
    status, _ = call(fewshot, *finetune_args(folder, (checkpoint, "scratch")))
    assert status == 0
    dataset = data.load_dataset(f"folder:{folder}")
    chosen = {
        dataset.where(i) for seed in (0, 1) for i in few_shot_indices(dataset.labels, 2, seed)
    }
    counts = {where: reads.count(where) for where in reads}
    test_images = [where for where in counts if "/test/" in where]
    assert len(test_images) == 21
    # The first image of a set also tells the size of all; the distance looks at the training set.
    assert sum(counts[where] for where in test_images) <= 21 + 1
    assert sum(counts[where] for where in chosen) <= 2 * len(chosen) + 3
    assert len(counts) == 21 + 60


def test_decoded_images_lie_in_a_file_without_a_name(folder, tmp_path, monkeypatch):
    """So that nothing is left, however the process ends. The folder is made."""
    dataset, listings = data.load_dataset(f"folder:{folder}"), []
    pipeline = transforms.hyperrule_pipeline(40, 32, train=True)

    def spy(image):
        listings.append(list((tmp_path / "new").glob("*")))
        return pipeline.prepare(image)

    monkeypatch.setattr(loading, "preload", lambda *args: args)
    spied = pipeline._replace(prepare=spy)
    mapped, _ = loading.decode_once(dataset, spied, engine.setup("fp32"), tmp_path / "new")
    assert isinstance(mapped.reader, images.Joined) and len(listings) == 61
    assert not any(listings) and (tmp_path / "new").is_dir()


def test_a_broken_image_of_another_process_is_named_by_all(folder, tmp_path, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, {"LOCAL_WORLD_SIZE": "2"}.get(name, "0"))

    def gather(parts, mine):
        parts[:] = mine, (1, ValueError("7.png is broken"))

    monkeypatch.setattr(loading.dist, "all_gather_object", gather)
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.hyperrule_pipeline(40, 32, train=True)
    with pytest.raises(ValueError, match="7.png is broken"):
        loading.decode_once(dataset, pipeline, engine.setup("fp32")._replace(ranks=2), tmp_path)


def test_each_machine_maps_its_own_files(folder, tmp_path, monkeypatch):
    """The second of two machines with a process each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("GROUP_RANK", "1")

    def gather(parts, mine):
        parts[:] = (0, ("/of/another/machine", mine[1][1])), mine

    monkeypatch.setattr(loading.dist, "all_gather_object", gather)
    monkeypatch.setattr(loading.dist, "barrier", lambda: None)
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.hyperrule_pipeline(40, 32, train=True)
    two = engine.setup("fp32")._replace(rank=1, ranks=2)
    mapped, _ = loading.decode_once(dataset, pipeline, two, tmp_path)
    assert all(torch.equal(mapped.read(i), pipeline.read(dataset, i)) for i in range(60))


# ------------------------------------------------------------------------------------------------
# Frozen features
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "nearest-mean"])
def test_frozen_features_are_extracted_once(
    call, folder, checkpoint, monkeypatch, tmp_path, method
):
    passes, original = [], engine.predict

    def count(forward, width, dataset, *more):
        passes.append(len(dataset))
        return original(forward, width, dataset, *more)

    monkeypatch.setattr(engine, "predict", count)
    status, output = call(fewshot, *args_for(folder, checkpoint, "--method", method, seeds=3))
    assert status == 0
    found = results(tmp_path)
    name = f"folder-{folder.name}"
    assert sorted(found) == sorted(
        f"{name}/{name}-R14x0.5/{shots}shot-seed{seed}-{method}.json"
        for shots in (1, 2)
        for seed in range(3)
    )
    dataset = data.load_dataset(f"folder:{folder}")
    chosen = {i for s in range(3) for i in few_shot_indices(dataset.labels, 2, s)}
    assert sorted(passes) == sorted([len(chosen), 21, 60])  # 60: the sample of the distance
    record = found[f"{name}/{name}-R14x0.5/2shot-seed1-{method}.json"]
    assert (record["method"], record["recipe"], record["train"]["images"]) == (method, None, 6)
    assert record["train"]["steps"] is None and record["kind"] == "fewshot"
    assert set(record["config"]) & set(grid.TRAINING) == set()

    call(fewshot, *finetune_args(folder, checkpoint, seeds=3))  # another method, another file
    assert len(results(tmp_path)) == 12


def test_full_shot_runs_on_frozen_features_are_shared_out(
    call, folder, checkpoint, monkeypatch, tmp_path
):
    """So that a process may wait for the others longer than for a step."""
    waits, original = [], engine.setup
    monkeypatch.setattr(
        engine, "setup", lambda precision, wait: waits.append(wait) or original(precision)
    )
    args = ("--target", f"folder:{folder}", "--image-size", "32", "--method", "linear")
    status, _ = call(transfer, "--checkpoint", checkpoint, *args)
    assert status == 0 and waits == [runner.PATIENCE]
    ((name, record),) = results(tmp_path).items()
    assert name.endswith("/full-seed0-linear.json") and record["train"]["images"] == 60
    assert (record["kind"], record["shots"]) == ("transfer", None)


def test_frozen_cells_stop_between_two(call, folder, checkpoint, tmp_path):
    args = args_for(folder, checkpoint, "--method", "nearest-mean", "--time-limit", "1e-9")
    with pytest.raises(engine.Stopped, match="--time-limit"):
        call(fewshot, *args)
    assert len(results(tmp_path)) == 1


@pytest.mark.parametrize(
    "source, domain",
    [("nih@224+chexpert", "medical"), ("synthetic-xray~0.4", "medical"), ("pets", "natural")],
)
def test_the_domain_of_a_foreign_weight_file(tmp_path, source, domain):
    torch.save({"model": models.create_model("R14x0.5", 3).state_dict()}, tmp_path / "model.pth")
    (opened,) = grid.open_checkpoints([tmp_path / "model.pth"], "R14x0.5", source)
    assert (opened.domain, opened.sample) == (domain, None)
    assert opened.normalization == transforms.NORMALIZATION[domain]


def features(checkpoint, dataset, indices):
    """Taken without the scripts: (N,D) float32."""
    (opened,) = grid.open_checkpoints([str(checkpoint)])
    model = finetune.pretrained_model(opened, 1, 0, "cpu").eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in transforms.NORMALIZATION["natural"])
    pixels = torch.stack([dataset.read(i) for i in indices]) / 255
    with torch.inference_mode():
        return model.features((pixels - mean) / std)


@pytest.mark.parametrize("method", ["linear", "nearest-mean"])
def test_features_classify_as_by_hand(call, folder, checkpoint, tmp_path, method):
    """Through the whole script, against features taken here."""
    status, _ = call(fewshot, *args_for(folder, checkpoint, "--method", method))
    assert status == 0
    train, test = (data.load_dataset(f"folder:{folder}", split=split) for split in data.SPLITS)
    test_features = features(checkpoint, test, range(21))
    for shots, seed in itertools.product((1, 2), (0, 1)):
        chosen = few_shot_indices(train.labels, shots, seed)
        logits, facts = linear.CLASSIFIERS[method](
            features(checkpoint, train, chosen), train.labels[chosen], test_features, 3
        )
        expected = engine.compute_metrics(logits, test.labels, test.classes)
        record = results(tmp_path, f"*/*/{shots}shot-seed{seed}-{method}.json").popitem()[1]
        assert record["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert record["metrics"]["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-3)
        assert record["train"].keys() >= facts.keys()


@pytest.mark.parametrize(
    "options, words",
    [
        (("--steps", "3"), "--steps means nothing for --method linear"),
        (("--batch-size", "3"), "--batch-size means nothing for --method linear"),
        (("--balanced",), "--balanced means nothing for --method linear"),
        (("--recipe", "bit"), "--recipe means nothing for --method linear"),
        (("--scratch-steps", "3"), "--scratch-steps: name scratch"),
    ],
)
def test_options_that_mean_nothing_on_frozen_features(call, folder, checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        call(fewshot, *args_for(folder, checkpoint, "--method", "linear", *options))


def test_single_label_of_multi_class_targets_is_refused(call, folder, checkpoint):
    with pytest.raises(ValueError, match="--single-label means nothing for folder:"):
        call(fewshot, *args_for(folder, checkpoint, "--single-label"))


def test_scratch_has_no_features(call, folder, checkpoint):
    with pytest.raises(ValueError, match="--method linear: scratch has no features"):
        call(fewshot, *args_for(folder, (checkpoint, "scratch"), "--method", "linear"))


# ------------------------------------------------------------------------------------------------
# Baselines, distance, dry run
# ------------------------------------------------------------------------------------------------


def test_scratch_is_trained_twice_with_scratch_steps(call, folder, checkpoint, tmp_path):
    args = (*finetune_args(folder, "scratch", shots=(1,), seeds=1), "--scratch-steps", "5")
    status, _ = call(fewshot, *args)
    found = results(tmp_path).values()
    steps = {r["source"]: (r["train"]["steps"], r["config"]["warmup"]) for r in found}
    assert steps == {"scratch": (2, 0), "scratch-5steps": (5, 1)}
    record = next(iter(results(tmp_path, "*/scratch-5steps*/*").values()))
    assert (record["source_domain"], record["source_images"]) == (None, 0)
    assert record["distance"] is None


def test_distance_of_a_result_is_that_of_its_features(call, folder, checkpoint, tmp_path):
    call(fewshot, *args_for(folder, checkpoint, "--method", "nearest-mean", shots=(1,), seeds=1))
    (record,) = results(tmp_path).values()
    sample = torch.load(checkpoint / "model.pt", weights_only=True)["sample"]
    assert sample.shape == (60, distance.DIMENSIONS) and sample.dtype == torch.float32
    train = data.load_dataset(f"folder:{folder}")
    expected = distance.compare(sample, distance.project(features(checkpoint, train, range(60))))
    assert record["distance"] == pytest.approx(expected, rel=1e-3)
    assert record["distance"]["images"] == 60
    # The same images, but that pre-training crops what transfer shows whole.
    assert 0.5 < record["distance"]["frechet_relative"] < 2


def test_distances_are_known_by_network_and_target(monkeypatch):
    monkeypatch.setattr(runner, "body", lambda *_: None)
    monkeypatch.setattr(runner, "extract", lambda model, cell, part, env: part)
    monkeypatch.setattr(distance, "project", lambda part: part)
    monkeypatch.setattr(distance, "compare", lambda source, sample: (source, sample))
    known = {}
    for name, target in itertools.product("ab", "xy"):
        cell = SimpleNamespace(pretrained=SimpleNamespace(name=name, sample=name), target=target)
        images = SimpleNamespace(sample=target)
        assert runner.measure_distance(cell, images, known, None) == (name, target)
    monkeypatch.setattr(runner, "extract", None)
    assert runner.measure_distance(cell, images, known, None) == ("b", "y")


def test_a_dry_run_prints_the_grid_and_writes_nothing(
    call, folder, checkpoint, monkeypatch, tmp_path
):
    call(fewshot, *finetune_args(folder, checkpoint, shots=(1,), seeds=1))
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(grid, "decode", None)
    args = finetune_args(folder, (checkpoint, "scratch"), seeds=3)
    status, output = call(fewshot, *args, "--dry-run")
    assert status == 0 and "12 cells, 1 finished already" in output
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| folder")]
    assert [(r[2].strip(), r[3].strip(), r[4].strip()) for r in rows] == [
        ("1", "3", "1"), ("1", "3", "0"), ("2", "3", "0"), ("2", "3", "0")
    ]  # fmt: skip
    assert re.search(r"about \d\d:\d\d on one process", output)
    assert set(tmp_path.rglob("*")) == before


def test_the_estimate_fills_the_processes_longest_first(capsys, folder, checkpoint, monkeypatch):
    """Jobs of 5, 5 and 2 steps on two processes: the third joins the first that is free."""
    args = (*args_for(folder, "scratch", shots=(1,), seeds=1), "--scratch-steps", "5")
    cells = cells_of((*args, "--steps", "2", "--batch-size", "8"))
    monkeypatch.setattr(runner, "speed", lambda *args: 1.0)
    costs = [runner.work([cell]) for cell in cells]
    times = []
    monkeypatch.setattr(runner.tqdm, "format_interval", lambda seconds: times.append(seconds))
    alone = engine.setup("fp32")
    runner.dry_run(cells, cells, alone, together=False)
    runner.dry_run(cells, cells, alone._replace(ranks=2), together=False)
    runner.dry_run(cells, cells, alone._replace(ranks=2), together=True)
    assert times == pytest.approx([sum(costs), max(costs), sum(costs) / 2])
    capsys.readouterr()
