"""SGD with adaptive gradient clipping."""

import math

import torch


class SGD_AGC(torch.optim.SGD):
    """SGD with adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171, section 4.1).

    The gradient G of a unit with weights W is scaled to norm clipping * max(|W|, eps) when it is
    longer. A unit is an output filter, or a whole vector. Groups with clipping=None are not
    clipped. Nothing here waits for the device.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.9,
        weight_decay=0.0,
        nesterov=True,
        clipping=0.01,
        eps=1e-3,
    ):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, **settings)
        self.defaults.update(clipping=clipping, eps=eps)
        for group in self.param_groups:
            group.setdefault("clipping", clipping)
            group.setdefault("eps", eps)
        self._choose_kernels()

    def _choose_kernels(self):
        for group in self.param_groups:
            fused = all(p.device.type in ("cpu", "cuda") for p in group["params"])
            group.update(fused=fused, foreach=not fused)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._choose_kernels()
        # The fused kernel reads memory in order: the momentum takes its parameter's memory format.
        for p, state in self.state.items():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Leaves grad_norm (of all gradients, before clipping) and clipped (the share
        of units that were scaled, nan without clipping) as tensors on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms, scales = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["clipping"] is None or not params:
                norms += torch._foreach_norm([p.grad for p in params]) if params else []
            else:
                unit_norms, unit_scales = clip_units(params, group["clipping"], group["eps"])
                norms.append(unit_norms.norm())
                scales.append(unit_scales)
        self.grad_norm = torch.stack(norms).norm()
        self.clipped = (torch.cat(scales) < 1).float().mean() if scales else math.nan
        super().step()
        return loss


def clip_units(params, clipping, eps):
    """Scales the gradients of these parameters in place, unit by unit; (their norms, scales)."""
    grads = [p.grad for p in params]
    bounds, norms = _unit_norms(params).clamp_(min=eps).mul_(clipping), _unit_norms(grads)
    # At most 1, and exactly 1 where nothing is clipped.
    scales = bounds.div_(norms.clamp(min=1e-30)).clamp_(max=1)
    units = [len(p) if p.ndim > 1 else 1 for p in params]
    shapes = [(-1,) + (1,) * (p.ndim - 1) for p in params]
    by_tensor = [scale.view(shape) for scale, shape in zip(scales.split(units), shapes)]
    torch._foreach_mul_(grads, by_tensor)
    return norms, scales


def _unit_norms(tensors):
    """The norms of all units of all tensors, one vector."""
    norms = [
        torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)) if t.ndim > 1 else None).view(-1)
        for t in tensors
    ]
    return torch.cat(norms)


def set_learning_rate(optimizer, lr):
    """Of all parameters, from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
