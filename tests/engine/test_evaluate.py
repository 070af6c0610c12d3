"""Forward passes over a whole set, of which the stream may bring the images in any order."""

import math

import numpy as np
import pytest
import torch
from interruption import CPU

from engine import evaluate
from engine.metrics import compute_metrics

ROWS = np.array([4, 1, 9, 0]), np.array([2, 3, 8, 7]), np.array([6, 5])
# Random, as two equal scores would be ordered by rounding.
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), np.uint8))


class Pooled(torch.nn.Module):
    """Logits: the means of the columns."""

    def forward(self, images):
        assert not self.training
        return images.mean((1, 2))


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_evaluation_is_of_each_image_with_its_own_label(task, device, monkeypatch, capsys):
    """Also summed by batches, where the scores are too many to be held: that is said once."""
    evaluate.say_once.cache_clear()
    rng, env = np.random.default_rng(0), CPU._replace(device=torch.device(device))
    labels = rng.integers(0, 8, 10)
    if task == "multilabel":
        labels = rng.choice(np.array([0, 1, math.nan], np.float32), (10, 8))
    model, normalization = Pooled(), ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    mean, std = (np.array(v)[:, None, None] for v in normalization)
    inputs = (IMAGES.numpy() / 255 - mean) / std  # grey becomes three channels
    expected = compute_metrics(inputs.mean((1, 2)), labels, "abcdefgh")
    for limit in (80, 79, 79):
        monkeypatch.setattr(evaluate, "MAX_SCORES", limit)
        stream, held = ((rows, IMAGES[rows]) for rows in ROWS), limit == 80
        found = evaluate.evaluate(model, stream, labels, "abcdefgh", env, normalization)
        assert found["accuracy"] == expected["accuracy"] and found["top5"] == expected["top5"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5) and model.training
        auc = pytest.approx(expected["mean_auc"], abs=1e-9) if held else None
        assert found["mean_auc"] == auc
        assert set(found["per_class"] or ()) == set("abcdefgh" * held)
    assert capsys.readouterr().out.count("left out: 10 images x 8 classes") == 1
