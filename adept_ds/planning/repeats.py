"""Layers that are alike are sent through a few times, and then stand for one another.

A model of a hundred layers has few kinds of them, and what a layer of each keeps is the same wherever it is: but for
what the first of a kind keeps for all after it (the tables of rotary embeddings), so that the second stands for the
rest. In doubt a layer is sent through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch

from adept_ds.planning.trees import tensors_of

_SENT_THROUGH = 2
_NAMES_OF_ITS_PLACE = ("layer_idx", "layer_id", "layer_number")


class Repeats:
    """Which layer stands for which, and what it returned."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        kinds: list[Hashable] = [None, *map(_kind, layers)]
        self._kinds = [*pairwise(kinds)]  # a layer behind one of another kind is another kind
        self._sent: dict[Hashable, list[int]] = {}
        self._returned: dict[int, Any] = {}
        self._stands_for: dict[int, int] = {}

    def alike(self, layer: int) -> int:
        """The layer that was sent through for this one, or itself."""
        return self._stands_for.get(layer, layer)

    def send(self, layer: int, forward: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer returns; `alike` tells whether it ran for it."""
        sent = self._sent.setdefault((self._kinds[layer], _shape(inputs), _shape(kwargs)), [])
        if len(sent) == _SENT_THROUGH:
            self._stands_for[layer] = sent[-1]
            return _made_anew(self._returned[sent[-1]])
        sent.append(layer)
        self._returned[layer] = forward(*inputs, **kwargs)
        return self._returned[layer]


def _kind(layer: torch.nn.Module) -> Hashable:
    """Equal for layers of the same modules with the same settings, of which the same weights train."""
    return tuple((type(module), _settings(module), _weights(module)) for module in layer.modules())


def _settings(module: torch.nn.Module) -> Hashable:
    plain = ((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str))
    return tuple((name, value) for name, value in plain if name not in _NAMES_OF_ITS_PLACE)


def _weights(module: torch.nn.Module) -> Hashable:
    named = module.named_parameters(recurse=False)
    return tuple((name, weight.shape, weight.requires_grad) for name, weight in named)


def _shape(tree: Any) -> Hashable:
    """Of what a layer is given: shapes of tensors, and all else as it is written."""
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.dtype, tree.requires_grad
    if isinstance(tree, dict):
        return tuple((name, _shape(value)) for name, value in tree.items())
    return tuple(map(_shape, tree)) if isinstance(tree, list | tuple) else repr(tree)


def _made_anew(returned: Any) -> Any:
    """The same, with hidden states of its own."""
    first, *_ = tensors_of(returned)
    made = torch.empty_like(first).requires_grad_(first.requires_grad)
    return (made, *returned[1:]) if isinstance(returned, tuple) else made
