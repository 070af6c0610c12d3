"""Scripts that are interrupted at a known moment, and what a run of pretrain.py leaves.

A script is forked from the process of the tests: nothing is imported anew, and a patch, called
there before the script, may do what it likes at a step. torchrun starts a driver with such a patch.
"""

import contextlib
import faulthandler
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from tqdm import tqdm

import pretrain
from engine import log, memory, processes
from readers import workers

ROOT = Path(__file__).parent.parent
strict = functools.partial(json.loads, parse_constant=pytest.fail)  # refuses NaN
CPU = processes.Env(0, 1, torch.device("cpu"), "fp32")
HANG = 900  # seconds after which a process ends itself and says where it is; only a hang takes them


def start(main, argv, home, patch=None, rank=0, ranks=1, port=0):
    """Starts a script's main(), after patch(), as one of so many ranks; returns its number.

    It is a forked process in a group of its own, which ends as an interpreter does. Its output goes
    to files in `home`.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        sys.stdout, sys.stderr = (open(home / f"rank{rank}.{e}", "w", 1) for e in ("out", "err"))
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stderr.fileno(), 2)
        faulthandler.dump_traceback_later(HANG, exit=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # the parent's is one for all, and one may die with it
        torch.set_num_threads(1)  # remakes PyTorch's pool, which two threads must not do at once
        settings = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        settings |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = 1
        os.environ |= {key: str(value) for key, value in settings.items()}
        sys.argv = [str(word) for word in argv]
        processes.BEGAN = time.monotonic()
        if patch:
            patch()
        main() if main is torch.distributed.run.main else processes.run_script(main)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # a checkpoint that is being written
        workers.end_workers()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(pid):
    """Its status, negative for a signal; what is left of its group ends too."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_forked(main, argv, home, status=0, patch=None, ranks=1):
    """The same on all ranks, to the end, which has this status: [(stdout, stderr) of each]."""
    memory.peak_flops(torch.device("cpu"), "fp32")  # measured once: the forked ones know it
    port = free_port()
    pids = [start(main, argv, home, patch, rank, ranks, port) for rank in range(ranks)]
    statuses = [wait(pid) for pid in pids]
    files = [[home / f"rank{rank}.{end}" for end in ("out", "err")] for rank in range(ranks)]
    texts = [tuple(file.read_text() for file in pair) for pair in files]
    assert statuses == [status] * ranks, (statuses, texts)
    return texts


def at_step(step, act, rank=None):
    """A patch: act() once so many steps are done, before anything is said of the last of them."""

    def patch():
        add = log.Log.add

        def acting(self, number, *rest):
            if number == step and rank in (None, int(os.environ["RANK"])):
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


def time_passes():
    real = time.monotonic
    processes.time = SimpleNamespace(monotonic=lambda: real() + 3600)


def hears(monkeypatch, theirs):
    """Of two processes the other one, here not there, sends this when they gather."""

    def gather(found, mine):
        found[:] = mine, theirs

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


STEPS, BATCH, IMAGES = 23, 8, 60
EPOCHS = (8, 15, 23)  # the steps after which they end, two of them within a batch
OPTIONS = ("--batch-size", BATCH, "--epochs", 3, "--image-size", 16, "--lr", 0.05)
OPTIONS += ("--clipping", 0.01)
SAVE_EACH_STEP = ("--save-minutes", 1e-6)
DRIVER = """import faulthandler, os, signal, sys
sys.path[:0] = {paths!r}
from interruption import *
faulthandler.dump_traceback_later(HANG, exit=True)
{patch}
processes.run_script(pretrain.main)
"""


class Training:
    """A run of pretrain.py on the 60 images of `folder`, in the directory `home`."""

    def __init__(self, folder, home, *more, out=None, options=OPTIONS):
        self.folder, self.home, self.out = folder, home, out or home / "out"
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

    def torchrun(self, patch, restarts=0, status=0, before=None):
        """On two ranks of torchrun, with a patch as of `driver`; returns its output."""
        launch = ["torchrun", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
        argv = [*launch, *self.driver(patch)]
        return "".join(*run_forked(torch.distributed.run.main, argv, self.home, status, before))

    def paths(self, name):
        """[path of this file that it left], or [] while there is none."""
        return list(self.out.glob(f"*/{name}"))

    def load(self, name="checkpoint.pt"):
        (path,) = self.paths(name)
        return torch.load(path, weights_only=True)

    @property
    def step(self):
        """That of the checkpoint, 0 without one."""
        return self.load()["step"] if self.paths("checkpoint.pt") else 0

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
        for key in ("seconds", "images_per_second", "flops_per_second", "peak_share"):
            assert record["train"].pop(key) > 0
        del record["layout"]["workers"], record["environment"]["commit"]
        return record

    def assert_same(self, other):
        """All that it left equals, bitwise, what another run did; and there is nothing else."""
        names = ["checkpoint.pt", "log.jsonl", "model.pt", "result.json"]
        assert sorted(path.name for path in self.paths("*")) == names
        assert_same_tensors(self.load("model.pt")["model"], other.load("model.pt")["model"])
        a, b = (run.load()["optimizer"]["state"] for run in (self, other))
        assert_same_tensors(*({i: s[i]["momentum_buffer"] for i in s} for s in (a, b)))
        assert self.losses() == other.losses()
        assert self.lines("test") == other.lines("test")
        assert self.result() == other.result()

    def finish(self, ranks=1):
        """Goes on to the end, and leaves what a run leaves that nothing interrupts."""
        texts = self.go(ranks=ranks)
        self.assert_same(undisturbed(self.folder, ranks))
        return texts


@functools.cache
def undisturbed(folder, ranks):
    """The Training that nothing interrupts."""
    home = folder.with_name(f"undisturbed-{ranks}")
    home.mkdir()
    training = Training(folder, home)
    training.go(ranks=ranks)
    assert list(training.losses()) == list(range(1, STEPS + 1))
    assert tuple(line["step"] for line in training.lines("test")) == EPOCHS
    assert training.losses()[STEPS] < training.losses()[1]
    return training


def assert_same_tensors(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[key], b[key]) for key in a)
