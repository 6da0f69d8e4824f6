"""Old and new weights consolidated after training, unit by unit (TaSL), by the importance of units on both sides.

Training itself is plain: it is watched, and what was seen is written into each checkpoint (consolidation.json). The
export mixes by it, so that what is evaluated during training is not consolidated yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from adept_ds.base.errors import InputError
from adept_ds.base.progress import by_batch
from adept_ds.base.records import Record
from adept_ds.models.directory import ModelDirectory, understood_by_transformers
from adept_ds.models.families import module_path
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import LongWork
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.rule import Refresh, TrainingRule, check_start
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.roles import Role, roles_of_units
from adept_ds.units.smoothed import SmoothedImportance
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import GradientBatches, UnitSums
from adept_ds.weights.made_tensors import MadeTensors
from adept_ds.weights.start_weights import StartWeights
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import gradients_outside_training

CONSOLIDATION_NAME = "consolidation.json"


class UnitShare(Record):
    """What becomes of a unit."""

    general: Annotated[float, Field(ge=0)]
    """Score on general text, at the start."""
    domain: Annotated[float, Field(ge=0)]
    """Score on what was trained on."""
    role: Role
    new: Annotated[float, Field(ge=0, le=1)]
    """Share of the trained weights in those that are exported; the rest are those of the start."""


class Consolidation(Record):
    """The record that stands in a checkpoint (consolidation.json)."""

    units: dict[str, UnitShare]
    """By name, in registry order."""

    @classmethod
    def remedy(cls) -> str:
        return "copy the checkpoint again, or export another one"


class ConsolidationRule(TrainingRule):
    """Scores units on both sides: on general text at the start, and on the gradient of training steps.

    Args:
        batches: general text; asked for once, where training begins.
        together: around the passes over it.
        smoothing: see `SmoothedImportance`.
        every: optimizer steps from one look at the gradient to the next; the first step is looked at.
        important: share of the units that count as important on each side.
        new_shares: of the trained weights, by role.
    """

    def __init__(
        self,
        engine: Engine,
        unit_lr: UnitLR,
        ranks: Ranks,
        batches: Callable[[], GradientBatches],
        together: LongWork,
        *,
        smoothing: tuple[float, float],
        every: int,
        important: float,
        new_shares: dict[Role, float],
    ) -> None:
        self._engine, self._unit_lr, self._ranks = engine, unit_lr, ranks
        self._batches, self._together = batches, together
        self._every, self._important, self._new_shares = every, important, new_shares
        self._unit_sums = UnitSums(engine, unit_lr.registry, ranks)
        self._general = SmoothedImportance(len(unit_lr.registry), smoothing)
        self._domain = SmoothedImportance(len(unit_lr.registry), smoothing)
        self._steps = 0
        self._last: Callable[[], torch.Tensor] | None = None

    def start(self) -> Refresh:
        """Score units on general text, as if training went over it without moving; multipliers stay."""
        batches = self._batches()
        with self._together("scoring units on general text") as (bar, work):
            means = work.tensor("means", len(batches.global_batches()), len(self._unit_lr.registry))
            with gradients_outside_training(self._engine):
                for number, sums, _ in self._unit_sums.of_batches(batches, work, by_batch(bar)):
                    means[number] = self._mean(sums)
        for mean in means:
            self._general.observe(mean)
        check_start(self._general.scores)
        return Refresh(self._general.scores, self._unit_lr.multipliers)

    def before_update(self) -> dict[str, torch.Tensor]:
        self._observe_last()
        if self._steps % self._every == 0:
            self._last = self._unit_sums.local_later()
        self._steps += 1
        return {}

    def take_back(self) -> None:
        self._last = None

    def _observe_last(self) -> None:
        """The gradient that was looked at last: after its step, for which the host has waited anyway."""
        if self._last is not None:
            importance, self._last = self._mean(self._last()), None
            if importance.isfinite().all():  # or loss scaling (fp16) was too much, and the step was skipped
                self._domain.observe(importance)

    def state_dict(self) -> dict[str, Any]:
        self._observe_last()
        return {"general": self._general.state_dict(), "domain": self._domain.state_dict(), "steps": self._steps}

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        self._general.load_state_dict(state["general"])
        self._domain.load_state_dict(state["domain"])
        self._steps = state["steps"]

    def save(self, files: CheckpointFiles) -> None:
        if self._ranks.is_main:
            files.add_json(CONSOLIDATION_NAME, self._consolidation().to_json())

    def _mean(self, sums: torch.Tensor) -> torch.Tensor:
        """[n_units]: this rank's sums -> means over the elements of units."""
        return self._ranks.sum(sums) / self._unit_lr.registry.sizes

    def _consolidation(self) -> Consolidation:
        units, general, domain = self._unit_lr.registry.units, self._general.scores, self._domain.scores
        roles = roles_of_units(general, domain, units, self._important)
        return Consolidation(
            units={
                unit.name: UnitShare(general=old, domain=new, role=role, new=self._new_shares[role])
                for unit, old, new, role in zip(units, general, domain, roles, strict=True)
            }
        )


def consolidated(trained: Mapping[str, torch.Tensor], model: ModelDirectory, checkpoint: Path) -> MadeTensors:
    """Each parameter of a whole model as old + new share * (trained - old), elementwise in fp32; made when asked for.

    Args:
        trained: fp32, by name.
        model: that training started from, which holds the old weights.
        checkpoint: where `ConsolidationRule` wrote what becomes of units.

    Raises:
        InputError: the checkpoint does not hold that, or of another model.
    """
    shares = Consolidation.load(checkpoint / CONSOLIDATION_NAME).units
    head, embedding = model.family.head, model.family.outside[0]
    is_tied = head in trained and module_path(head).rpartition(".")[2] not in shares
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}  # of one after the other
    registry = _registry(model, {name: of for name, of in shapes.items() if not (is_tied and name == head)})
    if registry.names != list(shares):
        raise InputError(f"'{checkpoint / CONSOLIDATION_NAME}' is of another model than '{model}'; give its own base")
    new_share = torch.tensor([share.new for share in shares.values()])
    start = StartWeights(model, torch.float32)

    def mixed(name: str) -> torch.Tensor:
        new = trained[name]
        weights = start.elements(name, 0, new.numel())
        for tile in registry.tiles(name, 0, new.numel()):
            tile.view(weights).lerp_(tile.view(new.flatten()), tile.spread(new_share))
        return weights.view(new.shape)

    makes = {name: partial(mixed, name) for name in registry.placements}
    return MadeTensors(makes | ({head: makes[embedding]} if is_tied else {}))


def _registry(model: ModelDirectory, shapes: dict[str, tuple[int, ...]]) -> UnitRegistry:
    """Of the units that were trained."""
    from transformers import AutoConfig

    with understood_by_transformers(model.path):
        config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    return build_registry(model.family, shapes, range(model.num_layers), config=config, outside=True)
