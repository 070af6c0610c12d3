"""Scripts run in the test's own process, and what a grid leaves."""

import json
import signal
import sys

import pytest

import pretrain

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


def pretrained(folder, out):
    """The run folder of a network of a folder: dataset, as pretrain.py leaves it."""
    words = ("--batch-size", 8, "--epochs", 0.25, "--out", out)
    call(pretrain, "--source", f"folder:{folder}", *QUICK, *words)
    (path,) = out.iterdir()
    return path


def results(out, pattern="*/*/*.json"):
    """{path below out: content}"""
    return {
        str(path.relative_to(out)): json.loads(path.read_text())
        for path in sorted(out.glob(pattern))
    }
