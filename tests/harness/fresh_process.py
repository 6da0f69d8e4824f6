"""Commands in a process that has imported nothing before them, unlike those of `rank_processes`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from harness.launching import ROOT, free_port, rank_environment

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "matplotlib", "scipy"}
"""Each takes from a third of a second to seconds to import."""

_PROGRAM = """
import sys
from adept_ds.cli.app import main
try:
    main()
    code = 0
except SystemExit as end:
    code = end.code or 0
print()
print(code, *sorted(set({heavy!r}) & sys.modules.keys()))
"""


@dataclass(frozen=True)
class Ended:
    code: int
    loaded: set[str]
    """What of `HEAVY` was imported."""
    out: str
    err: str


def run_fresh(*arguments: object, **env: str) -> Ended:
    """`adept ARGUMENTS` in a process of its own; `env` is added to its environment."""
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(heavy=sorted(HEAVY)), *map(str, arguments)],
        cwd=ROOT,
        env=rank_environment(0, 1, free_port()) | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *out, last = result.stdout.splitlines()
    code, *loaded = last.split()
    return Ended(int(code), set(loaded), "\n".join(out), result.stderr)
