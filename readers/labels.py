"""What is made of labels: few-shot subsets, what is held out, single labels, unions.

Random numbers, too, and what they are for.
"""

import numpy as np

from engine.console import counted
from readers.images import ImageDataset, Joined
from readers.names import base_name


class Stream:
    """What a random number is for: the second word of the seed of every generator."""

    SHOTS, ORDER, DRAW, AUGMENT, MIXUP, FRACTION, HELD_OUT = range(7)


def generator(seed, *purpose):
    """numpy's generator for a seed, a Stream and what else tells its draws from others."""
    if seed < 0:
        raise ValueError(f"--seed {seed}: must be 0 or more")
    return np.random.default_rng([seed, *purpose])


def images_by_class(labels, num_classes):
    """How many images show each class, for labels (N,) int64 or (N,C) in {0,1,nan}: (C,) int64."""
    return (labels == 1).sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)


def by_class(labels):
    """(images sorted by class (N,), first place (C,) and number (C,) of each class present)."""
    _, counts = np.unique(labels, return_counts=True)
    return np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, counts


def few_shot_indices(labels, shots, seed, classes=None):
    """Indices of a few-shot training set, sorted: (M,) int64.

    labels: (N,) int64, or (N,C) in {0,1,nan}. Multi-class: `shots` images of each class without
    replacement; a larger `shots` with the same seed holds the smaller one's images. Multi-label:
    images are taken in random order while some class that they show has fewer than `shots`
    positives. A class without any image is left out. classes: names for the message. Raises
    ValueError when a class has some images but fewer than `shots`.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots}: must be 1 or more")
    labels = np.asarray(labels)
    counts = images_by_class(labels, 0)
    if not counts.any():
        raise ValueError(f"--shots {shots}: no training image shows any class")
    for cls, count in enumerate(counts):
        if 0 < count < shots:
            label, only = classes[cls] if classes else cls, counted(count, "training image")
            mend = "give fewer, or leave that class out"
            raise ValueError(f"--shots {shots}: class {label} has only {only}; {mend}")
    order = generator(seed, Stream.SHOTS).permutation(len(labels))
    if labels.ndim == 1:
        places, starts, _ = by_class(labels[order])
        return np.sort(order[places[starts[:, None] + np.arange(shots)]].ravel())
    positive, wanted, chosen = labels == 1, np.where(counts, shots, 0), []
    for i in order:
        if (wanted <= 0).all():
            break
        if (positive[i] & (wanted > 0)).any():
            wanted -= positive[i]
            chosen.append(i)
    return np.sort(np.array(chosen, np.int64))


def hold_out(labels, groups, share):
    """Which images are held out: (N,) bool, about `share` of the images of each class.

    labels: (N,) int64, or (N,C) in {0,1,nan}. groups: (N,) patients, each of whom is on one side,
    or None. A patient counts for the rarest class of all that its images show; of the patients of
    each class, in random order but always the same one, every 1/share-th is held out, never the
    first, so that none of these classes loses all its training images.
    """
    every = np.arange(len(labels))
    owners = every if groups is None else np.unique(groups, return_inverse=True)[1]
    images, shown = (every, labels) if labels.ndim == 1 else np.where(labels == 1)
    rarity = np.argsort(np.argsort(np.bincount(shown)))  # 0: of the rarest class
    strata = np.full(owners.max(initial=-1) + 1, len(rarity))  # as it is of who shows none
    np.minimum.at(strata, owners[images], rarity[shown])
    mixed = generator(0, Stream.HELD_OUT).permutation(len(strata))
    order = mixed[np.argsort(strata[mixed], kind="stable")]
    counts = np.floor(share * np.arange(len(order) + 1))
    first = np.diff(strata[order], prepend=-1) > 0
    held = np.empty(len(order), bool)
    held[order] = (np.diff(counts) > 0) & ~first
    return held[owners]


def keep_single_label(dataset):
    """PadChest-Cl of the study: one positive label exactly (what is not annotated is none)."""
    if dataset.task != "multilabel":
        raise ValueError(f"{dataset.name}: --single-label is for multi-label datasets")
    positives = dataset.labels == 1
    kept = positives.sum(1) == 1
    if not kept.any():
        raise ValueError(f"{dataset.name}: no image has exactly one positive label")
    changes = {"labels": positives[kept].argmax(1), "task": "multiclass"}
    changes["options"] = dataset.options | {"single_label": True}
    left_out = {"not exactly one positive label": int((~kept).sum())}
    return dataset.subset(kept).replace(dropped=dataset.dropped | left_out, **changes)


def join(name, members, labels):
    """Multi-label datasets one after the other, their labels aligned by name.

    labels: "intersection" keeps the names that all have (the study), "union" every name, NaN where
    a dataset does not annotate it; both in alphabetical order. Patients are told apart: b"nih:61".
    Raises ValueError for datasets that do not go together.
    """
    for member in members:
        if member.task != "multilabel":
            raise ValueError(f"{name}: {member.name} is not multi-label; a union joins by label")
    domains = sorted({member.domain for member in members})
    if len(domains) > 1:
        raise ValueError(f"{name}: joins {' and '.join(domains)} images; tables take --domain")
    if len({bool(member.options.get("gap")) for member in members}) > 1:
        raise ValueError(f"{name}: a gap (~) gives images three channels; give it to all, or none")
    known = [set(member.classes) for member in members]
    classes = sorted(set.union(*known) if labels == "union" else set.intersection(*known))
    if not classes:
        have = "; ".join(f"{member.name}: {', '.join(member.classes)}" for member in members)
        raise ValueError(f"{name}: no label is common to all; --labels union keeps all ({have})")
    tables, groups, options, dropped = [], [], {"labels": labels}, {}
    for member in members:
        places = {label: place for place, label in enumerate(member.classes)}
        with_nan = np.pad(member.labels, ((0, 0), (0, 1)), constant_values=np.nan)
        tables.append(with_nan[:, [places.get(label, -1) for label in classes]])
        patients = np.arange(len(member)) if member.groups is None else member.groups
        groups.append(np.char.add(f"{base_name(member.name)}:".encode(), patients.astype("S")))
        options |= {member.name: member.options} if member.options else {}
        dropped |= {f"{member.name}: {why}": count for why, count in member.dropped.items()}
    starts = np.cumsum([0, *map(len, members[:-1])]).tolist()
    reader = Joined([member.reader for member in members], starts)
    labels, groups = np.concatenate(tables), np.concatenate(groups)
    about = {"groups": groups, "options": options, "dropped": dropped}
    return ImageDataset(name, reader, labels, classes, "multilabel", domains[0], **about)


def shared_classes(network, dataset):
    """The classes that a network's head and a dataset share, by name: [str], in the latter's order.

    network: has name, classes and task, or, of classes that its file does not name, outputs: as
    many as the dataset has are taken to be these, in their order. Of a multi-label dataset those
    that the network knows, of a multi-class one all. Raises ValueError naming the network for a
    head that does not fit.
    """
    name, classes, task = network.name, network.classes, network.task
    if classes is None:
        if network.outputs != len(dataset.classes):
            has = f"{network.outputs} outputs for {len(dataset.classes)} classes of {dataset.name}"
            raise ValueError(f"{name}: its file names no classes, and has a head of {has}")
        return list(dataset.classes)
    if task != dataset.task:
        mend = "--single-label or --no-single-label changes a target"
        raise ValueError(f"{name} is {task}, {dataset.name} {dataset.task}; {mend}")
    shared = [label for label in dataset.classes if label in classes]
    if not shared or (task == "multiclass" and len(shared) < len(dataset.classes)):
        unknown = next(label for label in dataset.classes if label not in classes)
        raise ValueError(f"{name} cannot be evaluated on {dataset.name}: it knows no {unknown!r}")
    known = [label in classes for label in dataset.classes]
    if task == "multilabel" and np.isnan(dataset.labels[:, known]).all():
        raise ValueError(f"{dataset.name}: no mark of {', '.join(shared)}, all that {name} knows")
    return shared
