"""Fine-tuning the whole network on a target by the BiT-HyperRule, as the study did.

Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3; Cherti & Jitsev, arXiv:2106.00116, appendix.
"""

import functools
from typing import NamedTuple

import torch

import models
from engine import checkpoint as records
from engine import processes as engine
from engine.optimizer import make_optimizer
from readers import cache as loading
from readers import transforms

# ------------------------------------------------------------------------------------------------
# BiT-HyperRule (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3)
# ------------------------------------------------------------------------------------------------


class HyperRule(NamedTuple):
    """resize, crop: pixels. mixup: alpha, 0 for none. warmup, decays, steps: in steps."""

    resize: int
    crop: int
    mixup: float
    warmup: int
    decays: tuple[int, ...]
    steps: int

    def learning_rate(self, step, base_lr):
        """Linear from 0 during warm-up; a tenth from the step after each boundary of `decays`."""
        if step < self.warmup:
            return base_lr * step / self.warmup
        return base_lr * 0.1 ** sum(step > boundary for boundary in self.decays)

    def with_steps(self, steps):
        """The same schedule in another number of steps."""
        warmup, *decays = (round(s * steps / self.steps) for s in (self.warmup, *self.decays))
        return self._replace(warmup=warmup, decays=tuple(decays), steps=steps)

    def with_crop(self, crop):
        """The same ratio of resize to crop at another image size."""
        return self._replace(resize=round(crop * self.resize / self.crop), crop=crop)


def hyperrule(num_examples, image_size):
    """The rule for a training set of that many images of that size (pixels: side, or (H,W))."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    resize, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    if num_examples < 20_000:
        return HyperRule(resize, crop, 0.0, 100, (200, 300, 400), 500)
    if num_examples < 500_000:
        return HyperRule(resize, crop, 0.1, 500, (3000, 6000, 9000), 10_000)
    return HyperRule(resize, crop, 0.1, 500, (6000, 12_000, 18_000), 20_000)


class Recipe(NamedTuple):
    """clipping: of AGC, or None. nesterov: of the momentum 0.9.

    zero_head: the classifier starts at 0, else at PyTorch's default. square: training images are
    resized to a square, else by their shorter side. steps: in place of the rule's number, or None.
    """

    batch_size: int
    lr: float
    clipping: float | None
    nesterov: bool = True
    zero_head: bool = False
    square: bool = False
    steps: int | None = None


RECIPES = {
    "paper": Recipe(128, 0.001, 0.01),
    "bit": Recipe(512, 0.003, None, nesterov=False, zero_head=True, square=True),
    "synthetic": Recipe(32, 0.02, 0.01, steps=40),
}
# Their full training sets are drawn with probability inverse to class frequency (study, appendix).
BALANCED = ("covidx", "flowers102")
# Their few-shot images have exactly one label each (PadChest-Cl of the study).
SINGLE_LABEL = ("padchest",)


def choose_rule(dataset, num_examples, recipe, image_size=None, steps=None):
    """The HyperRule for a target, as the study ran it.

    Synthetic images keep their own size; multi-label X-ray sets take the X-ray pipeline at 224.
    The first training image tells the size of all.
    """
    rule = hyperrule(num_examples, first_size(dataset))
    own_size = dataset.size or (224 if uses_xray_pipeline(dataset) else None)
    if own_size:
        rule = rule._replace(resize=own_size, crop=own_size)
    if image_size:
        rule = rule.with_crop(image_size)
    steps = steps or recipe.steps
    return rule.with_steps(steps) if steps else rule


@functools.lru_cache
def first_size(dataset):
    """(H,W) of the first image."""
    return tuple(dataset.read(0).shape[-2:])


def uses_xray_pipeline(dataset):
    """Multi-label X-ray sets do, also when each image was left a single label."""
    findings = dataset.task == "multilabel" or dataset.options.get("single_label")
    return dataset.domain == "medical" and findings and not dataset.size


def choose_pipeline(dataset, rule, recipe, train):
    """The transforms of a target: the X-ray pipeline, or the HyperRule's."""
    if uses_xray_pipeline(dataset):
        return transforms.pretraining_pipeline("medical", rule.crop, train)
    return transforms.hyperrule_pipeline(rule.resize, rule.crop, train, recipe.square)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def pretrained_model(pretrained, num_classes, seed, device, zero_head=False):
    """The network with its pre-trained body and a fresh head, which depends on the seed alone."""
    torch.manual_seed(seed)
    model = models.create_model(pretrained.model, num_classes)
    if pretrained.path:
        fresh = {key: value.clone() for key, value in model.head.conv.state_dict().items()}
        models.load_weights(model, pretrained.path)
        model.head.conv.load_state_dict(fresh)  # a source may have as many classes as the target
    if zero_head:
        torch.nn.init.zeros_(model.head.conv.weight)
        torch.nn.init.zeros_(model.head.conv.bias)
    return models.place(model, device)


def fine_tune(cell, train, test, env, signals, log=None, bar=None):
    """Fine-tunes the whole network and evaluates its last step on the test set.

    train, test: (dataset, pipeline). A full-shot run keeps a checkpoint beside its result and
    continues from it. Returns (metrics, what the result file says of the training).
    """
    config, recipe = cell.config, RECIPES[cell.config["recipe"]]
    rule = HyperRule(**{key: config[key] for key in HyperRule._fields})
    train_set, pipeline = train
    normalization = cell.pretrained.normalization or transforms.NORMALIZATION[train_set.domain]
    model = pretrained_model(
        cell.pretrained, len(train_set.classes), cell.seed, env.device, recipe.zero_head
    )
    optimizer = make_optimizer(
        model, config["lr"], clipping=config["clipping"], nesterov=recipe.nesterov
    )
    path = cell.checkpoint
    run = engine.Run(path, model, optimizer, config, records.load_checkpoint(path, config))
    records.same_step(run.step, env)
    batches = loading.Batches(
        train_set, pipeline, config["batch_size"], cell.seed, config["sampling"],
        env.rank, env.ranks, pairs=rule.mixup > 0,
    )  # fmt: skip
    pinned = env.device.type == "cuda"
    engine.train(
        run, engine.parallel(model, env, config["compile"]), batches,
        loading.loader(batches, run.step, rule.steps, config["workers"], pinned),
        lambda step: rule.learning_rate(step, config["lr"]), rule.steps, env, normalization,
        mixup=rule.mixup, signals=signals, save_minutes=config["save_minutes"], log=log,
        log_every=config["log_every"], progress=bar,
    )  # fmt: skip
    run.save(env)
    at_once = max(config["batch_size"], images_at_once(config["crop"]))
    metrics = engine.evaluate(model, *test, env, normalization, at_once, config["workers"])
    return metrics, run.summary(len(train_set), env)


def images_at_once(size):
    """How many images of size x size pixels a forward pass takes: 4 million pixels."""
    return max(1, 2**22 // size**2)
