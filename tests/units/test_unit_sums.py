"""What a refresh of importances communicates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harness.launching import counted
from harness.workspace import Workspace


def test_one_all_reduce_of_n_units_numbers_is_all_that_a_refresh_communicates_beyond_its_passes(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Two ranks under ZeRO-3, two global batches: forward and backward passes gather and reduce what they must."""
    found = counted(workspace.root, tmp_path / "found.pt", "refresh")
    assert len(found["passes"]) > 20, "the passes communicate, or nothing was counted"
    beyond = Counter(found["whole"])
    beyond.subtract(Counter(found["passes"]))
    assert {kind: count for kind, count in beyond.items() if count} == {("allreduce", 8 * found["units"]): 1}
