"""A backward pass that tells what the loss would be without each layer, to first order (see `estimators`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from adept_ds.models.families import Family


def install_taps(model: torch.nn.Module, family: Family, products: dict[int, torch.Tensor]) -> None:
    """Make a backward pass leave -<dL/dh_out, h_out - h_in> of each row in `products`, by layer: [rows] float64.

    Gradients begin at what enters the lowest layer: the embedding has no backward pass. Replaces the instance's
    `forward`, so DeepSpeed's hooks stay around the layer's call.
    """
    layers = family.layer_modules(model)
    # A hook, not part of `forward`: only where its input has a gradient does DeepSpeed let go of a layer again.
    layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:]))
    for position, layer in enumerate(layers):
        layer.forward = functools.partial(_tapped, layer.forward, products, position)


def _tapped(
    forward: Callable[..., Any],
    products: dict[int, torch.Tensor],
    position: int,
    hidden: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    output = forward(hidden, *args, **kwargs)
    if isinstance(output, tuple):
        return (_Tap.apply(output[0], hidden, products, position), *output[1:])
    return _Tap.apply(output, hidden, products, position)


class _Tap(torch.autograd.Function):
    """The identity; its backward pass takes the inner product of each row.

    Keeps no copy: both tensors are alive anyway, since the norms that follow need them for their own backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, after: torch.Tensor, before: torch.Tensor, products: dict[int, torch.Tensor], position: int
    ) -> torch.Tensor:
        ctx.save_for_backward(after, before)
        ctx.products, ctx.position = products, position
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        after, before = ctx.saved_tensors
        product = grads[0].float() * (after.float() - before.float())
        ctx.products[ctx.position] = -product.sum((1, 2), dtype=torch.float64)
        return grads[0], None, None, None
