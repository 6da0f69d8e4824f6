"""How alike the multipliers of two runs are, and what each cost: for example importance.source corpus and online.

    adept run config.yaml run_dir=runs/corpus
    adept run config.yaml run_dir=runs/online importance.source=online
    python tools/compare_importance.py runs/corpus runs/online

Both runs must have copied the same layers, with the same granularity. Rank correlations are Spearman's, over all units,
and apart for norms and everything else: over all, the two kinds are scaled apart and mixed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory


class Multiplier(NamedTuple):
    """That of one unit after a refresh."""

    value: float
    is_norm: bool


Multipliers = dict[str, Multiplier]
"""By unit."""


def refreshes_of(run_dir: RunDirectory) -> dict[int, Multipliers]:
    """By step."""
    return {
        line["step"]: {unit["unit"]: Multiplier(unit["multiplier"], unit["kind"] == "norm") for unit in line["units"]}
        for line in read_json_lines(run_dir.unit_importance)
    }


def correlation(first: Multipliers, second: Multipliers, *, norms: bool | None) -> str:
    units = [unit for unit, multiplier in first.items() if norms in (None, multiplier.is_norm)]
    columns = [first[unit].value for unit in units], [second[unit].value for unit in units]
    if any(len(set(column)) < 2 for column in columns):
        return "constant"
    return f"{spearmanr(*columns).statistic:.3f}"


def compared(first: dict[int, Multipliers], second: dict[int, Multipliers]) -> Table:
    table = Table("step", "all units", "norms", "the others", "mean difference of a multiplier")
    for step in sorted(first.keys() & second.keys()):
        mine, other = first[step], second[step]
        if mine.keys() != other.keys():
            raise SystemExit("the runs have different units: copy the same layers (expand.layers) in both")
        difference = statistics.mean(abs(mine[unit].value - other[unit].value) for unit in mine)
        kinds = [correlation(mine, other, norms=norms) for norms in (None, True, False)]
        table.add_row(str(step), *kinds, f"{difference:.3f}")
    return table


def costs(runs: list[RunDirectory]) -> Table:
    table = Table("run", "refreshes", "seconds a refresh", "seconds a step", "held-out losses at the end")
    for run_dir in runs:
        records = read_json_lines(run_dir.metrics)
        # The first refresh is that of the start, estimated before training.
        refreshes = [
            record["refresh_seconds"] for record in records if record.get("refresh_seconds") and record["step"]
        ]
        steps = [record["seconds"] for record in records if "loss" in record]
        evaluation: dict[str, Any] = next((r["eval"] for r in reversed(records) if "eval" in r), {})
        losses = ", ".join(f"{name} {result['loss']:.4f}" for name, result in evaluation.items())
        seconds = [f"{statistics.median(values):.2f}" if values else "" for values in (refreshes, steps)]
        table.add_row(run_dir.root.name, str(len(refreshes)), *seconds, losses)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="run directory")
    parser.add_argument("second", type=Path, help="run directory")
    arguments = parser.parse_args()
    first, second = RunDirectory(arguments.first), RunDirectory(arguments.second)
    console = Console()
    console.print("rank correlation of multipliers")
    console.print(compared(refreshes_of(first), refreshes_of(second)))
    console.print(costs([first, second]))


if __name__ == "__main__":
    main()
