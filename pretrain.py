"""Pre-trains a network on a source and leaves runs/SOURCE-MODEL/model.pt to transfer from.

    python pretrain.py                                    # synthetic-natural, about a minute
    torchrun --nproc_per_node=8 pretrain.py --source nih --model R50x1 --workers 8

Started again with the same options, an interrupted run continues from its last checkpoint.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import data
import models
from engine import console, distance, memory, options
from engine.checkpoint import Run, finished_run, read_tensors, save_tensors
from engine.evaluate import evaluate, predict, to_input
from engine.log import Log, print_result
from engine.metrics import loss_sum
from engine.optimizer import SGD_AGC, set_learning_rate
from engine.outputs import save_network
from engine.processes import StopSignal, environment, parallel, parts, run_script, setup
from readers import transforms
from readers.cache import preload
from readers.inspect import data_digest
from readers.workers import in_order, loader

# ---- Recipes (the study's, arXiv:2106.00116, section 3 and appendix) -----------------------------


class Recipe(NamedTuple):
    """How to pre-train. A field that is added: None or False is what earlier runs had."""

    lr: float  # at a batch of 256, scaled linearly with the batch
    clipping: float | None  # of AGC, None for plain SGD
    warmup: float  # epochs
    epochs: float
    schedule: str = "step"  # of SCHEDULES
    batch_size: int = 256
    worker_batch: int = 32  # the warm-up starts at the learning rate of such a batch
    image_size: int | None = 224
    weight_decay: float = 1e-4
    augment: str = "crop"  # of transforms.AUGMENTATIONS, for natural images


WORLD = Recipe(0.12, None, 0.3, 6, "cosine", 64, image_size=None)
# {recipe: {(source, size class of the network in models.MODELS): Recipe}}; "natural" and "medical"
# stand for every source of that domain that has no recipe of its own.
RECIPES = {
    "paper": {
        ("imagenet21k", "small"): Recipe(0.01, 0.01, 2, 90),
        ("imagenet21k", "large"): Recipe(0.01, 0.01, 2, 90, worker_batch=16),
        ("natural", "small"): Recipe(0.1, None, 5, 90),
        ("natural", "large"): Recipe(0.03, 0.01, 15, 90, worker_batch=16),
        ("medical", "small"): Recipe(0.01, 0.01, 15, 90, worker_batch=16),
        ("medical", "large"): Recipe(0.01, 0.01, 15, 90, worker_batch=16),
    },
    "optimised": {
        ("natural", "small"): Recipe(0.03, 0.01, 15, 120, "cosine", augment="randaugment"),
        ("natural", "large"): Recipe(
            0.03, 0.01, 15, 90, "cosine", worker_batch=16, augment="randaugment"
        ),
    },
    "synthetic": {
        (domain, size): WORLD for domain in ("natural", "medical") for size in ("small", "large")
    },
}


def choose_recipe(name, source, domain, model):
    """(name, Recipe) for a source and a network; name None: synthetic for the made worlds, else
    the study's. Raises ValueError where the recipe is not for such a source.
    """
    source = data.base_name(source)
    name = name or ("synthetic" if source in ("synthetic-natural", "synthetic-xray") else "paper")
    recipes, size = RECIPES[name], models.MODELS[model].size_class
    recipe = recipes.get((source, size)) or recipes.get((domain, size))
    if not recipe:
        known = ", ".join(f"{size} networks on {of}" for of, size in sorted(recipes, reverse=True))
        raise ValueError(f"--recipe {name} is for {known}, not for {model} on {source}")
    return name, recipe


def step_schedule(lr, epoch, warmup, epochs):
    """A tenth after 1/3, 2/3 and 8/9 of the run (epochs 30, 60, 80 of 90)."""
    return lr * 0.1 ** sum(epoch >= epochs * part / 9 for part in (3, 6, 8))


def cosine_schedule(lr, epoch, warmup, epochs):
    """To zero, from the end of the warm-up on."""
    return lr / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


SCHEDULES = {"step": step_schedule, "cosine": cosine_schedule}


def learning_rate(step, config):
    """The rate of a step, that of its end, as in the study: linear during warm-up, then as
    config["schedule"] says; linear in the batch size (Goyal et al. 2017, arXiv:1706.02677).
    """
    batch_size, scale = config["batch_size"], config["lr"] / 256
    lr, start = scale * batch_size, scale * min(batch_size, config["worker_batch"])
    warmup, epochs = config["warmup"], config["epochs"]
    epoch = min((step + 1) * batch_size / config["images"], epochs)  # the last batch may go beyond
    if epoch < warmup:
        return start + (lr - start) * epoch / warmup
    return SCHEDULES[config["schedule"]](lr, epoch, warmup, epochs)


def choose_pipeline(source, size, train, augment="crop"):
    """The transforms of a source's images (an ImageDataset), to size x size pixels.

    Synthetic images have that size already; shifted by up to a sixteenth of it, half are flipped.
    X-rays: the central square, area-resized; turned by up to 45 degrees, scaled by a tenth, shifted
    by a quarter, half are flipped. Natural images: `augment`, one of transforms.AUGMENTATIONS, both
    with an Inception-style crop of 8 to 100 % of the area; to test, ImageNet's central crop.
    """
    if source.size is not None:
        augment = transforms.random_shift_flip if train else transforms.keep
        return transforms.Pipeline(transforms.keep, augment)
    if source.domain == "medical":
        return transforms.xray_pipeline(size, train)
    if train:
        augment = partial(transforms.AUGMENTATIONS[augment], size=size)
        return transforms.Pipeline(transforms.keep, augment)
    prepare = partial(transforms.resize_center_crop, size=size)
    return transforms.Pipeline(prepare, transforms.keep, round(size * 256 / 224))


# ---- Options -------------------------------------------------------------------------------------

FLAGS = """--epochs --warmup --schedule --weight-decay --clipping --augment --fraction
    --accumulate --checkpoint-activations --keep --dry-run"""
ROWS = {(name, *of): row for name, recipes in RECIPES.items() for of, row in recipes.items()}
HELP = options.recipe_table(["recipe", "source", "network"], ROWS)
DEFAULTS = {
    "source": dict(default="synthetic-natural", type=data.dataset_name),
    "model": dict(default="R14x0.5", **options.words(*models.MODELS)),
    "out": dict(default="runs"),
    "recipe": options.words(*RECIPES),
    "schedule": options.words(*SCHEDULES),
    "augment": options.words(*transforms.AUGMENTATIONS),
    "batch_size": options.number_or("auto", 2**20),
    "accumulate": dict(default=1),
}


def make_config(args, env, source, test_set):
    """What decides the weights of this run: options, and the recipe where none was given.

    Raises ValueError for a warm-up that is no part of the run, a batch smaller than its parts, or
    an option that means nothing here.
    """
    name, recipe = choose_recipe(args.recipe, args.source, source.domain, args.model)
    given = {key: value for key, value in vars(args).items() if value not in (None, "auto")}
    config = recipe._asdict() | {key: given[key] for key in Recipe._fields if key in given}
    if "warmup" not in given:
        config["warmup"] = recipe.warmup * config["epochs"] / recipe.epochs
    if args.augment and (source.domain != "natural" or source.size is not None):
        raise ValueError(f"--augment means nothing for {args.source}: no photographs; leave it out")
    warmup, epochs = config["warmup"], config["epochs"]
    if not 0 <= warmup < epochs:
        raise ValueError(f"--warmup {warmup:g} is not within --epochs {epochs:g}")
    if config["batch_size"] < env.ranks * args.accumulate:
        least = f"{env.ranks} processes x --accumulate {args.accumulate}"
        raise ValueError(f"--batch-size {config['batch_size']} is less than {least}")
    size = config["image_size"] or source.size
    as_given = ("source", "model", "fraction", "single_label", "seed", "compile")
    config |= {option: getattr(args, option) for option in as_given}
    return config | {
        "source_options": source.options,
        "data": data_digest(train=source, test=test_set),
        "images": len(source),
        "num_classes": len(source.classes),
        "recipe": name,
        "clipping": config["clipping"] or None,
        "image_size": size,
        "balanced": bool(args.balanced),
        "precision": env.training_precision(args, size),
        "keep_best": args.keep == "best",
    }


# ---- The run -------------------------------------------------------------------------------------


def run_name(config, source):
    """SOURCE-MODEL, and recipe and seed where they are not the default: nih-R50x1-seed1."""
    name, model = data.dataset_slug(source.name), config["model"]
    default, _ = choose_recipe(None, config["source"], source.domain, model)
    seed, recipe = config["seed"], config["recipe"]
    return f"{name}-{model}" + f"-{recipe}" * (recipe != default) + f"-seed{seed}" * (seed > 0)


def main():
    args = options.parse(f"{__doc__}\n{HELP}", FLAGS, **DEFAULTS)
    env = setup(args.precision)  # auto: bf16 where the hardware computes in it, else fp32
    if args.batch_size == "auto" and args.accumulate != 1:
        raise ValueError("--accumulate: --batch-size auto chooses it; leave out one of them")
    data.refuse_options([args.source], args)
    subset = {"fraction": args.fraction, "fraction_seed": args.seed}
    subset["single_label"] = bool(args.single_label)
    if args.source.startswith("synthetic"):
        subset["size"] = args.image_size
    train_set, test_set = data.open_splits(args.source, args, env, **subset)
    if args.balanced and train_set.task == "multilabel":
        raise ValueError(f"--balanced: {args.source} is multi-label; it has no one class an image")
    config = make_config(args, env, train_set, test_set)
    folder = Path(args.out) / run_name(config, train_set)
    env = env.computing(config["precision"])
    args.kind = "pretrain-validation" if args.validation else "pretrain"
    record = finished_run(folder, config, args.kind)
    if record:
        console.say(env, f"{folder}: finished already; remove that folder to train anew")
    else:
        console.refuse_unwritable("--out", folder / "log.jsonl", folder / "model.pt")
        with console.locked(folder, env.main):
            record = pretrain(train_set, test_set, config, folder, args, env)
    if env.main and record:
        print_result(record)


def pretrain(train_set, test_set, config, folder, args, env):
    """Trains to the end, from the checkpoint in `folder` if there is one, and writes there.

    Returns the content of result.json; with --dry-run it says what it would do, and returns None.
    """
    torch.manual_seed(config["seed"])
    network = args.model, len(train_set.classes), args.checkpoint_activations
    model = models.create_model(*network, env.device)
    settings = {key: config[key] for key in ("lr", "weight_decay", "clipping")}
    optimizer = SGD_AGC(model.parameter_groups(), momentum=0.9, nesterov=True, **settings)
    size, batch_size, accumulate = config["image_size"], config["batch_size"], args.accumulate
    if args.batch_size == "auto":
        create = partial(models.create_model, *network)
        accumulate = memory.parts_that_fit(model, create, size, batch_size, env)
    last = math.ceil(config["epochs"] * len(train_set) / batch_size)
    if args.dry_run:
        flops = models.forward_flops(args.model, len(train_set.classes), size)
        recipe = {key: config[key] for key in ("images", *Recipe._fields)}
        return memory.print_estimate(model, recipe, last, accumulate, flops, env)
    run = Run(folder / "checkpoint.pt", model, optimizer, config, env, args.save_minutes, last)
    least, best_path = math.inf, folder / "model-best.pt"
    if run.step:
        console.say(env, f"{folder}: continues after step {run.step}")
        if config["keep_best"] and run.step > math.ceil(len(train_set) / batch_size):
            least = read_tensors(best_path)["loss"]
    elif env.main:
        best_path.unlink(missing_ok=True)  # of another run

    if env.device.type == "cuda" and batch_size < 16 * env.ranks:
        more = f"--batch-size {batch_size} on {env.ranks} GPUs; {32 * env.ranks} would be faster"
        console.say(env, f"fewer than 16 images a GPU leave it waiting: {more}")
    pipeline = choose_pipeline(train_set, size, True, config["augment"])
    # Small sets are decoded once, into memory; others when they are read.
    decoded, pipeline = preload(train_set, pipeline)
    test_images = preload(test_set, choose_pipeline(test_set, size, False))
    at_once = 256 * env.ranks
    tested = in_order(*test_images, at_once, env.rank, env.ranks, args.workers, env.device)
    # Shuffled anew each epoch by (seed, epoch) alone, or (--balanced) each image drawn anew from a
    # class drawn anew. A batch may span two epochs; each rank has every ranks-th image of it.
    sampling = "balanced" if config["balanced"] else "shuffle"
    batches = data.Batches(decoded, pipeline, batch_size, args.seed, sampling, env.rank, env.ranks)
    stream = loader(batches, run.step, last, args.workers, env.device)
    normalization = transforms.NORMALIZATION[train_set.domain]
    if args.compile:
        model.compile_blocks()
    network = parallel(model, env)  # averages gradients over the ranks
    signals = StopSignal(env, args.time_limit)
    log_path, title = folder / "log.jsonl", f"{train_set.name} {args.model}"
    with Log(env, run.step, last, batch_size, args.log_every, log_path, title) as log:
        while True:
            if ends_epoch(run.step, last, config):  # also when the run goes on just there
                run.save(wait=False)
                known = test_set.labels, test_set.classes, env, normalization, test_set.groups
                metrics = evaluate(model, tested, *known)
                log.evaluation(run.step, metrics)
                if config["keep_best"] and metrics["loss"] < least:
                    least = metrics["loss"]
                    if env.main:
                        about = {"loss": least, "step": run.step}
                        save_tensors(best_path, {"model": model.state_dict(), **about})
            if run.step == last:
                break
            began = time.monotonic()
            batch, targets, count = log.next(stream)  # count: valid labels of the global batch
            lr = learning_rate(run.step, config)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for images, labels in parts(network, batch, targets, accumulate, env):
                with env.autocast():
                    logits = network(to_input(images, normalization, env.device))
                # Cross-entropy, or binary cross-entropy over the labels that are not NaN.
                part_loss = loss_sum(logits, labels, train_set.task)
                # DDP averages over ranks; the mean over the global batch is a sum over ranks.
                (part_loss * (env.ranks / max(count, 1))).backward()
                loss = loss + part_loss.detach()
            optimizer.step()
            run.step += 1
            log.add(run.step, lr, loss, count, optimizer, ends_epoch(run.step, last, config))
            run.seconds += time.monotonic() - began
            run.save_or_stop(signals, log)  # every --save-minutes; on a signal saves and leaves
        run.finish_saving()
    return write_run(run, metrics, train_set, accumulate, args)


def ends_epoch(step, last, config):
    """Whether an epoch, or the run, is through after so many steps."""
    batch_size, images = config["batch_size"], config["images"]
    return step == last or step * batch_size // images > max(step - 1, 0) * batch_size // images


def write_run(run, metrics, train_set, accumulate, args):
    """Writes model.pt, with --keep best model-best.pt too, and result.json of a run that is
    through, whose content it returns.
    """
    model, config, env, folder = run.model, run.config, run.env, run.path.parent
    size, normalization = config["image_size"], transforms.NORMALIZATION[train_set.domain]
    flops = models.forward_flops(args.model, len(train_set.classes), size)
    layout = {"checkpoint_activations": args.checkpoint_activations, "workers": args.workers}
    record = {
        "schema": 1,
        "kind": args.kind,
        "source": train_set.name,
        "source_domain": train_set.domain,
        "source_images": len(train_set),
        "model": args.model,
        "recipe": config["recipe"],
        "metrics": metrics,
        "train": run.summary(len(train_set), config["batch_size"], flops),
        "config": config,
        "layout": layout | {"accumulate": accumulate},  # these change no result
        "environment": environment(env),
    }
    kept = {folder / "model.pt": {"model": model.state_dict(), "run": folder.name}}
    if config["keep_best"]:
        best_path = folder / "model-best.pt"
        kept[best_path] = read_tensors(best_path) | {"run": f"{folder.name}-best"}
    for path, more in kept.items():
        model.load_state_dict(more["model"])
        more |= {"recipe": config["recipe"], "seed": config["seed"]}
        more["sample"] = sample_features(model, train_set, size, normalization, args.workers, env)
        if env.main:
            about = more.pop("model"), args.model, train_set, normalization, size
            save_network(path, *about, **more)
    if env.main:
        console.write_json(folder / "result.json", record)
    console.say(env, f"wrote {folder}/model.pt")
    return record


def sample_features(model, source, size, normalization, workers, env):
    """What model.pt keeps of the source, for the distance of targets: (N, D) float32, what
    distance.project makes of the features of at most distance.SAMPLE images."""
    chosen = source.subset(distance.sample(len(source)))
    pipeline = choose_pipeline(source, size, False)
    stream = in_order(chosen, pipeline, 256, env.rank, env.ranks, workers, env.device)
    width = model.head.conv.in_channels
    model.eval()
    return distance.project(predict(model.features, width, stream, len(chosen), env, normalization))


if __name__ == "__main__":
    run_script(main)
