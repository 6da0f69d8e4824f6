"""The general corpus, mixed of sources by their weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from harness.packing import made_up_blocks

from adept_ds.data.blocks import Blocks
from adept_ds.data.mixture import Mixture, share_out, shares_before


@pytest.mark.parametrize(
    ("count", "weights", "available", "expected"),
    [
        pytest.param(32, [1], [100], [32], id="one source"),
        pytest.param(32, [1], [7], [7], id="less than asked for"),
        pytest.param(32, [2, 1], [100, 100], [21, 11], id="21.33 and 10.67"),
        pytest.param(10, [1, 1, 1], [9, 9, 9], [4, 3, 3], id="a tie goes to the first"),
        pytest.param(8, [100, 1, 1], [50, 50, 50], [6, 1, 1], id="at least one each"),
        pytest.param(12, [1, 1, 1], [2, 50, 50], [2, 5, 5], id="one has too little, the others share the rest"),
        pytest.param(7, [3, 2, 2], [9, 1, 9], [4, 1, 2], id="the rest in proportion"),
        pytest.param(2, [1, 1, 1], [9, 9, 9], [1, 1, 0], id="fewer than sources: the first"),
        pytest.param(2, [1, 2, 90, 3], [9, 9, 9, 9], [0, 0, 1, 1], id="fewer than sources: one each of the heaviest"),
        pytest.param(1, [1, 5], [9, 9], [0, 1], id="only one"),
    ],
)
def test_sequences_are_shared_out_by_weight(
    count: int, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert share_out(count, weights, available) == expected


def fake_blocks(count: int, first: int) -> Blocks:
    return made_up_blocks(np.array([[first + i, 1, 2] for i in range(count)]))


def test_any_stretch_of_a_sample_is_mixed_like_the_whole() -> None:
    """So is a batch, in stage one and stage two: of weights 1, 3 and 2, every six in a row hold 1, 3 and 2, +- 1."""
    mixture = Mixture.of([fake_blocks(n, 100 * i) for i, n in enumerate((40, 90, 60))], (1, 3, 2), ("a", "b", "c"))
    found = mixture.sample(48, seed=0)
    assert [found.sources.count(source) for source in range(3)] == [8, 24, 16]
    for start in range(43):
        window = found.sources[start : start + 6]
        assert all(abs(window.count(source) - share) <= 1 for source, share in enumerate((1, 3, 2)))
    tokens = found.batch(range(48))[0][:, 0].tolist()
    assert [token // 100 for token in tokens] == list(found.sources), "indices point into their own source"
    assert len(set(tokens)) == 48


@pytest.mark.parametrize("count", range(1, 20))
def test_a_sample_has_as_many_sequences_as_were_asked_for(count: int) -> None:
    """Of six sources, also where there is not one for each; none of them twice."""
    mixture = Mixture.of([fake_blocks(5, 0)] * 6, (1, 30, 2, 2, 9, 1), tuple("abcdef"))
    found = mixture.sample(count, seed=0)
    assert len(set(found.indices)) == len(found) == count
    assert len(set(found.sources)) == min(count, 6), "of as many sources as can be"


def test_one_source_is_sampled_as_any_other_corpus() -> None:
    from adept_ds.data.order import block_order

    mixture = Mixture.of([fake_blocks(50, 0)])
    assert list(mixture.sample(12, seed=4).indices) == block_order(50, 4)[:12]


# --- what training draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (2, 1, 1), (0.1, 0.7, 0.2), (100, 1, 3), (1e-3, 1e3), (1, 2, 4, 8, 16)]
)
def test_every_stretch_of_training_is_mixed_by_weight(weights: tuple[float, ...]) -> None:
    """Webster's method, against its definition: the seat that is due first is given first."""
    due = sorted(((k + 0.5) / weight, source) for source, weight in enumerate(weights) for k in range(400))[:400]
    counts = Counter[int]()
    for number, (_, source) in enumerate(due):
        assert shares_before(number, weights) == [counts[s] for s in range(len(weights))]
        counts[source] += 1


def test_shares_far_along_a_run_are_exact() -> None:
    """Ten thousand million sequences: where floating point would have lost single ones."""
    number, weights = 10**10 + 3, (0.3, 0.45, 0.25)
    found = shares_before(number, weights)
    assert sum(found) == number
    assert all(abs(count - number * weight) <= 1 for count, weight in zip(found, weights, strict=True))
    following = shares_before(number + 1, weights)
    assert sum(after - before for before, after in zip(found, following, strict=True)) == 1
    assert all(after >= before for before, after in zip(found, following, strict=True))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_what_training_draws_is_mixed_exactly_and_each_source_goes_through_epochs_of_its_own(size: int) -> None:
    """Cut in batches of any size, the order is the same; an epoch of a source has each block once, in a new order."""
    counts, weights = (5, 9), (1.0, 3.0)
    mixture = Mixture.of([fake_blocks(count, 0) for count in counts], weights, ("a", "b"))
    steps = -(-120 // size)
    order = [index for step in range(steps) for index in sorted(mixture.drawn(step * size, size, seed=2))]
    small = [block for block in order if block < 5]
    assert abs(len(small) - len(order) / 4) <= 1
    whole = [mixture.drawn(number, 1, seed=2)[0] for number in range(steps * size)]
    assert Counter(whole) == Counter(order)
    for first, count in ((0, 5), (5, 9)):
        own = [block - first for block in whole if first <= block < first + count]
        epochs = [own[start : start + count] for start in range(0, len(own) - count + 1, count)]
        assert len(epochs) >= 5
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch in another order"


def test_sources_of_one_size_are_not_gone_through_in_the_same_order() -> None:
    mixture = Mixture.of([fake_blocks(30, 0), fake_blocks(30, 0)], (1, 1), ("a", "b"))
    drawn = mixture.drawn(0, 60, seed=0)
    assert [block for block in drawn if block < 30] != [block - 30 for block in drawn if block >= 30]


def test_held_out_text_of_several_sources_is_taken_from_each_in_proportion() -> None:
    mixture = Mixture.of([fake_blocks(count, 0) for count in (20, 10, 2)], (1, 1, 1), ("a", "b", "c"))
    assert mixture.first(16) == (*range(10), *range(20, 25), 30)
    assert mixture.first(99) == tuple(range(32))
    assert mixture.first(2) == (0, 20), "of the longest two, where there are fewer than sources"
