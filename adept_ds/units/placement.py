"""Which units the elements of a parameter belong to, by a few numbers and never by one per element, row or column.

A head owns rows of q_proj and columns of o_proj, a neuron rows of gate_proj and up_proj and a column of down_proj, so
units are scattered over a flattened parameter. But they follow each other regularly: multipliers are spread over
elements by slices and repetitions, and elements summed along dimensions, without an index on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Cycle(NamedTuple):
    """Element e of a part belongs to its unit number (e mod modulus) div divisor mod units."""

    modulus: int
    divisor: int
    units: int


@dataclass(frozen=True)
class Tile:
    """Elements of a flattened parameter that form a matrix [rows, columns] with one unit per row or per column."""

    start: int
    """First element, counted from the beginning of the run that was tiled."""
    rows: int
    columns: int
    axis: int
    """0: a line is a row, 1: a column."""
    first: int
    """Index of the first of the units that lines go through."""
    count: int
    """How many these are; beyond the last one the first one comes again."""
    line: int = 0
    """Number of the first line, where line 0 is the first one of unit `first`."""
    span: int = 1
    """Lines of a unit that follow each other."""

    @property
    def units(self) -> torch.Tensor:
        """[rows] or [columns] int64: the unit of each."""
        return self.first + torch.arange(self.line, self.line + self._lines) // self.span % self.count

    def view(self, run: torch.Tensor) -> torch.Tensor:
        """The tile's elements, out of those of its run: [rows, columns]."""
        return run[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all units -> those of this tile, to be broadcast over it: [rows, 1] or [1, columns]."""
        before, position = self.line % self.span, self.line // self.span % self.count
        needed = -(-(before + self._lines) // self.span)
        if position + needed <= self.count:
            found = values[self.first + position : self.first + position + needed]
        else:
            once = values[self.first : self.first + self.count]
            found = once.repeat(-(-(position + needed) // self.count))[position : position + needed]
        if self.span > 1:
            found = found.repeat_interleave(self.span)[before : before + self._lines]
        return found.unsqueeze(1 - self.axis)

    @property
    def _lines(self) -> int:
        return self.columns if self.axis else self.rows


@dataclass(frozen=True)
class Stack:
    """Tiles of one shape that follow each other, such as those of experts."""

    first: Tile
    count: int

    def takes(self, tile: Tile) -> bool:
        """Whether this tile is the next one."""
        shape = (self.first.rows, self.first.columns, self.first.axis)
        end = self.first.start + self.count * self.first.rows * self.first.columns
        return (tile.rows, tile.columns, tile.axis, tile.start) == (*shape, end)

    def line_sums(self, run: torch.Tensor) -> torch.Tensor:
        """[tiles * (rows or columns)] float64: the sum over each line, one tile behind the other; in a fixed order."""
        rows, columns = self.first.rows, self.first.columns
        elements = run[self.first.start : self.first.start + self.count * rows * columns]
        return elements.view(self.count, rows, columns).sum(2 - self.first.axis, dtype=torch.float64).flatten()


def stacked(tiles: Iterable[Tile]) -> list[Stack]:
    """As few stacks as hold them, in the same order."""
    stacks: list[Stack] = []
    for tile in tiles:
        if stacks and stacks[-1].takes(tile):
            stacks[-1] = Stack(stacks[-1].first, stacks[-1].count + 1)
        else:
            stacks.append(Stack(tile, 1))
    return stacks


@dataclass(frozen=True)
class Placement:
    """Which units the elements of one parameter belong to; or those of one of several parts that lie one behind the
    other in it (fused projections, experts)."""

    shape: tuple[int, ...]
    first: int
    """Index of the unit of element 0."""
    axis: int | None = None
    """Dimension along which one unit follows the other; None: all elements are one unit."""
    span: int = 1
    """Rows or columns of a unit that lie together."""
    period: int | None = None
    """After so many units the first one comes again; None: each comes once."""

    @property
    def count(self) -> int:
        """How many units there are."""
        if self.axis is None:
            return 1
        return self.period or self.shape[self.axis] // self.span

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def cycle(self) -> Cycle:
        """How its units follow each other, from element 0 on."""
        if self.axis is None:
            return Cycle(1, 1, 1)
        row = math.prod(self.shape[1:])
        if self.axis == 0:
            return Cycle(row * self.span * self.count, row * self.span, self.count)
        return Cycle(row, self.span, self.count)

    def tiles(self, start: int, stop: int) -> list[Tile]:
        """Cut elements start:stop into at most three tiles; a cut may fall anywhere."""
        if self.axis is None:
            return [Tile(0, 1, stop - start, 0, self.first, 1)]
        row = math.prod(self.shape[1:])
        if self.axis == 0:
            period = row * self.span
            return [
                Tile(begin - start, rows, columns, 0, self.first, self.count, begin // period)
                for begin, rows, columns in _whole_rows(start, stop, period)
            ]
        return [
            Tile(begin - start, rows, columns, 1, self.first, self.count, begin % row, self.span)
            for begin, rows, columns in _whole_rows(start, stop, row)
        ]


def _whole_rows(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Elements start:stop as (first, rows, columns): the end of a cut row, whole rows, the beginning of a cut one."""
    first_whole, last_whole = min(-(-start // width) * width, stop), max(stop // width * width, start)
    if start < first_whole:
        yield start, 1, first_whole - start
    if first_whole < last_whole:
        yield first_whole, (last_whole - first_whole) // width, width
    if max(first_whole, last_whole) < stop:
        yield last_whole, 1, stop - last_whole
