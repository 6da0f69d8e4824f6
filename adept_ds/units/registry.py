"""Units: the semantic parts of trained layers that have a learning rate of their own (paper, section 3.2).

Granularity `matrix`: a projection (weight and bias together) or a norm. `module`: all projections of the attention, or
of the MLP, or a norm. `fine`: an attention head, a key-value head, an MLP neuron, or a norm. A head owns rows of
q_proj and columns of o_proj, a neuron rows of gate_proj and up_proj and a column of down_proj, so fine units are
scattered over a flattened parameter. A `Placement` says how with a few numbers, never with one per element. Projections
that an architecture fuses, and the matrices of each expert, are units of their own all the same. Where the whole model
trains, the embedding, a table of positions, the final norm and a head of its own are a unit each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from adept_ds.models.families import Family, copied_parameters, module_path
from adept_ds.units.placement import Placement, Tile

UnitKind = Literal["matrix", "module", "head", "neuron", "norm"]


Granularity = Literal["matrix", "module", "fine"]


@dataclass(frozen=True)
class Unit:
    """One part of a trained layer, or of what is outside the layers."""

    name: str
    """For people and files: 'layers.12.self_attn.q_proj', with the layer's index in the trained model; 'lm_head'."""
    kind: UnitKind
    layer: int | None
    """None outside the decoder layers."""
    part: str
    """Path inside the layer, the same for all heads of it: 'self_attn.q_proj', 'self_attn.head', 'mlp'."""
    numel: int

    @property
    def place(self) -> str:
        """What it shares with the other heads or neurons of its layer: 'layers.12.self_attn.head'."""
        return _place(self.layer, self.part)


class UnitRegistry:
    """All units, in a fixed order, and where each parameter's elements belong.

    The order makes a vector of n_units numbers mean the same on every rank.
    """

    def __init__(self, units: Sequence[Unit], placements: Mapping[str, Sequence[Placement]]) -> None:
        self.units = tuple(units)
        self.names = [unit.name for unit in units]
        self.placements = {name: tuple(parts) for name, parts in placements.items()}
        """By full name of the parameter: its parts, in the order in which they lie in it."""

    def __len__(self) -> int:
        return len(self.units)

    @property
    def sizes(self) -> torch.Tensor:
        """[n_units] float64: elements of each."""
        return torch.tensor([unit.numel for unit in self.units], dtype=torch.float64)

    def parts(self, parameter: str, start: int, stop: int) -> Iterator[tuple[Placement, int, int, int]]:
        """Where elements start:stop of a flattened parameter lie in its parts.

        Yields:
            a part, first and last + 1 of the elements inside it, and the first one counted from `start`.

        Raises:
            ValueError: the parameter belongs to no unit.
        """
        if parameter not in self.placements:
            raise ValueError(f"parameter '{parameter}' trains and belongs to no unit")
        begin = 0
        for part in self.placements[parameter]:
            first, last = max(start, begin), min(stop, begin + part.numel)
            if first < last:
                yield part, first - begin, last - begin, first - start
            begin += part.numel

    def tiles(self, parameter: str, start: int, stop: int) -> Iterator[Tile]:
        """Elements start:stop of a flattened parameter, cut into tiles."""
        for part, first, last, offset in self.parts(parameter, start, stop):
            for tile in part.tiles(first, last):
                yield replace(tile, start=offset + tile.start)

    @classmethod
    def from_mapping(cls, unit_of: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> UnitRegistry:
        """Whole parameters as units of any name: {'model.layers.0.mlp.up_proj.weight': 'mlp'}.

        Raises:
            ValueError: a parameter that `shapes` does not know.
        """
        unknown = unit_of.keys() - shapes.keys()
        if unknown:
            raise ValueError(f"no parameter '{min(unknown)}'; name parameters as model.named_parameters() does")
        names = list(dict.fromkeys(unit_of.values()))
        sizes = dict.fromkeys(names, 0)
        for parameter, unit in unit_of.items():
            sizes[unit] += math.prod(shapes[parameter])
        units = [Unit(name, "matrix", None, name, sizes[name]) for name in names]
        index = {name: position for position, name in enumerate(names)}
        return cls(units, {p: [Placement(tuple(shapes[p]), index[unit])] for p, unit in unit_of.items()})


def build_registry(
    family: Family,
    shapes: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    granularity: Granularity = "matrix",
    config: Any = None,
    *,
    outside: bool = False,
) -> UnitRegistry:
    """The units of `layers`; every parameter of these layers belongs to some.

    Args:
        shapes: of all parameters of the model, by full name; a tied head is none of its own.
        config: the model's configuration; `fine` reads the numbers of heads from it.
        outside: the parameters outside the layers are units too, after those of the layers, each module one:
            'embed_tokens', 'norm', 'lm_head', under the architecture's own names.

    Raises:
        ValueError: a parameter that the family's table does not mention, or heads that do not divide it.
    """
    builder = _Builder()
    for name, layer, path in _parameters_in(family, shapes, layers):
        builder.add(name, layer, _bands(family, path, tuple(shapes[name]), granularity, config))
    for name, path in _parameters_outside(family, shapes) if outside else ():
        builder.add(name, None, [_outside_band(family, path, tuple(shapes[name]))])
    return builder.registry()


def _parameters_in(
    family: Family, shapes: Mapping[str, Sequence[int]], layers: Sequence[int]
) -> Iterator[tuple[str, int, str]]:
    """Name, layer and module of every parameter of `layers`, in the order of their units."""
    order = {path: position for position, path in enumerate((*family.projections, *family.norms))}
    members: dict[int, list[tuple[int, str, str]]] = {}
    for name, layer, inner in copied_parameters(family, list(shapes), layers):
        path = module_path(inner)
        if path not in order:
            raise ValueError(f"parameter '{name}' belongs to no unit: add '{path}' to its family (family_table.py)")
        members.setdefault(layer, []).append((order[path], path, name))
    for layer in sorted(members):
        for _, path, name in sorted(members[layer], key=lambda member: member[0]):
            yield name, layer, path


def _parameters_outside(family: Family, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """Name and module of every parameter outside the layers, in the order of their units."""
    order = {path: position for position, path in enumerate(map(module_path, (*family.outside, family.head)))}
    found = [(name, module_path(name)) for name in shapes if family.split_name(name) is None]
    for name, path in found:
        if path not in order:
            raise ValueError(f"parameter '{name}' belongs to no unit: add it to `outside` of its family")
    return iter(sorted(found, key=lambda entry: order[entry[1]]))


class _Builder:
    """Units and placements, numbered as they come."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._units: list[tuple[str, UnitKind, int | None, str]] = []
        self._placements: dict[str, list[Placement]] = {}

    def add(self, parameter: str, layer: int | None, bands: Iterable[_Band]) -> None:
        """A parameter; units that an earlier one had too are shared."""
        placements = self._placements[parameter] = []
        for band in bands:
            names = [_place(layer, part) + number for part, number in band.units]
            for unit, (part, _) in zip(names, band.units, strict=True):
                if unit not in self._index:
                    self._index[unit] = len(self._units)
                    self._units.append((unit, band.kind, layer, part))
            period = len(names) if band.axis is not None else None
            placements.append(Placement(band.shape, self._index[names[0]], band.axis, band.span, period))

    def registry(self) -> UnitRegistry:
        sizes = [0] * len(self._units)
        for placement in (part for parts in self._placements.values() for part in parts):
            for position in range(placement.first, placement.first + placement.count):
                sizes[position] += placement.numel // placement.count
        units = [Unit(*unit, size) for unit, size in zip(self._units, sizes, strict=True)]
        return UnitRegistry(units, self._placements)


def _place(layer: int | None, part: str) -> str:
    return part if layer is None else f"layers.{layer}.{part}"


@dataclass(frozen=True)
class _Band:
    """Consecutive elements of one parameter of a layer, and the units among them."""

    shape: tuple[int, ...]
    kind: UnitKind
    units: Sequence[tuple[str, str]]
    """Part and number of each; beyond the last one the first one comes again."""
    axis: int | None = None
    span: int = 1


def _bands(family: Family, path: str, shape: tuple[int, ...], granularity: Granularity, config: Any) -> Iterator[_Band]:
    """One parameter of a layer, in the order in which its elements lie."""
    if path in family.norms:
        yield _Band(shape, "norm", [(path, "")])
    elif granularity == "module":
        yield _Band(shape, "module", [(path.partition(".")[0], "")])
    elif len(shape) == 3:
        for expert in range(shape[0]):
            yield from _projection_bands(family, path, shape[1:], granularity, config, f".{expert}")
    else:
        yield from _projection_bands(family, path, shape, granularity, config, "")


def _outside_band(family: Family, path: str, shape: tuple[int, ...]) -> _Band:
    """A parameter outside the layers: one unit with the others of its module, at any granularity."""
    is_norm = len(shape) == 1 and path != module_path(family.head)
    return _Band(shape, "norm" if is_norm else "matrix", [(path.rpartition(".")[2], "")])


def _projection_bands(
    family: Family, path: str, shape: tuple[int, ...], granularity: Granularity, config: Any, expert: str
) -> Iterator[_Band]:
    """The weight or the bias of one linear layer."""
    projection, fine = family.projections[path], granularity == "fine"
    parts = projection.parts
    if not parts or (not fine and len(parts) == 1):
        yield _Band(shape, "matrix", [(path, expert)])
        return
    axis = 0
    if len(shape) == 1 and projection.side == "inputs":
        # The bias belongs to no input.
        yield _Band(shape, "matrix", [(f"{path}.bias", expert)])
        return
    if len(shape) == 2:
        axis = int((projection.side == "inputs") != family.transposed)
    lines = shape[axis]
    counts = [1 if part.count_key is None else int(getattr(config, part.count_key)) for part in parts]
    if lines % sum(counts):
        raise ValueError(f"{path}: {lines} rows or columns do not divide into {sum(counts)} units")
    span = lines // sum(counts)
    matrices = [(part.name or path, expert) for part in parts]
    groups = [
        _numbered(part.fine, expert, count if part.count_key else span)
        for part, count in zip(parts, counts, strict=True)
    ]
    kind: UnitKind = "matrix" if not fine else "head" if parts[0].count_key else "neuron"
    if projection.by_head and fine:
        yield _Band(shape, kind, groups[0], axis, span * len(parts))
    elif projection.by_head:
        yield _Band(shape, kind, matrices, axis, span)
    elif axis == 1 and fine:
        # Columns of all parts lie beside each other in every row; their units are the same.
        yield _Band(shape, kind, groups[0], axis, span if parts[0].count_key else 1)
    elif axis == 1:
        yield _Band(shape, kind, matrices, axis, lines // len(parts))
    else:
        for matrix, group, count in zip(matrices, groups, counts, strict=True):
            part_shape = (count * span, *shape[1:])
            if fine:
                yield _Band(part_shape, kind, group, 0, count * span // len(group))
            else:
                yield _Band(part_shape, kind, [matrix])


def _numbered(part: str, expert: str, count: int) -> list[tuple[str, str]]:
    return [(part, f"{expert}.{number}") for number in range(count)]
