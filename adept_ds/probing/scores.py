"""What a probe found out about layers, kept by sequence: deltas, their spread and any choice follow without a pass.

By sequence (`mask`, `taylor`) a delta is a ratio, summed nats over tokens, mixed over sources s by their weights:

    delta_i = sum_s w_s * (sum_n d_ni / sum_n t_n) / sum_s w_s        n: sequences of source s

By batch (`gradient`, `fisher`) it is the mean over batches of b_ni. The bootstrap draws sequences of each source (or
batches) with replacement, N - 1 of N (Rao and Wu, JASA 1988), which makes variances unbiased; with all N they would be
too small by a factor of (N - 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_bytes

REPLICATES = 1000


@dataclass(frozen=True)
class LayerScores:
    """Float64 arrays, the same on every rank and at any number of ranks (to rounding of the forward pass)."""

    method: str
    by_sequence: bool
    """Whether a row of `scores` is a sequence, or a global batch (see `estimators.Estimator`)."""
    seconds: float
    """That the passes took."""
    losses: np.ndarray
    """[sequences] summed token loss of the unchanged model, nats."""
    tokens: np.ndarray
    """[sequences] predicted tokens."""
    sources: np.ndarray
    """[sequences] int64: the source that each is from."""
    weights: np.ndarray
    """[sources]"""
    scores: np.ndarray
    """[sequences, layers], what bypassing a layer adds to a sequence's summed loss, nats; or [batches, layers], the
    score on each global batch."""

    @property
    def base_loss(self) -> float:
        """Mean token loss of the unchanged model."""
        return float(self._mixed(self.losses[:, None], np.ones((1, len(self.losses))))[0, 0])

    @property
    def deltas(self) -> list[float]:
        return self.estimate(np.ones((1, len(self.scores))))[0].tolist()

    def estimate(self, times: np.ndarray) -> np.ndarray:
        """[R, layers]: the deltas if row n of `scores` counted `times[r, n]` times."""
        if self.by_sequence:
            return self._mixed(self.scores, times)
        return _products(times, self.scores) / times.sum(1, keepdims=True)

    def replicates(self, seed: int) -> np.ndarray | None:
        """[REPLICATES, layers] deltas of bootstrap samples; None where a source (or all) has one row only."""
        generator = np.random.default_rng(seed)
        times = np.zeros((REPLICATES, len(self.scores)))
        for rows in self._strata():
            if len(rows) < 2:
                return None
            times[:, rows] = generator.multinomial(len(rows) - 1, np.full(len(rows), 1 / len(rows)), REPLICATES)
        return self.estimate(times)

    def halves(self) -> np.ndarray | None:
        """[2, layers] deltas on every other row of each source, and on the rest; None as for `replicates`."""
        times = np.zeros((2, len(self.scores)))
        for rows in self._strata():
            if len(rows) < 2:
                return None
            times[0, rows[::2]] = times[1, rows[1::2]] = 1
        return self.estimate(times)

    def save(self, path: Path) -> None:
        # safetensors writes the memory of a strided array as it lies there, without a word.
        arrays = {
            field.name: np.ascontiguousarray(getattr(self, field.name))
            for field in fields(self)
            if field.name not in _METADATA
        }
        facts = {"method": self.method, "by_sequence": str(self.by_sequence), "seconds": repr(self.seconds)}
        write_bytes(path, save(arrays, facts))

    @classmethod
    def load(cls, path: Path) -> LayerScores:
        """Raises `InputError` if it is no such file."""
        try:
            with safe_open(path, framework="numpy") as file:
                arrays, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            by_sequence = facts["by_sequence"] == "True"
            found = cls(method=facts["method"], by_sequence=by_sequence, seconds=float(facts["seconds"]), **arrays)
            found._check()
            return found
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' is damaged ({error}); move it away, and layers are probed again") from None

    def _check(self) -> None:
        """Raises `ValueError`: arrays are not what a probe writes, or do not fit each other."""
        sequences, sources = len(self.losses), len(self.weights)
        shapes = {"losses": (sequences,), "tokens": (sequences,), "sources": (sequences,), "weights": (sources,)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            wanted = np.int64 if name == "sources" else np.float64
            if array.shape != shape or array.dtype != wanted or not np.isfinite(array).all():
                raise ValueError(f"{name}: {array.dtype}{array.shape}, or a number that is not finite")
        rows = self.scores.shape[0] if self.scores.ndim == 2 else 0
        if self.scores.dtype != np.float64 or not rows or (self.by_sequence and rows != sequences):
            raise ValueError(f"scores: {self.scores.dtype}{self.scores.shape}")
        if (self.weights <= 0).any() or {*self.sources.tolist()} != {*range(sources)}:
            raise ValueError("sources: not those that have weights")
        if any(self.tokens[self.sources == source].sum() <= 0 for source in range(sources)):
            raise ValueError("tokens: none of a source")

    def _strata(self) -> list[np.ndarray]:
        """Rows of `scores` that may stand for each other."""
        if not self.by_sequence:
            return [np.arange(len(self.scores))]
        return [np.flatnonzero(self.sources == source) for source in range(len(self.weights))]

    def _mixed(self, values: np.ndarray, times: np.ndarray) -> np.ndarray:
        """[sequences, columns] sums -> [R, columns] mean per token, sources mixed by their weights."""
        total = np.zeros((len(times), values.shape[1]))
        for source, weight in enumerate(self.weights):
            rows = self.sources == source
            tokens = times[:, rows] @ self.tokens[rows]  # whole numbers: exact in any order
            total += weight * _products(times[:, rows], values[rows]) / tokens[:, None]
        return total / self.weights.sum()


_METADATA = ("method", "by_sequence", "seconds")


def _products(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """times @ values, summed in the same order however many threads there are: choices must not depend on that."""
    return np.einsum("rn,nl->rl", times, values)
