"""What collectives move, seen as PyTorch dispatches them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Every collective while the block ran: (its name, bytes of its larger side)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args]
            self.seen.append((func.__name__.partition(".")[0].strip("_"), max(sizes)))
        return func(*args, **(kwargs or {}))

    def gathered(self) -> list[int]:
        """Bytes of each all-gather."""
        return [size for name, size in self.seen if "allgather" in name]


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)] if isinstance(argument, list | tuple) else []
