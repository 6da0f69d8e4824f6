"""Batches of rows of like lengths: every row once, longest first, within a budget of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from adept_ds.evaluation.row_losses import token_batches


@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
def test_every_row_is_in_one_batch_and_batches_hold_their_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 65, 300)
    batches = token_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    longest = [max(lengths[batch]) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, length, following in zip(batches, longest, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * length <= budget
        assert following is None or (len(batch) + 1) * length > budget, "one more would have fitted"


def test_rows_of_one_length_stay_in_their_order() -> None:
    assert token_batches(np.array([5, 7, 5, 5, 7]), 15) == [[1, 4], [0, 2, 3]]


def test_nothing_is_in_no_batch() -> None:
    assert token_batches(np.array([], np.int64), 8) == []
