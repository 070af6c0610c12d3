"""Forward passes over a whole set."""

import math

import numpy as np
import pytest
import torch

import models
from engine.evaluate import evaluate
from engine.metrics import compute_metrics
from engine.processes import Env
from readers.images import ImageDataset
from readers.transforms import NORMALIZATION, Pipeline, keep
from readers.workers import in_order

CPU = Env(0, 1, torch.device("cpu"), "fp32")


class Pooled(torch.nn.Module):
    """Logits: the means of four bands of the columns; keeps the size of each batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images.mean(1).unflatten(2, (4, 2)).mean((1, 3))


def in_memory(labels, task):
    """(images, the stream of a test set of them in batches of 4)"""
    rng = np.random.default_rng(0)  # two equal scores would be ordered by rounding
    images = torch.from_numpy(rng.integers(0, 256, (len(labels), 1, 8, 8), np.uint8))
    about = labels, tuple("abcd"), task, "medical"
    dataset = ImageDataset("memory", lambda i, size: images[i], *about)
    return images, in_order(dataset, Pipeline(keep, keep), 4)


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_evaluation_sees_each_image_once_and_in_order(task):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 10)
    if task == "multilabel":
        labels = rng.choice(np.array([0, 1, math.nan], np.float32), (10, 4))
    images, stream = in_memory(labels, task)
    model, normalization = Pooled(), ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    found = evaluate(model, stream, labels, "abcd", CPU, normalization)
    assert model.batches == [4, 4, 2] and model.training
    mean, std = (np.array(v)[:, None, None] for v in normalization)
    inputs = (images.numpy() / 255 - mean) / std  # grey becomes three channels
    logits = inputs.mean(1).reshape(10, 8, 4, 2).mean((1, 3))
    expected = compute_metrics(logits, labels, "abcd")
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-9)
    assert found["per_class"].keys() == set("abcd")


@pytest.mark.gpu
def test_evaluation_on_a_gpu_equals_the_cpu():
    labels, found = np.arange(10) % 3, []
    for env in (CPU, CPU._replace(device=torch.device("cuda", 0))):
        _, stream = in_memory(labels, "multiclass")
        torch.manual_seed(0)
        model = models.place(models.create_model("R14x0.5", 3), env.device)
        found.append(evaluate(model, stream, labels, "abc", env, NORMALIZATION["medical"]))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-2)
