"""Units: the semantic pieces of expanded layers that have a learning rate of their own (paper, section 3.2).

At `matrix` granularity a unit is a projection (weight and bias together) or a norm. The registry orders units by
layer and by the family's table, so that a vector of n_units numbers means the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adept_ds.families import Family, copied_parameters

UnitKind = Literal["matrix", "norm"]


@dataclass(frozen=True)
class Unit:
    """One piece of an expanded layer."""

    name: str
    """For people and files: 'layers.12.self_attn.q_proj', with the layer's index in the expanded model."""
    kind: UnitKind
    layer: int
    parameters: tuple[str, ...]
    """Full names of its parameters."""


class UnitRegistry:
    """All units of a run, in a fixed order, and the unit of each trainable parameter."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = tuple(units)
        self.names = [unit.name for unit in units]
        self.index_of_parameter = {
            parameter: index for index, unit in enumerate(units) for parameter in unit.parameters
        }

    def __len__(self) -> int:
        return len(self.units)


def build_registry(family: Family, parameter_names: Iterable[str], layers: Sequence[int]) -> UnitRegistry:
    """Group the parameters of `layers` into units; every parameter falls into exactly one.

    Raises:
        ValueError: a parameter that the family's table does not mention.
    """
    order = {path: position for position, path in enumerate((*family.matrices, *family.norms))}
    members: dict[tuple[int, int], list[str]] = {}
    for name, layer, inner in copied_parameters(family, list(parameter_names), layers):
        path = inner.rpartition(".")[0]
        if path not in order:
            raise ValueError(f"parameter '{name}' belongs to no unit: add '{path}' to its family in families.py")
        members.setdefault((layer, order[path]), []).append(name)
    paths = list(order)
    return UnitRegistry(
        [
            Unit(
                name=f"layers.{layer}.{paths[position]}",
                kind="matrix" if position < len(family.matrices) else "norm",
                layer=layer,
                parameters=tuple(names),
            )
            for (layer, position), names in sorted(members.items())
        ]
    )
