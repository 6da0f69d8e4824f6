"""The general-competence corpus, mixed of sources, and what is sampled of it.

    loss = sum_s w_s * (sum of token losses / tokens of source s) / sum_s w_s

A sample is shared out among the sources in proportion to their weights, and the sources alternate in it, so that any
batch of consecutive sequences is mixed alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets

from adept_ds.data.blocks import Blocks
from adept_ds.data.order import FILLER, block_order


@dataclass(frozen=True)
class Sample:
    """Sequences on which something is estimated."""

    blocks: Blocks
    indices: tuple[int, ...]
    """Of `blocks`."""
    sources: tuple[int, ...]
    """Of each sequence, its source."""
    weights: tuple[float, ...]
    """Of each source."""
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, both [len(positions), seq_len]; a position may be FILLER."""
        return self.blocks.batch([FILLER if p == FILLER else self.indices[p] for p in positions])

    def tokens(self) -> list[int]:
        """Predicted tokens of each sequence."""
        return [self.blocks.predicted_tokens([index]) for index in self.indices]

    def facts(self) -> list[dict[str, Any]]:
        """Of each source, for result files."""
        tokens, facts = self.tokens(), []
        for source, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            counts = [count for count, of in zip(tokens, self.sources, strict=True) if of == source]
            facts.append({"name": name, "weight": weight, "sequences": len(counts), "tokens": sum(counts)})
        return facts


@dataclass(frozen=True)
class Mixture:
    """Packed blocks of all sources, one source behind the other."""

    blocks: Blocks
    counts: tuple[int, ...]
    """Blocks of each source."""
    weights: tuple[float, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, parts: Sequence[Blocks], weights: Sequence[float] = (1.0,), names: Sequence[str] = ("",)) -> Mixture:
        """Blocks stay memory-mapped: nothing is copied."""
        blocks = parts[0]
        if len(parts) > 1:
            blocks = Blocks(concatenate_datasets([part.dataset for part in parts]), blocks.seq_len)
        return cls(blocks, tuple(map(len, parts)), tuple(weights), tuple(names))

    def sample(self, count: int, seed: int) -> Sample:
        """The first blocks of every source in a seeded order, `count` in all; all blocks if there are fewer."""
        shares = share_out(count, self.weights, self.counts)
        starts = itertools.accumulate(self.counts[:-1], initial=0)
        chosen = [
            # The n-th of a source's sequences stands at that share of the whole.
            ((number + 0.5) / share, source, start + index)
            for source, (start, size, share) in enumerate(zip(starts, self.counts, shares, strict=True))
            for number, index in enumerate(block_order(size, seed)[:share])
        ]
        chosen.sort(key=lambda item: item[:2])
        return Sample(
            self.blocks,
            tuple(index for _, _, index in chosen),
            tuple(source for _, source, _ in chosen),
            self.weights,
            self.names,
        )


def share_out(count: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """`count` sequences among sources, in proportion to their weights (largest remainder; ties to the first).

    Every source gets at least one and at most what it has; the others share the difference in the same proportion.
    """
    count = min(count, sum(available))
    low, high = 0.0, count / min(weights)
    for _ in range(100):  # halves the interval: far below the rounding of a float
        factor = (low + high) / 2
        quotas = np.clip(np.multiply(factor, weights), 1, available)
        low, high = (factor, high) if quotas.sum() < count else (low, factor)
    quotas = np.clip(np.multiply(high, weights), 1, available)
    shares = np.floor(quotas + 1e-9).astype(int)
    for source in np.argsort(shares - quotas, kind="stable")[: count - shares.sum()]:
        shares[source] += 1
    return [int(share) for share in shares]
