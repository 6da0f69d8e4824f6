"""The optimizer's step, and the one copy to the host that a training step costs.

DeepSpeed (0.19.8) steps on no gradient whose norm is no number, and asks the device for it: stage 3 once in a step
(stage3.py: `step`), stages 1 and 2 once, and again for each of the optimizer's groups that they clip
(stage_1_and_2.py: `step`, `unscale_and_clip_grads`). What else the host has to know of a step is there by then, so one
copy takes all of it: norms are handed on to DeepSpeed on the host, where asking costs nothing, and by the same numbers
it is decided whether the step is taken. A number on the host enters the device's arithmetic (clipping) by value.

In fp16 DeepSpeed asks once more, whether a gradient has overflowed, and with optimizer states on the host for what
it sums there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adept_ds.base.errors import LayoutError, NonFiniteLossError
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, client_optimizer, zero_stage

_TAKES_NORMS = {1: "scaled_global_norm", 2: "scaled_global_norm", 3: "_get_norm_groups"}
"""By stage, the function of DeepSpeed's that returns what it then looks at: the norm, or that of each sub-group."""


def step_below(
    engine: Engine, told: torch.Tensor, largest_norm: Callable[[Sequence[float]], float]
) -> tuple[list[float], float]:
    """Take the optimizer's step, unless the norm of its gradient, unscaled and unclipped, is no number or above
    `largest_norm`: then no weight and no moment changes, on any rank.

    Args:
        told: what the host wants to know of the step, the same on every rank. [n] float64, on the device
        largest_norm: from the content of `told`; called before anything changes, if the norm is a number.

    Returns:
        The content of `told`, and the norm.

    Raises:
        NonFiniteLossError: in fp16, when losses cannot be scaled down any further.
    """
    optimizer, values, taken = client_optimizer(engine), list[float](), list[bool]()
    step = optimizer.step

    def step_if_below() -> None:
        """Asked once for each sub-group of partitions."""
        if not taken:
            taken.append(_norm(engine) <= largest_norm(values))
        if taken[0]:
            step()

    optimizer.step = step_if_below  # type: ignore[assignment]
    try:
        with _norms_come_with(engine, told, values):
            engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise NonFiniteLossError(
            "train.precision: gradients overflow in fp16 however far losses are scaled down; set it to bf16 or fp32, "
            "or lower train.lr"
        ) from None
    finally:
        del optimizer.step
    if not values:  # fp16: a gradient has overflowed, and DeepSpeed took no norm
        values += told.cpu().tolist()
    return values, _norm(engine) if taken else math.inf


def _norm(engine: Engine) -> float:
    return float(engine.optimizer._global_grad_norm)


@contextmanager
def _norms_come_with(engine: Engine, told: torch.Tensor, values: list[float]) -> Iterator[None]:
    """Let DeepSpeed get its norms on the host, in the copy that brings `told` into `values`."""
    optimizer, name = engine.optimizer, _TAKES_NORMS[zero_stage(engine)]
    try:
        take_norms = getattr(optimizer, name)
    except AttributeError as error:
        raise LayoutError(layout_complaint(str(error))) from error

    def take_on_host() -> Any:
        found = take_norms()
        norms = torch.stack(found if isinstance(found, list) else [found])
        copied = torch.cat([told, norms.to(told)]).cpu()  # float64 holds them exactly
        values[:] = copied[: told.numel()].tolist()
        on_host = list(copied[told.numel() :].to(norms.dtype))
        return on_host if isinstance(found, list) else on_host[0]

    setattr(optimizer, name, take_on_host)
    try:
        yield
    finally:
        delattr(optimizer, name)
