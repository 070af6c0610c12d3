"""What a device can hold and do: memory in bytes, floating-point operations a second."""

import functools
import math
import os
import re
import resource
import time

import torch

from engine.console import print_table, say
from engine.processes import gathered

# Makers' figures for dense bf16 products; the first name that the device's own name holds counts.
# TF32 is half of them (on none of these is it otherwise).
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@functools.lru_cache
def peak_flops(device, precision):
    """Floating-point operations a second: the maker's for "bf16" and "tf32" on a GPU in PEAKS, else
    measured, as for "fp32".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for known, peak in PEAKS.items() if known in name), None)
    if peak and precision != "fp32":
        return peak if precision == "bf16" else peak / 2
    return measured_flops(device, precision)


def measured_flops(device, precision):
    """Of the best of five products of 8192 x 8192, on a CPU of 1024 x 1024."""
    side, best = 8192 if device.type == "cuda" else 1024, 0.0
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def peak_memory(device):
    """The most that this process has taken: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return proc_bytes("/proc/self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak_memory(device):
    """From now on peak_memory counts anew (on a CPU of Linux alone)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def free_memory(device):
    """What is still to be had; inf where the system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    known = os.path.exists("/proc/meminfo")
    return proc_bytes("/proc/meminfo", "MemAvailable") if known else math.inf


def proc_bytes(path, field):
    """A figure in kB of a file like /proc/meminfo, in bytes."""
    with open(path) as file:
        return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) * 1024


def training_step(model, batch, image_size, env):
    """Forward and backward pass of so many empty images of image_size x image_size pixels."""
    images = torch.zeros(batch, 3, image_size, image_size, device=env.device)
    with env.autocast():
        logits = model(images)
    logits.float().sum().backward()


def images_at_once(size):
    """How many images of size x size pixels a forward pass takes: 4 million pixels."""
    return max(1, 2**22 // size**2)


def activation_bytes(model, image_size, precision):
    """Bytes that a training step keeps of one image for its backward pass, but for blocks that are
    computed again: counted with the model on the meta device, where nothing is computed.
    """
    totals = []
    for count in (1, 2):  # the difference leaves out what does not grow with the batch
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.empty(count, 3, image_size, image_size, device="meta"))
        totals.append(sum(storage.nbytes() for storage in kept.values()))
    return (totals[1] - totals[0]) // (2 if precision == "bf16" else 1)


# What else a step takes for a while, to what it keeps: measured on CPUs 1.25 (R50x1 at 224 pixels),
# 1.45 (at 64), 1.95 (R14x0.5 at 32) in all.
PASSING = 1.5
PARTS = {}  # {(network, pixels, images, precision): in how many parts such a batch fits}


def out_of_memory(error):
    """Whether an error says that the device, or the host, has no more memory: it works on."""
    found = re.search("out of memory|_ALLOC|can't allocate memory", str(error))
    return isinstance(error, torch.OutOfMemoryError if not found else RuntimeError)


def in_parts(work, create, image_size, share, env, wanted=None):
    """work(parts), in as few parts of `share` images as fit into memory: by estimate, and in twice
    as many, here and later, each time that memory runs out. wanted: parts to begin with.

    create: a functools.partial that makes the network. Raises OutOfMemoryError where one image does
    not fit, or several ranks work together: one alone cannot choose.
    """
    key = *create.args, image_size, share, env.precision
    if wanted:
        PARTS[key] = wanted
    elif key not in PARTS:
        with torch.device("meta"):
            model = create()
        free = 0.8 * free_memory(env.device)
        if env.device.type == "cpu":  # whose memory all processes of the machine share
            free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Weights, gradients, momentum and standardised weights.
        room = free - 16 * sum(p.numel() for p in model.parameters())
        needed = share * PASSING * activation_bytes(model, image_size, env.precision)
        PARTS[key] = min(share, max(1, math.ceil(needed / max(room, 1))))
    before = PARTS[key]
    while True:
        try:
            result = work(PARTS[key])
            break
        except RuntimeError as error:
            if not out_of_memory(error) or PARTS[key] >= share or env.ranks > 1:
                raise
        # Out of the handler, whose traceback holds the activations.
        torch.cuda.empty_cache()
        PARTS[key] = min(2 * PARTS[key], share)
    if PARTS[key] > before:
        print(f"{key[0]} at {image_size} pixels: out of memory, now in {PARTS[key]} parts")
    return result


def parts_that_fit(model, create, image_size, batch_size, env):
    """In how many parts every rank computes its share of a batch: as in_parts finds it by steps."""
    share = math.ceil(batch_size / env.ranks)

    def step(parts):
        training_step(model, math.ceil(share / parts), image_size, env)
        return parts

    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # of sizes tried once
        parts = max(gathered(in_parts(step, create, image_size, share, env.alone()), env))
    model.zero_grad(set_to_none=True)
    say(env, f"--batch-size auto: {math.ceil(share / parts)} images at a time on each process")
    return parts


def flops_per_second(model, share, image_size, flops, env, parts=1):
    """Of a training step of such a part of `share` images, the best of four; flops: of one image's
    forward pass, of which a training step counts as three.
    """
    batch, best = math.ceil(share / parts), math.inf
    for _ in range(4):  # the first is slow
        began = time.perf_counter()
        training_step(model, batch, image_size, env)
        float(next(model.parameters()).detach().flatten()[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
        if best > 3 and env.device.type == "cpu":
            break
    return 3 * batch * flops / best


def print_estimate(model, config, steps, parts, flops, env):
    """Prints a training's config, and by steps that are tried its memory and time, reading and
    evaluations aside. parts: of a rank's share of a batch; a CPU tries 32 images. flops: as above.
    """
    share, size = math.ceil(config["batch_size"] / env.ranks / parts), config["image_size"]
    tried = min(share, 32) if env.device.type == "cpu" else share
    reset_peak_memory(env.device)
    speed = flops_per_second(model.train(), tried, size, flops, env)
    taken = peak_memory(env.device) + sum(4 * p.numel() for p in model.parameters())  # momentum
    taken += (share - tried) * PASSING * activation_bytes(model.to("meta"), size, env.precision)
    images = env.ranks * speed / (3 * flops)
    rows = config | {
        "steps": steps,
        "GB of memory a process": f"{taken / 1e9:.1f}",
        "images/s": f"{images:.0f}",
        "hours": f"{steps * config['batch_size'] / images / 3600:.2f}",
    }
    if env.main:
        rows = [(key, "" if value is None else value) for key, value in rows.items()]
        print_table(rows, ["", "value"])
