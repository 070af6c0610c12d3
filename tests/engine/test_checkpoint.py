"""Pre-training killed, refused the disk or struck by an error: continued as if it had not been."""

import json
import os
import re
import shutil
import signal
import sys
import threading
from functools import partial

import interruption
import pytest
import torch
from conftest import refuses
from interruption import CPU, SAVE_EACH_STEP, STEPS, Training, at_step, die, hears, send

import data
import pretrain
from engine import checkpoint
from engine.console import write_json
from readers import inspect


def killed_at_file(name, count=1):
    """Dies when such a file is opened, renamed (from or to) or removed the count-th time."""
    seen = []

    def hook(event, args):
        named = any(str(arg).endswith(name) for arg in args[:2])
        if named and event in ("open", "os.rename", "os.remove"):
            seen.append(event)
            if len(seen) == count:
                die()

    sys.addaudithook(hook)


# Lines of the log after which a SIGKILL comes from outside, or how many events of temporary files
# later it dies: each is made, renamed and removed.
KILLS = [
    *((0, None), (None, 2), (1, None), (None, 5), (2, None), (None, 8), (3, None)),
    *((None, 8), (5, None), (None, 2), (8, None), (None, 14)),
]


def written(training):
    """Lines of its log, however the last one ends."""
    return sum(path.read_text().count("\n") for path in training.paths("log.jsonl"))


def test_killed_at_12_moments(folder, tmp_path):
    """One run after the other, each killed and started again until it is through."""
    died, finished, halves = [], 0, 0
    for lines, count in KILLS:
        patch = partial(killed_at_file, ".tmp", count) if count else None
        status = 0
        while status == 0:
            out = tmp_path / f"out{finished}"
            training = Training(folder, tmp_path, *SAVE_EACH_STEP, out=out)
            before = written(training)
            pid = interruption.start(pretrain.main, training.argv, tmp_path, patch)
            if lines is not None:
                ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
                while not os.waitid(os.P_PID, pid, ended) and written(training) < before + lines:
                    pass
                os.kill(pid, signal.SIGKILL)
            status = interruption.wait(pid)
            if status == 0:
                training.assert_same(interruption.undisturbed(folder, 1))
                finished += 1  # it was through before the blow fell: the next one gets it
        assert status == -signal.SIGKILL, (tmp_path / "rank0.err").read_text()
        halves += bool(training.paths(".checkpoint.pt.*.tmp"))
        died.append(training.step)
    training.finish()
    assert len(set(died)) >= 4 and halves >= 3, died  # unfinished checkpoints were left behind


@pytest.mark.parametrize("name", ("model.pt", "result.json"))
def test_killed_after_the_last_step(name, folder, tmp_path):
    """The last file's rename is what makes a run finished."""
    training = Training(folder, tmp_path)
    training.go(-signal.SIGKILL, partial(killed_at_file, f"/{name}"))
    assert training.step == STEPS and not training.paths("result.json")
    training.finish()


def test_a_second_process_is_refused_and_disturbs_nothing(folder, tmp_path):
    training, second = Training(folder, tmp_path), tmp_path / "second"
    second.mkdir()
    halt = at_step(10, lambda: signal.raise_signal(signal.SIGSTOP))
    pid = interruption.start(pretrain.main, training.argv, tmp_path, halt)
    os.waitpid(pid, os.WUNTRACED)  # it has stopped
    try:
        for _ in range(2):
            ((out, err),) = Training(folder, second, out=training.out).go(2)
            (run,) = training.out.iterdir()
            said = f"error: {run}: another process is writing there; wait for its end, or give "
            assert (out, err) == ("", f"{said}another --out\n")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert interruption.wait(pid) == 0
    training.assert_same(interruption.undisturbed(folder, 1))


def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(tmp_path):
    """Headers and padding too. The last ones mark a record as a directory (APPNOTE.TXT 4.4.15)."""
    path, state = tmp_path / "model.pt", {"model": {"a": torch.arange(40.0), "b": torch.ones(3)}}
    checkpoint.save_tensors(path, state | {"name": "R14x0.5", "mean": (0.5, 0.25)})
    whole, refused = path.read_bytes(), 0
    flips = [(place, place % 8) for place in range(0, len(whole), 7)]
    flips += [(entry.start() + 38, 4) for entry in re.finditer(b"PK\1\2", whole)]
    for place, bit in flips:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        for damaged in (flipped, whole[:place]):
            path.write_bytes(damaged)
            try:
                read = checkpoint.read_tensors(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
                continue
            assert len(damaged) == len(whole)
            interruption.assert_same_tensors(read.pop("model"), state["model"])
            assert read == {"name": "R14x0.5", "mean": (0.5, 0.25)}
    assert refused > 1.5 * len(flips)


def test_a_weight_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": torch.ones(3)}, tmp_path / "weights.pth.tar")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read_tensors(tmp_path / "weights.pth.tar")["model"].sum() == 3


@pytest.mark.parametrize("damage", ("gone", "cut", "flipped"))
def test_finished_without_a_whole_model(damage, folder, tmp_path):
    """The line says what to do, and that does it, without any training."""
    training = Training(folder, tmp_path)
    shutil.copytree(interruption.undisturbed(folder, 1).out, training.out)
    (path,), (result,) = training.paths("model.pt"), training.paths("result.json")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink() if damage == "gone" else path.write_bytes(content[: -(damage == "cut") or None])
    ((_, err),) = training.go(2)
    assert str(path) in err and err.count("\n") == 1
    assert f"though {result} says that it is finished; remove {result}, and the same" in err
    result.unlink()
    ((out, _),) = training.finish()
    assert f"continues after step {STEPS}" in out


def slow_write(events, then=lambda: None):
    """The checkpoint of step 8 is written only once step 10 is done.

    events: file of what happened: step N | begin N | end N.
    """
    save, done = checkpoint.save_tensors, threading.Event()

    def note(*words):
        with open(events, "a") as file:
            print(*words, file=file)

    def slow(path, state):
        step = state["step"]
        note("begin", step)
        assert step != 8 or done.wait(interruption.HANG)
        save(path, state)
        note("end", step)
        then()

    checkpoint.save_tensors = slow
    at_step(9, lambda: note("step", 9))()
    at_step(10, lambda: (note("step", 10), done.set()))()


def test_steps_go_on_while_a_checkpoint_is_written(folder, tmp_path):
    """It holds the step it was asked for; killed right after, the run continues from there. The
    writes come one after the other, and none is left out."""
    training = Training(folder, tmp_path)
    training.go(-signal.SIGKILL, partial(slow_write, tmp_path / "killed", die))
    happened = (tmp_path / "killed").read_text().splitlines()
    assert happened.index("step 9") < happened.index("step 10") < happened.index("end 8")
    assert training.step == 8 and max(training.losses()) >= 9
    training.go(patch=partial(slow_write, tmp_path / "continued"))
    training.assert_same(interruption.undisturbed(folder, 1))
    happened = (tmp_path / "continued").read_text().splitlines()
    writes = [event for event in happened if "step" not in event]
    assert writes == [f"{word} {n}" for n in interruption.EPOCHS for word in ("begin", "end")]


def test_a_signal_waits_for_the_write_before(folder, tmp_path):
    """The state of the signal's step is written after it, not lost to it."""

    def patch():
        slow_write(tmp_path / "events")
        at_step(10, send(signal.SIGTERM))()

    training = Training(folder, tmp_path)
    training.go(75, patch)
    happened = (tmp_path / "events").read_text().splitlines()
    assert sorted(happened[-4:-2]) == ["end 8", "step 10"]
    assert happened[-2:] == ["begin 10", "end 10"] and training.step == 10
    training.finish()


def test_no_room_for_the_second_checkpoint(folder, tmp_path):
    """It stops with one line, which names the file, the reason and what to do."""

    def patch():
        save = torch.save

        def on_a_full_disk(state, file):
            save(state, open("/dev/full", "wb") if state.get("step") == 15 else file)

        torch.save = on_a_full_disk

    training = Training(folder, tmp_path)
    for _ in range(2):  # still full
        ((out, err),) = training.go(2, patch)
        assert err.count("\n") == 1 and err.startswith("error: ") and "wrote" not in out
        for word in ("/checkpoint.pt: ", "the disk is full", "free some space", "the same command"):
            assert word in err
        assert training.step == 8 and not training.paths(".*") and not training.paths("model.pt")
    training.finish()


def test_an_exception_that_nobody_expects(folder, tmp_path):
    """The checkpoint that was being written then is whole; only the same options continue it."""

    def fail():
        raise RuntimeError("out of luck")

    training = Training(folder, tmp_path)
    ((_, err),) = training.go(2, at_step(9, fail))
    assert err == "error: RuntimeError: out of luck; TRACEBACK=1 shows where\n"
    ((_, err),) = Training(folder, tmp_path, "--schedule", "cosine").go(2)
    (path,) = training.paths("checkpoint.pt")
    said = f"error: {path} was made with schedule = step, not cosine; use the same options"
    assert err.startswith(said) and err.count("\n") == 1 and training.step == 8
    training.finish()


def test_a_broken_image_reached_late(folder, tmp_path):
    """Where the dataset is too large to be read beforehand. Mended, the run goes on."""
    shutil.copytree(folder, tmp_path / "images")
    i = data.batch_indices(5, interruption.IMAGES, interruption.BATCH, seed=0)[0][3]
    path = tmp_path / "images/train" / ("blue", "green", "red")[i // 20] / f"{i % 20:02d}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])

    def patch():
        pretrain.preload = lambda dataset, pipeline: (dataset, pipeline)
        inspect.SAMPLE = 2  # which a large set's broken image is not among

    training = Training(tmp_path / "images", tmp_path, "--workers", 2, *SAVE_EACH_STEP)
    ((_, err),) = training.go(2, patch)
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err
    assert training.step == 5
    path.write_bytes(whole)
    training.go(patch=patch)
    assert training.losses() == interruption.undisturbed(folder, 1).losses()


@pytest.mark.parametrize("ranks", (1, 2))
def test_summary(ranks, monkeypatch):
    """A training step counts as three forward passes, and every rank has a device."""
    monkeypatch.setattr(checkpoint, "peak_flops", lambda device, precision: 1e6)
    hears(monkeypatch, 0)
    model, env = torch.nn.Linear(1, 1), CPU._replace(ranks=ranks)
    run = checkpoint.Run(None, model, torch.optim.AdamW(model.parameters()), {}, env)
    run.step, run.seconds = 30, 4.0
    expected = {"optimizer": "AdamW", "images": 70, "steps": 30, "seconds": 4.0}
    expected |= {"images_per_second": 120.0, "flops_per_second": 180_000.0}
    share = pytest.approx(0.18 / ranks)
    assert run.summary(70, 16, 500) == expected | {"peak_share": share}


def test_ranks_that_see_different_checkpoints_are_refused(monkeypatch):
    hears(monkeypatch, 8)
    model, env = torch.nn.Linear(1, 1), CPU._replace(ranks=2)
    run = partial(checkpoint.Run, None, model, None, {}, env)
    refuses(ValueError, run, "continue after steps [0, 8]: share --out")


DATA = {f"{split} {part}": "0" * 16 for split in ("train", "test") for part in ("names", "content")}
CONFIG = {"lr": 0.1, "decays": (3, 6), "clipping": None}
CHANGED = {"data": DATA | {"test content": "1", "test names": "2"}}


@pytest.mark.parametrize(
    "theirs, ours, said",
    (
        ({"out": "results", "workers": 8}, {}, None),  # as older files have, decides nothing
        ({}, {"lr": 0.2}, "lr = 0.1, not 0.2; use the same options, give another --out"),
        ({}, {"decays": (3, 7)}, "with decays = [3, 6], not [3, 7]"),
        ({}, {"clipping": 0.01}, "with clipping = None, not 0.01"),
        ({}, {"mixup": 0.1}, "with mixup = None, not 0.1"),  # they did not have it yet
        ({}, {"nesterov": True, "zero_head": True}, None),  # they did, and did not say so
        ({"nesterov": True}, {"nesterov": False}, "with nesterov = True, not False"),
        ({"square": False}, {"square": True}, "with square = False, not True"),
        ({"data": DATA}, {"data": dict(DATA)}, None),
        ({}, {"data": DATA}, None),  # older than the digest
        ({"data": None}, {"data": DATA}, None),
        ({"data": {"train names": "0" * 16}}, {"data": DATA}, None),  # older than some of it
        ({"data": DATA | {"train faces": "1"}}, {"data": DATA}, None),  # newer
        ({"data": DATA}, {"data": DATA | {"train names": "1"}}, "train names changed since; use"),
        ({"data": DATA}, CHANGED, "of other data: test names, test content changed since; use the"),
        ({"data": DATA}, {"data": {}, "lr": 2}, "with lr = 0.1, not 2; use"),
        ({"data": DATA}, CHANGED | {"lr": 2}, "with lr = 0.1, not 2; use"),
    ),
)
def test_another_config_or_data_is_refused_by_what_changed(theirs, ours, said, tmp_path):
    theirs, ours = CONFIG | theirs, CONFIG | ours
    paths = tmp_path / "x.json", tmp_path / "x.pt"
    write_json(paths[0], {"schema": 1, "kind": "pretrain", "config": theirs, "metrics": {}})
    checkpoint.save_tensors(paths[1], {"config": theirs})
    reads = partial(checkpoint.read_result, paths[0], "pretrain", ours)
    for path, read in zip(paths, (reads, partial(checkpoint.load_checkpoint, paths[1], ours))):
        if said:
            refuses(ValueError, read, f"{path} was made ", said)
        else:
            assert json.dumps(read()["config"]) == json.dumps(theirs)


@pytest.mark.parametrize("one, other", [("red", "blue"), ("red/02.png", "blue/00.png")])
def test_an_interrupted_run_is_not_continued_on_other_data(folder, tmp_path, one, other):
    train = shutil.copytree(folder, tmp_path / "images") / "train"
    training = Training(tmp_path / "images", tmp_path, *SAVE_EACH_STEP)
    training.go(75, at_step(9, send(signal.SIGTERM)))
    swaps = (("between", one), (one, other), (other, "between"))
    for to, old in swaps:
        (train / old).rename(train / to)
    ((_, err),) = training.go(2)
    (path,) = training.paths("checkpoint.pt")
    assert err.startswith(f"error: {path} was made of other data: train content changed since;")
    for to, old in swaps:
        (train / old).rename(train / to)
    training.go()
    assert training.losses() == interruption.undisturbed(folder, 1).losses()
