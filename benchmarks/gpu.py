"""What a GPU is worth here: first that it computes what a CPU does, then how fast.

Every arm is written to OUT/gpu.jsonl as it ends, so that a run that is cut short leaves what it
found. On a CPU everything runs in small: that tests this file, and measures nothing.
"""

import contextlib
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import data
import models
from benchmarks.loading import make_photos
from benchmarks.measure import Report, Required, repeat, seconds, synchronize
from benchmarks.train import our_network, our_training, timm_training, training_loop
from engine import memory
from engine.checkpoint import Run
from engine.console import one_line, say
from engine.processes import parallel
from pretrain import choose_pipeline
from readers.workers import available_cores, loader

# model, images a step, pixels, classes, how it is computed; the CPU takes the last.
SPEEDS = """
R50x1  256 224 1000  eager | contiguous | compiled | timm | timm, channels_last | timm, compiled
R50x1  32  224 1000  eager | compiled | timm | timm, channels_last
R152x4 32  224 21841 eager | compiled
R152x4 2   224 21841 eager
R14x0.5 4  32  10    eager | contiguous | compiled
"""


class Arm(NamedTuple):
    """What was found. least or most: what it should be, or neither."""

    part: str
    arm: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def ratio(self):
        """At least 1 where the value is what it should be."""
        if self.least is not None:
            return self.value / self.least
        return math.inf if self.most is None or self.value == 0 else self.most / self.value


def gpu(args, env):
    """Proofs and speeds of one GPU in --minutes: agreement with the CPU, synchronising calls,
    launches and layouts of a step, memory that runs out; training steps beside timm's; loading;
    few-shot cells.
    """
    small = env.device.type == "cpu"
    proofs = (device, agreement, accumulated, resumed, synchronising, layouts, launches)
    proofs += (out_of_memory, compiled)
    parts = [(proof.__name__, proof(env, small), 0.25 / len(proofs)) for proof in proofs]
    rows = [line.split(maxsplit=4) for line in SPEEDS.strip().splitlines()]
    arms = [
        (name, *map(int, numbers), arm.strip())
        for name, *numbers, listed in (rows[-1:] if small else rows[:-1])
        for arm in listed.split("|")
    ]
    parts += [(", ".join(map(str, arm)), speed(env, small, *arm), 0.5 / len(arms)) for arm in arms]
    parts += [("loading", loading(env, small), 0.15), ("cells", cells(env, small), 0.1)]
    found, path = [], Path(args.out, "gpu.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic()
    with open(path, "a") as file:
        for name, part, share in parts:
            end += 60 * args.minutes * share  # what a part leaves of its time is the next one's
            with within(max(1, end - time.monotonic()), name):
                for arm in part:
                    found.append(arm)
                    file.write(json.dumps(arm._asdict()) + "\n")
                    file.flush()
                    say(env, f"{arm.part}: {arm.arm}: {arm.value:.4g} {arm.unit}")
    rows = [arm._asdict() | {"good": "" if arm.ratio >= 1 else "NO"} for arm in found]
    missed = [
        Required(f"{arm.part}, {arm.arm}", "its bound", arm.ratio, 1.0)
        for arm in found
        if not arm.ratio >= 1
    ]
    return Report({"arms": rows}, rows, missed)


@contextlib.contextmanager
def within(limit, name):
    """A block that ends after so many seconds; its error is a line on stderr, and no more."""

    def late(*_):
        raise TimeoutError(f"more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------
# Proofs
# ------------------------------------------------------------------------------------------------


def device(env, small):
    """The best of five products, and a copy within the device."""
    for precision in ("fp32", "bf16"):
        best = memory.measured_flops(env.device, precision)
        yield Arm("device", f"product, {precision}", best / 1e12, "TFLOP/s")
    block = torch.zeros(2**20 if small else 2**30, dtype=torch.uint8, device=env.device)
    best = min(seconds(repeat(block.clone), 1, env.device) for _ in range(5))
    yield Arm("device", "copy", 2 * len(block) / best / 1e9, "GB/s")


def network(env, name="R14x0.5", classes=10):
    """(model, optimiser with AGC) of seed 0, on the device."""
    torch.manual_seed(0)
    return our_network(name, classes, env, clipping=0.01)


def batches(count, size=16, side=32):
    """An endless stream of `count` batches: (images uint8, labels, count of valid labels)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        256, (count, size, 3, side, side), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(10, (count, size), generator=generator)
    return itertools.cycle([(x, y, size) for x, y in zip(images, labels)])


def trained(env, count, accumulate=1, start=None, skip=0):
    """(network, optimiser) after `count` steps of the loop, from `start`."""
    model, optimizer = start or network(env)
    stream = itertools.islice(batches(8), skip, None)
    loop = training_loop(parallel(model, env), optimizer, stream, 16, env, accumulate)
    for _ in range(count):
        next(loop)
    return model, optimizer


def difference(a, b):
    """The largest difference of two networks' logits, relative to the largest logit."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (models.place(model, "cpu").eval()(images) for model in (a, b))
    return float((a - b).abs().max() / a.abs().max())


def agreement(env, small):
    """20 steps on the device beside 20 on the CPU in fp32."""
    cpu = env._replace(device=torch.device("cpu"), precision="fp32")
    expected = trained(cpu, 20)[0]
    for precision, most in (("fp32", 1e-4), ("tf32", 2e-2), ("bf16", 2e-2)):
        if not (small and precision == "tf32"):
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            model = trained(env._replace(precision=precision), 20)[0]
            yield Arm("agreement", precision, difference(expected, model), "of a logit", most=most)
    torch.backends.cudnn.allow_tf32 = env.precision == "tf32"


def accumulated(env, small):
    exact = env._replace(precision="fp32")
    found = difference(trained(exact, 5)[0], trained(exact, 5, accumulate=4)[0])
    yield Arm("accumulate", "4 parts", found, "of a logit", most=1e-4)


def resumed(env, small):
    """Six steps at once, and three, a checkpoint, three."""
    exact = env._replace(precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        run = Run(path, *trained(exact, 3), {}, exact)
        run.step = 3
        run.save()
        again = Run(path, *network(exact), {}, exact)
        model, _ = trained(exact, 3, start=(again.model, again.optimizer), skip=3)
    found, most = difference(trained(exact, 6)[0], model), 0.0 if small else 1e-4
    yield Arm("resume", "after 3 steps", found, "of a logit", most=most)


def warm_loop(env, name="R14x0.5"):
    """The loop of a training under way, two steps in."""
    loop = training_loop(*network(env, name), batches(2, size=2), 2, env)
    next(loop), next(loop)
    return loop


def synchronising(env, small):
    """CUDA's own check of 20 steps: an error where the host waits for the device."""
    loop = warm_loop(env)
    if not small:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            next(loop)
    finally:
        if not small:
            torch.cuda.set_sync_debug_mode("default")
    yield Arm("synchronise", "CUDA's own check", 0, "calls", most=0)


def compiled(env, small):
    """Gradients of the compiled network beside the eager one's: the least cosine of a tensor."""
    name, side = ("R14x0.5", 32) if small else ("R50x1", 64)
    images, found = torch.randn(8, 3, side, side, device=env.device), []
    for compile in (False, True):
        model, _ = network(env, name)
        if compile:
            began = time.perf_counter()
            model.compile_blocks()
        logits = model(images)  # in fp32: bf16 rounds otherwise where kernels are fused
        logits.square().sum().backward()
        found.append([p.grad.flatten().double() for p in model.parameters()])
    yield Arm("compile", f"{name}, first step", time.perf_counter() - began, "s", most=120)
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(*found) if a.norm() > 1e-6]
    yield Arm("compile", "least cosine of gradients", float(min(cosines)), "", least=0.999)


def layouts(env, small):
    """Convolutions whose input and kernel lie otherwise than the other."""
    model, mixed = network(env, "R14x0.5" if small else "R50x1")[0], []

    def look(module, inputs):
        x, weight = inputs[0], models.standardize(module.weight)
        mixed.append((x.stride(1) == 1) != (weight.stride(1) == 1 and weight.stride(3) != 1))

    for module in model.modules():
        if isinstance(module, models.StdConv2d):
            module.register_forward_pre_hook(look)
    with env.autocast():
        model(torch.zeros(2, 3, 64, 64, device=env.device))
    yield Arm("layout", "kernel and input differ", sum(mixed), f"of {len(mixed)} convolutions")


def launches(env, small):
    """Kernels of a training step: the device's launches, or a CPU's profiled calls."""
    kind = torch.profiler.ProfilerActivity.CPU if small else torch.profiler.ProfilerActivity.CUDA
    for name in ("R14x0.5",) if small else ("R50x1", "R152x4"):
        loop = warm_loop(env, name)
        with torch.profiler.profile(activities=[kind]) as profile:
            next(loop)
            synchronize(env.device)
        count = sum(small or "LaunchKernel" in event.name for event in profile.events())
        yield Arm("launches", name, count, "a step")


def out_of_memory(env, small):
    """A work that runs out of memory until it is computed in four parts, and one after it."""

    def work(parts):
        if small and parts < 4:
            raise torch.OutOfMemoryError("imitated")
        room = 1 if small else memory.free_memory(env.device)
        return torch.empty(int(2 * room) // parts, dtype=torch.uint8, device=env.device).numel()

    _, count = memory.halving_parts(work, 1, 16, env)
    yield Arm("out of memory", "parts that fit", count, "parts", least=2)
    trained(env, 1)
    yield Arm("out of memory", "a step after it", 1, "step", least=1)


# ------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------


def speed(env, small, name, size, side, classes, arm):
    """Images a second of training steps on one batch, share of the peak, and memory."""
    warm, count = (1, 2) if small else (10, 30)
    if not small:
        torch.cuda.empty_cache()
    memory.reset_peak_memory(env.device)
    loop = on_one_batch(env, name, size, side, classes, arm.split(", "))
    for _ in range(warm):
        next(loop)
    step = statistics.median(seconds(loop, 1, env.device) for _ in range(count))
    title = f"{name} x {size}, {arm}"
    yield Arm("speed", title, size / step, "images/s")
    flops = 3 * size * models.forward_flops(name, classes, side)
    peak = memory.peak_flops(env.device, env.precision)
    yield Arm("share of peak", title, flops / step / peak, "")
    yield Arm("memory", title, memory.peak_memory(env.device) / 2**30, "GiB")


def on_one_batch(env, name, size, side, classes, options):
    """Iterator of training steps on one batch that lies on the device."""
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=env.device)
    labels = torch.randint(classes, (size,), device=env.device)
    if "timm" in options:
        images = images.float()
        if "channels_last" in options:
            images = images.contiguous(memory_format=torch.channels_last)
        stream = itertools.repeat((images, labels))
        return timm_training(name, classes, stream, [*options, "fused"], size, env)
    model, optimizer = network(env, name, classes)
    if "contiguous" in options:
        model.to(memory_format=torch.contiguous_format)
    if "compiled" in options:
        model.compile_blocks()
    return training_loop(model, optimizer, itertools.repeat((images, labels, size)), size, env)


def loading(env, small):
    """Images a second from JPEGs to batches in pinned memory, and a training fed by them."""
    side, size, count = (32, 8, 16) if small else (224, 256, 2048)
    with tempfile.TemporaryDirectory() as made:
        dataset = data.load_dataset(f"folder:{make_photos(Path(made), 256, 10, count // 10)}")
        pipeline = choose_pipeline(dataset, side, train=True)
        for workers in sorted({0, min(2 if small else 4, available_cores()), available_cores()}):
            last = 2 if small else 8 + 8 * workers
            stream = loader(data.Batches(dataset, pipeline, size), 0, last, workers, env.device)
            speed = last * size / seconds(iter(stream), last, env.device)
            yield Arm("loading", f"JPEG, {workers} workers", speed, "images/s")
        model, steps = ("R14x0.5", 2) if small else ("R50x1", 20)
        args = SimpleNamespace(model=model, image_size=side, batch_size=size)
        loop = our_training(args, env, dataset, ["defaults"])
        next(loop)
        speed = steps * size / seconds(loop, steps, env.device)
        yield Arm("loading", "end to end, decoded in memory", speed, "images/s")


def cells(env, small):
    """Few-shot cells a minute of fewshot.py, its start included."""
    script, name = Path(__file__).parent.parent / "fewshot.py", "R14x0.5" if small else "R50x1"
    for pixels in (32,) if small else (128, 480):
        options = f"--checkpoint scratch --seeds 2 --shots 1 --model {name} --image-size {pixels}"
        options += f" --steps {5 if small else 100} --target synthetic-natural-target --out"
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, script, *options.split(), out]
            run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
            spent = seconds(repeat(run), 1, env.device)
        yield Arm("few-shot", f"{pixels} pixels", 2 * 60 / spent, "cells a minute")
