"""Pre-training on two nodes that lose each other: two torchrun agents on one machine, each in a
network namespace of its own, joined by a virtual cable and by the directory they write to.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, env

ADDRESSES = ("10.231.7.1", "10.231.7.2")  # seen inside the namespaces only
CABLE = "cable0"
# The store that torchrun would share with its workers keeps the addresses of those before a
# restart; a worker that starts first calls them, and fails or waits for ever (PyTorch 2.14).
NETWORK = {"GLOO_SOCKET_IFNAME": CABLE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS, EPOCH = 50, 20  # an epoch ends with a checkpoint, and no other is made
PATIENCE = 240  # seconds for what takes 20 when nothing else runs
NUMBERS = itertools.count()


def ip(*args):
    """What `ip` prints; skips the test where it cannot do that here."""
    done = subprocess.run(("ip", *args), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


class Node:
    """A machine to its processes: nothing but its loopback and its end of the cable."""

    def __init__(self, number, folder):
        self.first = number == 0
        self.name = f"node{number + 1}-{os.getpid()}-{next(NUMBERS)}"
        self.address, self.output, self.agent = ADDRESSES[number], folder / f"{self.name}.txt", None
        self.folder = folder
        ip("netns", "add", self.name)

    def connect(self):
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", CABLE)
        for device in ("lo", CABLE):
            ip("-n", self.name, "link", "set", device, "up")

    def start(self, out):
        """Starts the agent, which starts the one worker."""
        # Said outright, as a machine may give its own name any address. A silent agent counts as
        # gone after 6 seconds, not 15.
        meeting = f"is_host={self.first},keep_alive_interval=1,keep_alive_max_attempt=6"
        launch = (
            *("ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--monitor-interval=0.1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test"),
            *(f"--rdzv-conf={meeting}", f"--local-addr={self.address}"),
        )
        args = (
            *("--source", "synthetic-natural", "--model", "R14x0.5", "--precision", "fp32"),
            *("--image-size", "32", "--batch-size", "16", "--epochs", str(STEPS / EPOCH)),
            *("--fraction", str(EPOCH * 16 / 8000), "--log-every", "1"),
            *("--out", str(out)),
        )
        with open(self.output, "a") as output:
            self.agent = subprocess.Popen(
                (*launch, str(ROOT / "pretrain.py"), *args), cwd=self.folder, stdout=output,
                stderr=output, env=env() | NETWORK, start_new_session=True,
            )  # fmt: skip

    def processes(self):
        listed = subprocess.run(("ip", "netns", "pids", self.name), capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, agent=True):
        """SIGKILL to all of its processes, or to all but the agent; returns how many."""
        pids = [pid for pid in self.processes() if agent or pid != self.agent.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if agent and self.agent:
            self.agent.kill()  # if it had not yet entered the namespace
            self.agent.wait()
        return len(pids)

    def remove(self):
        deadline = time.monotonic() + 20
        while self.kill() and time.monotonic() < deadline:  # a worker may have been starting
            time.sleep(0.05)
        subprocess.run(("ip", "netns", "delete", self.name), check=True)


@pytest.fixture
def pair(tmp_path):
    with connected(tmp_path) as nodes:
        yield nodes


@contextlib.contextmanager
def connected(folder):
    """Two nodes and the cable between them, which goes with them."""
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: no `ip` (iproute2)")
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(2):
            nodes.append(Node(number, folder))
            stack.callback(nodes[-1].remove)
        ends = [("name", CABLE, "netns", node.name) for node in nodes]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node in nodes:
            node.connect()
        yield nodes


def said(nodes):
    return "".join(f"--- {node.name}\n{node.output.read_text()}" for node in nodes)


def wait(nodes, ready):
    """Until ready(); fails when the agents end before that or with an error, or patience does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        statuses = [node.agent.poll() for node in nodes]
        if ready():
            return
        assert time.monotonic() < deadline, said(nodes)
        assert None in statuses and set(statuses) <= {None, 0}, said(nodes)
        time.sleep(0.02)


def finish(nodes):
    wait(nodes, lambda: all(node.agent.poll() is not None for node in nodes))
    assert [node.agent.returncode for node in nodes] == [0, 0], said(nodes)


def lines(out):
    """The log's whole lines."""
    text = "".join(path.read_text() for path in out.glob("*/log.jsonl"))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def progress(out):
    """Steps done: (as the checkpoint has it, as the log has it)."""
    saved = [torch.load(path, weights_only=True)["step"] for path in out.glob("*/checkpoint.pt")]
    return sum(saved), max((line["step"] for line in lines(out)), default=0)


def wait_for_step(nodes, out, least):
    """Until a step after `least` and after a checkpoint is done; returns it."""

    def ready():
        saved, done = progress(out)
        return saved > 0 and done > max(saved, least)

    wait(nodes, ready)
    return progress(out)[1]


def read(out):
    """What a run leaves: weights, (step, loss) as logged, evaluations, result."""
    (folder,) = out.iterdir()
    weights = torch.load(folder / "model.pt", weights_only=True)["model"]
    steps = [(line["step"], line["loss"]) for line in lines(out) if "loss" in line]
    tests = [line for line in lines(out) if "test" in line]
    return weights, steps, tests, json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with connected(folder) as nodes:
        for node in nodes:
            node.start(folder / "out")
        finish(nodes)
        assert "continues after" not in said(nodes)
    return read(folder / "out")


def test_two_nodes_train_together(undisturbed):
    _, steps, tests, result = undisturbed
    assert [step for step, _ in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in tests] == [EPOCH, 2 * EPOCH, STEPS]
    assert result["environment"]["world_size"] == 2
    assert result["train"]["steps"] == STEPS


def test_a_node_loses_its_worker_and_then_dies(undisturbed, pair, tmp_path):
    """First its agent and the other start the workers again, then a new agent takes its place."""
    out = tmp_path / "out"
    for node in pair:
        node.start(out)
    done = wait_for_step(pair, out, EPOCH + 3)
    assert pair[1].kill(agent=False) >= 1
    wait_for_step(pair, out, done + 5)
    assert pair[1].kill() >= 2
    pair[1].start(out)
    finish(pair)
    continued = [int(step) for step in re.findall(r"continues after step (\d+)", said(pair))]
    assert len(continued) >= 2 and all(0 < step < STEPS for step in continued), said(pair)
    weights, steps, tests, result = read(out)
    # Two numbers have one sum: it does not matter which node came to be which rank.
    assert steps == undisturbed[1]
    assert tests == undisturbed[2]
    assert weights.keys() == undisturbed[0].keys()
    assert all(torch.equal(weights[key], undisturbed[0][key]) for key in weights)
    assert result["metrics"] == undisturbed[3]["metrics"]
