"""Whether there is anything to report: asked before what draws is imported, which takes a second."""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory


def check_something_to_report(directory: Path) -> None:
    """Raises `InputError`, naming the command that makes it, if a run has written nothing yet."""
    run = RunDirectory(directory)
    if not any(file.is_file() for file in (run.layer_importance, run.place_benefits, run.metrics)):
        raise InputError(
            f"'{directory}' has no {run.layer_importance.name} and no {run.metrics.name}; run `adept run CONFIG` first"
        )
