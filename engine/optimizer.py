"""SGD with adaptive gradient clipping."""

import math

import torch


class SGD_AGC(torch.optim.SGD):
    """SGD with adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171, section 4.1).

    The gradient G of a unit with weights W is scaled to norm clipping * max(|W|, eps) when it is
    longer. A unit is an output filter, or a whole vector. Groups with clipping=None are not
    clipped. Weight decay and momentum come after it. Nothing here waits for the device.
    """

    def __init__(
        self, params, lr, momentum=0.9, weight_decay=0.0, nesterov=True, clipping=0.01, eps=1e-3
    ):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)
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
                if state["momentum_buffer"].shape != p.shape:
                    raise ValueError(f"momentum {tuple(state['momentum_buffer'].shape)}")
                state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Leaves grad_norm (of all gradients, before clipping) and clipped (the share
        of units that were scaled, nan without clipping) as tensors on the device.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        norms, scales = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["clipping"] is None or not params:
                norms += torch._foreach_norm([p.grad for p in params]) if params else []
                continue
            # Vectors, of which there are twice as many as filters, take few launches together.
            filters, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
            grads, flat = [p.grad for p in filters], [p.grad for p in vectors]
            bounds = _unit_norms(filters, vectors).clamp_(min=group["eps"]).mul_(group["clipping"])
            unit_norms = _unit_norms(grads, flat)
            # At most 1, and exactly 1 where nothing is clipped.
            unit_scales = bounds.div_(unit_norms.clamp(min=1e-30)).clamp_(max=1)
            *by_filter, by_vector = unit_scales.split([*map(len, filters), len(vectors)])
            for grad, scale in zip(grads, by_filter):
                grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))
            if flat:
                sizes = [grad.numel() for grad in flat]
                scaled = torch.cat([grad.view(-1) for grad in flat])
                scaled *= torch.cat([s.expand(n) for s, n in zip(by_vector.unbind(), sizes)])
                torch._foreach_copy_(flat, scaled.split(sizes))
            norms.append(unit_norms.norm())
            scales.append(unit_scales)
        self.grad_norm = torch.stack(norms).norm()
        self.clipped = (torch.cat(scales) < 1).float().mean() if scales else math.nan
        super().step()
        return loss


def _unit_norms(filters, vectors):
    """The norms of all units of all tensors, one vector."""
    norms = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim))) for t in filters]
    whole = torch._foreach_norm(vectors) if vectors else []
    return torch.cat([*norms, *[norm.view(1) for norm in whole]])


def set_learning_rate(optimizer, lr):
    """Of all parameters, from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
