"""The names of everything that a study writes: the only place that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyDirectory:
    """A study's directory; every property is the path of something in it, there or not."""

    root: Path

    @property
    def lock(self) -> Path:
        """Of whoever works on the study; lock.json beside it says who that is."""
        return self.root / "lock"

    @property
    def activity(self) -> Path:
        """What whoever works on the study is at, or how it ended."""
        return self.root / "activity.json"

    @property
    def digests(self) -> Path:
        """What is known of files by content."""
        return self.root / "digests.json"

    @property
    def data(self) -> Path:
        """The domain's texts, split; a folder for each way to split them."""
        return self.root / "data"

    @property
    def shared(self) -> Path:
        """What runs need alike and one of them has made."""
        return self.root / "shared"

    @property
    def cells(self) -> Path:
        """A run directory for each."""
        return self.root / "cells"

    @property
    def rates(self) -> Path:
        """What a step of each method takes (rates.json stands beside it)."""
        return self.root / "rates"

    @property
    def submission(self) -> Path:
        """What was submitted to Slurm, and where its output goes."""
        return self.root / "slurm"

    @property
    def page(self) -> Path:
        return self.root / "compare.html"


CELL_RECORD = "cell.json"
"""In a cell's directory: what it is, and of what."""

FAILURE_RECORD = "failure.json"
"""In the directory of a cell that failed: how."""

OUTPUT_LOG = "output.log"
"""In a cell's directory: all that its run said."""
