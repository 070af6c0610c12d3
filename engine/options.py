"""The options of all scripts but plot.py: one table, one meaning everywhere."""

import argparse
import os

from engine.console import Parser, not_empty, number, one_of, table

# flag, kind (of KINDS, whole numbers from..to, or words joined by |), default (-: none), what it
# means, as far as the next.
TABLE = """
--source text - dataset to pre-train on
--target texts - datasets to transfer to
--checkpoint texts - run folders, weight files, names of `python models.py list`, scratch,
    statistics (each image's mean, spread and histogram) (default: all in runs/, and scratch)
--model text - network
--shots texts - training images of each class, the study: 1 5 10 100 500; full: all of them
    (default: 1 10 100)
--seeds counts - runs of each, with another head, order and draw: one number is how many, from
    --seed on; several are the seeds; the study: 5 (default: 1 of transfer.py, 3 of fewshot.py)
--method text - finetune the whole network, or of its frozen features a classifier, or a file
    (features); eval: as --eval-only
--eval-only flag - evaluate networks as they are, by the classes that their head and a target share
--keep last|best last best: also writes model-best.pt, of the least loss on the test images, of
    those at the end of each epoch
--save texts - beside a result: predictions (.npz: logits, labels, names, classes), model (.pt: the
    fine-tuned network, for --checkpoint)
--out text - directory to write to
--data-dir text datasets directory that holds the real datasets
--cache-dir text - directory for the index of large datasets (default: beside them) and the
    decoded images of a grid (default: the system's temporary one), and networks by name (default:
    torch.hub's)
--download flag - fetch what torchvision can fetch, and networks by name
--views texts - X-ray views to keep, e.g. PA AP (default: the study's of the dataset)
--split-by patient|image - how padchest is split; image: as in the study, patients on both sides
    (default: patient)
--labels intersection|union - of datasets joined by +: those common to all, or all (default:
    intersection)
--domain natural|medical - of folder: and table: (default: natural), and of foreign weights whose
    --source is unknown here; medical: X-rays, read as grey
--uncertain ignore|positive|negative - what a mark -1 is taken as (default: ignore, as in the study)
--blank ignore|negative - what a finding without a mark is taken as (default: ignore, as in the
    study)
--validation positive - so large a part of the training images, by patient, is held out and
    evaluated in place of the test set; for choosing options; writes into OUT-validation
--single-label yes-or-no - keep images with exactly one positive label, as a multi-class dataset
    (default: padchest as a target)
--fraction positive 1.0 of the source's images, up to 1; by --seed, and 0.1 inside 0.3
--balanced yes-or-no - draw training images with probability inverse to the frequency of their class
    (default: full-shot covidx and flowers102)
--recipe text - (default: synthetic for the made worlds, else paper)
--seed 0..9223372036854775807 0 of initialisation, order and augmentation (transfer: the first of
    --seeds)
--batch-size 1..1048576 - images a step, over all processes; of pretrain.py also auto: the
    recipe's, in as few parts as fit into memory (default: recipe)
--epochs positive - passes over the source (default: recipe)
--steps 1..1000000000 - training steps (default: the recipe's, else the HyperRule's: 500 for less
    than 20,000 training images, 10,000 for less than 500,000, else 20,000)
--scratch-steps 1..1000000000 - train scratch a second time, for so many steps (default: no)
--lr positive - learning rate (pretrain.py: at a batch of 256, scaled linearly) (default: recipe)
--warmup amount - epochs of it (default: the recipe's share of --epochs)
--schedule text - (default: recipe)
--weight-decay amount - (default: recipe)
--clipping amount - of AGC; 0: plain SGD (default: recipe)
--augment text - of photographs in training (default: recipe)
--image-size 8..4096 - side in pixels (default: recipe)
--precision auto|fp32|tf32|bf16 auto auto: bf16 where the hardware computes in it, else fp32;
    fine-tuning by the paper's recipe: fp32, tf32 on GPUs; tf32: fp32 whose products GPUs round
--compile flag - torch.compile the training step
--accumulate 1..65536 - parts in which a process computes its share of a batch (default: 1; of
    transfer: as few as fit into memory)
--checkpoint-activations flag - less memory, a third more arithmetic
--workers 0..256 - processes a rank that read images ahead (default: 0 on CPUs and where all is
    decoded in memory, else the less of 8 and a process's share of the cores)
--log-every 1..1000000000 50 steps
--save-minutes positive 10.0 minutes between checkpoints
--time-limit positive - minutes, then save and leave with status 75, or 0 under torchrun; the same
    command continues (default: none)
--sheet text - write a contact sheet of examples to this PNG
--report text - write all that was found to this JSON file
--size 1..4096 - pixels of the side (X-rays) or of the shorter side
--codec raw|jpeg raw raw is the fastest, jpeg the smallest
--quality 1..100 90 of JPEG, 1 to 100
--dry-run flag - print the grid, or the recipe's numbers, and how long it would take, and leave
"""
KINDS = {
    "text": {"type": not_empty},
    "texts": {"type": not_empty, "nargs": "+", "metavar": "NAME"},
    "flag": {"action": "store_true"},
    "yes-or-no": {"action": argparse.BooleanOptionalAction},
    "counts": {"type": number(int, 0, 2**63 - 1), "nargs": "+", "metavar": "N"},
    "positive": {"type": number(float, 1e-12), "metavar": "X"},
    "amount": {"type": number(float, 0), "metavar": "X"},
}
EVERYWHERE = """--out --data-dir --cache-dir --download --views --split-by --labels --domain
    --uncertain --blank --validation --single-label --balanced --seed --batch-size --lr --image-size
    --precision --compile --workers --log-every --save-minutes --time-limit --model --source
    --recipe"""


def words(*choices):
    """Keywords of add_argument for an option that is one of these words."""
    return {"type": one_of(*choices), "metavar": "|".join(choices)}


def number_or(word, high=10**9):
    """Keywords of add_argument for an option that is a whole number above zero, or this word."""
    return {"type": number(int, 1, high, word), "metavar": f"N|{word}"}


def add(parser, flags, **changes):
    """Adds options of TABLE to an argparse parser, in its order.

    flags: which, in one text. changes: {name: keywords of add_argument that differ from TABLE's}.
    """
    for line in TABLE.strip().replace("\n    ", " ").splitlines():
        flag, kind, default, text = line.split(maxsplit=3)
        if flag in flags.split():
            settings = KINDS.get(kind) or words(*kind.split("|"))
            if ".." in kind:
                settings = {"type": number(int, *map(int, kind.split(".."))), "metavar": "N"}
            if default != "-":
                settings = settings | {"default": settings.get("type", str)(default)}
            name = flag.removeprefix("--").replace("-", "_")
            parser.add_argument(flag, **settings | {"help": text} | changes.get(name, {}))


def recipe_table(header, recipes):
    """The numbers of recipes {names, as in the header: NamedTuple}, for --help."""
    rows = [
        [*names, *("" if value is None else value for value in recipe)]
        for names, recipe in recipes.items()
    ]
    return table(rows, [*header, *next(iter(recipes.values()))._fields])


def parse(description, flags, **changes):
    """The command line of a training script as a Namespace: these flags and those of EVERYWHERE."""
    parser = Parser(description)
    add(parser, f"{flags} {EVERYWHERE}", **changes)
    args = parser.parse_args()
    if getattr(args, "seeds", None):
        args.seeds = seeds(args.seeds, args.seed)
    if args.validation:  # never among results on the test set
        args.out = f"{os.path.abspath(args.out)}-validation"
    return args


def seeds(given, first):
    """The seeds that --seeds means, of which one number says how many, from `first` on."""
    words = "--seeds " + " ".join(map(str, given))
    if len(given) == 1:
        if not 1 <= given[0] <= 10_000:
            raise ValueError(f"{words}: one number is how many (1 to 10000), from --seed on")
        return list(range(first, first + given[0]))
    if len(set(given)) < len(given):
        raise ValueError(f"{words}: a seed is named twice")
    if first:
        raise ValueError(f"--seed means nothing beside {words}; leave it out")
    return given
