"""A small run with everything that training leaves behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of all stages, and what it was made of."""

    workspace: Workspace
    files: RunDirectory

    def copied(self, place: Path) -> TrainedRun:
        """All of it in another place, at another time, as `cp -r` leaves it."""
        shutil.copytree(self.workspace.root, place / "inputs", copy_function=shutil.copy)
        shutil.copytree(self.files.root, place / "run", copy_function=shutil.copy)
        return TrainedRun(Workspace(place / "inputs"), RunDirectory(place / "run"))

    def config(self, **sections: Any) -> Path:
        """Its configuration; `sections` are merged over it."""
        base = {"train": {"steps": 4, "checkpoint_every": 2}, "importance": {"every": 2}}
        return self.workspace.config(self.files.root, **merged(base, sections))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections of both."""
    return base | {key: base.get(key, {}) | value if isinstance(value, dict) else value for key, value in over.items()}


def train_with_two_checkpoints(workspace: Workspace, run_dir: Path) -> TrainedRun:
    """All stages on one rank, with a refresh between the checkpoints."""
    run = TrainedRun(workspace, RunDirectory(run_dir))
    result = adept(1, "run", run.config())
    assert result.returncode == 0, result.stderr
    return run
