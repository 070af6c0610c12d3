"""What a device can hold and do: memory in bytes, floating-point operations a second."""

import functools
import os
import re
import resource
import time

import torch

# Makers' figures for dense bf16 products; the first name that the device's own name holds counts.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12,
}  # fmt: skip


@functools.lru_cache
def peak_flops(device, precision):
    """Of the maker for bf16 on a GPU in PEAKS; elsewhere the best of five products of 1024 x 1024.

    precision: "fp32" or "bf16".
    """
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    side, best = 1024, 0.0
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def available_cores():
    """Those that this process may use (fewer than the machine's under SLURM, say)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


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
    """What is still to be had. Raises ValueError where the system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if not os.path.exists("/proc/meminfo"):
        raise ValueError("--batch-size auto: this system does not tell its memory; give a number")
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path, field):
    """A figure in kB of a file like /proc/meminfo, in bytes."""
    with open(path) as file:
        return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) * 1024
