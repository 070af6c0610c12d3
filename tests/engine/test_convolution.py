import pytest
import torch
import torch.nn.functional as F

from engine.convolution import conv2d
from models import StdConv2d


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)))
@pytest.mark.parametrize(
    "images, channels, filters, size, kernel, stride",
    (
        (2, 512, 512, 1, 3, 2),  # where oneDNN's gradient in bf16 is at times 1e18
        (3, 64, 288, 5, 3, 2),
        (3, 96, 128, 2, 3, 1),
        (3, 96, 512, 7, 1, 2),
        (5, 96, 128, 2, 1, 1),
        (2, 8, 31, 1, 1, 1),  # too few filters: oneDNN's
    ),
)
def test_gradients_are_those_of_64_bits(
    images, channels, filters, size, kernel, stride, dtype, tolerance
):
    torch.manual_seed(0)
    x = torch.randn(images, channels, size, size).to(dtype).requires_grad_()
    weight = torch.randn(filters, channels, kernel, kernel).to(dtype).requires_grad_()
    settings = (stride, stride), (kernel // 2, kernel // 2)
    output = conv2d(x, weight, *settings)
    assert torch.equal(output, F.conv2d(x, weight, None, *settings))
    along = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, weight), along)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    output = F.conv2d(*exact, None, *settings)
    for one, other in zip(found, torch.autograd.grad(output, exact, along.double())):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one - other).norm() < tolerance * other.norm()


def test_networks_train_with_them_under_autocast():
    torch.manual_seed(0)
    layer, x = StdConv2d(512, 512, 3, 2, padding=1, bias=False), torch.randn(2, 512, 1, 1)
    gradients = []
    for rounded in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            output = layer(x)
        assert output.dtype == (torch.bfloat16 if rounded else torch.float32)
        output.float().sum().backward()
        gradients.append(layer.weight.grad)
        layer.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
