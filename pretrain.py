"""Pre-trains a network on a source and leaves runs/SOURCE-MODEL/model.pt to transfer from.

    python pretrain.py                                    # synthetic-natural, about a minute
    torchrun --nproc_per_node=8 pretrain.py --source nih --model R50x1 --workers 8

Started again with the same options, an interrupted run continues from its last checkpoint.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

import data
import models
from engine import checkpoint as records
from engine import console, distance
from engine import processes as engine
from engine.optimizer import make_optimizer
from readers import cache as loading
from readers import transforms

# ------------------------------------------------------------------------------------------------
# Recipes (the study's, arXiv:2106.00116, section 3 and appendix)
# ------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """lr: at a batch of 256, scaled linearly with the batch. warmup: epochs. clipping: of AGC, or
    None for plain SGD. worker_batch: warm-up starts from the learning rate of this batch.
    """

    lr: float
    clipping: float | None
    warmup: float
    epochs: float
    schedule: str = "step"
    batch_size: int = 256
    worker_batch: int = 32
    image_size: int | None = 224
    weight_decay: float = 1e-4
    rand_augment: bool = False


# {recipe: {source: (of R50x1 and smaller networks, of larger ones)}}; "natural" and "medical" are
# all other sources of the domain.
RECIPES = {
    "paper": {
        "imagenet21k": (Recipe(0.01, 0.01, 2, 90), Recipe(0.01, 0.01, 2, 90, worker_batch=16)),
        "natural": (Recipe(0.1, None, 5, 90), Recipe(0.03, 0.01, 15, 90, worker_batch=16)),
        "medical": (Recipe(0.01, 0.01, 15, 90), Recipe(0.01, 0.01, 15, 90, worker_batch=16)),
    },
    "optimised": {
        "natural": (
            Recipe(0.03, 0.01, 15, 120, "cosine", rand_augment=True),
            Recipe(0.03, 0.01, 15, 90, "cosine", worker_batch=16, rand_augment=True),
        ),
    },
    "synthetic": {
        domain: (Recipe(0.12, None, 0.3, 6, "cosine", 64, image_size=None),) * 2
        for domain in ("natural", "medical")
    },
}
SMALL = ("R14x0.5", "R26x0.5", "R26x1", "R50x1")


def choose_recipe(name, source, domain, model):
    """(name, Recipe) for a source and a network; name None: synthetic for the made worlds, else
    the study's. Raises ValueError where the recipe is not for such a source.
    """
    source = data.base_name(source)
    name = name or ("synthetic" if source in ("synthetic-natural", "synthetic-xray") else "paper")
    families = RECIPES[name]
    family = source if source in families else domain
    if family not in families:
        raise ValueError(f"--recipe {name} is for {', '.join(families)} sources, not {source}")
    return name, families[family][model not in SMALL]


def learning_rate(epoch, lr, start_lr, warmup, epochs, schedule):
    """The rate at a (fractional) epoch: linear from start_lr to lr during warm-up, then `schedule`.

    "step": a tenth after 1/3, 2/3 and 8/9 of the run (epochs 30, 60, 80 of 90). "cosine": to zero.
    """
    if epoch < warmup:
        return start_lr + (lr - start_lr) * epoch / warmup
    if schedule == "cosine":
        return lr / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    return lr * 0.1 ** sum(epoch >= epochs * part / 9 for part in (3, 6, 8))


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def parse_args():
    parser = console.Parser(__doc__)
    add = parser.add_argument
    add("--source", default="synthetic-natural", help="dataset to pre-train on")
    add("--model", default="R14x0.5", help=f"network: {', '.join(models.MODELS)}")
    add("--recipe", type=console.one_of(*RECIPES), help=f"{', '.join(RECIPES)} (default: synthetic "
        "for the made worlds, else paper)")  # fmt: skip
    add("--epochs", type=console.positive(float), help="passes over the source (default: recipe)")
    add(
        "--warmup",
        type=console.positive(float, or_zero=True),
        help="epochs of it (default: the recipe's share of --epochs)",
    )
    add("--schedule", type=console.one_of("step", "cosine"), help="(default: recipe)")
    add("--weight-decay", type=console.positive(float, or_zero=True), help="(default: recipe)")
    add(
        "--clipping",
        type=console.positive(float, or_zero=True),
        help="of AGC; 0: plain SGD (default: recipe)",
    )
    add(
        "--checkpoint-activations", action="store_true", help="less memory, a third more arithmetic"
    )
    add("--accumulate", type=console.positive(int), default=1, help="parts in which a process "
        "computes its share of a batch")  # fmt: skip
    add("--fraction", type=console.positive(float), default=1.0, help="of the source's images, "
        "up to 1; by --seed, and 0.1 inside 0.3")  # fmt: skip
    engine.add_common_options(parser, out="runs", auto_batch=True)
    return parser.parse_args()


def resolve(args, env, source):
    """The settings of this run: the options, and the recipe where an option was not given."""
    name, recipe = choose_recipe(args.recipe, args.source, source.domain, args.model)
    config = {key: value for key, value in vars(args).items() if key not in engine.DATA_OPTIONS}
    config |= {"precision": env.precision, "source_options": source.options, "recipe": name}
    if args.batch_size == "auto":
        if args.accumulate != 1:
            raise ValueError("--accumulate: --batch-size auto chooses it; leave out one of them")
        config |= {"batch_size": None, "accumulate": None}
    for key, value in recipe._asdict().items():
        if key != "warmup" and config.get(key) is None:
            config[key] = value
    config["image_size"] = config["image_size"] or source.size
    config["clipping"] = config["clipping"] or None
    config["images"], config["num_classes"] = len(source), len(source.classes)
    if config["warmup"] is None:
        config["warmup"] = recipe.warmup * config["epochs"] / recipe.epochs
    if not 0 <= config["warmup"] < config["epochs"]:
        raise ValueError(
            f"--warmup {config['warmup']:g} is not within --epochs {config['epochs']:g}"
        )
    if config["batch_size"] < env.ranks * (config["accumulate"] or 1):
        raise ValueError(
            f"--batch-size {config['batch_size']} is less than {env.ranks} processes x "
            f"--accumulate {args.accumulate}"
        )
    return config


def main():
    args = parse_args()
    env = engine.setup(args.precision)
    # On the meta device an unknown --model is refused before a dataset is read.
    with torch.device("meta"):
        models.create_model(args.model, 1)
    size = {"size": args.image_size} if args.source.startswith("synthetic") else {}
    engine.check_data_options([args.source], args)
    subset = {"fraction": args.fraction, "fraction_seed": args.seed}
    subset |= {"single_label": True} if args.single_label else {}
    train_set, test_set = engine.load_splits(args.source, args, env, **size, **subset)
    if args.balanced and train_set.task == "multilabel":
        raise ValueError(f"--balanced: {args.source} is multi-label; it has no one class an image")
    config = resolve(args, env, train_set)
    folder = Path(args.out) / f"{data.dataset_slug(train_set.name)}-{args.model}"
    finished = records.read_result(folder / "result.json", "pretrain", config)
    if finished:
        if env.main:
            print(f"{folder}: finished already; remove that folder to train anew")
            report(finished)
        return
    state = records.load_checkpoint(folder / "checkpoint.pt", config)
    record = pretrain(train_set, test_set, config, state, folder, env)
    if env.main:
        report(record)
        print(f"wrote {folder}/model.pt")


def pretrain(train_set, test_set, config, state, folder, env):
    """Trains from `state` (a checkpoint, or None) to the end; writes everything below `folder`."""
    torch.manual_seed(config["seed"])
    model = models.create_model(
        config["model"], len(train_set.classes), config["checkpoint_activations"]
    )
    model = models.place(model, env.device)
    optimizer = make_optimizer(model, config["lr"], config["weight_decay"], config["clipping"])
    if config["accumulate"] is None:
        config["accumulate"] = parts_that_fit(model, config, env)
    run = engine.Run(folder / "checkpoint.pt", model, optimizer, config, state)
    records.same_step(run.step, env)
    if state:
        console.say(env, f"{folder}: continues after step {run.step}")
    records.trim_log(env, folder / "log.jsonl", run.step)
    metrics = run_epochs(run, train_set, test_set, folder, env)
    record = make_record(run, train_set, metrics, env)
    sample = sample_features(model, train_set, config, env)
    if env.main:
        mean, std = transforms.NORMALIZATION[train_set.domain]
        facts = {"name": config["model"], "classes": train_set.classes, "task": train_set.task}
        facts |= {"source": train_set.name, "domain": train_set.domain, "mean": mean, "std": std}
        facts |= {"images": len(train_set), "image_size": config["image_size"], "sample": sample}
        records.save_tensors(folder / "model.pt", {"model": model.state_dict(), **facts})
        console.write_json(folder / "result.json", record)
    return record


def sample_features(model, train_set, config, env):
    """What model.pt keeps of the source, for the distance of targets: (N, D) float32, what
    distance.project makes of the features of at most distance.SAMPLE images."""
    domain, own_size = train_set.domain, train_set.size is not None
    chosen = train_set.subset(distance.sample(len(train_set)))
    pipeline = transforms.pretraining_pipeline(domain, config["image_size"], False, own_size)
    features = engine.predict(
        model.eval().features, model.head.conv.in_channels, chosen, pipeline, env,
        transforms.NORMALIZATION[domain], workers=config["workers"],
    )  # fmt: skip
    return distance.project(features)


def parts_that_fit(model, config, env):
    """--batch-size auto: in how many parts the recipe's batch is computed, by what fits."""
    share = math.ceil(config["batch_size"] / env.ranks)
    fits = engine.largest_batch(model, config["image_size"], share, env)
    console.say(env, f"--batch-size auto: {fits} images at a time on each process")
    return math.ceil(share / fits)


def run_epochs(run, train_set, test_set, folder, env):
    """Trains epoch by epoch, evaluating and saving after each; returns the last test metrics."""
    config, domain = run.config, train_set.domain
    own_size, augment = train_set.size is not None, config["rand_augment"]
    (train_set, pipeline), (test_set, test_pipeline) = (
        loading.preload(
            dataset,
            transforms.pretraining_pipeline(domain, config["image_size"], train, own_size, augment),
        )
        for dataset, train in ((train_set, True), (test_set, False))
    )
    images, batch_size = len(train_set), config["batch_size"]
    sampling = "balanced" if config["balanced"] else "shuffle"
    batches = loading.Batches(
        train_set, pipeline, batch_size, config["seed"], sampling, env.rank, env.ranks
    )
    forward = engine.parallel(run.model, env, config["compile"])
    signals = engine.StopSignal(env, config["time_limit"])
    rate = rate_of_step(config, images)
    last = math.ceil(config["epochs"] * images / batch_size)
    title = f"{train_set.name} {config['model']}"
    pinned = env.device.type == "cuda"
    stream = loading.loader(batches, run.step, last, config["workers"], pinned)
    with engine.progress_bar(env, last, run.step, title) as bar:
        log = records.Log(env, folder / "log.jsonl", run.step, last, bar, title)
        epoch = max(run.step - 1, 0) * batch_size // images  # at an epoch's end: evaluate it again
        while True:
            stop = min(last, math.ceil((epoch + 1) * images / batch_size))
            engine.train(
                run, forward, batches, stream, rate, stop, env, transforms.NORMALIZATION[domain],
                accumulate=config["accumulate"], signals=signals,
                save_minutes=config["save_minutes"], log=log, log_every=config["log_every"],
                progress=bar,
            )  # fmt: skip
            run.save(env, wait=False)
            metrics = engine.evaluate(
                run.model, test_set, test_pipeline, env, transforms.NORMALIZATION[domain],
                workers=config["workers"],
            )  # fmt: skip
            log.evaluation(stop, metrics)
            if stop == last:
                run.finish_saving()
                return metrics
            epoch = stop * batch_size // images


def rate_of_step(config, images):
    """step -> learning rate, by the linear scaling rule (Goyal et al. 2017, arXiv:1706.02677)."""
    batch_size, scale = config["batch_size"], config["lr"] / 256
    start_batch = min(batch_size, config["worker_batch"])
    schedule = config["warmup"], config["epochs"], config["schedule"]

    def rate(step):
        epoch = step * batch_size / images
        return learning_rate(epoch, scale * batch_size, scale * start_batch, *schedule)

    return rate


def make_record(run, train_set, metrics, env):
    """The result file's content."""
    return {
        "schema": 1,
        "kind": "pretrain",
        "source": train_set.name,
        "source_domain": train_set.domain,
        "source_images": len(train_set),
        "model": run.config["model"],
        "recipe": run.config["recipe"],
        "metrics": metrics,
        "train": run.summary(len(train_set), env),
        "config": run.config,
        "environment": engine.environment(env),
    }


def report(record):
    """The closing table."""
    metrics, train = record["metrics"], record["train"]
    shown = ("accuracy", "top5", "mean_auc", "mean_ap", "loss")
    console.print_table(
        [[name, f"{metrics[name]:.4f}"] for name in shown if metrics[name] is not None]
        + [["seconds", f"{train['seconds']:.0f}"]]
        + [["images/s", f"{train['images_per_second']:.0f}"]]
        + [["GFLOP/s", f"{train['flops_per_second'] / 1e9:.1f}"]]
        + [["share of the device's peak", f"{train['peak_share']:.3f}"]],
        [f"{record['source']} {record['model']} (test)", "value"],
    )


if __name__ == "__main__":
    engine.run(main)
