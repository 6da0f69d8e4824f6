"""Tokens are drawn as often as the distribution says."""

from __future__ import annotations

import torch

from adept_ds.training.sampled_text import chances, draw


def test_a_token_is_drawn_where_its_share_of_the_mass_lies() -> None:
    logits = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log()  # the second is never drawn, at no boundary either
    chance = torch.tensor([0.0, 0.099, 0.101, 0.5, 0.699, 0.701, 0.9999999999], dtype=torch.float64)
    assert draw(logits.expand(7, -1), chance).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_rows_are_drawn_for_themselves() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    chance = torch.rand(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = [int(draw(logits[row : row + 1], chance[row : row + 1])) for row in range(3)]
    assert draw(logits, chance).tolist() == alone


def test_shares_of_many_draws_are_the_probabilities() -> None:
    """20,000 draws: a share of p has a standard error of at most 0.0036."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(2))
    many = torch.cat([chances(sequence, 1000, 0) for sequence in range(20)])
    drawn = draw(logits.expand(len(many), -1), many).bincount(minlength=5) / len(many)
    assert float((drawn - logits.softmax(-1)).abs().max()) < 0.015


def test_sequences_and_seeds_have_chances_of_their_own() -> None:
    assert torch.equal(chances(3, 8, 0), chances(3, 8, 0))
    found = [chances(sequence, 8, seed) for sequence in range(3) for seed in range(3)]
    assert len({tuple(each.tolist()) for each in found}) == 9
