"""The options of the training scripts: one table, one meaning in every script."""

import argparse

from engine.console import Parser, one_of, positive


def number_or(word):
    """An argparse type: a whole number above zero, or this word."""

    def check(text):
        return text if text == word else positive(int)(text)

    check.__name__ = "int"
    return check


# {flag: settings of add_argument}; a script may have another default or type.
OPTIONS = {
    # What is trained, and on what
    "--source": dict(help="dataset to pre-train on"),
    "--target": dict(nargs="+", metavar="NAME", help="datasets to transfer to"),
    "--checkpoint": dict(
        nargs="+",
        metavar="PATH",
        help="run folders, weight files, 'scratch' (default: all in runs/, and scratch)",
    ),
    "--model": dict(help="network"),
    "--shots": dict(nargs="+", help="training images of each class; full: all images"),
    "--seeds": dict(
        type=positive(int), help="runs of each, with another head, order and draw; the study: 5"
    ),
    "--method": dict(help="finetune the whole network, or classify its frozen features"),
    "--out": dict(help="directory to write to"),
    # Datasets
    "--data-dir": dict(default="datasets", help="directory that holds the real datasets"),
    "--cache-dir": dict(
        help="directory for the index of large datasets (default: beside them) and the decoded "
        "images of a grid (default: the system's temporary one)"
    ),
    "--download": dict(action="store_true", help="fetch what torchvision can fetch"),
    "--views": dict(
        nargs="+",
        metavar="VIEW",
        help="X-ray views to keep, e.g. PA AP (default: the study's of the dataset)",
    ),
    "--split-by": dict(
        type=one_of("patient", "image"),
        help="how padchest is split; image: as in the study, patients on both sides (default: "
        "patient)",
    ),
    "--labels": dict(
        type=one_of("intersection", "union"),
        help="of datasets joined by +: those common to all, or all (default: intersection)",
    ),
    "--single-label": dict(
        action=argparse.BooleanOptionalAction,
        help="keep images with exactly one positive label, as a multi-class dataset (default: "
        "few-shot padchest)",
    ),
    "--fraction": dict(
        type=positive(float),
        default=1.0,
        help="of the source's images, up to 1; by --seed, and 0.1 inside 0.3",
    ),
    "--balanced": dict(
        action="store_true",
        help="draw training images with probability inverse to the frequency of their class",
    ),
    # Training
    "--recipe": dict(help="default: synthetic for the made worlds, else paper"),
    "--seed": dict(
        type=positive(int, or_zero=True),
        default=0,
        help="of initialisation, order and augmentation (transfer: the first of --seeds)",
    ),
    "--batch-size": dict(
        type=positive(int), metavar="N", help="images a step, over all processes (default: recipe)"
    ),
    "--epochs": dict(type=positive(float), help="passes over the source (default: recipe)"),
    "--steps": dict(type=positive(int), help="training steps (default: the HyperRule's)"),
    "--scratch-steps": dict(
        type=positive(int),
        metavar="N",
        help="train scratch a second time, for so many steps (default: no)",
    ),
    "--lr": dict(
        type=positive(float),
        help="learning rate (pretrain.py: at a batch of 256, scaled linearly) (default: recipe)",
    ),
    "--warmup": dict(
        type=positive(float, or_zero=True),
        help="epochs of it (default: the recipe's share of --epochs)",
    ),
    "--schedule": dict(type=one_of("step", "cosine"), help="(default: recipe)"),
    "--weight-decay": dict(type=positive(float, or_zero=True), help="(default: recipe)"),
    "--clipping": dict(
        type=positive(float, or_zero=True), help="of AGC; 0: plain SGD (default: recipe)"
    ),
    "--image-size": dict(type=positive(int), help="side in pixels (default: recipe)"),
    # How it is computed
    "--precision": dict(
        type=one_of("auto", "fp32", "tf32", "bf16"),
        default="auto",
        help="auto: bf16 where the hardware computes in it, else fp32; tf32: fp32 whose products "
        "GPUs round to TF32",
    ),
    "--compile": dict(action="store_true", help="torch.compile the training step"),
    "--accumulate": dict(
        type=positive(int),
        default=1,
        help="parts in which a process computes its share of a batch",
    ),
    "--checkpoint-activations": dict(
        action="store_true", help="less memory, a third more arithmetic"
    ),
    "--workers": dict(
        type=positive(int, or_zero=True), default=0, help="processes a rank that read images ahead"
    ),
    "--log-every": dict(type=positive(int), default=50, help="steps"),
    "--save-minutes": dict(type=positive(float), default=10.0, help="minutes between checkpoints"),
    "--time-limit": dict(
        type=positive(float),
        metavar="MINUTES",
        help="then save and leave with status 75, or 0 under torchrun; the same command continues "
        "(default: none)",
    ),
    "--dry-run": dict(
        action="store_true", help="print the grid and how long it would take, and leave"
    ),
}
EVERYWHERE = """--out --data-dir --cache-dir --download --views --split-by --labels --single-label
    --balanced --seed --batch-size --lr --image-size --precision --compile --workers --log-every
    --save-minutes --time-limit --model --source --recipe"""


def parse(description, flags, **changes):
    """The command line of a script as a Namespace.

    flags: those of OPTIONS that it takes beside those of EVERYWHERE, in one text. changes: {name:
    settings that differ from the table's}.
    """
    parser = Parser(description)
    for flag in (*flags.split(), *EVERYWHERE.split()):
        name = flag.removeprefix("--").replace("-", "_")
        parser.add_argument(flag, **OPTIONS[flag] | changes.get(name, {}))
    return parser.parse_args()
