"""Speed beside peers: the same work by this project and by the library that one would else take.

    python -m benchmarks train           # one training step: ours and timm's, eager and compiled
    python -m benchmarks train --peers   # the same from files to the loss, with timm's own loader
    python -m benchmarks memory          # the peak of one step of R152x4, plain and checkpointed
    python -m benchmarks scaling         # two processes of one thread beside one: pre-training
    python -m benchmarks grid            # the same: the cells of a few-shot grid
    python -m benchmarks load            # from files to batches: decoding, packs, folders
    python -m benchmarks index           # the index of a dataset: mimic's tables, 14 million paths
    python -m benchmarks linear          # logistic regression on frozen features
    python -m benchmarks distance        # distances of targets at known gaps, and what they cost

All arms of a benchmark take turns in one process, so that noise of the machine meets all alike.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
from benchmarks import data_speed as bench_data
from benchmarks import distance_cost as bench_distance
from benchmarks import linear_speed as bench_linear
from benchmarks.measure import Report, apart, best_speeds, import_peer, speed_report
from engine import console
from engine import memory as hardware
from engine import processes as engine
from engine.optimizer import make_optimizer
from readers import cache as loading
from readers import synthetic, transforms
from readers.images import Array, ImageDataset

# ------------------------------------------------------------------------------------------------
# train: a training step, ours and timm's
# ------------------------------------------------------------------------------------------------

NUM_CLASSES = 10
# ImageNet-1k's recipe of R50x1: SGD with Nesterov momentum, no AGC; 0.1 at a batch of 256.
LR, WEIGHT_DECAY, CLIPPING = 0.1 / 256, 1e-4, None
DEFAULTS, PEER = "ours, defaults", "timm, eager, fp32"
REQUIRED = ((DEFAULTS, PEER, 1.15), ("ours", "timm", 1.0))


def train_options(parser):
    add = parser.add_argument
    add("--model", default="R50x1", help=f"network: {', '.join(models.MODELS)}")
    add("--image-size", type=console.positive(int), default=64, help="side in pixels")
    add("--batch-size", type=console.positive(int), default=32, help="images a step")
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")
    add("--steps", type=console.positive(int), default=4, help="training steps a turn")
    add("--no-compile", action="store_true", help="leave out the compiled arms, minutes each")
    add("--peers", action="store_true", help="from the files of a folder to the loss, with each "
        "package's own loader")  # fmt: skip
    add("--folder", metavar="PATH", help="of --peers: train/CLASS/* (default: 640 JPEGs of 32 "
        "pixels are made)")  # fmt: skip
    add("--threads", type=console.positive(int), default=torch.get_num_threads(),
        help="threads of the CPU (default here: PyTorch's)")  # fmt: skip


def train(args, env):
    """Images a second of a whole training step: forward, cross-entropy, backward, SGD.

    Ours "defaults" is engine.train with its loader and augmentation on images in memory. All other
    arms repeat one batch that lies on the device. All have the same optimiser and memory format,
    so that the ratios are of networks and settings. With --peers: see `peers`.
    """
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.peers:
        with tempfile.TemporaryDirectory() as made:
            folder = args.folder or bench_data.make_photos(Path(made), 32, 10, 64)
            return peers(args, env, folder)
    networks = {"ours": models.create_model(args.model, NUM_CLASSES), "timm": _timm_network(args)}
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randn(shape, device=env.device)
    images = images.contiguous(memory_format=models.memory_format(env.device))
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=env.device)
    arms = {}
    for package, network in networks.items():
        network = models.place(network, env.device).train()
        optimizer = engine.SGD_AGC(
            network.parameters(), LR * args.batch_size, weight_decay=WEIGHT_DECAY, clipping=CLIPPING
        )
        for mode in ("eager",) if args.no_compile else ("eager", "compiled"):
            for precision in ("fp32", "bf16"):
                arms[f"{package}, {mode}, {precision}"] = functools.partial(
                    _repeat_batch, engine.parallel(network, env, mode == "compiled"), optimizer,
                    images, labels, env._replace(precision=precision),
                )  # fmt: skip
    arms[DEFAULTS] = _our_loop(args, env)
    for name, run in arms.items():
        console.say(env, f"warming up: {name}")
        run(2)  # compiles, and lets cuDNN choose its kernels
    speeds = best_speeds(arms, args.rounds, args.steps, args.batch_size, env)
    return speed_report(speeds, PEER, REQUIRED)


def _timm_network(args):
    """timm's network of the same architecture, with random weights."""
    timm = import_peer("timm")
    name = f"resnetv2_{args.model.removeprefix('R')}_bit"
    if args.model not in models.MODELS or not timm.is_model(name):
        raise ValueError(f"--model {args.model}: timm has no {name}; BiT's sizes are in both")
    return timm.create_model(name, num_classes=NUM_CLASSES)


def _repeat_batch(forward, optimizer, images, labels, env, steps):
    for _ in range(steps):
        _step(forward, optimizer, images, labels, env)


def _step(forward, optimizer, images, labels, env):
    with env.autocast():
        logits = forward(images)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _our_loop(args, env, dataset=None, precision=None, compiled=False):
    """engine.train as the scripts call it, on random images in memory or on a dataset of files."""
    dataset = dataset or _random_images(args)
    pipeline = transforms.pretraining_pipeline("natural", args.image_size, train=True)
    dataset, pipeline = loading.preload(dataset, pipeline)
    batches = loading.Batches(dataset, pipeline, args.batch_size)
    model = models.place(models.create_model(args.model, len(dataset.classes)), env.device)
    lr = LR * args.batch_size
    optimizer = make_optimizer(model, lr, WEIGHT_DECAY, CLIPPING)
    env = env._replace(precision=precision or env.precision)
    forward = engine.parallel(model, env, compiled)
    training = engine.Run(None, model, optimizer, {})

    def run(steps):
        stop = training.step + steps
        engine.train(
            training, forward, batches, loading.loader(batches, training.step, stop),
            lambda step: lr, stop, env, transforms.NORMALIZATION["natural"],
        )  # fmt: skip

    return run


def _random_images(args):
    rng = np.random.default_rng(0)
    count = 16 * args.batch_size
    pixels = rng.integers(0, 256, (count, args.image_size, args.image_size, 3), np.uint8)
    labels = rng.integers(NUM_CLASSES, size=count)
    classes = [str(c) for c in range(NUM_CLASSES)]
    reader = Array("memory", pixels)
    return ImageDataset("memory", reader, labels, classes, "multiclass", "natural")


PEERS_REQUIRED = (("ours, defaults", "timm, defaults", 1.4), ("ours", "timm", 1.15))


def peers(args, env, folder):
    """Images a second from files to the loss and the update, each package with its own loader.

    "ours, defaults": what pretrain.py does without options (images held in memory, bf16 where the
    hardware has it). "timm, defaults": what its training script does (fp32, a worker a core,
    RandomResizedCrop, flip and colour jitter); its other arms are its options for speed.
    """
    dataset = data.load_dataset(f"folder:{folder}")
    arms = {"ours, defaults": _our_loop(args, env, dataset)}
    for precision, compiled in itertools.product(("fp32", "bf16"), (False, True)):
        if not (compiled and args.no_compile):
            name = f"ours, {precision}" + ", compiled" * compiled
            arms[name] = _our_loop(args, env, dataset, precision, compiled)
    arms["timm, defaults"] = _timm_loop(args, env, folder, "fp32")
    arms["timm, bf16"] = _timm_loop(args, env, folder, "bf16")
    arms["timm, bf16, channels_last"] = _timm_loop(args, env, folder, "bf16", True)
    if not args.no_compile:
        arms["timm, bf16, compiled"] = _timm_loop(args, env, folder, "bf16", False, True)
        arms["timm, bf16, channels_last, compiled"] = _timm_loop(
            args, env, folder, "bf16", True, True
        )
    for name, run in arms.items():
        console.say(env, f"warming up: {name}")
        run(3)
    speeds = best_speeds(arms, args.rounds, args.steps, args.batch_size, env)
    return speed_report(speeds, "timm, defaults", PEERS_REQUIRED)


def _timm_loop(args, env, folder, precision, channels_last=False, compiled=False):
    """timm's network, loader and optimiser, in the steps of its training script."""
    optim, timm_data = import_peer("timm.optim"), import_peer("timm.data")
    network = _timm_network(args).to(env.device).train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = optim.create_optimizer_v2(
        network, "sgd", lr=LR * args.batch_size, momentum=0.9, weight_decay=WEIGHT_DECAY
    )
    loader = timm_data.create_loader(
        timm_data.ImageDataset(str(Path(folder) / "train")), (3, args.image_size, args.image_size),
        args.batch_size, is_training=True, use_prefetcher=False, color_jitter=0.4,
        num_workers=hardware.available_cores(), persistent_workers=True,
    )  # fmt: skip
    forward = torch.compile(network) if compiled else network
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps):
        for images, labels in itertools.islice(batches, steps):
            images, labels = images.to(env.device), labels.to(env.device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            _step(forward, optimizer, images, labels, env._replace(precision=precision))

    return run


# ------------------------------------------------------------------------------------------------
# memory: the peak of one training step
# ------------------------------------------------------------------------------------------------

GIBIBYTES = 20.0  # that the leanest arm may take


def memory_options(parser):
    add = parser.add_argument
    add("--model", default="R152x4", help=f"network: {', '.join(models.MODELS)}")
    add("--image-size", type=console.positive(int), default=224, help="side in pixels")
    add("--batch-size", type=console.positive(int), default=1, help="images of the step")
    add("--classes", type=console.positive(int), default=21_841, help="outputs of the network")


def memory(args, env):
    """Peak memory of a process that makes the network and trains it for two steps, with AGC.

    Plain and with activations computed again in the backward pass, in fp32 and under bf16.
    """
    values = {}
    for checkpointed, precision in itertools.product((False, True), ("fp32", "bf16")):
        name = f"{'checkpointed' if checkpointed else 'plain'}, {precision}"
        console.say(env, f"measuring: {name}")
        values[name] = apart(_peak, vars(args), checkpointed, precision)
    rows = [
        [name, f"{v['bytes'] / 2**30:.2f}", f"{v['seconds']:.1f}"] for name, v in values.items()
    ]
    leanest = min(values, key=lambda name: values[name]["bytes"])
    ratio = GIBIBYTES * 2**30 / values[leanest]["bytes"]
    required = [(f"{GIBIBYTES:g} GiB", leanest, ratio, 1.0)]
    return Report({"measured": values}, ["arm", "GiB", "seconds a step"], rows, required)


def _peak(options, checkpointed, precision):
    env = engine.setup(precision)
    model = models.create_model(options["model"], options["classes"], checkpointed)
    model = models.place(model, env.device).train()
    optimizer = make_optimizer(model, 0.01, WEIGHT_DECAY, 0.01)
    size = options["batch_size"], 3, options["image_size"], options["image_size"]
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for _ in range(2):  # the first makes the momentum
        began = time.perf_counter()
        loss = engine.train_step(
            model, optimizer, images, labels, len(images), 0.01, "multiclass", env,
            transforms.NORMALIZATION["natural"],
        )  # fmt: skip
        float(loss)
    seconds = time.perf_counter() - began
    return {"bytes": hardware.peak_memory(env.device), "seconds": seconds}


# ------------------------------------------------------------------------------------------------
# scaling: two processes of one thread beside one
# ------------------------------------------------------------------------------------------------


def scaling_options(parser):
    add = parser.add_argument
    add("--model", default="R50x1", help=f"network: {', '.join(models.MODELS)}")
    add("--image-size", type=console.positive(int), default=64, help="side in pixels")
    add("--batch-size", type=console.positive(int), default=32, help="images a step and process")
    add("--steps", type=console.positive(int), default=10, help="steps of a turn")
    add("--rounds", type=console.positive(int), default=3, help="turns an arm; the best counts")


def scaling(args, env):
    """Images a second of pretrain.py under torchrun with one process and with two, a thread each.

    Each process has the same batch, as each GPU has in the study. One process with the batch of
    two shows what of the rest is owed to larger batches.
    """
    arms = {
        "1 process": (1, args.batch_size),
        "2 processes": (2, 2 * args.batch_size),
        "twice the batch on 1 process": (1, 2 * args.batch_size),
    }
    speeds = dict.fromkeys(arms, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for turn, (name, arm) in itertools.product(range(args.rounds), arms.items()):
            speed = _pretrain_speed(args, *arm, Path(folder) / f"{turn} {name}")
            speeds[name] = max(speeds[name], speed)
    return speed_report(speeds, "1 process", (("2 processes", "1 process", 1.8),))


def _pretrain_speed(args, ranks, batch_size, out):
    """The fastest two steps of a short run, after the first two."""
    epochs = (args.steps + 2) * batch_size / synthetic.WORLDS["synthetic-natural"].train
    _torchrun(
        ranks, "pretrain.py", "--model", args.model, "--image-size", str(args.image_size),
        "--batch-size", str(batch_size), "--epochs", str(epochs), "--warmup", "0", "--log-every",
        "2", "--out", str(out),
    )  # fmt: skip
    (log,) = out.glob("*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return max(line["images_per_second"] for line in lines if line["step"] > 2 and "loss" in line)


def _torchrun(ranks, script, *options):
    """A script of this project on so many processes of one thread, without GPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={ranks}", str(Path(__file__).parent.parent / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *options], env=environment, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------
# grid: the cells of a few-shot grid on two processes beside one
# ------------------------------------------------------------------------------------------------


def grid_options(parser):
    add = parser.add_argument
    add("--seeds", type=console.positive(int), default=10, help="of six cells each")
    add("--rounds", type=console.positive(int), default=2, help="turns an arm; the best counts")


def grid(args, env):
    """Cells a second of fewshot.py under torchrun with one process and with two, a thread each:
    the whole command, from its start to its closing table.
    """
    speeds = {"1 process": 0.0, "2 processes": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for turn, (ranks, name) in itertools.product(range(args.rounds), enumerate(speeds, 1)):
            options = "--checkpoint", "scratch", "--seeds", str(args.seeds)
            out = Path(folder) / f"{turn}-{ranks}"
            began = time.perf_counter()
            _torchrun(ranks, "fewshot.py", *options, "--out", str(out))
            speed = len(list(out.glob("*/*/*.json"))) / (time.perf_counter() - began)
            speeds[name] = max(speeds[name], speed)
    required = (("2 processes", "1 process", 1.8),)
    return speed_report(speeds, "1 process", required, "cells/s")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

# name: (its options, what it measures: Report)
BENCHMARKS = {
    "train": (train_options, train),
    "memory": (memory_options, memory),
    "scaling": (scaling_options, scaling),
    "grid": (grid_options, grid),
    "load": (bench_data.load_options, bench_data.load),
    "index": (bench_data.index_options, bench_data.index),
    "linear": (bench_linear.linear_options, bench_linear.linear),
    "distance": (bench_distance.distance_options, bench_distance.measure_distance),
}


def main():
    parser = console.Parser(f"{__doc__}\nBENCHMARK --help states its options.")
    parser.add_argument("benchmark", nargs="?", type=console.one_of(*BENCHMARKS), default="train",
        help=", ".join(BENCHMARKS))  # fmt: skip
    name = parser.parse_args(sys.argv[1:2]).benchmark
    add_options, measure = BENCHMARKS[name]
    parser = console.Parser(measure.__doc__)
    parser.prog += f" {name}"
    add_options(parser)
    parser.add_argument("--json", metavar="PATH", help="also write the result there (default: no)")
    args = parser.parse_args(sys.argv[2:])
    env = engine.setup()
    report = measure(args, env)
    console.print_table(report.rows, report.header)
    required = []
    for what, peer, ratio, least in report.required:
        reached = ratio >= least
        required.append({"of": what, "to": peer, "ratio": ratio, "least": least})
        verdict = "reached" if reached else "MISSED"
        print(f"{what} / {peer}: {ratio:.2f}, required {least:.2f}: {verdict}")
        required[-1]["reached"] = reached
    if args.json:
        record = {"schema": 1, "kind": f"bench-{name}", **report.values, "required": required}
        record |= {"config": vars(args), "environment": engine.environment(env)}
        console.write_json(args.json, record)
    return 0 if all(r["reached"] for r in required) else 1


if __name__ == "__main__":
    engine.run(main)
