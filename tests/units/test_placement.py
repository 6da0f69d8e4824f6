"""Tiles of a parameter, wherever a partition cuts it."""

from __future__ import annotations

import pytest
import torch
from harness.unit_map import unit_of_each_element

from adept_ds.units.placement import Placement


@pytest.mark.parametrize("granularity", ["matrix", "module", "fine"])
def test_tiles_say_the_unit_of_every_element_wherever_a_partition_cuts(granularity: str) -> None:
    """Every slice of small parameters, against the definition element by element."""
    values = torch.rand(10, generator=torch.Generator().manual_seed(0))
    placements = {
        "matrix": [Placement((5, 4), 3), Placement((7,), 1)],
        "module": [Placement((3, 2, 2), 0)],
        "fine": [
            Placement((6, 4), 2, 0, 2),
            Placement((6,), 2, 0, 2),
            Placement((5, 6), 1, 1, 3),
            Placement((3, 4), 0, 1, 1),
            Placement((8, 3), 2, 0, 2, 2),
            Placement((3, 12), 1, 1, 2, 3),
        ],
    }[granularity]
    for placement in placements:
        truth = unit_of_each_element(placement).flatten()
        for start in range(len(truth)):
            for stop in range(start + 1, len(truth) + 1):
                told, spread = torch.full((stop - start,), -1), torch.zeros(stop - start)
                for tile in placement.tiles(start, stop):
                    view = tile.view(told)
                    assert (view == -1).all(), "tiles must not overlap"
                    view.copy_(tile.units.unsqueeze(1 - tile.axis).expand_as(view))
                    tile.view(spread).copy_(tile.spread(values).expand_as(view))
                assert torch.equal(told, truth[start:stop]), (placement, start, stop)
                assert torch.equal(spread, values[truth[start:stop]]), (placement, start, stop)
