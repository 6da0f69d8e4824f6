"""Learning rates that follow the importance of units, estimated again every so many steps (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.rule import Refresh, TrainingRule
from adept_ds.units.importance import Importances, OnlineImportance
from adept_ds.units.unit_lr import UnitLR
from adept_ds.weights.by_rank import elements_file, elements_files

_SUMS = "unit_sums"


class ImportanceRule(TrainingRule):
    """Multipliers from importances (paper, equation 6), by the policy of `unit_lr`.

    Args:
        initial: importances before the first step; None: every multiplier is 1 until the first refresh.
        every: optimizer steps between refreshes.
        estimate: importances now; None: nothing was seen to estimate them from.
        online: where `estimate` takes them from what it saw of the training batches.
    """

    def __init__(
        self,
        unit_lr: UnitLR,
        initial: Importances | None,
        every: int,
        estimate: Callable[[], Importances | None],
        online: OnlineImportance | None = None,
    ) -> None:
        self._unit_lr, self._initial, self._every, self._estimate = unit_lr, initial, every, estimate
        self.online = online

    def start(self) -> Refresh | None:
        return None if self._initial is None else self._refreshed(self._initial)

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        if self.online:
            mine = [load_file(file)[_SUMS] for file in self.online.share_of(elements_files(checkpoint, _SUMS))]
            self.online.go_on(mine, state["count"])

    def refreshes_after(self, step: int) -> bool:
        return step % self._every == 0

    def refresh(self) -> Refresh | None:
        importance = self._estimate()
        return None if importance is None else self._refreshed(importance)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.online.count} if self.online else {}

    def save(self, files: CheckpointFiles) -> None:
        if self.online:
            files.add_tensors(elements_file(_SUMS, self.online.rank), {_SUMS: self.online.sums})

    def _refreshed(self, importance: Importances) -> Refresh:
        multipliers = self._unit_lr.refresh(importance.general, importance.domain)
        return Refresh(importance.general, multipliers, importance.domain)
