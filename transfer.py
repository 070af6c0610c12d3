"""Full-shot transfer: fine-tunes pre-trained networks on targets with the BiT-HyperRule.

    python transfer.py                    # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 transfer.py --checkpoint runs/nih-R50x1 scratch --target cifar10

Each run of targets x networks x seeds writes results/TARGET/SOURCE-MODEL/full-seedS.json when it
is finished; started again, the script does what is missing. The processes of torchrun train each
run together. fewshot.py does the same on a few images a class, and classifies frozen features.

BiT: arXiv:1912.11370, section 3.3; the study: arXiv:2106.00116, appendix.
"""

import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import models
from engine import console, distance, memory, options
from engine.checkpoint import Run
from engine.evaluate import evaluate, predict, to_input
from engine.grid import Cell, Grid, Network, open_networks, unfinished, write_result
from engine.log import Log
from engine.metrics import loss_sum
from engine.optimizer import SGD_AGC, set_learning_rate
from engine.outputs import network_facts, save_network, save_predictions
from engine.processes import StopSignal, parallel, parts, run_script, setup
from engine.weights import outputs_of, weights_of
from readers import transforms
from readers.cache import decode_once
from readers.inspect import data_digest
from readers.labels import shared_classes
from readers.workers import in_order, loader

# ---- Recipes -------------------------------------------------------------------------------------


class HyperRule(NamedTuple):
    """How to fine-tune, by the number and size of the images (arXiv:1912.11370, section 3.3)."""

    resize: int  # pixels
    crop: int
    mixup: float  # alpha, 0 for none
    warmup: int  # steps
    decays: tuple[int, ...]
    steps: int

    def learning_rate(self, step, base_lr):
        """Linear from 0 during warm-up; a tenth from the step after each boundary of `decays`."""
        if step < self.warmup:
            return base_lr * step / self.warmup
        return base_lr * 0.1 ** sum(step > boundary for boundary in self.decays)


def hyperrule(num_examples, image_size):
    """BiT's rule for so many training images of that size (pixels: side, or (H,W))."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    resize, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    if num_examples < 20_000:
        return HyperRule(resize, crop, 0.0, 100, (200, 300, 400), 500)
    if num_examples < 500_000:
        return HyperRule(resize, crop, 0.1, 500, (3000, 6000, 9000), 10_000)
    return HyperRule(resize, crop, 0.1, 500, (6000, 12_000, 18_000), 20_000)


class Recipe(NamedTuple):
    """How to fine-tune, beside what the HyperRule says."""

    batch_size: int
    lr: float
    clipping: float | None  # of AGC
    nesterov: bool = True  # of the momentum 0.9
    zero_head: bool = False  # the classifier starts at 0, else at PyTorch's default
    square: bool = False  # training images are resized to a square, else by their shorter side
    steps: int | None = None  # in place of the rule's number
    micro_batch: int | None = None  # smaller sets are drawn with replacement (None: than a batch)
    autocast: bool = True  # else --precision auto is fp32, TF32 on GPUs


RECIPES = {
    "paper": Recipe(128, 0.001, 0.01, micro_batch=4, autocast=False),
    "bit": Recipe(512, 0.003, None, nesterov=False, zero_head=True, square=True),
    "synthetic": Recipe(32, 0.02, 0.01, steps=40),
}
MICRO_BATCH = {"cifar10": 64, "cifar100": 64}  # of the study, where it is not its recipe's
# Targets of the study whose full training set is drawn with probability inverse to class frequency;
# of images with exactly one label (PadChest-Cl); normalised as X-rays, whatever the source.
BALANCED = ("covidx", "flowers102")
SINGLE_LABEL = ("padchest",)
XRAY_NORMALIZED = ("padchest",)


def choose_rule(target, num_examples, args, steps=None):
    """The HyperRule for a Target, as the study ran it, with the command line's size and steps.
    Synthetic images keep their own size; `Target` says which X-ray sets take theirs, at 224.
    """
    rule = hyperrule(num_examples, target.image_size)
    own_size = target.train_set.size or (224 if target.xray_pipeline else None)
    if own_size:
        rule = rule._replace(resize=own_size, crop=own_size)
    if args.image_size:  # the same ratio of resize to crop
        resize = round(args.image_size * rule.resize / rule.crop)
        rule = rule._replace(resize=resize, crop=args.image_size)
    steps = steps or args.steps or RECIPES[target.recipe].steps
    if steps:  # the same schedule
        warmup, *decays = (round(s * steps / rule.steps) for s in (rule.warmup, *rule.decays))
        rule = rule._replace(warmup=warmup, decays=tuple(decays), steps=steps)
    return rule


def choose_pipeline(target, rule, train):
    """A Target's transforms: those of X-rays, or BiT's (to test, a square). Raises ValueError."""
    if target.xray_pipeline:
        return transforms.xray_pipeline(rule.crop, train)
    square = RECIPES[target.recipe].square
    return transforms.cropped_pipeline(rule.resize, rule.crop, train, square)


HELP = options.recipe_table(["recipe"], {(name,): recipe for name, recipe in RECIPES.items()})
FLAGS = """--checkpoint --target --seeds --steps --scratch-steps --save --dry-run
    --accumulate --checkpoint-activations"""
DEFAULTS = {
    "target": dict(default=["synthetic-natural-target", "synthetic-xray-target"])
    | dict(type=data.dataset_name),
    "out": dict(default="results"),
    "model": options.words(*models.MODELS) | dict(help="of scratch, or of a foreign weight file"),
    "source": dict(help="what such a weight file was trained on"),
    "recipe": options.words(*RECIPES),
    "save": options.words("predictions", "model"),
}


# ---- Networks and targets ------------------------------------------------------------------------


def open_network(path, args):
    """The Network of a run folder or weight file; --model and --source tell of a foreign one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint {path}: no such run folder or weight file")
    file = path / "model.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FileNotFoundError(f"{path}: holds no model.pt; pretrain.py has not finished there")
    content, digest = weights_of(file)
    about = network_facts(file, content)
    model, source = about.get("model", args.model), about.get("source", args.source)
    if not model or not source:
        raise ValueError(f"{file}: not written by pretrain.py; say --model and --source of it")
    if args.model not in (None, model):
        raise ValueError(f"{file} is of {model}, not of --model {args.model}")
    with torch.device("meta"):
        models.matching_state(models.create_model(model, 1), file, content)
    if not about:
        domain = data.source_domain(source, args.domain)
        # BiT's own networks, in .npz or as timm has them, take pixels in [-1,1].
        bit = file.suffix == ".npz" or any("stem.conv.weight" in str(key) for key in content)
        normalization = transforms.NORMALIZATION["medical" if bit else domain]
        about = {"domain": domain, "images": None, "normalization": normalization}
        about["outputs"] = outputs_of(content)
    about |= {"source": source, "model": model, "path": str(file), "digest": digest}
    try:
        name = about.pop("run", None) or f"{data.dataset_slug(source)}-{model}"
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Network(name, **about)


class Target:
    """A dataset to transfer to. Its images are decoded once, by `decode`; then train, test and
    sample are (dataset, pipeline): the training images of all cells, the test set, and what the
    distance compares (None where no network needs it). recipe: a name of RECIPES.
    """

    def __init__(self, name, train_set, test_set, recipe):
        self.name, self.train_set, self.test_set, self.recipe = name, train_set, test_set, recipe
        self.data = data_digest(train=train_set, test=test_set)
        self.image_size = tuple(train_set.read(0).shape[-2:])  # of the first image, as of all
        # X-ray sets of several labels, or left with one, and one's own take the X-ray pipeline.
        own = train_set.task == "multilabel" or {"single_label", "domain"} & {*train_set.options}
        self.xray_pipeline = train_set.domain == "medical" and bool(own) and not train_set.size
        self.distances, self.features = {}, {}  # by network, as they are measured

    def decode(self, cells, args, env):
        """Reads the images that these cells need, each once on a machine."""
        rule = choose_rule(self, len(self.train_set), args)
        testing = choose_pipeline(self, rule, False)
        training = choose_pipeline(self, rule, True) if args.method == "finetune" else testing
        train_set, self.sample = self.train_set, None
        if any(cell.network.sample is not None for cell in cells):
            chosen = train_set.subset(distance.sample(len(train_set), distance.SAMPLE // 2))
            self.sample = decode_once(chosen, testing, env, args.cache_dir)
        self.indices = np.unique(np.concatenate([cell.indices for cell in cells]))
        if len(self.indices) < len(train_set):
            train_set = train_set.subset(self.indices)
        console.say(env, f"{self.name}: reading {len(train_set):,} + {len(self.test_set):,} images")
        if len(train_set):
            self.train = decode_once(train_set, training, env, args.cache_dir)
        self.test = decode_once(self.test_set, testing, env, args.cache_dir)

    def rows(self, cell):
        """Where in `train` the images of a cell are: (M,) int64."""
        return np.searchsorted(self.indices, cell.indices)


def open_targets(args, env):
    """[Target]. Raises ValueError or FileNotFoundError naming the dataset and the mend."""
    data.refuse_options(args.target, args, *["domain"] * bool(args.source))  # of that source
    targets = []
    for name in dict.fromkeys(args.target):
        sets = data.open_splits(name, args, env)
        default = data.base_name(name) in SINGLE_LABEL and args.method != "eval"
        single_label = default if args.single_label is None else args.single_label
        if single_label and sets[0].task == "multilabel":
            sets = map(data.keep_single_label, sets)
        recipe = args.recipe or ("synthetic" if name.startswith("synthetic") else "paper")
        targets.append(Target(name, *sets, recipe))
        if args.balanced and targets[-1].train_set.task == "multilabel":
            raise ValueError(f"--balanced: {name} is multi-label; it has no one class an image")
    if args.single_label and not any(t.train_set.options.get("single_label") for t in targets):
        names = ", ".join(args.target)
        raise ValueError(f"--single-label means nothing for {names}: not multi-label; leave it out")
    return targets


def make_cell(network, target, shots, seed, indices, args, env):
    """The Cell of one run: indices of its training images, and every setting as used. Raises
    ValueError for a batch that is too small.
    """
    dataset = data.base_name(target.name)
    fixed = dataset in XRAY_NORMALIZED and network.source != "statistics"
    normalization = None if fixed else network.normalization  # None: the target's own
    recipe = RECIPES[target.recipe]
    rule = choose_rule(target, len(indices), args, network.steps)
    settings = {"precision": env.precision, "crop": rule.crop}
    settings["normalization"] = normalization or transforms.NORMALIZATION[target.train_set.domain]
    if args.method == "finetune":
        batch_size = args.batch_size or recipe.batch_size
        if batch_size < 2 * env.ranks:
            raise ValueError(f"--batch-size {batch_size} is less than 2 images a process")
        micro_batch = recipe.micro_batch and MICRO_BATCH.get(dataset, recipe.micro_batch)
        sampling = "replacement" if len(indices) < (micro_batch or batch_size) else "shuffle"
        if args.balanced or (args.balanced is None and dataset in BALANCED and shots is None):
            sampling = "balanced"
        settings["precision"] = env.training_precision(args, rule.crop)
        if args.precision == "auto" and not recipe.autocast:
            settings["precision"] = "tf32" if env.device.type == "cuda" else "fp32"
        settings |= {"recipe": target.recipe, "batch_size": batch_size, "lr": args.lr or recipe.lr}
        settings |= {"clipping": recipe.clipping, "sampling": sampling, "compile": args.compile}
        settings |= {key: getattr(recipe, key) for key in ("nesterov", "zero_head", "square")}
        settings |= rule._asdict()
    if args.method == "eval":
        settings["labels"] = shared_classes(network, target.test_set)
    flops = models.forward_flops(network.model, 1, rule.crop)
    about = network, target, shots, seed, args.method, indices, settings, flops
    return Cell(*about, args.out, data.dataset_slug(target.name), tuple(args.save or ()))


# ---- The runs ------------------------------------------------------------------------------------


def main():
    args = options.parse(f"{__doc__}\n{HELP}", FLAGS, **DEFAULTS)
    args.method = "finetune"
    env = setup(args.precision)
    targets, networks, cells = open_targets(args, env), open_networks(args, open_network, env), []
    for target in targets:
        everything = np.arange(len(target.train_set))
        for seed in args.seeds or [args.seed]:
            for network in networks:
                cells.append(make_cell(network, target, None, seed, everything, args, env))
    todo, results = unfinished(cells, args.out, env)
    grid = Grid([[cell] for cell in todo], results, env, together=True)
    if args.dry_run:
        return grid.dry_run(cells, lambda name: models.create_model(name, 2, device=env.device))
    for target in targets:
        if mine := [cell for cell in todo if cell.target is target]:
            target.decode(mine, args, env)
    signals = StopSignal(env, args.time_limit)
    for cell in grid:
        with grid.tolerating(cell):
            metrics, about = fine_tune(cell, signals, args, env, grid.title(cell))
            write_result(cell, metrics, about, args.workers, env)
            grid.done(cell, metrics)
    return grid.finish(cells)


def fine_tune(cell, signals, args, env, title=None):
    """`train` in as few parts of a batch as fit into memory, or in those of --accumulate."""
    name, share = cell.network.model, math.ceil(cell.config["batch_size"] / env.ranks)
    env = env.computing(cell.config["precision"])
    create = functools.partial(models.create_model, name, 2, args.checkpoint_activations)
    work = functools.partial(train, cell, signals, args, env, title)
    return memory.in_parts(work, create, cell.config["crop"], share, env, args.accumulate)


def train(cell, signals, args, env, title, accumulate):
    """Fine-tunes the whole network and evaluates its last step on the test set.

    A full-shot run keeps a checkpoint beside its result and continues from it. title: of what is
    said of it, None for nothing. Returns (metrics, what the result file says of the training).
    """
    config, network, target = cell.config, cell.network, cell.target
    recipe = RECIPES[target.recipe]
    rule = HyperRule(**{key: config[key] for key in HyperRule._fields})
    train_set, pipeline = target.train
    classes = len(train_set.classes)
    if len(cell.indices) < len(train_set):
        train_set = train_set.subset(target.rows(cell))
    torch.manual_seed(cell.seed)
    model = models.create_model(network.model, classes, args.checkpoint_activations)  # fresh head
    if network.path:
        content, _ = weights_of(network.path, network.digest)
        models.load_weights(model, network.path, content, head=False)
    if recipe.zero_head:
        for parameter in model.head.conv.parameters():
            torch.nn.init.zeros_(parameter)
    model = models.place(model, env.device)
    measure_distance(model, cell, args, env)
    normalization = config["normalization"]
    groups = model.parameter_groups()
    optimizer = SGD_AGC(groups, config["lr"], nesterov=recipe.nesterov, clipping=recipe.clipping)
    run = Run(cell.checkpoint, model, optimizer, config, env, args.save_minutes, rule.steps)
    order = config["batch_size"], cell.seed, config["sampling"], env.rank, env.ranks
    batches = data.Batches(train_set, pipeline, *order, pairs=rule.mixup > 0)
    stream = loader(batches, run.step, rule.steps, args.workers, env.device)
    if args.compile:
        model.compile_blocks()
    forward = parallel(model.train(), env)  # averages gradients over the ranks
    with Log(env, run.step, rule.steps, config["batch_size"], args.log_every, None, title) as log:
        while run.step < rule.steps:
            began = time.monotonic()
            batch, targets, count = log.next(stream)  # count: valid labels of the global batch
            lr = rule.learning_rate(run.step, config["lr"])
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            if rule.mixup:  # of neighbours (Zhang et al. 2018, arXiv:1710.09412)
                rng = data.generator(cell.seed, data.Stream.MIXUP, run.step)
                share = float(rng.beta(rule.mixup, rule.mixup))  # one coefficient a step
            for images, labels in parts(forward, batch, targets, accumulate, env, multiple=2):
                inputs = to_input(images, normalization, env.device)
                if rule.mixup:
                    partner = torch.arange(len(inputs), device=env.device).bitwise_xor(1)
                    partner = partner.clamp(max=len(inputs) - 1)
                    inputs = share * inputs + (1 - share) * inputs[partner]
                with env.autocast():
                    logits = forward(inputs)
                part_loss = loss_sum(logits, labels, train_set.task)
                if rule.mixup:
                    other_loss = loss_sum(logits, labels[partner], train_set.task)
                    part_loss = share * part_loss + (1 - share) * other_loss
                # DDP averages over ranks; the mean over the global batch is a sum over ranks.
                (part_loss * (env.ranks / max(count, 1))).backward()
                loss = loss + part_loss.detach()
            optimizer.step()
            run.step += 1
            log.add(run.step, lr, loss, count, optimizer, run.step == rule.steps)
            run.seconds += time.monotonic() - began
            run.save_or_stop(signals, log)
        run.save()
        at_once = env.ranks * memory.images_at_once(rule.crop)
        tested = in_order(*target.test, at_once, env.rank, env.ranks, args.workers, env.device)
        known, keep = target.test_set, functools.partial(save_predictions, cell)
        about = known.labels, known.classes, env, normalization, known.groups
        metrics = evaluate(model, tested, *about, keep)
        log.evaluation(run.step, metrics)
    if "model" in cell.save and env.main:
        source = f"{data.dataset_slug(network.source)}-to-{cell.folder}-{cell.path.stem}"
        about = network.model, train_set, normalization, rule.crop
        save_network(cell.own_file("model"), model.state_dict(), *about, source=source)
    flops = models.forward_flops(network.model, classes, rule.crop)
    return metrics, run.summary(len(train_set), config["batch_size"], flops)


def extract(model, cell, part, args, env, logits=False):
    """Features (N,D), or logits (N,C), of part = (dataset, pipeline): float32, on the device."""
    at_once = memory.images_at_once(cell.config["crop"])
    stream = in_order(*part, at_once, env.rank, env.ranks, args.workers, env.device)
    width, forward = model.head.conv.in_channels, model.eval().features
    if logits:
        width, forward = model.head.conv.out_channels, model
    return predict(forward, width, stream, len(part[0]), env, cell.config["normalization"])


def measure_distance(model, cell, args, env):
    """Once a network and target: how far this lies from the source, by the network's features."""
    network, target = cell.network, cell.target
    if network.sample is not None and network.name not in target.distances:
        features = distance.project(extract(model, cell, target.sample, args, env))
        target.distances[network.name] = distance.compare(network.sample, features)


if __name__ == "__main__":
    run_script(main)
