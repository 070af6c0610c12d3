"""What a GPU is worth here: that it computes what a CPU does, and how fast; cells of a grid.

Every arm is written to OUT/gpu.jsonl as it ends, so that a run that is cut short leaves what it
found. On a CPU everything runs in small: that tests this file, and measures nothing.
"""

import itertools
import json
import os
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
from benchmarks import train
from engine import memory
from engine.checkpoint import Run
from engine.console import one_line, refuse_unwritable, say
from engine.processes import environment
from pretrain import choose_pipeline
from readers import packs
from readers.workers import available_cores, loader

# model, images a step, pixels, classes, arms as in train.py; the CPU takes those of R14x0.5.
SPEEDS = """
R50x1  256 224 1000  ours | ours, contiguous | timm, bf16, fused | timm, bf16, channels_last, fused
R50x1  256 224 1000  timm, bf16, channels_last, fast_norm, fused
R50x1  32  224 1000  ours | timm, bf16, fused | timm, bf16, channels_last, fused
R152x4 32  224 21841 ours
R152x4 2   224 21841 ours
R50x1  256 224 1000  ours, compiled | timm, bf16, compiled, fused
R152x4 32  224 21841 ours, compiled
R50x1  256 224 1000  ours, graphs | timm, bf16, graphs, fused
R50x1  32  224 1000  ours, graphs
R14x0.5 4  32  10    ours | ours, contiguous | ours, compiled | ours, graphs
"""


class Arm(NamedTuple):
    """What was found. most: what it may be, where that is bounded."""

    part: str
    arm: str
    value: float
    unit: str
    most: float | None = None


def gpu(args, env):
    """Proofs and speeds of one GPU in --minutes: agreement with the CPU, synchronising calls,
    launches and layouts of a step, memory that runs out; training steps beside timm's; loading;
    few-shot cells.
    """
    small = env.device.type == "cpu"
    proofs = agreement, repeated, layouts, launches, out_of_memory, compiled
    # (name, what yields its arms, its share of the time)
    parts = [(proof.__name__, proof(env, small), 3) for proof in proofs]
    lines = [line.split(maxsplit=4) for line in SPEEDS.strip().splitlines()]
    for name, *numbers, listed in lines[-1:] if small else lines[:-1]:
        for arm in map(str.strip, listed.split("|")):
            about = name, *map(int, numbers), arm
            share = 4 if "compiled" in arm or "graphs" in arm else 1
            parts.append((f"speed of {about}", speed(env, small, *about), share))
    parts += [("loading", loading(env, small), 8), ("cells", cells(env, small), 6)]
    unit = 60 * args.minutes / sum(share for _, _, share in parts)

    def late(*_):
        raise TimeoutError("its share of --minutes is over")

    signal.signal(signal.SIGALRM, late)
    rows, bounds, end = [], [], time.monotonic()
    path = Path(args.out, "gpu.jsonl")
    refuse_unwritable("--out", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        about = {"began": time.strftime("%Y-%m-%d %H:%M"), **environment(env)}
        file.write(json.dumps(about) + "\n")
        say(env, ", ".join(f"{key} {value}" for key, value in about.items()))

        def keep(arm):
            rows.append(arm._asdict())
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()

        for name, part, share in parts:
            end += unit * share  # what a part leaves of its time is the next one's
            signal.setitimer(signal.ITIMER_REAL, max(1, end - time.monotonic()))
            try:
                for arm in part:
                    keep(arm)
                    say(env, f"{arm.part}: {arm.arm}: {arm.value:.4g} {arm.unit}")
                    if arm.most is not None:
                        ratio = arm.most / arm.value if arm.value else 1.0
                        bounds.append(train.bound(f"the bound of {arm.part}", arm.arm, ratio, 1.0))
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"[:300]
                print(f"{name}: {reason}", file=sys.stderr)
                keep(Arm(name, reason, None, "failed"))
                if name in {proof.__name__ for proof in proofs}:
                    bounds.append(train.bound(f"the bound of {name}", "failed", 0.0, 1.0))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return rows, bounds


def trained(env, count, accumulate=1, stop=0):
    """Network after `count` steps of the loop; stop: after so many it goes on from a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        for end in filter(None, (stop, count)):
            run = Run(Path(folder, "checkpoint.pt"), *train.our_network(env), {}, env)
            loop = steps(run.model, run.optimizer, env, accumulate, run.step)
            for _ in range(end - run.step):
                next(loop)
                run.step += 1
            run.save()
    return run.model


def steps(model, optimizer, env, accumulate=1, skip=0):
    """The loop, on eight batches of 16 images in turn; skip: so many to begin with."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 16, 3, 32, 32), generator=generator).byte()
    labels = torch.randint(10, (8, 16), generator=generator)
    stream = itertools.islice(itertools.cycle(zip(images, labels, [16] * 8)), skip, None)
    return train.training_loop(model, optimizer, stream, 16, env, accumulate)


def difference(a, b):
    """The largest difference of two networks' logits, relative to the largest logit."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (models.place(model, "cpu").eval()(images) for model in (a, b))
    return float((a - b).abs().max() / a.abs().max())


def agreement(env, small):
    """20 steps on the device beside 20 on the CPU in fp32.

    What bf16 may differ is twice what it differs on the CPU: it rounds the same tensors there, but
    adds up in another order; fp32 four times what other kernels of the CPU do (20 steps magnify
    the last digit to 1e-4 and more).
    """
    cpu = env._replace(device=torch.device("cpu"), precision="fp32")
    expected = trained(cpu, 20)
    rounded = difference(expected, trained(cpu._replace(precision="bf16"), 20))
    yield Arm("agreement", "bf16 on the CPU", rounded, "of a logit")
    with torch.backends.mkldnn.flags(enabled=False):
        other = difference(expected, trained(cpu, 20))
    yield Arm("agreement", "other kernels on the CPU", other, "of a logit")
    for precision, most in (("fp32", max(1e-4, 4 * other)), ("tf32", 2e-2), ("bf16", 2 * rounded)):
        if not (small and precision == "tf32"):
            model = trained(env.computing(precision), 20)
            yield Arm("agreement", precision, difference(expected, model), "of a logit", most)
    env.computing(env.precision)


def repeated(env, small):
    """Six steps at once beside six in four parts, and three, a checkpoint, three."""
    exact = env._replace(precision="fp32")
    plain = trained(exact, 6)
    found = difference(plain, trained(exact, 6, accumulate=4))
    yield Arm("accumulate", "4 parts", found, "of a logit", 1e-4)
    found, most = difference(plain, trained(exact, 6, stop=3)), 0.0 if small else 1e-4
    yield Arm("resume", "after 3 steps", found, "of a logit", most)


def launches(env, small):
    """CUDA's own check of 20 steps: an error where the host waits for the device; and kernels of a
    training step: the device's launches, or a CPU's profiled calls.
    """
    check = torch.cuda.set_sync_debug_mode if not small else lambda mode: None
    loop = steps(*train.our_network(env), env)
    next(loop), next(loop)
    try:
        check("error")
        for _ in range(20):
            next(loop)
    finally:
        check("default")
    yield Arm("synchronise", "CUDA's own check", 0, "calls", 0)
    kind = torch.profiler.ProfilerActivity.CPU if small else torch.profiler.ProfilerActivity.CUDA
    for name in ("R14x0.5",) if small else ("R14x0.5", "R50x1", "R152x4"):
        loop = steps(*train.our_network(env, name), env)
        next(loop), next(loop)
        with torch.profiler.profile(activities=[kind]) as profile:
            train.seconds(loop, 1, env.device)
        count = sum(small or "LaunchKernel" in event.name for event in profile.events())
        yield Arm("launches", name, count, "a step")


def compiled(env, small):
    """Gradients of the compiled network beside the eager one's: the least cosine of a tensor."""
    name, side = ("R14x0.5", 32) if small else ("R50x1", 64)
    images, gradients = torch.randn(8, 3, side, side, device=env.device), []
    for compile in (False, True):
        model, began = train.our_network(env, name)[0], time.perf_counter()
        if compile:
            model.compile_blocks()
        logits = model(images)  # in fp32: bf16 rounds otherwise where kernels are fused
        logits.square().sum().backward()
        gradients.append([p.grad.flatten().double() for p in model.parameters()])
    yield Arm("compile", f"{name}, first step", time.perf_counter() - began, "s", 120)
    pairs = [(a, b) for a, b in zip(*gradients) if a.norm() > 1e-6]
    least = min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)
    yield Arm("compile", "1 - least cosine of gradients", 1 - least, "", 1e-3)


def layouts(env, small):
    """Convolutions whose input and kernel lie otherwise than the other."""
    model, mixed = train.our_network(env, "R14x0.5" if small else "R50x1")[0], []

    def look(module, inputs):
        x, weight = inputs[0], models.standardize(module.weight)
        mixed.append((x.stride(1) == 1) != (weight.stride(1) == 1 and weight.stride(3) != 1))

    for module in model.modules():
        if isinstance(module, models.StdConv2d):
            module.register_forward_pre_hook(look)
    with env.autocast():
        model(torch.zeros(2, 3, 64, 64, device=env.device))
    yield Arm("layout", "kernel and input differ", sum(mixed), f"of {len(mixed)} convolutions")


def out_of_memory(env, small):
    """A work that runs out of memory until it is computed in four parts, and one after it."""

    def work(parts):
        if small and parts < 4:
            raise torch.OutOfMemoryError("imitated")
        room = 1 if small else memory.free_memory(env.device)
        torch.empty(int(2 * room) // parts, dtype=torch.uint8, device=env.device)
        return parts

    create = partial(models.create_model, "R14x0.5", 10)
    count = memory.in_parts(work, create, 32, 16, env, wanted=1)
    yield Arm("out of memory", "parts that fit", count, "parts")
    trained(env, 1)
    yield Arm("out of memory", "a step after it", 1, "step")


def speed(env, small, name, size, side, classes, arm):
    """Images a second of training steps on one batch, share of the peak, and memory."""
    warm, count = (1, 2) if small else (10, 30)
    if not small:
        torch._dynamo.reset()  # an arm's graphs hold its memory
        torch.cuda.empty_cache()
    memory.reset_peak_memory(env.device)
    args = SimpleNamespace(model=name, image_size=side, batch_size=size)
    loop = train.training(arm, args, env, classes, clipping=0.01)
    for _ in range(warm):
        next(loop)
    step = statistics.median(train.seconds(loop, 1, env.device) for _ in range(count))
    title = f"{name} x {size}, {arm}"
    yield Arm("speed", title, size / step, "images/s")
    flops = 3 * size * models.forward_flops(name, classes, side) / step
    yield Arm("share of peak", title, flops / memory.peak_flops(env.device, env.precision), "")
    yield Arm("memory", title, memory.peak_memory(env.device) / 2**30, "GiB")


def loading(env, small):
    """Images a second from JPEGs to batches in pinned memory, and trainings fed from files: ours
    from a pack, with the share of the time that it waits for a batch, and timm's with its
    prefetcher.
    """
    side, size, count = (32, 8, 16) if small else (224, 256, 2048)
    with tempfile.TemporaryDirectory() as made:
        folder = train.make_images(Path(made), 256, classes=10, count=count // 10)
        dataset = data.load_dataset(f"folder:{folder}")
        pipeline = choose_pipeline(dataset, side, train=True)
        counts = (0, 2) if small else sorted({min(w, available_cores()) for w in (0, 4, 8, 14)})
        for workers in counts:
            last = 2 if small else 8 + 8 * workers
            stream = loader(data.Batches(dataset, pipeline, size), 0, last, workers, env.device)
            speed = last * size / train.seconds(stream, last, env.device)
            yield Arm("loading", f"JPEG, {workers} workers", speed, "images/s")
        pixels, count = side * 8 // 7, 2 if small else 20
        target = Path(f"{folder}@{pixels}")
        packs.pack(dataset.name, dict.fromkeys(data.SPLITS, dataset), pixels, target)
        packed = data.load_dataset(f"{dataset.name}@{pixels}")
        stream = loader(data.Batches(packed, pipeline, size), 0, sys.maxsize, None, env.device)
        loop = train.training_loop(*train.our_network(env, "R50x1"), stream, size, env)
        log = next(loop)
        waited = log.waited
        spent = train.seconds(loop, count, env.device)
        yield Arm("loading", "end to end, ours, from a pack", count * size / spent, "images/s")
        share, most = (log.waited - waited) / spent, None if small else 0.02
        yield Arm("loading", "data_wait from a pack", share, "", most)
        args = SimpleNamespace(model="R50x1", image_size=side, batch_size=size)
        loop = train.training("timm, bf16, fused", args, env, 10, dataset)
        next(loop)
        speed = count * size / train.seconds(loop, count, env.device)
        yield Arm("loading", "end to end, timm, its prefetcher", speed, "images/s")


def cells(env, small):
    """Few-shot cells a minute of fewshot.py, its start included."""
    name, steps = ("R14x0.5", 5) if small else ("R50x1", 100)
    for pixels in (32,) if small else (128, 480):
        options = f"--seeds 2 --shots 1 --model {name} --image-size {pixels} --steps {steps}"
        spent = fewshot_seconds(f"{options} --target synthetic-natural-target")
        yield Arm("few-shot", f"{pixels} pixels", 2 * 60 / spent, "cells a minute")


def grid(args, env):
    """Cells a second of fewshot.py under torchrun with one process and with two, a thread each:
    the whole command, from its start to its closing table.
    """
    speeds, one_thread = {}, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(args.rounds):
        for ranks, name in ((1, "1 process"), (2, "2 processes")):
            launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}"
            spent = fewshot_seconds(f"--seeds {args.seeds}", launch, one_thread)
            # A seed is six cells, of the defaults: two targets, three shots, one network.
            speeds[name] = max(speeds.get(name, 0.0), 6 * args.seeds / spent)
    return train.speed_report(speeds, "1 process", [("2 processes", "1 process", 1.8)], "cells/s")


def fewshot_seconds(options, launch="", environment=None):
    """Of fewshot.py from scratch, its start included."""
    command = [sys.executable, *launch.split(), Path(__file__).parent.parent / "fewshot.py"]
    command += ["--checkpoint", "scratch", *options.split(), "--out"]
    settings = {"env": os.environ | (environment or {}), "stdout": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        subprocess.run([*command, out], check=True, **settings)
        return time.perf_counter() - began
