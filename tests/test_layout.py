"""The same training in any layout: ranks, parts of a batch, workers, recomputation, compilation."""

import json
import math
import signal
import sys

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, run
from trees import save

import models
import pretrain
from data import load_dataset
from engine import memory as hardware
from engine import processes as engine
from engine.optimizer import make_optimizer
from readers import cache as loading
from readers.transforms import NORMALIZATION, Pipeline, keep, pretraining_pipeline

nan = math.nan
CPU = engine.Env(0, 1, torch.device("cpu"), "fp32")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

# Several runs in one process group: starting Python and torchrun takes longer than a run.
SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from engine import processes as engine
import pretrain

def main():
    for sys.argv in json.load(open(sys.argv[1])):
        pretrain.main()

if __name__ == "__main__":
    engine.run(main)
"""


def argv(source, out, *more):
    common = ("--source", source, "--precision", "fp32", "--image-size", 32, "--log-every", 1)
    return [str(word) for word in ("pretrain.py", *common, "--out", out, *more)]


def pretrain_here(*words):
    """pretrain.py in this process, which keeps its own way with signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    kept[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv(*words))
        try:
            pretrain.main()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def pretrain_on_two_ranks(folder, jobs):
    (folder / "several.py").write_text(SEVERAL)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(folder / "several.py", folder / "jobs.json", ranks=2, cwd=folder)


def steps(out):
    """The lines of log.jsonl that tell of training."""
    (path,) = out.glob("*/log.jsonl")
    return [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def column(out, name):
    return [line[name] for line in steps(out)]


def result(out):
    (path,) = out.glob("*/result.json")
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------
# One run, many layouts
# ------------------------------------------------------------------------------------------------

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
CHESTS, CHEST_BATCH = 96, 12
# On every rank and in every part another number of images: 13 is 7 + 6, 5 + 5 + 3, 4 + 3 + 3 + 3.
SOURCES = {
    "folder": ("--batch-size", 13, "--epochs", 6.5, "--lr", 0.1, "--clipping", 0.01),
    "chexpert": ("--batch-size", CHEST_BATCH, "--epochs", 3.75, "--lr", 0.03),
}
ON_ONE = {
    "accumulate": ("--accumulate", 3),
    "recompute": ("--checkpoint-activations",),
    "workers": ("--workers", 2),
}
ON_TWO = {"two": (), "two-accumulate": ("--accumulate", 2)}


@pytest.fixture(scope="module")
def chexpert_root(tmp_path_factory):
    """CheXpert in its official layout: half of the images have no mark at all.

    They are every second one of the order of the first epoch of seed 0.
    """
    root, rng = tmp_path_factory.mktemp("datasets"), np.random.default_rng(0)
    order, _ = loading.batch_indices(0, CHESTS, CHESTS, seed=0)
    unmarked = set(order[1::2].tolist())
    for part, count in (("train", CHESTS), ("valid", 21)):
        rows = [CHEXPERT_HEADER]
        for i in range(count):
            path = f"CheXpert-v1.0/{part}/patient{i:05d}/study1/view1_frontal.jpg"
            # The marks of an image are from one to all.
            marks = rng.choice(["", "0.0", "1.0", "-1.0"], 13, p=[0.5, 0.2, 0.2, 0.1])
            marks[rng.integers(13)] = "1.0"
            if part == "valid":
                marks = rng.choice(["0.0", "1.0"], 13)
            if part == "train" and i in unmarked:
                marks = [""] * 13
            rows.append(f"{path},Male,60,Frontal,PA,,{','.join(marks)}")
            save(root / path, rng.integers(0, 256, (40, 36), dtype=np.uint8))
        (root / "CheXpert-v1.0" / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def runs(folder, chexpert_root, tmp_path_factory):
    """30 steps in each layout, in OUT/SOURCE/LAYOUT."""
    out = tmp_path_factory.mktemp("runs")
    words = {
        "folder": (f"folder:{folder}", SOURCES["folder"]),
        "chexpert": ("chexpert", (*SOURCES["chexpert"], "--data-dir", chexpert_root)),
    }
    for name, (source, options) in words.items():
        for layout, more in ({"one": ()} | ON_ONE).items():
            pretrain_here(source, out / name / layout, *options, *more)
    pretrain_on_two_ranks(
        out,
        [
            argv(source, out / name / layout, *options, *more)
            for name, (source, options) in words.items()
            for layout, more in ON_TWO.items()
        ],
    )
    return out


def test_in_the_first_epoch_one_rank_has_no_label(chexpert_root):
    dataset = load_dataset("chexpert", chexpert_root)
    assert np.isnan(dataset.labels).all(1).sum() == CHESTS // 2
    found = []
    for rank in (0, 1):
        batches = loading.Batches(dataset, Pipeline(keep, keep), CHEST_BATCH, rank=rank, ranks=2)
        labels = [batches[step][1] for step in range(CHESTS // CHEST_BATCH)]
        found.append([int((~part.isnan()).sum()) for part in labels])
    assert min(found[0]) > 0 and found[1] == [0] * 8


@pytest.mark.parametrize("layout", [*ON_ONE, *ON_TWO])
@pytest.mark.parametrize("source", SOURCES)
def test_any_layout_gives_the_same_training(source, layout, runs):
    one, other = runs / source / "one", runs / source / layout
    losses = column(one, "loss")
    assert len(losses) == 30 and max(losses) > 1.1 * min(losses)
    assert column(other, "loss") == pytest.approx(losses, rel=1e-4)
    assert column(other, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=3e-3)
    # Rounding may carry one of the 590 units over its bound.
    assert column(other, "clipped") == pytest.approx(column(one, "clipped"), abs=0.004)
    assert column(other, "lr") == column(one, "lr")
    a, b = result(one)["metrics"], result(other)["metrics"]
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for name in ("accuracy", "mean_auc", "mean_ap"):
        assert b[name] == pytest.approx(a[name], abs=1e-3), name
    assert result(other)["environment"]["world_size"] == (2 if layout in ON_TWO else 1)


@pytest.mark.parametrize("source", SOURCES)
def test_workers_change_no_bit(source, runs):
    one, other = runs / source / "one", runs / source / "workers"
    for name in ("loss", "grad_norm", "clipped"):
        assert column(other, name) == column(one, name)
    assert result(other)["metrics"] == result(one)["metrics"]
    a, b = (torch.load(*o.glob("*/model.pt"), weights_only=True)["model"] for o in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------
# One step, in parts
# ------------------------------------------------------------------------------------------------


def batch(count, task):
    """Images (N,3,16,16), and labels of 4 classes with most of them NaN, unevenly."""
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 4, count))
    if task == "multilabel":
        labels = torch.from_numpy(rng.choice(np.float32([0, 1, nan]), (count, 4)))
        labels[:2] = nan
        labels[-1] = 1
    return images, labels


def network():
    torch.manual_seed(0)
    return models.create_model("R14x0.5", 4)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step(model, images, labels, env=CPU, forward=None, **options):
    """(loss sum, gradient) of engine.train_step."""
    task = "multilabel" if labels.ndim == 2 else "multiclass"
    count = int((~labels.isnan()).sum())
    optimizer = make_optimizer(model, 0.0)
    loss = engine.train_step(
        forward or model, optimizer, images, labels, count, 0.0, task, env,
        NORMALIZATION["natural"], **options,
    )  # fmt: skip
    return float(loss), gradients(model)


def by_hand(images, labels, share):
    """The same in one piece and in double precision: image 2k is mixed with image 2k + 1."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMALIZATION["natural"])
    images, model = ((images / 255 - mean) / std).double(), network().double()
    partner = list(range(len(images)))
    for i in range(0, len(images) - 1, 2):
        partner[i], partner[i + 1] = i + 1, i
    weights = [(share, range(len(images))), (1 - share, partner)]
    logits = model(sum(weight * images[list(order)] for weight, order in weights))
    loss = 0
    for weight, order in weights:
        for row, target in zip(logits, labels[list(order)]):
            if target.ndim == 0:
                loss = loss - weight * row.log_softmax(0)[target]
                continue
            valid = ~target.isnan()
            wanted = target[valid].double()
            loss = loss + weight * F.binary_cross_entropy_with_logits(
                row[valid], wanted, reduction="sum"
            )
    (loss / (~labels.isnan()).sum()).backward()
    return float(loss.detach()), gradients(model).float()


def assert_close(found, expected):
    """Rounding comes to 2e-5."""
    difference = (found - expected).norm() / expected.norm()
    assert difference < 5e-5, float(difference)


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
@pytest.mark.parametrize("count, share", ((7, 0.3), (10, 0.8), (5, 0.0), (9, 1.0), (1, 0.4)))
def test_mixup_in_parts_never_separates_neighbours(task, count, share):
    images, labels = batch(count, task)
    loss, gradient = by_hand(images, labels, share)
    for accumulate in (1, 2, 3, count):
        found = step(network(), images, labels, share=share, accumulate=accumulate)
        assert found[0] == pytest.approx(loss, rel=1e-5), accumulate
        assert_close(found[1], gradient)


@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_parts_of_unequal_size_add_up(task):
    images, labels = batch(7, task)
    loss, gradient = by_hand(images, labels, 1.0)
    sizes = []
    for accumulate in (1, 2, 3, 5):
        model = network()
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        found = step(model, images, labels, accumulate=accumulate)
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert_close(found[1], gradient)
    assert sizes == [7, 4, 3, 3, 3, 1, 2, 2, 2, 1]


def test_a_batch_without_labels_has_gradient_zero():
    images, labels = batch(4, "multilabel")
    loss, gradient = step(network(), images, torch.full_like(labels, nan), accumulate=2)
    assert loss == 0 and gradient.count_nonzero() == 0


def test_ranks_talk_once_a_step():
    """And after the last part. The group of one is told that there are two ranks, and that the
    others' sum is twice its own: the gradient of a mean over two is 2 * (1 + 2) times its own.
    """
    images, labels = batch(6, "multiclass")
    _, alone = step(network(), images, labels)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        two, talks = CPU._replace(ranks=2), []
        for accumulate in (1, 3):
            model, sent = network(), []
            forward = engine.parallel(model, two)

            def add_up(state, bucket, sent=sent):
                sent.append(len(bucket.buffer()))
                ready = torch.futures.Future()
                ready.set_result(3 * bucket.buffer())
                return ready

            forward.register_comm_hook(None, add_up)
            for _ in range(2):  # buckets are laid out anew after the first step
                sent.clear()
                _, gradient = step(model, images, labels, two, forward, accumulate=accumulate)
                assert_close(gradient, 6 * alone)
                talks.append(sum(sent))
        assert talks == [sum(p.numel() for p in model.parameters())] * 4
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# --batch-size auto
# ------------------------------------------------------------------------------------------------


def with_free_memory(monkeypatch, size):
    monkeypatch.setattr(hardware, "free_memory", lambda device: size)


@pytest.mark.parametrize("limit, largest", ((1, 1), (2, 2), (7, 4), (8, 8), (24, 16)))
def test_the_largest_batch_is_a_power_of_two_up_to_the_limit(limit, largest, monkeypatch):
    with_free_memory(monkeypatch, 2**50)
    assert engine.largest_batch(network(), 16, limit, CPU) == largest


class Hungry(torch.nn.Module):
    """Takes 64 MiB an image, in blocks that malloc gives back to the system when they are freed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return (images.new_ones(len(images), 2**23) * self.weight).sum(1)


@pytest.mark.parametrize("free, largest", ((0, 1), (120, 1), (240, 2), (480, 4), (2**20, 4)))
def test_less_memory_makes_smaller_batches(free, largest, monkeypatch):
    """64, 128 and 256 MiB are within four fifths of 120, 240 and 480, and twice as much is not."""
    with_free_memory(monkeypatch, free * 2**20)
    assert engine.largest_batch(Hungry(), 1, 7, CPU) == largest


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    with_free_memory(monkeypatch, 960 * 2**20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert engine.largest_batch(Hungry(), 1, 7, CPU) == 2


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    def all_reduce(tensor, op):
        assert op == dist.ReduceOp.MIN
        tensor.clamp_(max=2)  # another rank's answer

    with_free_memory(monkeypatch, 2**50)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert engine.largest_batch(network(), 16, 8, CPU._replace(ranks=2)) == 2


def test_the_search_leaves_the_network_as_it_was(monkeypatch):
    with_free_memory(monkeypatch, 2**50)
    model, before = network(), network().state_dict()
    state = torch.get_rng_state()
    engine.largest_batch(model, 16, 4, CPU)
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def by_number(folder, tmp_path_factory):
    """3 steps of 64 images, the batch of the recipe."""
    out = tmp_path_factory.mktemp("number")
    pretrain_here(f"folder:{folder}", out, *AUTO, "--batch-size", 64)
    return out


AUTO = ("--recipe", "synthetic", "--image-size", 16, "--epochs", 3, "--clipping", 0.01)


@pytest.mark.parametrize("free, parts", ((2**50, 1), (0, 64)))
def test_auto_changes_no_result(free, parts, by_number, folder, monkeypatch, tmp_path, capsys):
    with_free_memory(monkeypatch, free)
    pretrain_here(f"folder:{folder}", tmp_path, *AUTO, "--batch-size", "auto")
    assert f"{64 // parts} images at a time" in capsys.readouterr().out
    assert len(steps(tmp_path)) == 3
    assert column(tmp_path, "loss") == pytest.approx(column(by_number, "loss"), rel=1e-4)
    config = result(tmp_path)["config"]
    assert (config["batch_size"], config["accumulate"]) == (64, parts)
    # The same run by another name: it is not made again, and no other.
    pretrain_here(f"folder:{folder}", tmp_path, *AUTO, "--batch-size", 64)
    assert "finished already" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Compilation
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_runs_have_the_same_losses(folder, tmp_path):
    more = ("--batch-size", 12, "--epochs", 2, "--lr", 0.5, "--clipping", 0.01)
    pretrain_here(f"folder:{folder}", tmp_path / "eager", *more)
    words = argv(f"folder:{folder}", tmp_path / "compiled", *more, "--compile")
    run(*words, cwd=tmp_path)
    assert result(tmp_path / "compiled")["config"]["compile"] is True
    eager = column(tmp_path / "eager", "loss")
    assert len(eager) == 10
    assert column(tmp_path / "compiled", "loss") == pytest.approx(eager, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


def test_the_optimised_recipe_does_not_depend_on_workers(folder, tmp_path):
    more = ("--recipe", "optimised", "--epochs", 3, "--image-size", 24, "--batch-size", 10)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        pretrain_here(f"folder:{folder}", out, *more, "--workers", workers)
    config = result(tmp_path / "0")["config"]
    assert (config["recipe"], config["rand_augment"], config["schedule"]) == (
        *("optimised", True, "cosine"),
    )
    assert (config["warmup"], config["clipping"]) == (15 * 3 / 120, 0.01)
    for name in ("loss", "grad_norm", "clipped", "lr"):
        values = column(tmp_path / "0", name)
        assert len(values) == 18 and column(tmp_path / "2", name) == values
    assert result(tmp_path / "0")["metrics"] == result(tmp_path / "2")["metrics"]


def test_rand_augment_depends_on_seed_epoch_and_image_alone(folder):
    dataset = load_dataset(f"folder:{folder}")
    pipeline = pretraining_pipeline("natural", 24, train=True, rand_augment=True)
    images = {}
    for batch_size, noise in ((10, 1), (4, 2)):
        torch.manual_seed(noise)
        np.random.seed(noise)
        state = torch.get_rng_state()
        batches = loading.Batches(dataset, pipeline, batch_size, seed=5)
        for number in range(120 // batch_size):
            indices, epochs = loading.batch_indices(number, 60, batch_size, 5)
            for i, epoch, image in zip(indices, epochs, batches[number][0]):
                key = int(i), int(epoch)
                assert torch.equal(images.setdefault(key, image), image)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(images) == 120
    assert sum(torch.equal(images[i, 0], images[i, 1]) for i in range(60)) < 3


def rates(out):
    """{number of the step, from 0: its learning rate}"""
    return {line["step"] - 1: line["lr"] for line in steps(out)}


def test_the_learning_rate_of_a_natural_source(folder, tmp_path):
    """60 images in 9 epochs of 90: half an epoch of warm-up, a tenth after 3, 6 and 8."""
    for batch_size in (12, 48):
        more = ("--recipe", "paper", "--epochs", 9, "--batch-size", batch_size)
        pretrain_here(f"folder:{folder}", tmp_path / str(batch_size), *more, "--image-size", 16)
    peak = 0.1 * 12 / 256  # a batch below that of one worker: no warm-up
    expected = [peak] * 15 + [peak / 10] * 15 + [peak / 100] * 10 + [peak / 1000] * 5
    assert rates(tmp_path / "12") == pytest.approx(dict(enumerate(expected)), rel=1e-9)
    # 0.8 epochs a step.
    expected = [0.0125, *[0.01875] * 3, *[0.001875] * 4, *[1.875e-4] * 2, *[1.875e-5] * 2]
    assert rates(tmp_path / "48") == pytest.approx(dict(enumerate(expected)), rel=1e-9)


def test_the_learning_rate_of_a_medical_source(nih_root, tmp_path):
    """40 images in 18 epochs of 90: three epochs of warm-up from a batch of 32."""
    more = ("--data-dir", nih_root, "--epochs", 18, "--image-size", 16)
    for batch_size in (40, 80):
        pretrain_here("nih", tmp_path / str(batch_size), *more, "--batch-size", batch_size)
    first, peak = 0.01 * 32 / 256, 0.01 * 40 / 256
    warming = [first, first + (peak - first) / 3, first + (peak - first) * 2 / 3]
    expected = [*warming, *[peak] * 3, *[peak / 10] * 6, *[peak / 100] * 4, *[peak / 1000] * 2]
    assert rates(tmp_path / "40") == pytest.approx(dict(enumerate(expected)), rel=1e-9)
    # Two epochs a step.
    expected = [0.00125, 0.0025, 0.003125, *[3.125e-4] * 3, *[3.125e-5] * 2, 3.125e-6]
    assert rates(tmp_path / "80") == pytest.approx(dict(enumerate(expected)), rel=1e-9)


def test_larger_networks_warm_up_from_a_batch_of_16():
    _, recipe = pretrain.choose_recipe("paper", "imagenet1k", "natural", "R152x4")
    rate = pretrain.rate_of_step(recipe._asdict() | {"batch_size": 1024}, 1024 * 100)
    found = [rate(s) for s in (0, 750, 1500, 2999, 3000, 6000, 8000)]
    peak, first = 0.03 * 4, 0.03 / 16
    expected = [first, (first + peak) / 2, peak, peak, peak / 10, peak / 100, peak / 1000]
    assert found == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------
# Arithmetic of a step
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, peer", (("R50x1", "resnetv2_50x1_bit"), ("R152x4", "resnetv2_152x4_bit"))
)
def test_flops_equal_twice_the_multiply_adds_of_timms_convolutions(name, peer):
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()

    with torch.device("meta"):
        model = timm.create_model(peer, num_classes=1000)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, 224, 224))
    assert models.forward_flops(name, 1000, 224) == pytest.approx(2 * total, rel=0.001)
    if name == "R50x1":
        assert total == pytest.approx(4.1e9, rel=0.01)  # as the literature has it


def test_summary_counts_three_forward_passes_an_image(runs):
    record = result(runs / "folder" / "one")
    train = record["train"]
    assert train["images"] == 60 and train["steps"] == 30
    assert train["images_per_second"] == pytest.approx(30 * 13 / train["seconds"], rel=1e-9)
    expected = 3 * models.forward_flops("R14x0.5", 3, 32) * train["images_per_second"]
    assert train["flops_per_second"] == pytest.approx(expected, rel=1e-9)
    assert 0 < train["peak_share"] < 1
