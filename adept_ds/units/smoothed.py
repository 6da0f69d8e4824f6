"""Importance smoothed over batches, times its uncertainty (PLATON: Zhang et al., ICML 2022, arXiv 2206.12562)."""

from __future__ import annotations

from typing import Any

import torch


class SmoothedImportance:
    """Exponential moving averages over batches of a vector of importances I:

        mean        <- a1 mean        + (1 - a1) I
        uncertainty <- a2 uncertainty + (1 - a2) |I - mean|

    and the score mean * uncertainty of each. Both begin as zero. Ranks that observe the same hold the same.

    Args:
        size: how many importances a batch gives.
        smoothing: (a1, a2), each in [0, 1).
    """

    def __init__(self, size: int, smoothing: tuple[float, float]) -> None:
        self._smoothing = smoothing
        self._mean, self._uncertainty = torch.zeros(2, size, dtype=torch.float64)

    def observe(self, importance: torch.Tensor) -> None:
        """[size] float64, of one batch."""
        first, second = self._smoothing
        self._mean = first * self._mean + (1 - first) * importance
        self._uncertainty = second * self._uncertainty + (1 - second) * (importance - self._mean).abs()

    @property
    def scores(self) -> list[float]:
        found: list[float] = (self._mean * self._uncertainty).tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.tolist(), "uncertainty": self._uncertainty.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._uncertainty = (
            torch.tensor(state[key], dtype=torch.float64) for key in ("mean", "uncertainty")
        )
