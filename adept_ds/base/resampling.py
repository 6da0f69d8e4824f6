"""Losses over documents that are drawn anew: a bootstrap that pairs models.

A loss is a ratio: sum of token losses over number of tokens. A sample draws as many documents as there are, with
replacement and within each source, and takes both sums over those drawn, so that long documents weigh what they weigh
in the loss (Efron and Tibshirani 1993). All models are taken at the same draw: differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLES, SEED = 10_000, 20_251_010

_CHUNK_BYTES = 64 << 20
"""Of counts of documents that are in memory at once."""


class Stratum(NamedTuple):
    """Documents that are drawn among themselves: those of a source."""

    tokens: NDArray[np.int64]
    """[documents]"""
    sums: NDArray[np.float64]
    """Sums of token losses, [models, documents]"""


def resampled_losses(strata: Sequence[Stratum], samples: int = SAMPLES, seed: int = SEED) -> NDArray[np.float64]:
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


def _document_counts(
    documents: int, samples: int, random: np.random.Generator
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
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
