"""Intervals by resampling the documents of a test, and the seeds of training.

A loss is a ratio: sum of token losses over number of tokens. A bootstrap sample draws as many documents as there are,
with replacement and within each source, and takes both sums over those drawn, so that long documents weigh what they
weigh in the loss (Efron and Tibshirani 1993). All models are taken at the same draw: differences are paired.

Seeds are the outer level: a sample draws seeds with replacement, then documents. Since the documents are the same under
every seed, one draw of them serves all seeds; a draw of its own for each would count every document as a new one and
make the interval too short (Owen 2007, *The pigeonhole bootstrap*). A single seed says nothing of how seeds differ:
its interval is over documents alone. Two or three say little; hence the rule of `verdicts` that every seed must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from adept_ds.comparison.trials import Floats, Ints

SAMPLES, LEVEL, SEED = 10_000, 0.95, 20_251_010

_CHUNK_BYTES = 64 << 20
"""Of counts of documents that are in memory at once."""


class Interval(NamedTuple):
    low: float
    high: float


class Stratum(NamedTuple):
    """Documents that are drawn among themselves: those of a source."""

    tokens: Ints
    """[documents]"""
    sums: Floats
    """Sums of token losses, [models, documents]"""


def resampled_losses(strata: Sequence[Stratum], samples: int = SAMPLES, seed: int = SEED) -> Floats:
    """Losses of all models over documents that are drawn anew, [samples, models]."""
    loss_sums = np.zeros((samples, strata[0].sums.shape[0]))
    token_sums = np.zeros((samples, 1))
    for number, (tokens, sums) in enumerate(strata):
        columns = np.concatenate([sums, tokens[np.newaxis]]).T  # [documents, models + 1]
        for chunk, counts in _document_counts(len(tokens), samples, np.random.default_rng([seed, number])):
            totals = counts @ columns
            loss_sums[chunk] += totals[:, :-1]
            token_sums[chunk] += totals[:, -1:]
    return loss_sums / token_sums


def resampled_mean(by_seed: Floats, seed: int = SEED) -> Floats:
    """Mean over training seeds that are drawn anew, [samples], of values [samples, seeds]."""
    samples, seeds = by_seed.shape
    draws = np.random.default_rng([seed, samples, seeds]).multinomial(seeds, [1 / seeds] * seeds, size=samples)
    return (by_seed * draws).sum(axis=1) / seeds


def interval(values: Floats, level: float = LEVEL) -> Interval:
    """Percentiles of samples that leave the same share out on both sides."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _document_counts(documents: int, samples: int, random: np.random.Generator) -> Iterator[tuple[slice, Floats]]:
    """How often each document is drawn, [samples of the chunk, documents]: multinomial, counted from the draws, since
    numpy's own would draw one binomial after another. Each draw takes one random number, so that the size of chunks
    changes nothing."""
    size = max(1, _CHUNK_BYTES // (8 * documents))
    for start in range(0, samples, size):
        rows = min(size, samples - start)
        drawn = (random.random((rows, documents)) * documents).astype(np.int64)
        flat = (drawn + documents * np.arange(rows)[:, np.newaxis]).ravel()
        counts = np.bincount(flat, minlength=rows * documents).reshape(rows, documents)
        yield slice(start, start + rows), counts.astype(np.float64)
