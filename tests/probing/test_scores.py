"""Deltas, their standard errors and halves, from what a probe has found out by sequence or by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adept_ds.base.errors import InputError
from adept_ds.probing.scores import LayerScores


def made_up(method: str, counts: Sequence[int], weights: Sequence[float], seed: int = 0) -> LayerScores:
    """Sequences of unequal length whose scores scatter about three layers' means, differently in each source."""
    generator = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(counts)), counts)
    tokens = generator.integers(20, 40, len(sources)).astype(float)
    means = np.array([0.1, 0.5, 2.0]) + 0.3 * sources[:, None]
    noise = generator.normal(size=(len(sources), 3)) * np.array([0.2, 0.05, 1.0])
    table = tokens[:, None] * (means + noise)
    by_sequence = method in ("mask", "taylor")
    return LayerScores(method, by_sequence, 1.0, tokens * 3, tokens, sources, np.array(weights), table)


def test_bootstrap_errors_are_those_of_a_stratified_ratio_estimator() -> None:
    """Analytic: var = sum_s (w_s / W)^2 N / (N - 1) sum_n (d_n - delta_s t_n)^2 / T_s^2 (Cochran, chapter 6).

    The spread of 1000 replicates is itself uncertain by 1 / sqrt(2000) = 2.2 %; four times that is allowed for. With
    N = 9 in one source, drawing N instead of N - 1 would be off by 6 %, and more where both sources are small.
    """
    scores = made_up("mask", (9, 30), (2.0, 1.0))
    variance = np.zeros(3)
    for source, weight in enumerate(scores.weights):
        rows = scores.sources == source
        values, tokens = scores.scores[rows], scores.tokens[rows]
        residuals = values - values.sum(0) / tokens.sum() * tokens[:, None]
        count = len(tokens)
        variance += (weight / 3) ** 2 * count / (count - 1) * (residuals**2).sum(0) / tokens.sum() ** 2
    replicates = scores.replicates(0)
    assert replicates is not None and replicates.shape == (1000, 3)
    np.testing.assert_allclose(replicates.std(axis=0, ddof=1), np.sqrt(variance), rtol=0.09)
    # centred on the deltas: the mean of 1000 replicates is uncertain by a thirtieth of their spread
    assert (np.abs(replicates.mean(0) - scores.deltas) < 4 / 30 * np.sqrt(variance)).all()


def test_bootstrap_errors_of_gradient_scores_are_those_of_a_mean_over_batches() -> None:
    """s / sqrt(N), by definition; the tolerance as above. Four batches: N - 1 of N matters by 15 %."""
    scores = dataclasses.replace(made_up("fisher", (32,), (1.0,)), scores=made_up("fisher", (4,), (1.0,)).scores)
    replicates = scores.replicates(0)
    assert replicates is not None
    analytic = scores.scores.std(axis=0, ddof=1) / np.sqrt(4)
    np.testing.assert_allclose(replicates.std(axis=0, ddof=1), analytic, rtol=0.09)
    assert scores.deltas == pytest.approx(scores.scores.mean(0))


def test_where_nothing_can_be_drawn_there_is_no_error() -> None:
    assert made_up("mask", (5, 1), (1.0, 1.0)).replicates(0) is None
    one_batch = dataclasses.replace(made_up("gradient", (8,), (1.0,)), scores=np.ones((1, 3)))
    assert one_batch.replicates(0) is None
    assert one_batch.halves() is None
    assert one_batch.deltas == [1, 1, 1]


def test_kept_scores_give_bit_identical_replicates(tmp_path: Path) -> None:
    """Also from arrays that are views of others, which safetensors would write as they lie in memory."""
    scores = made_up("mask", (9, 30), (2.0, 1.0))
    table = np.concatenate([scores.losses[:, None], scores.scores], axis=1)
    strided = dataclasses.replace(scores, losses=table[:, 0], scores=table[:, 1:])
    strided.save(tmp_path / "layer_scores.safetensors")
    loaded = LayerScores.load(tmp_path / "layer_scores.safetensors")
    assert (loaded.method, loaded.seconds, loaded.deltas) == (scores.method, scores.seconds, scores.deltas)
    assert loaded.base_loss == scores.base_loss == pytest.approx(3)
    assert loaded.by_sequence
    first, second, other = (kept.replicates(seed) for kept, seed in ((scores, 5), (loaded, 5), (loaded, 6)))
    assert first is not None and second is not None and other is not None
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_halves_take_every_other_sequence_of_each_source() -> None:
    scores = made_up("mask", (5, 2), (1.0, 3.0))
    by_hand = []
    for rows in ([0, 2, 4, 5], [1, 3, 6]):
        parts = []
        for source in (0, 1):
            mine = [row for row in rows if scores.sources[row] == source]
            parts.append(scores.scores[mine].sum(0) / scores.tokens[mine].sum())
        by_hand.append((parts[0] + 3 * parts[1]) / 4)
    halves = scores.halves()
    assert halves is not None
    np.testing.assert_allclose(halves, by_hand, rtol=1e-12)


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "layer_scores.safetensors"
    made_up("mask", (5,), (1.0,)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"", b"{}", whole.replace(b"by_sequence", b"by_saquence")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"layer_scores\.safetensors' is damaged .*probed again"):
            LayerScores.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"losses": np.ones((5, 1))},
        {"losses": np.array([1.0, np.nan, 1.0, 1.0, 1.0])},
        {"tokens": np.zeros(5)},
        {"tokens": np.ones(4)},
        {"sources": np.zeros(5)},
        {"sources": np.full(5, 3)},
        {"weights": np.array([-1.0])},
        {"scores": np.zeros((4, 6))},
        {"scores": np.zeros(5)},
        {"scores": np.zeros((5, 6), dtype=np.int64)},
    ],
    ids=lambda change: "-".join(f"{name}-{array.dtype}{array.shape}" for name, array in change.items()),
)
def test_arrays_that_do_not_fit_each_other_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "layer_scores.safetensors"
    dataclasses.replace(made_up("mask", (5,), (1.0,)), **change).save(path)
    with pytest.raises(InputError, match=r"layer_scores\.safetensors' is damaged .*probed again"):
        LayerScores.load(path)
