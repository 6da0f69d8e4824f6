"""Where a run writes a model anew: what it wrote itself is replaced, everything else is kept."""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.files import aside, is_filled
from adept_ds.base.outputs import Command, is_untouched
from adept_ds.run.context import Context


def keep_aside(run: Context, directory: Path, command: Command) -> None:
    """On rank 0: free the place of an output that is not just as `command` wrote it, under a new name beside it.

    A copied run is of this kind, since its times are others; so is a model that somebody worked on.
    """
    if not is_filled(directory) or directory.is_symlink() or is_untouched(directory, command):
        return
    kept = aside(directory, "kept")
    directory.rename(kept)
    run.terminal.stage(command, f"'{directory}' is not just as it was written: kept as '{kept.name}'")
