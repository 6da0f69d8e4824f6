"""Which units the elements of a parameter belong to, by a few numbers and never by one per element.

A head owns rows of q_proj and columns of o_proj, a neuron rows of gate_proj and up_proj and a column of down_proj, so
units are scattered over a flattened parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Elements of a flattened parameter that form a matrix [rows, columns] with one unit per row or per column."""

    start: int
    """First element, counted from the beginning of the run that was tiled."""
    rows: int
    columns: int
    units: torch.Tensor
    """[rows] or [columns] int64: the unit of each."""
    axis: int
    """0: `units` are those of the rows, 1: of the columns."""

    def view(self, run: torch.Tensor) -> torch.Tensor:
        """The tile's elements, out of those of its run: [rows, columns]."""
        return run[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all units -> those of this tile, to be broadcast over it: [rows, 1] or [1, columns]."""
        return values[self.units].unsqueeze(1 - self.axis)


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

    def tiles(self, start: int, stop: int) -> list[Tile]:
        """Cut elements start:stop into at most three tiles; a cut may fall anywhere."""
        if self.axis is None:
            return [Tile(0, 1, stop - start, torch.tensor([self.first]), 0)]
        row = math.prod(self.shape[1:])
        if self.axis == 0:
            period = row * self.span
            return [
                Tile(begin - start, rows, columns, self._unit(begin // period + torch.arange(rows)), 0)
                for begin, rows, columns in _whole_rows(start, stop, period)
            ]
        return [
            Tile(
                begin - start,
                rows,
                columns,
                self._unit(torch.arange(begin % row, begin % row + columns) // self.span),
                1,
            )
            for begin, rows, columns in _whole_rows(start, stop, row)
        ]

    def _unit(self, position: torch.Tensor) -> torch.Tensor:
        return self.first + position % self.count


def _whole_rows(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Elements start:stop as (first, rows, columns): the end of a cut row, whole rows, the beginning of a cut one."""
    first_whole, last_whole = min(-(-start // width) * width, stop), max(stop // width * width, start)
    if start < first_whole:
        yield start, 1, first_whole - start
    if first_whole < last_whole:
        yield first_whole, (last_whole - first_whole) // width, width
    if max(first_whole, last_whole) < stop:
        yield last_whole, 1, stop - last_whole
