"""How far two choices of layers agree."""

from __future__ import annotations

import pytest

from adept_ds.probing.stability import agreement_between, rank_correlations


def test_agreement_by_hand() -> None:
    """Of six pairs of four layers, five are in the same order: tau = (5 - 1) / 6. One of three layers is shared."""
    found = agreement_between("corpus", "x", ([3, 1], [0, 3]), ([1, 2, 3, 4], [1, 3, 2, 4]))
    assert found.selected == ((1, 3), (0, 3))
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.kendall_tau == pytest.approx(4 / 6)
    assert "Jaccard 0.33, Kendall tau of the deltas 0.67" in found.sentence()
    assert agreement_between("halves", "", ([0], [0]), ([1, 1], [1, 2])).kendall_tau is None, "JSON has no NaN"
    assert rank_correlations({"mask": {"deltas": [1, 2, 3]}, "taylor": {"deltas": [9, 5, 1]}}) == {"taylor": -1}
