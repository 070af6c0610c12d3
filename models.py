"""ResNetV2 as BiT defines it: the network of every experiment, its sizes, and loading its weights.

Kolesnikov et al. 2020, *Big Transfer (BiT)*, arXiv:1912.11370, section 3; weight standardisation
from Qiao et al. 2019, arXiv:1903.10520; group normalisation from Wu & He 2018, arXiv:1803.08494.
"""

import difflib
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from engine import options
from engine.checkpoint import refuse_nonsense
from engine.console import Parser, one_of, print_table
from engine.convolution import conv2d
from engine.processes import run_script
from engine.weights import PUBLISHED, VTAB, our_names, published_path, read_weights


class Size(NamedTuple):
    """Of a network."""

    blocks: tuple  # units of each stage
    width: float  # factor of the channels, a power of 2 or multiple of 0.5
    size_class: str  # pre-trained like the "small" networks (R50x1) or the "large" ones (R152x4)


# Those below R50x1 are ours, for tests and laptops; 16 channels make 16 groups of a norm, not 32.
MODELS = {
    "R14x0.25": Size((1, 1, 1, 1), 0.25, "small"),
    "R14x0.5": Size((1, 1, 1, 1), 0.5, "small"),
    "R26x0.5": Size((2, 2, 2, 2), 0.5, "small"),
    "R26x1": Size((2, 2, 2, 2), 1, "small"),
    "R50x1": Size((3, 4, 6, 3), 1, "small"),
    "R50x3": Size((3, 4, 6, 3), 3, "large"),
    "R101x1": Size((3, 4, 23, 3), 1, "large"),
    "R101x3": Size((3, 4, 23, 3), 3, "large"),
    "R152x2": Size((3, 8, 36, 3), 2, "large"),
    "R152x4": Size((3, 8, 36, 3), 4, "large"),
}


# ---- Network -------------------------------------------------------------------------------------


def standardize(weight):
    """Weight standardisation: each output filter minus its mean, over sqrt(variance + 1e-10).

    weight: (O,I,kh,kw). A layer norm of each filter is this, of the biased variance, in one fused
    kernel; on CPUs in half the time of a batch norm. Filters are read as they are stored, without a
    copy, and keep their strides: a 1x1 kernel too tells convolutions which layout is meant.
    """
    channels_last = weight.stride(3) != 1
    stored = weight.permute(0, 2, 3, 1) if channels_last else weight
    filters = stored.reshape(len(weight), -1)
    filters = F.layer_norm(filters, filters.shape[1:], eps=1e-10).view(stored.shape)
    return filters.permute(0, 3, 1, 2) if channels_last else filters


class StdConv2d(nn.Conv2d):
    """Convolution with standardised weights; for an evaluation they are standardised once."""

    kept = None  # (weight, what tells its states apart, standardised weights)

    def forward(self, x):
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return conv2d(x, standardize(self.weight), self.stride, self.padding)
        kind, dtype = x.device.type, self.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        weight = self.weight
        if weight.is_inference():  # whose changes are not counted
            return self._conv_forward(x, standardize(weight).to(dtype), self.bias)
        key = weight._version, weight.data_ptr(), weight.device, dtype
        if self.kept is None or self.kept[0] is not weight or self.kept[1] != key:
            self.kept = weight, key, standardize(weight).to(dtype)
        return self._conv_forward(x, self.kept[2], self.bias)

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)


class GroupNorm(nn.GroupNorm):
    """In the dtype of its input, not in autocast's fp32 on CUDA; the statistics are in fp32."""

    def forward(self, x):
        if x.device.type != "cuda":
            return super().forward(x)  # the CPU's kernel takes weights of another dtype
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class PreActBottleneck(nn.Module):
    """GN-ReLU-1x1, GN-ReLU-3x3 (carries the stride), GN-ReLU-1x1, plus the input or, where the
    shape changes, a projection of the first pre-activation.
    """

    def __init__(self, cin, cout, cmid, stride):
        super().__init__()
        self.gn1 = GroupNorm(min(32, cin), cin)
        self.conv1 = StdConv2d(cin, cmid, 1, bias=False)
        self.gn2 = GroupNorm(min(32, cmid), cmid)
        self.conv2 = StdConv2d(cmid, cmid, 3, stride, padding=1, bias=False)
        self.gn3 = GroupNorm(min(32, cmid), cmid)
        self.conv3 = StdConv2d(cmid, cout, 1, bias=False)
        if stride != 1 or cin != cout:
            self.downsample = StdConv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.gn1(x), inplace=True)
        shortcut = self.downsample(out) if hasattr(self, "downsample") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.gn2(out), inplace=True))
        out = self.conv3(F.relu(self.gn3(out), inplace=True))
        return out + shortcut


class ResNetV2(nn.Module):
    """BiT's pre-activation ResNet. The state dict has the names of BiT's PyTorch code."""

    def __init__(self, blocks, width, num_classes, checkpoint_activations=False):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        cin = channels = int(64 * width)
        self.root = nn.Sequential()
        self.root.conv = StdConv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.root.pad = nn.ConstantPad2d(1, 0)  # not max_pool's -inf: BiT's weights expect zeros
        self.root.pool = nn.MaxPool2d(3, stride=2)
        self.body = nn.Sequential()
        for stage, count in enumerate(blocks):
            cmid = channels * 2**stage
            units = nn.Sequential()
            for unit in range(count):
                stride = 2 if stage > 0 and unit == 0 else 1
                block = PreActBottleneck(cin, 4 * cmid, cmid, stride)
                units.add_module(f"unit{unit + 1:02d}", block)
                cin = 4 * cmid
            self.body.add_module(f"block{stage + 1}", units)
        self.head = nn.Sequential()
        self.head.gn = GroupNorm(32, cin)
        self.head.relu = nn.ReLU(inplace=True)
        self.head.avg = nn.AdaptiveAvgPool2d(1)
        self.head.conv = nn.Conv2d(cin, num_classes, 1)

    def parameter_groups(self):
        """For SGD_AGC: all but the classifier's weight, and that weight, which is not clipped."""
        head = self.head.conv.weight
        rest = [p for p in self.parameters() if p is not head]
        return [{"params": rest}, {"params": [head], "clipping": None}]

    def compile_blocks(self):
        """Compiles each block, in place: blocks of equal shapes share one graph."""
        torch._dynamo.config.recompile_limit = 64  # graphs of a block's code: eight a layout, or so
        for stage in self.body:
            for block in stage:
                block.compile()

    def _pooled(self, images):
        # The root's pooling is several times faster in channels_last, also on CPUs.
        x = self.root(images.contiguous(memory_format=torch.channels_last))
        x = x.contiguous(memory_format=LAYOUT.get(x.device.type, torch.contiguous_format))
        for stage in self.body:
            for block in stage:
                if self.checkpoint_activations and self.training:
                    x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x)
        return self.head.avg(self.head.relu(self.head.gn(x)))

    def features(self, images):
        """images: (N,3,H,W) float, normalised -> what the classifier reads, (N, 2048*width)."""
        return self._pooled(images).flatten(1)

    def forward(self, images):
        """images: (N,3,H,W) float, normalised -> logits (N, num_classes)."""
        return self.head.conv(self._pooled(images)).flatten(1)


class Statistics(nn.Module):
    """What is seen without a network: of each channel mean, spread and a histogram of 32 parts."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Sequential()
        self.head.conv = nn.Conv2d(3 * 34, num_classes, 1)

    def features(self, images):
        """images: (N,3,H,W) float from 0 to 1 -> (N,102) float32."""
        pixels = images.float().flatten(2)
        parts = (pixels * 32).long().clamp(max=31)
        counts = pixels.new_zeros(*pixels.shape[:2], 32)
        shares = counts.scatter_add_(2, parts, torch.ones_like(pixels)) / pixels.shape[2]
        std, mean = torch.std_mean(pixels, 2, correction=0, keepdim=True)
        return torch.cat([mean, std, shares], 2).flatten(1)

    def forward(self, images):
        return self.head.conv(self.features(images)[..., None, None]).flatten(1)


def create_model(name, num_classes, checkpoint_activations=False, device=None):
    """A freshly initialised network, on the CPU, or brought to a device as `place` does.

    name: a key of MODELS, or "statistics", else ValueError. checkpoint_activations: recompute those
    of each block in the backward pass, about a third more arithmetic for less memory.
    """
    if name == "statistics":
        model = Statistics(num_classes)
    elif size := MODELS.get(name):
        model = ResNetV2(size.blocks, size.width, num_classes, checkpoint_activations)
    else:
        near, known = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0], ", ".join(MODELS)
        raise ValueError(f"unknown model {name!r}; did you mean {near!r}? known: {known}")
    return model if device is None else place(model, device)


@functools.lru_cache
def forward_flops(name, num_classes, image_size):
    """Floating-point operations of one image's forward pass, two a multiply-add (convolutions)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name, num_classes)(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


# How activations and kernels lie. On CPUs group norm is many times faster in contiguous_format. On
# GPUs tensor cores read channels_last; but group norm, before PyTorch 2.15, returns the other.
LAYOUT = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}


def place(model, device):
    """The model on that device, in the memory format that is fast there."""
    return model.to(device, memory_format=LAYOUT[torch.device(device).type])


# ---- Weights -------------------------------------------------------------------------------------


def load_weights(model, path, content=None, head=True):
    """Fills the model in place from our checkpoints and the published model.pth.tar (a dict with
    the state dict under "model"), a state dict alone, also timm's of resnetv2_*_bit, or BiT's .npz.

    content: what read_weights has read of it already. A head for another number of classes, and
    any with head=False, is left as it is (fresh). Raises ValueError naming the first keys when
    anything else differs, FileNotFoundError when there is no such file.
    """
    model.load_state_dict(matching_state(model, path, content, head))


def matching_state(model, path, content=None, head=True):
    """What load_weights loads: a state dict of the model's own keys and shapes."""
    state = content or read_weights(path)
    state = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict under 'model'")
    count, state = len(state), our_names(state)
    if len(state) < count:
        raise ValueError(f"{path}: holds some weights twice, by two names; keep one of each")
    own = model.state_dict()
    shared = [key for key in own if key in state]
    refuse_nonsense(path, {key: state[key] for key in shared})
    heads = ("head.conv.weight", "head.conv.bias")
    if all(key in state and (not head or len(state[key]) != len(own[key])) for key in heads):
        state |= {key: own[key] for key in heads}
    differences = [f"{key} is missing" for key in own if key not in state]
    differences += [f"{key} is unexpected" for key in state if key not in own]
    for key in shared:
        if state[key].shape != own[key].shape:
            differences.append(f"{key} is {tuple(state[key].shape)} for {tuple(own[key].shape)}")
    if differences:
        found = f"{len(differences)} differences: {'; '.join(differences[:3])}"
        mend = "give the --model that they were trained as"
        raise ValueError(f"{path}: weights of another network ({found}); {mend}")
    return state


def main():
    """python models.py list: the networks that --checkpoint knows by name; of VTAB's those here."""
    parser = Parser("Lists published networks: --checkpoint NAME --download fetches one.")
    options.add(parser, "--cache-dir")
    parser.add_argument("command", type=one_of("list"), help="list")
    args, rows = parser.parse_args(), []
    for name, (source, model, url) in PUBLISHED.items():
        path = published_path(name, args.cache_dir)
        if path.exists() or "/vtab/" not in url:
            with torch.device("meta"):
                network = create_model(model, 21843 if source == "imagenet21k" else 1000)
            size = 4e-6 * sum(p.numel() for p in network.parameters())
            rows.append([name, source, f"{size:.0f}", path if path.exists() else "no"])
    print_table(rows, ["name", "trained on", "MB of weights", "here"])
    print(f"and bit:BiT-M-SIZE-runN-TASK, N 0 to 2, TASK of VTAB-1k: {' '.join(VTAB.split())}")


if __name__ == "__main__":
    run_script(main)
