"""What is said of a training, whatever optimises it."""

import json
import math

import pytest
import torch

from engine.log import Log
from engine.metrics import Diverged
from engine.optimizer import SGD_AGC
from engine.processes import Env

CPU = Env(0, 1, torch.device("cpu"), "fp32")
OPTIMIZERS = {
    "SGD_AGC": lambda params: SGD_AGC(params, 0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_readings_are_means_since_the_last(name, tmp_path):
    """Steps of 4 images with 2 valid labels each; every second one is read, and the last."""
    weight, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = OPTIMIZERS[name]([weight, unused])
    path, norms = tmp_path / "run" / "log.jsonl", []
    with Log(CPU, 0, 5, 4, 2, path) as log:
        for step in range(1, 6):
            optimizer.zero_grad(set_to_none=True)
            (step * weight).sum().backward()
            norms.append(step * math.sqrt(3))
            optimizer.step()
            log.add(step, 0.1 * step, torch.tensor(step / 2), 2, optimizer, step == 5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["lr"] for line in lines] == pytest.approx([0.2, 0.4, 0.5])
    assert [line["loss"] for line in lines] == pytest.approx([1.5 / 4, 3.5 / 4, 2.5 / 2])
    expected = [sum(norms[:2]) / 2, sum(norms[2:4]) / 2, norms[4]]
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected)
    assert {line["clipped"] for line in lines} == ({1.0} if name == "SGD_AGC" else {None})
    assert all(line["images_per_second"] > 0 and line["memory"] > 0 for line in lines)


@pytest.mark.parametrize("bad", ("loss", "gradient"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_that_is_not_finite_is_named(name, bad):
    weight = torch.ones(3, requires_grad=True)
    optimizer = OPTIMIZERS[name]([weight])
    with Log(CPU, 0, 9, 4, 5) as log:
        for step in range(1, 5):
            weight.grad = torch.full((3,), math.inf if (bad, step) == ("gradient", 3) else 0.5)
            optimizer.step()
            loss = torch.tensor(math.nan if (bad, step) == ("loss", 3) else 1.0)
            log.add(step, 0.1 * step, loss, 4, optimizer)
            assert log.finite() == (step < 3)
        with pytest.raises(Diverged, match="not finite at step 2, learning rate 0.3; lower --lr"):
            log.add(5, 0.5, torch.tensor(1.0), 4, optimizer)
