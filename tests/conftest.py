"""Small datasets in their real layouts, and a way to run the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import grids
import numpy as np
import pytest
import torch
from trees import NIH_HEADER, Chests, Trees, noise, save

import plot
import pretrain
from readers import xrays

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # as every process that the tests start


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def real_data():
    """The directory of small real datasets."""
    if not os.environ.get("REAL_DATA"):
        pytest.skip("REAL_DATA is not set")
    return Path(os.environ["REAL_DATA"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder: dataset, 3 classes told by their colour, 20 + 7 images each of 32 px."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        for c, name in enumerate(("blue", "green", "red")):
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - c] += 60
                save(root / split / name / f"{i:02d}.png", pixels)
    return root


@pytest.fixture(scope="session")
def checkpoint(folder, tmp_path_factory):
    """The run folder of a network of `folder`, as pretrain.py leaves it."""
    out = tmp_path_factory.mktemp("runs")
    words = ("--source", f"folder:{folder}", "--batch-size", 8, "--epochs", 0.25, "--out", out)
    grids.call(pretrain, *words, *grids.QUICK)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="session")
def nih_root(tmp_path_factory):
    """A data directory with NIH ChestX-ray14 in its official layout: 40 + 12 images of 48 px."""
    trees = Trees(tmp_path_factory.mktemp("datasets"))
    findings = ["No Finding", "Effusion|Mass", *xrays.NIH_CLASSES]
    shown = [findings[i % (16 if i < 40 else 5)] for i in range(52)]  # no Edema in test
    rows = [(f"{i:08d}_000.png", finding, i, "PA") for i, finding in enumerate(shown)]
    trees.write_nih(rows[:40], rows[40:], NIH_HEADER, images=False)
    for name, *_ in rows:
        save(trees.nih / "images" / name, trees.noise(48, 48))
    return trees.root


def command(script, *args, ranks=1):
    """The command line of a script, under torchrun for several ranks."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch += ["-m", script] if script == "benchmarks" else [str(ROOT / script)]
    return [*launch, *map(str, args)]


def run(script, *args, ranks=1, cwd, status=0):
    """Runs a script in `cwd` to its end and returns what it wrote to (stdout, stderr)."""
    words, settings = command(script, *args, ranks=ranks), {"cwd": cwd, "env": env()}
    result = subprocess.run(words, capture_output=True, text=True, **settings)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout, result.stderr


def env():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run plot.main in an empty folder -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status = plot.main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def refuses(error, call, *words):
    """The error is of exactly this type, one line long, and has these words."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert "\n" not in message and "\r" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture
def chests(tmp_path):
    return Chests(tmp_path)


@pytest.fixture
def pets_at_home(tmp_path, rng):
    for split, counts in (("train", (2, 3)), ("test", (1, 1))):
        for cls, count in zip(("cat", "Dog"), counts):
            for i in range(count):
                save(tmp_path / split / cls / f"{i}.png", noise(rng, 4 + i, 5, 3))
    return tmp_path
