"""engine.py: metrics beside scikit-learn, the optimiser beside a plain loop, files, options."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics

import data
import models
from engine import checkpoint as records
from engine import console
from engine import processes as engine
from engine.metrics import loss_sum
from engine.optimizer import make_optimizer
from readers.transforms import NORMALIZATION, Pipeline, keep

nan = math.nan
CPU = engine.Env(0, 1, torch.device("cpu"), "fp32")


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_auc_and_ap_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 60))
    scores = rng.integers(0, rng.integers(2, 12), count)  # few values: most scores are tied
    targets = rng.integers(0, 2, count)
    targets[:2] = 0, 1
    expected = sklearn_metrics.roc_auc_score(targets, scores)
    assert engine.roc_auc(scores, targets) == pytest.approx(expected, abs=1e-12)
    expected = sklearn_metrics.average_precision_score(targets, scores)
    assert engine.average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("targets", ([0, 0, 0], [1, 1, 1], []))
def test_auc_and_ap_of_one_class_are_undefined(targets):
    scores = np.arange(len(targets))
    assert math.isnan(engine.roc_auc(scores, targets))
    assert math.isnan(engine.average_precision(scores, targets))


def test_multiclass_metrics():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 7)).astype(np.float32)
    labels = rng.integers(0, 6, 200)  # class "6" is absent
    classes = tuple("0123456")
    found = engine.compute_metrics(torch.from_numpy(logits), labels, classes)
    probability = torch.from_numpy(logits).double().softmax(1).numpy()
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-12)
    top5 = sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(7))
    assert found["top5"] == pytest.approx(top5, abs=1e-12)
    loss = sklearn_metrics.log_loss(labels, probability, labels=range(7))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    aucs, aps = [], []
    for c in range(6):
        truth, one = labels == c, found["per_class"][str(c)]
        aucs.append(sklearn_metrics.roc_auc_score(truth, probability[:, c]))
        aps.append(sklearn_metrics.average_precision_score(truth, probability[:, c]))
        assert one["auc"] == pytest.approx(aucs[-1], abs=1e-12)
        assert one["ap"] == pytest.approx(aps[-1], abs=1e-12)
        expected = sklearn_metrics.f1_score(truth, predicted == c)
        assert one["f1"] == pytest.approx(expected, abs=1e-12)
        assert (one["positives"], one["negatives"]) == (truth.sum(), (~truth).sum())
    assert found["per_class"]["6"]["auc"] is None and found["per_class"]["6"]["ap"] is None
    assert found["mean_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)
    assert found["mean_ap"] == pytest.approx(np.mean(aps), abs=1e-12)


def test_multilabel_metrics_leave_out_what_is_not_annotated():
    rng = np.random.default_rng(1)
    logits = rng.integers(-3, 4, (150, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (150, 4)).astype(np.float32)
    labels[rng.random((150, 4)) < 0.3] = nan
    labels[:, 2] = np.where(np.isnan(labels[:, 2]), nan, 0)  # no positive
    labels[:, 3] = nan  # nobody annotated it
    found = engine.compute_metrics(logits, labels, ("a", "b", "c", "d"))
    valid = ~np.isnan(labels)
    right = (logits > 0) == (labels == 1)
    assert found["accuracy"] == pytest.approx(right[valid].mean(), abs=1e-12)
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -np.where(labels == 1, np.log(chance), np.log(1 - chance))
    assert found["loss"] == pytest.approx(losses[valid].mean(), rel=1e-5)
    aucs, aps = [], []
    for c, name in enumerate("ab"):
        kept, one = valid[:, c], found["per_class"][name]
        truth, scores = labels[kept, c], logits[kept, c]
        aucs.append(sklearn_metrics.roc_auc_score(truth, scores))
        aps.append(sklearn_metrics.average_precision_score(truth, scores))
        assert one["auc"] == pytest.approx(aucs[-1], abs=1e-12)
        assert one["ap"] == pytest.approx(aps[-1], abs=1e-12)
        expected = sklearn_metrics.f1_score(truth, scores > 0)
        assert one["f1"] == pytest.approx(expected, abs=1e-12)
    assert found["mean_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)
    assert found["mean_ap"] == pytest.approx(np.mean(aps), abs=1e-12)
    nothing = {"auc": None, "ap": None, "f1": None, "positives": 0, "negatives": 0}
    assert found["per_class"]["d"] == nothing
    assert found["per_class"]["c"]["auc"] is None and found["top5"] is None


def test_metrics_of_two_classes_have_no_top5():
    found = engine.compute_metrics([[1.0, 0.0], [0.0, 1.0]], [0, 0], ("no", "yes"))
    assert (found["accuracy"], found["top5"], found["mean_auc"]) == (0.5, None, None)


@pytest.mark.parametrize("labels", ([2, 2, 2], [[0, nan, 1], [nan, nan, 1], [0, nan, 1]]))
def test_undefined_metrics_are_strict_json(labels):
    found = engine.compute_metrics(torch.eye(3), labels, ("a", "b", "c"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("value", (nan, math.inf, -math.inf))
def test_outputs_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        engine.compute_metrics([[value, 0.0], [0.0, 1.0]], [0, 1], ("a", "b"))


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def test_multiclass_loss_is_a_sum_in_fp32():
    logits, labels = torch.randn(9, 4).bfloat16(), torch.arange(9) % 4
    found = loss_sum(logits, labels, "multiclass")
    assert found.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), labels) * 9
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_multilabel_loss_and_its_gradient_pass_over_nan():
    logits = torch.tensor([[0.5, -2.0, 3.0], [1.0, 40.0, -40.0]], requires_grad=True)
    labels = torch.tensor([[1, nan, 0], [0, nan, nan]])
    found = loss_sum(logits, labels, "multilabel")
    expected = math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3.0)) + math.log1p(math.e)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    found.backward()
    sigmoid = torch.sigmoid(logits.detach())
    by_hand = [[sigmoid[0, 0] - 1, 0, sigmoid[0, 2]], [sigmoid[1, 0], 0, 0]]
    torch.testing.assert_close(logits.grad, torch.tensor(by_hand))


# ------------------------------------------------------------------------------------------------
# Optimiser
# ------------------------------------------------------------------------------------------------

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)


def parameters(seed=0):
    """Weights of a convolution, a linear layer and a norm; one filter is 0, so that eps counts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (4, 3, 3, 3), (5, 6), (7,)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    params[0].data[1] = 0
    return params


def set_gradients(params, step, scale):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator)


def clip_by_loop(p, clipping, eps):
    """Adaptive gradient clipping as the paper writes it, unit by unit."""
    units = range(len(p)) if p.ndim > 1 else [slice(None)]
    for unit in units:
        bound = clipping * max(float(p.detach()[unit].norm()), eps)
        norm = float(p.grad[unit].norm())
        if norm > bound:
            p.grad[unit] *= bound / norm


@pytest.mark.parametrize("clipping", (None, 0.01))
def test_agc_is_plain_sgd_where_nothing_is_clipped(clipping):
    ours, theirs = parameters(), parameters()
    optimizer = engine.SGD_AGC(ours, clipping=clipping, **SETTINGS)
    # The same kernels, so that equal means bitwise equal.
    kernels = {key: optimizer.param_groups[0][key] for key in ("foreach", "fused")}
    reference = torch.optim.SGD(theirs, **SETTINGS, **kernels)
    start = [p.detach().clone() for p in ours]
    for step in range(5):
        for params in (ours, theirs):
            set_gradients(params, step, scale=1.0 if clipping is None else 1e-7)
        optimizer.step()
        reference.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    assert not any(torch.equal(p, q) for p, q in zip(ours, start))


def test_agc_equals_a_loop_over_units():
    ours, theirs, plain = parameters(), parameters(), parameters()
    optimizer = engine.SGD_AGC(ours, clipping=0.01, eps=1e-3, **SETTINGS)
    reference, unclipped = (torch.optim.SGD(p, **SETTINGS) for p in (theirs, plain))
    for step in range(6):
        for params in (ours, theirs, plain):
            set_gradients(params, step, scale=0.01)  # some units are longer than their bound
        for p in theirs:
            clip_by_loop(p, 0.01, 1e-3)
        for one in (optimizer, reference, unclipped):
            one.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    for p, q in zip(ours, plain):
        assert (p - q).abs().max() > 1e-4  # the clipping did matter


def test_groups_without_clipping_are_left_alone():
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:1]}, {"params": ours[1:], "clipping": None}]
    optimizer = engine.SGD_AGC(groups, clipping=0.01, **SETTINGS)
    reference = torch.optim.SGD(theirs, **SETTINGS)
    for params in (ours, theirs):
        set_gradients(params, 0, scale=1.0)
    optimizer.step()
    reference.step()
    for p, q in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert (ours[0] - theirs[0]).abs().max() > 0.05


def test_optimizer_exempts_the_head_alone():
    model = models.create_model("R14x0.5", 32)  # as many outputs as the root has filters
    groups = make_optimizer(model, 0.1, clipping=0.01).param_groups
    unclipped = {id(p) for group in groups if group["clipping"] is None for p in group["params"]}
    assert unclipped == {id(p) for p in model.head.conv.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_optimizer_state_round_trip(tmp_path):
    def run(params, optimizer, steps):
        for step in steps:
            set_gradients(params, step, scale=0.1)
            optimizer.step()

    whole, parts = parameters(), parameters()
    optimizer = engine.SGD_AGC(whole, **SETTINGS)
    run(whole, optimizer, range(6))
    first = engine.SGD_AGC(parts, clipping=0.01, **SETTINGS)
    run(parts, first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = engine.SGD_AGC(parts, lr=9.0, clipping=0.5)  # the state brings the settings along
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(parts, second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole, parts))


def test_optimizer_state_may_come_in_another_memory_format():
    """A checkpoint of a GPU has its momentum in channels_last; the CPU's weights are contiguous."""
    ours, theirs = parameters(), parameters()
    pair = [engine.SGD_AGC(params, clipping=None, **SETTINGS) for params in (ours, theirs)]
    for step in range(3):
        for params, optimizer in zip((ours, theirs), pair):
            set_gradients(params, step, scale=1.0)
            optimizer.step()
        if step == 0:
            state = pair[0].state_dict()
            momentum = state["state"][0]["momentum_buffer"]
            state["state"][0]["momentum_buffer"] = momentum.contiguous(
                memory_format=torch.channels_last
            )
            pair[0].load_state_dict(state)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


class Pooled(torch.nn.Module):
    """Logits: the means of four bands of the columns; keeps the size of each batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images.mean(1).unflatten(2, (4, 2)).mean((1, 3))


def in_memory(labels, classes, task):
    rng = np.random.default_rng(0)  # two equal scores would be ordered by rounding
    images = torch.from_numpy(rng.integers(0, 256, (len(labels), 1, 8, 8), np.uint8))
    return images, data.ImageDataset(
        "memory", lambda i, size: images[i], labels, classes, task, "medical"
    )


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_evaluation_sees_each_image_once_and_in_order(task):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 10)
    if task == "multilabel":
        labels = rng.choice(np.array([0, 1, nan], np.float32), (10, 4))
    images, dataset = in_memory(labels, tuple("abcd"), task)
    pipeline, model = Pipeline(keep, keep), Pooled()
    normalization = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    found = engine.evaluate(model, dataset, pipeline, CPU, normalization, batch_size=4)
    assert model.batches == [4, 4, 2]
    mean, std = (np.array(v)[:, None, None] for v in normalization)
    inputs = (images.numpy() / 255 - mean) / std  # grey becomes three channels
    logits = inputs.mean(1).reshape(10, 8, 4, 2).mean((1, 3))
    expected = engine.compute_metrics(logits, labels, tuple("abcd"))
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["mean_auc"] == pytest.approx(expected["mean_auc"], abs=1e-9)
    assert found["per_class"].keys() == set("abcd")


@pytest.mark.gpu
def test_evaluation_on_a_gpu_equals_the_cpu():
    images, dataset = in_memory(np.arange(10) % 3, tuple("abc"), "multiclass")
    pipeline, normalization = (
        Pipeline(keep, keep),
        NORMALIZATION["medical"],
    )
    found = []
    for env in (CPU, CPU._replace(device=torch.device("cuda", 0))):
        torch.manual_seed(0)
        model = models.place(models.create_model("R14x0.5", 3), env.device)
        found.append(engine.evaluate(model, dataset, pipeline, env, normalization, batch_size=4))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-2)


# ------------------------------------------------------------------------------------------------
# Files and options
# ------------------------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    console.write_json(path, {"value": 1})

    def crash(temporary):
        temporary.write_text('{"val')
        assert [p.name for p in tmp_path.iterdir() if p != path] == [temporary.name]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        console.write_atomically(path, crash)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == {"value": 1}


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        console.write_json(tmp_path / "result.json", {"value": nan})
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_options_is_refused_by_the_option():
    theirs = {"lr": 0.1, "decays": (3, 6), "workers": 0}
    records.check_same_config("file", theirs, {"lr": 0.1, "decays": [3, 6], "workers": 8})
    with pytest.raises(ValueError, match=r"file was made with lr = 0\.1, not 0\.2; use the same"):
        records.check_same_config("file", theirs, {**theirs, "lr": 0.2})
    with pytest.raises(ValueError, match="made with clipping = None, not 0.01"):
        records.check_same_config("file", theirs, {**theirs, "clipping": 0.01})


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--bach-size", "4"], "error: unknown option --bach-size; did you mean --batch-size?"),
        (["--bach-size=4"], "error: unknown option --bach-size; did you mean --batch-size?"),
        (["--batch", "4"], "error: unknown option --batch; did you mean --batch-size?"),
        (["--batch-size", "0"], "error: argument --batch-size: 0 is not above zero"),
        (["--lr", "nan"], "error: argument --lr: nan is not above zero"),
        (["--batch-size", "x"], "error: argument --batch-size: invalid int value: 'x'"),
        (
            ["--precision", "fp16"],
            "error: argument --precision: unknown 'fp16', did you mean bf16? (auto, fp32, bf16)",
        ),
    ),
)
def test_a_wrong_option_is_one_line_and_status_2(arguments, message, capsys):
    parser = console.Parser("A script.")
    engine.add_common_options(parser, out="runs")
    with pytest.raises(SystemExit) as caught:
        engine.run(lambda: parser.parse_args(arguments))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err) == (2, "", message + "\n")


def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)

    def main():
        raise ValueError("no such column")

    with pytest.raises(SystemExit) as caught:
        engine.run(main)
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: no such column\n")
