"""Datasets by name, few-shot subsets, the order of batches, and the command line of datasets.

`load_dataset` -> `ImageDataset` (readers/images.py: uint8 images and labels) -> a `Pipeline`
(readers/transforms.py) -> `Batches`: the global batch of a step, or one rank's part of it.
"""

import difflib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from engine import options
from engine.console import Parser, exit_status, not_empty, number, print_table, refuse_unwritable
from readers import inspect, natural, packs, synthetic, xrays
from readers.images import ImageDataset, refuse_missing
from readers.labels import Stream, by_class, generator, hold_out, join, keep_single_label
from readers.labels import few_shot_indices as few_shot_indices  # for the scripts
from readers.names import base_name, canonical, pack_folder, pack_of, parts_of, without_place
from readers.transforms import Pipeline, keep

SPLITS = ("train", "test")
CHOICES = ("views", "split_by", "labels", "domain", "uncertain", "blank")  # of some datasets


class Known(NamedTuple):
    """A dataset known by name."""

    domain: str  # "natural" | "medical"
    build: Callable  # (name, root, split, **its options) -> ImageDataset
    folder: str | None  # below the root, None where it needs none
    listed: bool = False  # a table or list names its files


DATASETS = {
    **{name: Known(w.domain, synthetic.dataset, None) for name, w in synthetic.WORLDS.items()},
    "imagenet1k": Known("natural", natural.imagenet1k, "imagenet-1K"),
    "imagenet21k": Known("natural", natural.imagenet21k, "imagenet-21K"),
    "chexpert": Known("medical", xrays.chexpert, "CheXpert-v1.0", listed=True),
    "chexpert-test": Known("medical", xrays.chexpert_test, "CheXpert-v1.0/test"),
    "mimic": Known("medical", xrays.mimic, "mimic-cxr-jpg/2.0.0", listed=True),
    "nih": Known("medical", xrays.nih, "NIH-ChestXRay-14", listed=True),
    "padchest": Known("medical", xrays.padchest, "PadChest", listed=True),
    "cifar10": Known("natural", natural.cifar, "cifar-10-batches-py"),
    "cifar100": Known("natural", natural.cifar, "cifar-100-python"),
    "flowers102": Known("natural", natural.flowers, "flowers-102", listed=True),
    "pets": Known("natural", natural.pets, "oxford-iiit-pet", listed=True),
    "covidx": Known("medical", xrays.covidx, "COVIDx-CXR2", listed=True),
    "tuberculosis": Known("medical", xrays.tuberculosis, "Tuberculosis_dataset"),
}
TEST_ALONE = ("chexpert-test",)  # without training images, for --eval-only
NAMES = f"{', '.join(DATASETS)}, folder:PATH, table:FILE.csv, NAME@SIZE (a pack), NAME+NAME "
NAMES += "(a union), NAME~GAP (a synthetic one towards the other world)"


def load_dataset(
    name,
    root="datasets",
    split="train",
    *,
    verify=True,
    single_label=False,
    fraction=1.0,
    fraction_seed=0,
    validation=None,
    **options,
):
    """The dataset of that name, one of NAMES, below the directory root. split: "train" or "test".

    verify: refuse one of which a listed file is missing. single_label: keep the images with exactly
    one positive label, as a multi-class dataset. fraction: of the training images, in (0,1]; a
    smaller one lies inside a larger one of the same fraction_seed. validation: the part of the
    training images, in (0,1), that is held out (`labels.hold_out`) and "test" then means; the test
    set is not opened. options: of the dataset (`dataset_options`), e.g. views, split_by, labels,
    cache_dir, download, and of the synthetic worlds seed, size (pixels) and gap. Raises ValueError
    for an unknown name, split, option, column or label, FileNotFoundError for what is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if validation is not None and not 0 < validation < 1:
        raise ValueError(f"--validation {validation}: must be above 0 and below 1")
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: must be above 0 and at most 1")
    name = canonical(name)
    takes = dataset_options(name)
    for option in options.keys() - takes:
        known = ", ".join(takes) or "none"
        raise ValueError(f"{name} takes no option {option}; it takes: {known}")
    opened = "train" if validation else split
    if len(parts_of(name)) > 1:
        dataset = _union(name, Path(root), opened, verify, **options)
    else:
        build = _builder(name)
        dataset = build(name, Path(root), opened, **options)
        if verify and (build is natural.table or name in DATASETS and DATASETS[name].listed):
            refuse_missing(dataset)
    if single_label:
        dataset = keep_single_label(dataset)
    if validation:
        held = hold_out(dataset.labels, dataset.groups, validation)
        dataset = dataset.subset(held if split == "test" else ~held).replace(
            name=f"{dataset.name}-validation{validation:g}",
            options=dataset.options | {"validation": validation},
        )
    share = fraction if split == "train" else 1
    images = round(share * len(dataset))
    if not images:
        by = f"--fraction {share:g} of " * (share < 1) + f"the options {dataset.options}"
        raise ValueError(f"{name}: no image of the {split} split is left by {by}")
    if share < 1:
        order = generator(fraction_seed, Stream.FRACTION).permutation(len(dataset))
        dataset = dataset.subset(np.sort(order[:images])).replace(
            name=f"{dataset.name}-{fraction:g}",
            options=dataset.options | {"fraction": fraction, "fraction_seed": fraction_seed},
        )
    return dataset


def load_splits(name, root="datasets", **options):
    """(training set, test set)."""
    return tuple(load_dataset(name, root, split, **options) for split in SPLITS)


def _builder(name):
    """What makes the dataset of this one name: (name, root, split, **its options)."""
    original, size = pack_of(name)
    world, tilde, _ = name.partition("~")
    if size:
        if pack_of(original)[1]:
            raise ValueError(f"{name}: {original} is a pack already; pack the original")
        return packs.open_pack
    if name.startswith("folder:"):
        return natural.folder
    if name.startswith("table:"):
        return natural.table
    if name in DATASETS:
        return DATASETS[name].build
    if tilde and world in synthetic.WORLDS:
        return synthetic.dataset
    if tilde and base_name(name) in DATASETS:
        raise ValueError(f"{name}: only synthetic datasets have a gap (~); write {world}")
    if not name:
        raise ValueError("a dataset's name is missing (before or after a +?)")
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0)[0]
    if "/" in name or name.startswith(("~", ".")):
        near = f"table:{name}" if name.endswith((".csv", ".csv.gz")) else f"folder:{name}"
    raise ValueError(f"unknown dataset {name!r}; did you mean {near!r}? known: {NAMES}")


def dataset_name(text):
    """An argparse type: a dataset by its one name."""
    return canonical(not_empty(text))


def dataset_options(name):
    """The options that load_dataset takes for this name, beside those that all take."""
    parts = parts_of(name)
    takes = dict.fromkeys(["labels"] if len(parts) > 1 else [])  # each once, in this order
    for part in parts:
        build = _builder(pack_of(part)[0])  # a pack is asked for as its original is
        takes |= dict.fromkeys(list(signature(build).parameters)[3:])
    return tuple(takes)


def source_domain(name, other=None):
    """That of what a network was trained on (A, or A-to-B): "medical" where all of a union is.

    other: that of names which are not in DATASETS, else ValueError; None: unknown.
    """
    domains = set()
    for member in parts_of(name.partition("-to-")[0]):
        known = DATASETS.get(base_name(member))
        if not known and not other:
            near = difflib.get_close_matches(member.lower(), DATASETS, n=1, cutoff=0)[0]
            mend = f"did you mean {near!r}? of another one say --domain natural or medical"
            raise ValueError(f"--source {name}: unknown {member!r}; {mend}")
        domains.add(known.domain if known else other)
    return "medical" if domains == {"medical"} else "natural"


def dataset_slug(name):
    """The name as a part of a path: folder:/a/b becomes folder-b."""
    slug = "+".join(part.replace(":", "-", 1) for part in parts_of(without_place(name)))
    if Path(slug).name != slug:
        raise ValueError(f"{name!r}: a dataset's name with / in it names a place; leave it out")
    return slug


def _union(name, root, split, verify, labels="intersection", **options):
    """These datasets as one; of the options, each dataset has those that it takes."""
    parts = parts_of(name)
    if labels not in ("intersection", "union"):
        raise ValueError(f"--labels {labels}: must be intersection or union")
    if len({pack_of(part)[0] for part in parts}) < len(parts):
        raise ValueError(f"{name}: a dataset occurs twice in the union")
    members, five_views = [], "padchest" in map(base_name, parts)  # of all, as in the study
    for part in parts:
        given = {"views": xrays.VIEWS["padchest"]} if five_views and not pack_of(part)[1] else {}
        own = {o: value for o, value in (given | options).items() if o in dataset_options(part)}
        if views := own.get("views"):
            # Without the views that only other datasets know, unless none is left.
            others = set().union(*xrays.VIEWS.values()) - {*xrays.VIEWS.get(base_name(part), ())}
            own["views"] = [view for view in views if view not in others] or views
        members.append(load_dataset(part, root, split, verify=verify, **own))
    return join(name, members, labels)


def open_splits(name, args, env=None, **options):
    """load_splits with those options of a command line that the dataset takes; options: more of it.

    The main rank of env alone downloads, before the others. Raises ValueError for a split of which
    no label is known.
    """
    takes = (*dataset_options(name), "validation")
    for option in (*CHOICES, "cache_dir", "download", "validation"):
        if option in takes and getattr(args, option, None):
            options.setdefault(option, getattr(args, option))
    alone = name in TEST_ALONE or name.startswith("table:")
    if alone and getattr(args, "method", None) == "eval":  # which trains on nothing
        return (load_dataset(name, args.data_dir, "test", **options),) * 2
    if options.get("download") and env and env.ranks > 1:
        if env.main:
            load_splits(name, args.data_dir, **options)
        dist.barrier()
    sets = load_splits(name, args.data_dir, **options)
    for split, dataset in zip(SPLITS, sets):
        if dataset.task == "multilabel" and np.isnan(dataset.labels).all():
            raise ValueError(f"{name}: no image of the {split} split has a known label; add some")
    return sets


def refuse_options(names, args, *also):
    """Raises ValueError for an option of the command line that none of these datasets takes, nor
    what has the options `also`.
    """
    takes = {*also, *(option for name in names for option in dataset_options(name))}
    for option in CHOICES:
        if getattr(args, option) is not None and option not in takes:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} means nothing for {', '.join(names)}; leave it out")


# ---- Which images: the global batch of a step (few-shot subsets: readers/labels.py) --------------


_ORDER = {}  # {(images, seed, epoch): order}, of one epoch: every worker of every rank holds it


def batch_indices(step, num_images, batch_size, seed, sampling="shuffle", classes=None):
    """Which images make up the global batch of a step, a function of (seed, step) alone.

    sampling: "shuffle" walks through one permutation an epoch after the other, so that each image
    comes once an epoch and no batch is short; "replacement" draws each image anew; "balanced"
    does so with probability inverse to the frequency of its class in classes = by_class(labels).
    Returns (indices, draws), both (B,) int64; (draw, image) is never the same twice in a run.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    if sampling == "shuffle":
        epochs, indices = places // num_images, np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            key, here = (num_images, seed, epoch), epochs == epoch
            if key not in _ORDER:
                rng = generator(seed, Stream.ORDER, epoch)
                dtype = np.int32 if num_images < 2**31 else np.int64
                _ORDER.clear()  # before the next is made, in half the memory of rng.permutation
                order = np.arange(num_images, dtype=dtype)
                rng.shuffle(order)
                _ORDER[key] = order
            indices[here] = _ORDER[key][places[here] % num_images]
        return indices, epochs
    rng = generator(seed, Stream.DRAW, step)
    if sampling == "replacement":
        return rng.integers(num_images, size=batch_size), places
    if sampling == "balanced":
        images, starts, counts = classes
        drawn = rng.integers(len(counts), size=batch_size)
        return images[starts[drawn] + rng.integers(counts[drawn])], places
    raise ValueError(f"unknown sampling {sampling!r}")


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """[step] -> (images uint8 (b,C,H,W), labels (b,) or (b,C), count) for one rank.

    The rank's part is every `ranks`-th image of the global batch (with pairs: every `ranks`-th two
    neighbours, which MixUp mixes, so that this too is the same on any number of ranks). count:
    labels that are not NaN in the whole global batch (the denominator of its mean loss), known to
    each rank without communication. Augmentation depends on (seed, draw, image) alone.
    """

    dataset: ImageDataset
    pipeline: Pipeline
    batch_size: int
    seed: int = 0
    sampling: str = "shuffle"
    rank: int = 0
    ranks: int = 1
    pairs: bool = False

    def __post_init__(self):
        self.classes = by_class(self.dataset.labels) if self.sampling == "balanced" else None

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, step):
        labels = self.dataset.labels
        indices, draws = batch_indices(
            step, len(self.dataset), self.batch_size, self.seed, self.sampling, self.classes
        )
        count = int(np.count_nonzero(~np.isnan(labels[indices])))
        mine = np.arange(len(indices)) // (1 + self.pairs) % self.ranks == self.rank
        indices, draws = indices[mine], draws[mine]
        images, augment = [], self.pipeline.augment
        for i, draw in zip(indices.tolist(), draws.tolist()):
            rng = None if augment is keep else generator(self.seed, Stream.AUGMENT, draw, i)
            images.append(augment(self.pipeline.read(self.dataset, i), rng))
        images = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return images, torch.from_numpy(labels[indices]), count


# ---- Command line: python data.py list | info | check | pack | download --------------------------


def _load(args, **options):
    """{split: dataset} of args.name, with the options that were given."""
    refuse_options([args.name], args)
    options |= {key: getattr(args, key) for key in ("single_label", "fraction") if key in args}
    return dict(zip(SPLITS, open_splits(args.name, args, **options)))


def list_datasets(args):
    """Every name that can be had below --data-dir, packs included."""
    root, rows = Path(args.data_dir), []
    folders = {name: known.folder for name, known in DATASETS.items()}
    for folder in sorted(path.parent for path in root.glob("*@*/pack.json")):
        original, size = pack_of(folder.name)
        if size:
            kind = "table" if original.endswith((".csv", ".csv.gz")) else "folder"
            folders[folder.name if original in DATASETS else f"{kind}:{folder}"] = folder.name
    folders |= {f"table:{path}": path.name for path in sorted(root.glob("*.csv"))}
    for name, folder in folders.items():
        row = [name, folder or "(made)", "no", "", "", ""]
        try:
            if folder is None or (root / folder).exists():
                train, test = open_splits(name, args, verify=False)
                row[2:4] = "yes", f"{len(train):,} + {len(test):,}"
                row[4:] = len(train.classes), train.domain
        except (ValueError, OSError) as error:
            row[2:4] = "yes" if name in TEST_ALONE else "damaged", str(error)
        rows.append(row)
    header = ["name", f"below {root}", "there", "images (train + test)", "classes", "domain"]
    print_table(rows, header)


def info(args):
    """What a dataset holds: counts, marks by class, patients, image sizes; a sheet of examples."""
    inspect.info(args.name, _load(args), args.sheet)


def check(args):
    """Opens every image; lists what is broken, missing, or there twice. 1 where anything is."""
    return inspect.check(args.name, _load(args, verify=False), args.report, args.workers)


def pack(args):
    """Decodes and resizes every image once, into the directory NAME@SIZE."""
    name = args.name
    if len(parts_of(name)) > 1:
        raise ValueError(f"{name}: pack the datasets of a union one by one")
    if pack_of(name)[1] or base_name(name) in synthetic.WORLDS:
        raise ValueError(f"{name}: nothing to pack; its images need no decoding")
    target = pack_folder(name, args.size, args.data_dir, args.out)
    refuse_unwritable("--out", f"{target}.part/lock")
    began = time.monotonic()
    packs.pack(name, _load(args), args.size, target, args.codec, args.quality, args.workers)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: whole, {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")


def download(args):
    """Fetches what torchvision can fetch."""
    if "download" not in dataset_options(args.name):
        raise ValueError(f"{args.name}: torchvision cannot fetch it")
    train, test = _load(args, download=True).values()
    print(f"{args.name}: {len(train)} + {len(test)} images in {args.data_dir}")


CHOICE = " ".join(f"--{option}" for option in CHOICES).replace("_", "-")
# {command: what it does, its options beside --data-dir and --cache-dir}
COMMANDS = {
    "list": (list_datasets, ""),
    "info": (info, f"{CHOICE} --single-label --fraction --sheet"),
    "check": (check, f"{CHOICE} --report --workers"),
    "pack": (pack, f"{CHOICE} --size --codec --quality --out --workers"),
    "download": (download, CHOICE),
}


def main(argv=None):
    """Runs the command line; returns the exit status, 2 after a line that says what is wrong."""
    parser = Parser("Lists, describes, checks, packs and downloads datasets.", prog="data.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    changes = {
        "size": {"required": True},
        "workers": {"type": number(int, 1, 256), "help": "(default: one a core)"},
        "out": {"help": "directory for the pack (default: --data-dir; beside a folder: or table:)"},
    }
    for command, (function, flags) in COMMANDS.items():
        words = function.__doc__
        subparser = commands.add_parser(command, help=words, description=words)
        if command != "list":
            subparser.add_argument("name", type=dataset_name, help=NAMES)
        options.add(subparser, f"--data-dir --cache-dir {flags}", **changes)

    def run():
        args = parser.parse_args(argv)
        return COMMANDS[args.command][0](args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
