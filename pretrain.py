"""Pre-trains a network on a source and leaves runs/SOURCE-MODEL/model.pt to transfer from.

    python pretrain.py                                    # synthetic-natural, about a minute
    torchrun --nproc_per_node=8 pretrain.py --source nih --model R50x1 --workers 8

Started again with the same options, an interrupted run continues from its last checkpoint.
"""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

import data
import engine
import models

# ------------------------------------------------------------------------------------------------
# Recipes (the study's, arXiv:2106.00116, section 3 and appendix)
# ------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """lr: at a batch of 256, scaled linearly with the batch. warmup: epochs. clipping: of AGC, or
    None for plain SGD. worker_batch: warm-up starts from the learning rate of this batch.
    """

    name: str
    lr: float
    clipping: float | None
    warmup: float
    epochs: float
    schedule: str = "step"
    batch_size: int = 256
    worker_batch: int = 32
    image_size: int = 224
    weight_decay: float = 1e-4


# (source, is the network larger than R50x1?)
RECIPES = {
    ("imagenet1k", False): Recipe("paper", lr=0.1, clipping=None, warmup=5, epochs=90),
    ("imagenet1k", True): Recipe("paper", 0.03, 0.01, 15, 90, worker_batch=16),
    ("imagenet21k", False): Recipe("paper", 0.01, 0.01, 2, 90),
    ("imagenet21k", True): Recipe("paper", 0.01, 0.01, 2, 90, worker_batch=16),
    ("xray", False): Recipe("paper", 0.01, 0.01, 15, 90),
    ("xray", True): Recipe("paper", 0.01, 0.01, 15, 90, worker_batch=16),
    ("synthetic", False): Recipe("synthetic", 0.2, None, 1, 8, "cosine", 64, image_size=None),
    ("synthetic", True): Recipe("synthetic", 0.2, None, 1, 8, "cosine", 64, image_size=None),
}
SMALL = ("R14x0.5", "R26x0.5", "R26x1", "R50x1")


def choose_recipe(source, domain, model):
    """The study's recipe for this source and network; natural sources it did not use: ImageNet's."""
    families = {"imagenet21k": "imagenet21k", "synthetic-natural": "synthetic"}
    families |= {"synthetic-xray": "synthetic"}
    family = families.get(source, {"natural": "imagenet1k", "medical": "xray"}[domain])
    return RECIPES[family, model not in SMALL]


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


def parse_args(argv=None):
    parser = engine.Parser(__doc__)
    add = parser.add_argument
    add("--source", default="synthetic-natural", help="dataset to pre-train on")
    add("--model", default="R14x0.5", help=f"network: {', '.join(models.MODELS)}")
    add("--seed", type=int, default=0, help="of initialisation, order and augmentation")
    add("--epochs", type=engine.positive(float), help="passes over the source (default: recipe)")
    add("--warmup", type=float, help="epochs of it (default: the recipe's share of --epochs)")
    add("--schedule", type=engine.one_of("step", "cosine"), help="(default: recipe)")
    add("--weight-decay", type=float, help="(default: recipe)")
    add("--clipping", type=float, help="of AGC; 0: plain SGD (default: recipe)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more arithmetic")
    add("--save-minutes", type=engine.positive(float), default=10.0,
        help="minutes between checkpoints, beside one every epoch")  # fmt: skip
    add("--log-every", type=engine.positive(int), default=50, help="steps")
    engine.add_common_options(parser, out="runs")
    return parser.parse_args(argv)


def resolve(args, env, source):
    """The settings of this run: the options, and the recipe where an option was not given."""
    recipe = choose_recipe(args.source, source.domain, args.model)
    config = vars(args) | {"precision": env.precision}
    for key, value in recipe._asdict().items():
        if key != "warmup" and config.get(key) is None:
            config[key] = value
    config["recipe"] = config.pop("name")
    config["image_size"] = config["image_size"] or source.size
    config["clipping"] = config["clipping"] or None
    if config["warmup"] is None:
        config["warmup"] = recipe.warmup * config["epochs"] / recipe.epochs
    if not 0 <= config["warmup"] < config["epochs"]:
        raise ValueError(f"--warmup {config['warmup']:g} is not within --epochs {config['epochs']:g}")
    if config["batch_size"] < env.ranks:
        raise ValueError(f"--batch-size {config['batch_size']} is less than {env.ranks} processes")
    return config


def main():
    args = parse_args()
    env = engine.setup(args.precision)
    # On the meta device an unknown --model is refused before a dataset is read.
    with torch.device("meta"):
        models.create_model(args.model, 1)
    size = {"size": args.image_size} if args.source.startswith("synthetic") else {}
    train_set, test_set = engine.load_splits(args.source, args, env, **size)
    config = resolve(args, env, train_set)
    folder = Path(args.out) / f"{data.dataset_slug(args.source)}-{args.model}"
    finished = engine.read_result(folder / "result.json", "pretrain", config)
    if finished:
        if env.main:
            print(f"{folder}: finished already; remove it to train anew")
            report(finished)
        return
    state = engine.load_checkpoint(folder / "checkpoint.pt", config)
    record = pretrain(train_set, test_set, config, state, folder, env)
    if env.main:
        report(record)
        print(f"wrote {folder}/model.pt")


def pretrain(train_set, test_set, config, state, folder, env):
    """Trains from `state` (a checkpoint, or None) to the end; writes everything below `folder`."""
    size, batch_size, task = config["image_size"], config["batch_size"], train_set.task
    torch.manual_seed(config["seed"])
    model = models.create_model(
        config["model"], len(train_set.classes), config["checkpoint_activations"]
    ).to(env.device)
    optimizer = engine.make_optimizer(
        model, config["lr"], config["weight_decay"], config["clipping"]
    )
    step, seconds = 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        engine.say(env, f"{folder}: continues after step {step}")
    engine.trim_log(env, folder / "log.jsonl", step)

    train_set, pipeline = data.preload(
        train_set, data.pretraining_pipeline(train_set.domain, size, train=True)
    )
    test_set, test_pipeline = data.preload(
        test_set, data.pretraining_pipeline(train_set.domain, size, train=False)
    )
    batches = data.Batches(
        train_set, pipeline, batch_size, config["seed"], rank=env.rank, ranks=env.ranks
    )
    epochs, images = config["epochs"], len(train_set)
    last = math.ceil(epochs * images / batch_size)
    scale = config["lr"] / 256  # linear scaling rule: Goyal et al. 2017, arXiv:1706.02677
    start_batch = min(batch_size, choose_recipe(
        config["source"], train_set.domain, config["model"]).worker_batch)  # fmt: skip

    def rate(step):
        epoch = step * batch_size / images
        return learning_rate(
            epoch, scale * batch_size, scale * start_batch, config["warmup"], epochs,
            config["schedule"],
        )  # fmt: skip

    began, first = time.monotonic() - seconds, step
    normalization = data.NORMALIZATION[train_set.domain]

    def save(step):
        engine.save_checkpoint(folder / "checkpoint.pt", {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
            "seconds": time.monotonic() - began, "config": config,
        })  # fmt: skip

    forward = engine.parallel(model, env, config["compile"])
    signals = engine.StopSignal(env)
    title = f"{config['source']} {config['model']}"
    with engine.progress_bar(env, last, step, title) as bar:
        log = engine.Log(env, folder / "log.jsonl", last, bar)
        while True:
            epoch = math.floor(step * batch_size / images + 1e-9)
            stop = min(last, math.ceil((epoch + 1) * images / batch_size))
            engine.train(
                forward, optimizer, batches, rate, step, stop, env, normalization,
                workers=config["workers"], signals=signals, save=save,
                save_minutes=config["save_minutes"], log=log, log_every=config["log_every"],
                progress=bar,
            )  # fmt: skip
            step = stop
            metrics = engine.evaluate(
                model, test_set, test_pipeline, env, normalization, workers=config["workers"]
            )
            log.evaluation(step, metrics)
            if env.main:
                save(step)
            if step == last:
                break

    seconds = time.monotonic() - began
    record = {
        "schema": 1,
        "kind": "pretrain",
        "source": config["source"],
        "source_domain": train_set.domain,
        "source_images": images,
        "model": config["model"],
        "recipe": config["recipe"],
        "metrics": metrics,
        "train": {
            "images": images,
            "steps": last,
            "seconds": seconds,
            "images_per_second": last * batch_size / seconds,
        },
        "config": config,
        "environment": engine.environment(env),
    }
    if env.main:
        mean, std = normalization
        engine.save_checkpoint(folder / "model.pt", {
            "model": model.state_dict(), "name": config["model"], "classes": train_set.classes,
            "source": config["source"], "domain": train_set.domain, "task": task,
            "images": images, "image_size": size, "mean": mean, "std": std,
        })  # fmt: skip
        engine.write_json(folder / "result.json", record)
    return record


def report(record):
    """The closing table."""
    metrics, train = record["metrics"], record["train"]
    shown = ("accuracy", "top5", "mean_auc", "mean_ap", "loss")
    engine.print_table(
        [[name, f"{metrics[name]:.4f}"] for name in shown if metrics[name] is not None]
        + [["seconds", f"{train['seconds']:.0f}"]]
        + [["images/s", f"{train['images_per_second']:.0f}"]],
        [f"{record['source']} {record['model']} (test)", "value"],
    )


if __name__ == "__main__":
    engine.run(main)
