"""Datasets by name, few-shot subsets, and the command line of datasets.

Data flows: `load_dataset` -> `ImageDataset` (images.py: uint8 images and labels) -> a `Pipeline`
(transforms.py) -> `Batches` (loading.py): the global batch of a step, or one rank's part of it.
"""

import collections
import contextlib
import difflib
import hashlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from engine.console import EXIT_STOPPED, Parser, complain, one_of, positive, print_table, write_json
from readers import natural, packs, synthetic, xrays
from readers.cache import Stream, generator
from readers.images import ImageDataset, Joined, refuse_missing
from readers.transforms import resize_square

SPLITS = ("train", "test")


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------


class Rendered(NamedTuple):
    """Images of a synthetic world, made when read."""

    name: str
    split: str
    side: int
    seed: int
    gap: float = 0.0

    def __call__(self, i, size=None):
        world = base_name(self.name)
        return torch.from_numpy(
            synthetic.render(world, self.split, int(i), self.side, self.seed, self.gap)
        )

    def where(self, i):
        return f"{self.name} {self.split} image {i}"


def _synthetic(name, root, split, seed=0, size=None, gap=None):
    if not 0 <= seed < 2**63 or (size is not None and size < 1):
        raise ValueError(f"{name}: seed {seed} or size {size} is out of range")
    if gap is not None:
        if not 0 <= gap <= 1 or "~" in name:
            raise ValueError(f"{name}: gap {gap} must be 0 to 1, and not in the name (~) too")
        name = f"{name}~{np.format_float_positional(gap, trim='-')}"
    gap = _gap(name)
    base = base_name(name)
    world = synthetic.WORLDS[base]
    size = size or world.size
    labels = synthetic.labels(base, split, getattr(world, split), seed)
    reader = Rendered(name, split, size, seed, gap or 0.0)
    options = {} if gap is None else {"gap": gap}
    return ImageDataset(
        name, reader, labels, world.classes, world.task, world.domain, size=size, options=options
    )


def _gap(name):
    """The gap that a synthetic dataset's name states behind "~", None where it states none.

    One number has one spelling, so that no dataset has two names.
    """
    world, tilde, gap = name.partition("~")
    if not tilde:
        return None
    if not re.fullmatch(r"0|1|0\.\d*[1-9]", gap):
        raise ValueError(
            f"{name}: {gap!r} is no gap; write a decimal from 0 to 1 without needless digits, "
            f"like {world}~0, {world}~0.4 or {world}~1"
        )
    return float(gap)


class Known(NamedTuple):
    """A dataset known by name. build: (name, root, split, **its options) -> ImageDataset.

    folder: below the root, None where it needs none. listed: a table or list names its files.
    """

    build: Callable
    folder: str | None
    listed: bool = False


DATASETS = {
    **{name: Known(_synthetic, None) for name in synthetic.WORLDS},
    "imagenet1k": Known(natural.imagenet1k, "imagenet-1K"),
    "imagenet21k": Known(natural.imagenet21k, "imagenet-21K"),
    "chexpert": Known(xrays.chexpert, "CheXpert-v1.0", listed=True),
    "mimic": Known(xrays.mimic, "mimic-cxr-jpg/2.0.0", listed=True),
    "nih": Known(xrays.nih, "NIH-ChestXRay-14", listed=True),
    "padchest": Known(xrays.padchest, "PadChest", listed=True),
    "cifar10": Known(natural.cifar, "cifar-10-batches-py"),
    "cifar100": Known(natural.cifar, "cifar-100-python"),
    "flowers102": Known(natural.flowers, "flowers-102", listed=True),
    "pets": Known(natural.pets, "oxford-iiit-pet", listed=True),
    "covidx": Known(xrays.covidx, "COVIDx-CXR2", listed=True),
    "tuberculosis": Known(xrays.tuberculosis, "Tuberculosis_dataset"),
}


def load_dataset(
    name,
    root="datasets",
    split="train",
    *,
    verify=True,
    single_label=False,
    fraction=1.0,
    fraction_seed=0,
    **options,
):
    """The dataset of that name.

    name: a key of DATASETS, folder:PATH, NAME@SIZE (a pack), NAME~GAP (a synthetic dataset towards
    the other world), or several joined by "+" (a union).
    root: directory that holds the real datasets. split: "train" or "test". verify: refuse a
    dataset of which a listed file is missing. single_label: of a multi-label dataset keep the
    images with exactly one positive label, as a multi-class one. fraction: of the training
    images, in (0,1]; a smaller one lies inside a larger one of the same fraction_seed. options:
    those of the dataset (`dataset_options`), e.g. views, split_by, labels, cache_dir, download,
    and for the synthetic worlds seed, size (pixels) and gap (0 to 1, or in the name: NAME~0.4).
    Raises ValueError for an unknown name, split, option, column or label, FileNotFoundError for a
    missing directory or file; each names it and the mend.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: must be above 0 and at most 1")
    takes = dataset_options(name)
    for option in options:
        if option not in takes:
            raise ValueError(
                f"{name} takes no option {option}; it takes: {', '.join(takes) or 'none'}"
            )
    parts = _parts(name)
    if len(parts) > 1:
        dataset = _union(parts, Path(root), split, verify, **options)
    else:
        dataset = _builder(name)(name, Path(root), split, **options)
        if verify and getattr(DATASETS.get(name), "listed", False):
            refuse_missing(dataset)
    if single_label:
        dataset = keep_single_label(dataset)
    images = len(dataset) if split == "test" else round(fraction * len(dataset))
    if not images:
        share = f"--fraction {fraction:g} of " if fraction < 1 else ""
        raise ValueError(
            f"{name}: no image of the {split} split is left by {share}the options {dataset.options}"
        )
    if images < len(dataset):
        chosen = generator(fraction_seed, Stream.FRACTION).permutation(len(dataset))
        dataset = dataset.subset(np.sort(chosen[:images]))
    if split == "train" and fraction < 1:
        changed = dataset.options | {"fraction": fraction, "fraction_seed": fraction_seed}
        dataset = dataset.replace(name=f"{name}-{fraction:g}", options=changed)
    return dataset


def _parts(name):
    """The names that a union joins; a path may hold a "+" too."""
    return [name] if name.startswith("folder:") else name.split("+")


def _builder(name):
    """The function that makes the dataset of this name: (name, root, split, **its options)."""
    original, size, _ = packs.pack_of(name)
    if size:
        if packs.pack_of(original)[1]:
            raise ValueError(f"{name}: {original} is a pack already; pack the original")
        _builder(original)
        return packs.open_pack
    if name.startswith("folder:"):
        return natural.folder
    if not name:
        raise ValueError("a dataset's name is missing (before or after a +?)")
    world, tilde, _ = name.partition("~")
    if tilde and base_name(name) in DATASETS:
        if world not in synthetic.WORLDS:
            raise ValueError(f"{name}: only synthetic datasets have a gap (~); write {world}")
        _gap(name)
        name = world
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown dataset {name!r}; did you mean {near!r}? "
            f"known: {', '.join(DATASETS)}, folder:PATH, NAME@SIZE (a pack), NAME+NAME (a union), "
            "NAME~GAP (a synthetic one towards the other world)"
        )
    return DATASETS[name].build


def dataset_options(name):
    """The options that load_dataset takes for this name, beside those that all take."""
    parts = _parts(name)
    takes = ["labels"] if len(parts) > 1 else []
    for part in parts:
        own = list(inspect.signature(_builder(packs.pack_of(part)[0])).parameters)[3:]
        takes += [option for option in own if option not in takes]
    return tuple(takes)


def base_name(name):
    """The name of the dataset itself: nih of nih@256, synthetic-xray of synthetic-xray~0.4."""
    return name.partition("@")[0].partition("~")[0]


def dataset_slug(name):
    """The name as a part of a path: folder:/a/b becomes folder-b."""
    if name.startswith("folder:"):
        return f"folder-{Path(name.removeprefix('folder:')).resolve().name}"
    return name


def keep_single_label(dataset):
    """PadChest-Cl of the study: one positive label exactly (what is not annotated is none)."""
    if dataset.task != "multilabel":
        raise ValueError(f"{dataset.name}: --single-label is for multi-label datasets")
    positive = dataset.labels == 1
    kept = positive.sum(1) == 1
    if not kept.any():
        raise ValueError(f"{dataset.name}: no image has exactly one positive label")
    dropped = dataset.dropped | {"not exactly one positive label": int((~kept).sum())}
    return dataset.subset(kept).replace(
        labels=positive[kept].argmax(1),
        task="multiclass",
        options=dataset.options | {"single_label": True},
        dropped=dropped,
    )


def _union(parts, root, split, verify, labels="intersection", **options):
    """Multi-label datasets one after the other, their labels aligned by name.

    labels: "intersection" keeps the names that all have (the study); "union" keeps every name,
    NaN where a dataset does not annotate it. Both in alphabetical order.
    """
    name = "+".join(parts)
    if labels not in ("intersection", "union"):
        raise ValueError(f"--labels {labels}: must be intersection or union")
    if len({packs.pack_of(part)[0] for part in parts}) < len(parts):
        raise ValueError(f"{name}: a dataset occurs twice in the union")
    members = []
    for part in parts:
        own = {key: value for key, value in options.items() if key in dataset_options(part)}
        if "views" in own:
            own["views"] = xrays.views_in_union(base_name(part), own["views"])
        members.append(load_dataset(part, root, split, verify=verify, **own))
        if members[-1].task != "multilabel":
            raise ValueError(f"{name}: {part} is not multi-label; a union joins labels by name")
    if len({bool(member.options.get("gap")) for member in members}) > 1:
        raise ValueError(f"{name}: a gap (~) gives images three channels; give it to all, or none")
    names = [set(member.classes) for member in members]
    classes = sorted(set.union(*names) if labels == "union" else set.intersection(*names))
    if not classes:
        have = "; ".join(f"{m.name}: {', '.join(m.classes)}" for m in members)
        raise ValueError(f"{name}: no label is common to all; --labels union keeps all ({have})")
    reader = Joined([m.reader for m in members], np.cumsum([len(m) for m in members]))
    used = {"labels": labels} | {m.name: m.options for m in members if m.options}
    dropped = {f"{m.name}: {why}": count for m in members for why, count in m.dropped.items()}
    table = np.concatenate([_columns(member, classes) for member in members])
    groups = np.concatenate([_own_groups(member) for member in members])
    return ImageDataset(
        name, reader, table, classes, "multilabel", members[0].domain, groups, None, used, dropped
    )


def _columns(dataset, classes):
    """The labels (N,len(classes)) of these names, NaN where the dataset has no such label."""
    table = np.full((len(dataset), len(classes)), np.nan, np.float32)
    for column, cls in enumerate(classes):
        if cls in dataset.classes:
            table[:, column] = dataset.labels[:, dataset.classes.index(cls)]
    return table


def _own_groups(dataset):
    """Patients that are told from those of another dataset: (N,) bytes like b"nih:61"."""
    source = base_name(dataset.name).encode() + b":"
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    return np.char.add(source, groups.astype("S"))


# ------------------------------------------------------------------------------------------------
# Few-shot subsets
# ------------------------------------------------------------------------------------------------


def few_shot_indices(labels, shots, seed, classes=None):
    """Indices of a few-shot training set, sorted: (M,) int64.

    labels: (N,) int64, or (N,C) in {0,1,nan}. Multi-class: `shots` images of each class without
    replacement; a larger `shots` with the same seed holds the smaller one's images. Multi-label:
    images are taken in random order while some class that they show has fewer than `shots`
    positives. classes: names for the message. Raises ValueError when a class has too few images.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots}: must be 1 or more")
    labels = np.asarray(labels)
    multilabel = labels.ndim == 2
    positive = labels == 1 if multilabel else labels
    counts = positive.sum(0) if multilabel else np.bincount(labels, minlength=len(classes or ()))
    for cls, count in enumerate(counts):
        if count < shots:
            label = classes[cls] if classes else cls
            raise ValueError(f"--shots {shots}: class {label} has only {count} training images")
    order = generator(seed, Stream.SHOTS).permutation(len(labels))
    if not multilabel:
        by_class = order[np.argsort(labels[order], kind="stable")]
        starts = np.cumsum(counts) - counts
        return np.sort((by_class[starts[:, None] + np.arange(shots)]).ravel())
    found, chosen = np.zeros(labels.shape[1], int), []
    for i in order:
        if (found >= shots).all():
            break
        if (positive[i] & (found < shots)).any():
            found += positive[i]
            chosen.append(i)
    return np.sort(np.array(chosen, np.int64))


# ------------------------------------------------------------------------------------------------
# Command line: python data.py list | info | check | pack | download
# ------------------------------------------------------------------------------------------------


def _both(args, **options):
    """{split: dataset}, with the options that were given."""
    given = {key: getattr(args, key) for key in ("views", "split_by", "labels")}
    options |= {key: value for key, value in given.items() if value is not None}
    if args.command == "info":
        options |= {"single_label": args.single_label, "fraction": args.fraction}
    options |= _cache_dir(args, args.name)
    return {split: load_dataset(args.name, args.data_dir, split, **options) for split in SPLITS}


def _cache_dir(args, name):
    """The option, where the dataset has an index to keep."""
    takes = args.cache_dir and "cache_dir" in dataset_options(name)
    return {"cache_dir": args.cache_dir} if takes else {}


def list_datasets(args):
    """Every name that can be had below --data-dir, packs included."""
    root, rows = Path(args.data_dir), []
    folders = {name: known.folder for name, known in DATASETS.items()}
    for folder in sorted(path.parent for path in root.glob("*@*/pack.json")):
        original, size, _ = packs.pack_of(folder.name)
        if size:
            name = folder.name if original in DATASETS else f"folder:{folder}"
            folders[name] = folder.name
    for name, folder in folders.items():
        row = [name, "(made)" if folder is None else folder, "no", "", "", ""]
        if folder is None or (root / folder).is_dir():
            try:
                options = _cache_dir(args, name)
                sets = {s: load_dataset(name, root, s, verify=False, **options) for s in SPLITS}
                counts = " + ".join(f"{len(dataset):,}" for dataset in sets.values())
                train = sets["train"]
                row[2:] = "yes", counts, len(train.classes), train.domain
            except (ValueError, OSError) as error:
                row[2:4] = "damaged", str(error)
        rows.append(row)
    header = ["name", f"below {root}", "there", "images (train + test)", "classes", "domain"]
    print_table(rows, header)


def info(args):
    """What a dataset holds: counts, marks by class, patients, image sizes; a sheet of examples."""
    _refuse_unwritable("--sheet", args.sheet)
    if args.sheet and Path(args.sheet).suffix.lower() != ".png":
        raise ValueError(f"--sheet {args.sheet}: must end in .png")
    sets = _both(args)
    train = sets["train"]
    print(f"{args.name}: {train.domain}, {train.task}, {len(train.classes)} classes")
    for option, value in train.options.items():
        print(f"{option}: {value}")
    groups = {split: np.unique(d.groups) for split, d in sets.items() if d.groups is not None}
    print_table(
        [
            (split, len(dataset), len(groups[split]) if groups else "unknown", *_left_out(dataset))
            for split, dataset in sets.items()
        ],
        ["split", "images", "patients", "left out"],
    )
    if groups:
        print(f"patients on both sides: {len(np.intersect1d(*groups.values()))}")
    counts = [count for dataset in sets.values() for count in _marks(dataset)]
    multilabel = train.task == "multilabel"
    header = [f"{s} {mark}" for s in sets for mark in ("positive", "missing")[: 1 + multilabel]]
    print_table(zip(train.classes, *counts), ["class", *header])
    for split, dataset in sets.items():
        sample = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int))
        sizes = collections.Counter(tuple(dataset.read(i).shape) for i in sample)
        shown = ", ".join(f"{w} x {h} x {c} ({n})" for (c, h, w), n in sizes.most_common(8))
        print(f"{split} images, of {len(sample)}: width x height x channels {shown}")
    if args.sheet:
        contact_sheet(train).save(args.sheet)
        print(f"wrote {args.sheet}")


def _refuse_unwritable(option, path):
    """Before the work whose outcome goes there."""
    if path:
        folder = Path(path).parent
        if Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"{option} {path}: not a file in a directory that can be written")


def _left_out(dataset):
    return [
        ", ".join(f"{count} {why}" for why, count in dataset.dropped.items() if count) or "none"
    ]


def _marks(dataset):
    """[positives of each class], and for multi-label ones [missing marks of each class]."""
    if dataset.task == "multiclass":
        return [np.bincount(dataset.labels, minlength=len(dataset.classes))]
    return [(dataset.labels == 1).sum(0), np.isnan(dataset.labels).sum(0)]


def contact_sheet(dataset, columns=8, rows=20, side=96):
    """A PIL image: the first images of each of the first classes, a row a class."""
    rows = min(rows, len(dataset.classes))
    sheet = Image.new("RGB", (180 + columns * side, rows * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cls in enumerate(dataset.classes[:rows]):
        draw.text((6, row * side + side // 2 - 6), cls, fill="black")
        multilabel = dataset.task == "multilabel"
        shows = dataset.labels[:, row] == 1 if multilabel else dataset.labels == row
        for column, i in enumerate(np.flatnonzero(shows)[:columns]):
            image = resize_square(dataset.read(i, side), side - 2).expand(3, -1, -1)
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile, (180 + column * side, row * side))
    return sheet


def check(args):
    """Opens every image; lists what is broken, missing, or there twice. 1 where anything is."""
    sets = _both(args, verify=False)
    _refuse_unwritable("--report", args.report)
    found = {"missing": [], "broken": [], "duplicated": [], "in train and test": []}
    prints, firsts = {}, {}
    for split, dataset in sets.items():
        prints[split] = np.zeros(len(dataset), np.uint64)
        good = np.ones(len(dataset), bool)
        results = packs.each_image(dataset, _fingerprint, args.workers, split)
        with contextlib.closing(results):
            for i, result in enumerate(results):
                if isinstance(result, Exception):
                    good[i] = False
                    kind = "missing" if isinstance(result, FileNotFoundError) else "broken"
                    found[kind].append(f"{split}: {result}")
                else:
                    prints[split][i] = result
        places = np.flatnonzero(good)
        values, first, inverse = np.unique(
            prints[split][places], return_index=True, return_inverse=True
        )
        firsts[split] = values, places[first]
        for i in np.flatnonzero(first[inverse] != np.arange(len(places))):
            original = places[first[inverse[i]]]
            line = f"{split}: {dataset.where(places[i])} is the same as {dataset.where(original)}"
            found["duplicated"].append(line)
    _, a, b = np.intersect1d(firsts["train"][0], firsts["test"][0], return_indices=True)
    for i, j in zip(firsts["train"][1][a], firsts["test"][1][b]):
        line = f"{sets['train'].where(i)} is the same as {sets['test'].where(j)}"
        found["in train and test"].append(line)
    return _report(args, sets, found)


def _fingerprint(dataset, i):
    """64 bits of the pixels' hash: of 14 million images, two alike by chance in 5e-6 of cases."""
    pixels = dataset.read(i).contiguous().numpy()
    content = hashlib.blake2b(str(pixels.shape).encode(), digest_size=8)
    content.update(pixels)
    return int.from_bytes(content.digest(), "little")


def _report(args, sets, found):
    for kind, lines in found.items():
        for line in lines[:20]:
            print(f"{kind}: {line}")
        if len(lines) > 20:
            print(f"{kind}: {len(lines) - 20} more; --report FILE.json lists all")
    images = {split: len(dataset) for split, dataset in sets.items()}
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in found.items())
    print(f"{args.name}: {images['train']} + {images['test']} images, {counts}")
    if args.report:
        write_json(Path(args.report), {"name": args.name, "images": images, **found})
    return int(any(found.values()))


def pack(args):
    """Decodes and resizes every image once, into the directory NAME@SIZE."""
    if len(_parts(args.name)) > 1:
        raise ValueError(f"{args.name}: pack the datasets of a union one by one")
    if not 1 <= args.quality <= 100:
        raise ValueError(f"--quality {args.quality}: must be 1 to 100")
    if packs.pack_of(args.name)[1] or base_name(args.name) in synthetic.WORLDS:
        raise ValueError(f"{args.name}: nothing to pack; its images need no decoding")
    target = packs.pack_of(f"{args.name}@{args.size}", args.out or args.data_dir)[2]
    if args.out and args.name.startswith("folder:"):
        target = Path(args.out) / target.name
    began = time.monotonic()
    packs.pack(
        args.name, _both(args), args.size, target, args.codec, args.quality, args.workers
    )  # fmt: skip
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: whole, {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")


def download(args):
    """Fetches what torchvision can fetch."""
    if "download" not in dataset_options(args.name):
        raise ValueError(f"{args.name}: torchvision cannot fetch it")
    sets = _both(args, download=True)
    print(f"{args.name}: {len(sets['train'])} + {len(sets['test'])} images in {args.data_dir}")


COMMANDS = {
    "list": list_datasets, "info": info, "check": check, "pack": pack, "download": download,
}  # fmt: skip


def parse(argv):
    """Command line -> Namespace."""
    parser = Parser("Lists, describes, checks, packs and downloads datasets.", prog="data.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        add = commands.add_parser(
            command, help=function.__doc__, description=function.__doc__
        ).add_argument
        add("--data-dir", default="datasets", help="directory that holds the datasets")
        add("--cache-dir", help="directory for the index of large datasets (default: beside them)")
        if command == "list":
            continue
        add("name", help=f"{', '.join(DATASETS)}, folder:PATH, NAME@SIZE, NAME~GAP, NAME+NAME")
        add("--views", nargs="+", metavar="VIEW", help="X-ray views to keep, e.g. PA AP (default: "
            "the study's of the dataset)")  # fmt: skip
        add("--split-by", type=one_of("patient", "image"), help="of padchest (default: patient)")
        add("--labels", type=one_of("intersection", "union"), help="of a union (default: "
            "intersection)")  # fmt: skip
        if command == "info":
            add("--sheet", metavar="PNG", help="write a contact sheet of examples there")
            add("--single-label", action="store_true", help="images with exactly one positive "
                "label, as a multi-class dataset")  # fmt: skip
            add("--fraction", type=positive(float), default=1.0, help="of the training images")
        if command == "check":
            add("--report", metavar="JSON", help="write all that was found there")
        if command == "pack":
            add("--size", type=positive(int), required=True, help="pixels of the side (X-rays) or "
                "of the shorter side")  # fmt: skip
            add("--codec", type=one_of("raw", "jpeg"), default="raw", help="raw is the fastest, "
                "jpeg the smallest")  # fmt: skip
            add("--quality", type=int, default=90, help="of JPEG, 1 to 100")
            add("--out", help="directory for the pack (default: --data-dir; beside a folder:)")
        if command in ("check", "pack"):
            add("--workers", type=positive(int), help="processes (default: one a core)")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command line; returns the exit status, 2 after a line that says what is wrong."""
    try:
        args = parse(argv)
        return COMMANDS[args.command](args) or 0
    except (ValueError, OSError, RuntimeError) as error:  # of the last kind: a worker was killed
        return complain(error)
    except KeyboardInterrupt:
        print("stopped by SIGINT; run the same command again", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
