"""Steps that are not taken: loss or gradient is no number, or far above what they were in the steps before.

A step that is skipped moves no weight and no moment of the optimizer, on any rank; its batch is passed over. What is no
number is never stepped on. With `train.spike_sigma` neither is what exceeds

    mean + spike_sigma * standard deviation     of the last `train.spike_window` steps, once there are half as many

be it the loss or the norm of the gradient, before it is clipped: the rule of OLMo-core's SkipStepOptimizer (Team OLMo,
arXiv 2501.00656), skipped steps counted among the last ones. Other than there, what is no number never is: one NaN
would have every step of a whole window skipped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from adept_ds.config.train_sections import TrainSection

Reason = Literal["loss", "gradient", "loss spike", "gradient spike"]

_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of float32, in which DeepSpeed has the norm."""


class Skips:
    """What is skipped in a training run. Every rank sees the same numbers, and so decides the same."""

    def __init__(self, train: TrainSection) -> None:
        self._scales = train.precision == "fp16"
        self._sigma, self._fewest = train.spike_sigma, max(2, train.spike_window // 2)
        self._losses = deque[float](maxlen=train.spike_window)
        self._norms = deque[float](maxlen=train.spike_window)
        self.in_a_row = 0
        """Steps up to now; without those of fp16 whose gradient overflowed, after which losses are scaled down."""
        self.total = 0

    def largest_norm(self, loss: float) -> float:
        """Of the gradient of a step with this loss: above it, the step is skipped. Below 0, it is in any case."""
        return -1.0 if self._of_loss(loss) else self._limit(self._norms)

    def decide(self, loss: float, norm: float) -> Reason | None:
        """Why a step with this loss and this norm of its gradient is skipped; None: it is taken. To be asked once."""
        reason = self._of_loss(loss) or self._of_norm(norm)
        for window, value in ((self._losses, loss), (self._norms, norm)):
            if math.isfinite(value):
                window.append(value)
        if not (self._scales and reason == "gradient"):
            self.in_a_row = self.in_a_row + 1 if reason else 0
        self.total += reason is not None
        return reason

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "norms": list(self._norms), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint, which follows a step that was taken."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.total = state["total"]

    def _of_loss(self, loss: float) -> Reason | None:
        if not math.isfinite(loss):
            return "loss"
        return "loss spike" if loss > self._limit(self._losses) else None

    def _of_norm(self, norm: float) -> Reason | None:
        if not norm <= _LARGEST:
            return "gradient"
        return "gradient spike" if norm > self._limit(self._norms) else None

    def _limit(self, window: Sequence[float]) -> float:
        if self._sigma is None or len(window) < self._fewest:
            return _LARGEST
        mean = statistics.fmean(window)
        return mean + self._sigma * math.sqrt(math.fsum((x - mean) ** 2 for x in window) / (len(window) - 1))


def in_words(reason: Reason, ranks: Sequence[int]) -> str:
    """Args: ranks: on which alone it was so; none: on all of them."""
    what = {"loss": "loss is no number", "gradient": "gradient is no number"}.get(reason, f"{reason}s")
    return what + (f" on rank {', '.join(map(str, ranks))} alone" if ranks else "")
