"""A small run with everything that training leaves behind."""

from __future__ import annotations

from pathlib import Path

from harness.launching import adept
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory


def train_two_steps(workspace: Workspace, run_dir: Path) -> RunDirectory:
    """On two ranks, on given layers, without any probing."""
    config = workspace.config(
        run_dir, expand={"k": None, "layers": [0, 3]}, train={"steps": 2}, importance={"initial": "ones"}
    )
    result = adept(2, "run", config)
    assert result.returncode == 0, result.stderr
    return RunDirectory(run_dir)
