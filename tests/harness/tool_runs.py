"""The scripts in tools/, run as a user runs them."""

from __future__ import annotations

import subprocess

from harness.launching import ROOT, launch

TOOLS = [path for path in sorted(ROOT.glob("tools/**/*.py")) if "__main__" in path.read_text(encoding="utf-8")]
"""Without what they share."""

_AS_A_SCRIPT = """
import pathlib, runpy, sys
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, from the root of the repository."""
    return launch(1, ["-c", _AS_A_SCRIPT, *map(str, arguments)])
