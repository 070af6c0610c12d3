"""Full-shot transfer: fine-tunes pre-trained networks on targets with the BiT-HyperRule.

    python transfer.py                    # what runs/ holds, and scratch, to the synthetic targets
    torchrun --nproc_per_node=8 transfer.py --checkpoint runs/nih-R50x1 scratch --target cifar10

Each run of the grid checkpoints x targets x seeds writes results/TARGET/SOURCE-MODEL/
full-seedS.json when it is finished; started again, the script does what is missing.
"""

import functools
import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import console
import data
import engine
import loading
import models
import records
import transforms
from optimizer import make_optimizer

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
# What is transferred
# ------------------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """A network to transfer: path is None for scratch; digest: of the weights' file."""

    path: str | None
    source: str
    domain: str | None
    images: int | None
    model: str
    normalization: tuple | None
    digest: str | None

    @property
    def name(self):
        return f"{data.dataset_slug(self.source)}-{self.model}"


def open_checkpoints(checkpoints, model=None, source=None):
    """The networks that --checkpoint names: run folders, weight files, "scratch".

    No checkpoints: every finished run below runs/, and scratch. model, source: what a foreign
    weight file is; model alone: scratch's. Every file is read once, so that a wrong one is refused
    before any training. Raises ValueError or FileNotFoundError.
    """
    found = sorted(str(path.parent) for path in Path("runs").glob("*/model.pt"))
    if not checkpoints and not found:
        raise FileNotFoundError(
            "no pre-trained network in runs/; run pretrain.py first, or give --checkpoint"
        )
    checkpoints = checkpoints or [*found, "scratch"]
    opened = [_open(path, model, source) for path in checkpoints if path != "scratch"]
    if "scratch" in checkpoints:
        names = [model] if model else sorted({p.model for p in opened}) or ["R14x0.5"]
        for name in names:
            models.create_model(name, 1)
            opened.append(Pretrained(None, "scratch", None, 0, name, None, None))
    return opened


def _open(path, model, source):
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FileNotFoundError(f"{path}: holds no model.pt; pretrain.py has not finished there")
    record = models.read_weights(file)
    if isinstance(record, dict) and "name" in record:
        if model and model != record["name"]:
            raise ValueError(f"{file} is of {record['name']}, not of --model {model}")
        normalization = tuple(record["mean"]), tuple(record["std"])
        facts = record["source"], record["domain"], record["images"], record["name"]
    else:
        if not model or not source:
            raise ValueError(f"{file}: not written by pretrain.py; say --model and --source of it")
        parts = {part.partition("@")[0] for part in source.split("+")}
        medical = parts <= {"chexpert", "mimic", "nih", "padchest", "synthetic-xray"}
        domain = "medical" if medical else "natural"
        # BiT's own .npz networks take pixels in [-1,1], whatever the source.
        normalization = transforms.NORMALIZATION["medical" if file.suffix == ".npz" else domain]
        facts = source, domain, None, model
    models.load_weights(models.create_model(facts[3], 1), file)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return Pretrained(str(file), *facts, normalization, digest.hexdigest()[:16])


# ------------------------------------------------------------------------------------------------
# The grid: checkpoints x targets x shots x seeds
# ------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One run: what it transfers, to which target, on how many shots (None: all), where to."""

    pretrained: Pretrained
    target: str
    shots: int | None
    seed: int
    path: Path
    config: dict


class Target(NamedTuple):
    """A target's images, as they are and prepared: both sets in memory where they fit."""

    original: data.ImageDataset
    train_set: data.ImageDataset
    train_pipeline: transforms.Pipeline
    test_set: data.ImageDataset
    test_pipeline: transforms.Pipeline
    recipe_name: str


def add_options(parser):
    """The options that full-shot and few-shot transfer share."""
    add = parser.add_argument
    checkpoints = "run folders, weight files, 'scratch' (default: all in runs/, and scratch)"
    add("--checkpoint", nargs="+", metavar="PATH", help=checkpoints)
    add("--target", nargs="+", default=["synthetic-natural-target", "synthetic-xray-target"],
        metavar="NAME", help="datasets to transfer to")  # fmt: skip
    add("--model", help="network of scratch, or of a weight file that pretrain.py did not write")
    add("--source", help="what such a weight file was trained on")
    recipes = f"{', '.join(RECIPES)} (default: synthetic for synthetic targets, else paper)"
    add("--recipe", type=console.one_of(*RECIPES), help=recipes)
    add("--steps", type=console.positive(int), help="training steps (default: the HyperRule's)")
    engine.add_common_options(parser, out="results")


def open_targets(args, env, few_shot=False):
    """{name: Target}; each image is read once for the whole grid, as far as memory allows."""
    engine.check_data_options(args.target, args)
    targets = {}
    for name in args.target:
        train_set, test_set = engine.load_splits(name, args, env)
        single_label = args.single_label
        if single_label is None:
            single_label = few_shot and data.base_name(name) in SINGLE_LABEL
        if single_label and train_set.task == "multilabel":
            train_set, test_set = map(data.keep_single_label, (train_set, test_set))
        if args.balanced and train_set.task == "multilabel":
            raise ValueError(f"--balanced: {name} is multi-label; it has no one class an image")
        synthetic = name.startswith("synthetic")
        recipe_name = args.recipe or ("synthetic" if synthetic else "paper")
        recipe = RECIPES[recipe_name]
        rule = choose_rule(train_set, len(train_set), recipe, args.image_size, args.steps)
        prepared = (
            loading.preload(dataset, choose_pipeline(dataset, rule, recipe, train))
            for dataset, train in ((train_set, True), (test_set, False))
        )
        targets[name] = Target(train_set, *itertools.chain(*prepared), recipe_name)
    return targets


def make_grid(args, env, targets, all_shots):
    """Every cell, also those that are finished.

    Raises ValueError for more shots than a class has, and for two cells of one path.
    """
    pretrained, cells = open_checkpoints(args.checkpoint, args.model, args.source), {}
    seeds = range(args.seed, args.seed + args.seeds)
    for (name, target), shots, seed in itertools.product(targets.items(), all_shots, seeds):
        labels, classes = target.train_set.labels, target.train_set.classes
        images = len(data.few_shot_indices(labels, shots, seed, classes) if shots else labels)
        file = f"{shots}shot-seed{seed}.json" if shots else f"full-seed{seed}.json"
        for source in pretrained:
            path = Path(args.out) / data.dataset_slug(name) / source.name / file
            if path in cells:
                raise ValueError(
                    f"two checkpoints or targets would write {path}; run them apart, one with "
                    "another --out"
                )
            config = cell_config(args, env, name, target, source, shots, seed, images)
            cells[path] = Cell(source, name, shots, seed, path, config)
    return list(cells.values())


def cell_config(args, env, name, target, pretrained, shots, seed, images):
    """Every setting of a run, as used."""
    recipe = RECIPES[target.recipe_name]
    rule = choose_rule(target.original, images, recipe, args.image_size, args.steps)
    batch_size = args.batch_size or recipe.batch_size
    if batch_size < 2 * env.ranks:
        raise ValueError(f"--batch-size {batch_size} is less than 2 images a process")
    sampling = "replacement" if images < batch_size else "shuffle"
    if args.balanced or (data.base_name(name) in BALANCED and shots is None):
        sampling = "balanced"
    left_out = ("checkpoint", "target", "shots", "seeds", "image_size", "balanced")
    left_out += engine.DATA_OPTIONS
    return {key: value for key, value in vars(args).items() if key not in left_out} | {
        "checkpoint": pretrained.path or "scratch",
        "weights": pretrained.digest,
        "source": pretrained.source,
        "model": pretrained.model,
        "target": name,
        "target_options": target.original.options,
        "shots": shots,
        "seed": seed,
        "images": images,
        "train_images": len(target.train_set),
        "test_images": len(target.test_set),
        "recipe": target.recipe_name,
        "batch_size": batch_size,
        "lr": args.lr or recipe.lr,
        "clipping": recipe.clipping,
        "sampling": sampling,
        "precision": env.precision,
        **rule._asdict(),
    }


def unfinished(cells, kind):
    """The cells without a result. Raises ValueError for a file made with other settings."""
    todo = [cell for cell in cells if not records.read_result(cell.path, kind, cell.config)]
    for cell in todo:
        records.load_checkpoint(checkpoint_path(cell), cell.config)
    return todo


def checkpoint_path(cell):
    """Where an unfinished full-shot run is kept; few-shot runs are short and start anew."""
    return cell.path.with_suffix(".checkpoint.pt") if cell.shots is None else None


def run_cell(cell, target, kind, env, signals, log=None, bar=None):
    """Trains one cell and writes its result."""
    train_set, pipeline = target.train_set, target.train_pipeline
    if cell.shots:
        chosen = data.few_shot_indices(train_set.labels, cell.shots, cell.seed, train_set.classes)
        # Of a pool too large for memory, the few images of this cell are read here.
        train_set, pipeline = loading.preload(train_set.subset(chosen), pipeline)
    metrics, train = fine_tune(cell, train_set, pipeline, target, env, signals, log, bar)
    record = {
        "schema": 1,
        "kind": kind,
        "source": cell.pretrained.source,
        "source_domain": cell.pretrained.domain,
        "source_images": cell.pretrained.images,
        "model": cell.pretrained.model,
        "target": cell.target,
        "target_domain": train_set.domain,
        "shots": cell.shots,
        "seed": cell.seed,
        "method": "finetune",
        "recipe": target.recipe_name,
        "metrics": metrics,
        "train": train,
        "config": cell.config,
        "environment": engine.environment(env),
    }
    if env.main:
        console.write_json(cell.path, record)
        if checkpoint_path(cell):
            checkpoint_path(cell).unlink(missing_ok=True)
    return record


# ------------------------------------------------------------------------------------------------
# Fine-tuning
# ------------------------------------------------------------------------------------------------


def prepare_model(pretrained, num_classes, seed, zero_head, device):
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


def fine_tune(cell, train_set, pipeline, target, env, signals, log=None, bar=None):
    """Fine-tunes the whole network on train_set and evaluates its last step on the test set.

    A full-shot run keeps a checkpoint beside its result and continues from it.
    Returns (metrics, what the result file says of the training).
    """
    config, recipe = cell.config, RECIPES[target.recipe_name]
    rule = HyperRule(**{key: config[key] for key in HyperRule._fields})
    normalization = cell.pretrained.normalization or transforms.NORMALIZATION[train_set.domain]
    model = prepare_model(
        cell.pretrained, len(train_set.classes), cell.seed, recipe.zero_head, env.device
    )
    optimizer = make_optimizer(
        model, config["lr"], clipping=config["clipping"], nesterov=recipe.nesterov
    )
    path = checkpoint_path(cell)
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
    metrics = engine.evaluate(
        model, target.test_set, target.test_pipeline, env, normalization,
        max(config["batch_size"], 2**22 // rule.crop**2), config["workers"],
    )  # fmt: skip
    return metrics, run.summary(len(train_set), env)


# ------------------------------------------------------------------------------------------------
# Closing table
# ------------------------------------------------------------------------------------------------


def report(cells, kind):
    """Mean and standard deviation over seeds, a row a target and network, a column a shot count."""
    values, columns = {}, []
    for cell in cells:
        record = records.read_result(cell.path, kind)
        metric = "mean_auc" if record["target_domain"] == "medical" else "accuracy"
        column = f"{cell.shots} shots" if cell.shots else "full"
        if column not in columns:
            columns.append(column)
        row = cell.target, cell.pretrained.name, metric
        values.setdefault(row, {}).setdefault(column, []).append(record["metrics"][metric])
    rows = [
        [*row, *(describe(by_column.get(column, [])) for column in columns)]
        for row, by_column in values.items()
    ]
    console.print_table(rows, ["target", "source-model", "metric", *columns])


def describe(values):
    """mean ± sd (n) of what is not None."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.3f} (1)" if values else ""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} ({len(values)})"


def main():
    parser = console.Parser(__doc__)
    add_options(parser)
    parser.add_argument(
        "--seeds", type=console.positive(int), default=1, help="runs of each, study: 5"
    )
    args = parser.parse_args()
    env = engine.setup(args.precision)
    targets = open_targets(args, env)
    cells = make_grid(args, env, targets, [None])
    todo = unfinished(cells, "transfer")
    console.say(env, f"{len(cells)} runs, {len(cells) - len(todo)} finished already")
    signals = engine.StopSignal(env, args.time_limit)
    for number, cell in enumerate(todo):
        title = (
            f"[{number + 1}/{len(todo)}] {cell.pretrained.name} to {cell.target}, seed {cell.seed}"
        )
        steps = cell.config["steps"]
        with engine.progress_bar(env, steps, title=title) as bar:
            log = records.Log(env, None, 0, steps, bar, title)
            record = run_cell(cell, targets[cell.target], "transfer", env, signals, log, bar)
            log.evaluation(steps, record["metrics"])
    if env.main:
        report(cells, "transfer")


if __name__ == "__main__":
    engine.run(main)
