"""What every training script shares: processes, optimiser, training and evaluation, files.

Under torchrun each process runs the same script; without it, one process does all of it.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import data
import loading
import models
from console import EXIT_STOPPED, complain, one_of, positive, write_atomically

PRECISIONS = ("auto", "fp32", "bf16")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_common_options(parser, out):
    """The options that mean the same in every training script."""
    add = parser.add_argument
    add("--data-dir", default="datasets", help="directory that holds the real datasets")
    add("--cache-dir", help="directory for the index of large datasets (default: beside them)")
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
    add(
        "--batch-size",
        type=positive(int),
        help="images a step, over all processes (default: recipe)",
    )
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


def run(main):
    """Calls main() and exits with its status; bad input becomes one line and status 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is said
    try:
        status = main()
    except (ValueError, OSError) as error:
        status = complain(error)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = EXIT_STOPPED
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


@functools.lru_cache
def environment(env):
    """What a result says of where it was made."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
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
    """The run was asked to stop; its state is saved."""


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the current step; a second SIGINT kills."""

    def __init__(self, env):
        self.env, self.name, self.pending = env, None, None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """True on all ranks at the same step, once any of them was asked.

        The ranks' answers are added up while the next step runs, and read after it.
        """
        if self.env.ranks == 1:
            return self.name is not None
        flag, work = self.pending or (torch.zeros(1), None)
        if work:
            work.wait()
        asked = torch.tensor([float(self.name is not None)])
        self.pending = None if flag > 0 else (asked, dist.all_reduce(asked, async_op=True))
        return bool(flag > 0)


# ------------------------------------------------------------------------------------------------
# Optimiser
# ------------------------------------------------------------------------------------------------


class SGD_AGC(torch.optim.SGD):
    """SGD with adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171, section 4.1).

    The gradient G of a unit with weights W is scaled to norm clipping * max(|W|, eps) when it is
    longer. A unit is an output filter, or a whole vector. Groups with clipping=None are not
    clipped. Nothing here waits for the device.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.9,
        weight_decay=0.0,
        nesterov=True,
        clipping=0.01,
        eps=1e-3,
    ):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, **settings)
        self.defaults.update(clipping=clipping, eps=eps)
        for group in self.param_groups:
            group.setdefault("clipping", clipping)
            group.setdefault("eps", eps)
        self._choose_kernels()

    def _choose_kernels(self):
        for group in self.param_groups:
            on_cpu = all(p.device.type == "cpu" for p in group["params"])
            group.update(fused=on_cpu, foreach=not on_cpu)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._choose_kernels()
        # The fused kernel reads memory in order: the momentum takes its parameter's memory format.
        for p, state in self.state.items():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["clipping"] is not None and params:
                clip_units(params, group["clipping"], group["eps"])
        super().step()
        return loss


def clip_units(params, clipping, eps):
    """Scales the gradients of these parameters in place, unit by unit."""
    grads = [p.grad for p in params]
    bounds = _unit_norms(params).clamp_(min=eps).mul_(clipping)
    # At most 1, and exactly 1 where nothing is clipped.
    scales = bounds.div_(_unit_norms(grads).clamp_(min=1e-30)).clamp_(max=1)
    units = [len(p) if p.ndim > 1 else 1 for p in params]
    shapes = [(-1,) + (1,) * (p.ndim - 1) for p in params]
    scales = [scale.view(shape) for scale, shape in zip(scales.split(units), shapes)]
    torch._foreach_mul_(grads, scales)


def _unit_norms(tensors):
    """The norms of all units of all tensors, one vector."""
    norms = [
        torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)) if t.ndim > 1 else None).view(-1)
        for t in tensors
    ]
    return torch.cat(norms)


def make_optimizer(model, lr, weight_decay=0.0, clipping=None, nesterov=True):
    """SGD, momentum 0.9, with AGC if clipping is a number; the head is never clipped."""
    head = list(model.head.conv.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": body}, {"params": head, "clipping": None}]
    return SGD_AGC(groups, lr, weight_decay=weight_decay, nesterov=nesterov, clipping=clipping)


# ------------------------------------------------------------------------------------------------
# Loss and metrics
# ------------------------------------------------------------------------------------------------


def loss_sum(logits, labels, task):
    """Sum over valid labels, in fp32: cross-entropy for labels (N,) int64; binary cross-entropy
    over what is not NaN for labels (N,C). Divide by the count of valid labels for the mean.
    """
    logits = logits.float()
    if task == "multiclass":
        return F.cross_entropy(logits, labels, reduction="sum")
    valid = ~labels.isnan()
    targets = torch.where(valid, labels, 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(valid, losses, 0).sum()


def roc_auc(scores, targets):
    """Area under the ROC curve: the chance that a positive outscores a negative, ties half.

    scores: (N,) numbers. targets: (N,) in {0,1}. nan when one class is absent.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) == 1
    positives, negatives = int(targets.sum()), int((~targets).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # tied scores share their mean rank
    return float((ranks[targets].sum() / positives - (positives + 1) / 2) / negatives)


def average_precision(scores, targets):
    """Sum over thresholds of (recall gained) * precision, tied scores entering together.

    scores: (N,) numbers. targets: (N,) in {0,1}. nan when one class is absent.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) == 1
    if targets.all() or not targets.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, targets = scores[order], targets[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    hits = np.cumsum(targets)[last]
    precision, gained = hits / (last + 1), np.diff(hits, prepend=0) / hits[-1]
    return float((precision * gained).sum())


def compute_metrics(logits, labels, classes):
    """Metrics of a whole test set as fractions; what is undefined is None.

    logits: (N,C). labels: (N,) int64 for multi-class, (N,C) in {0,1,nan} for multi-label.
    accuracy: share of right answers (multi-label: of right yes/no answers over all valid labels,
    at probability 0.5). mean_auc, mean_ap: means over the classes for which they are defined, one
    against the rest. loss: mean over valid labels. Raises ValueError for non-finite logits.
    """
    logits = torch.as_tensor(logits).double()
    labels = torch.as_tensor(np.array(labels))  # a copy: those of a pack cannot be written
    if not logits.isfinite().all():
        raise ValueError("the network's outputs are not finite; a smaller --lr may mend it")
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    top5 = None
    if task == "multiclass":
        scores = logits.softmax(1).numpy()
        targets = F.one_hot(labels, len(classes)).double()
        predicted = F.one_hot(logits.argmax(1), len(classes)).numpy() == 1
        accuracy = float((logits.argmax(1) == labels).double().mean())
        if len(classes) > 5:
            top5 = float((logits.topk(5).indices == labels[:, None]).any(1).double().mean())
    else:
        scores, targets, predicted = logits.numpy(), labels.double(), (logits > 0).numpy()
        valid = ~labels.isnan().numpy()
        accuracy = float((predicted == (targets.numpy() == 1))[valid].mean())
    targets = targets.numpy()
    per_class = {
        name: _class_metrics(scores[:, c], predicted[:, c], targets[:, c])
        for c, name in enumerate(classes)
    }
    count = int((~labels.isnan()).sum()) if task == "multilabel" else len(labels)
    return {
        "accuracy": accuracy,
        "top5": top5,
        "mean_auc": _mean([m["auc"] for m in per_class.values()]),
        "mean_ap": _mean([m["ap"] for m in per_class.values()]),
        "loss": float(loss_sum(logits, labels, task)) / count,
        "per_class": per_class,
    }


def _class_metrics(scores, predicted, targets):
    valid = ~np.isnan(targets)
    scores, predicted, truth = scores[valid], predicted[valid], targets[valid] == 1
    hits, claims, positives = (predicted & truth).sum(), predicted.sum(), truth.sum()
    auc, ap = roc_auc(scores, truth), average_precision(scores, truth)
    return {
        "auc": None if math.isnan(auc) else auc,
        "ap": None if math.isnan(ap) else ap,
        "f1": float(2 * hits / (claims + positives)) if claims + positives else None,
        "positives": int(positives),
        "negatives": int(len(truth) - positives),
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


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
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def summary(self, images):
        """What a result file says of a training on so many images."""
        speed = self.step * self.config["batch_size"] / self.seconds
        return {
            "images": images,
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": speed,
        }

    def save(self, env):
        """Writes the checkpoint, on the main rank."""
        if self.path and env.main:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"step": self.step, "seconds": self.seconds, "config": self.config}
            save_tensors(self.path, state)


def train(
    run,
    forward,
    batches,
    learning_rate,
    stop,
    env,
    normalization,
    *,
    mixup=0.0,
    workers=0,
    signals=None,
    save_minutes=10.0,
    log=None,
    log_every=50,
    progress=None,
):
    """Trains from run.step to before step `stop`.

    forward: what `parallel` returned. batches: loading.Batches of this rank. learning_rate: step ->
    float. log(step, loss, lr, images_per_second): called on every rank every log_every steps, with
    the mean loss since the last call. The run is saved every save_minutes, and before Stopped is
    raised. Raises ValueError when the loss is no longer finite.
    """
    forward.train()
    meter, saved, clock = Meter(env, batches.batch_size), time.monotonic(), time.monotonic()
    loader = loading.loader(batches, run.step, stop, workers, env.device.type == "cuda")
    for step, (images, labels, count) in zip(range(run.step, stop), loader):
        lr = learning_rate(step)
        share = mixup_lambda(mixup, batches.seed, step) if mixup else None
        images = to_input(images, normalization, env.device)
        labels = labels.to(env.device, non_blocking=True)
        loss = train_step(
            forward, run.optimizer, images, labels, count, lr, batches.dataset.task, env, share
        )
        meter.add(loss, count)
        now = time.monotonic()
        run.step, run.seconds, clock = step + 1, run.seconds + now - clock, now
        if progress is not None:
            progress.update()
        if log and (run.step % log_every == 0 or run.step == stop):
            log(run.step, *meter.read(step, lr))
        if signals and signals.agreed():
            run.save(env)
            if env.ranks > 1:
                dist.barrier()  # torchrun kills the others soon after the first one leaves
            raise Stopped(f"stopped by {signals.name or 'another rank'} after step {run.step}")
        if now - saved > 60 * save_minutes and math.isfinite(loss):
            run.save(env)
            saved = time.monotonic()
    if not log:
        meter.read(stop - 1, lr=learning_rate(stop - 1))  # refuses a loss that is not finite


def train_step(forward, optimizer, images, labels, count, lr, task, env, share=None):
    """One step; returns this rank's sum of the losses. count: valid labels of the global batch.

    share: MixUp's coefficient; neighbours in the batch are mixed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if share is None:
        with env.autocast():
            logits = forward(images)
        loss = loss_sum(logits, labels, task)
    else:
        partner = torch.arange(len(images), device=env.device).bitwise_xor(1)
        partner = partner.clamp(max=len(images) - 1)
        with env.autocast():
            logits = forward(share * images + (1 - share) * images[partner])
        loss = share * loss_sum(logits, labels, task)
        loss = loss + (1 - share) * loss_sum(logits, labels[partner], task)
    optimizer.zero_grad(set_to_none=True)
    # DDP averages over ranks; the mean over the global batch is a sum over ranks.
    (loss * (env.ranks / max(count, 1))).backward()
    optimizer.step()
    return loss.detach()


class Meter:
    """Mean loss over all ranks and speed, since the last reading."""

    def __init__(self, env, batch_size):
        self.env, self.batch_size = env, batch_size
        self._reset()

    def _reset(self):
        self.loss, self.count, self.steps = 0.0, 0, 0
        self.since = time.monotonic()

    def add(self, loss, count):
        self.loss, self.count, self.steps = self.loss + loss, self.count + count, self.steps + 1

    def read(self, step, lr):
        """(mean loss, lr, images a second); waits for the device."""
        if self.env.ranks > 1:
            dist.all_reduce(self.loss)
        loss = float(self.loss) / max(self.count, 1)
        speed = self.steps * self.batch_size / (time.monotonic() - self.since)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}, learning rate {lr:g}; lower --lr")
        self._reset()
        return loss, lr, speed


@torch.inference_mode()
def evaluate(model, dataset, pipeline, env, normalization, batch_size=256, workers=0):
    """compute_metrics over the dataset; each image is seen exactly once, on one of the ranks."""
    model.eval()
    batches = loading.Batches(dataset, pipeline, batch_size, 0, "sequential", env.rank, env.ranks)
    logits = torch.zeros(len(dataset), len(dataset.classes))
    for step, (images, _, _) in enumerate(loading.loader(batches, 0, len(batches), workers)):
        if len(images):
            with env.autocast():
                outputs = model(to_input(images, normalization, env.device))
            batch = slice(step * batch_size + env.rank, (step + 1) * batch_size, env.ranks)
            logits[batch] = outputs.float().cpu()
    if env.ranks > 1:
        dist.all_reduce(logits)  # every row is zero but on one rank
    return compute_metrics(logits, dataset.labels, dataset.classes)


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


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def save_tensors(path, state):
    """torch.save, atomically. Equal states give equal files: none names its temporary path."""

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)

    write_atomically(path, write)


def load_checkpoint(path, config):
    """The state of an interrupted run, or None if there is none.

    Raises ValueError when it was made with another config.
    """
    if path is None or not Path(path).exists():
        return None
    state = models.read_weights(path)
    check_same_config(path, state["config"], config)
    return state


def same_step(step, env):
    """Raises ValueError on all ranks unless they all continue after the same step."""
    if env.ranks > 1:
        steps = [None] * env.ranks
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the ranks would continue after steps {steps}: share --out")


# What may differ between a run and its continuation, because it changes no result.
LAYOUT_OPTIONS = {
    "cache_dir",
    "checkpoint",
    "checkpoint_activations",
    "data_dir",
    "download",
    "log_every",
    "out",
    "save_minutes",
    "workers",
}


def check_same_config(path, theirs, ours):
    """Raises ValueError naming the first option that differs between two runs."""
    theirs, ours = json.loads(json.dumps([theirs, ours]))  # tuples become lists, as in the file
    for key in sorted((theirs.keys() | ours.keys()) - LAYOUT_OPTIONS):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"{path} was made with {key} = {theirs.get(key)}, not {ours.get(key)}; "
                "use the same options, give another --out, or remove it"
            )


def say(env, text):
    """Prints a line, on the main rank only."""
    if env.main:
        tqdm.write(text)


class Log:
    """log.jsonl (if path is given), and for the eye: the bar on a terminal, else plain lines."""

    def __init__(self, env, path, start, last, bar, title):
        self.env, self.path, self.bar, self.title = env, path, bar, title
        self.start, self.last, self.began = start, last, time.monotonic()

    def __call__(self, step, loss, lr, speed):
        """What `train` calls: mean loss, learning rate, images a second over all ranks."""
        self._append({"step": step, "loss": loss, "lr": lr, "images_per_second": speed})
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.4g}, {speed:.0f} images/s")
            return
        pace = (time.monotonic() - self.began) / max(step - self.start, 1)
        left = tqdm.format_interval(pace * (self.last - step))
        text = f"loss {loss:.4f}  lr {lr:.4g}  {speed:.0f} images/s  {left} left"
        say(self.env, f"{self.title}  step {step}/{self.last}  {text}")

    def evaluation(self, step, metrics):
        """A line of test metrics."""
        shown = {k: v for k, v in metrics.items() if k != "per_class" and v is not None}
        self._append({"step": step, "test": shown})
        say(
            self.env,
            f"{self.title}  step {step}  test  "
            + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()),
        )

    def _append(self, record):
        if self.env.main and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


def trim_log(env, path, step):
    """Drops the lines after `step`, which a continued run will write again."""
    if env.main and path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # The last epoch's evaluation is made again.
        records = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [line for line, r in records if r["step"] < step + ("loss" in r)]
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def read_result(path, kind, config=None):
    """A finished result of this kind, or None if there is none yet.

    Raises ValueError for a file that is broken or of another kind or, with config, made otherwise.
    """
    if not Path(path).exists():
        return None
    try:
        record = json.loads(Path(path).read_text())
        found = record["kind"], record["schema"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a result file; remove it, or give another --out") from error
    if found != (kind, 1):
        raise ValueError(f"{path}: a result of kind and schema {found}, not {(kind, 1)}")
    if config is not None:
        check_same_config(path, record["config"], config)
    return record
