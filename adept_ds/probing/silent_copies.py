"""What a silent copy of every layer would learn at first: its gradients, without an expanded model.

A copy of layer i stands directly above it, so it sees h_i, what layer i puts out, with layer i's own positions, masks
and settings. Its silent factors write nothing. The model computes what it did, and the gradient that reaches the copy's
output is dL/dh_i of the base: neither copies above nor below change it. Of the copy itself only the silent factors have
a gradient (whatever lies before them is multiplied by zero). So all copies can be imagined at once:

    forward pass     the base alone
    backward pass    when dL/dh_i is known, layer i runs once more, on h_i, with silent factors in place of its own, and
                     autograd carries dL/dh_i to these factors

That is one forward pass and one backward pass of the base, one more forward pass of each layer, and the products for
the gradients of the silent factors. Nothing is known of a family but which factors are silent: what a residual
multiplier, a router or a norm behind a sublayer does to the gradient, the layer's own code says.

Within the copy no gradient goes on through a sublayer: attention's silent factor reaches the MLP's input, and the MLP
writes nothing. So the inputs of everything in a layer that has weights are detached, which saves the backward pass
through the MLP; a parallel residual is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from adept_ds.models.families import Family

TakeGradient = Callable[[int, torch.Tensor], None]
"""From a layer, and the gradient of the loss by all silent factors of its copy, flattened behind one another in the
order of the layer's parameters, [elements] float32. Called in the backward pass, highest layer first."""


def imagine_copies(model: torch.nn.Module, family: Family, take: TakeGradient) -> None:
    """Make every backward pass give the gradients of silent copies of all layers to `take`.

    Replaces the instances' `forward`, so DeepSpeed's hooks stay around the layers' calls: in a layer's backward pass
    its weights are gathered, and the copy is passed within it. Gradients begin at what enters the lowest layer: the
    embedding has no backward pass.
    """
    layers = family.layer_modules(model)
    # A hook, not part of `forward`: only where its input has a gradient does DeepSpeed let go of a layer again.
    layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:]))
    for position, layer in enumerate(layers):
        layer.forward = functools.partial(_with_copy, layer, layer.forward, family, functools.partial(take, position))


def _with_copy(
    layer: torch.nn.Module,
    forward: Callable[..., Any],
    family: Family,
    take: Callable[[torch.Tensor], None],
    hidden: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    output = forward(hidden, *args, **kwargs)

    def copy(entering: torch.Tensor, upstream: torch.Tensor) -> None:
        with torch.enable_grad(), _silenced(layer, family) as factors:
            written = forward(entering.detach(), *args, **kwargs)
            gradients = torch.autograd.grad(_stream(written), factors, upstream)
        take(torch.cat([gradient.flatten().float() for gradient in gradients]))

    if isinstance(output, tuple):
        return (_Copy.apply(output[0], copy), *output[1:])
    return _Copy.apply(output, copy)


def _stream(output: Any) -> torch.Tensor:
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream


class _Copy(torch.autograd.Function):
    """The identity, as a silent copy is; its backward pass passes the copy.

    Keeps no copy of what it saves: that is alive anyway, since the layer above needs it for its own backward pass.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(output)
        ctx.copy = copy
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        ctx.copy(output, grads[0])
        return grads[0], None


@contextmanager
def _silenced(layer: torch.nn.Module, family: Family) -> Iterator[list[torch.Tensor]]:
    """The layer with silent factors, which are given, in place of its own, and no gradient beyond them."""
    factors, own = [], []
    with ExitStack() as hooks:
        for name, parameter in layer.named_parameters():
            if family.writes_residual(name):
                path, _, leaf = name.rpartition(".")
                module = layer.get_submodule(path)
                own.append((module, leaf, parameter))
                factors.append(torch.full_like(parameter, family.silent).requires_grad_())
        for child in layer.children():
            if any(True for _ in child.parameters()):
                hooks.callback(child.register_forward_pre_hook(_detach, with_kwargs=True).remove)
        try:
            for (module, leaf, _), factor in zip(own, factors, strict=True):
                module._parameters[leaf] = factor  # type: ignore[assignment]
            yield factors
        finally:
            for module, leaf, parameter in own:
                module._parameters[leaf] = parameter


def _detach(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
