"""A term of the loss that keeps the model's outputs on general text where they were (docs/anchors.md).

    loss of a step = mean token loss of the global batch + weight * A

A being the mean over the predicted tokens of the step's anchor sequences, of all ranks, of a divergence from the base
or of what copies write (see `AnchorPasses.anchored`). Its gradient comes from further micro-batches of the same
accumulation. They run without dropout: what is held is the model as it will be used, and dropout of the domain's text
stays the same with and without an anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from adept_ds.data.anchor_text import AnchorText
from adept_ds.data.blocks import Batch
from adept_ds.data.order import FILLER
from adept_ds.models.anchor_passes import AnchorPasses
from adept_ds.models.device import Stopwatch, host_copy
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.engine import Engine
from adept_ds.zero.module_orders import ModuleOrders


class Anchor:
    """The anchor of a training run.

    Args:
        passes: of the engine's model.
        capacity: of how many sequences each rank keeps what the base computes on them, which never changes; of others
            it is computed anew each time.
        flops: operations per token (see `count_anchor_flops`).
    """

    def __init__(
        self,
        engine: Engine,
        passes: AnchorPasses,
        text: AnchorText,
        weight: float,
        ranks: Ranks,
        capacity: int,
        flops: float,
    ) -> None:
        self._engine, self._passes, self._text, self._weight, self._ranks = engine, passes, text, weight, ranks
        self._flops = flops
        self._orders = ModuleOrders(engine)
        self._known = _KnownStates(capacity, ranks)
        self._sums: list[torch.Tensor] = []
        self._watches: list[Stopwatch] = []

    def backward_passes(self, step: int) -> list[Callable[[], None]]:
        """Of a step's anchor micro-batches: each adds to the gradient that the engine accumulates, `weight` times its
        share of A. As many on every rank."""
        # The engine averages over ranks; times world_size, the sum over ranks is left.
        factor = self._weight * self._ranks.world_size / max(1, self._text.predicted_tokens(step))
        return [
            partial(self._backward, of_ranks, factor)
            for of_ranks in self._text.micro_batches(step, self._ranks.world_size)
        ]

    def take(self) -> torch.Tensor:
        """Of the step, this rank's sum over predicted tokens: a float64 scalar on the device."""
        total = torch.stack(self._sums).sum().double()
        self._sums = []
        return total

    def seconds(self) -> float:
        """Of the step. Waits until the device has come so far."""
        seconds = sum(watch.seconds() for watch in self._watches)
        self._watches = []
        return seconds

    def record(self, step: int, total: float) -> dict[str, float]:
        """What joins the record of a step, of `take` of all ranks: A, tokens without padding, and seconds."""
        value = total / max(1, self._text.predicted_tokens(step))
        return {"anchor": value, "anchor_tokens": self._text.num_tokens(step), "anchor_seconds": self.seconds()}

    def operations(self, step: int) -> float:
        return self._flops * self._text.num_tokens(step)

    def _backward(self, of_ranks: Sequence[Sequence[int]], factor: float) -> None:
        """One micro-batch; `of_ranks`: of each rank its blocks."""
        watch, mine = Stopwatch(), list(of_ranks[self._ranks.rank])
        with _without_dropout(self._engine.module):
            known = self._known.of(of_ranks, self._base_states, self._engine.device)
            with self._orders.of("anchored"), self._passes.anchored(known):
                sums = self._engine(*self._batch(mine))
                self._engine.backward(sums.sum() * factor, scale_wrt_gas=False)
        self._sums.append(sums.detach().sum())
        watch.stop()
        self._watches.append(watch)

    def _base_states(self, block: int) -> torch.Tensor:
        """What the base computes on one block, on the device; every rank has to ask for one. [states, tokens, dim]

        A block at a time: what is known of it shall not depend, not by a bit, on which others a step brought along.
        """
        with torch.no_grad(), self._orders.of("base"), self._passes.of_base():
            found: torch.Tensor = self._engine(*self._batch([block]))
        return found[0]

    def _batch(self, blocks: list[int]) -> Batch:
        """On the device, which the host does not wait for."""
        return self._text.batch(blocks).pinned(self._engine.device).to(self._engine.device)


class _KnownStates:
    """What the base computes on blocks, as far as it fits on the host.

    A rank keeps what comes to it first. Which blocks come to which rank is known to all, so each knows what the others
    keep, and all make the same passes without asking each other.

    Args:
        capacity: how many blocks each rank keeps.
    """

    def __init__(self, capacity: int, ranks: Ranks) -> None:
        self._capacity, self._rank = capacity, ranks.rank
        self._kept_by: list[dict[int, torch.Tensor | None]] = [{} for _ in range(ranks.world_size)]
        """Of each rank, what it keeps by block; of the others, that they do."""

    def of(
        self, of_ranks: Sequence[Sequence[int]], compute: Callable[[int], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Of this rank's blocks, on `device`. [rows, states, tokens, dim]

        Args:
            of_ranks: of each rank the blocks that it asks for now.
            compute: for one block, on `device`; all ranks call it together.
        """
        missing = [
            [block for block in dict.fromkeys(blocks) if block not in kept]
            for blocks, kept in zip(of_ranks, self._kept_by, strict=True)
        ]
        mine, kept = missing[self._rank], self._kept_by[self._rank]
        passes = range(max(map(len, missing)))
        computed = [compute(mine[number] if number < len(mine) else FILLER) for number in passes]
        found = dict(zip(mine, computed, strict=False))
        for new, of_rank in zip(missing, self._kept_by, strict=True):
            for block in new[: self._capacity - len(of_rank)]:
                of_rank[block] = host_copy(found[block]) if of_rank is kept else None
        rows = []
        for block in of_ranks[self._rank]:
            states = found.get(block, kept.get(block))
            assert states is not None
            rows.append(states.to(device, non_blocking=True))
        return torch.stack(rows)


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
