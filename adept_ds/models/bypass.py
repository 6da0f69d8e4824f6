"""Decoder layers that do nothing for a while: the residual stream passes around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def bypassed(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Go around these layers: what enters one leaves it, and nothing of it is computed, forward or backward.

    DeepSpeed's hooks around a layer's modules never fire, so that under ZeRO-3 its weights are not gathered.
    """
    with replaced_forwards(dict.fromkeys(layers, pass_through)):
        yield


def pass_through(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The `forward` of a layer that does nothing: [rows, tokens, dim] -> the same."""
    return hidden


@contextmanager
def replaced_forwards(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give module instances another `forward` for a while; DeepSpeed's hooks stay around their calls."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier
