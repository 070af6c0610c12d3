"""Weight files, also of others: their formats, and our names for what they hold."""

import re
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import load_plain, read_tensors

# Names of others' files -> ours: regular expressions, replaced in this order.
NAMES = (
    (r"\b(_orig_mod|module)\.", ""),  # of torch.compile and DistributedDataParallel
    # timm's
    (r"^stem\.", "root."),
    (r"^stages\.(\d+)", lambda found: f"body.block{int(found[1]) + 1}"),
    (r"\.blocks\.(\d+)", lambda found: f".unit{int(found[1]) + 1:02d}"),
    (r"\.norm(\d)", r".gn\1"),
    (r"\.downsample\.conv", ".downsample"),
    (r"^norm", "head.gn"),
    (r"^head\.fc", "head.conv"),
    # BiT's, of TensorFlow
    (r"^resnet/block", "body/block"),
    (r"^resnet/root_block/standardized_conv2d", "root/conv"),
    (r"^resnet/group_norm", "head/gn"),
    (r"^resnet/head/conv2d", "head/conv"),
    (r"/a/proj/standardized_conv2d", "/downsample"),
    (r"/([abc])/standardized_conv2d", lambda found: f"/conv{'abc'.index(found[1]) + 1}"),
    (r"/([abc])/group_norm", lambda found: f"/gn{'abc'.index(found[1]) + 1}"),
    (r"/(kernel|gamma)$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/", "."),
)


def _read_npz(path):
    """BiT's .npz, kernels HWIO -> OIHW and vectors flat, without the optimiser's state of some."""
    with np.load(path, allow_pickle=False) as arrays:
        keys = [key for key in arrays.files if key.startswith("resnet/")]
        state = {key: torch.from_numpy(arrays[key]) for key in keys}
    for key, array in state.items():
        state[key] = array.permute(3, 2, 0, 1) if key.endswith("/kernel") else array.flatten()
    return {"model": state}


def read_weights(path):
    """Reads a weight file without running anything in it; returns the whole dict that it holds.

    Raises FileNotFoundError, or ValueError when it is damaged, holds code or is of safetensors.
    """
    if Path(path).suffix == ".safetensors":
        mend = f"torch.save(timm.models.load_state_dict({str(path)!r}), 'weights.pth')"
        raise ValueError(f"{path}: safetensors are not read; save it as a .pth: {mend}")
    return read_tensors(path, _read_npz if Path(path).suffix == ".npz" else load_plain)


def our_names(state):
    """A state dict under our names of parameters."""
    for theirs, ours in NAMES:
        state = {re.sub(theirs, ours, str(key)): value for key, value in state.items()}
    return state
