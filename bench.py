"""Speed beside peers: the same work by this project and by the library that one would else take.

    python bench.py train       # one training step: ours and timm's, eager and compiled

All arms of a benchmark take turns in one process, so that noise of the machine meets all alike.
"""

import functools
import importlib
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import console
import engine
import loading
import models
import transforms
from images import Array, ImageDataset

# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def best_speeds(arms, rounds, steps, images, env):
    """{name: images a second} of each arm's fastest round.

    arms: {name: callable(steps)}. In each round every arm takes its turn of `steps` steps of
    `images` images. The best round counts: other work on a machine only ever slows one down.
    """
    seconds = dict.fromkeys(arms, math.inf)
    with engine.progress_bar(env, rounds * len(arms), title="turns", unit="turn") as bar:
        for _ in range(rounds):
            for name, run in arms.items():
                _synchronize(env.device)
                began = time.perf_counter()
                run(steps)
                _synchronize(env.device)
                seconds[name] = min(seconds[name], time.perf_counter() - began)
                if bar is not None:
                    bar.update()
    return {name: steps * images / best for name, best in seconds.items()}


def _synchronize(device):
    """Waits for the work that was only queued, so that the clock tells when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def import_peer(name):
    """The peer's module. Raises ValueError with the mend when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is not installed; pip install {name}") from error


# ------------------------------------------------------------------------------------------------
# train: a training step, ours and timm's
# ------------------------------------------------------------------------------------------------

NUM_CLASSES = 10
# ImageNet-1k's recipe of R50x1: SGD with Nesterov momentum, no AGC; 0.1 at a batch of 256.
LR, WEIGHT_DECAY, CLIPPING = 0.1 / 256, 1e-4, None
DEFAULTS, PEER = "ours, defaults", "timm, eager, fp32"
# (numerator, denominator, least ratio): an arm, or the fastest of all arms of "ours" or "timm".
REQUIRED = ((DEFAULTS, PEER, 1.15), ("ours", "timm", 1.0))


def train_options(parser):
    add = parser.add_argument
    add("--model", default="R50x1", help=f"network: {', '.join(models.MODELS)}")
    add("--image-size", type=console.positive(int), default=64, help="side in pixels")
    add("--batch-size", type=console.positive(int), default=32, help="images a step")
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")
    add("--steps", type=console.positive(int), default=4, help="training steps a turn")
    add("--no-compile", action="store_true", help="leave out the compiled arms, minutes each")


def train(args, env):
    """Images a second of a whole training step: forward, cross-entropy, backward, SGD.

    Ours "defaults" is engine.train with its loader and augmentation on images in memory. All other
    arms repeat one batch that lies on the device. All have the same optimiser and memory format,
    so that the ratios are of networks and settings.
    """
    torch.manual_seed(0)
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
        engine.say(env, f"warming up: {name}")
        run(2)  # compiles, and lets cuDNN choose its kernels
    return best_speeds(arms, args.rounds, args.steps, args.batch_size, env)


def _timm_network(args):
    """timm's network of the same architecture, with random weights."""
    timm = import_peer("timm")
    name = f"resnetv2_{args.model.removeprefix('R')}_bit"
    if args.model not in models.MODELS or not timm.is_model(name):
        raise ValueError(f"--model {args.model}: timm has no {name}; BiT's sizes are in both")
    return timm.create_model(name, num_classes=NUM_CLASSES)


def _repeat_batch(forward, optimizer, images, labels, env, steps):
    for _ in range(steps):
        with env.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _our_loop(args, env):
    """engine.train as the scripts call it with no option, on random images held in memory."""
    rng = np.random.default_rng(0)
    count = 16 * args.batch_size
    pixels = rng.integers(0, 256, (count, args.image_size, args.image_size, 3), np.uint8)
    labels = rng.integers(NUM_CLASSES, size=count)
    classes = [str(c) for c in range(NUM_CLASSES)]
    reader = Array("memory", pixels)
    dataset = ImageDataset("memory", reader, labels, classes, "multiclass", "natural")
    pipeline = transforms.pretraining_pipeline("natural", args.image_size, train=True)
    batches = loading.Batches(dataset, pipeline, args.batch_size)
    model = models.place(models.create_model(args.model, NUM_CLASSES), env.device)
    lr = LR * args.batch_size
    optimizer = engine.make_optimizer(model, lr, WEIGHT_DECAY, CLIPPING)
    forward = engine.parallel(model, env)
    training = engine.Run(None, model, optimizer, {})

    def run(steps):
        engine.train(
            training, forward, batches, lambda step: lr, training.step + steps, env,
            transforms.NORMALIZATION["natural"],
        )  # fmt: skip

    return run


def train_report(speeds):
    """(rows of the table, verdicts): images a second, and the required ratios."""
    rows = [[name, f"{v:.1f}", f"{v / speeds[PEER]:.2f}"] for name, v in speeds.items()]
    verdicts = []
    for numerator, denominator, least in REQUIRED:
        (over, top), (under, bottom) = (_fastest(speeds, p) for p in (numerator, denominator))
        verdicts.append(
            {"ratio": top / bottom, "least": least, "of": over, "to": under}
            | {"reached": top / bottom >= least}
        )
    return ["arm", "images/s", "ratio to timm, eager, fp32"], rows, verdicts


def _fastest(speeds, prefix):
    """(name, images a second) of the fastest arm whose name begins so."""
    return max(
        ((name, speed) for name, speed in speeds.items() if name.startswith(prefix)),
        key=lambda arm: arm[1],
    )


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

# name: (its options, what it measures: {arm: speed}, its report)
BENCHMARKS = {"train": (train_options, train, train_report)}


def main():
    parser = console.Parser(f"{__doc__}\nbench.py BENCHMARK --help states the options of each.")
    parser.add_argument("benchmark", nargs="?", type=console.one_of(*BENCHMARKS), default="train",
        help=", ".join(BENCHMARKS))  # fmt: skip
    name = parser.parse_args(sys.argv[1:2]).benchmark
    add_options, measure, report = BENCHMARKS[name]
    parser = console.Parser(measure.__doc__)
    parser.prog += f" {name}"
    add_options(parser)
    parser.add_argument("--threads", type=console.positive(int), default=torch.get_num_threads(),
        help="threads of the CPU (default here: PyTorch's)")  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="also write the result there (default: no)")
    args = parser.parse_args(sys.argv[2:])
    torch.set_num_threads(args.threads)
    env = engine.setup()
    speeds = measure(args, env)
    header, rows, verdicts = report(speeds)
    console.print_table(rows, header)
    for v in verdicts:
        verdict = "reached" if v["reached"] else "MISSED"
        print(f"{v['of']} / {v['to']}: {v['ratio']:.2f}, required {v['least']:.2f}: {verdict}")
    if args.json:
        record = {"schema": 1, "kind": f"bench-{name}", "images_per_second": speeds}
        record |= {"required": verdicts, "config": vars(args)}
        console.write_json(args.json, record | {"environment": engine.environment(env)})
    return 0 if all(v["reached"] for v in verdicts) else 1


if __name__ == "__main__":
    engine.run(main)
