"""Sums over units: what they are, and what a refresh of importances launches, copies and communicates for them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from harness.launching import counted
from harness.unit_map import units_of
from harness.workspace import Workspace
from launches import launches

from adept_ds.units.placement import Placement
from adept_ds.units.registry import Unit, UnitRegistry
from adept_ds.units.unit_sums import UnitTotals


def experts_and_more(neurons: int, experts: int = 3) -> UnitRegistry:
    """A matrix, neurons as rows and columns, and experts in one parameter, which have units of their own."""
    placements = {
        "whole": [Placement((4, 5), 0)],
        "rows": [Placement((neurons * 2, 5), 1, axis=0, span=2)],
        "columns": [Placement((3, neurons), 1, axis=1)],
        "experts": [Placement((3, neurons), 1 + neurons * (1 + expert), axis=1) for expert in range(experts)],
    }
    units = [Unit(str(number), "neuron", 0, "part", 1) for number in range(1 + neurons * (1 + experts))]
    return UnitRegistry(units, placements)


def numel(registry: UnitRegistry, parameter: str) -> int:
    return sum(part.numel for part in registry.placements[parameter])


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_totals_are_sums_over_the_elements_of_units_wherever_partitions_cut(cut: int) -> None:
    """Twice, against a sum by each element's unit: float64 to 1e-14. A cut leaves the ends of parameters out."""
    registry, draw = experts_and_more(4), torch.Generator().manual_seed(0)
    totals = UnitTotals(registry)
    for _ in range(2):
        expected = torch.zeros(len(registry), dtype=torch.float64)
        for name in registry.placements:
            size = numel(registry, name)
            values, units = torch.randn(size, generator=draw), units_of(registry, name, (size,))
            expected.index_add_(0, units[cut : size - cut], values[cut : size - cut].double())
            totals.add(name, cut, values[cut : size - cut])
        torch.testing.assert_close(totals.take(), expected, rtol=1e-14, atol=1e-14)


def test_what_sums_launch_does_not_depend_on_the_units_and_they_are_copied_once() -> None:
    found = set()
    for neurons, experts in ((2, 1), (50, 1), (3, 20), (400, 40)):
        registry = experts_and_more(neurons, experts)
        totals = UnitTotals(registry)
        for _ in range(2):  # where elements belong is learnt once
            with launches() as counts:
                for name in registry.placements:
                    totals.add(name, 0, torch.ones(numel(registry, name)))
                totals.take()
        assert counts.copies == 1
        found.add(counts.total)
    assert len(found) == 1


def test_one_all_reduce_of_n_units_numbers_is_all_that_a_refresh_communicates_beyond_its_passes(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Two ranks under ZeRO-3, two global batches: forward and backward passes gather and reduce what they must."""
    found = counted(workspace.root, tmp_path / "found.pt", "refresh")
    assert len(found["passes"]) > 20, "the passes communicate, or nothing was counted"
    beyond = Counter(found["whole"])
    beyond.subtract(Counter(found["passes"]))
    assert {kind: count for kind, count in beyond.items() if count} == {("allreduce", 8 * found["units"]): 1}
