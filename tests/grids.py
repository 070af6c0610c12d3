"""Scripts run in the test's own process, and what a grid leaves."""

import json
import signal
import sys

import pytest
import torch

import models
from readers.transforms import NORMALIZATION

QUICK = ("--image-size", 32, "--precision", "fp32")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def call(script, *words):
    """The status of a script's main(); this process keeps its own way with signals."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            return script.main()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def results(out, pattern="*/*/*.json"):
    """{path below out: content}"""
    paths = sorted(out.glob(pattern))
    return {str(path.relative_to(out)): json.loads(path.read_text()) for path in paths}


def outputs(path, dataset, rows=None, kind="features", domain="natural"):
    """(N,D) or (N,C) float32 of a network's file for these images, without the scripts."""
    content = torch.load(path, weights_only=True)
    model = models.create_model(content["name"], len(content["classes"])).eval()
    models.load_weights(model, path)
    rows = range(len(dataset)) if rows is None else rows
    pixels = torch.stack([dataset.read(i) for i in rows]).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMALIZATION[domain])
    with torch.inference_mode():
        return getattr(model, kind)((pixels / 255 - mean) / std)
