"""Commands that must be refused: exit code 2 and one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.launching import ROOT, free_port, rank_environment
from harness.rank_processes import RankProcess


def refused(arguments: Sequence[object], words: Sequence[str], *, ranks: int = 1, **env: str) -> None:
    """`adept ARGUMENTS` complains in one line that has all `words`, says nothing else and ends with code 2.

    Args:
        ranks: how many the environment announces; only rank 0 is started.
        env: added to its environment.
    """
    environment: Mapping[str, str] = rank_environment(0, ranks, free_port()) | env
    process = RankProcess(["-m", "adept_ds", *map(str, arguments)], environment, ROOT)
    out, err = process.communicate(timeout=60.0)
    assert process.returncode == 2, err
    assert_one_line(err, words)
    assert out == ""


def assert_one_line(stderr: str, words: Sequence[str]) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("adept: ")
    for word in words:
        assert word in lines[0], lines[0]


def files_under(*roots: Path) -> set[str]:
    return {str(path) for root in roots for path in root.rglob("*")}
