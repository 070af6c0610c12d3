"""Forward passes over a whole set, of which the stream may bring the images in any order."""

import math

import numpy as np
import pytest
import torch

from engine.evaluate import evaluate
from engine.metrics import compute_metrics
from engine.processes import Env

ROWS = np.array([4, 1, 9, 0]), np.array([2, 3, 8, 7]), np.array([6, 5])
# Random, as two equal scores would be ordered by rounding.
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), np.uint8))


class Pooled(torch.nn.Module):
    """Logits: the means of four bands of the columns."""

    def forward(self, images):
        assert not self.training
        return images.mean(1).unflatten(2, (4, 2)).mean((1, 3))


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_evaluation_is_of_each_image_with_its_own_label(task, device):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 10)
    if task == "multilabel":
        labels = rng.choice(np.array([0, 1, math.nan], np.float32), (10, 4))
    model, normalization = Pooled(), ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    env, stream = Env(0, 1, torch.device(device), "fp32"), ((rows, IMAGES[rows]) for rows in ROWS)
    found = evaluate(model, stream, labels, "abcd", env, normalization)
    mean, std = (np.array(v)[:, None, None] for v in normalization)
    inputs = (IMAGES.numpy() / 255 - mean) / std  # grey becomes three channels
    logits = inputs.mean(1).reshape(10, 8, 4, 2).mean((1, 3))
    expected = compute_metrics(logits, labels, "abcd")
    assert found["accuracy"] == expected["accuracy"] and model.training
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-9)
    assert found["per_class"].keys() == set("abcd")
