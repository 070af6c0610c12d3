"""What is done with each source and target, against the numbers of the papers."""

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from conftest import refuses
from trees import random_image

import data
import models
import pretrain
import transfer
from engine.processes import Env
from readers import transforms
from transfer import HyperRule, Target, hyperrule


@pytest.mark.parametrize(
    "recipe, source, domain, model, expected",
    [
        (None, "imagenet1k", "natural", "R50x1", (0.1, None, 5, 90, 32)),
        (None, "imagenet1k", "natural", "R152x4", (0.03, 0.01, 15, 90, 16)),
        (None, "imagenet21k", "natural", "R152x4", (0.01, 0.01, 2, 90, 16)),
        (None, "nih", "medical", "R50x1", (0.01, 0.01, 15, 90, 16)),
        (None, "folder:x", "natural", "R50x1", (0.1, None, 5, 90, 32)),
        ("paper", "synthetic-xray", "medical", "R14x0.5", (0.01, 0.01, 15, 90, 16)),
        ("optimised", "imagenet1k", "natural", "R50x1", (0.03, 0.01, 15, 120, 32)),
        ("optimised", "imagenet1k", "natural", "R152x4", (0.03, 0.01, 15, 90, 16)),
    ],
)
def test_recipes_of_the_study(recipe, source, domain, model, expected):
    name, found = pretrain.choose_recipe(recipe, source, domain, model)
    about = found.lr, found.clipping, found.warmup, found.epochs, found.worker_batch
    assert about == expected and name == (recipe or "paper")
    assert (found.weight_decay, found.image_size, found.batch_size) == (1e-4, 224, 256)
    optimised = recipe == "optimised"
    assert found.schedule == ("cosine" if optimised else "step")
    assert found.augment == ("randaugment" if optimised else "crop")
    assert pretrain.choose_recipe(None, "synthetic-xray", "medical", model)[0] == "synthetic"


def test_a_size_states_its_class():
    small = dict.fromkeys("R14x0.25 R14x0.5 R26x0.5 R26x1 R50x1".split(), "small")
    large = dict.fromkeys("R50x3 R101x1 R101x3 R152x2 R152x4".split(), "large")
    assert {name: size.size_class for name, size in models.MODELS.items()} == small | large
    with pytest.raises(TypeError, match="size_class"):
        models.Size((3, 4, 6, 3), 2)


def test_pretraining_pipelines(rng):
    """X-rays in any channel; natural images cropped at any size; made ones only shifted."""
    generator, image = np.random.default_rng, random_image(rng, 3, 50, 70)
    xrays, photos = (Namespace(domain=name, size=None) for name in ("medical", "natural"))
    prepare, augment, _ = pretrain.choose_pipeline(xrays, 24, True)
    square = prepare(image[:1])
    assert torch.equal(square, transforms.xray_square(image[:1, :, 10:60], 24))
    expected = transforms.random_affine_flip(square, generator(1))
    assert torch.equal(augment(square, generator(1)), expected)
    assert pretrain.choose_pipeline(xrays, 24, False).augment is transforms.keep
    same = pretrain.choose_pipeline(xrays, 24, True, augment="randaugment")
    assert same.augment is transforms.random_affine_flip

    prepare, augment, _ = pretrain.choose_pipeline(photos, 24, True)
    crop = transforms.random_resized_crop_flip(image, generator(1), 24)
    assert prepare(image) is image and torch.equal(augment(image, generator(1)), crop)
    prepare, augment, _ = pretrain.choose_pipeline(photos, 24, False)
    assert torch.equal(prepare(image), transforms.resize_center_crop(image, 24))
    assert augment is transforms.keep
    prepare, augment, _ = pretrain.choose_pipeline(photos, 24, True, augment="randaugment")
    expected = transforms.random_augment_crop_flip(image, generator(5), 24)
    assert torch.equal(augment(image, generator(5)), expected)

    for domain in ("natural", "medical"):
        made, keep = Namespace(domain=domain, size=24), transforms.keep
        assert pretrain.choose_pipeline(made, 24, False) == (keep, keep, None)
        shifted = (keep, transforms.random_shift_flip, None)
        assert pretrain.choose_pipeline(made, 24, True, augment="randaugment") == shifted


SHORT = (0.0, 100, (200, 300, 400), 500)
MIDDLE = (0.1, 500, (3000, 6000, 9000), 10_000)
LONG = (0.1, 500, (6000, 12_000, 18_000), 20_000)


def test_hyperrule_by_examples_and_area():
    counts = {19_999: SHORT, 20_000: MIDDLE, 499_999: MIDDLE, 500_000: LONG}
    assert {count: hyperrule(count, 32)[2:] for count in counts} == counts
    assert [hyperrule(100, size)[:2] for size in (32, 95, (64, 143))] == [(160, 128)] * 3
    assert [hyperrule(100, size)[:2] for size in (96, (64, 144), 500)] == [(512, 480)] * 3


@pytest.mark.parametrize(
    "examples, factors",
    [
        (1000, {0: 0, 1: 0.01, 50: 0.5, 99: 0.99, 100: 1, 200: 1, 201: 0.1, 300: 0.1, 301: 0.01}),
        (1000, {400: 0.01, 401: 0.001, 499: 0.001}),
        (50_000, {250: 0.5, 500: 1, 3000: 1, 3001: 0.1, 6001: 0.01, 9001: 0.001, 9999: 0.001}),
        (1_000_000, {6000: 1, 6001: 0.1}),
    ],
)
def test_hyperrule_learning_rate(examples, factors):
    rule = hyperrule(examples, 32)
    rates = {step: rule.learning_rate(step, 0.003) / 0.003 for step in factors}
    assert rates == pytest.approx(factors, rel=1e-12)


@pytest.mark.parametrize(
    "name, recipe, images, shots, balanced, expected",
    [
        ("pets", "paper", 3, 1, None, "replacement fp32"),  # of a set below a micro-batch of 4
        ("pets", "paper", 4, 1, None, "shuffle fp32"),
        ("cifar100", "paper", 63, 1, None, "replacement fp32"),  # 64
        ("cifar10", "paper", 64, 5, None, "shuffle fp32"),
        ("pets", "bit", 511, 10, None, "replacement bf16"),
        ("pets", "bit", 512, 10, None, "shuffle bf16"),
        ("synthetic-natural-target", "synthetic", 31, 10, None, "replacement bf16"),
        ("flowers102", "paper", 6149, None, None, "balanced fp32"),
        ("flowers102", "paper", 6149, None, False, "shuffle fp32"),
        ("flowers102", "paper", 1020, 10, None, "shuffle fp32"),
        ("pets", "paper", 3680, None, True, "balanced fp32"),
    ],
)
def test_order_and_precision_of_finetuning(name, recipe, images, shots, balanced, expected):
    """As the study's code: sets below its micro-batch with replacement, and no autocast."""
    about = {
        "image_size": (200, 200),
        "xray_pipeline": False,
        "train_set": Namespace(size=None, domain="natural"),
    }
    target = Namespace(name=name, recipe=recipe, **about)
    given = dict.fromkeys(("batch_size", "lr", "image_size", "steps", "compile", "save"))
    args = Namespace(**given, balanced=balanced, method="finetune", out="")
    network = Namespace(model="R14x0.5", steps=None, normalization=None)
    sampling = expected.split()[0]
    on_gpu = f"{sampling} {'tf32' if recipe == 'paper' else 'bf16'}"
    cases = ("auto", "cpu", expected), ("bf16", "cpu", f"{sampling} bf16"), ("auto", "cuda", on_gpu)
    for args.precision, device, found in cases:
        env = Env(0, 1, torch.device(device), "bf16")
        cell = transfer.make_cell(network, target, shots, 0, np.arange(images), args, env)
        assert f"{cell.settings['sampling']} {cell.settings['precision']}" == found


def test_rule_of_each_kind_of_target(folder, nih_root):
    def choose_rule(target, images, image_size=None, steps=None):
        args = Namespace(image_size=image_size, steps=steps)
        return transfer.choose_rule(target, images, args)

    natural = Target("x", *data.load_splits(f"folder:{folder}"), "paper")
    assert choose_rule(natural, 60)[:2] == (160, 128)
    assert choose_rule(natural, 60, 64)[:2] == (80, 64)  # the same ratio, and the same schedule
    own = Target("x", *data.load_splits(f"folder:{folder}", domain="medical"), "paper")
    assert own.xray_pipeline and choose_rule(own, 60)[:2] == (224, 224)
    assert choose_rule(natural, 60, None, 50) == HyperRule(160, 128, 0.0, 10, (20, 30, 40), 50)
    train_set, test_set = data.load_splits("nih", nih_root)
    alone = data.keep_single_label(train_set)  # multi-class, and an X-ray set still
    assert alone.task == "multiclass"
    for dataset in (train_set, alone):
        nih = Target("nih", dataset, test_set, "paper")
        assert choose_rule(nih, 40)[:2] == (224, 224) and choose_rule(nih, 40, 64)[:2] == (64, 64)
        pipeline = transfer.choose_pipeline(nih, choose_rule(nih, 40), True)
        assert pipeline.augment is transforms.random_affine_flip
    made = Target("y", *data.load_splits("synthetic-xray-target"), "synthetic")
    rule = choose_rule(made, 20)
    assert rule.crop == rule.resize == made.train_set.size and rule.steps == 40


@pytest.mark.parametrize("shape", [(3, 40, 61), (1, 1, 9)])
def test_hyperrule_pipeline(folder, rng, shape):
    image, rule = random_image(rng, *shape), HyperRule(20, 16, *SHORT)
    sets = data.load_splits(f"folder:{folder}")
    for recipe, square in (("paper", False), ("bit", True)):
        target = Target("x", *sets, recipe)
        prepare, augment, size = transfer.choose_pipeline(target, rule, True)
        prepared = prepare(image)
        resize = transforms.resize_square if square else transforms.resize_shorter
        assert torch.equal(prepared, resize(image, 20)) and size == 20
        crop = augment(prepared, np.random.default_rng(3))
        expected = transforms.random_crop_flip(prepared, np.random.default_rng(3), 16)
        assert torch.equal(crop, expected) and crop.shape == (shape[0], 16, 16)
        prepare, augment, _ = transfer.choose_pipeline(target, rule, False)
        assert torch.equal(prepare(image), transforms.resize_square(image, 16))
        assert augment is transforms.keep
    wrong = HyperRule(16, 20, *SHORT)
    refuses(ValueError, lambda: transfer.choose_pipeline(target, wrong, True), "20", "16")
