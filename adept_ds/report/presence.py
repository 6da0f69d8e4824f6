"""Whether there is anything to report: asked before what draws is imported, which takes a second."""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory


def check_something_to_report(directory: Path) -> None:
    """Raises `InputError`, naming the command that makes it, if a run has written nothing yet."""
    run = RunDirectory(directory)
    if not run.layer_importance.is_file() and not run.metrics.is_file():
        raise InputError(
            f"'{directory}' has no {run.layer_importance.name} and no {run.metrics.name}; run `adept run CONFIG` first"
        )
