"""Learning-rate multipliers per unit, under any partitioning: nearly free in `UnitAdamW`, at a cost on any optimizer.

DeepSpeed hands the optimizer flat tensors: this rank's slices of many parameters, back to back. Which elements belong
to which unit is bound to such a tensor once. Nothing is communicated, and the moments stay the flat tensors that
DeepSpeed's checkpoints know. A parameter group per unit would do the same arithmetic, but DeepSpeed turns every group
into a partition with its own norm all-reduce, and a group cannot hold a part of a parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from adept_ds.base.errors import InputError
from adept_ds.units.segments import Segments, UnitSlice

MULTIPLIERS_KEY = "unit_multipliers"
NAMES_KEY = "unit_names"
SMOOTHED_KEY = "unit_importance"
"""Keys in the first parameter group: there, DeepSpeed saves and restores them together with the optimizer. In each
rank's file, so they are [n_units] float32, a digest of the names, and [n_units] float64."""


class UnitMultipliers:
    """The multipliers of an optimizer's units, and the places of these units in its tensors.

    The multiplier scales the whole update, weight decay included: a unit with multiplier 0 does not move by one
    bit, while its moments go on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._names: list[str] = []
        self._digest = ""
        self._slices: dict[int, list[UnitSlice]] = {}
        self._segments: dict[int, Segments] = {}
        self._last_held = torch.zeros(0)
        self._derived: dict[Any, Any] = {}
        """From the vector that is held now."""

    def name_units(self, names: Sequence[str]) -> None:
        """Declare all units, in the order of their indices; every multiplier starts at 1."""
        self._names = list(names)
        self._digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        self._hold(torch.ones(len(names)))

    @property
    def vector(self) -> torch.Tensor:
        """[n_units] float32 on the host, in the order of the units' indices; never changed in place."""
        # At stages 1 and 2 DeepSpeed steps one parameter group after the other, and takes the others away meanwhile.
        holding = [group for group in self._optimizer.param_groups if MULTIPLIERS_KEY in group]
        if holding and holding[0][MULTIPLIERS_KEY] is not self._last_held:  # a checkpoint was loaded
            self._last_held = self._checked(holding[0])
            for group in holding:  # of a universal one, all groups have what the first one had
                del group[MULTIPLIERS_KEY]
            self._hold(self._last_held)
        return self._last_held

    @vector.setter
    def vector(self, values: Sequence[float]) -> None:
        """In effect from the next step on, rounded to float32."""
        if len(values) != len(self._names):
            raise ValueError(f"{len(values)} multipliers for {len(self._names)} units")
        self._hold(torch.tensor(values, dtype=torch.float32))

    @property
    def values(self) -> dict[str, float]:
        """Multiplier of each unit (a copy): the shortest decimal that is the float32 which is held."""
        return dict(zip(self._names, self.in_order, strict=True))

    @property
    def in_order(self) -> list[float]:
        """`values` in the order of the units' indices."""
        return list(self._from_vector("shortest", lambda held: held.numpy().astype(str).astype(np.float64).tolist()))

    def set(self, multipliers: Mapping[str, float]) -> None:
        """Take new multipliers, in effect from the next step on. Raises `ValueError` unless every unit has one."""
        odd = multipliers.keys() ^ set(self._names)
        if odd:
            raise ValueError(f"multipliers must name every unit exactly once; at fault: {sorted(odd)[:3]}")
        self.vector = [multipliers[unit] for unit in self._names]

    @property
    def smoothed_importance(self) -> list[float] | None:
        """The moving average of importances over refreshes, in the order of the units' indices; None before the first.
        Where those for the domain are estimated too, they stand behind the others.

        Kept here because it has to survive a checkpoint together with the multipliers.
        """
        held = self._optimizer.param_groups[0].get(SMOOTHED_KEY)
        return None if held is None else held.tolist()

    @smoothed_importance.setter
    def smoothed_importance(self, values: Sequence[float]) -> None:
        self._optimizer.param_groups[0][SMOOTHED_KEY] = torch.tensor(values, dtype=torch.float64)

    def bind(self, tensor: torch.Tensor, slices: Sequence[UnitSlice]) -> None:
        """Say which elements of a flat tensor belong to which unit. Elements of no slice are padding.

        Raises:
            ValueError: slices overlap, leave the tensor or mention a unit that was not declared.
        """
        end = 0
        for unit_slice in slices:
            last = unit_slice.placement.first + unit_slice.placement.count - 1
            if last >= len(self._names):
                raise ValueError(f"unit number {last} was not declared; there are {len(self._names)}")
            if not end <= unit_slice.start < unit_slice.stop <= tensor.numel():
                unit = self._names[unit_slice.placement.first]
                raise ValueError(
                    f"elements {unit_slice.start}:{unit_slice.stop} of unit '{unit}' overlap or do not exist"
                )
            end = unit_slice.stop
        self._slices[id(tensor)] = list(slices)
        self._segments[id(tensor)] = Segments.of(slices, tensor.numel(), tensor.device)

    def slices_of(self, tensor: torch.Tensor) -> list[UnitSlice]:
        self._check_bound(tensor)
        return self._slices[id(tensor)]

    def segments_of(self, tensor: torch.Tensor) -> Segments:
        """On the tensor's device since it was bound."""
        self._check_bound(tensor)
        return self._segments[id(tensor)]

    @property
    def exact(self) -> list[float]:
        """`vector` as numbers, to the last bit."""
        exact: list[float] = self._from_vector("exact", torch.Tensor.tolist)
        return exact

    def on(self, device: torch.device) -> torch.Tensor:
        """`vector` on a device; copied there once after each change."""
        found: torch.Tensor = self._from_vector(device, lambda held: held.to(device))
        return found

    @property
    def map_bytes(self) -> int:
        """Memory of the map from elements to units."""
        return sum(segments.num_bytes for segments in self._segments.values())

    def _check_bound(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._slices:
            raise ValueError("step() got a tensor that was never bound; call bind() for every flat tensor first")

    def _from_vector(self, what: Any, derive: Callable[[torch.Tensor], Any]) -> Any:
        held = self.vector
        if what not in self._derived:
            self._derived[what] = derive(held)
        return self._derived[what]

    def _hold(self, values: torch.Tensor) -> None:
        self._derived = {}
        first = self._optimizer.param_groups[0]
        self._last_held = first[MULTIPLIERS_KEY] = values
        first[NAMES_KEY] = self._digest

    def _checked(self, group: Mapping[str, Any]) -> torch.Tensor:
        """What the parameter group of a checkpoint holds. Raises `InputError` if it is of other units."""
        held: torch.Tensor = group[MULTIPLIERS_KEY]
        if group.get(NAMES_KEY) != self._digest:
            raise InputError(
                "the checkpoint is of other units, or they have another order; go on with the model and the settings "
                "that it was written with"
            )
        return held.cpu()


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
            flat, factors = tensor.detach().view(-1), multipliers.on(tensor.device)
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
