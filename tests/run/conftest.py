"""A finished run that several tests look at, copy, and spoil copies of."""

from __future__ import annotations

import pytest
from harness.trained_run import TrainedRun, train_with_two_checkpoints
from harness.workspace import Workspace


@pytest.fixture(scope="session")
def trained_run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_with_two_checkpoints(workspace, tmp_path_factory.mktemp("trained") / "run")
