"""Every tool says how it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.tool_runs import TOOLS, run_tool


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_shows_an_example_in_its_help(tool: Path) -> None:
    result = run_tool(tool, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python tools/{tool.relative_to(ROOT / 'tools')}" in result.stdout
