"""Memory left over, as control groups limit it."""

from __future__ import annotations

import sys
from pathlib import Path

from adept_ds.models.device import free_in_cgroups, free_memory_bytes


def _group(folder: Path, limit: str, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")


def test_the_tightest_control_group_around_a_process_counts(tmp_path: Path) -> None:
    """A Slurm step without a limit of its own, inside a job that has one."""
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n")
    _group(tmp_path / "fs/slurm/job_7/step_0", "max", 50)
    _group(tmp_path / "fs/slurm/job_7", "1000", 400)
    _group(tmp_path / "fs/slurm", "9000", 1000)
    assert free_in_cgroups(tmp_path / "fs", own) == 600
    _group(tmp_path / "fs/slurm/job_7", "1000", 1400)
    assert free_in_cgroups(tmp_path / "fs", own) == 0


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert free_in_cgroups(tmp_path, tmp_path / "missing") == sys.maxsize


def test_ranks_of_a_host_share_what_is_free() -> None:
    assert 0 < free_memory_bytes(1000) <= free_memory_bytes(1)
