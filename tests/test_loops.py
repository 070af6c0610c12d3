"""A step of each training loop, beside the same in one piece and in double precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import call

import data
import models
import pretrain
import transfer
from engine.log import Log
from readers.images import ImageDataset
from readers.transforms import NORMALIZATION, Pipeline, keep


def dataset(count, task):
    """Images of 16 x 16 pixels, and labels of 4 classes with most of them NaN, unevenly."""
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))
    labels = rng.integers(0, 4, count)
    if task == "multilabel":
        labels = rng.choice(np.float32([0, 1, np.nan]), (count, 4), p=(0.2, 0.2, 0.6))
        labels[:2] = np.nan
        labels[-1] = 1
    about = labels, tuple("abcd"), task, "natural"
    return ImageDataset("memory", lambda i, size: images[i], *about, size=16)


@pytest.fixture
def step(monkeypatch, tmp_path):
    """Runs one step of a script on all images at once: (sum of losses, gradient)."""

    def run(script, images, *more):
        found = []

        def add(log, step, lr, loss, count, optimizer, *rest):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found[:] = float(loss), torch.cat([grad.flatten() for grad in grads])

        monkeypatch.setattr(Log, "add", add)
        monkeypatch.setattr(data, "load_dataset", lambda *args, **options: images)
        monkeypatch.setattr(script, "choose_pipeline", lambda *args: Pipeline(keep, keep))
        words = ("--batch-size", len(images), "--precision", "fp32", "--out", tmp_path)
        call(script, *words, *more)
        return found

    return run


def by_hand(images, share=1.0):
    """In the order of the batch: image 2k is mixed with image 2k + 1."""
    count = len(images)
    order, _ = data.batch_indices(0, count, count, seed=0)
    pixels = torch.stack([images.read(i) for i in order])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMALIZATION["natural"])
    labels, pixels = torch.from_numpy(images.labels[order]), ((pixels / 255 - mean) / std).double()
    partner = list(range(count))
    for i in range(0, count - 1, 2):
        partner[i], partner[i + 1] = i + 1, i
    torch.manual_seed(0)
    model = models.create_model("R14x0.5", 4).double()
    logits, loss = model(share * pixels + (1 - share) * pixels[partner]), 0
    for weight, targets in ((share, labels), (1 - share, labels[partner])):
        for row, target in zip(logits, targets):
            if target.ndim == 0:
                losses = F.cross_entropy(row, target)
            else:
                valid, wanted = ~target.isnan(), target.double()[~target.isnan()]
                losses = F.binary_cross_entropy_with_logits(row[valid], wanted, reduction="sum")
            loss = loss + weight * losses
    (loss / max(int((~labels.isnan()).sum()), 1)).backward()
    grads = [p.grad for group in model.parameter_groups() for p in group["params"]]
    return float(loss.detach()), torch.cat([grad.flatten() for grad in grads]).float()


def assert_close(found, expected):
    """Rounding comes to 2e-5."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    difference = (found[1] - expected[1]).norm() / expected[1].norm()
    assert difference < 5e-5, float(difference)


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_parts_of_unequal_size_add_up(task, step, tmp_path):
    images = dataset(7, task)
    for accumulate in (1, 3):
        more = ("--accumulate", accumulate, "--epochs", 1, "--clipping", 0)
        found = step(pretrain, images, *more, "--out", tmp_path / str(accumulate))
        assert_close(found, by_hand(images))


def test_a_batch_without_labels_has_gradient_zero(step, monkeypatch):
    images = dataset(8, "multilabel")
    images.labels[data.batch_indices(0, 8, 4, seed=0)[0]] = np.nan
    monkeypatch.setattr(pretrain, "evaluate", lambda *args: {"loss": None})
    monkeypatch.setattr(pretrain, "print_result", lambda record: None)
    words = ("--batch-size", 4, "--accumulate", 2, "--epochs", 0.5)
    loss, gradient = step(pretrain, images, *words)
    assert loss == 0 and gradient.count_nonzero() == 0


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
@pytest.mark.parametrize("count, alpha", ((7, 1.0), (5, 0.0)))
def test_mixup_of_neighbours(task, count, alpha, step, monkeypatch):
    rule = transfer.HyperRule(16, 16, alpha, 0, (), 1)
    monkeypatch.setattr(transfer, "choose_rule", lambda *args: rule)
    plain = transfer.RECIPES["paper"]._replace(clipping=None)
    monkeypatch.setitem(transfer.RECIPES, "paper", plain)
    images = dataset(count, task)
    found = step(transfer, images, "--checkpoint", "scratch", "--target", "pets")
    rng = data.generator(0, data.Stream.MIXUP, 0)
    assert_close(found, by_hand(images, rng.beta(alpha, alpha) if alpha else 1.0))
