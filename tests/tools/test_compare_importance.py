"""Two runs side by side: how alike their multipliers are, and what refreshes cost."""

from __future__ import annotations

import json
from pathlib import Path

from harness.tool_runs import run_tool

from adept_ds.base.run_dir import RunDirectory

UNITS = {
    "layers.1.ln_1": "norm",
    "layers.1.ln_2": "norm",
    "layers.1.post_norm": "norm",
    "layers.1.mlp.up": "matrix",
    "layers.1.mlp.norm_gate": "matrix",
    "layers.1.mlp.down": "matrix",
}
"""Unit -> kind, which the names do not tell."""


def test_compared_runs_show_correlations_by_kind_and_what_refreshes_cost(tmp_path: Path) -> None:
    """Norms in the same order, everything else in the opposite one."""
    multipliers = {"first": [0.1, 0.5, 0.9, 0.2, 1.0, 1.8], "second": [0.2, 0.6, 1.0, 1.8, 1.0, 0.2]}
    for name, values in multipliers.items():
        run = RunDirectory(tmp_path / name)
        run.root.mkdir()
        entries = [
            {"unit": unit, "kind": kind, "multiplier": value}
            for (unit, kind), value in zip(UNITS.items(), values, strict=True)
        ]
        line = {"step": 8, "units": entries}
        run.unit_importance.write_text(json.dumps(line) + "\n")
        metrics = [{"step": 8, "loss": 2.0, "seconds": 3.25}, {"step": 8, "refresh_seconds": 1.5}]
        run.metrics.write_text("".join(json.dumps(metric) + "\n" for metric in metrics))
    result = run_tool("tools/compare_importance.py", tmp_path / "first", tmp_path / "second")
    assert result.returncode == 0, result.stderr
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ 8 ")]
    assert [cell.strip() for cell in row.strip("│").split("│")][2:] == ["1.000", "-1.000", "0.583"]
    assert "1.50" in result.stdout
    assert "3.25" in result.stdout
