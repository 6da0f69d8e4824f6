"""One AdamW pass over a flat tensor in which every element has its unit's learning rate, for accelerators.

With m_t, v_t the moments of AdamW, lambda the decay and f the multiplier of an element's unit,

    w_t = w_(t-1) (1 - lr f lambda) - f lr / (1 - beta_1^t) m_t / (sqrt(v_t) / sqrt(1 - beta_2^t) + eps)

Multipliers are looked up by arithmetic (see `segments`), the number of steps stays on the device, and nothing waits for
it: what is launched depends on the number of elements alone, not on that of units or parameters.

As a Triton kernel (`one_pass_kernel`) it is one launch a tensor, and moves the 28 bytes an element that any AdamW does.
Where Triton cannot be used, the same in PyTorch's operations takes 25 launches for each `CHUNK` elements, moves about
250 bytes an element, and needs 40 bytes for each element of a chunk meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from adept_ds.units.placement import Placement
from adept_ds.units.segments import Segments, UnitSlice

CHUNK = 1 << 24
"""Elements at a time; what is computed for them takes 0.7 GB."""

Pass = Callable[[list[torch.Tensor], Segments, torch.Tensor, torch.Tensor, Mapping[str, Any]], None]
"""A step, of: weight, gradient and both moments, [n] float32 each; their segments; [n_units] float32 multipliers;
[2] float32 as of `corrections`; and lr, betas, eps and weight_decay by name."""


def adamw_pass(
    flat: list[torch.Tensor],
    step: torch.Tensor,
    segments: Segments,
    multipliers: torch.Tensor,
    group: Mapping[str, Any],
) -> None:
    """Take one step.

    Args:
        flat: weight, gradient, exp_avg and exp_avg_sq, [n] float32, contiguous.
        step: number of this step, from 1 on; a scalar on the device.
        multipliers: [n_units] float32, on the device.
        group: lr, betas, eps and weight_decay.
    """
    take_pass = by_kernel(flat[0].device) or by_operations
    take_pass(flat, segments, multipliers, corrections(step, group["betas"]), group)


def corrections(step: torch.Tensor, betas: tuple[float, float]) -> torch.Tensor:
    """[2] float32: 1 / (1 - beta_1^t) and 1 / sqrt(1 - beta_2^t), computed in float64 where `step` is."""
    count = step.double()
    first, second = (1.0 - torch.pow(beta, count) for beta in betas)
    return torch.stack([first.reciprocal(), second.rsqrt()]).float()


def by_operations(
    flat: list[torch.Tensor],
    segments: Segments,
    multipliers: torch.Tensor,
    correction: torch.Tensor,
    group: Mapping[str, Any],
) -> None:
    """A `Pass`."""
    (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
    for start in range(0, flat[0].numel(), CHUNK):
        weight, grad, exp_avg, exp_avg_sq = (tensor[start : start + CHUNK] for tensor in flat)
        factors, segment = segments.factors(multipliers, start, start + weight.numel())
        if segments.bound is not None:
            grad = grad.where(segments.bound.index_select(0, segment), 0.0)  # so that the moments of padding stay 0
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        if decay:
            weight.mul_((factors * -decay).add_(1.0))
        update = exp_avg_sq.sqrt().mul_(correction[1]).add_(group["eps"])
        torch.div(exp_avg, update, out=update)
        weight.addcmul_(update, factors.mul_(correction[0]), value=-group["lr"])


@cache
def by_kernel(device: torch.device) -> Pass | None:
    """The Triton kernel, where it can be used: tried once on each device, on a few elements.

    An installation may have Triton and not the compiler that Triton needs there, or a device that it does not know.
    """
    if device.type == "cpu":
        return None
    try:
        from adept_ds.units.one_pass_kernel import by_triton

        return by_triton if agrees(by_triton, device) else None
    except Exception:  # of a compiler, a driver, an import: whatever it is, PyTorch's operations do the same
        return None


def agrees(take_pass: Pass, device: torch.device) -> bool:
    """Whether it makes the same of a few elements as `by_operations`."""
    found = []
    for each in (take_pass, by_operations):
        flat = [torch.linspace(low, 1.0, 5, device=device) for low in (-1.0, 0.5, 0.0, 0.1)]
        segments = Segments.of([UnitSlice(1, 5, Placement((2, 2), 0, axis=1))], 5, device)
        group: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        multipliers = torch.tensor([0.5, 2.0], device=device)
        each(flat, segments, multipliers, corrections(torch.ones((), device=device), group["betas"]), group)
        found.append(torch.stack([flat[0], *flat[2:]]))
    return torch.allclose(found[0][:, 1:], found[1][:, 1:], rtol=1e-5, atol=1e-6)
