"""Intervals: what a plain loop over draws finds, and as often right as they say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from adept_ds.base import resampling
from adept_ds.base.resampling import Stratum, resampled_losses
from adept_ds.comparison.bootstrap import interval, resampled_mean

Array = NDArray[np.float64]


def strata(seed: int, sizes: tuple[int, ...] = (9, 5), models: int = 4) -> list[Stratum]:
    noise = np.random.default_rng(seed)
    found = []
    for size in sizes:
        tokens = noise.integers(1, 40, size)
        found.append(Stratum(tokens, noise.normal(2, 0.5, (models, size)) * tokens))
    return found


def naive_differences(parts: list[Stratum], first: list[int], second: list[int], samples: int) -> list[float]:
    """Draw seeds, then documents; token-weighted losses of both methods over the same draws. Nothing vectorised."""
    draw = random.Random(4)
    found = []
    for _ in range(samples):
        documents = [draw.choices(range(len(part.tokens)), k=len(part.tokens)) for part in parts]
        total = sum(int(part.tokens[i]) for part, drawn in zip(parts, documents, strict=True) for i in drawn)
        seeds = draw.choices(range(len(first)), k=len(first))
        gap = 0.0
        for seed in seeds:
            for part, drawn in zip(parts, documents, strict=True):
                gap += sum(float(part.sums[first[seed], i] - part.sums[second[seed], i]) for i in drawn) / total
        found.append(gap / len(seeds))
    return sorted(found)


def test_an_interval_is_that_of_a_plain_loop() -> None:
    """Both are of 10,000 random draws: percentiles then differ by a few hundredths of the spread."""
    parts, first, second = strata(0), [0, 1], [2, 3]
    losses = resampled_losses(parts)
    ours = resampled_mean(losses[:, first] - losses[:, second])
    naive = naive_differences(parts, first, second, 10_000)
    spread = float(np.std(naive))
    assert np.std(ours) == pytest.approx(spread, rel=0.03)
    assert interval(ours) == pytest.approx((naive[250], naive[9750]), abs=0.1 * spread)


def test_two_models_are_compared_on_the_same_draws() -> None:
    """A model that is 0.1 nats worse on every token is so in every sample."""
    tokens, sums = strata(1, models=1)[0]
    losses = resampled_losses([Stratum(tokens, np.concatenate([sums, sums + 0.1 * tokens]))], samples=500)
    assert losses[:, 1] - losses[:, 0] == pytest.approx(0.1)


def test_draws_do_not_depend_on_how_much_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = strata(2)
    whole = resampled_losses(parts, samples=300)
    monkeypatch.setattr(resampling, "_CHUNK_BYTES", 8 * 9 * 7)
    assert resampled_losses(parts, samples=300) == pytest.approx(whole, rel=1e-12)  # matrix products round


def test_each_source_keeps_its_number_of_documents() -> None:
    """A source of documents that are all alike then has the same share in every sample."""
    same = Stratum(np.full(6, 10), np.full((1, 6), 10.0))
    other = Stratum(np.full(4, 10), np.full((1, 4), 30.0))
    assert resampled_losses([same, other], samples=200) == pytest.approx(18 / 10)


@pytest.mark.parametrize("seeds", [1, 4])
def test_95_of_100_intervals_hold_the_true_difference(seeds: int) -> None:
    """Studies whose difference is known, each of 60 documents; luck of seeds and taste of documents vary.

    Of 400 studies 380 are expected; binomial noise is 4.4, and few documents or few seeds make a bootstrap a little too
    sure of itself: with 4 seeds the factor is about sqrt(3/4) on their part.
    """
    truth, held = 0.05, 0
    for study in range(400):
        held += low_and_high_of(np.random.default_rng(study), truth, seeds)
    assert 0.91 * 400 <= held <= 0.98 * 400


def low_and_high_of(noise: np.random.Generator, truth: float, seeds: int) -> bool:
    tokens = noise.integers(10, 90, 60)
    common, taste = noise.normal(2, 0.6, 60), noise.normal(0, 0.1, 60)
    luck = noise.normal(0, 0.004, (seeds, 1)) if seeds > 1 else np.zeros((1, 1))
    first = common + noise.normal(0, 0.03, (seeds, 60))
    second = common + truth + taste + luck + noise.normal(0, 0.03, (seeds, 60))
    losses = resampled_losses([Stratum(tokens, np.concatenate([first, second]) * tokens)], samples=800)
    low, high = interval(resampled_mean(losses[:, seeds:] - losses[:, :seeds]))
    return low <= truth <= high


def test_seeds_that_disagree_widen_an_interval() -> None:
    tokens = np.full(50, 20)
    sums = np.array([[2.0], [2.0], [1.9], [2.1]]) * tokens
    losses = resampled_losses([Stratum(tokens, sums)], samples=2000)
    same = interval(resampled_mean(losses[:, :2] - losses[:, :2]))
    differing = interval(resampled_mean(losses[:, 2:] - losses[:, :2]))
    assert same == (0, 0)
    assert differing == pytest.approx((-0.1, 0.1))
