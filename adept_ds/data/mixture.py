"""A corpus that is mixed of weighted sources: what training draws of it, and what is sampled for an estimate.

Training draws source s in every n sequences as often as its weight says, to the nearest whole number (see
`shares_before`), and each source's blocks epoch after epoch in a new order.

A sample is shared out among the sources in proportion to their weights, and the sources alternate in it, so that any
batch of consecutive sequences is mixed alike. What is estimated on it is

    loss = sum_s w_s * (sum of token losses / tokens of source s) / sum_s w_s
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from adept_ds.data.blocks import Batch, Blocks
from adept_ds.data.order import FILLER, block_order, endless_order


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

    def batch(self, positions: Sequence[int]) -> Batch:
        """The sequences at these positions of the sample, one a row; a position may be FILLER."""
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
        return cls(Blocks.joined(parts), tuple(map(len, parts)), tuple(weights), tuple(names))

    def drawn(self, first: int, count: int, seed: int) -> list[int]:
        """Sequences `first` to `first + count` of the endless order in which training goes through the corpus.

        A pure function of its arguments, so a resumed run and a run on another number of ranks see the same data.
        """
        before, after = (shares_before(number, self.weights) for number in (first, first + count))
        starts = itertools.accumulate(self.counts[:-1], initial=0)
        return [
            start + index
            for source, (start, size) in enumerate(zip(starts, self.counts, strict=True))
            for index in endless_order(before[source], after[source], size, seed, source)
        ]

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.blocks.batch(indices)

    def num_tokens(self, indices: Sequence[int]) -> int:
        return self.blocks.num_tokens(indices)

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        return self.blocks.predicted_tokens(indices)

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

    def first(self, count: int) -> tuple[int, ...]:
        """The first blocks of every source, `count` in all, in proportion to their numbers; all if there are fewer."""
        shares = share_out(count, self.counts, self.counts)
        starts = itertools.accumulate(self.counts[:-1], initial=0)
        return tuple(start + block for start, share in zip(starts, shares, strict=True) for block in range(share))


def shares_before(number: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `number` sequences come from each source: their apportionment by Webster's method.

    A source of weight w gets its next sequence at time (k + 1/2) / w when it has had k, and the earliest time is served
    first (ties: the first source). So no count ever falls, and no source is ahead of its share by a whole sequence
    against another. Computed exactly, whatever the number.
    """
    exact = [Fraction(weight) for weight in weights]
    # At this time they have had `number` together at most, and less than one each is missing.
    time = max(Fraction(0), (number - Fraction(len(exact), 2)) / sum(exact))
    counts = [int(weight * time + Fraction(1, 2)) for weight in exact]
    while sum(counts) < number:
        counts[min(range(len(exact)), key=lambda source: (counts[source] + Fraction(1, 2)) / exact[source])] += 1
    return counts


def share_out(count: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """`count` sequences among sources, in proportion to their weights (largest remainder; ties to the first).

    Every source gets at least one and at most what it has; the others share the difference in the same proportion.
    Where there is not one for each, those of the largest weights get one.
    """
    count = min(count, sum(available))
    if count < len(weights):
        heaviest = sorted(range(len(weights)), key=lambda source: -weights[source])[:count]
        return [int(source in heaviest) for source in range(len(weights))]
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
