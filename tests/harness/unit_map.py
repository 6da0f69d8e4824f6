"""Which unit every element of a parameter belongs to, by the definition of a placement."""

from __future__ import annotations

import torch

from adept_ds.units.placement import Placement
from adept_ds.units.registry import UnitRegistry


def unit_of_each_element(placement: Placement) -> torch.Tensor:
    """The definition: the index of the unit of every element of the placement."""
    if placement.axis is None:
        return torch.full(placement.shape, placement.first)
    along = torch.arange(placement.shape[placement.axis]) // placement.span
    along = placement.first + (along % placement.period if placement.period else along)
    shape = [-1 if dimension == placement.axis else 1 for dimension in range(len(placement.shape))]
    return along.view(shape).expand(placement.shape)


def units_of(registry: UnitRegistry, parameter: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The index of the unit of every element of a parameter, in its shape."""
    return torch.cat([unit_of_each_element(part).flatten() for part in registry.placements[parameter]]).view(shape)
