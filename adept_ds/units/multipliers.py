"""Learning-rate multipliers per unit, under any partitioning: nearly free in `UnitAdamW`, at a cost on any optimizer.

DeepSpeed hands the optimizer flat tensors: this rank's slices of many parameters, back to back. Which elements belong
to which unit is bound to such a tensor once. Nothing is communicated, and the moments stay the flat tensors that
DeepSpeed's checkpoints know. A parameter group per unit would do the same arithmetic, but DeepSpeed turns every group
into a partition with its own norm all-reduce, and a group cannot hold a part of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adept_ds.units.placement import Placement, Tile

MULTIPLIERS_KEY = "unit_multipliers"


SMOOTHED_KEY = "unit_importance"
"""Keys in the first parameter group: there, DeepSpeed saves and restores them together with the optimizer."""


@dataclass(frozen=True)
class UnitSlice:
    """A run of a flat tensor's elements that comes from one parameter."""

    start: int
    stop: int
    placement: Placement
    offset: int = 0
    """Where the run begins in the flattened parameter."""
    lr_ratio: float = 1.0
    """The learning rate of these elements over that of their unit, whatever its multiplier is."""
    tiles: tuple[Tile, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tiles = self.placement.tiles(self.offset, self.offset + self.stop - self.start)
        object.__setattr__(self, "tiles", tuple(tiles))

    @property
    def is_uniform(self) -> bool:
        return self.placement.axis is None


class UnitMultipliers:
    """The multipliers of an optimizer's units, and the places of these units in its tensors.

    The multiplier scales the whole update, weight decay included: a unit with multiplier 0 does not move by one
    bit, while its moments go on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._slices: dict[int, list[UnitSlice]] = {}
        self._last_held: dict[str, float] = {}
        self._cached: tuple[dict[str, float], list[float], torch.Tensor] | None = None

    def name_units(self, names: Sequence[str]) -> None:
        """Declare all units, in the order of their indices; every multiplier starts at 1."""
        self._optimizer.param_groups[0][MULTIPLIERS_KEY] = dict.fromkeys(names, 1.0)

    @property
    def values(self) -> dict[str, float]:
        """Multiplier of each unit (a copy)."""
        return dict(self._held)

    def set(self, multipliers: Mapping[str, float]) -> None:
        """Take new multipliers, in effect from the next step on. Raises `ValueError` unless every unit has one."""
        known = self._held
        if multipliers.keys() != known.keys():
            odd = sorted(multipliers.keys() ^ known.keys())
            raise ValueError(f"multipliers must name every unit exactly once; at fault: {odd[:3]}")
        self._optimizer.param_groups[0][MULTIPLIERS_KEY] = {unit: float(multipliers[unit]) for unit in known}

    @property
    def smoothed_importance(self) -> list[float] | None:
        """The moving average of importances over refreshes, in the order of the units' indices; None before the first.
        Where those for the domain are estimated too, they stand behind the others.

        Kept here because it has to survive a checkpoint together with the multipliers.
        """
        return self._optimizer.param_groups[0].get(SMOOTHED_KEY)

    @smoothed_importance.setter
    def smoothed_importance(self, values: Sequence[float]) -> None:
        self._optimizer.param_groups[0][SMOOTHED_KEY] = list(values)

    def bind(self, tensor: torch.Tensor, slices: Sequence[UnitSlice]) -> None:
        """Say which elements of a flat tensor belong to which unit. Elements of no slice are padding.

        Raises:
            ValueError: slices overlap, leave the tensor or mention a unit that was not declared.
        """
        names, end = list(self._held), 0
        for unit_slice in slices:
            last = unit_slice.placement.first + unit_slice.placement.count - 1
            if last >= len(names):
                raise ValueError(f"unit number {last} was not declared; there are {len(names)}")
            if not end <= unit_slice.start < unit_slice.stop <= tensor.numel():
                unit = names[unit_slice.placement.first]
                raise ValueError(
                    f"elements {unit_slice.start}:{unit_slice.stop} of unit '{unit}' overlap or do not exist"
                )
            end = unit_slice.stop
        self._slices[id(tensor)] = list(slices)

    def slices_of(self, tensor: torch.Tensor) -> list[UnitSlice]:
        if id(tensor) not in self._slices:
            raise ValueError("step() got a tensor that was never bound; call bind() for every flat tensor first")
        return self._slices[id(tensor)]

    def by_index(self, device: torch.device) -> tuple[list[float], torch.Tensor]:
        """Multipliers in the order of the units' indices: exact, and as [n_units] float32 on `device`."""
        held = self._held
        # A refresh and a loaded checkpoint both bring a new dictionary.
        if self._cached is None or self._cached[0] is not held or self._cached[2].device != device:
            exact = list(held.values())
            self._cached = (held, exact, torch.tensor(exact, dtype=torch.float32, device=device))
        return self._cached[1], self._cached[2]

    @property
    def map_bytes(self) -> int:
        """Memory of the map from elements to units."""
        tiles = [tile for slices in self._slices.values() for unit_slice in slices for tile in unit_slice.tiles]
        return sum(tile.units.numel() * tile.units.element_size() for tile in tiles)

    @property
    def _held(self) -> dict[str, float]:
        # At stages 1 and 2 DeepSpeed steps one parameter group after the other, and takes the others away meanwhile.
        # The first one, where a loaded checkpoint puts its multipliers, comes first.
        for group in self._optimizer.param_groups:
            self._last_held = group.get(MULTIPLIERS_KEY, self._last_held)
        return self._last_held


def attach_multipliers(optimizer: torch.optim.Optimizer) -> UnitMultipliers:
    """Multipliers on an optimizer of any kind: each step is taken whole, then brought back to its share.

    Costs a copy of the stepped tensor, for the time of the step. `UnitAdamW` needs none.
    """
    multipliers = UnitMultipliers(optimizer)
    before: dict[torch.Tensor, torch.Tensor] = {}

    def remember(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for tensor in with_gradient(stepping):
            before[tensor] = tensor.detach().clone()

    @torch.no_grad()
    def take_share(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for tensor, old in before.items():
            flat, factors = tensor.detach().view(-1), multipliers.by_index(tensor.device)[1]
            for unit_slice in multipliers.slices_of(tensor):
                new, previous = (
                    flat[unit_slice.start : unit_slice.stop],
                    old.view(-1)[unit_slice.start : unit_slice.stop],
                )
                for tile in unit_slice.tiles:
                    share = tile.spread(factors) * unit_slice.lr_ratio
                    tile.view(new).lerp_(tile.view(previous), 1.0 - share.to(new.dtype))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(take_share)
    return multipliers


def with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors that its next step moves."""
    for group in optimizer.param_groups:
        yield from (parameter for parameter in group["params"] if parameter.grad is not None)
