"""Which blocks come when: pure functions, the same on every rank and at any number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

FILLER = -1
"""Index of a block that counts nothing: it lets every rank make the same number of forward passes."""


_BETWEEN_SOURCES = 1_000_003
"""Sources of the same size shall not be gone through in the same order."""


def endless_order(first: int, last: int, num_blocks: int, seed: int, source: int = 0) -> list[int]:
    """Positions `first` to `last` of the order in which a source is gone through: each epoch another permutation.

    A pure function of its arguments, so a resumed run and a run on another number of ranks see the same data.
    """
    seed += source * _BETWEEN_SOURCES
    found = list[int]()
    while first < last:
        epoch, at = divmod(first, num_blocks)
        count = min(last - first, num_blocks - at)
        found += _permutation(num_blocks, seed + epoch)[at : at + count].tolist()
        first += count
    return found


def block_order(num_blocks: int, seed: int) -> list[int]:
    """A permutation of the blocks that depends on the seed alone."""
    order: list[int] = _permutation(num_blocks, seed).tolist()
    return order


@functools.lru_cache(maxsize=32)
def _permutation(num_blocks: int, seed: int) -> np.ndarray:
    """Kept for the current epochs of all sources, and the next: with many millions of blocks it takes a while."""
    order: np.ndarray = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def rank_batches(indices: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This rank's share of `indices`, in batches of exactly `batch_size`; every rank gets the same number of batches.

    Shares that do not come out even are completed with fillers.
    """
    largest_share = -(-len(indices) // world_size)
    num_batches = -(-largest_share // batch_size)
    mine = [indices[i] for i in share_of_rank(len(indices), rank, world_size)]
    mine += [FILLER] * (num_batches * batch_size - len(mine))
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def share_of_rank(count: int, rank: int, world_size: int) -> range:
    """The contiguous share of `count` items that falls to `rank`; shares differ by at most one item."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
