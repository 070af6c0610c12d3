"""SGD with adaptive gradient clipping beside torch's SGD and a loop over units."""

import pytest
import torch

from engine.optimizer import SGD_AGC

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)


def parameters():
    """Weights of a convolution, a linear layer and a norm; one filter is 0, so that eps counts."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 3, 3), (5, 6), (7,)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    params[0].data[1] = 0
    return params


def train(params, optimizer, steps, scale, clip=None):
    """Steps by gradients that depend on the step's number alone, of this standard deviation."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator)
            if clip:
                clip(p)
        optimizer.step()


def clip_by_loop(p, clipping=0.01, eps=1e-3):
    """Adaptive gradient clipping as the paper writes it, unit by unit."""
    for unit in range(len(p)) if p.ndim > 1 else [slice(None)]:
        bound = clipping * max(float(p.detach()[unit].norm()), eps)
        norm = float(p.grad[unit].norm())
        if norm > bound:
            p.grad[unit] *= bound / norm


def assert_close(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clipping, scale", ((None, 1.0), (0.01, 1e-7)))
def test_agc_is_plain_sgd_where_nothing_is_clipped(clipping, scale):
    start, ours, theirs = parameters(), parameters(), parameters()
    optimizer = SGD_AGC(ours, clipping=clipping, **SETTINGS)
    # The same kernels, so that equal means bitwise equal.
    kernels = {key: optimizer.param_groups[0][key] for key in ("foreach", "fused")}
    reference = torch.optim.SGD(theirs, **SETTINGS, **kernels)
    for step in range(5):
        train(ours, optimizer, [step], scale)
        train(theirs, reference, [step], scale)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    assert not any(torch.equal(p, q) for p, q in zip(ours, start))


def test_agc_equals_a_loop_over_units():
    ours, theirs, plain = parameters(), parameters(), parameters()
    optimizer = SGD_AGC(ours, clipping=0.01, eps=1e-3, **SETTINGS)
    reference, unclipped = (torch.optim.SGD(p, **SETTINGS) for p in (theirs, plain))
    for step in range(6):  # some units are longer than their bound
        train(ours, optimizer, [step], 0.01)
        train(theirs, reference, [step], 0.01, clip_by_loop)
        train(plain, unclipped, [step], 0.01)
        assert_close(ours, theirs)
    for p, q in zip(ours, plain):
        assert (p - q).abs().max() > 1e-4  # the clipping did matter


def test_readings_are_of_the_gradient_before_clipping():
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:2]}, {"params": ours[2:], "clipping": None}]
    optimizer = SGD_AGC(groups, clipping=0.01, **SETTINGS)
    for step in range(3):
        plain = torch.optim.SGD(theirs, lr=0.0)
        train(theirs, plain, [step], 0.02)
        before = [p.grad.clone() for p in theirs]
        for p, q in zip(theirs, ours):
            p.data.copy_(q.data)
            clip_by_loop(p)
        train(ours, optimizer, [step], 0.02)
        scaled = sum(
            int((p.grad[unit] != grad[unit]).any())
            for p, grad in zip(theirs[:2], before)
            for unit in range(len(p))
        )
        norm = torch.cat([grad.flatten() for grad in before]).norm()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        assert 0 < scaled and float(optimizer.clipped) == pytest.approx(scaled / 9)


def test_groups_without_clipping_are_left_alone():
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:1]}, {"params": ours[1:], "clipping": None}]
    train(ours, SGD_AGC(groups, clipping=0.01, **SETTINGS), [0], 1.0)
    train(theirs, torch.optim.SGD(theirs, **SETTINGS), [0], 1.0)
    assert_close(ours[1:], theirs[1:])
    assert (ours[0] - theirs[0]).abs().max() > 0.05


def test_state_round_trip(tmp_path):
    whole, parts = parameters(), parameters()
    train(whole, SGD_AGC(whole, **SETTINGS), range(6), 0.1)
    first = SGD_AGC(parts, clipping=0.01, **SETTINGS)
    train(parts, first, range(3), 0.1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = SGD_AGC(parts, lr=9.0, clipping=0.5)  # the state brings the settings along
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(parts, second, range(3, 6), 0.1)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts))


def test_state_may_come_in_another_memory_format():
    """A checkpoint of a GPU has its momentum in channels_last; the CPU's weights are contiguous."""
    ours, theirs = parameters(), parameters()
    optimizer = SGD_AGC(ours, clipping=None, **SETTINGS)
    train(theirs, SGD_AGC(theirs, clipping=None, **SETTINGS), range(3), 1.0)
    train(ours, optimizer, [0], 1.0)
    state = optimizer.state_dict()
    momentum = state["state"][0]["momentum_buffer"]
    last = momentum.contiguous(memory_format=torch.channels_last)
    state["state"][0]["momentum_buffer"] = last
    optimizer.load_state_dict(state)
    train(ours, optimizer, [1, 2], 1.0)
    assert_close(ours, theirs)
