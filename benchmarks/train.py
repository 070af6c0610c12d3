"""A training step beside timm's: on one batch in memory, and (--peers) from files to the update."""

import itertools
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import models
import pretrain
from benchmarks.loading import make_photos
from benchmarks.measure import best_speeds, import_peer, speed_report
from engine.console import say
from engine.evaluate import to_input
from engine.log import Log
from engine.metrics import loss_sum
from engine.optimizer import SGD_AGC, set_learning_rate
from engine.processes import parallel, parts
from readers.cache import preload
from readers.transforms import NORMALIZATION
from readers.workers import available_cores, loader

RECIPE = pretrain.RECIPES["paper"]["natural", "small"]  # of R50x1 on ImageNet-1k: without AGC
REQUIRED = (("ours, defaults", "timm, eager, fp32", 1.15), ("ours", "timm", 1.0))
PEERS_REQUIRED = (("ours, defaults", "timm, defaults", 1.4), ("ours", "timm", 1.15))
# The arms of --peers: a package and its options. timm's are those of its training script: --amp,
# --opt-kwargs fused=True, --channels-last and --torchcompile.
FROM_FILES = """ours, defaults | ours, fp32 | ours, fp32, compiled | ours, bf16 |
    ours, bf16, compiled | timm, defaults | timm, bf16 | timm, bf16, fused |
    timm, bf16, channels_last | timm, bf16, compiled | timm, bf16, channels_last, compiled |
    timm, bf16, channels_last, compiled, fused"""


def train(args, env):
    """Images a second of a whole training step: forward, cross-entropy, backward, SGD.

    "ours, defaults": what pretrain.py does without options (images held in memory, augmented; bf16
    where the hardware has it). All other arms repeat one batch that lies on the device, with the
    same optimiser and memory format, so that the ratios are of networks and settings.

    With --peers each package has its own loader and optimiser. "timm, defaults": what its training
    script does (fp32, a worker a core, RandomResizedCrop, flip and colour jitter).
    """
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as made:
        side = 32 if args.peers else args.image_size
        folder = args.folder or make_photos(Path(made), side, 10, 64)
        dataset = data.load_dataset(f"folder:{folder}")
        if args.peers:
            arms, required = arms_from_files(args, env, dataset), PEERS_REQUIRED
        else:
            arms, required = arms_on_one_batch(args, env, len(dataset.classes)), REQUIRED
            arms["ours, defaults"] = our_training(args, env, dataset, ["defaults"])
        for name, arm in arms.items():
            say(env, f"warming up: {name}")
            for _ in range(3):  # compiles, and lets cuDNN choose its kernels
                next(arm)
        speeds = best_speeds(arms, args.rounds, args.steps, args.batch_size, env)
    return speed_report(speeds, required[0][1], required)


def arms_on_one_batch(args, env, classes):
    """{arm: iterator of steps}, of both networks, with our optimiser."""
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=env.device)
    images = images.contiguous(memory_format=models.LAYOUT[env.device.type])
    labels = torch.randint(classes, (args.batch_size,), device=env.device)
    ours, timms = models.create_model(args.model, classes), timm_network(args.model, classes)
    arms = {}
    for package, network in (("ours", ours), ("timm", timms)):
        network = models.place(network, env.device).train()
        settings = {"weight_decay": RECIPE.weight_decay, "clipping": RECIPE.clipping}
        optimizer = SGD_AGC(network.parameters(), RECIPE.lr / 256 * args.batch_size, **settings)
        for mode in ("eager",) if args.no_compile else ("eager", "compiled"):
            for precision in ("fp32", "bf16"):
                forward = torch.compile(network) if mode == "compiled" else network
                chosen = env._replace(precision=precision)
                arm = steps(itertools.repeat((images, labels)), forward, optimizer, chosen)
                arms[f"{package}, {mode}, {precision}"] = arm
    return arms


def arms_from_files(args, env, dataset):
    """{arm: iterator of steps}, each package with its own loader and optimiser."""
    arms = {}
    for name in map(str.strip, FROM_FILES.split("|")):
        package, *options = name.split(", ")
        if "compiled" in options and args.no_compile:
            continue
        if package == "ours":
            arms[name] = our_training(args, env, dataset, options)
        else:
            chosen = env._replace(precision="bf16" if "bf16" in options else "fp32")
            about = timm_batches(args, dataset), options, args.batch_size, chosen
            arms[name] = timm_training(args.model, len(dataset.classes), *about)
    return arms


def our_network(name, classes, env, clipping, checkpointed=False):
    """(network on the device, its optimiser for training_loop, which sets the learning rate)."""
    network = models.create_model(name, classes, checkpointed, env.device).train()
    settings = {"weight_decay": RECIPE.weight_decay, "clipping": clipping}
    return network, SGD_AGC(network.parameter_groups(), 0.0, **settings)


def our_training(args, env, dataset, options):
    """Iterator of steps, as pretrain.py trains on this dataset with these options."""
    if "defaults" not in options:
        env = env._replace(precision=options[0])
    model, optimizer = our_network(args.model, len(dataset.classes), env, RECIPE.clipping)
    pipeline = pretrain.choose_pipeline(dataset, args.image_size, train=True)
    dataset, pipeline = preload(dataset, pipeline)
    batches = data.Batches(dataset, pipeline, args.batch_size)
    stream = loader(batches, 0, sys.maxsize, None, env.device)
    if "compiled" in options:
        model.compile_blocks()
    return training_loop(parallel(model, env), optimizer, stream, args.batch_size, env)


def training_loop(network, optimizer, stream, batch_size, env, accumulate=1):
    """The loop of pretrain.py, without its tests, checkpoints and signals: yields after each step.

    stream: (images uint8 (N,C,H,W), labels (N,), N).
    """
    lr, step, normalization = RECIPE.lr / 256 * batch_size, 0, NORMALIZATION["natural"]
    with Log(env, 0, None, batch_size) as log:
        while True:
            batch, targets, count = log.next(stream)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for images, labels in parts(network, batch, targets, accumulate, env):
                with env.autocast():
                    logits = network(to_input(images, normalization, env.device))
                part_loss = loss_sum(logits, labels, "multiclass")
                (part_loss * (env.ranks / max(count, 1))).backward()
                loss = loss + part_loss.detach()
            optimizer.step()
            step += 1
            log.add(step, lr, loss, count, optimizer)
            yield


def timm_network(model, classes):
    """timm's network of the same architecture, with random weights."""
    timm, name = import_peer("timm"), f"resnetv2_{model.removeprefix('R')}_bit"
    if model not in models.MODELS or not timm.is_model(name):
        raise ValueError(f"--model {model}: timm has no {name}; BiT's sizes are in both")
    return timm.create_model(name, num_classes=classes)


def timm_batches(args, dataset):
    """The stream of timm's training script, without end."""
    timm_data = import_peer("timm.data")
    images = timm_data.ImageDataset(f"{dataset.name.removeprefix('folder:')}/train")
    size = 3, args.image_size, args.image_size
    settings = {"is_training": True, "use_prefetcher": False, "color_jitter": 0.4}
    settings |= {"num_workers": available_cores(), "persistent_workers": True}
    batches = timm_data.create_loader(images, size, args.batch_size, **settings)
    return itertools.chain.from_iterable(itertools.repeat(batches))


def timm_training(model, classes, stream, options, batch_size, env):
    """Iterator of steps on a stream as in timm's training script: its network and optimiser."""
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    network = timm_network(model, classes).to(env.device, memory_format=layout).train()
    settings = {"momentum": 0.9, "weight_decay": RECIPE.weight_decay}
    settings |= {"lr": RECIPE.lr / 256 * batch_size, "fused": "fused" in options or None}
    optimizer = import_peer("timm.optim").create_optimizer_v2(network, "sgd", **settings)
    forward = torch.compile(network) if "compiled" in options else network
    return steps(stream, forward, optimizer, env, layout)


def steps(stream, forward, optimizer, env, layout=torch.preserve_format):
    """Trains on a stream of (images float (N,3,H,W), labels (N,)): yields after each step."""
    for images, labels in stream:
        images, labels = images.to(env.device, memory_format=layout), labels.to(env.device)
        with env.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield
