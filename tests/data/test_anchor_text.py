"""Which anchor sequences belong to a step is a function of the step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from adept_ds.data.anchor_text import AnchorText
from adept_ds.data.blocks import Blocks
from adept_ds.data.order import FILLER

INDICES = (8, 3, 5, 0, 9, 2, 7)


def text(per_step: int, rows: int, seed: int = 0) -> AnchorText:
    blocks = Blocks.of_rows(np.arange(50, dtype=np.int32).reshape(10, 5))
    return AnchorText(blocks, INDICES, per_step, rows, seed)


def test_every_sequence_comes_up_as_often_as_any_other_and_in_another_order_each_time() -> None:
    steps = [block for step in range(7) for block in text(3, 1).of_step(step)]
    assert Counter(steps) == dict.fromkeys(INDICES, 3)
    assert len({tuple(steps[first : first + 7]) for first in (0, 7, 14)}) == 3
    assert [block for step in range(7) for block in text(3, 1, seed=1).of_step(step)] != steps


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_ranks_share_a_step_and_make_equally_many_passes(world_size: int, rows: int) -> None:
    for step in range(4):
        micro_batches = text(3, rows).micro_batches(step, world_size)
        dealt = [block for of_ranks in micro_batches for blocks in of_ranks for block in blocks if block != FILLER]
        assert sorted(dealt) == sorted(text(3, 1).of_step(step))
        assert {len(of_ranks) for of_ranks in micro_batches} == {world_size}
        assert {len(blocks) for of_ranks in micro_batches for blocks in of_ranks} == {rows}


def test_tokens_of_a_step_are_those_of_its_sequences() -> None:
    assert text(3, 2).num_tokens(0) == 15
    assert text(3, 2).predicted_tokens(0) == 12
    (batch,) = [text(3, 3).batch(blocks) for (blocks,) in text(3, 3).micro_batches(0, 1)]
    assert batch.input_ids[:, 0].tolist() == [5 * block for block in text(3, 3).of_step(0)]
