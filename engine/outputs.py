"""What is kept beside a result: predictions and features of images, and networks to go on from."""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import save_tensors
from engine.console import MAIN_METRIC, write_atomically
from engine.distance import DIMENSIONS

# What --save may name, and features -> ending of the file beside the result.
ENDINGS = {"predictions": ".npz", "model": ".pt", "features": ".npz"}


def save_arrays(path, **arrays):
    """One .npz without pickled objects, whole or not at all."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def image_names(dataset):
    """The file, or what else to call it, of each image of a dataset: (N,) str."""
    return np.array([dataset.where(i) for i in range(len(dataset))])


def save_predictions(cell, logits, labels=None, classes=None):
    """Where the cell is to: logits (N,C) float32 of its test set, the labels (N,) int64 or (N,C)
    float32 in {0,1,nan}, and the names of the images (N,) and of the classes (C,).

    labels, classes: where they are not all of the test set's.
    """
    if "predictions" in cell.save:
        test_set = cell.target.test_set
        about = {"labels": test_set.labels if labels is None else labels}
        about |= {"names": image_names(test_set), "classes": np.array(classes or test_set.classes)}
        save_arrays(cell.own_file("predictions"), logits=logits.cpu().numpy(), **about)


def save_network(path, state, name, dataset, normalization, image_size, **more):
    """The file of a network that was trained on a dataset, as --checkpoint opens it.

    state: state dict. name: of its size. more: what the file says otherwise, or also.
    """
    mean, std = normalization
    facts = {"name": name, "classes": dataset.classes, "task": dataset.task}
    facts |= {"source": dataset.name, "domain": dataset.domain, "mean": mean, "std": std}
    facts |= {"images": len(dataset), "image_size": image_size}
    save_tensors(path, {"model": state, **facts, **more})


def _three(values):
    return len(values) == 3 and all(map(math.isfinite, values))


def _distinct(words):
    return all(isinstance(word, str) for word in words) and len({*words}) == len(words)


# What such a file says, and what that must be; older ones lack some of OPTIONAL.
OPTIONAL = {"run", "sample", "classes", "task", "image_size"}
FACTS = {
    "name": lambda name: isinstance(name, str),
    "source": lambda source: source and source.isprintable(),
    "domain": lambda domain: domain in MAIN_METRIC,
    "run": lambda run: run is None or run.isprintable() and run == Path(run).name.lstrip("."),
    "classes": lambda classes: classes is None or type(classes) is not str and _distinct(classes),
    "task": lambda task: task in (None, "multiclass", "multilabel"),
    "image_size": lambda side: side is None or type(side) is int and 8 <= side <= 4096,
    "images": lambda images: type(images) is int and images > 0,
    "mean": _three,
    "std": lambda std: _three(std) and min(std) > 0,
    "sample": lambda x: x is None or x.shape[1:] == (DIMENSIONS,) and x.isfinite().all(),
}


def network_facts(path, content):
    """What the content of such a file says of its network, as attributes of grid.Network; {} for
    one that was written elsewhere. Raises ValueError naming what it says that cannot be.
    """
    if not (isinstance(content, dict) and content.keys() >= FACTS.keys() - OPTIONAL):
        return {}
    for key, good in FACTS.items():
        with contextlib.suppress(AttributeError, TypeError):
            if good(content.get(key)):
                continue
        found = " ".join(repr(content[key]).split())
        raise ValueError(f"{path}: its {key} is {found:.60}; pre-train anew")
    classes, state = content.get("classes"), content.get("model")
    head = state.get("head.conv.bias") if isinstance(state, dict) else None
    if classes and torch.is_tensor(head) and len(classes) != len(head):
        found = f"{len(classes)} classes, its head has {len(head)}"
        raise ValueError(f"{path}: it names {found}; pre-train anew")
    same = "source domain images sample classes task image_size run recipe seed".split()
    normalization = tuple(content["mean"]), tuple(content["std"])
    about = {key: content.get(key) for key in same}
    return {"model": content["name"], "normalization": normalization, **about}
