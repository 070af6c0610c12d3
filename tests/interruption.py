"""Scripts that are interrupted at a known moment, and what a run of pretrain.py leaves.

A script is forked from the process of the tests: nothing is imported anew, and a patch, called
there before the script, may do what it likes at a step. torchrun starts a driver with such a patch.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types
from pathlib import Path

import torch
import torch.distributed.run
from tqdm import tqdm

import data
import pretrain
from engine import log, processes
from readers import workers

ROOT = Path(__file__).parent.parent
STEPS, BATCH, IMAGES = 23, 8, 60
EPOCHS = (8, 15, 23)  # the steps after which they end, two of them within a batch
OPTIONS = ("--batch-size", BATCH, "--epochs", 3, "--image-size", 16, "--lr", 0.05)
OPTIONS += ("--clipping", 0.01)
SAVE_EACH_STEP = ("--save-minutes", "1e-6")
HANG = 900  # seconds, which only what hangs takes
TIMES = ("seconds", "images_per_second", "flops_per_second", "peak_share")


# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------


def fork(call, log, settings):
    """call() in a forked process of its own group, which ends as an interpreter does.

    log: its output goes to log.out and log.err. settings: environment. Returns its number.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # the parent's is one for all, and one may die with it
        os.environ |= {key: str(value) for key, value in settings.items()}
        processes.BEGAN = time.monotonic()
        call()
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # a checkpoint that is being written
        workers.end_workers()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(pid):
    """Its status, negative for a signal; what is left of its group ends too, and what hangs."""
    # torchrun ends its own processes, which are in other groups, within 30 seconds.
    ends = ((HANG, signal.SIGTERM), (HANG + 60, signal.SIGKILL))
    timers = [threading.Timer(late, os.kill, (pid, number)) for late, number in ends]
    for timer in timers:
        timer.start()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for timer in timers:
        timer.cancel()
        timer.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(main, argv, home, patch=None, rank=0, ranks=1, port=0):
    """Starts a script's main(), after patch(), as one of so many ranks; returns its number."""

    def script():
        sys.argv = [str(word) for word in argv]
        if patch:
            patch()
        processes.run_script(main)

    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
    settings |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return fork(script, home / f"rank{rank}", settings)


def run_forked(main, argv, home, status=0, patch=None, ranks=1):
    """The same on all ranks, to the end, which has this status: [(stdout, stderr) of each]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [start(main, argv, home, patch, rank, ranks, port) for rank in range(ranks)]
    statuses = [wait(pid) for pid in pids]
    texts = [
        tuple((home / f"rank{rank}.{end}").read_text() for end in ("out", "err"))
        for rank in range(ranks)
    ]
    assert statuses == [status] * ranks, (statuses, texts)
    return texts


# ------------------------------------------------------------------------------------------------
# Moments
# ------------------------------------------------------------------------------------------------


def at_step(step, act, rank=None):
    """A patch: act() once so many steps are done, before anything is said of the last of them."""

    def patch():
        add = log.Log.add

        def acting(self, number, *rest):
            if number == step and rank in (None, int(os.environ.get("RANK", 0))):
                act()
            add(self, number, *rest)

        log.Log.add = acting

    return patch


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def send(number):
    """An act: the signal to the whole group, loader workers too, as from a terminal."""
    return functools.partial(os.killpg, 0, number)


def until_asked():
    """Waits until this process was asked to stop."""
    stop = signal.getsignal(signal.SIGTERM).__self__
    while stop.name is None:
        time.sleep(0.001)


def an_hour_passes():
    real = time.monotonic
    processes.time = types.SimpleNamespace(monotonic=lambda: real() + 3600)


# ------------------------------------------------------------------------------------------------
# Pre-training
# ------------------------------------------------------------------------------------------------

DRIVER = """import os, signal, sys
sys.path[:0] = {paths!r}
from interruption import *
{patch}
processes.run_script(pretrain.main)
"""


class Training:
    """A run of pretrain.py on the 60 images of `folder`, in the directory `home`."""

    def __init__(self, folder, home, *more, out=None, options=OPTIONS):
        self.home, self.out = home, out or home / "out"
        words = ("--precision", "fp32", "--log-every", 1, "--out", self.out, *more)
        words = ("pretrain.py", "--source", f"folder:{folder}", *options, *words)
        self.argv = [str(word) for word in words]

    def go(self, status=0, patch=None, ranks=1):
        return run_forked(pretrain.main, self.argv, self.home, status, patch, ranks)

    def driver(self, patch):
        """[path and options of a script that does the same after `patch`, source code]"""
        path = self.home / "driver.py"
        path.write_text(DRIVER.format(paths=[str(ROOT), str(ROOT / "tests")], patch=patch))
        return [str(path), *self.argv[1:]]

    def torchrun(self, patch, restarts=0, status=0):
        """On two ranks of torchrun, with a patch as of `driver`; returns its output."""
        launch = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
        call = functools.partial(torch.distributed.run.main, [*launch, *self.driver(patch)])
        settings = {"OMP_NUM_THREADS": 1, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
        found = wait(fork(call, self.home / "torchrun", settings))
        said = "".join((self.home / f"torchrun.{end}").read_text() for end in ("out", "err"))
        assert found == status, said
        return said

    # What it leaves

    def paths(self, name):
        """[path of this file], or [] while there is none."""
        return list(self.out.glob(f"*/{name}"))

    def load(self, name="checkpoint.pt"):
        (path,) = self.paths(name)
        return torch.load(path, weights_only=True)

    def lines(self, kind="loss"):
        """The lines of log.jsonl that have "loss", or "test"."""
        (path,) = self.paths("log.jsonl")
        return [line for line in map(strict, path.read_text().splitlines()) if kind in line]

    def losses(self):
        """{step: loss} of log.jsonl, which has each step once and in order."""
        steps = [line["step"] for line in self.lines()]
        assert steps == sorted(set(steps))
        return {line["step"]: line["loss"] for line in self.lines()}

    def result(self):
        """result.json but for times, workers and the commit, which may come in between."""
        (path,) = self.paths("result.json")
        record = strict(path.read_text())
        for key in TIMES:
            assert record["train"].pop(key) > 0
        del record["layout"]["workers"], record["environment"]["commit"]
        return record

    def assert_same(self, other):
        """All that it left equals, bitwise, what another run did; and there is nothing else."""
        names = ["checkpoint.pt", "log.jsonl", "model.pt", "result.json"]
        assert sorted(path.name for path in self.out.glob("*/*")) == names
        assert_same_tensors(self.load("model.pt")["model"], other.load("model.pt")["model"])
        a, b = (run.load()["optimizer"]["state"] for run in (self, other))
        assert_same_tensors(*({i: s[i]["momentum_buffer"] for i in s} for s in (a, b)))
        assert self.losses() == other.losses()
        assert self.lines("test") == other.lines("test")
        assert self.result() == other.result()


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[key], b[key]) for key in a)


def recording(path):
    """A patch: each rank's training images go to a file, as (image, epoch), in order."""

    def patch():
        read, file = data.Batches._image, open(f"{path}-{os.environ['RANK']}", "a", buffering=1)

        def recorded(batches, i, draw):
            if batches.sampling != "sequential":
                print(i, draw, file=file)
            return read(batches, i, draw)

        data.Batches._image = recorded

    return patch


def recorded(path, ranks=1):
    """The images that `recording` noted, in the order of the global batch."""
    parts = [open(f"{path}-{rank}").read().splitlines() for rank in range(ranks)]
    return [tuple(map(int, line.split())) for lines in zip(*parts, strict=True) for line in lines]


@functools.cache
def undisturbed(folder, ranks=1):
    """The Training that nothing interrupts, with its images in `order`."""
    home = folder.with_name(f"undisturbed-{ranks}")
    home.mkdir()
    training = Training(folder, home)
    training.go(patch=recording(training.home / "order"), ranks=ranks)
    assert list(training.losses()) == list(range(1, STEPS + 1))
    assert tuple(line["step"] for line in training.lines("test")) == EPOCHS
    assert training.losses()[STEPS] < training.losses()[1]
    return training
