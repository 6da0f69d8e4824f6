"""What ranks have summed up since the last refresh goes on, whichever ranks go on."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from adept_ds.ranks.collectives import Ranks
from adept_ds.units.importance import OnlineImportance
from adept_ds.units.registry import UnitRegistry

REGISTRY = UnitRegistry.from_mapping({"a": "first", "b": "second"}, {"a": (2,), "b": (3,)})


def taken_over(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """What each of so many ranks holds then."""
    engine = mock.Mock()
    engine.module.named_parameters.return_value = []
    found = []
    for rank in range(world_size):
        online = OnlineImportance(engine, REGISTRY, Ranks(rank, world_size))
        online.load_state_dicts(states)
        found.append(online.state_dict())
    return found


@pytest.mark.parametrize("now", [1, 2, 3, 4])
@pytest.mark.parametrize("written", [1, 2, 3, 4])
def test_the_sum_over_ranks_stays_and_on_as_many_each_keeps_its_own(written: int, now: int) -> None:
    """The sum is all that a refresh asks for; the same bits come out only where nothing is added up beforehand."""
    states: list[dict[str, Any]] = [{"sums": [10.0**rank, 0.1 + rank], "count": 5} for rank in range(written)]
    found = taken_over(states, now)
    assert {state["count"] for state in found} == {5}
    for unit in range(2):
        total = sum(state["sums"][unit] for state in states)
        assert sum(state["sums"][unit] for state in found) == pytest.approx(total, rel=1e-15)
    assert written != now or found == states
