"""Which blocks come when, and how they fall on ranks."""

from __future__ import annotations

import math

import pytest

from adept_ds.data.order import FILLER, endless_order, rank_batches


@pytest.mark.parametrize(("size", "num_blocks"), [(4, 10), (5, 10), (12, 12), (7, 5), (25, 4)])
def test_every_epoch_is_a_permutation_of_all_blocks(size: int, num_blocks: int) -> None:
    steps = 3 * num_blocks  # whole epochs, wherever the batches cut them
    starts = range(0, steps * size, size)
    order = [index for start in starts for index in endless_order(start, start + size, num_blocks, seed=3)]
    assert len(order) == steps * size
    epochs = [order[start : start + num_blocks] for start in range(0, len(order), num_blocks)]
    assert all(sorted(epoch) == list(range(num_blocks)) for epoch in epochs)


def test_epochs_and_seeds_have_different_orders_and_the_same_seed_the_same() -> None:
    first = endless_order(0, 30, 30, seed=0)
    assert first == endless_order(0, 30, 30, seed=0)
    assert first != endless_order(30, 60, 30, seed=0)
    assert first != endless_order(0, 30, 30, seed=7)
    assert first != endless_order(0, 30, 30, seed=0, source=1)
    assert first != list(range(30))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_rank_makes_the_same_number_of_passes_and_each_block_is_seen_once(
    world_size: int, count: int, batch_size: int
) -> None:
    indices = list(range(100, 100 + count))
    ranks = [rank_batches(indices, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    seen = [index for batches in ranks for batch in batches for index in batch if index != FILLER]
    assert sorted(seen) == indices
    # No pass more than the fullest rank needs.
    assert len(ranks[0]) == math.ceil(math.ceil(count / world_size) / batch_size)
