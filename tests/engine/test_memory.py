"""How many images fit, and what a training counts as arithmetic."""

import copy
import functools
import itertools
import math
import types

import pytest
import timm
import torch
from interruption import CPU

import models
from engine import memory

CREATE = functools.partial(models.create_model, "R14x0.5", 4)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(memory, "PARTS", {})
    monkeypatch.setattr(memory, "free_memory", lambda device: math.inf)


def test_parts_that_fit_leave_the_network_as_it_was(monkeypatch):
    """By a step of each, in twice as many parts while memory runs out."""
    counts, step = [], memory.training_step

    def training_step(model, batch, *about):
        counts.append(batch)
        if batch > 4:
            raise torch.OutOfMemoryError("imitated")
        step(model, batch, *about)

    monkeypatch.setattr(memory, "training_step", training_step)
    model = CREATE()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert memory.parts_that_fit(model, CREATE, 16, 15, CPU) == 4 and counts == [15, 8, 4]
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    monkeypatch.setattr(memory, "gathered", lambda parts, env: [parts, 4])  # another rank's answer
    assert memory.parts_that_fit(CREATE(), CREATE, 16, 15, CPU._replace(ranks=2)) == 4


@pytest.mark.parametrize(
    "device, free, processes, parts",  # 30 images of 12 MiB in four fifths of it, and the weights
    (("cpu", 600, 1, 1), ("cpu", 300, 1, 2), ("cpu", 1200, 4, 2), ("cuda", 600, 4, 1))
    + (("cpu", 0, 1, 30), ("cpu", math.inf, 4, 1)),
)
def test_parts_by_estimate(device, free, processes, parts, monkeypatch):
    """The processes of a machine share its memory, and have a GPU each."""
    monkeypatch.setattr(memory, "activation_bytes", lambda *args: 8 * 2**20)
    monkeypatch.setattr(memory, "free_memory", lambda device: free * 2**20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    env = CPU._replace(device=torch.device(device))
    assert memory.in_parts(lambda parts: parts, CREATE, 16, 30, env) == parts


def test_flops_equal_twice_the_multiply_adds_of_timms_convolutions():
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()

    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, 224, 224))
    assert models.forward_flops("R50x1", 1000, 224) == pytest.approx(2 * total, rel=0.001)
    assert total == pytest.approx(4.1e9, rel=0.01)  # as the literature has it


def test_peak_of_a_processor(monkeypatch):
    """The best of five products of 1024 x 1024, by a clock that says how long each took."""
    clock = itertools.accumulate((0, 9, 1, 8, 1, 4, 1, 7, 1, 5))
    monkeypatch.setattr(memory, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert memory.peak_flops.__wrapped__(torch.device("cpu"), "fp32") == 2 * 1024**3 / 4
