"""A flat tensor of a few units and padding, as DeepSpeed hands it to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.placement import Placement
from adept_ds.units.segments import UnitSlice

SIZES = {"a": 7, "b": 13, "c": 1, "d": 20}
MULTIPLIERS = {"a": 2.0, "b": 0.0, "c": 0.37, "d": 1.0}
PADDING = 3
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OPTIONS_OF_OURS: dict[str, Any] = {}
"""That torch's own AdamW has not."""
UNITS = list(SIZES)


def run_of(start: int, stop: int, unit: str) -> UnitSlice:
    """Elements that belong to one unit as a whole."""
    return UnitSlice(start, stop, Placement((stop - start,), UNITS.index(unit) if unit in UNITS else 99))


def slices_of(sizes: dict[str, int]) -> list[UnitSlice]:
    slices, start = [], 0
    for unit, size in sizes.items():
        slices.append(run_of(start, start + size, unit))
        start += size
    return slices


def unit_of(unit_slice: UnitSlice) -> str:
    return UNITS[unit_slice.placement.first]


SLICES = slices_of(SIZES)
TOTAL = sum(SIZES.values())


def flat_tensor(seed: int = 0) -> torch.Tensor:
    weight = torch.randn(TOTAL + PADDING, generator=torch.Generator().manual_seed(seed))
    return weight.requires_grad_(True)


def gradient(step: int) -> torch.Tensor:
    return torch.randn(TOTAL + PADDING, generator=torch.Generator().manual_seed(100 + step))


def unit_adamw(flat: torch.Tensor, slices: Sequence[UnitSlice] = SLICES, **options: Any) -> UnitAdamW:
    optimizer = UnitAdamW([flat], **(OPTIONS | OPTIONS_OF_OURS | options))
    optimizer.multipliers.name_units(UNITS)
    optimizer.multipliers.bind(flat, slices)
    return optimizer
