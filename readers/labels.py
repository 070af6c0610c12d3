"""What is made of the labels of multi-label datasets: a union of several, single labels of one."""

import numpy as np

from readers.images import ImageDataset, Joined


def join(name, members, labels):
    """Multi-label datasets one after the other, their labels aligned by name.

    members: [ImageDataset]. labels: "intersection" keeps the names that all have (the study);
    "union" keeps every name, NaN where a dataset does not annotate it. Both in alphabetical order.
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
    tables, options, dropped = [], {"labels": labels}, {}
    for member in members:
        places = {label: place for place, label in enumerate(member.classes)}
        with_nan = np.pad(member.labels, ((0, 0), (0, 1)), constant_values=np.nan)
        tables.append(with_nan[:, [places.get(label, -1) for label in classes]])
        options |= {member.name: member.options} if member.options else {}
        dropped |= {f"{member.name}: {why}": count for why, count in member.dropped.items()}
    starts = np.cumsum([0, *map(len, members[:-1])]).tolist()
    reader = Joined([member.reader for member in members], starts)
    labels, groups = np.concatenate(tables), np.concatenate([member.groups for member in members])
    about = {"groups": groups, "options": options, "dropped": dropped}
    return ImageDataset(name, reader, labels, classes, "multilabel", domains[0], **about)


def images_by_class(labels, num_classes):
    """How many images show each class, for labels (N,) int64 or (N,C) in {0,1,nan}: (C,) int64."""
    return (labels == 1).sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)


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


def shared_classes(network, dataset):
    """The classes that a network's head and a dataset share, by name: [str], in the latter's order.

    network: has name, classes and task, or, of classes that its file does not name, outputs: as
    many as the dataset has are taken to be these, in their order. Of a multi-label dataset those
    that the network knows, of a multi-class one all. Raises ValueError naming the network for a
    head that does not fit.
    """
    name, classes, task, count = network.name, network.classes, network.task, len(dataset.classes)
    if classes is None:
        if network.outputs != count:
            fault = f"a head of {network.outputs} outputs for {count} classes of {dataset.name}"
            raise ValueError(f"{name}: its file names no classes, and has {fault}")
        return list(dataset.classes)
    if task != dataset.task:
        mend = "--single-label or --no-single-label changes a target"
        raise ValueError(f"{name} is {task}, {dataset.name} {dataset.task}; {mend}")
    shared = [label for label in dataset.classes if label in classes]
    if not shared or (task == "multiclass" and len(shared) < len(dataset.classes)):
        unknown = next(label for label in dataset.classes if label not in classes)
        raise ValueError(f"{name} cannot be evaluated on {dataset.name}: it knows no {unknown!r}")
    return shared
