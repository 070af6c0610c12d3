"""A training step beside timm's, of a batch in memory or from files; how benchmarks measure."""

import itertools
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import models
import pretrain
from engine.console import progress_bar, say
from engine.evaluate import to_input
from engine.log import Log
from engine.metrics import loss_sum
from engine.optimizer import SGD_AGC, set_learning_rate
from engine.processes import parallel, parts
from readers import synthetic
from readers.cache import preload
from readers.transforms import NORMALIZATION
from readers.workers import available_cores, loader

RECIPE = pretrain.RECIPES["paper"]["natural", "small"]  # of R50x1 on ImageNet-1k: without AGC
# An arm is a package and its options. timm's are those of its training script: --amp (bf16),
# --opt-kwargs fused=True, --channels-last, --fast-norm and --torchcompile; by default none.
ARMS = """ours, defaults | ours, fp32 | ours, fp32, compiled | ours, bf16 | ours, bf16, compiled |
    timm, defaults | timm, fp32, fused | timm, bf16 | timm, bf16, fused |
    timm, bf16, channels_last | timm, bf16, compiled | timm, bf16, channels_last, compiled |
    timm, bf16, channels_last, compiled, fused"""
REQUIRED = (("ours, defaults", "timm, defaults", 1.5), ("ours", "timm", 1.1))
PEERS_REQUIRED = (("ours, defaults", "timm, defaults", 1.4), ("ours", "timm", 1.15))


def train(args, env):
    """Images a second of a whole training step: forward, cross-entropy, backward, SGD.

    "ours, defaults": what pretrain.py does without options (images held in memory, augmented; bf16
    where the hardware has it). All other arms repeat one batch that lies on the device, with each
    package's own optimiser.

    With --peers each package has its own loader too. "timm, defaults": what its training script
    does (fp32, a worker a core, RandomResizedCrop, flip and colour jitter; on CUDA its prefetcher).
    """
    torch.set_num_threads(args.threads)
    arms, required = {}, PEERS_REQUIRED if args.peers else REQUIRED
    with tempfile.TemporaryDirectory() as made:
        side = 32 if args.peers else args.image_size
        folder = args.folder or make_images(Path(made), side, classes=10, count=64)
        dataset = data.load_dataset(f"folder:{folder}")
        for name in map(str.strip, ARMS.split("|")):
            if not ("compiled" in name and args.no_compile):
                files = dataset if args.peers or name == "ours, defaults" else None
                arms[name] = training(name, args, env, len(dataset.classes), files)
        for name, arm in arms.items():
            say(env, f"warming up: {name}")
            for _ in range(3):  # compiles, and lets cuDNN choose its kernels
                next(arm)
        speeds = best_speeds(arms, args.rounds, args.steps, args.batch_size, env)
    return speed_report(speeds, "timm, defaults", required)


def training(name, args, env, classes, dataset=None, clipping=None):
    """Iterator of training steps of an arm: ours as pretrain.py trains, timm's as its script does.

    args: model, image_size, batch_size. dataset: what the package's own loader reads (default: one
    batch that lies on the device). clipping: of ours, for AGC.
    """
    package, *options = name.split(", ")
    for precision in {"fp32", "bf16"}.intersection(options):
        env = env._replace(precision=precision)
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randint(256, shape, dtype=torch.uint8, device=env.device)
    batch = images, torch.randint(classes, shape[:1], device=env.device)
    if package == "timm":
        env = env if "bf16" in options else env._replace(precision="fp32")
        return timm_training(args, options, env, classes, batch, dataset)
    network, optimizer = our_network(env, args.model, classes, clipping)
    stream = itertools.repeat((*batch, args.batch_size))
    if dataset:
        pipeline = pretrain.choose_pipeline(dataset, args.image_size, train=True)
        batches = data.Batches(*preload(dataset, pipeline), args.batch_size)
        stream = loader(batches, 0, sys.maxsize, None, env.device)
    if "contiguous" in options:
        network.to(memory_format=torch.contiguous_format)
    if "compiled" in options:
        network.compile_blocks()
    if "graphs" in options:
        network.compile(mode="reduce-overhead")
    return training_loop(network, optimizer, stream, args.batch_size, env)


def our_network(env, name="R14x0.5", classes=10, clipping=0.01):
    """(network of seed 0 on the device, its optimiser for training_loop, which sets the rate)."""
    torch.manual_seed(0)
    network = models.create_model(name, classes, device=env.device).train()
    settings = {"weight_decay": RECIPE.weight_decay, "clipping": clipping}
    return network, SGD_AGC(network.parameter_groups(), 0.0, **settings)


def training_loop(network, optimizer, stream, batch_size, env, accumulate=1):
    """The loop of pretrain.py without tests, checkpoints and signals: yields its Log each step.

    stream: (images uint8 (N,C,H,W), labels (N,), N).
    """
    network, lr = parallel(network, env), RECIPE.lr / 256 * batch_size
    with Log(env, 0, None, batch_size) as log:
        for step in itertools.count(1):
            batch, targets, count = log.next(stream)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for images, labels in parts(network, batch, targets, accumulate, env):
                with env.autocast():
                    logits = network(to_input(images, NORMALIZATION["natural"], env.device))
                part_loss = loss_sum(logits, labels, "multiclass")
                (part_loss * (env.ranks / max(count, 1))).backward()
                loss = loss + part_loss.detach()
            optimizer.step()
            log.add(step, lr, loss, count, optimizer)
            yield log


def timm_training(args, options, env, classes, batch, dataset):
    """Iterator of steps as in timm's training script: its network, optimiser and, for a dataset,
    its loader; on CUDA with pinned memory and its prefetcher, which normalises on its own stream.
    """
    import timm.data
    import timm.optim

    name, on_gpu = f"resnetv2_{args.model.removeprefix('R')}_bit", env.device.type == "cuda"
    if args.model not in models.MODELS or not timm.is_model(name):
        raise ValueError(f"--model {args.model}: timm has no {name}; BiT's sizes are in both")
    timm.layers.set_fast_norm("fast_norm" in options)
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    network = timm.create_model(name, num_classes=classes).to(env.device, memory_format=layout)
    settings = {"momentum": 0.9, "weight_decay": RECIPE.weight_decay}
    settings |= {"lr": RECIPE.lr / 256 * args.batch_size, "fused": "fused" in options or None}
    optimizer = timm.optim.create_optimizer_v2(network, "sgd", **settings)
    if {"compiled", "graphs"}.intersection(options):
        network.compile(mode="reduce-overhead" if "graphs" in options else None)
    epoch = [(batch[0] / 128 - 1, batch[1])]
    if dataset:
        files = timm.data.ImageDataset(f"{dataset.name.removeprefix('folder:')}/train")
        settings = {"is_training": True, "color_jitter": 0.4, "num_workers": available_cores()}
        settings |= {"use_prefetcher": on_gpu, "pin_memory": on_gpu, "device": env.device}
        size = 3, args.image_size, args.image_size
        epoch = timm.data.create_loader(files, size, args.batch_size, **settings)
    return timm_loop(network, optimizer, epoch, env, layout)


def timm_loop(network, optimizer, epoch, env, layout):
    """The loop of timm's training script; epoch: [(images float (N,3,H,W), labels (N,))]."""
    while True:
        for images, labels in epoch:
            images, labels = images.to(env.device, memory_format=layout), labels.to(env.device)
            with env.autocast():
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield


def best_speeds(arms, rounds, steps, images, env, clock=time.perf_counter):
    """{name: images a second} of arms {name: iterator}, each next() a step of `images` images.

    In each round every arm takes its turn of `steps` steps. The best round counts: other work on a
    machine only ever slows one down.
    """
    best = dict.fromkeys(arms, math.inf)
    with progress_bar(env, rounds * len(arms), title="turns", unit="turn") as bar:
        for _ in range(rounds):
            for name, arm in arms.items():
                best[name] = min(best[name], seconds(arm, steps, env.device, clock))
                bar.update()
    return {name: steps * images / spent for name, spent in best.items()}


def seconds(arm, steps, device, clock=time.perf_counter):
    """Of so many steps of an arm, and the work they queued."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = clock()
    for _ in range(steps):
        next(arm)
    synchronize()
    return clock() - began


def bound(of, to, ratio, least):
    """A line of a report: that `of` is at least `least` times `to`; ratio: what was found."""
    return {"of": of, "to": to, "ratio": ratio, "least": least, "reached": ratio >= least}


def speed_report(speeds, peer, required, unit="images/s"):
    """(rows of the table {column: value}, [bound]) of {arm: so many `unit`}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    rows = [{"arm": k, unit: v, f"ratio to {peer}": v / speeds[peer]} for k, v in speeds.items()]
    by_speed, bounds = sorted(speeds, key=speeds.get, reverse=True), []
    for *prefixes, least in required:
        over, under = (next(k for k in by_speed if k.startswith(prefix)) for prefix in prefixes)
        bounds.append(bound(over, under, speeds[over] / speeds[under], least))
    return rows, bounds


def make_images(root, side, world="synthetic-natural", suffix="jpg", classes=4, count=16):
    """A folder of images of a made world: train/CLASS/* and test/CLASS/*."""
    folder = root / f"images-{side}"
    for split, cls in itertools.product(data.SPLITS, range(classes)):
        (folder / split / str(cls)).mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            pixels = synthetic.render(world, split, cls * count + i, side).transpose(1, 2, 0)
            image = Image.fromarray(np.ascontiguousarray(pixels.squeeze()))
            image.save(folder / split / str(cls) / f"{i}.{suffix}", quality=90)
    return folder
