"""SGD with adaptive gradient clipping beside torch's SGD and a loop over units."""

import pytest
import torch

from engine.optimizer import SGD_AGC

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
UNITS = 4 + 5 + 1


def parameters():
    """Weights of a convolution, a linear layer and a norm; one filter is 0, so that eps counts."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 3, 3), (5, 6), (7,)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    params[0].data[1] = 0
    return params


def train(params, optimizer, steps, scale, clip=None):
    """Steps by gradients that depend on the step's number alone; what `clip` returned, summed."""
    clipped = 0
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator)
            clipped += clip(p) if clip else 0
        optimizer.step()
    return clipped


def clip_by_loop(p, clipping=0.01, eps=1e-3):
    """Adaptive gradient clipping as the paper writes it, unit by unit; how many were longer."""
    clipped = 0
    for unit in range(len(p)) if p.ndim > 1 else [slice(None)]:
        bound = clipping * max(float(p.detach()[unit].norm()), eps)
        norm = float(p.grad[unit].norm())
        if norm > bound:
            p.grad[unit] *= bound / norm
            clipped += 1
    return clipped


def assert_close(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clipping, scale", ((None, 1.0), (0.01, 1e-7)))
def test_agc_is_plain_sgd_where_nothing_is_clipped(clipping, scale):
    start, ours, theirs = parameters(), parameters(), parameters()
    optimizer = SGD_AGC(ours, clipping=clipping, **SETTINGS)
    # The same kernels, so that equal means bitwise equal.
    kernels = {key: optimizer.param_groups[0][key] for key in ("foreach", "fused")}
    train(ours, optimizer, range(5), scale)
    train(theirs, torch.optim.SGD(theirs, **SETTINGS, **kernels), range(5), scale)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    assert not any(torch.equal(p, q) for p, q in zip(ours, start))


def test_agc_equals_a_loop_over_units():
    ours, theirs, plain = parameters(), parameters(), parameters()
    optimizer = SGD_AGC(ours, clipping=0.01, eps=1e-3, **SETTINGS)
    reference, unclipped = (torch.optim.SGD(p, **SETTINGS) for p in (theirs, plain))
    for step in range(6):
        train(ours, optimizer, [step], 0.01)
        clipped = train(theirs, reference, [step], 0.01, clip_by_loop)
        train(plain, unclipped, [step], 0.01)
        assert_close(ours, theirs)
        assert 0 < clipped and float(optimizer.clipped) == pytest.approx(clipped / UNITS)
        norm = torch.cat([p.grad.flatten() for p in plain]).norm()  # before clipping
        torch.testing.assert_close(optimizer.grad_norm, norm)
    for p, q in zip(ours, plain):
        assert (p - q).abs().max() > 1e-4  # the clipping did matter


def test_groups_without_clipping_are_left_alone():
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:1]}, {"params": ours[1:], "clipping": None}]
    train(ours, SGD_AGC(groups, clipping=0.01, **SETTINGS), [0], 1.0)
    train(theirs, torch.optim.SGD(theirs, **SETTINGS), [0], 1.0)
    assert_close(ours[1:], theirs[1:])
    assert (ours[0] - theirs[0]).abs().max() > 0.05


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_state_round_trip(tmp_path, layout):
    """Also from a GPU, whose momentum is in channels_last while the CPU's weights are not."""
    whole, parts = parameters(), parameters()
    train(whole, SGD_AGC(whole, **SETTINGS), range(6), 0.1)
    first = SGD_AGC(parts, **SETTINGS)
    train(parts, first, range(3), 0.1)
    state = first.state_dict()
    momentum = state["state"][0]["momentum_buffer"]
    state["state"][0]["momentum_buffer"] = momentum.contiguous(memory_format=layout)
    torch.save(state, tmp_path / "state.pt")
    second = SGD_AGC(parts, lr=9.0, clipping=0.5)  # the state brings the settings along
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(parts, second, range(3, 6), 0.1)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts))
