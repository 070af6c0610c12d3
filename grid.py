"""What a transfer study consists of: checkpoints x targets x shots x seeds, a cell for each run."""

import hashlib
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import finetune
import models
from engine import checkpoint as records
from engine import console, distance
from engine import processes as engine
from readers import cache as loading
from readers import transforms

METHODS = ("finetune", "linear", "nearest-mean")

# ------------------------------------------------------------------------------------------------
# What is transferred
# ------------------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """A network to transfer: path is None for scratch; digest: of the weights' file.

    steps: of fine-tuning, in place of the recipe's. sample: projected features of the source
    (distance.project), None where the file has none.
    """

    path: str | None
    source: str
    domain: str | None
    images: int | None
    model: str
    normalization: tuple | None = None
    digest: str | None = None
    steps: int | None = None
    sample: torch.Tensor | None = None

    @property
    def name(self):
        return f"{data.dataset_slug(self.source)}-{self.model}"


def open_checkpoints(checkpoints, model=None, source=None, method="finetune", scratch_steps=None):
    """The networks that --checkpoint names: run folders, weight files, "scratch".

    None named: every finished run below runs/, and scratch (which has no features to classify).
    model, source: what a foreign weight file is; model alone: scratch's. scratch_steps: of a second
    scratch. Every file is read once, so that a wrong one is refused before any training. Raises
    ValueError or FileNotFoundError.
    """
    frozen = method != "finetune"
    if not checkpoints:
        checkpoints = sorted(str(path.parent) for path in Path("runs").glob("*/model.pt"))
        if not checkpoints:
            raise FileNotFoundError(
                "no pre-trained network in runs/; run pretrain.py first, or give --checkpoint"
            )
        checkpoints += [] if frozen else ["scratch"]
    if frozen and "scratch" in checkpoints:
        raise ValueError(f"--method {method}: scratch has no features; leave it out")
    if scratch_steps and "scratch" not in checkpoints:
        raise ValueError("--scratch-steps: name scratch among --checkpoint too")
    opened = [_open(path, model, source) for path in checkpoints if path != "scratch"]
    if "scratch" in checkpoints:
        names = [model] if model else sorted({p.model for p in opened}) or ["R14x0.5"]
        for name in names:
            models.create_model(name, 1)
            opened.append(Pretrained(None, "scratch", None, 0, name))
            if scratch_steps:
                longer = f"scratch-{scratch_steps}steps"
                opened.append(Pretrained(None, longer, None, 0, name, steps=scratch_steps))
    return opened


def _open(path, model, source):
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FileNotFoundError(f"{path}: holds no model.pt; pretrain.py has not finished there")
    record, sample = models.read_weights(file), None
    if isinstance(record, dict) and "name" in record:
        if model and model != record["name"]:
            raise ValueError(f"{file} is of {record['name']}, not of --model {model}")
        normalization = tuple(record["mean"]), tuple(record["std"])
        facts = record["source"], record["domain"], record["images"], record["name"]
        sample = record.get("sample")
    else:
        if not model or not source:
            raise ValueError(f"{file}: not written by pretrain.py; say --model and --source of it")
        parts = {data.base_name(part) for part in source.split("+")}
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
    return Pretrained(str(file), *facts, normalization, digest.hexdigest()[:16], sample=sample)


# ------------------------------------------------------------------------------------------------
# Targets
# ------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A target's two sets, of which nothing is decoded yet, and a name of finetune.RECIPES."""

    train_set: data.ImageDataset
    test_set: data.ImageDataset
    recipe: str


def add_options(parser):
    """The options that full-shot and few-shot transfer share."""
    add = parser.add_argument
    checkpoints = "run folders, weight files, 'scratch' (default: all in runs/, and scratch)"
    add("--checkpoint", nargs="+", metavar="PATH", help=checkpoints)
    add("--target", nargs="+", default=["synthetic-natural-target", "synthetic-xray-target"],
        metavar="NAME", help="datasets to transfer to")  # fmt: skip
    add("--method", type=console.one_of(*METHODS), default="finetune", help="finetune: the whole "
        "network; on its frozen features linear: logistic regression, nearest-mean: nearest class "
        "mean")  # fmt: skip
    add("--model", help="network of scratch, or of a weight file that pretrain.py did not write")
    add("--source", help="what such a weight file was trained on")
    recipes = (
        f"{', '.join(finetune.RECIPES)} (default: synthetic for synthetic targets, else paper)"
    )
    add("--recipe", type=console.one_of(*finetune.RECIPES), help=recipes)
    add("--steps", type=console.positive(int), help="training steps (default: the HyperRule's)")
    add("--scratch-steps", type=console.positive(int), metavar="N", help="train scratch a second "
        "time, for so many steps (default: no)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the grid and how long it would take, and "
        "leave")  # fmt: skip
    engine.add_common_options(parser, out="results")


def open_targets(args, env, few_shot=False):
    """{name: Target}. Raises ValueError or FileNotFoundError naming the dataset and the mend."""
    engine.check_data_options(args.target, args)
    targets = {}
    for name in args.target:
        train_set, test_set = engine.load_splits(name, args, env)
        single_label = args.single_label
        if single_label is None:
            single_label = few_shot and data.base_name(name) in finetune.SINGLE_LABEL
        if single_label and train_set.task == "multilabel":
            train_set, test_set = map(data.keep_single_label, (train_set, test_set))
        if args.balanced and train_set.task == "multilabel":
            raise ValueError(f"--balanced: {name} is multi-label; it has no one class an image")
        synthetic = name.startswith("synthetic")
        recipe = args.recipe or ("synthetic" if synthetic else "paper")
        targets[name] = Target(train_set, test_set, recipe)
    if args.single_label and not any(
        t.train_set.options.get("single_label") for t in targets.values()
    ):
        raise ValueError(
            f"--single-label means nothing for {', '.join(targets)}: not multi-label; leave it out"
        )
    return targets


class Images(NamedTuple):
    """What the cells of a target read, decoded once; each set (dataset, pipeline).

    train: the training images of all cells; indices: theirs in the target's, sorted (N,) int64.
    sample: those that the domain distance compares, or None.
    """

    train: tuple
    indices: np.ndarray
    test: tuple
    sample: tuple | None

    def rows(self, cell):
        """Where in `train` the images of a cell are."""
        return np.searchsorted(self.indices, cell.indices)

    def train_of(self, cell):
        dataset, pipeline = self.train
        whole = len(cell.indices) == len(self.indices)
        return (dataset if whole else dataset.subset(self.rows(cell))), pipeline


def decode(cells, targets, args, env):
    """{name: Images} of the targets that these cells need: each image is read once on a machine."""
    found = {}
    for name, (train_set, test_set, recipe) in targets.items():
        mine = [cell for cell in cells if cell.target == name]
        if not mine:
            continue
        recipe = finetune.RECIPES[recipe]
        rule = finetune.choose_rule(train_set, len(train_set), recipe, args.image_size)
        training, testing = (
            finetune.choose_pipeline(train_set, rule, recipe, train) for train in (True, False)
        )
        indices = np.unique(np.concatenate([cell.indices for cell in mine]))
        sample = None
        if any(cell.pretrained.sample is not None for cell in mine):
            chosen = train_set.subset(distance.sample(len(train_set), distance.SAMPLE // 2))
            sample = loading.decode_once(chosen, testing, env, args.cache_dir)
        console.say(env, f"{name}: reading {len(indices):,} + {len(test_set):,} images")
        chosen = train_set if len(indices) == len(train_set) else train_set.subset(indices)
        pipeline = training if args.method == "finetune" else testing
        train = loading.decode_once(chosen, pipeline, env, args.cache_dir)
        test = loading.decode_once(test_set, testing, env, args.cache_dir)
        found[name] = Images(train, indices, test, sample)
    return found


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One run: what it transfers, to which target, on how many shots (None: all), where to.

    indices: its training images among the target's, sorted (M,) int64.
    """

    pretrained: Pretrained
    target: str
    shots: int | None
    seed: int
    method: str
    indices: np.ndarray
    path: Path
    config: dict

    @property
    def kind(self):
        return "fewshot" if self.shots else "transfer"

    @property
    def checkpoint(self):
        """Where unfinished full-shot fine-tuning is kept; all else is short and starts anew."""
        kept = self.method == "finetune" and not self.shots
        return self.path.with_suffix(".checkpoint.pt") if kept else None

    def __str__(self):
        shots = f"{self.shots} shots" if self.shots else "all images"
        return f"{self.target} from {self.pretrained.name}, {shots}, seed {self.seed}"


# Options of training, which mean nothing on frozen features.
TRAINING = ("recipe", "steps", "lr", "batch_size", "balanced", "compile")


def make_grid(args, env, targets, all_shots):
    """Every cell, also those that are finished.

    Raises ValueError for more shots than a class has, for two cells of one path, for options that
    the method does not take, and OSError where results cannot be written.
    """
    out = Path(args.out)
    there = next(path for path in (out, *out.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise OSError(f"--out {out}: {there} is no directory that can be written; give another")
    for option in TRAINING if args.method != "finetune" else ():
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} means nothing for --method {args.method}; leave it out")
    pretrained = open_checkpoints(
        args.checkpoint, args.model, args.source, args.method, args.scratch_steps
    )
    cells = {}
    seeds = range(args.seed, args.seed + args.seeds)
    ending = "" if args.method == "finetune" else f"-{args.method}"
    for (name, target), shots, seed in itertools.product(targets.items(), all_shots, seeds):
        labels, classes = target.train_set.labels, target.train_set.classes
        indices = np.arange(len(labels))
        if shots:
            indices = data.few_shot_indices(labels, shots, seed, classes)
        file = f"{f'{shots}shot' if shots else 'full'}-seed{seed}{ending}.json"
        for source in pretrained:
            path = Path(args.out) / data.dataset_slug(name) / source.name / file
            if path in cells:
                raise ValueError(
                    f"two checkpoints or targets would write {path}; run them apart, one with "
                    "another --out"
                )
            config = cell_config(args, env, name, target, source, shots, seed, len(indices))
            cells[path] = Cell(source, name, shots, seed, args.method, indices, path, config)
    return list(cells.values())


def cell_config(args, env, name, target, pretrained, shots, seed, images):
    """Every setting of a run, as used."""
    left_out = ("checkpoint", "target", "shots", "seeds", "image_size", "balanced", "method")
    left_out += ("scratch_steps", "dry_run", *engine.DATA_OPTIONS)
    left_out += TRAINING if args.method != "finetune" else ()
    recipe = finetune.RECIPES[target.recipe]
    steps = pretrained.steps or args.steps
    rule = finetune.choose_rule(target.train_set, images, recipe, args.image_size, steps)
    config = {key: value for key, value in vars(args).items() if key not in left_out} | {
        "checkpoint": pretrained.path or "scratch",
        "weights": pretrained.digest,
        "source": pretrained.source,
        "model": pretrained.model,
        "target": name,
        "target_options": target.train_set.options,
        "shots": shots,
        "seed": seed,
        "images": images,
        "train_images": len(target.train_set),
        "test_images": len(target.test_set),
        "precision": env.precision,
    }
    if args.method != "finetune":
        return config | {"crop": rule.crop}
    batch_size = args.batch_size or recipe.batch_size
    if batch_size < 2 * env.ranks:
        raise ValueError(f"--batch-size {batch_size} is less than 2 images a process")
    sampling = "replacement" if images < batch_size else "shuffle"
    if args.balanced or (data.base_name(name) in finetune.BALANCED and shots is None):
        sampling = "balanced"
    return config | {
        "recipe": target.recipe,
        "batch_size": batch_size,
        "lr": args.lr or recipe.lr,
        "clipping": recipe.clipping,
        "sampling": sampling,
        **rule._asdict(),
    }


def unfinished(cells):
    """The cells without a result. Raises ValueError for a file made with other settings."""
    todo = [cell for cell in cells if not records.read_result(cell.path, cell.kind, cell.config)]
    for cell in todo:
        records.load_checkpoint(cell.checkpoint, cell.config)
    return todo
