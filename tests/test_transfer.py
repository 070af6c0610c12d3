"""The BiT-HyperRule and what is transferred, against the numbers of the papers."""

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401  (one thread)

import data
import finetune
import grid
import models
import pretrain
from readers import transforms
from transfer import HyperRule, hyperrule


@pytest.mark.parametrize(
    "examples, expected",
    [
        (1, (0.0, 100, (200, 300, 400), 500)),
        (19_999, (0.0, 100, (200, 300, 400), 500)),
        (20_000, (0.1, 500, (3000, 6000, 9000), 10_000)),
        (499_999, (0.1, 500, (3000, 6000, 9000), 10_000)),
        (500_000, (0.1, 500, (6000, 12_000, 18_000), 20_000)),
    ],
)
def test_hyperrule_by_examples(examples, expected):
    assert hyperrule(examples, 32)[2:] == expected


@pytest.mark.parametrize(
    "size, expected",
    [(32, (160, 128)), (95, (160, 128)), (96, (512, 480)), ((64, 143), (160, 128)),
     ((64, 144), (512, 480)), (500, (512, 480))],
)  # fmt: skip
def test_hyperrule_by_area(size, expected):
    assert hyperrule(100, size)[:2] == expected


@pytest.mark.parametrize(
    "step, factor",
    [(0, 0), (1, 0.01), (50, 0.5), (99, 0.99), (100, 1), (200, 1), (201, 0.1), (300, 0.1),
     (301, 0.01), (400, 0.01), (401, 0.001), (499, 0.001)],
)  # fmt: skip
def test_hyperrule_learning_rate(step, factor):
    rate = hyperrule(1000, 32).learning_rate(step, 0.003)
    assert rate == pytest.approx(0.003 * factor, rel=1e-12)


def test_hyperrule_learning_rate_of_long_schedules():
    rule = hyperrule(50_000, 32)
    rates = [rule.learning_rate(s, 1.0) for s in (250, 500, 3000, 3001, 6001, 9001, 9999)]
    assert rates == pytest.approx([0.5, 1, 1, 0.1, 0.01, 0.001, 0.001])
    rule = hyperrule(1_000_000, 32)
    assert [rule.learning_rate(s, 1.0) for s in (6000, 6001)] == pytest.approx([1, 0.1])


def test_hyperrule_in_other_steps_and_sizes():
    rule = hyperrule(1000, 32)
    assert rule.with_steps(50) == HyperRule(160, 128, 0.0, 10, (20, 30, 40), 50)
    assert rule.with_crop(64)[:2] == (80, 64)


def test_rule_of_each_kind_of_target(folder, nih_root):
    natural = data.load_dataset(f"folder:{folder}")
    paper = finetune.RECIPES["paper"]
    assert finetune.choose_rule(natural, 60, paper)[:2] == (160, 128)
    assert finetune.choose_rule(natural, 60, paper, image_size=64, steps=30)[:2] == (80, 64)
    nih = data.load_dataset("nih", nih_root)
    assert finetune.choose_rule(nih, 40, paper)[:2] == (224, 224)
    pipeline = finetune.choose_pipeline(nih, finetune.choose_rule(nih, 40, paper), paper, True)
    assert pipeline.augment is transforms.random_affine_flip
    alone = data.keep_single_label(nih)  # multi-class, and an X-ray set still
    assert alone.task == "multiclass" and finetune.choose_rule(alone, 40, paper)[:2] == (224, 224)
    synthetic = data.load_dataset("synthetic-xray-target", split="test")
    rule = finetune.choose_rule(synthetic, 20, finetune.RECIPES["synthetic"])
    assert rule.crop == rule.resize == synthetic.size


def test_pretraining_schedule():
    def rate(epoch, schedule="step"):
        return pretrain.learning_rate(epoch, 0.4, 0.05, 5, 90, schedule)

    assert rate(0) == pytest.approx(0.05) and rate(2.5) == pytest.approx(0.225)
    steps = [rate(e) for e in (5, 29.9, 30, 60, 79.9, 80, 89.9)]
    assert steps == pytest.approx([0.4, 0.4, 0.04, 0.004, 0.004, 0.0004, 0.0004])
    cosine = [rate(e, "cosine") for e in (5, 47.5, 90)]
    assert cosine == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    "source, domain, model, expected",
    [
        ("imagenet1k", "natural", "R50x1", (0.1, None, 5, 90, 32)),
        ("imagenet1k", "natural", "R152x4", (0.03, 0.01, 15, 90, 16)),
        ("imagenet21k", "natural", "R152x4", (0.01, 0.01, 2, 90, 16)),
        ("nih", "medical", "R50x1", (0.01, 0.01, 15, 90, 32)),
        ("folder:x", "natural", "R50x1", (0.1, None, 5, 90, 32)),
    ],
)
def test_recipes_of_the_study(source, domain, model, expected):
    name, recipe = pretrain.choose_recipe(None, source, domain, model)
    found = recipe.lr, recipe.clipping, recipe.warmup, recipe.epochs, recipe.worker_batch
    assert found == expected
    assert (recipe.schedule, recipe.weight_decay, recipe.image_size) == ("step", 1e-4, 224)
    assert (name, recipe.batch_size, recipe.rand_augment) == ("paper", 256, False)


@pytest.mark.parametrize("model, epochs, worker_batch", [("R50x1", 120, 32), ("R152x4", 90, 16)])
def test_optimised_recipe(model, epochs, worker_batch):
    name, recipe = pretrain.choose_recipe("optimised", "imagenet1k", "natural", model)
    found = name, recipe.lr, recipe.clipping, recipe.warmup, recipe.schedule, recipe.rand_augment
    assert found == ("optimised", 0.03, 0.01, 15, "cosine", True)
    assert (recipe.epochs, recipe.worker_batch) == (epochs, worker_batch)
    with pytest.raises(ValueError, match="--recipe optimised is for natural sources, not nih"):
        pretrain.choose_recipe("optimised", "nih", "medical", model)
    assert pretrain.choose_recipe(None, "synthetic-xray", "medical", model)[0] == "synthetic"
    assert pretrain.choose_recipe("paper", "synthetic-xray", "medical", model)[1].epochs == 90


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(5)
    model = models.create_model("R14x0.5", 3)
    mean, std = transforms.NORMALIZATION["medical"]
    record = {"model": model.state_dict(), "name": "R14x0.5", "source": "nih", "images": 7}
    record |= {"domain": "medical", "mean": mean, "std": std}
    torch.save(record, tmp_path / "model.pt")
    return tmp_path, model


def test_head_is_fresh_and_body_is_not(checkpoint):
    folder, source = checkpoint
    (opened,) = grid.open_checkpoints([str(folder)])
    assert (opened.name, opened.domain, opened.images) == ("nih-R14x0.5", "medical", 7)
    heads = []
    for classes, seed in ((3, 0), (3, 1), (3, 0)):  # as many classes as the source had
        model = finetune.pretrained_model(opened, classes, seed, "cpu", False)
        assert torch.equal(model.root.conv.weight, source.root.conv.weight)
        assert not torch.equal(model.head.conv.weight, source.head.conv.weight)
        heads.append(model.head.conv.weight)
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    bound = 1 / np.sqrt(heads[0].shape[1])  # PyTorch's default initialisation
    assert 0.9 * bound < heads[0].abs().max() <= bound
    model = finetune.pretrained_model(opened, 4, 0, "cpu", True)
    assert not model.head.conv.weight.any() and not model.head.conv.bias.any()


def test_foreign_weights_need_model_and_source(tmp_path):
    model = models.create_model("R14x0.5", 3)
    path = tmp_path / "model.pth.tar"
    torch.save({"model": model.state_dict(), "epoch": 90}, path)
    with pytest.raises(ValueError, match="--model and --source"):
        grid.open_checkpoints([str(path)])
    (opened,) = grid.open_checkpoints([str(path)], "R14x0.5", "chexpert+mimic")
    assert opened.domain == "medical" and opened.normalization[0] == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="another network"):
        grid.open_checkpoints([str(path)], "R26x1", "imagenet1k")
