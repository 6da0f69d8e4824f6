"""Intervals by resampling the documents of a test, and the seeds of training.

How documents are drawn, so that models are paired: `base.resampling`.

Seeds are the outer level: a sample draws seeds with replacement, then documents. Since the documents are the same under
every seed, one draw of them serves all seeds; a draw of its own for each would count every document as a new one and
make the interval too short (Owen 2007, *The pigeonhole bootstrap*). A single seed says nothing of how seeds differ:
its interval is over documents alone. Two or three say little; hence the rule of `verdicts` that every seed must agree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adept_ds.base.resampling import SEED
from adept_ds.comparison.trials import Floats

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


def resampled_mean(by_seed: Floats, seed: int = SEED) -> Floats:
    """Mean over training seeds that are drawn anew, [samples], of values [samples, seeds]."""
    samples, seeds = by_seed.shape
    draws = np.random.default_rng([seed, samples, seeds]).multinomial(seeds, [1 / seeds] * seeds, size=samples)
    return (by_seed * draws).sum(axis=1) / seeds


def interval(values: Floats, level: float = LEVEL) -> Interval:
    """Percentiles of samples that leave the same share out on both sides."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
