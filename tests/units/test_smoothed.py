"""Importance smoothed over batches, times how uncertain it is."""

from __future__ import annotations

import pytest
import torch

from adept_ds.units.smoothed import SmoothedImportance


def test_two_batches_by_hand() -> None:
    smoothed = SmoothedImportance(2, (0.5, 0.75))
    smoothed.observe(torch.tensor([4.0, 0.0], dtype=torch.float64))  # means 2, 0; uncertainties 0.25 * 2, 0
    smoothed.observe(torch.tensor([0.0, 8.0], dtype=torch.float64))  # means 1, 4; 0.75 * 0.5 + 0.25 * 1, 0.25 * 4
    assert smoothed.scores == pytest.approx([1 * 0.625, 4 * 1.0])


def test_nothing_seen_is_no_score() -> None:
    assert SmoothedImportance(3, (0.85, 0.85)).scores == [0.0] * 3


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    batches = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, first = SmoothedImportance(5, (0.85, 0.9)), SmoothedImportance(5, (0.85, 0.9))
    for number, batch in enumerate(batches):
        whole.observe(batch)
        if number < 3:
            first.observe(batch)
    second = SmoothedImportance(5, (0.85, 0.9))
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.observe(batch)
    assert second.scores == whole.scores
