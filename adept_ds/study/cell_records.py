"""What a study writes about a cell into its directory."""

from __future__ import annotations

from typing import Any

from adept_ds.base.digests import Digest
from adept_ds.base.records import Record


class CellRecord(Record):
    """cell.json: written when a cell's directory is begun."""

    label: str
    setting: str
    lr: float
    seed: int
    fingerprint: Digest
    """Of the inputs."""
    inputs: dict[str, Any]

    @classmethod
    def remedy(cls) -> str:
        return "move its cell away; `adept compare` runs it again"


class Failure(Record):
    """failure.json"""

    code: int
    """Exit code of the run."""
    reason: str
    """Its last line."""
