"""How far each unit has moved: what shows that its multiplier acted.

Weights at the start are read from the expanded checkpoint, where they lie anyway; those of the last refresh are kept on
the host, 4 bytes for each trained element over all ranks. Both are brought to where the weights are now, a parameter at
a time, and subtracted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import UnitTotals
from adept_ds.weights.by_rank import SavedElements, elements_file
from adept_ds.weights.start_weights import StartWeights
from adept_ds.zero.engine import Engine
from adept_ds.zero.layout import Fragment, partition_layout

_MOVEMENT = "unit_movement"


class UnitMovement:
    """L2 norms of the change of each unit's fp32 weights.

    Args:
        start: the checkpoint that training started from; None: no file holds what trains (adapters), and the engine
            has its first values now.
        precision: in which it was loaded: training starts from weights rounded to it.
    """

    def __init__(
        self, engine: Engine, registry: UnitRegistry, start: ModelDirectory | None, precision: torch.dtype, ranks: Ranks
    ) -> None:
        self._layout = partition_layout(engine)
        self._registry = registry
        self._ranks = ranks
        self._start = StartWeights(start, precision) if start else None
        self._first = None if start else self._weights()
        self._last: dict[str, torch.Tensor] | None = None
        """Weights at `since`; None: those of the start."""
        self.since = 0
        """The step at which was last asked."""

    def measure(self, step: int) -> tuple[list[float], list[float]]:
        """Change of every unit since `self.since` and since the start, in registry order; the same on every rank."""
        recent, since_start = UnitTotals(self._registry), UnitTotals(self._registry)
        for fragment, now in self._fragments():
            name = fragment.parameter
            start = (self._first[name] if self._first else self._stored_start(fragment)).to(now.device)
            last = start if self._last is None else self._last[name].to(now.device)
            for totals, before in ((recent, last), (since_start, start)):
                totals.add(name, fragment.param_start, (now - before).square_())
        self._last, self.since = self._weights(), step
        sums = torch.cat([recent.take(), since_start.take()])
        changes: list[list[float]] = self._ranks.sum(sums).sqrt().view(2, -1).tolist()
        return changes[0], changes[1]

    def save(self, files: CheckpointFiles, step: int) -> None:
        """Into the checkpoint of step `step`, unless its own weights are those that are kept."""
        if self._last is not None and self.since != step:
            files.add_tensors(elements_file(_MOVEMENT, self._ranks.rank), self._last)

    def load(self, checkpoint: Path, step: int, since: int) -> None:
        """Go on from a checkpoint, after its weights were loaded."""
        self.since = since
        if since == step:
            self._last = self._weights()
        elif since:
            saved = SavedElements(checkpoint, _MOVEMENT)
            self._last = {
                fragment.parameter: saved.of(fragment.parameter, fragment.param_start, fragment.param_stop)
                for fragment, _ in self._fragments()
            }

    def _fragments(self) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """What this rank steps of each parameter, and its fp32 weights, which are the engine's own."""
        for partition in self._layout:
            for fragment in partition.fragments:
                yield fragment, partition.tensor[fragment.flat].detach()

    def _weights(self) -> dict[str, torch.Tensor]:
        """Of each parameter, by full name, the elements that this rank steps, copied to the host."""
        return {fragment.parameter: now.to("cpu", torch.float32, copy=True) for fragment, now in self._fragments()}

    def _stored_start(self, fragment: Fragment) -> torch.Tensor:
        """The fragment's elements at the start."""
        assert self._start is not None
        return self._start.elements(fragment.parameter, fragment.param_start, fragment.param_stop)
