"""Processes, of torchrun or one: who takes part, how all stop at one step, how a script ends."""

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

from engine.console import EXIT_BAD_INPUT, EXIT_STOPPED, Stopped, exit_status, say_once

BEGAN = time.monotonic()


def run_script(main):
    """Calls main() and exits with its exit_status; of several processes the one that met an error
    says it, and not those that it leaves waiting.
    """

    def said_once():
        try:
            return main()
        except (Exception, KeyboardInterrupt) as error:
            lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
            waiting = lost or isinstance(error, (Stopped, KeyboardInterrupt))
            # Has another said its error? (A store of rank 0's own ends with it, in many lines.)
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                with contextlib.suppress(Exception):
                    store = dist.distributed_c10d._get_default_store()
                    if store.check(["said"]) if waiting else store.add("said", 1) > 1:
                        return EXIT_BAD_INPUT
            raise

    status = exit_status(said_once)
    if dist.is_initialized():
        if status == EXIT_BAD_INPUT and torch.cuda.is_available():
            # What one rank met leaves the others waiting: destroying the group would wait for them
            # too. torchrun ends them when this process leaves.
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


class Env(NamedTuple):
    """Where this process runs. precision: "fp32", "tf32" (its products on CUDA rounded to TF32), or
    "bf16" for autocast.
    """

    rank: int
    ranks: int
    device: torch.device
    precision: str

    @property
    def main(self):
        return self.rank == 0

    def alone(self):
        """The same process, taking no part in the others' work."""
        return self._replace(rank=0, ranks=1)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def training_precision(self, args, size):
        """That of a training on images of size x size pixels with these options. Raises
        ValueError for --compile and bf16 where PyTorch 2.14 computes it wrongly on CPUs: the
        weight gradient of a 3x3 convolution of stride 2 from 1x1 pixels, to which four halvings
        bring 16, reads memory that was never written (engine/convolution.py does not).
        """
        cpu = self.device.type == "cpu" and self.precision == "bf16"
        if not (cpu and args.compile and size <= 16):
            return self.precision
        wrong = f"--compile: PyTorch's bf16 gradients on CPUs are wrong for images of {size} pixels"
        if args.precision == "bf16":
            raise ValueError(f"{wrong}; give --precision fp32, or leave it out")
        say_once(self, f"{wrong}: in fp32")
        return "fp32"

    def computing(self, precision):
        """The same process, which computes in that precision from now on."""
        tf32 = precision == "tf32"  # else off: PyTorch's own default for convolutions is on
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        return self._replace(precision=precision)


def gathered(value, env):
    """The values of all ranks, on each of them."""
    values = [value] * env.ranks
    if env.ranks > 1:
        dist.all_gather_object(values, value)
    return values


def setup(precision="auto", timeout=None):
    """The Env, joined to the other processes of torchrun. timeout: timedelta that one waits for
    another (default: PyTorch's). Raises ValueError where processes could not join each other.
    """
    # What tells a process that others were started beside it: srun alone sets the first, where
    # SLURM_NTASKS is of the whole allocation (srun(1), output environment variables).
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        count = os.environ.get(name, "")
        if count not in ("", "0", "1") and "WORLD_SIZE" not in os.environ:
            mend = "start one a node, of torchrun, or set WORLD_SIZE=1 for runs of their own"
            said = f"{name}={count}: {count} processes that do not know each other; {mend}"
            raise ValueError(said)
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
        mend = "unset both, or start this with torchrun"
        raise ValueError(f"RANK={given[0]} of WORLD_SIZE={given[1]}: no such process; {mend}")
    rank, ranks = map(int, given)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= devices:
            mend = "lower it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            raise ValueError(f"--nproc_per_node is more than the {devices} GPUs here; {mend}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if ranks > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the processes and holds the addresses of dead ones.
        mend = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        raise ValueError(f"--max-restarts: those may not find each other; {mend}")
    if ranks > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        own = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=own)
    if precision == "auto":
        bf16 = torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "fp32"
    if precision == "tf32" and device.type == "cpu":
        raise ValueError("--precision tf32: CPUs have none; give fp32, or auto")
    return Env(rank, ranks, device, precision).computing(precision)


@functools.lru_cache
def environment(env):
    """What a result says of where it was made."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = None
    cuda = env.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name(env.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": env.ranks,
        "commit": commit or None,
    }


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the current step, and so do so many minutes
    since the script began; a second SIGINT kills.
    """

    def __init__(self, env, minutes=None):
        self.env, self.name, self.pending = env, None, None
        self.deadline = BEGAN + 60 * minutes if minutes else math.inf
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """(why, exit status) on all ranks at the same step, once any of them was asked; else None.
        The ranks' answers are added up while the next step runs, and read after it.
        """
        asked = torch.tensor([self.name is not None, time.monotonic() > self.deadline]).float()
        found = asked
        if self.env.ranks > 1:
            found, work = self.pending or (torch.zeros(2), None)
            if work:
                work.wait()
            self.pending = None if found.any() else (asked, dist.all_reduce(asked, async_op=True))
        signalled, late = found > 0
        if signalled:
            return self.name or "a signal to another rank", EXIT_STOPPED
        # torchrun would start failed processes again, for which the time is up no less.
        status = 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_STOPPED
        return ("--time-limit", status) if late else None

    def raise_if_agreed(self):
        """Raises Stopped on all ranks once any of them was asked."""
        if stop := self.agreed():
            raise Stopped(f"stopped by {stop[0]}", stop[1])


def parallel(model, env):
    """The callable that trains this model, averaging gradients over ranks."""
    if env.ranks == 1:
        return model
    own = [env.device] if env.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)


def parts(network, images, labels, count, env, multiple=1):
    """Yields a rank's batch in parts, on the device: (images, labels). Gradients are averaged over
    the ranks once, in the backward pass of the last part.

    network: of `parallel`. count: of parts, or up to twice as many where these are equal, as one
    shape is one compiled graph. multiple: so many neighbours stay together.
    """
    units = math.ceil(len(images) / multiple)
    count = next((c for c in range(count, 2 * count) if units % c == 0), count)
    size = math.ceil(units / count) * multiple
    images = images.to(env.device, non_blocking=True).split(size)
    labels = labels.to(env.device, non_blocking=True).split(size)
    for number in range(len(images)):
        last = env.ranks == 1 or number == len(images) - 1
        with contextlib.nullcontext() if last else network.no_sync():
            yield images[number], labels[number]
