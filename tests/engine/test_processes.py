"""Processes that are asked to stop, that die, and that train one network together."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import interruption
import pytest
import torch
import torch.distributed as dist
from interruption import (
    BATCH,
    HANG,
    IMAGES,
    SAVE_EACH_STEP,
    STEPS,
    Training,
    an_hour_passes,
    at_step,
    recorded,
    recording,
    send,
)

from engine import processes


@pytest.fixture(scope="module")
def undisturbed(folder):
    return interruption.undisturbed(folder)


@pytest.fixture(scope="module")
def undisturbed_pair(folder):
    return interruption.undisturbed(folder, ranks=2)


# ------------------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, workers, step",
    (("SIGTERM", 2, 6), ("SIGUSR1", 0, 6), ("SIGINT", 2, 10), ("SIGTERM", 0, STEPS)),
)
def test_a_signal_saves_the_step_under_way(name, workers, step, undisturbed, folder, tmp_path):
    training = Training(folder, tmp_path, "--workers", workers)
    ((_, err),) = training.go(75, at_step(step, send(signal.Signals[name])))
    assert err == f"stopped by {name} after step {step}; the same command continues\n"
    assert training.load()["step"] == step
    assert list(training.losses()) == list(range(1, step + 1))
    ((out, err),) = training.go()
    assert f"continues after step {step}\n" in out and err == ""
    training.assert_same(undisturbed)


@pytest.mark.parametrize("rank", (0, 1))
def test_one_rank_is_asked_and_both_save(rank, undisturbed_pair, folder, tmp_path):
    training = Training(folder, tmp_path, "--workers", 2)
    texts = training.go(75, at_step(6, send(signal.SIGTERM), rank), ranks=2)
    step = training.load()["step"]
    assert 6 <= step <= 7  # the step under way, or the one after it
    reason = ("SIGTERM", "a signal to another rank")[rank]
    said = f"stopped by {reason} after step {step}; the same command continues\n"
    assert [err for _, err in texts] == [said, ""]
    training.go(ranks=2)
    training.assert_same(undisturbed_pair)


def test_sigterm_to_torchrun(undisturbed_pair, folder, tmp_path):
    """It passes the signal on, and starts nothing again, though it might."""
    patch = """
def ask():
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGTERM)
    until_asked()

at_step(6, ask)()"""
    training = Training(folder, tmp_path, "--workers", 2)
    said = training.torchrun(patch, restarts=2, status=1)
    step = training.load()["step"]
    assert 6 <= step <= 7
    assert f"stopped by SIGTERM after step {step}; the same command continues\n" in said
    assert "continues after step" not in said
    training.go(ranks=2)
    training.assert_same(undisturbed_pair)


@pytest.mark.parametrize("before, after", ((2, 1), (1, 2)))
def test_continued_on_another_number_of_ranks(before, after, undisturbed, folder, tmp_path):
    def patch():
        recording(tmp_path / "before")()
        at_step(6, send(signal.SIGTERM), before - 1)()

    training = Training(folder, tmp_path)
    training.go(75, patch, before)
    step = training.load()["step"]
    training.go(patch=recording(tmp_path / "after"), ranks=after)
    shown = recorded(tmp_path / "before", before)
    assert len(shown) == step * BATCH
    shown += recorded(tmp_path / "after", after)
    assert shown == recorded(undisturbed.home / "order")
    assert sorted(shown[:IMAGES]) == [(i, 0) for i in range(IMAGES)]
    assert training.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)


def test_the_order_is_the_same_on_two_ranks(undisturbed, undisturbed_pair):
    order = recorded(undisturbed.home / "order")
    assert recorded(undisturbed_pair.home / "order", 2) == order
    assert undisturbed_pair.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)


# ------------------------------------------------------------------------------------------------
# --time-limit
# ------------------------------------------------------------------------------------------------


def test_time_limit(undisturbed, folder, tmp_path):
    """In minutes of the script, of which loading is a part; each start does one step at least."""
    training = Training(folder, tmp_path, "--time-limit", 1e-9)
    for step in (1, 2):
        ((_, err),) = training.go(75)
        assert err == f"stopped by --time-limit after step {step}; the same command continues\n"
        assert training.load()["step"] == step
    training = Training(folder, tmp_path, "--time-limit", 30)
    training.go(75, at_step(6, an_hour_passes))
    assert training.load()["step"] == 6
    training.go()
    training.assert_same(undisturbed)


def test_time_limit_under_torchrun(undisturbed_pair, folder, tmp_path):
    """torchrun is content and starts nothing again, though it might."""
    training = Training(folder, tmp_path, "--time-limit", 30)
    said = training.torchrun("at_step(6, an_hour_passes)()", restarts=2)
    step = training.load()["step"]
    assert 6 <= step <= 7
    assert said.count(f"stopped by --time-limit after step {step};") == 1
    assert "continues after step" not in said and not training.paths("result.json")
    ((said, _), _) = training.go(ranks=2)
    assert said.count(f"continues after step {step}\n") == 1
    training.assert_same(undisturbed_pair)


# ------------------------------------------------------------------------------------------------
# A rank dies
# ------------------------------------------------------------------------------------------------


def test_a_dead_rank_is_started_again(undisturbed_pair, folder, tmp_path):
    """torchrun starts both again from the checkpoint. Bitwise, for a sum of two has no order."""
    patch = """
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(10, die, rank=0)()"""
    training = Training(folder, tmp_path, *SAVE_EACH_STEP)
    said = training.torchrun(patch, restarts=3)
    assert said.count("continues after step") == 1
    training.assert_same(undisturbed_pair)


def test_restarts_that_would_not_meet_are_refused(monkeypatch):
    settings = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (settings | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where"):
        processes.setup("fp32")


# ------------------------------------------------------------------------------------------------
# Two nodes: network namespaces joined by a virtual cable, and by the directory they write to
# ------------------------------------------------------------------------------------------------

ADDRESSES = ("10.231.7.1", "10.231.7.2")  # seen inside the namespaces only
CABLE = "cable0"
# In node 2, one after the other: the worker dies, then the agent with it.
DYING = """
def die_with_agent():
    os.kill(os.getppid(), signal.SIGKILL)
    die()

def once(step, act):
    died = Path(f"died-{step}")
    if os.environ["NODE"] == "2" and not died.exists():
        at_step(step, lambda: (died.touch(), act()))()

once(18, die_with_agent)
once(10, die)"""


def ip(*args):
    """Skips the test where `ip` cannot do that here."""
    done = subprocess.run(("ip", *args), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(args)}: {done.stderr.strip()}")


@pytest.fixture
def nodes():
    """The names of two network namespaces: nothing but a loopback and an end of the cable."""
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: no `ip` (iproute2)")
    names = [f"node{number}-{os.getpid()}" for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(remove, name)
        ends = [("name", CABLE, "netns", name) for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names


def remove(name):
    listing = ("ip", "netns", "pids", name)
    while pids := subprocess.run(listing, capture_output=True, text=True).stdout.split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    subprocess.run(("ip", "netns", "delete", name), check=True)


def start_agent(names, number, training):
    """torchrun on this node, which starts one worker."""
    # Said outright, as a machine may give its own name any address. A silent agent counts as gone
    # after 6 seconds, not 15.
    meeting = f"is_host={number == 0},keep_alive_interval=1,keep_alive_max_attempt=6"
    launch = (
        *("ip", "netns", "exec", names[number], sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--monitor-interval=0.1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test"),
        *(f"--rdzv-conf={meeting}", f"--local-addr={ADDRESSES[number]}"),
    )
    settings = {"NODE": str(number + 1), "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
    # The store that torchrun would share with its workers keeps the addresses of those before a
    # restart; a worker that starts first calls them, and fails or waits for ever (PyTorch 2.14).
    settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(training.home / f"agent{number}.txt", "a") as output:
        return subprocess.Popen(
            (*launch, *training.driver(DYING)),
            cwd=training.home,
            stdout=output,
            stderr=output,
            env=os.environ | settings,
            start_new_session=True,
        )


def test_a_node_loses_its_worker_and_then_dies(nodes, undisturbed_pair, folder, tmp_path):
    """First its agent and the other start the workers again, then a new agent takes its place."""
    training = Training(folder, tmp_path, *SAVE_EACH_STEP)
    agents = [start_agent(nodes, number, training) for number in (0, 1)]
    statuses = [agents[1].wait(HANG)]
    agents[1] = start_agent(nodes, 1, training)
    statuses += [agent.wait(HANG) for agent in agents]
    said = "".join((tmp_path / f"agent{number}.txt").read_text() for number in (0, 1))
    assert statuses == [-signal.SIGKILL, 0, 0], said
    continued = [int(step) for step in re.findall(r"continues after step (\d+)", said)]
    assert len(continued) >= 2 and all(0 < step < STEPS for step in continued), said
    # Two numbers have one sum: it does not matter which node came to be which rank.
    training.assert_same(undisturbed_pair)


# ------------------------------------------------------------------------------------------------
# A step on several processes
# ------------------------------------------------------------------------------------------------

CPU = processes.Env(0, 1, torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    "images, count, multiple, sizes",
    (
        (7, 1, 1, [7]),
        (7, 2, 1, [4, 3]),
        (7, 3, 1, [3, 3, 1]),
        (7, 5, 1, [1] * 7),
        (7, 2, 2, [4, 3]),
        (7, 3, 2, [2, 2, 2, 1]),
        (10, 3, 2, [2] * 5),
        (5, 5, 2, [2, 2, 1]),
        (1, 4, 2, [1]),
    ),
)
def test_parts_are_the_batch_in_order(images, count, multiple, sizes):
    batch, labels = torch.arange(images)[:, None], torch.arange(images)
    found = list(processes.parts(None, batch, labels, count, CPU, multiple))
    assert [len(part) for part, _ in found] == sizes
    for place, whole in enumerate((batch, labels)):
        assert torch.equal(torch.cat([part[place] for part in found]), whole)


def test_ranks_talk_once_a_step():
    """And after the last part. The group of one is told that there are two ranks, and that the
    others' sum is twice its own.
    """
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for count in (1, 3):
            model, sent = torch.nn.Linear(5, 4), []
            expected = torch.autograd.grad(model(inputs).square().sum(), model.weight)[0]
            network = processes.parallel(model, CPU._replace(ranks=2))

            def add_up(state, bucket, sent=sent):
                sent.append(len(bucket.buffer()))
                ready = torch.futures.Future()
                ready.set_result(3 * bucket.buffer())
                return ready

            network.register_comm_hook(None, add_up)
            for _ in range(2):  # buckets are laid out anew after the first step
                sent.clear()
                model.zero_grad()
                env = CPU._replace(ranks=2)
                for images, _ in processes.parts(network, inputs, inputs, count, env):
                    network(images).square().sum().backward()
                assert sum(sent) == 5 * 4 + 4
                torch.testing.assert_close(model.weight.grad, 3 * expected)
    finally:
        dist.destroy_process_group()
