"""What would be on a GPU, as far as a CPU can tell: fake CUDA tensors, counted operations, imitated
memory and errors."""

import itertools
import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import env, refuses
from grids import call, results
from interruption import CPU
from torch.utils._python_dispatch import TorchDispatchMode

import models
import transfer
from benchmarks.train import training_loop
from engine import evaluate, grid, memory, processes
from engine.optimizer import SGD_AGC
from readers import workers
from readers.images import Array, Decoded, Files, ImageDataset, Joined

CUDA = torch.device("cuda", 0)


# In a process of its own: after fake CUDA tensors PyTorch has threads that no fork survives.
LAYERS = """
import torch, models
from torch._subclasses.fake_tensor import FakeTensorMode
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *args, **more: True
device, dtypes, strides = torch.device("cuda", 0), [], []
def look(layer, inputs, output):
    dtypes.append(output.dtype)
    if isinstance(layer, models.StdConv2d):
        kernel = models.standardize(layer.weight)
        strides.append(kernel.stride(1) == 1 and kernel.stride(3) == kernel.shape[1])
with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
    with device:
        model = models.create_model("R14x0.5", 10)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):  # as place() would
            kernel = layer.weight.detach().to(memory_format=models.LAYOUT["cuda"])
            layer.weight = torch.nn.Parameter(kernel)
        if isinstance(layer, (models.StdConv2d, models.GroupNorm)):
            layer.register_forward_hook(look)
    model(torch.empty(2, 3, 64, 64, device=device))
assert len(dtypes) == 17 + 13 and set(dtypes) == {torch.bfloat16}, set(dtypes)
assert len(strides) == 17 and all(strides)  # 1 x 1 kernels too say that channels come last
"""


def test_every_layer_keeps_bf16_and_channels_last():
    subprocess.run([sys.executable, "-c", LAYERS], env=env(), check=True)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_kept_weights_change_no_output_and_follow_the_weights(precision):
    torch.manual_seed(0)
    cpu, images = CPU._replace(precision=precision), torch.randn(3, 3, 32, 32)
    model = models.create_model("R14x0.5", 4).eval()

    def checked(call=model):
        """Outputs with gradients, where nothing is kept; twice without they are the same."""
        with torch.inference_mode(), cpu.autocast():
            kept = [call(images).clone() for _ in range(2)]
        with cpu.autocast():
            plain = call(images).detach()
        assert torch.equal(kept[0], plain) and torch.equal(kept[1], plain)
        return plain

    first = checked()
    assert model.root.conv.kept is not None
    model(images).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()  # in place, without train()
    assert not torch.equal(checked(), first)
    model.load_state_dict(models.create_model("R14x0.5", 4).state_dict())
    checked()
    model.train()
    assert model.root.conv.kept is None
    # What changes weights without counting it, or lends others, is noticed too.
    model.eval()
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    checked()
    torch.nn.utils.vector_to_parameters(1.5 * flat.roll(1), model.parameters())
    checked()
    for scale in (1, 2, 3):
        lent = {key: value.roll(scale) for key, value in model.named_parameters()}
        checked(partial(torch.func.functional_call, model, lent))
    with torch.inference_mode():
        assert models.create_model("R14x0.5", 3).eval()(images).isfinite().all()
    assert not any("kept" in key for key in model.state_dict())


VIEWS = "view expand split unbind split_with_sizes alias detach slice select _unsafe_view".split()


class Counted(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device_and_clipping_takes_few_launches():
    model = models.create_model("R50x1", 10)
    optimizer = SGD_AGC(model.parameter_groups(), 0.01)
    assert all(group["fused"] for group in optimizer.param_groups)
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    loop = training_loop(model, optimizer, itertools.repeat((images, labels, 2)), 2, CPU)
    next(loop), next(loop)
    with Counted() as counted:
        next(loop)
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero"} & set(counted.names)
    with Counted() as counted:
        optimizer.step()
    launching = [name for name in counted.names if name not in VIEWS]
    assert len(launching) < 220  # a launch each, but for lists; it took 467


def test_the_peak_of_a_gpu_is_of_its_precision(monkeypatch):
    names = {"NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA H100 NVL": 835, "NVIDIA A10G": 70}
    monkeypatch.setattr(memory, "measured_flops", lambda *args: 1.0)
    for name, tera in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = memory.peak_flops.__wrapped__
        assert peak(CUDA, "bf16") == tera * 1e12 and peak(CUDA, "tf32") == tera * 5e11
        assert peak(CUDA, "fp32") == 1.0


def test_fp32_is_fp32_unless_asked():
    processes.setup("fp32")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    refuses(ValueError, lambda: processes.setup("tf32"), "--precision tf32")


@pytest.mark.parametrize("name, size, mebibytes", (("R50x1", 224, 39.3), ("R152x4", 480, 1490)))
def test_what_a_step_keeps_of_an_image(name, size, mebibytes):
    """Traced on another count of the same."""
    with torch.device("meta"):
        model = models.create_model(name, 1000)
    found = memory.activation_bytes(model, size, "bf16") / 2**20
    assert found == pytest.approx(mebibytes, rel=0.08)


def test_a_cell_out_of_memory_is_tried_in_more_parts(monkeypatch, tmp_path, capsys):
    """Also the next ones, and the results are those of the whole batch."""
    real, counts = transfer.train, []

    def train(cell, signals, args, env, title, accumulate):
        counts.append(accumulate)
        if accumulate < 4 and not args.accumulate:
            raise torch.OutOfMemoryError("imitated")
        return real(cell, signals, args, env, title, accumulate)

    monkeypatch.setattr(transfer, "train", train)
    monkeypatch.setattr(memory, "PARTS", {})
    words = ("--checkpoint", "scratch", "--target", "synthetic-natural-target", "--steps", 2)
    words += ("--seeds", 2, "--precision", "fp32")
    call(transfer, *words, "--out", tmp_path / "parts")
    assert counts == [1, 2, 4, 4]
    assert capsys.readouterr().out.count("out of memory") == 1
    call(transfer, *words, "--accumulate", 1, "--out", tmp_path / "whole")
    one, other = results(tmp_path, "*/*/*/full-seed0.json").values()
    assert one["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], rel=1e-4)


SCORES = """
import numpy as np, torch
from engine import evaluate, memory, processes
env = processes.Env(0, 1, torch.device("cpu"), "fp32")
class Model(torch.nn.Module):
    def forward(self, images):
        torch.manual_seed(int(images.sum()) % 97)
        return torch.randn(len(images), 21_841)
rows = np.split(np.arange(20_000), range(256, 20_000, 256))
stream = ((torch.from_numpy(r), torch.zeros(len(r), 3, 2, 2, dtype=torch.uint8)) for r in rows)
labels, norm = np.zeros(20_000, np.int64), ((0.5,) * 3, (0.5,) * 3)
found = evaluate.evaluate(Model(), stream, labels, range(21_841), env, norm)
assert found["mean_auc"] is None and found["per_class"] is None and found["top5"] < 0.1, found
print(memory.peak_memory(env.device))
"""


def test_an_evaluation_out_of_memory_goes_on_in_halves():
    counts, images = [], torch.arange(10.0)[:, None]

    def forward(images, most, error=torch.OutOfMemoryError):
        counts.append(len(images))
        if len(images) > most:
            raise error("imitated")
        return 2 * images

    assert torch.equal(evaluate.halved(partial(forward, most=3), images), 2 * images)
    assert counts == [10, 5, 3, 2, 5, 3, 2]
    for error, most, tries in (RuntimeError, 3, 1), (torch.OutOfMemoryError, 0, 5):
        counts.clear()
        refuses(error, partial(evaluate.halved, partial(forward, most=most, error=error), images))
        assert len(counts) == tries


def test_evaluation_of_21841_classes_stays_small():
    """20,000 x 21,841 scores are 1.7 GB; they are never held."""
    out = subprocess.check_output([sys.executable, "-c", SCORES], text=True, env=env())
    assert "left out: 20,000 images x 21,841 classes" in out
    assert int(out.splitlines()[-1]) < 2e9


@pytest.mark.parametrize(
    "error, lost",
    (
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("shapes do not match"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (torch.AcceleratorError("CUDA error: out of memory", 2), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA driver error: unspecified launch failure"), True),
        (torch.AcceleratorError("device-side assert", 1), True),
    ),
)
def test_a_lost_device_ends_the_grid_and_no_other_error_does(error, lost):
    one = grid.Grid([], {}, CPU)

    def run():
        with one.tolerating(types.SimpleNamespace(path="x.json")):
            raise error

    if lost:
        refuses(ValueError, run, "the device is lost", "the same command")
    else:
        run()
    assert list(one.failures) == ([] if lost else ["x.json"])


@pytest.mark.parametrize("cores, processes, expected", ((16, 8, 2), (128, 1, 8)))
def test_a_gpu_has_images_read_ahead(cores, processes, expected, monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda keys, **settings: settings)
    files = Files("", np.array([b"a.png"]), "L")
    pixels = Decoded(torch.empty(0), np.zeros(1), np.zeros((1, 3)), files)
    array = Array("memory", np.zeros((1, 2, 2, 3), np.uint8))
    for reader, count in (
        (files, expected),
        (Joined([Joined([files, files], [0, 1])], [0], np.arange(1)), expected),
        (Joined([pixels], [0], np.arange(1)), 0),
        (Joined([array, pixels], [0, 1]), 0),
    ):
        dataset = ImageDataset("x", reader, np.zeros(1, np.int64), "a", "multiclass", "natural")
        for device, wanted in ((CUDA, count), (CPU.device, 0)):
            settings = workers._loader(None, range(1), dataset, None, device)
            assert settings["num_workers"] == wanted
            assert settings["pin_memory"] == (device.type == "cuda")
