"""What happens when training makes general text worse: a warning, lower rates, or an end (docs/guard.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from adept_ds.base.guard_record import GuardStop, Reading
from adept_ds.base.progress import ProgressCallback
from adept_ds.config.guard_section import GuardSection


@dataclass(frozen=True)
class Measured:
    """An evaluation of all held-out documents."""

    corpora: dict[str, dict[str, Any]]
    """As `training.evaluation.evaluate` returns it."""
    reading: Reading


class Guard:
    """The guard of a training run; the same on every rank.

    Args:
        measure: evaluates the model that trains, by document.
        texts: a digest of what it is evaluated on.
    """

    def __init__(self, section: GuardSection, measure: Callable[[ProgressCallback], Measured], texts: str) -> None:
        self._section, self.measure, self._texts = section, measure, texts
        self.factor = 1.0
        """Of all multipliers."""
        self.best = 0
        """The step with the lowest domain loss of those at which nothing was found forgotten; 0: none, or the base."""
        self._lowest = float("inf")
        self.complaint: str | None = None
        """What was found forgotten at the last evaluation."""

    @property
    def stops(self) -> bool:
        """Whether training ends here."""
        return self.complaint is not None and self._section.action == "stop"

    @property
    def keeps_best(self) -> bool:
        return self._section.action == "stop"

    def judge(self, step: int, reading: Reading, *, is_kept: bool = True) -> dict[str, Any]:
        """Take in what was found after step `step`; what joins the log.

        Args:
            is_kept: whether there may be a checkpoint of this step. Without one it is not the best.
        """
        section, worst = self._section, reading.general[reading.worst]
        self.complaint = None
        if worst.lower > section.max_general_rise:
            self.complaint = (
                f"general text '{reading.worst}' has risen by {worst.rise:.4f} nats by step {step} (at least "
                f"{worst.lower:.4f} at {100 * section.confidence:g}% confidence)"
            )
            if section.action == "slow":
                self.factor *= section.slow_by
        elif step and is_kept and reading.domain < self._lowest:
            self.best, self._lowest = step, reading.domain
        record = reading.to_json() | {"forgotten": self.complaint is not None, "worst": reading.worst}
        return record | ({"factor": self.factor} if section.action == "slow" else {})

    def words(self) -> str:
        """Of the complaint, for the user."""
        limit = f"{self.complaint}, above guard.max_general_rise ({self._section.max_general_rise:g})"
        ends = f"training ends, and the checkpoint of step {self.best} is the result" if self.best else "training ends"
        return (
            f"{limit}: "
            + {"warn": "forgotten", "slow": f"multipliers x {self.factor:g}", "stop": ends}[self._section.action]
        )

    def stop(self, step: int) -> GuardStop:
        """The record of it."""
        assert self.complaint is not None
        section = self._section
        return GuardStop(
            max_general_rise=section.max_general_rise,
            confidence=section.confidence,
            step=step,
            best=self.best,
            reason=self.complaint,
        )

    def state_dict(self) -> dict[str, Any]:
        judged_by = {
            "max_general_rise": self._section.max_general_rise,
            "confidence": self._section.confidence,
            "texts": self._texts,
        }
        return {"factor": self.factor, "best": self.best, "lowest": self._lowest, "judged_by": judged_by}

    def load_state_dict(self, state: dict[str, Any], checkpoints: Collection[int]) -> None:
        """The best so far stays the best where this guard would have found it good, too, and where it is there.

        Args:
            checkpoints: steps of those that there are: what was put aside, or stayed with the trunk of a branch, is no
                result of this run.
        """
        self.factor = state["factor"]
        if state["best"] in checkpoints and self._as_strict(state.get("judged_by")):  # of an older version not told
            self.best, self._lowest = state["best"], state["lowest"]

    def _as_strict(self, judged_by: dict[str, Any] | None) -> bool:
        """Whether what was judged so keeps the limit of now. Losses on other texts cannot be compared either."""
        if judged_by is None or judged_by["texts"] != self._texts:
            return False
        section = self._section
        lower = judged_by["max_general_rise"] <= section.max_general_rise
        return lower and bool(judged_by["confidence"] == section.confidence)
