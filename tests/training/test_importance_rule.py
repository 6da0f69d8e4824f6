"""What ranks have summed up since the last refresh goes on, whichever ranks go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch

from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.importance_rule import ImportanceRule
from adept_ds.units.importance import OnlineImportance
from adept_ds.units.registry import UnitRegistry

REGISTRY = UnitRegistry.from_mapping({"a": "first", "b": "second"}, {"a": (2,), "b": (3,)})


def rule(rank: int, world_size: int) -> ImportanceRule:
    engine = mock.Mock()
    engine.module.named_parameters.return_value = []
    online = OnlineImportance(engine, REGISTRY, Ranks(rank, world_size))
    return ImportanceRule(cast(Any, None), None, 1, lambda: None, online)


def summed(of: ImportanceRule) -> torch.Tensor:
    assert of.online is not None
    return of.online.sums


@pytest.mark.parametrize("now", [1, 2, 3, 4])
@pytest.mark.parametrize("written", [1, 2, 3, 4])
def test_the_sum_over_ranks_stays_and_on_as_many_each_keeps_its_own(tmp_path: Path, written: int, now: int) -> None:
    """The sum is all that a refresh asks for; the same bits come out only where nothing is added up beforehand."""
    rules = [rule(rank, written) for rank in range(written)]
    for rank, of in enumerate(rules):
        assert of.online is not None
        of.online.go_on([torch.tensor([10.0**rank, 0.1 + rank], dtype=torch.float64)], 5)
        files = CheckpointFiles(copied=False)
        of.save(files)
        assert set(files.write(tmp_path)) == {f"unit_sums_rank_{rank}.safetensors"}
    state = rules[0].state_dict()
    found = [rule(rank, now) for rank in range(now)]
    for of in found:
        of.load(tmp_path, state)
        assert of.online is not None and of.online.count == 5
    before, after = (torch.stack([summed(of) for of in some]) for some in (rules, found))
    torch.testing.assert_close(after.sum(0), before.sum(0), rtol=1e-15, atol=0)
    assert written != now or torch.equal(after, before)
