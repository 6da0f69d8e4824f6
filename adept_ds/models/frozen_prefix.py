"""What the frozen layers below the lowest trainable one compute for a fixed corpus: computed once, then replayed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adept_ds.models.bypass import pass_through, replaced_forwards


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
