"""A training checkpoint becomes a model without the run that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.domains import content
from harness.launching import adept
from harness.trained_run import train_two_steps
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory, checkpoint_tag


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_two_steps(workspace, tmp_path_factory.mktemp("trained") / "run")


def test_the_command_exports_a_checkpoint_by_itself_as_the_run_did(trained: RunDirectory, tmp_path: Path) -> None:
    checkpoint, out = trained.checkpoints / checkpoint_tag(2), tmp_path / "out"
    result = adept(1, "export", checkpoint, out, "--base", trained.expanded)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"18 trained tensors; model in {out}\n"
    assert content(out) == content(trained.export)
