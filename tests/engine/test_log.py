"""What is said of a training, whatever optimises it; losses and gradients that are not finite."""

import json
import math
from functools import partial

import interruption
import pytest
import torch
from conftest import refuses
from interruption import BATCH, CPU, SAVE_EACH_STEP, Training

import pretrain
from engine.log import Log
from engine.metrics import Diverged
from engine.optimizer import SGD_AGC

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


def test_lines_of_a_run(folder, tmp_path):
    """One every third step, and at the end of each epoch."""
    rare = Training(folder, tmp_path, "--log-every", 3, "--clipping", 0)
    rare.go()
    found, single = rare.lines(), interruption.undisturbed(folder, 1).lines()
    assert [line["step"] for line in found] == [3, 6, 8, 9, 12, 15, 18, 21, 23]
    keys = {"step", "lr", "loss", "grad_norm", "clipped", "images_per_second"}
    for line in found + single:
        assert line.keys() == keys | {"data_wait", "memory"}
        assert 0 <= line["data_wait"] < 1 and line["images_per_second"] > 0
        assert 100e6 < line["memory"] < 16e9
    assert all(line["clipped"] is None for line in found)
    assert 0 <= min(line["clipped"] for line in single)
    assert 0 < max(line["clipped"] for line in single) <= 1
    assert single[0]["lr"] == pytest.approx(0.05 * BATCH / 256)
    assert single[-1]["lr"] == found[-1]["lr"] == pytest.approx(0.05 * BATCH / 256 / 1000)


def test_a_continued_run_writes_later_lines_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 4, "test": {}}\n{"st')
    Log(CPU, 4, 9, 4, path=path)
    assert path.read_text() == '{"step": 3, "loss": 1}\n{"step": 4, "loss": 1}\n'
    Log(CPU, 3, 9, 4, path=path)
    assert path.read_text() == '{"step": 3, "loss": 1}\n'


@pytest.mark.parametrize("line", ('{"st', "[]", '{"step": "x"}'))
def test_a_damaged_line_is_named(line, tmp_path):
    path, said = tmp_path / "log.jsonl", "line 2: damaged; remove that line"
    text = f'{{"step": 1, "loss": 2}}\n{line}\n{{"step": 2, "loss": 2}}\n'
    path.write_text(text)
    refuses(ValueError, partial(Log, CPU, 5, 9, 4, path=path), f"{path}, {said}")
    assert path.read_text() == text


@pytest.mark.parametrize(
    "bad, precision, mend",
    (
        ("loss", "fp32", "; lower --lr"),
        ("gradient", "bf16", "; lower --lr, or give --precision fp32, and give"),
    ),
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_that_is_not_finite_is_named(name, bad, precision, mend):
    weight = torch.ones(3, requires_grad=True)
    optimizer = OPTIMIZERS[name]([weight])
    with Log(CPU._replace(precision=precision), 0, 9, 4, 5) as log:
        for step in range(1, 5):
            weight.grad = torch.full((3,), math.inf if (bad, step) == ("gradient", 3) else 0.5)
            optimizer.step()
            loss = torch.tensor(math.nan if (bad, step) == ("loss", 3) else 1.0)
            log.add(step, 0.1 * step, loss, 4, optimizer)
            assert log.finite() == (step < 3)
        add = partial(log.add, 5, 0.5, torch.tensor(1.0), 4, optimizer)
        refuses(Diverged, add, f"not finite at step 2, learning rate 0.3{mend}")


def test_divergence_is_named_on_every_rank(folder, tmp_path):
    training = Training(folder, tmp_path, "--lr", 1e9, "--clipping", 0)
    errors = [err for _, err in training.go(2, ranks=2)]
    first = errors[0].removeprefix("error: ")
    step = int(first.split(" step ")[1].split(",")[0])
    rate = 1e9 / 256 * BATCH
    said = f"loss or gradient is not finite at step {step}, learning rate {rate:g}"
    assert first.startswith(said) and first.count("\n") == 1 and "--lr" in first
    assert errors[1] == f"error (rank 1): {first}"
    assert list(training.losses()) == list(range(1, step + 1))  # that many were finite
    assert not training.paths("result.json")


@pytest.mark.parametrize("rate, log_every", ((1e9, 1), (1e39, 100)))
def test_what_is_saved_is_finite(rate, log_every, folder, tmp_path):
    """Also where a finite gradient makes weights overflow, before any loss shows it."""

    def late():
        calm = pretrain.learning_rate
        pretrain.learning_rate = lambda step, *rest: rate if step > 8 else calm(step, *rest)

    every = ("--log-every", log_every)
    training = Training(folder, tmp_path, "--clipping", 0, *every, *SAVE_EACH_STEP)
    ((_, err),) = training.go(2, late)
    assert err.startswith("error: loss or gradient is not finite at step ")
    assert f"learning rate {rate:g}" in err and err.count("\n") == 1
    state = training.load()
    assert 8 <= state["step"] <= int(err.split(" step ")[1].split(",")[0])
    buffers = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    assert len(buffers) > 20
    assert all(tensor.isfinite().all() for tensor in [*state["model"].values(), *buffers])
