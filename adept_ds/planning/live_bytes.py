"""Bytes of tensors that are alive, also of tensors without content: what an allocator would have to hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of all tensors that were made while the block runs, views counted with what they look into."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.grown: list[int] = []
        """`now`, each time that it had grown."""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key not in given and key not in self._known:  # else it was there before, or is a view
                self._take(storage, key)
        return result

    def _take(self, storage: torch.UntypedStorage, key: int) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.grown.append(self.now)
        weakref.finalize(storage, self._give_back, key, size).atexit = False

    def _give_back(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()
