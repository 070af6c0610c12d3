"""What every training script shares: processes, training steps, evaluation, options.

Under torchrun each process runs the same script; without it, one process does all of it.
"""

import argparse
import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm

import data
import models
from engine import memory as hardware
from engine.checkpoint import save_tensors
from engine.console import EXIT_STOPPED, complain, one_of, positive
from engine.metrics import Diverged, average_precision, compute_metrics, loss_sum, roc_auc  # noqa: F401
from engine.optimizer import SGD_AGC  # noqa: F401
from readers import cache as loading

PRECISIONS = ("auto", "fp32", "bf16")
BEGAN = time.monotonic()


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_common_options(parser, out, auto_batch=False):
    """The options that mean the same in every training script."""
    add = parser.add_argument
    add("--data-dir", default="datasets", help="directory that holds the real datasets")
    add("--cache-dir", help="directory for the index of large datasets (default: beside them) and "
        "the decoded images of a grid (default: the system's temporary one)")  # fmt: skip
    add("--download", action="store_true", help="fetch what torchvision can fetch")
    add("--views", nargs="+", metavar="VIEW", help="X-ray views to keep, e.g. PA AP (default: the "
        "study's of the dataset)")  # fmt: skip
    add("--split-by", type=one_of("patient", "image"), help="how padchest is split; image: as in "
        "the study, patients on both sides (default: patient)")  # fmt: skip
    add("--labels", type=one_of("intersection", "union"), help="of datasets joined by +: those "
        "common to all, or all (default: intersection)")  # fmt: skip
    add("--single-label", action=argparse.BooleanOptionalAction, help="keep images with exactly "
        "one positive label, as a multi-class dataset (default: few-shot padchest)")  # fmt: skip
    add("--balanced", action="store_true", help="draw training images with probability inverse to "
        "the frequency of their class")  # fmt: skip
    add("--out", default=out, help="directory to write to")
    add("--seed", type=positive(int, or_zero=True), default=0, help="of initialisation, order and "
        "augmentation (transfer: the first of --seeds)")  # fmt: skip
    batch_help = "images a step, over all processes"
    if auto_batch:
        batch_help += "; auto: the recipe's, in as few parts as fit into memory"
    add("--batch-size", type=batch_size if auto_batch else positive(int), metavar="N",
        help=f"{batch_help} (default: recipe)")  # fmt: skip
    add("--lr", type=positive(float), help="learning rate (pretrain.py: at a batch "
        "of 256, scaled linearly) (default: recipe)")  # fmt: skip
    add("--image-size", type=positive(int), help="side in pixels (default: recipe)")
    add("--precision", type=one_of(*PRECISIONS), default="auto", help="auto: bf16 where the "
        "hardware computes in it, else fp32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the training step")
    add(
        "--workers",
        type=positive(int, or_zero=True),
        default=0,
        help="processes a rank that read images ahead",
    )
    add("--log-every", type=positive(int), default=50, help="steps")
    add("--save-minutes", type=positive(float), default=10.0, help="minutes between checkpoints")
    add("--time-limit", type=positive(float), metavar="MINUTES", help="then save and leave with "
        "status 75, or 0 under torchrun; the same command continues (default: none)")  # fmt: skip


def batch_size(text):
    """An argparse type: a number of images, or "auto"."""
    return text if text == "auto" else positive(int)(text)


def run(main):
    """Calls main() and exits with its status; bad input becomes one line and status 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is said
    try:
        status = main()
    except (ValueError, OSError) as error:
        status = complain(error)
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{stop}; the same command continues", file=sys.stderr)
        status = stop.status
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------


class Env(NamedTuple):
    """Where this process runs. precision: "fp32", or "bf16" for autocast."""

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


def setup(precision="auto", timeout=None):
    """Joins the other processes of torchrun, if any, and chooses device and precision.

    timeout: timedelta that one process waits for another (default: PyTorch's).
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= devices:
            raise ValueError(
                f"--nproc_per_node is more than the {devices} GPUs here; lower it, or set "
                "CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if ranks > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the processes and holds the addresses of dead ones.
        raise ValueError(
            "--max-restarts: processes that torchrun starts again may not find each other; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )
    if ranks > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    if precision == "auto":
        precision = "bf16" if _computes_bf16(device) else "fp32"
    return Env(rank, ranks, device, precision)


def _computes_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def shared_out(count, env):
    """The numbers below count, each on one rank alone, the next to whichever rank comes free.

    When the generator of one rank is closed before its end, the others' end too.
    """
    if env.ranks == 1:
        yield from range(count)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        while (number := store.add("shared_out", 1) - 1) < count:
            yield number
    except GeneratorExit:
        store.add("shared_out", count)


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


class Stopped(Exception):
    """The run was asked to stop; its state is saved. status: of the process."""

    def __init__(self, message, status=EXIT_STOPPED):
        super().__init__(message, status)
        self.message, self.status = message, status

    def __str__(self):
        return self.message


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the current step; a second SIGINT kills.

    minutes: since the script began, after which it asks for a stop itself.
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


# ------------------------------------------------------------------------------------------------
# Training and evaluation
# ------------------------------------------------------------------------------------------------


def to_input(images, normalization, device):
    """uint8 (N,1|3,H,W) -> normalised float32 (N,3,H,W) on the device; grey is copied to RGB."""
    mean, std = _statistics(normalization, device)
    images = images.to(device, non_blocking=True).expand(-1, 3, -1, -1)
    return images.float().sub_(mean).div_(std)  # in place: a new tensor each costs ten times more


@functools.lru_cache
def _statistics(normalization, device):
    # Kept on the device: a copy in every step would make the host wait for it.
    with torch.inference_mode(False):
        return [torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in normalization]


def parallel(model, env, compile=False):
    """The callable that trains this model: averaging gradients over ranks, compiled if asked."""
    if env.ranks > 1:
        ids = [env.device] if env.device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True
        )
    return torch.compile(model) if compile else model


def mixup_lambda(alpha, seed, step):
    """MixUp's one coefficient a step, Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412)."""
    return float(loading.generator(seed, loading.Stream.MIXUP, step).beta(alpha, alpha))


class Run:
    """A training under way: restored from the state in a checkpoint, and saved to it.

    path: of the checkpoint, None to keep none. step: steps done. seconds: spent in `train`.
    """

    def __init__(self, path, model, optimizer, config, state=None):
        self.path, self.model, self.optimizer, self.config = path, model, optimizer, config
        self.step, self.seconds = 0, 0.0
        self._writer, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self, env, wait=True):
        """Writes the checkpoint, on the main rank; the one before is kept until it is whole.

        wait=False: the device waits only while the state is copied to the host's memory, and a
        thread writes. Weights that are not finite are not saved: the next loss will say so. Raises
        OSError, also for the write before, when the disk is full.
        """
        if not (self.path and env.main):
            return
        self.finish_saving()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds, "config": self.config}
        self._writing = self._writer.submit(save_tensors, self.path, _on_host(state))
        if wait:
            self.finish_saving()

    def finish_saving(self, wait=True):
        """Waits for the checkpoint that is being written; raises what went wrong with it."""
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()

    def summary(self, images, env):
        """What a result file says of a training on so many images.

        flops_per_second: of the model (3 times the forward pass: forward, and backward for inputs
        and weights), 2 a multiply-add, recomputation not counted. peak_share: of what the devices
        can do.
        """
        config = self.config
        speed = self.step * config["batch_size"] / self.seconds
        size = config.get("crop") or config["image_size"]
        classes = self.model.head.conv.out_channels
        flops = 3 * models.forward_flops(config["model"], classes, size) * speed
        return {
            "images": images,
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": speed,
            "flops_per_second": flops,
            "peak_share": flops / (env.ranks * hardware.peak_flops(env.device, env.precision)),
        }


def _on_host(state):
    """A copy of nested dicts and lists with every tensor in the host's memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list) else state


def train(
    run,
    forward,
    batches,
    stream,
    learning_rate,
    stop,
    env,
    normalization,
    *,
    accumulate=1,
    mixup=0.0,
    signals=None,
    save_minutes=10.0,
    log=None,
    log_every=50,
    progress=None,
):
    """Trains from run.step to before step `stop`.

    forward: what `parallel` returned. batches: loading.Batches of this rank. stream: iterator of
    them from run.step on (loading.loader), which may go beyond `stop`. learning_rate: step ->
    float. accumulate: parts of a rank's batch that are computed one after the other. log(step,
    lr, readings of the Meter): called on every rank every log_every steps. The run is saved every
    save_minutes in the background, and before Stopped is raised. Raises Diverged on all ranks
    when a loss or gradient was no longer finite; what is saved is always finite.
    """
    forward.train()
    meter = Meter(env, batches.batch_size)
    saved = clock = time.monotonic()
    for step in range(run.step, stop):
        asked = time.monotonic()
        images, labels, count = next(stream)
        waited = time.monotonic() - asked
        lr = learning_rate(step)
        share = mixup_lambda(mixup, batches.seed, step) if mixup else None
        loss = train_step(
            forward, run.optimizer, images, labels, count, lr, batches.dataset.task, env,
            normalization, share, accumulate,
        )  # fmt: skip
        meter.add(step, loss, count, run.optimizer, waited)
        now = time.monotonic()
        run.step, run.seconds, clock = step + 1, run.seconds + now - clock, now
        if progress is not None:
            progress.update()
        if run.step % log_every == 0 or run.step == stop:
            run.finish_saving(wait=False)
            readings = meter.read(learning_rate)
            if log:
                log(run.step, lr, readings)
        if signals and (stop_now := signals.agreed()):
            meter.refuse_nonfinite(learning_rate)
            run.save(env)
            if env.ranks > 1:
                dist.barrier()  # torchrun kills the others soon after the first one leaves
            reason, status = stop_now
            raise Stopped(f"stopped by {reason} after step {run.step}", status)
        if now - saved > 60 * save_minutes and meter.finite():
            run.save(env, wait=False)
            saved = time.monotonic()


def train_step(
    forward,
    optimizer,
    images,
    labels,
    count,
    lr,
    task,
    env,
    normalization,
    share=None,
    accumulate=1,
):
    """One step; returns this rank's sum of the losses. count: valid labels of the global batch.

    images: uint8 (N,C,H,W) of this rank, in `accumulate` parts. share: MixUp's coefficient;
    neighbours in the batch are mixed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    unit = 2 if share else 1  # neighbours stay together
    size = math.ceil(len(images) / accumulate / unit) * unit
    images = images.to(env.device, non_blocking=True)
    labels = labels.to(env.device, non_blocking=True)
    parts, total = list(zip(images.split(size), labels.split(size))), 0
    for number, (images, labels) in enumerate(parts, 1):
        whole = env.ranks == 1 or number == len(parts)
        with contextlib.nullcontext() if whole else forward.no_sync():
            inputs = to_input(images, normalization, env.device)
            loss = _loss(forward, inputs, labels, task, env, share)
            # DDP averages over ranks; the mean over the global batch is a sum over ranks.
            (loss * (env.ranks / max(count, 1))).backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def _loss(forward, images, labels, task, env, share):
    if share is None:
        with env.autocast():
            logits = forward(images)
        return loss_sum(logits, labels, task)
    partner = torch.arange(len(images), device=env.device).bitwise_xor(1)
    partner = partner.clamp(max=len(images) - 1)
    with env.autocast():
        logits = forward(share * images + (1 - share) * images[partner])
    mixed = share * loss_sum(logits, labels, task)
    return mixed + (1 - share) * loss_sum(logits, labels[partner], task)


class Meter:
    """What is read every so many steps: kept on the device until then, so that it never waits."""

    def __init__(self, env, batch_size):
        self.env, self.batch_size = env, batch_size
        self.bad = torch.full((), math.inf, dtype=torch.float64, device=env.device)
        self._reset()

    def _reset(self):
        self.loss, self.norm, self.clipped = 0.0, 0.0, 0.0
        self.count, self.steps, self.waited = 0, 0, 0.0
        self.since = time.monotonic()

    def add(self, step, loss, count, optimizer, waited):
        """A step: this rank's sum of losses, the global count, seconds waited for the batch."""
        finite = loss.isfinite() & optimizer.grad_norm.isfinite()
        self.bad = torch.where(finite, self.bad, self.bad.clamp(max=step))
        self.loss, self.norm = self.loss + loss, self.norm + optimizer.grad_norm
        self.clipped = self.clipped + optimizer.clipped
        self.count, self.steps = self.count + count, self.steps + 1
        self.waited += waited

    def finite(self):
        """Whether every gradient so far was finite (which all ranks see alike)."""
        return math.isinf(self.bad)

    def refuse_nonfinite(self, learning_rate):
        """Raises Diverged on all ranks when the loss or gradient of any step was not finite."""
        if self.env.ranks > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        step = float(self.bad)
        if math.isfinite(step):
            raise Diverged(
                f"loss or gradient is not finite at step {step:.0f}, learning rate "
                f"{learning_rate(step):g}; lower --lr and give another --out (the last checkpoint "
                "is from before)"
            )

    def read(self, learning_rate):
        """Means over the steps since the last reading; waits for the device.

        Returns {"loss", "grad_norm" (before clipping), "clipped" (share of the units that AGC
        scales, None without), "images_per_second" of all ranks, "data_wait" (share of the time
        that the host waited for a batch), "memory" (bytes, the peak of this process)}.
        """
        self.refuse_nonfinite(learning_rate)
        if self.env.ranks > 1:
            dist.all_reduce(self.loss)
        loss, norm, clipped = float(self.loss), float(self.norm), float(self.clipped)
        seconds = time.monotonic() - self.since
        readings = {
            "loss": loss / max(self.count, 1),
            "grad_norm": norm / self.steps,
            "clipped": None if math.isnan(clipped) else clipped / self.steps,
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory": hardware.peak_memory(self.env.device),
        }
        self._reset()
        return readings


def evaluate(model, dataset, pipeline, env, normalization, batch_size=256, workers=0):
    """compute_metrics over the dataset; each image is seen exactly once, on one of the ranks."""
    model.eval()
    logits = predict(
        model, len(dataset.classes), dataset, pipeline, env, normalization, batch_size, workers
    )
    return compute_metrics(logits, dataset.labels, dataset.classes)


@torch.inference_mode()
def predict(forward, width, dataset, pipeline, env, normalization, batch_size=256, workers=0):
    """forward(image) of every image, in order, on every rank: (N, width) float32, in host memory.

    forward: (B,3,H,W) -> (B, width), of a network in eval mode. One of the ranks sees each image.
    """
    batches = loading.Batches(dataset, pipeline, batch_size, 0, "sequential", env.rank, env.ranks)
    outputs = torch.zeros(len(dataset), width)
    for step, (images, _, _) in enumerate(loading.loader(batches, 0, len(batches), workers)):
        if len(images):
            with env.autocast():
                output = forward(to_input(images, normalization, env.device))
            batch = slice(step * batch_size + env.rank, (step + 1) * batch_size, env.ranks)
            outputs[batch] = output.float().cpu()
    if env.ranks > 1:
        dist.all_reduce(outputs)  # every row is zero but on one rank
    return outputs


def largest_batch(model, image_size, limit, env):
    """The largest power of two of images, up to `limit`, whose training step fits on every rank.

    Found by doing it: on CUDA until memory runs out, else until twice as many would take more than
    four fifths of what is available. A tenth is left free, and room for the momentum.
    """
    momentum = [torch.empty_like(p).zero_() for p in model.parameters()]
    fits, batch = 1, 1
    while batch <= limit and _step_fits(model, image_size, batch, env):
        fits, batch = batch, 2 * batch
    del momentum
    model.zero_grad(set_to_none=True)
    if env.ranks > 1:
        least = torch.tensor([fits])
        dist.all_reduce(least, dist.ReduceOp.MIN)
        fits = int(least)
    return fits


def _step_fits(model, image_size, batch, env):
    """Whether forward and backward of so many images leave a fifth of the memory free."""
    images = torch.zeros(batch, 3, image_size, image_size, device=env.device)
    free = hardware.free_memory(env.device) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    hardware.reset_peak_memory(env.device)
    before = hardware.peak_memory(env.device)
    try:
        with env.autocast():
            logits = model(images)
        logits.float().sum().backward()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return hardware.peak_memory(env.device) - before < 0.8 * free


# Options that shape a dataset: given to load_dataset where it takes them. The datasets' own
# `options` say in the result file what was used.
DATA_OPTIONS = ("views", "split_by", "labels", "single_label", "cache_dir", "download")


def check_data_options(names, args):
    """Raises ValueError for an option that none of these datasets takes."""
    takes = {option for name in names for option in data.dataset_options(name)}
    for option in ("views", "split_by", "labels"):
        if getattr(args, option) is not None and option not in takes:
            raise ValueError(
                f"--{option.replace('_', '-')} means nothing for {', '.join(names)}; leave it out"
            )


def load_splits(name, args, env, **options):
    """(training set, test set) of a dataset; the main rank alone downloads, before the others.

    options: of load_dataset, beside those that args and the dataset have in common.
    """
    for option in set(DATA_OPTIONS) & set(data.dataset_options(name)):
        if getattr(args, option):
            options[option] = getattr(args, option)
    if options.get("download") and env.ranks > 1:
        if env.main:
            data.load_dataset(name, args.data_dir, "train", **options)
            data.load_dataset(name, args.data_dir, "test", **options)
        dist.barrier()
    return [data.load_dataset(name, args.data_dir, part, **options) for part in ("train", "test")]


@contextlib.contextmanager
def progress_bar(env, total, start=0, title="", unit="step"):
    """A tqdm bar on a terminal; None elsewhere, on the other ranks, and with TQDM_DISABLE set."""
    if not (env.main and sys.stderr.isatty()) or os.environ.get("TQDM_DISABLE"):
        yield None
        return
    with tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True) as bar:
        yield bar
