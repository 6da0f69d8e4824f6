"""Frozen weights that stay gathered under ZeRO-3, on two real ranks (see harness/lab_worker.py)."""

from __future__ import annotations

from typing import Any

import pytest
from harness.marks import slow
from harness.trainings import Trainings, assert_bit_equal, frozen_hashes, hash_before_training
from harness.workspace import Workspace


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(workspace, tmp_path_factory.mktemp("lab"), "gathered")


@pytest.mark.parametrize("kind", ["kept", slow("kept_in_part")])
def test_frozen_weights_that_stay_gathered_change_no_number(outcomes: dict[str, Any], kind: str) -> None:
    """Kept after the first of five steps, with three refreshes later; none is gathered a second time."""
    kept, frozen = outcomes[kind]["kept"]
    assert kept == frozen if kind == "kept" else 0 < kept <= 40_000 < frozen
    assert outcomes[kind]["gathered_again"] == 0
    assert outcomes[kind]["importances"] == outcomes["probed"]["importances"]
    assert_bit_equal(outcomes["plain"], outcomes[kind])


@pytest.mark.parametrize("kind", ["kept", slow("kept_in_part")])
def test_frozen_weights_that_stay_gathered_keep_their_hash(outcomes: dict[str, Any], kind: str) -> None:
    assert outcomes[kind]["frozen_hash"] == hash_before_training(outcomes)
    assert frozen_hashes(outcomes) == {hash_before_training(outcomes)}
