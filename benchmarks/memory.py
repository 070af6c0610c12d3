"""The peak of memory in a training step."""

import itertools

import torch

from benchmarks.measure import Report, Required, apart, seconds
from benchmarks.train import our_network, training_loop
from engine.console import say
from engine.memory import peak_memory
from engine.processes import setup

GIBIBYTES = 20.0  # that the leanest arm may take


def memory(args, env):
    """Peak memory of a process that makes the network and trains it for two steps, with AGC.

    Plain and with activations computed again in the backward pass, in fp32 and under bf16.
    """
    measured, rows = {}, []
    for checkpointed, precision in itertools.product((False, True), ("fp32", "bf16")):
        arm = f"{'checkpointed' if checkpointed else 'plain'}, {precision}"
        say(env, f"measuring: {arm}")
        found = measured[arm] = apart(peak, args, checkpointed, precision)
        gibibytes = found["bytes"] / 2**30
        rows.append({"arm": arm, "GiB": gibibytes, "seconds a step": found["seconds"]})
    leanest = min(measured, key=lambda arm: measured[arm]["bytes"])
    ratio = GIBIBYTES * 2**30 / measured[leanest]["bytes"]
    required = Required(f"{GIBIBYTES:g} GiB", leanest, ratio, 1.0)
    return Report({"measured": measured}, rows, [required])


def peak(args, checkpointed, precision):
    """{"bytes", "seconds" of a step}: of this process, which does nothing else."""
    env = setup(precision)
    model, optimizer = our_network(args.model, args.classes, env, 0.01, checkpointed)
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.zeros(args.batch_size, dtype=torch.int64)
    stream = itertools.repeat((images, labels, args.batch_size))
    loop = training_loop(model, optimizer, stream, args.batch_size, env)
    next(loop)  # makes the momentum
    return {"seconds": seconds(loop, 1, env.device), "bytes": peak_memory(env.device)}
