"""models.py against timm's BiT networks, and the loading of weights."""

import os
import re
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch as safetensors
import timm
import torch
import torch.nn.functional as F
from conftest import refuses

import models
from models import create_model, load_weights

# Layers -> BiT's names below resnet/block1/unit01/ and so on, and timm's below stages.0.blocks.0.
LAYERS = {
    "root.conv": ("root_block/standardized_conv2d", "stem.conv"),
    "downsample": ("a/proj/standardized_conv2d", "downsample.conv"),
    "head.gn": ("group_norm", "norm"),
    "head.conv": ("head/conv2d", "head.fc"),
}
for number, letter in ((1, "a"), (2, "b"), (3, "c")):
    LAYERS[f"conv{number}"] = (f"{letter}/standardized_conv2d", f"conv{number}")
    LAYERS[f"gn{number}"] = (f"{letter}/group_norm", f"norm{number}")


def randomize(model, seed=0):
    """Every parameter random, norms and head included, so that no entry can hide behind 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(offset + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def foreign_names(key):
    """An entry of our state dict as BiT's release and as timm name it."""
    block, unit, layer, kind = re.fullmatch(r"(?:body.block(.).unit(..).)?(.+)\.(.+)", key).groups()
    bit, timms = LAYERS[layer]
    npz_kind = {"weight": "gamma", "bias": "beta"}[kind] if "gn" in layer else kind
    bit += "/kernel" if npz_kind == "weight" else f"/{npz_kind}"
    if block:
        bit = f"block{block}/unit{unit}/{bit}"
        timms = f"stages.{int(block) - 1}.blocks.{int(unit) - 1}.{timms}"
    return f"resnet/{bit}", f"{timms}.{kind}"


def timm_state(state):
    return {foreign_names(key)[1]: value for key, value in state.items()}


def write_npz(path, state, norm_shape=(-1,)):
    """The state dict as BiT's release holds it: kernels HWIO, norms flat or (1,1,1,C)."""
    arrays = {}
    for key, value in state.items():
        value = value.detach().numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        arrays[foreign_names(key)[0]] = value.reshape(norm_shape) if "gn" in key else value
    np.savez(path, **arrays)


def small(num_classes=3, seed=0):
    return randomize(create_model("R14x0.5", num_classes), seed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_logits(ours, theirs):
    for size in ((96, 96), (97, 161)):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
        with torch.inference_mode():
            expected, logits = theirs(images), ours(images)
        assert 1 < expected.std() < 10
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ("R50x1", "R101x1"))
def test_same_logits_as_timm_both_ways(name, tmp_path):
    """In fp64, as rounding to fp32 moves such logits of either by up to 1e-4."""
    ours = create_model(name, 7).eval().double()
    theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", num_classes=7).eval()
    torch.save(randomize(theirs, 1).state_dict(), tmp_path / "timm.pth")
    load_weights(ours, tmp_path / "timm.pth")
    assert_same_logits(ours, theirs.double())
    theirs.load_state_dict(timm_state(randomize(ours, 2).state_dict()))
    assert_same_logits(ours, theirs)
    write_npz(tmp_path / "w.npz", randomize(ours, 3).state_dict())
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", models.MODELS)
def test_keys_are_those_of_bit_and_as_many_parameters_as_timm(name):
    with torch.device("meta"):
        ours = create_model(name, 1000)
    expected = ["root.conv.weight"]
    for stage, units in enumerate(models.MODELS[name].blocks, 1):
        for unit in range(1, units + 1):
            prefix = f"body.block{stage}.unit{unit:02d}."
            for i in (1, 2, 3):
                expected += [f"{prefix}gn{i}.weight", f"{prefix}gn{i}.bias"]
                expected += [f"{prefix}conv{i}.weight"]
            # The first unit of every stage widens its input fourfold or twofold.
            expected += [prefix + "downsample.weight"] if unit == 1 else []
    expected += [f"head.{part}" for part in ("gn.weight", "gn.bias", "conv.weight", "conv.bias")]
    assert sorted(ours.state_dict()) == sorted(expected)
    if name.startswith(("R50", "R101", "R152")):
        with torch.device("meta"):
            theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", num_classes=1000)
        counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("name, width", (("R14x0.5", 0.5), ("R26x1", 1)))
def test_head_of_features_is_the_logits_and_its_weight_alone_not_clipped(name, width):
    model = randomize(create_model(name, 32)).eval()  # as many outputs as a root has filters
    images = torch.randn(2, 3, 33, 40)
    with torch.inference_mode():
        features = model.features(images)
        logits = F.linear(features, model.head.conv.weight.flatten(1), model.head.conv.bias)
        assert features.shape == (2, 2048 * width)
        torch.testing.assert_close(model(images), logits, rtol=1e-5, atol=1e-5)
    body, head = model.parameter_groups()
    assert "clipping" not in body and head["clipping"] is None
    assert [id(p) for p in head["params"]] == [id(model.head.conv.weight)]
    together = [id(p) for p in (*body["params"], *head["params"])]
    assert sorted(together) == sorted(id(p) for p in model.parameters())


def test_activation_checkpointing_changes_no_gradient():
    images, labels = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    losses, gradients = [], []
    for recompute in (False, True):
        model = randomize(create_model("R26x0.5", 3, recompute)).train()
        calls = []
        model.body.block1.unit01.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert len(calls) == 1 + recompute  # the block did run again in the backward pass
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(*losses) and same(*gradients)


def plain_standardize(weight):
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / (variance + 1e-10).sqrt()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_standardized_filters_and_their_gradient(layout):
    generator = torch.Generator().manual_seed(0)
    weight = 3 + torch.randn(6, 5, 3, 3, generator=generator)
    weight = weight.contiguous(memory_format=layout)
    result = models.standardize(weight)
    assert result.shape == weight.shape and result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(result, plain_standardize(weight), rtol=1e-4, atol=1e-5)
    weight = weight.double().requires_grad_()
    outer = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(models.standardize(weight), weight, outer)
    (expected,) = torch.autograd.grad(plain_standardize(weight), weight, outer)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


PREFIXES = {"parallel": "module.", "ab": "_orig_mod.module.", "ba": "module._orig_mod."}


def save(path, state):
    """In one of the formats, by the name of the file."""
    name = path.name.split(".")[0]
    if path.suffix == ".npz":
        write_npz(path, state, (1, 1, 1, -1) if name == "wide" else (-1,))
    elif path.suffix == ".pt":
        torch.save({"model": state, "name": "R14x0.5", "classes": ("a", "b", "c")}, path)
    elif path.suffix == ".pth":
        torch.save(timm_state(state), path)
    else:  # as published, with NumPy's numbers
        state = {f"{PREFIXES.get(name, '')}{key}": value for key, value in state.items()}
        if name == "ab":  # with a block compiled by itself
            state = {key.replace("unit01.", "unit01._orig_mod."): state[key] for key in state}
        numbers = {"epoch": np.int64(3), "auc": np.float32(0.5), "best": np.bool_(True)}
        torch.save({"model": state, "optimizer": {"lr": np.float64(0.1)}, **numbers}, path)


FILES = "model.pt model.pth.tar parallel.pth.tar ab.pth.tar ba.pth.tar timm.pth flat.npz wide.npz"


@pytest.mark.parametrize("name", FILES.split())
def test_every_format_gives_the_weights_back(name, tmp_path):
    saved, model, five = small(3, 1).state_dict(), small(3, 2), small(5, 2)
    save(tmp_path / name, saved)
    assert not same(saved, model.state_dict())
    load_weights(model, tmp_path / name)
    assert same(saved, model.state_dict())
    # A head of another size stays fresh.
    load_weights(five, tmp_path / name)
    assert same(five.head.conv.state_dict(), small(5, 2).head.conv.state_dict())
    body = [key for key in saved if not key.startswith("head.conv")]
    assert all(torch.equal(saved[key], five.state_dict()[key]) for key in body)
    # Another network is refused by its keys, and nothing is loaded in part.
    other = randomize(create_model("R26x0.5", 3), 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    said = "(36 differences: body.block1.unit02.gn1.weight is missing; ", "; give the --model"
    refuses(ValueError, partial(load_weights, other, tmp_path / name), *said)
    assert same(before, other.state_dict())


def test_another_width_is_refused_by_its_shapes(tmp_path):
    save(tmp_path / "model.pt", create_model("R26x1", 3).state_dict())
    call = partial(load_weights, create_model("R26x0.5", 3), tmp_path / "model.pt")
    refuses(ValueError, call, "root.conv.weight is (64, ", "for (32, ")


def test_weights_by_two_names_are_refused(tmp_path):
    path, state = tmp_path / "w.pth", small().state_dict()
    torch.save(state | {f"module.{key}": -value for key, value in state.items()}, path)
    said = "w.pth: holds some weights twice, by two names; keep one"
    refuses(ValueError, partial(load_weights, small(), path), said)


def test_numpy_numbers_and_a_head_of_10000_classes_as_published(tmp_path):
    save(tmp_path / "model.pth.tar", small().state_dict())
    content = models.read_weights(tmp_path / "model.pth.tar")
    assert (content["epoch"], content["auc"], content["optimizer"]["lr"]) == (3, 0.5, 0.1)
    path = tmp_path / "numpy1.pt"
    torch.save({"auc": np.float32(0.5)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    assert models.read_weights(path) == {"auc": 0.5}
    path.write_bytes(path.read_bytes().replace(b"f4", b"zz"))  # no type of NumPy's
    refuses(ValueError, partial(models.read_weights, path), "numpy1.pt: damaged")
    with torch.device("meta"):
        content["model"] = create_model("R152x4", 10_000).state_dict()
        state = models.matching_state(create_model("R152x4", 14), "model.pth.tar", content)
    assert state["head.conv.weight"].shape == (14, 8192, 1, 1)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", (True, False))
def test_pickled_code_is_refused_and_not_run(zipped, tmp_path):
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    contents = {"model": small().state_dict(), "extra": Code(marker)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    refuses(ValueError, partial(load_weights, small(), path), "model.pt: refused", "holds code")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was dangerous indeed


def test_foreign_formats_are_refused_with_a_mend_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("omegaconf")
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf"})
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    saved = small(3, 1).state_dict()
    torch.save({"model": saved, "config": module.DictConfig()}, "study.pth.tar")
    safetensors.save_file(timm_state(saved), "bit.safetensors")
    for name in ("study.pth.tar", "bit.safetensors"):
        with pytest.raises(ValueError, match=f"^{name}: .*: torch.save.*$") as caught:
            load_weights(small(3, 2), name)
        message = str(caught.value)
        exec(message[message.index("torch.save") :])
        load_weights(model := small(3, 2), "weights.pth")
        assert same(saved, model.state_dict())
        os.remove("weights.pth")
