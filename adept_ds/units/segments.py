"""Which unit every element of a flat tensor belongs to, told by arithmetic on the tensor's own device.

A flat tensor is slices of parts of parameters, back to back. Element e of a part belongs to unit

    first + (e mod modulus) div divisor mod count

(see `Placement.cycle`), so a slice takes ten numbers, 52 bytes, however many units, rows or elements it has; there is
nothing for each of them. What is computed from them is there for a chunk of elements at a time, and for as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from adept_ds.units.placement import Placement, Tile

BLOCK = 1024
"""Elements that a kernel's program goes through; all of one segment."""


@dataclass(frozen=True)
class UnitSlice:
    """A run of a flat tensor's elements that comes from one part of a parameter."""

    start: int
    stop: int
    placement: Placement
    offset: int = 0
    """Where the run begins in the flattened part."""
    lr_ratio: float = 1.0
    """The learning rate of these elements over that of their unit, whatever its multiplier is."""
    tiles: tuple[Tile, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tiles = self.placement.tiles(self.offset, self.offset + self.stop - self.start)
        object.__setattr__(self, "tiles", tuple(tiles))

    @property
    def is_uniform(self) -> bool:
        return self.placement.axis is None


@dataclass(frozen=True)
class Segments:
    """The slices of a flat tensor and what is between them, in the order in which they lie."""

    stops: torch.Tensor
    """[segments]: first element behind each."""
    table: torch.Tensor
    """[5, segments]: shift, modulus, divisor, count and first of each; element x of the flat tensor is element
    x + shift of its part, but for a multiple of modulus."""
    ratios: torch.Tensor
    """[segments] float32: the learning rate of elements over that of their unit."""
    bound: torch.Tensor | None
    """[segments] bool: whether elements belong to units; None: all do."""
    block_table: torch.Tensor
    """[3, segments] int64: first element, first block, first element behind."""
    num_blocks: int

    @classmethod
    def of(cls, slices: Sequence[UnitSlice], numel: int, device: torch.device) -> Segments:
        """Of a flat tensor of so many elements.

        Args:
            slices: disjoint, in ascending order.
        """
        starts, stops, rows, ratios = list[int](), list[int](), list[tuple[int, ...]](), list[float]()
        first_blocks, bound = [0], list[bool]()
        for start, stop, unit_slice in _with_gaps(slices, numel):
            shift, cycle, first = 0, (1, 1, 1), 0
            if unit_slice is not None:
                cycle, first = unit_slice.placement.cycle, unit_slice.placement.first
                shift = (unit_slice.offset - start) % cycle[0]
            starts.append(start)
            stops.append(stop)
            rows.append((shift, *cycle, first))
            bound.append(unit_slice is not None)
            first_blocks.append(first_blocks[-1] + (-(-(stop - start) // BLOCK) if unit_slice is not None else 0))
            ratios.append(unit_slice.lr_ratio if unit_slice is not None else 0.0)
        narrow = numel + max((row[1] for row in rows), default=0) < 2**31
        table = torch.tensor(rows, dtype=torch.int32 if narrow else torch.int64).reshape(-1, 5).T.contiguous()
        return cls(
            torch.tensor(stops, dtype=table.dtype).to(device),
            table.to(device),
            torch.tensor(ratios, dtype=torch.float32).to(device),
            None if all(bound) else torch.tensor(bound).to(device),
            torch.tensor([starts, first_blocks[:-1], stops], dtype=torch.int64).to(device),
            first_blocks[-1],
        )

    @cached_property
    def blocks(self) -> torch.Tensor:
        """[blocks] int32: the segment of each block of `BLOCK` elements that belong to units, 4 bytes for 1024
        elements, made on the device for whoever asks."""
        segments = torch.arange(self.stops.numel(), dtype=torch.int32, device=self.stops.device)
        starts, _, stops = self.block_table
        sizes = (stops - starts + (BLOCK - 1)).div(BLOCK, rounding_mode="floor")
        if self.bound is not None:
            sizes = sizes * self.bound
        return segments.repeat_interleave(sizes, output_size=self.num_blocks)

    @property
    def num_bytes(self) -> int:
        """Without `blocks`."""
        tensors = (self.stops, self.table, self.ratios, self.block_table)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def factors(self, multipliers: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[stop - start] float32: what elements start:stop have their learning rate multiplied by, 0 where nothing is
        bound; and [stop - start] int32: their segments. Takes 40 bytes an element meanwhile.

        Args:
            multipliers: [n_units] float32, on this device.
        """
        at = torch.arange(start, stop, dtype=self.stops.dtype, device=self.stops.device)
        segment = torch.bucketize(at, self.stops, right=True, out_int32=True)
        shift, modulus, divisor, count, first = self.table.index_select(1, segment)
        units = at.add_(shift).remainder_(modulus).floor_divide_(divisor).remainder_(count).add_(first)
        return multipliers.index_select(0, units).mul_(self.ratios.index_select(0, segment)), segment


def _with_gaps(slices: Sequence[UnitSlice], numel: int) -> Iterator[tuple[int, int, UnitSlice | None]]:
    """First and last + 1 element of each slice, and of what is between, before and behind them."""
    end = 0
    for unit_slice in slices:
        if end < unit_slice.start:
            yield end, unit_slice.start, None
        yield unit_slice.start, unit_slice.stop, unit_slice
        end = unit_slice.stop
    if end < numel:
        yield end, numel, None
