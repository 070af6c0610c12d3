"""Convolutions on CPUs whose weights' gradient is one product of matrices."""

import torch
import torch.nn.functional as F


class ConvolutionByPatches(torch.autograd.Function):
    """conv2d without bias, for many filters on small maps: oneDNN's gradient of the weights takes 2
    to 4 times its forward pass there, and in bf16 is wrong on some maps of one pixel.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.settings
        if weight.shape[2:] == (1, 1):  # which reads every stride-th pixel alone
            read = (..., slice(None, None, stride[0]), slice(None, None, stride[1]))
            by_input = torch.zeros_like(x)
            by_input[read] = torch.nn.grad.conv2d_input(x[read].shape, weight, grad)
            patches = x[read].flatten(2)
        else:
            by_input = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
            patches = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
        # n: images, o: filters, p: pixels of the output, i: values of a patch
        by_weight = torch.einsum("nop,nip->oi", grad.flatten(2), patches)
        return by_input, by_weight.view(weight.shape), None, None


def conv2d(x, weight, stride, padding):
    """F.conv2d of x (N,I,H,W) without bias, its gradients on CPUs by whichever way is fast."""
    height, width = (-(-length // step) for length, step in zip(x.shape[2:], stride))
    small = len(weight) >= 32 * height * width
    if small and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return ConvolutionByPatches.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, None, stride, padding)
