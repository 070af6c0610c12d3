"""models.py against timm's BiT networks, and the loading of weights."""

import os

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import models
from models import create_model, load_weights

BIT_SIZES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
# The state dict's kinds of entry -> BiT's names below resnet/; {} is block1/unit01 and so on.
NPZ_NAMES = {
    "root.conv.weight": "root_block/standardized_conv2d/kernel",
    "conv1.weight": "{}/a/standardized_conv2d/kernel",
    "conv2.weight": "{}/b/standardized_conv2d/kernel",
    "conv3.weight": "{}/c/standardized_conv2d/kernel",
    "downsample.weight": "{}/a/proj/standardized_conv2d/kernel",
    "gn1.weight": "{}/a/group_norm/gamma",
    "gn1.bias": "{}/a/group_norm/beta",
    "gn2.weight": "{}/b/group_norm/gamma",
    "gn2.bias": "{}/b/group_norm/beta",
    "gn3.weight": "{}/c/group_norm/gamma",
    "gn3.bias": "{}/c/group_norm/beta",
    "head.gn.weight": "group_norm/gamma",
    "head.gn.bias": "group_norm/beta",
    "head.conv.weight": "head/conv2d/kernel",
    "head.conv.bias": "head/conv2d/bias",
}


def randomize(model, seed=0):
    """Every parameter random, norms and head included, so that no entry can hide behind 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if "gn" in name and name.endswith("weight") else 0.0
            p.copy_(offset + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def write_npz(path, state, gamma_shape=(-1,)):
    """The state dict as BiT's release holds it: kernels HWIO, norms flat or (1,1,1,C)."""
    arrays = {}
    for key, value in state.items():
        unit, kind = "", key
        if key.startswith("body."):
            block, unit, kind = key.removeprefix("body.").split(".", 2)
            unit = f"{block}/{unit}"
        value = value.detach().numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif "gn" in kind:
            value = value.reshape(gamma_shape)
        arrays["resnet/" + NPZ_NAMES[kind].format(unit)] = value
    np.savez(path, **arrays)


def small(num_classes=3, seed=0):
    return randomize(create_model("R14x0.5", num_classes), seed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("R50x1", "R101x1"))
def test_same_logits_as_timm(name, tmp_path):
    write_npz(tmp_path / "w.npz", randomize(create_model(name, 7)).state_dict())
    ours = create_model(name, 7).eval()
    load_weights(ours, tmp_path / "w.npz")
    theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", num_classes=7).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    for size in ((224, 224), (197, 161)):
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected, logits = theirs(images), ours(images)
        assert expected.std() > 0.01
        assert (logits - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", BIT_SIZES)
def test_same_parameter_count_as_timm(name):
    with torch.device("meta"):
        ours = create_model(name, 1000)
        theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", num_classes=1000)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", models.MODELS)
def test_state_dict_keys_are_those_of_bit(name):
    with torch.device("meta"):
        keys = list(create_model(name, 5).state_dict())
    expected = ["root.conv.weight"]
    for stage, units in enumerate(models.MODELS[name][0], 1):
        for unit in range(1, units + 1):
            prefix = f"body.block{stage}.unit{unit:02d}."
            for i in (1, 2, 3):
                expected += [f"{prefix}gn{i}.weight", f"{prefix}gn{i}.bias"]
                expected += [f"{prefix}conv{i}.weight"]
            # The first unit of every stage widens its input fourfold or twofold.
            expected += [prefix + "downsample.weight"] if unit == 1 else []
    expected += [f"head.{part}" for part in ("gn.weight", "gn.bias", "conv.weight", "conv.bias")]
    assert sorted(keys) == sorted(expected)


@pytest.mark.parametrize("name, width", (("R14x0.5", 0.5), ("R26x1", 1)))
def test_head_of_features_is_the_logits(name, width):
    model = randomize(create_model(name, 4)).eval()
    images = torch.randn(2, 3, 33, 40)
    with torch.inference_mode():
        features = model.features(images)
        logits = F.linear(features, model.head.conv.weight.flatten(1), model.head.conv.bias)
        assert features.shape == (2, 2048 * width)
        torch.testing.assert_close(model(images), logits, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient():
    images, labels = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 0])
    losses, gradients = [], []
    for recompute in (False, True):
        model = create_model("R26x0.5", 3, checkpoint_activations=recompute).train()
        randomize(model)
        calls = []
        model.body.block1.unit01.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert len(calls) == 1 + recompute  # the block did run again in the backward pass
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(*losses)
    assert same(*gradients)


def test_unknown_model_names_the_near_match():
    with pytest.raises(ValueError, match="R50x2.*did you mean 'R50x[13]'"):
        create_model("R50x2", 10)


@pytest.mark.slow
def test_compiles_as_one_graph():
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(compiled, model(images), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Weight standardisation
# ------------------------------------------------------------------------------------------------


def plain_standardize(weight):
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / (variance + 1e-10).sqrt()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_standardized_filters(layout):
    weight = 3 + torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight.contiguous(memory_format=layout)
    result = models.standardize(weight)
    assert result.shape == weight.shape and result.is_contiguous(memory_format=layout)
    variance, mean = torch.var_mean(result.double(), (1, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(6).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, torch.ones(6).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(result, plain_standardize(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gradient_of_standardization(layout):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    weight = weight.contiguous(memory_format=layout).requires_grad_()
    outer = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(models.standardize(weight), weight, outer)
    (expected,) = torch.autograd.grad(plain_standardize(weight), weight, outer)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------
# Loading weights
# ------------------------------------------------------------------------------------------------


def save_own(path, state):
    torch.save({"model": state, "name": "R14x0.5", "classes": ("a", "b", "c")}, path)


def save_published(path, state):
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}}, path)


def save_published_parallel(path, state):
    save_published(path, {f"module.{key}": value for key, value in state.items()})


def save_npz(path, state):
    write_npz(path, state)


def save_npz_wide_norms(path, state):
    write_npz(path, state, gamma_shape=(1, 1, 1, -1))


FORMATS = {
    "model.pt": save_own,
    "model.pth.tar": save_published,
    "parallel.pth.tar": save_published_parallel,
    "flat.npz": save_npz,
    "wide.npz": save_npz_wide_norms,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_weights_back(name, tmp_path):
    saved, model = small(seed=1).state_dict(), small(seed=2)
    assert not same(saved, model.state_dict())
    FORMATS[name](tmp_path / name, saved)
    load_weights(model, tmp_path / name)
    assert same(saved, model.state_dict())


@pytest.mark.parametrize("name", FORMATS)
def test_head_of_another_size_stays_fresh(name, tmp_path):
    saved, model = small(3, seed=1).state_dict(), small(5, seed=2)
    fresh = {key: value.clone() for key, value in model.head.conv.state_dict().items()}
    FORMATS[name](tmp_path / name, saved)
    load_weights(model, tmp_path / name)
    assert same(fresh, model.head.conv.state_dict())
    body = [key for key in saved if not key.startswith("head.conv")]
    assert all(torch.equal(saved[key], model.state_dict()[key]) for key in body)


@pytest.mark.parametrize("name", FORMATS)
def test_another_network_is_refused_by_its_keys(name, tmp_path):
    FORMATS[name](tmp_path / name, small().state_dict())
    model = randomize(create_model("R26x0.5", 3), seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"body\.block1\.unit02\.gn1\.weight is missing"):
        load_weights(model, tmp_path / name)
    assert same(before, model.state_dict())  # nothing was loaded in part


def test_another_width_is_refused_by_its_shapes(tmp_path):
    save_own(tmp_path / "model.pt", create_model("R26x1", 3).state_dict())
    with pytest.raises(ValueError, match=r"root\.conv\.weight is \(64, .*for \(32, "):
        load_weights(create_model("R26x0.5", 3), tmp_path / "model.pt")


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
    with pytest.raises(ValueError, match="model.pt: refused.*holds code"):
        load_weights(small(), path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was dangerous indeed


def broken_files(folder):
    """{what is wrong: path}"""
    save_own(folder / "whole.pt", small().state_dict())
    write_npz(folder / "whole.npz", small().state_dict())
    for name in ("whole.pt", "whole.npz"):
        contents = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(contents[: len(contents) // 2])
    np.savez(folder / "objects.npz", **{"resnet/x": np.array([{"code": 1}], dtype=object)})
    (folder / "empty.pt").write_bytes(b"")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.pt").write_text("weights of a network")
    torch.save([torch.zeros(3)], folder / "list.pt")
    torch.save({"model": 3}, folder / "number.pt")


@pytest.mark.parametrize(
    "name",
    "cut-whole.pt cut-whole.npz objects.npz empty.pt empty.npz text.pt list.pt number.pt".split(),
)
def test_broken_file_is_refused_in_one_line(name, tmp_path):
    broken_files(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_weights(small(), tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*absent.pt"):
        load_weights(small(), tmp_path / "absent.pt")
