"""Forward passes over a whole set: each image once, on one of the processes."""

import functools

import torch
import torch.distributed as dist

from engine.metrics import compute_metrics


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
    """forward(image) of every image, in order, on every rank: (num_images, width) float32, in host
    memory.

    forward: (B,3,H,W) -> (B, width), of a network in eval mode. stream: (rows (B,), images uint8
    (B,C,H,W)) of this rank's part; one of the ranks has each row.
    """
    outputs = torch.zeros(num_images, width)
    for rows, images in stream:
        with env.autocast():
            output = forward(to_input(images, normalization, env.device))
        outputs[rows] = output.float().cpu()
    if env.ranks > 1:
        dist.all_reduce(outputs)  # every row is zero but on one rank
    return outputs


def evaluate(model, stream, labels, classes, env, normalization):
    """compute_metrics of a test set; stream: as of `predict`. The model is in eval mode for it."""
    model.eval()
    logits = predict(model, len(classes), stream, len(labels), env, normalization)
    model.train()
    return compute_metrics(logits, labels, classes)
