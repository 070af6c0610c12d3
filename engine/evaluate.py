"""Forward passes over a whole set: each image once, on one of the processes."""

import functools

import numpy as np
import torch
import torch.distributed as dist

from engine.console import say_once
from engine.memory import out_of_memory
from engine.metrics import answers, compute_metrics, loss_sum, refuse_nonfinite


def to_input(images, normalization, device):
    """uint8 (N,1|3,H,W) -> normalised float32 (N,3,H,W) on the device; grey is copied to RGB."""
    mean, std = _statistics(normalization, device)
    images = images.to(device, non_blocking=True).expand(-1, 3, -1, -1)
    return images.float().sub_(mean).div_(std)  # in place: a new tensor each costs ten times more


@functools.lru_cache
def _statistics(normalization, device):
    # Kept on the device: a copy in every step would make the host wait for it.
    with torch.inference_mode(False):
        return [torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in normalization]


@torch.inference_mode()
def predict(forward, width, stream, num_images, env, normalization):
    """forward(image) of every image, in order, on every rank: (num_images, width) float32, on the
    device. forward: (B,3,H,W) -> (B, width), of a network in eval mode. stream: (rows (B,), images
    uint8 (B,C,H,W)) of this rank's part; one of the ranks has each row.
    """
    outputs = torch.zeros(num_images, width, device=env.device)
    for rows, images in stream:
        with env.autocast():
            output = halved(forward, to_input(images, normalization, env.device))
        outputs[rows] = output.float()
    if env.ranks > 1:
        dist.all_reduce(outputs)  # every row is zero but on one rank
    return outputs


def halved(forward, images):
    """forward(images), in halves where that runs out of memory."""
    try:
        return forward(images)
    except RuntimeError as error:
        if not out_of_memory(error) or len(images) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([halved(forward, half) for half in images.chunk(2)])


# What may be held for AUC and average precision, which want all scores of a class together: so many
# classes, and scores (N x C) of at most 16 bytes each, 1.1 GB.
MAX_CLASSES, MAX_SCORES = 2000, 2**26


def can_hold(num_images, num_classes):
    """Whether all scores of a test set may be held together."""
    return num_classes <= MAX_CLASSES and num_images * num_classes <= MAX_SCORES


@torch.inference_mode()
def evaluate(model, stream, labels, classes, env, normalization, groups=None, keep=None):
    """compute_metrics of a test set; stream: as of `predict`. The model is in eval mode for it.

    keep: called with the logits (N,C) float32 on the main rank, where they may be held. Beyond
    MAX_CLASSES or MAX_SCORES accuracy, top5 and loss are summed by batches on the device; mean_auc,
    mean_ap, intervals and per_class are None then, and a line says so.
    """
    model.eval()
    if can_hold(len(labels), len(classes)):
        logits = predict(model, len(classes), stream, len(labels), env, normalization)
        if keep and env.main:
            keep(logits)
        model.train()
        return compute_metrics(logits, labels, classes, env, groups)
    found = f"{len(labels):,} images x {len(classes):,} classes, above {MAX_SCORES:,} scores"
    found += f" or {MAX_CLASSES:,} classes"
    say_once(env, f"AUC and average precision are left out: {found}")
    labels = torch.as_tensor(np.array(labels), device=env.device)
    multilabel = labels.ndim == 2
    # Right answers, those among five, the loss, outputs that are not finite.
    sums = torch.zeros(4, dtype=torch.float64, device=env.device)
    for rows, images in stream:
        with env.autocast():
            logits = halved(model, to_input(images, normalization, env.device)).float()
        own = labels[torch.as_tensor(rows).to(env.device)]
        right, in_top5 = answers(logits, own)
        loss = loss_sum(logits, own, "multilabel" if multilabel else "multiclass")
        bad = (~logits.isfinite()).sum()
        sums += torch.stack([right, bad if in_top5 is None else in_top5, loss, bad]).double()
    if env.ranks > 1:
        dist.all_reduce(sums)
    model.train()
    right, in_top5, loss, bad = sums.tolist()
    refuse_nonfinite(bad == 0)
    count = int((~labels.isnan()).sum()) if multilabel else len(labels)
    top5 = None if multilabel or len(classes) <= 5 else in_top5 / count
    found = {"accuracy": right / count, "top5": top5, "mean_auc": None, "mean_ap": None}
    return found | {"loss": loss / count, "intervals": None, "per_class": None}
