"""The text that training is anchored to, and which sequences of it belong to which step."""

from __future__ import annotations

from dataclasses import dataclass

from adept_ds.data.blocks import Batch, Blocks
from adept_ds.data.order import endless_order, rank_batches


@dataclass(frozen=True)
class AnchorText:
    """A fixed sample of general text that is gone through again and again, each time in another order.

    Which sequences belong to a step is a function of the step alone: it depends on neither the number of ranks nor the
    micro-batch, and a resumed run sees the same ones.
    """

    blocks: Blocks
    indices: tuple[int, ...]
    """Of the blocks that it consists of."""
    per_step: int
    """Sequences of a step, over all ranks."""
    rows: int
    """Sequences of a rank's forward pass, what counts nothing included."""
    seed: int
    """Of the order."""

    def of_step(self, step: int) -> list[int]:
        """Blocks of optimizer step `step` (from 0)."""
        first = step * self.per_step
        return [self.indices[i] for i in endless_order(first, first + self.per_step, len(self.indices), self.seed)]

    def micro_batches(self, step: int, world_size: int) -> list[list[list[int]]]:
        """Of each micro-batch of a step, by rank, its blocks: as many for every rank, some of them FILLER."""
        of_step = self.of_step(step)
        by_rank = [rank_batches(of_step, rank, world_size, self.rows) for rank in range(world_size)]
        return [list(of_ranks) for of_ranks in zip(*by_rank, strict=True)]

    def batch(self, blocks: list[int]) -> Batch:
        return self.blocks.batch(blocks)

    def num_tokens(self, step: int) -> int:
        """Of a step, without padding."""
        return self.blocks.num_tokens(self.of_step(step))

    def predicted_tokens(self, step: int) -> int:
        return self.blocks.predicted_tokens(self.of_step(step))
