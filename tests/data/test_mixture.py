"""The general corpus, mixed of sources by their weights."""

from __future__ import annotations

from typing import Any

import pytest

from adept_ds.data.mixture import Mixture, share_out


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
    ],
)
def test_sequences_are_shared_out_by_weight(
    count: int, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert share_out(count, weights, available) == expected


def fake_blocks(count: int, first: int) -> Any:
    from datasets import Dataset

    from adept_ds.data.blocks import Blocks

    return Blocks(Dataset.from_dict({"input_ids": [[first + i, 1, 2] for i in range(count)]}), 3)


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


def test_one_source_is_sampled_as_any_other_corpus() -> None:
    from adept_ds.data.order import block_order

    mixture = Mixture.of([fake_blocks(50, 0)])
    assert list(mixture.sample(12, seed=4).indices) == block_order(50, 4)[:12]
