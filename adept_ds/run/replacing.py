"""Where a run writes a model anew: what it wrote itself is replaced, everything else is kept."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from adept_ds.base.files import is_filled
from adept_ds.base.outputs import Command, is_untouched
from adept_ds.run.context import Context


def keep_aside(run: Context, directory: Path, command: Command) -> None:
    """On rank 0: free the place of an output that is not just as `command` wrote it, under a new name beside it.

    A copied run is of this kind, since its times are others; so is a model that somebody worked on.
    """
    if not is_filled(directory) or directory.is_symlink() or is_untouched(directory, command):
        return
    names = (directory.with_name(f"{directory.name}.kept{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    directory.rename(aside)
    run.terminal.stage(command, f"'{directory}' is not just as it was written: kept as '{aside.name}'")
