"""How many images fit, and what a training counts as arithmetic."""

import gc
import itertools
import types

import pytest
import timm
import torch
import torch.distributed as dist
from interruption import CPU

import models
from engine import memory


def network():
    torch.manual_seed(0)
    return models.create_model("R14x0.5", 4)


@pytest.mark.parametrize("limit, largest", ((1, 1), (7, 4), (8, 8)))
def test_the_largest_batch_is_a_power_of_two_up_to_the_limit(limit, largest, monkeypatch):
    """And the search leaves the network as it was."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**50)
    model, before, state = network(), network().state_dict(), torch.get_rng_state()
    assert memory.largest_batch(model, 16, limit, CPU) == largest
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Hungry(torch.nn.Module):
    """Takes 256 MiB an image, in blocks that malloc gives back to the system when freed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return (images.new_ones(len(images), 2**25) * self.weight).sum(1)


@pytest.mark.parametrize(
    "free, processes, largest", ((0, 1, 1), (480, 1, 1), (960, 1, 2), (2**20, 1, 4), (3840, 4, 2))
)
def test_less_memory_makes_smaller_batches(free, processes, largest, monkeypatch):
    """256 and 512 MiB are within four fifths of 480 and 960, and twice as much is not.
    The processes of a machine share its memory.
    """
    gc.collect()  # what other tests left is not freed meanwhile
    monkeypatch.setattr(memory, "free_memory", lambda device: free * 2**20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert memory.largest_batch(Hungry(), 1, 7, CPU) == largest


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    def all_reduce(tensor, op):
        assert op == dist.ReduceOp.MIN
        tensor.clamp_(max=2)  # another rank's answer

    monkeypatch.setattr(memory, "free_memory", lambda device: 2**50)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert memory.largest_batch(network(), 16, 8, CPU._replace(ranks=2)) == 2
    assert memory.parts_that_fit(network(), 16, 15, CPU._replace(ranks=2)) == 4


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
