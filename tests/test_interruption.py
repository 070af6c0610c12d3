"""Pre-training interrupted in every way there is: it ends as if it had not been.

Most runs are forked from here, with nothing to import and with a patch that makes the interruption
happen at a known moment; those of torchrun run a driver with such a patch.
"""

import contextlib
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types

import pytest
import torch
import torch.distributed.run
from conftest import ROOT
from tqdm import tqdm

import data
import models
import pretrain
from engine import checkpoint as records
from engine import memory as hardware
from engine import processes as engine
from engine.optimizer import SGD_AGC, make_optimizer
from readers import cache as loading
from readers import transforms
from readers.transforms import Pipeline, keep

STEPS, BATCH, IMAGES = 23, 8, 60  # three epochs, which end within a batch: after steps 8, 15, 23
EACH_STEP = ("--save-minutes", "1e-6")
TIMES = ("seconds", "images_per_second", "flops_per_second", "peak_share")
KEYS = {
    *("step", "lr", "loss", "grad_norm", "clipped", "images_per_second", "data_wait", "memory"),
}


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def start(call, log, settings):
    """call() in a forked process of its own group, which ends as an interpreter does."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number, name in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # the parent's is one for all, and one may die with it
        os.environ |= settings
        engine.BEGAN = time.monotonic()
        call()
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # a checkpoint that is being written
        loading._end_workers()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def pretraining(args, log, patch=None, rank=0, ranks=1, port=0):
    """Starts pretrain.py as one of so many ranks; patch() is called there before it."""

    def call():
        sys.argv = ["pretrain.py", *map(str, args)]
        if patch:
            patch()
        engine.run(pretrain.main)

    settings = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return start(call, log, {key: str(value) for key, value in settings.items()})


def wait(pid, limit=60):
    """Its status, negative for a signal; what is left of its group ends too."""
    began = time.monotonic()
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        late = time.monotonic() - began - limit
        if late > 0:
            # torchrun ends its processes, which are in groups of their own, within 30 seconds.
            os.kill(pid, signal.SIGKILL if late > 40 else signal.SIGTERM)
            time.sleep(0.5)
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    assert time.monotonic() - began < limit, "it hangs"
    return status


def go(args, log, status=0, patch=None, ranks=1):
    """Runs to the end, on so many ranks; returns [(stdout, stderr) of each]."""
    port = 0
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    pids = [pretraining(args, f"{log}{r}", patch, r, ranks, port) for r in range(ranks)]
    found = [wait(pid) for pid in pids]
    texts = [tuple(open(f"{log}{r}{end}").read() for end in (".out", ".err")) for r in range(ranks)]
    assert found == [status] * ranks, texts
    return texts


def at_step(step, act, rank=None):
    """A patch: act() during the step of this number, counted from 0."""

    def patch():
        add = engine.Meter.add

        def acting(meter, number, *rest):
            if number == step and rank in (None, meter.env.rank):
                act()
            add(meter, number, *rest)

        engine.Meter.add = acting

    return patch


def send(number):
    """An act: the signal to the whole group, loader workers too, as from a terminal."""
    return functools.partial(os.killpg, 0, number)


DRIVER = """
import os, signal, sys, time, types
sys.path.insert(0, {root!r})
from engine import processes as engine
import pretrain
add, receive, got = engine.Meter.add, engine.StopSignal._receive, []
def acting(meter, step, *rest):
    add(meter, step, *rest)
    {act}
engine.Meter.add = acting
engine.StopSignal._receive = lambda *args: (got.append(1), receive(*args))
engine.run(pretrain.main)
"""


def torchrun(args, cwd, act="", restarts=0, status=0):
    """The run on two ranks of torchrun; act: a statement during each step. Returns its output."""
    driver = cwd / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), act=act))
    words = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}", driver, *args]
    call = functools.partial(torch.distributed.run.main, list(map(str, words)))
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    found = wait(start(call, cwd / "torchrun", settings), limit=120)
    said = "".join((cwd / f"torchrun{end}").read_text() for end in (".out", ".err"))
    assert found == status, said
    return said


# ------------------------------------------------------------------------------------------------
# What they leave
# ------------------------------------------------------------------------------------------------


def only(out, name):
    (path,) = out.glob(f"*/{name}")
    return path


def load(out, name="checkpoint.pt"):
    return torch.load(only(out, name), weights_only=True)


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def log_of(out):
    return [strict(line) for line in only(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    """{step: loss} of log.jsonl, which has each step once and in order."""
    lines = [line for line in log_of(out) if "loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: line["loss"] for line in lines}


def evaluations(out):
    return [(line["step"], line["test"]) for line in log_of(out) if "test" in line]


def result(out):
    """result.json but for times and the options that say where and how often to write."""
    record = strict(only(out, "result.json").read_text())
    for key in TIMES:
        assert record["train"].pop(key) > 0
    for key in ("out", "save_minutes", "time_limit", "workers"):
        record["config"].pop(key)
    return record


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def assert_as_undisturbed(out, undisturbed):
    assert sorted(path.name for path in only(out, "result.json").parent.iterdir()) == [
        *("checkpoint.pt", "log.jsonl", "model.pt", "result.json"),
    ]
    assert_same_weights(load(out, "model.pt")["model"], load(undisturbed, "model.pt")["model"])
    a, b = load(out)["optimizer"]["state"], load(undisturbed)["optimizer"]["state"]
    assert all(torch.equal(a[i]["momentum_buffer"], b[i]["momentum_buffer"]) for i in b)
    assert losses(out) == losses(undisturbed)
    assert evaluations(out) == evaluations(undisturbed)
    assert result(out) == result(undisturbed)


# ------------------------------------------------------------------------------------------------
# Undisturbed
# ------------------------------------------------------------------------------------------------


def options(folder, out, *more):
    return (
        *("--source", f"folder:{folder}", "--batch-size", BATCH, "--image-size", 16, "--epochs", 3),
        *("--lr", 0.05, "--clipping", 0.01, "--precision", "fp32", "--log-every", 1),
        *("--out", out, *more),
    )


def recording(path):
    """A patch: each rank's training images go to a file, as (image, epoch), in order."""

    def patch():
        image, rank = loading.Batches._image, os.environ["RANK"]
        file = open(f"{path}-{rank}", "a", buffering=1)

        def recorded(batches, i, draw):
            if batches.sampling != "sequential":
                print(i, draw, file=file)
            return image(batches, i, draw)

        loading.Batches._image = recorded

    return patch


def order(path, ranks=1):
    """The images that `recording` noted, in the order of the global batch."""
    parts = [open(f"{path}-{rank}").read().splitlines() for rank in range(ranks)]
    return [tuple(map(int, line.split())) for lines in zip(*parts, strict=True) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    go(options(folder, out), out.parent / "undisturbed", patch=recording(out / "order"))
    assert list(losses(out)) == list(range(1, STEPS + 1))
    assert [step for step, _ in evaluations(out)] == [8, 15, 23]
    assert losses(out)[STEPS] < losses(out)[1]
    return out


@pytest.fixture(scope="module")
def undisturbed_pair(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    go(options(folder, out), out.parent / "pair", ranks=2, patch=recording(out / "order"))
    return out


# ------------------------------------------------------------------------------------------------
# SIGKILL
# ------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_event(count):
    """A patch: dies when the count-th operation on a temporary file is about to happen."""

    def patch():
        seen = []

        def hook(event, args):
            if event in ("open", "os.rename", "os.remove") and str(args[0]).endswith(".tmp"):
                seen.append(event)
                if len(seen) == count:
                    die()

        sys.addaudithook(hook)

    return patch


def killed_in_file(mode, count, size):
    """A patch: dies in the count-th file that records.py opens so, with `size` of it written."""

    def patch():
        opened = []

        class Dying(io.FileIO):
            def write(self, data):
                data = data.encode() if isinstance(data, str) else data
                room = size - self.tell() if mode == "wb" else min(size, len(data) - 1)
                if len(data) > room:
                    super().write(data[: max(room, 0)])
                    die()
                return super().write(data)

        def opening(path, wanted="r"):
            opened.append(wanted)
            last = wanted == mode and opened.count(mode) == count
            return Dying(path, mode) if last else open(path, wanted)

        records.open = opening

    return patch


def kills(rng, seconds):
    """20 ways to die as (patch, seconds to wait before a SIGKILL from outside)."""
    found = [(None, rng.uniform(0, seconds)) for _ in range(7)]
    found += [(killed_at_event(rng.randint(1, 24)), None) for _ in range(6)]
    found += [(killed_in_file("wb", rng.randint(1, 6), rng.randrange(16 << 20)), None)
              for _ in range(5)]  # fmt: skip
    found += [(killed_in_file("a", rng.randint(1, 9), rng.randrange(200)), None) for _ in range(2)]
    rng.shuffle(found)
    return found


def test_killed_at_20_moments(undisturbed, folder, tmp_path):
    """One run after the other, each killed and started again until it is through."""
    rng, died, finished, halves = random.Random(3), [], 0, 0

    def args():
        return options(folder, tmp_path / f"out{finished}", *EACH_STEP)

    began = time.monotonic()
    go(options(folder, tmp_path / "timed", *EACH_STEP), tmp_path / "timed")
    for patch, delay in kills(rng, time.monotonic() - began):
        while True:
            pid = pretraining(args(), tmp_path / "log", patch)
            if delay is not None:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
            status = wait(pid)
            if status == -signal.SIGKILL:
                break
            assert status == 0, (tmp_path / "log.err").read_text()
            assert_as_undisturbed(tmp_path / f"out{finished}", undisturbed)
            finished += 1  # it was through before the blow fell: the next one gets it
        out = tmp_path / f"out{finished}"
        halves += bool(list(out.glob("*/.checkpoint.pt.tmp")))
        died.append(load(out)["step"] if list(out.glob("*/checkpoint.pt")) else 0)
    go(args(), tmp_path / "log")
    assert_as_undisturbed(tmp_path / f"out{finished}", undisturbed)
    assert len(died) == 20 and halves >= 5  # unfinished checkpoints were left behind
    assert len(set(died)) >= 6 and min(died) < 5 and max(died) > 12, died


@pytest.mark.parametrize("name", ("model.pt", "result.json"))
def test_killed_after_the_last_step(name, undisturbed, folder, tmp_path):
    """The last file's rename is what makes a run finished."""

    def patch():
        def hook(event, args):
            if event == "os.rename" and str(args[1]).endswith(name):
                die()

        sys.addaudithook(hook)

    args = options(folder, tmp_path / "out")
    go(args, tmp_path / "log", -signal.SIGKILL, patch)
    assert load(tmp_path / "out")["step"] == STEPS
    assert not list(tmp_path.glob("out/*/result.json"))
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


# ------------------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, workers, step",
    (("SIGTERM", 2, 5), ("SIGUSR1", 0, 5), ("SIGINT", 2, 9), ("SIGTERM", 0, STEPS - 1)),
)
def test_a_signal_saves_the_step_under_way(name, workers, step, undisturbed, folder, tmp_path):
    args = options(folder, tmp_path / "out", "--workers", workers)
    stop = at_step(step, send(signal.Signals[name]))
    ((_, err),) = go(args, tmp_path / "log", 75, stop)
    assert err == f"stopped by {name} after step {step + 1}; the same command continues\n"
    assert load(tmp_path / "out")["step"] == step + 1
    assert list(losses(tmp_path / "out")) == list(range(1, step + 2))
    ((out, err),) = go(args, tmp_path / "log")
    assert f"continues after step {step + 1}" in out and err == ""
    assert_as_undisturbed(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("rank", (0, 1))
def test_one_rank_is_asked_and_both_save(rank, undisturbed_pair, folder, tmp_path):
    args = options(folder, tmp_path / "out", "--workers", 2)
    texts = go(args, tmp_path / "log", 75, at_step(5, send(signal.SIGTERM), rank), ranks=2)
    step = load(tmp_path / "out")["step"]
    assert 6 <= step <= 7  # the step under way, or the one after it
    reason = ("SIGTERM", "a signal to another rank")[rank]
    said = f"stopped by {reason} after step {step}; the same command continues\n"
    assert [err for _, err in texts] == [said, ""]
    go(args, tmp_path / "log", ranks=2)
    assert_as_undisturbed(tmp_path / "out", undisturbed_pair)


@pytest.mark.slow
def test_sigterm_to_torchrun(undisturbed_pair, folder, tmp_path):
    act = """if step == 5:
        if meter.env.rank == 1: os.kill(os.getppid(), signal.SIGTERM)
        while not got: time.sleep(0.001)"""
    args = options(folder, tmp_path / "out", "--workers", 2)
    said = torchrun(args, tmp_path, act, restarts=2, status=1)
    step = load(tmp_path / "out")["step"]
    assert 6 <= step <= 7
    assert f"stopped by SIGTERM after step {step}; the same command continues\n" in said
    assert "continues after step" not in said
    go(args, tmp_path / "log", ranks=2)
    assert_as_undisturbed(tmp_path / "out", undisturbed_pair)


@pytest.mark.parametrize("before, after", ((2, 1), (1, 2)))
def test_continued_on_another_number_of_ranks(before, after, undisturbed, folder, tmp_path):
    args = options(folder, tmp_path / "out")

    def patch():
        recording(tmp_path / "before")()
        at_step(5, send(signal.SIGTERM), before - 1)()

    go(args, tmp_path / "log", 75, patch, ranks=before)
    step = load(tmp_path / "out")["step"]
    go(args, tmp_path / "log", patch=recording(tmp_path / "after"), ranks=after)
    shown = order(tmp_path / "before", before)
    assert len(shown) == step * BATCH
    shown += order(tmp_path / "after", after)
    assert shown == order(undisturbed / "order")
    assert sorted(shown[:IMAGES]) == [(i, 0) for i in range(IMAGES)]
    found, expected = losses(tmp_path / "out"), losses(undisturbed)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == STEPS


def test_the_order_is_the_same_on_two_ranks(undisturbed, undisturbed_pair):
    assert order(undisturbed_pair / "order", 2) == order(undisturbed / "order")
    assert losses(undisturbed_pair) == pytest.approx(losses(undisturbed), rel=1e-4)


# ------------------------------------------------------------------------------------------------
# --time-limit
# ------------------------------------------------------------------------------------------------


def an_hour_passes():
    real = time.monotonic
    engine.time = types.SimpleNamespace(monotonic=lambda: real() + 3600)


def test_time_limit(undisturbed, folder, tmp_path):
    args = options(folder, tmp_path / "out", "--time-limit", 30)
    ((_, err),) = go(args, tmp_path / "log", 75, at_step(5, an_hour_passes))
    assert err == "stopped by --time-limit after step 6; the same command continues\n"
    assert load(tmp_path / "out")["step"] == 6
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_time_limit_in_minutes_of_the_script(undisturbed, folder, tmp_path):
    """Loading counts too; every start does one step at least."""
    args = options(folder, tmp_path / "out", "--time-limit", 1e-9)
    for step in (1, 2):
        go(args, tmp_path / "log", 75)
        assert load(tmp_path / "out")["step"] == step
    go(options(folder, tmp_path / "out", "--time-limit", 10), tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_time_limit_under_torchrun(undisturbed_pair, folder, tmp_path):
    """torchrun is content and starts nothing again, though it might."""
    act = """if step == 5:
        now = time.monotonic
        engine.time = types.SimpleNamespace(monotonic=lambda: now() + 3600)"""
    args = options(folder, tmp_path / "out", "--time-limit", 30)
    said = torchrun(args, tmp_path, act, restarts=2)
    step = load(tmp_path / "out")["step"]
    assert 6 <= step <= 7
    assert said.count(f"stopped by --time-limit after step {step};") == 1
    assert "continues after step" not in said
    assert not list(tmp_path.glob("out/*/result.json"))
    ((said, _), _) = go(args, tmp_path / "log", ranks=2)
    assert said.count(f"continues after step {step}\n") == 1
    assert_as_undisturbed(tmp_path / "out", undisturbed_pair)


# ------------------------------------------------------------------------------------------------
# A rank dies
# ------------------------------------------------------------------------------------------------

DIES = """if step == {step} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "{life}":
        if meter.env.rank == {rank}: os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.mark.parametrize(
    "ranks", ((0,), pytest.param((1, 0, 1), marks=pytest.mark.slow, id="again and again"))
)
def test_a_dead_rank_is_started_again(ranks, undisturbed_pair, folder, tmp_path):
    """torchrun starts both again from the checkpoint. Bitwise, for a sum of two has no order."""
    act = "\n    ".join(
        DIES.format(step=9 + 4 * life, life=life, rank=rank) for life, rank in enumerate(ranks)
    )
    args = options(folder, tmp_path / "out", *EACH_STEP)
    said = torchrun(args, tmp_path, act, restarts=3)
    assert said.count("continues after step") == len(ranks)
    assert_as_undisturbed(tmp_path / "out", undisturbed_pair)


# ------------------------------------------------------------------------------------------------
# A full disk
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB; a checkpoint takes 16, beside the one before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path, size=None):
    """Takes so many bytes of the disk, or all."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while size is None or file.tell() < size:
            file.write(bytes(4096))


def assert_says_full(err, name):
    """One line, which names the file, the reason and what to do."""
    assert err.count("\n") == 1 and err.startswith("error: ")
    for word in (f"/{name}: ", "the disk is full", "free some space", "the same command"):
        assert word in err


def test_no_room_for_the_second_checkpoint(undisturbed, folder, tmp_path, small_disk):
    fill(small_disk / "filler", 40 << 20)
    args = options(folder, small_disk / "out")
    ((out, err),) = go(args, tmp_path / "log", 2)
    assert_says_full(err, "checkpoint.pt")
    assert "wrote" not in out and not list(small_disk.glob("out/*/.*"))
    assert load(small_disk / "out")["step"] == 8
    ((_, err),) = go(args, tmp_path / "log", 2)  # still full
    assert_says_full(err, "checkpoint.pt")
    (small_disk / "filler").unlink()
    go(args, tmp_path / "log")
    assert_as_undisturbed(small_disk / "out", undisturbed)


def test_no_room_for_the_weights(undisturbed, folder, tmp_path, small_disk):
    """All is trained; the same command has only to write them."""

    def patch():
        record = pretrain.make_record

        def then_full(*args):
            fill(small_disk / "filler")
            return record(*args)

        pretrain.make_record = then_full

    args = options(folder, small_disk / "out")
    ((_, err),) = go(args, tmp_path / "log", 2, patch)
    assert_says_full(err, "model.pt")
    assert load(small_disk / "out")["step"] == STEPS
    assert not list(small_disk.glob("out/*/result.json"))
    (small_disk / "filler").unlink()
    go(args, tmp_path / "log")
    assert_as_undisturbed(small_disk / "out", undisturbed)


def test_no_room_for_the_log(folder, tmp_path, small_disk):
    """The line that did not fit is cut; the same command mends it."""
    args = options(folder, small_disk / "out", "--batch-size", 2, "--epochs", 1)
    full = functools.partial(fill, small_disk / "filler")
    ((_, err),) = go(args, tmp_path / "log", 2, at_step(2, full))
    assert_says_full(err, "log.jsonl")
    written = only(small_disk / "out", "log.jsonl").read_text()
    assert 5 < written.count("\n") < 30 and not written.endswith("\n")
    ((_, err),) = go(args, tmp_path / "log", 2)
    assert_says_full(err, "log.jsonl")
    (small_disk / "filler").unlink()
    go(args, tmp_path / "log")
    assert list(losses(small_disk / "out")) == list(range(1, 31))


# ------------------------------------------------------------------------------------------------
# Divergence
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", (1, 2))
def test_divergence_is_named_on_every_rank(ranks, folder, tmp_path):
    args = options(folder, tmp_path, "--lr", 1e9, "--clipping", 0)
    errors = [err for _, err in go(args, tmp_path / "log", 2, ranks=ranks)]
    first = errors[0].removeprefix("error: ")
    step = int(first.split(" step ")[1].split(",")[0])
    rate = 1e9 / 256 * BATCH
    assert first.startswith(
        f"loss or gradient is not finite at step {step}, learning rate {rate:g}"
    )
    assert first.count("\n") == 1 and "--lr" in first
    assert errors[1:] == [f"error (rank 1): {first}"][: ranks - 1]
    assert list(losses(tmp_path)) == list(range(1, step + 1))  # that many were finite
    assert not list(tmp_path.glob("*/result.json"))


def late(rate, epoch=1.0):
    """A patch: the learning rate from this epoch on."""

    def patch():
        calm = pretrain.learning_rate
        pretrain.learning_rate = lambda now, *rest: rate if now >= epoch else calm(now, *rest)

    return patch


@pytest.mark.parametrize("rate, log_every", ((1e9, 1), (1e9, 100), (1e39, 100)))
def test_what_is_saved_is_finite(rate, log_every, folder, tmp_path):
    """Also where a finite gradient makes weights overflow, before any loss shows it."""
    args = options(folder, tmp_path, "--clipping", 0, "--log-every", log_every, *EACH_STEP)
    ((_, err),) = go(args, tmp_path / "log", 2, late(rate))
    assert err.startswith("error: loss or gradient is not finite at step ")
    assert f"learning rate {rate:g}" in err and err.count("\n") == 1
    state = load(tmp_path)
    assert 8 <= state["step"] <= int(err.split(" step ")[1].split(",")[0])
    buffers = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    assert len(buffers) > 20
    assert all(tensor.isfinite().all() for tensor in [*state["model"].values(), *buffers])


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3, 2), 0.1))

    def forward(self, images):
        return images.mean((2, 3)) @ self.weight


def small_training(tmp_path, clipping, log=None):
    """(run, the rest of engine.train's positional arguments but `stop`)"""
    labels = torch.arange(8).numpy() % 2
    images = (torch.arange(8 * 3 * 4).view(8, 3, 2, 2) * 7 % 256).to(torch.uint8)
    dataset = data.ImageDataset(
        "memory", lambda i, size: images[i], labels, ("a", "b"), "multiclass", "natural"
    )
    batches = loading.Batches(dataset, Pipeline(keep, keep), 4)
    model = Line()
    optimizer = SGD_AGC(model.parameters(), 0.1, clipping=clipping)
    run = engine.Run(tmp_path / "checkpoint.pt", model, optimizer, {})
    return run, model, batches


CPU = engine.Env(0, 1, torch.device("cpu"), "fp32")
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("bad", (math.inf, math.nan))
@pytest.mark.parametrize("clipping", (None, 0.01))
@pytest.mark.parametrize("log_every", (1, 10))
def test_a_gradient_that_is_not_finite(bad, clipping, log_every, tmp_path):
    """At step 2 alone, with a finite loss: named, and what was saved is from before."""
    run, model, batches = small_training(tmp_path, clipping)
    calls, logged = [], []

    def spoil(gradient):
        calls.append(1)
        return gradient * bad if len(calls) == 3 else gradient

    model.weight.register_hook(spoil)
    stream = loading.loader(batches, 0, 20)
    with pytest.raises(ValueError, match=r"not finite at step 2, learning rate 0\.3;"):
        engine.train(
            run, model, batches, stream, lambda step: 0.1 + step / 10, 20, CPU, HALF,
            save_minutes=1e-9, log=lambda *line: logged.append(line), log_every=log_every,
        )  # fmt: skip
    run.finish_saving()
    assert [line[0] for line in logged] == ([1, 2] if log_every == 1 else [])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and state["model"]["weight"].isfinite().all()


# ------------------------------------------------------------------------------------------------
# Exceptions
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (0, 2))
def test_a_broken_image_reached_late(workers, undisturbed, folder, tmp_path):
    """Where the dataset is too large to be read beforehand. Mended, the run goes on."""
    shutil.copytree(folder, tmp_path / "images")
    i = order(undisturbed / "order")[5 * BATCH + 3][0]  # of step 5
    path = tmp_path / "images/train" / ("blue", "green", "red")[i // 20] / f"{i % 20:02d}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])

    def patch():
        loading.preload = lambda dataset, pipeline: (dataset, pipeline)

    args = options(tmp_path / "images", tmp_path / "out", "--workers", workers, *EACH_STEP)
    ((_, err),) = go(args, tmp_path / "log", 2, patch)
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err
    assert load(tmp_path / "out")["step"] == 5
    path.write_bytes(whole)
    go(args, tmp_path / "log", patch=patch)
    assert losses(tmp_path / "out") == losses(undisturbed)
    assert_same_weights(
        load(tmp_path / "out", "model.pt")["model"], load(undisturbed, "model.pt")["model"]
    )


def test_an_exception_that_nobody_expects(undisturbed, folder, tmp_path):
    """The checkpoint that was being written then is whole."""

    def fail():
        raise RuntimeError("out of luck")

    args = options(folder, tmp_path / "out")
    ((_, err),) = go(args, tmp_path / "log", 1, at_step(8, fail))
    assert err.splitlines()[-1] == "RuntimeError: out of luck"
    assert load(tmp_path / "out")["step"] == 8
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


# ------------------------------------------------------------------------------------------------
# The background write
# ------------------------------------------------------------------------------------------------


def slow_writes(events, then=lambda: None):
    """A patch: a checkpoint of step s is written only once step s + 2 (at most the last) is done.

    events: file of what happened: step N | begin N | end N.
    """

    def patch():
        save, add, done = engine.save_tensors, engine.Meter.add, threading.Condition()
        steps = [0]

        def note(*words):
            with open(events, "a") as file:
                print(*words, file=file)

        def counting(meter, step, *rest):
            add(meter, step, *rest)
            with done:
                note("step", step + 1)
                steps.append(step + 1)
                done.notify()

        def slow(path, state):
            step = state["step"]
            note("begin", step)
            with done:
                went_on = done.wait_for(lambda: steps[-1] >= min(step + 2, STEPS), timeout=20)
            save(path, state)
            note("end" if went_on else "nothing went on", step)
            then()

        engine.save_tensors, engine.Meter.add = slow, counting

    return patch


def test_steps_go_on_while_a_checkpoint_is_written(undisturbed, folder, tmp_path):
    go(options(folder, tmp_path / "out"), tmp_path / "log", patch=slow_writes(tmp_path / "events"))
    happened = [line.split() for line in open(tmp_path / "events")]
    writes = [(word, int(step)) for word, step in happened if word != "step"]
    # One after the other, and none is left out.
    assert writes == [(word, step) for step in (8, 15, 23) for word in ("begin", "end")]
    first = happened[happened.index(["begin", "8"]) : happened.index(["end", "8"])]
    assert ["step", "9"] in first and ["step", "10"] in first
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_a_late_write_holds_the_step_it_was_asked_for(undisturbed, folder, tmp_path):
    """Of weights that have changed since. The run is killed right after, and continues from it."""
    args = options(folder, tmp_path / "out")
    go(args, tmp_path / "log", -signal.SIGKILL, slow_writes(tmp_path / "events", then=die))
    assert load(tmp_path / "out")["step"] == 8
    assert max(losses(tmp_path / "out")) >= 10
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_a_failed_write_stops_the_run(undisturbed, folder, tmp_path):
    def patch():
        save = engine.save_tensors

        def fail(path, state):
            if state["step"] == 15:
                raise OSError(f"{path}: the disk is on fire")
            save(path, state)

        engine.save_tensors = fail

    args = options(folder, tmp_path / "out")
    ((_, err),) = go(args, tmp_path / "log", 2, patch)
    assert err == f"error: {only(tmp_path / 'out', 'checkpoint.pt')}: the disk is on fire\n"
    assert load(tmp_path / "out")["step"] == 8
    assert not list(tmp_path.glob("out/*/model.pt"))
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_a_signal_waits_for_the_write_before(undisturbed, folder, tmp_path):
    """The state of the signal's step is written after it, not lost to it."""
    events = tmp_path / "events"

    def patch():
        slow_writes(events)()
        at_step(9, send(signal.SIGTERM))()  # its own write waits for no further step
        save = engine.Run.save

        def saving(run, env, wait=True):
            if wait:
                run.finish_saving()
                engine.save_tensors = records.save_tensors
            save(run, env, wait)

        engine.Run.save = saving

    args = options(folder, tmp_path / "out")
    go(args, tmp_path / "log", 75, patch)
    assert events.read_text().splitlines()[-3:] == ["step 9", "step 10", "end 8"]
    assert load(tmp_path / "out")["step"] == 10
    go(args, tmp_path / "log")
    assert_as_undisturbed(tmp_path / "out", undisturbed)


# ------------------------------------------------------------------------------------------------
# Readings
# ------------------------------------------------------------------------------------------------


def test_log_lines(undisturbed, folder, tmp_path):
    lines = [line for line in log_of(undisturbed) if "test" not in line]
    go(options(folder, tmp_path, "--clipping", 0), tmp_path / "log")
    plain = [line for line in log_of(tmp_path) if "test" not in line]
    assert len(lines) == len(plain) == STEPS
    for line in lines + plain:
        assert line.keys() == KEYS
        assert 0 < line["loss"] < 20 and 0 < line["grad_norm"] < 1e4
        assert 0 <= line["data_wait"] < 1 and 1 < line["images_per_second"] < 1e5
        assert 100e6 < line["memory"] < 16e9
    assert all(line["clipped"] is None for line in plain)
    assert all(0 <= line["clipped"] <= 1 for line in lines)
    assert any(0 < line["clipped"] for line in lines)
    assert lines[0]["lr"] == pytest.approx(0.05 * BATCH / 256)
    assert lines[-1]["lr"] == pytest.approx(0.05 * BATCH / 256 / 1000)
    # The first step is before any update: no clipping has changed anything yet.
    assert lines[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-5)
    assert lines[0]["loss"] == plain[0]["loss"]


def test_a_line_of_several_steps_has_their_means(undisturbed, folder, tmp_path):
    go(options(folder, tmp_path, "--log-every", 3), tmp_path / "log")
    found = {line["step"]: line for line in log_of(tmp_path) if "loss" in line}
    single = {line["step"]: line for line in log_of(undisturbed) if "loss" in line}
    spans = {3: (1, 2, 3), 6: (4, 5, 6), 8: (7, 8), 9: (9,), 12: (10, 11, 12), 15: (13, 14, 15)}
    spans |= {18: (16, 17, 18), 21: (19, 20, 21), 23: (22, 23)}
    assert found.keys() == spans.keys()
    for step, span in spans.items():
        for key in ("loss", "grad_norm", "clipped"):
            mean = sum(single[s][key] for s in span) / len(span)
            assert found[step][key] == pytest.approx(mean, rel=1e-5)


def test_gradient_norm_of_a_run(folder, undisturbed, tmp_path):
    """That of the first step, by autograd on the whole batch."""
    dataset = data.load_dataset(f"folder:{folder}", split="train")
    pipeline = transforms.pretraining_pipeline("natural", 16, True, False, False)
    images, labels, _ = loading.Batches(dataset, pipeline, BATCH)[0]
    torch.manual_seed(0)
    model = models.create_model("R14x0.5", 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in transforms.NORMALIZATION["natural"])
    loss = torch.nn.functional.cross_entropy(model((images / 255 - mean) / std), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    line = log_of(undisturbed)[0]
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("clipping", (None, 0.05))
def test_grad_norm_and_clipped_by_hand(clipping):
    model = models.create_model("R14x0.5", 5)
    optimizer = make_optimizer(model, 0.1, 1e-4, clipping)
    generator = torch.Generator().manual_seed(0)
    total, clipped, units = 0.0, 0, 0
    for name, p in model.named_parameters():
        # Filters of either kind in each tensor: gradients from a hundredth to ten times the weight.
        size = 10 ** (torch.rand(len(p), generator=generator) * 3 - 2)
        size = size.view(-1, *[1] * (p.ndim - 1)) if p.ndim > 1 else size[:1]
        p.grad = torch.randn(p.shape, generator=generator) * size * p.detach().std().nan_to_num()
        total += float(p.grad.double().square().sum())
        if not name.startswith("head.conv"):
            for weight, gradient in (
                zip(p.detach(), p.grad) if p.ndim > 1 else [(p.detach(), p.grad)]
            ):
                units += 1
                clipped += float(gradient.norm()) > 0.05 * max(float(weight.norm()), 1e-3)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(total), rel=1e-4)
    if clipping is None:
        assert math.isnan(optimizer.clipped)
    else:
        assert 0.2 < clipped / units < 0.9
        assert float(optimizer.clipped) == pytest.approx(clipped / units, abs=1.1 / units)


def forward_flops(classes):
    """R14x0.5 at 16 pixels: (filters in, filters out, kernel, side of the output) by hand."""
    convolutions = [(3, 32, 7, 8)]  # then pooled to 4
    for cin, mid, side, out in (
        (32, 32, 4, 4),
        (128, 64, 4, 2),
        (256, 128, 2, 1),
        (512, 256, 1, 1),
    ):
        convolutions += [(cin, mid, 1, side), (mid, mid, 3, out), (mid, 4 * mid, 1, out)]
        convolutions += [(cin, 4 * mid, 1, out)]  # every block's shape changes
    convolutions += [(1024, classes, 1, 1)]
    return sum(2 * cin * cout * kernel**2 * side**2 for cin, cout, kernel, side in convolutions)


@pytest.mark.parametrize("ranks", (1, 2))
def test_flops_and_their_share_of_the_peak(ranks, folder, tmp_path):
    def patch():
        hardware.peak_flops = lambda device, precision: {"fp32": 3e12}[precision]

    args = options(folder, tmp_path, "--epochs", 1)
    ((out, _), *_) = go(args, tmp_path / "log", patch=patch, ranks=ranks)
    train = strict(only(tmp_path, "result.json").read_text())["train"]
    assert (train["images"], train["steps"]) == (IMAGES, 8)
    assert train["images_per_second"] == pytest.approx(8 * BATCH / train["seconds"])
    flops = 3 * forward_flops(3) * train["images_per_second"]
    assert train["flops_per_second"] == pytest.approx(flops, rel=0.01)
    assert train["peak_share"] == pytest.approx(train["flops_per_second"] / 3e12 / ranks)
    assert f"{train['flops_per_second'] / 1e9:.1f} " in out


def test_peak_of_this_processor():
    side = 1024
    matrix = torch.ones(side, side)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        rates.append(2 * side**3 / (time.perf_counter() - began))
    assert 0.2 < hardware.peak_flops(torch.device("cpu"), "fp32") / max(rates) < 5
