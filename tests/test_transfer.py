"""Which networks are transferred, and how one is fine-tuned on all images of a target."""

import itertools
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refuses
from grids import QUICK, call, results
from interruption import at_step, run_forked, send

import fewshot
import models
import transfer
from engine.checkpoint import read_tensors
from engine.grid import open_networks
from engine.weights import weights_of
from readers.transforms import NORMALIZATION

MEDICAL = "tuberculosis synthetic-xray-target nih@224+chexpert padchest@256 synthetic-xray~0.4"
NATURAL = "imagenet21k@256 imagenet21k-to-pets nih+imagenet1k synthetic-natural+synthetic-xray"


def open_weights(path, **given):
    options = {"model": None, "source": None, "domain": None} | given
    return transfer.open_network(path, SimpleNamespace(**options))


def test_the_domain_of_foreign_weights_is_that_of_their_source(tmp_path, monkeypatch):
    path, npz = tmp_path / "model.pth.tar", tmp_path / "BiT.npz"
    state = {"model": models.create_model("R14x0.5", 3).state_dict(), "epoch": 90}
    torch.save(state, path)
    npz.touch()
    monkeypatch.setattr(transfer, "weights_of", lambda path: (state, "0"))
    for domain, names in (("medical", MEDICAL), ("natural", NATURAL)):
        for source in names.split():
            opened = open_weights(path, model="R14x0.5", source=source)
            assert (opened.domain, opened.images, opened.sample) == (domain, None, None), source
            assert opened.normalization == NORMALIZATION[domain]
            assert opened.name == f"{source.replace(':', '-')}-R14x0.5"
            # BiT's own networks take pixels in [-1,1] whatever they were trained on.
            bit = open_weights(npz, model="R14x0.5", source=source)
            assert bit.normalization == ((0.5,) * 3, (0.5,) * 3) and bit.domain == domain
        for source in ("folder:x", "my-photos", "table:/a/b.csv"):  # known to nobody else
            opened = open_weights(path, model="R14x0.5", source=source, domain=domain)
            assert opened.domain == domain and opened.normalization == NORMALIZATION[domain]
    for source, near in {"CheXpert": "chexpert", "chexpert+mimc": "mimic", "chexprt": "ch"}.items():
        opening = partial(open_weights, path, model="R14x0.5", source=source)
        refuses(ValueError, opening, f"--source {source}", f"did you mean '{near}", "say --domain")


def test_networks_that_are_found(tmp_path, monkeypatch):
    def found(*checkpoint, method="finetune", model=None):
        args = SimpleNamespace(checkpoint=checkpoint, method=method, model=model, source=None)
        args.scratch_steps = None
        return " ".join(n.name for n in open_networks(args, transfer.open_network))

    monkeypatch.chdir(tmp_path)
    for source, model in (("nih", "R26x0.5"), ("pets", "R14x0.5")):
        facts = {"name": model, "source": source, "domain": "natural", "images": 7}
        facts |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        (tmp_path / "runs" / source).mkdir(parents=True)
        facts["model"] = models.create_model(model, 3).state_dict()
        torch.save(facts, tmp_path / "runs" / source / "model.pt")
    (tmp_path / "runs" / "unfinished").mkdir()
    assert found() == "nih-R26x0.5 pets-R14x0.5 scratch-R14x0.5 scratch-R26x0.5"
    assert found(method="linear") == "nih-R26x0.5 pets-R14x0.5"
    refuses(FileNotFoundError, lambda: found("runs/unfinished"), "unfinished: holds no model.pt;")
    call = partial(found, "runs/pets", model="R50x1")
    refuses(ValueError, call, "model.pt is of R14x0.5, not of --model R50x1")
    # Another seed or recipe of pre-training is another run; a name leads nowhere else.
    file, facts = tmp_path / "runs" / "pets" / "model.pt", facts | {"recipe": "paper", "seed": 1}
    torch.save(facts | {"run": "pets-R14x0.5-seed1"}, file)
    network = open_weights(file)
    assert (network.name, network.recipe, network.seed) == ("pets-R14x0.5-seed1", "paper", 1)
    for name in ("../x", "/x", "a/../../x"):
        torch.save(facts | {"source": name}, file)
        refuses(ValueError, lambda: found("runs/pets"), f"model.pt: '{name}': a dataset's")
    call = partial(weights_of, network.path, network.digest)
    refuses(ValueError, call, "model.pt: is another file than when it was opened")


@pytest.fixture
def words(folder, checkpoint):
    """Options of a transfer of the network to the images that it was trained on."""
    return "--checkpoint", checkpoint, "--target", f"folder:{folder}", "--batch-size", 8, *QUICK


def test_head_is_fresh_and_body_is_not(words, checkpoint, tmp_path, monkeypatch):
    """As many classes as the source had."""
    started, original = [], transfer.Run

    def note(path, model, optimizer, *rest):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        started.append((state, optimizer.param_groups[0].copy()))
        return original(path, model, optimizer, *rest)

    monkeypatch.setattr(transfer, "Run", note)
    for name, more in {"a": ("--seeds", 2), "b": (), "c": ("--recipe", "bit")}.items():
        call(transfer, *words, "--steps", 1, "--out", tmp_path / name, *more)
    source = torch.load(checkpoint / "model.pt", weights_only=True)["model"]
    for state, _ in started:
        assert torch.equal(state["root.conv.weight"], source["root.conv.weight"])
    first, second, again, zero = (state["head.conv.weight"] for state, _ in started)
    assert not torch.equal(first, source["head.conv.weight"])
    assert torch.equal(first, again) and not torch.equal(first, second)
    bound = 1 / np.sqrt(first.shape[1])  # PyTorch's default initialisation
    assert 0.9 * bound < first.abs().max() <= bound
    assert not zero.any() and not started[3][0]["head.conv.bias"].any()
    settings = [(s["clipping"], s["nesterov"], s["momentum"]) for _, s in started[2:]]
    assert settings == [(0.01, True, 0.9), (None, False, 0.9)]


def test_fewshot_on_all_images_is_the_same_run(words, tmp_path, capsys):
    words += ("--steps", 3, "--seeds", 2, "--out")
    call(transfer, *words, tmp_path / "a")
    call(fewshot, *words, tmp_path / "b", "--shots", "full")
    one, other = results(tmp_path / "a"), results(tmp_path / "b")
    assert one.keys() == other.keys() and len(one) == 2
    for name, key in itertools.product(one, ("kind", "metrics", "distance", "config", "layout")):
        assert one[name][key] == other[name][key]
    call(fewshot, *words, tmp_path / "a", "--shots", "full")
    assert "2 cells, 2 finished already" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", (1, 2))
def test_full_shot_transfer_continues(ranks, words, tmp_path):
    argv = ("transfer.py", *words, "--image-size", 16, "--steps", 40, "--log-every", 5, "--out")
    run_forked(transfer.main, (*argv, tmp_path / "a"), tmp_path, ranks=ranks)
    argv, stop = (*argv, tmp_path / "b"), at_step(20, send(signal.SIGTERM), ranks - 1)
    run_forked(transfer.main, argv, tmp_path, 75, stop, ranks)
    (path,) = (tmp_path / "b").glob("*/*/*")
    assert 20 <= read_tensors(path)["step"] <= 21
    ((said, _), *_) = run_forked(transfer.main, argv, tmp_path, ranks=ranks)
    assert "step 20/40" not in said and "step 25/40" in said
    (a,), (b,) = (results(tmp_path / name).values() for name in "ab")
    assert a["metrics"] == b["metrics"] and a["shots"] is None and a["kind"] == "transfer"
    assert a["metrics"]["accuracy"] > 0.6  # chance is a third
    assert [path.name for path in (tmp_path / "b").glob("*/*/*")] == ["full-seed0.json"]
