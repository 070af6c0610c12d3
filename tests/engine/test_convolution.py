import copy

import pytest
import torch

from models import StdConv2d


@pytest.mark.parametrize("rounded, tolerance", ((False, 1e-5), (True, 2e-2)))
@pytest.mark.parametrize(
    "images, size, shape",  # input channels, filters, kernel, stride
    (
        (2, 1, (512, 512, 3, 2)),  # where oneDNN's gradient in bf16 is at times 1e18
        (3, 5, (64, 288, 3, 2)),
        (3, 2, (96, 128, 3, 1)),
        (3, 7, (96, 512, 1, 2)),
        (5, 2, (96, 128, 1, 1)),
        (2, 1, (32, 31, 1, 1)),  # too few filters: oneDNN's
    ),
)
def test_gradients_are_those_of_64_bits(images, size, shape, rounded, tolerance):
    torch.manual_seed(0)
    layer = StdConv2d(*shape, padding=shape[2] // 2, bias=False)
    exact, x = copy.deepcopy(layer).double(), torch.randn(images, shape[0], size, size)
    for trained, other in ((layer.weight, exact.weight), (x, x.double())):
        trained.requires_grad_(), other.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            output = layer(x)
        along = torch.randn_like(output)
        (found,) = torch.autograd.grad(output, trained, along)
        inputs = other if trained is x else x.double()
        (expected,) = torch.autograd.grad(exact(inputs), other, along.double())
        assert found.dtype == torch.float32
        assert (found - expected).norm() < tolerance * expected.norm()
