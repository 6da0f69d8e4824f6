"""What a method adds to plain training: learning rates of units, terms of the loss, and what it has to remember."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.units.importance import OnlineImportance

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Refresh:
    """Importances of all units, and the multipliers that follow from them; all in registry order."""

    importance: list[float]
    multipliers: list[float]
    domain_importance: list[float] | None = None
    """For the domain, where multipliers follow from it too."""


class TrainingRule:
    """Plain training, with nothing beside the gradient; methods override what they add.

    The trainer asks in the order in which the functions stand here, on every rank alike: each of them may communicate.
    """

    online: OnlineImportance | None = None
    """Sees the gradient of the replayed rows of each batch alone, if there is one."""

    def start(self) -> Refresh | None:
        """Before the first step of a run that begins; not when it goes on."""
        return None

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, whose weights and multipliers are loaded already.

        Args:
            state: what `state_dict` gave on rank 0 of the ranks that wrote it, which may have been fewer or more.
        """

    def before_update(self) -> dict[str, torch.Tensor]:
        """When a step's gradient is complete and no weight has changed yet; may add to the gradient.

        Returns:
            What joins the record of the step: name of a term -> this rank's share of it, whose sum over ranks is
            recorded. Each a float64 scalar on the device, which the host need not wait for; the same names on every
            rank.
        """
        return {}

    def take_back(self) -> None:
        """The step that this gradient was for is skipped: nothing that was learned from it counts."""
        if self.online:
            self.online.take_back()

    def refreshes_after(self, step: int) -> bool:
        """Whether `refresh` is due after step `step`, which is not the last."""
        return False

    def refresh(self) -> Refresh | None:
        """New multipliers, put into effect; None: there is nothing to compute them from."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint what all ranks have alike: small, of numbers, texts and lists."""
        return {}

    def save(self, files: CheckpointFiles) -> None:
        """Add what is too large for `state_dict`, or this rank's own, to its files of a checkpoint (see
        `weights.by_rank`)."""


def check_start(values: Sequence[float]) -> None:
    """What was estimated from gradients of the untrained model, on any text.

    Raises:
        NonFiniteLossError: that model's weights are to blame, and no learning rate.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteLossError("a gradient of the model that training starts from is NaN or infinite")
