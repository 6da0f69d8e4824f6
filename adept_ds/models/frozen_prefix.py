"""What the frozen layers below the lowest trainable one compute for a fixed corpus: computed once, then replayed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class FrozenPrefix:
    """Hidden states that enter the lowest trainable layer, on the host, by the key of the batch that they belong to.

    While a batch is replayed, the layers below do nothing, and under ZeRO-3 their weights are not gathered.

    Args:
        layers: all decoder layers, lowest first; each maps hidden states [rows, tokens, dim] to the same.
        lowest: index of the lowest trainable layer.
        max_batches: so many are kept; later ones are computed anew each time. The number, and the order of batches,
            must be the same on every rank: ranks that differ would wait for each other's collectives.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], lowest: int, max_batches: int) -> None:
        self._below, self._lowest = layers[:lowest], layers[lowest]
        self._max_batches = max_batches if lowest else 0
        self._entering: dict[Hashable, torch.Tensor] = {}

    @contextmanager
    def at(self, batch: Hashable) -> Iterator[None]:
        """Run the model on a batch: the same tokens whenever the key is the same."""
        saved = self._entering.get(batch)
        if saved is None and len(self._entering) >= self._max_batches:
            yield
            return
        forward = self._lowest.forward

        def enter(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if saved is None:
                self._entering[batch] = hidden.detach().cpu()
            return forward(hidden if saved is None else saved.to(hidden.device), *args, **kwargs)

        replaced = {self._lowest: enter} | ({} if saved is None else dict.fromkeys(self._below, pass_through))
        with replaced_forwards(replaced):
            yield


def pass_through(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The `forward` of a layer that the residual stream passes around."""
    return hidden


@contextmanager
def replaced_forwards(replaced: Mapping[torch.nn.Module, Any]) -> Iterator[None]:
    """Give module instances another `forward` for a while; DeepSpeed's hooks stay around their calls."""
    before = {module: module.__dict__.get("forward") for module in replaced}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
