"""The least time that a training step can take on this machine: that of its matrix products, each at its own best rate.

Which products there are is seen while one micro-batch is trained; each is then timed alone, with the same sizes and the
same order of elements in memory, again and again, so that what fits into a cache is there. Everything else that a step
does (norms, rotary embeddings, activations, softmax, the loss, the optimizer, Python) is left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ENOUGH_SECONDS, _ENOUGH_TIMES = 0.2, 5
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_OF_ATTENTION = {_ATTENTION: 2, f"{_ATTENTION}_backward": 5}
"""Products of its size that it consists of; going back, the scores are computed again."""


@dataclass(frozen=True)
class Product:
    """Of `batch` pairs of matrices (rows, inner) and (inner, columns).

    Attributes:
        turned: which of both lie transposed in memory.
        share: of its elements that are needed: half of a causal attention's.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    turned: tuple[bool, bool] = (False, False)
    share: float = 1.0

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns * self.share

    def seconds(self) -> float:
        """The fastest of several."""
        pair = (self._matrix(self.rows, self.inner, 0), self._matrix(self.inner, self.columns, 1))
        took, begun = list[float](), time.perf_counter()
        while len(took) < _ENOUGH_TIMES or time.perf_counter() - begun < _ENOUGH_SECONDS:
            start = time.perf_counter()
            torch.matmul(*pair)
            took.append(time.perf_counter() - start)
        return min(took) * self.share

    def _matrix(self, rows: int, columns: int, which: int) -> torch.Tensor:
        lead = () if self.batch == 1 else (self.batch,)
        if self.turned[which]:
            return torch.randn(*lead, columns, rows).transpose(-1, -2)
        return torch.randn(*lead, rows, columns)


class Products(TorchDispatchMode):
    """Every matrix product while the block ran, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._note(args[0], args[1])
        elif name == "addmm":
            self._note(args[1], args[2])
        elif name in _OF_ATTENTION:
            query = args[0] if name == _ATTENTION else args[1]
            batch, heads, tokens, width = query.shape
            scores = Product(batch * heads, tokens, width, tokens, (False, True), share=0.5)
            self.seen[scores] += _OF_ATTENTION[name]
        return func(*args, **(kwargs or {}))

    def _note(self, left: torch.Tensor, right: torch.Tensor) -> None:
        batch = left.shape[0] if left.dim() == 3 else 1
        turned = (left.stride(-1) != 1, right.stride(-1) != 1)
        self.seen[Product(batch, left.shape[-2], left.shape[-1], right.shape[-1], turned)] += 1


@dataclass(frozen=True)
class Floor:
    """Of one micro-batch."""

    seconds: float
    operations: float


def floor_of(micro_batch: Callable[[], object]) -> Floor:
    """Of what it does; it is done twice."""
    micro_batch()
    with Products() as products:
        micro_batch()
    seconds = sum(count * product.seconds() for product, count in products.seen.items())
    return Floor(seconds, sum(count * product.operations for product, count in products.seen.items()))
