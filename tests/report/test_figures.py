"""What the figures show: letters are outlines on the page, so the drawings themselves are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import interval, moved, write_importance, write_lines
from matplotlib.figure import Figure

from adept_ds.report.figures import FIGURES
from adept_ds.report.run_files import read_run


def axes_of(name: str, run_dir: Path) -> Any:
    """The axes of a figure that has one."""
    figure = Figure()
    FIGURES[name](read_run(run_dir), figure)
    return figure.axes[0]


def dots_by_label(run_dir: Path, *units: dict[str, Any]) -> dict[str, list[float]]:
    """The multipliers of the dots in the figure of movement, by the label that the legend gives them."""
    write_lines(run_dir / "metrics.jsonl", [{"step": 1}])
    write_lines(run_dir / "unit_movement.jsonl", [interval(0, 10, *units)])
    axes = axes_of("movement", run_dir)
    return {
        collection.get_label(): sorted(float(x) for x, _ in collection.get_offsets()) for collection in axes.collections
    }


def test_a_unit_is_drawn_as_a_norm_for_its_kind_and_not_for_its_name(tmp_path: Path) -> None:
    found = dots_by_label(
        tmp_path,
        moved("layers.1.norm_proj", 0.5, 1, 1, kind="matrix"),
        moved("layers.1.ln_mlp", 0.75, 1, 1, kind="head"),
        moved("layers.1.scale", 1.25, 1, 1, kind="norm"),
        moved("layers.1.input_layernorm", 1.5, 1, 1, kind="norm"),
    )
    assert found == {"norms": [1.25, 1.5], "everything else": [0.5, 0.75]}


def test_a_unit_of_a_run_that_recorded_no_kinds_is_no_norm(tmp_path: Path) -> None:
    unit = moved("layers.1.input_layernorm", 1.5, 1, 1)
    del unit["kind"]
    assert dots_by_label(tmp_path, unit) == {"norms": [], "everything else": [1.5]}


def test_many_units_are_drawn_as_the_means_of_those_of_a_kind(tmp_path: Path) -> None:
    """Names that differ in a number only are one group, but not where some of them are norms."""
    kinds = {0: "norm", 1: "neuron"}
    units = [moved(f"layers.1.part.{n}", 1 + n % 2, 1, 1, kind=kinds[n % 2]) for n in range(500)]
    assert dots_by_label(tmp_path, *units) == {"norms": [1.0], "everything else": [2.0]}


@pytest.mark.parametrize("name", ["layers", "choice"])
@pytest.mark.parametrize(
    ("changes", "label"),
    [({"measures": "sum of squares"}, "sum of squares"), ({"measures": ""}, "importance"), ({}, "importance")],
)
def test_the_axis_of_the_deltas_says_what_they_measure(
    tmp_path: Path, name: str, changes: dict[str, str], label: str
) -> None:
    """As the probe wrote it; its method alone says nothing, so that a new one needs no change here."""
    write_importance(tmp_path)
    path = tmp_path / "layer_importance.json"
    record = json.loads(path.read_text()) | {"method": "fisher", "selection": {"choose": "lowest", "k": 4}}
    del record["measures"]
    path.write_text(json.dumps(record | changes))
    assert axes_of(name, tmp_path).get_ylabel() == label
