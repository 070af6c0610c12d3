"""Processes that are asked to stop, that die, and that train one network together."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import interruption
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from conftest import env, refuses
from interruption import CPU, SAVE_EACH_STEP, STEPS, Training, at_step, send, undisturbed

from engine import processes


@pytest.mark.parametrize(
    "name, workers, step", (("SIGTERM", 2, 6), ("SIGINT", 2, 10), ("SIGUSR1", 0, STEPS))
)
def test_a_signal_saves_the_step_under_way(name, workers, step, folder, tmp_path):
    training = Training(folder, tmp_path, "--workers", workers)
    ((_, err),) = training.go(75, at_step(step, send(signal.Signals[name])))
    assert err == f"stopped by {name} after step {step}; the same command continues\n"
    assert training.step == step
    assert list(training.losses()) == list(range(1, step + 1))
    ((out, err),) = training.finish()
    assert f"continues after step {step}\n" in out and err == ""


@pytest.mark.parametrize("before, asked, after", ((2, 1, 2), (2, 0, 1), (1, 0, 2)))
def test_one_rank_is_asked_and_all_save(before, asked, after, folder, tmp_path):
    """As many ranks continue bitwise; others, with the same images, to the same losses."""
    training = Training(folder, tmp_path, "--workers", 2 * (before == after))
    texts = training.go(75, at_step(6, send(signal.SIGTERM), asked), before)
    assert 6 <= training.step <= 7  # the step under way, or the one after it
    reason = "a signal to another rank" if asked else "SIGTERM"
    said = f"stopped by {reason} after step {training.step}; the same command continues\n"
    assert [err for _, err in texts] == [said, ""][:before]
    training.go(ranks=after)
    if before == after:
        training.assert_same(undisturbed(folder, before))
    assert training.losses() == pytest.approx(undisturbed(folder, 1).losses(), rel=1e-4)


def test_time_limit(folder, tmp_path):
    """In minutes of the script, of which loading is a part; each start does one step at least."""
    training = Training(folder, tmp_path, "--time-limit", 1e-9)
    for step in (1, 2):
        ((_, err),) = training.go(75)
        assert err == f"stopped by --time-limit after step {step}; the same command continues\n"
        assert training.step == step
    Training(folder, tmp_path).finish()


def test_time_limit_under_torchrun(folder, tmp_path):
    """Both ranks leave with status 0, so that torchrun starts nothing again."""

    def patch():
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        at_step(6, interruption.time_passes)()

    training = Training(folder, tmp_path, "--time-limit", 30)
    ((_, err), (_, silence)) = training.go(0, patch, ranks=2)
    assert 6 <= training.step <= 7 and not training.paths("result.json")
    said = f"stopped by --time-limit after step {training.step}; the same command continues\n"
    assert (err, silence) == (said, "")
    training.finish(ranks=2)


def test_a_dead_rank_is_started_again_and_sigterm_is_passed_on(folder, tmp_path):
    """Both from the checkpoint; after SIGTERM nothing is started again, though it might be.
    Bitwise, for a sum of two has no order.
    """
    patch = """
def ask():
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGTERM)
    until_asked()

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(10, die, rank=0)()
at_step(14, ask)()"""
    training = Training(folder, tmp_path, "--workers", 2, *SAVE_EACH_STEP)
    said = training.torchrun(patch, restarts=3, status=1)
    assert 14 <= training.step <= 15
    assert f"stopped by SIGTERM after step {training.step}; the same command continues\n" in said
    assert said.count("continues after step") == 1
    training.finish(ranks=2)


def test_restarts_that_would_not_meet_are_refused(monkeypatch):
    settings = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (settings | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    said = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where"
    refuses(ValueError, lambda: processes.setup("fp32"), said)


@pytest.mark.parametrize(
    "line, refused",
    (
        # srun -n 2; mpirun -n 4; srun --mpi=pmi2 or Intel MPI's mpirun
        ("SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS=2: 2 proc"),
        ("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=4: 4 processes"),
        ("PMI_SIZE=3 PMI_RANK=0 SLURM_STEP_NUM_TASKS=1", "PMI_SIZE=3: 3 processes"),
        # sbatch --ntasks=8 and salloc -n 8 without srun; srun -n 1; runs of their own
        ("SLURM_NTASKS=8 SLURM_NPROCS=8 SLURM_PROCID=0 SLURM_TASKS_PER_NODE=8", None),
        ("SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=0 PMI_SIZE=1", None),
        ("SLURM_STEP_NUM_TASKS=4 WORLD_SIZE=1", None),
    ),
)
def test_processes_that_do_not_know_each_other(line, refused, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for word in line.split():
        monkeypatch.setenv(*word.split("="))
    if refused is None:
        assert processes.setup("fp32").ranks == 1
    else:
        said = refused, " do not know each other; start one a node"
        refuses(ValueError, lambda: processes.setup("fp32"), *said)


@pytest.mark.parametrize("given", ("1 1", "0 0", "0 x", "x 2", "0 -1", "3 2", "0 "))
def test_a_process_that_cannot_be(given, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE"), given.split(" ")):
        monkeypatch.setenv(name, value)
    said = "RANK={} of WORLD_SIZE={}: no such process; unset both".format(*given.split(" "))
    refuses(ValueError, lambda: processes.setup("fp32"), said)


@pytest.mark.parametrize("rank, error", ((0, "ValueError"), (1, "KeyError")))
def test_of_two_processes_the_one_that_met_an_error_says_it(rank, error, folder, tmp_path):
    """torchrun's own lines aside, of which none is of the other process."""
    patch = f"""
def fail():
    raise {error}("broken")

at_step(3, fail, rank={rank})()"""
    share_store = partial(os.environ.pop, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    said = Training(folder, tmp_path).torchrun(patch, status=1, before=share_store)
    text = "broken" if error == "ValueError" else "KeyError: 'broken'; TRACEBACK=1 shows where"
    found = [line for line in said.splitlines() if "rror" in line and "broken" in line]
    assert found == [f"error{' (rank 1)' * rank}: {text}"]
    assert "RuntimeError" not in said and said.count("Traceback") == 1  # of torchrun


# In node 2, once, the agent dies and its worker with it.
DYING = """
def die_with_agent():
    Path("died").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    die()

if os.environ["NODE"] == "2" and not Path("died").exists():
    at_step(14, die_with_agent)()"""


def start_agent(number, port, training):
    """torchrun on this node, which starts one worker."""
    # A silent agent counts as gone after 6 seconds, not 15.
    meeting = f"is_host={number == 1},keep_alive_interval=1,keep_alive_max_attempt=6"
    launch = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--max-restarts=3", "--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-id=test"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={meeting}", "--local-addr=127.0.0.1"),
    )
    # The store that torchrun would share with its workers keeps the addresses of those before a
    # restart; a worker that starts first calls them, and fails or waits for ever (PyTorch 2.14).
    settings = {"NODE": str(number), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(training.home / f"agent{number}.txt", "a") as file:
        options = dict(cwd=training.home, env=env() | settings, stdout=file, stderr=file)
        return subprocess.Popen((*launch, *training.driver(DYING)), **options)


def test_a_node_dies_and_another_takes_its_place(folder, tmp_path):
    training, port = Training(folder, tmp_path, *SAVE_EACH_STEP), interruption.free_port()
    agents = [start_agent(number, port, training) for number in (1, 2)]
    statuses = [agents[1].wait(interruption.HANG)]
    agents[1] = start_agent(2, port, training)
    statuses += [agent.wait(interruption.HANG) for agent in agents]
    said = "".join((tmp_path / f"agent{number}.txt").read_text() for number in (1, 2))
    assert statuses == [-signal.SIGKILL, 0, 0], said
    continued = [int(step) for step in re.findall(r"continues after step (\d+)", said)]
    assert continued and all(0 < step < STEPS for step in continued), said
    # Two numbers have one sum: it does not matter which node came to be which rank.
    training.assert_same(undisturbed(folder, 2))


@pytest.mark.parametrize("size, precision", ((8, "fp32"), (16, "fp32"), (17, "bf16")))
def test_compiled_bf16_of_tiny_images_on_a_cpu(size, precision, capsys):
    """In fp32, said once; refused where it was asked for by name. Else as asked."""
    env, args = CPU._replace(precision="bf16"), SimpleNamespace(precision="auto", compile=True)
    for _ in range(2):
        assert env.training_precision(args, size) == precision
    said = f"--compile: PyTorch's bf16 gradients on CPUs are wrong for images of {size} pixels"
    assert capsys.readouterr().out == (f"{said}: in fp32\n" if size <= 16 else "")
    args.precision = "bf16"
    if size <= 16:
        train = partial(env.training_precision, args, size)
        refuses(ValueError, train, f"{said}; give --precision fp32")
    args.compile = False
    assert env.training_precision(args, size) == "bf16"


@pytest.mark.parametrize(
    "images, count, multiple, sizes",
    ((7, 1, 1, [7]), (7, 3, 1, [3, 3, 1]), (7, 2, 2, [4, 3]), (10, 3, 2, [2] * 5), (1, 4, 2, [1])),
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
            model, env, sent = torch.nn.Linear(5, 4), CPU._replace(ranks=2), []
            expected = torch.autograd.grad(model(inputs).square().sum(), model.weight)[0]
            network = processes.parallel(model, env)

            def add_up(state, bucket, sent=sent):
                sent.append(len(bucket.buffer()))
                ready = torch.futures.Future()
                ready.set_result(3 * bucket.buffer())
                return ready

            network.register_comm_hook(None, add_up)
            for _ in range(2):  # buckets are laid out anew after the first step
                sent.clear(), model.zero_grad()
                for images, _ in processes.parts(network, inputs, inputs, count, env):
                    network(images).square().sum().backward()
                assert sum(sent) == 5 * 4 + 4
                torch.testing.assert_close(model.weight.grad, 3 * expected)
    finally:
        dist.destroy_process_group()
