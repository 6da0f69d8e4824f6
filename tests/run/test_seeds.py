"""What a seed decides: runs that differ in `train.seed` compare trainings of one and the same expanded model."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from harness.launching import adept
from harness.spoiling import changed_json
from harness.workspace import Workspace

from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Two seeds of training, and another of the probe; with dropout, so that every kind of chance takes part."""
    root, found = tmp_path_factory.mktemp("seeds"), {}
    model = shutil.copytree(workspace.model, root / "model")
    changed_json(model / "config.json", lambda record: record | {"attention_dropout": 0.3})
    probe = {"sequences": 4, "batch_sequences": 2, "stability": "halves", "method": "gradient"}
    for name, overrides in {"first": [], "train": ["train.seed=7"], "probe": ["probe.seed=7"]}.items():
        config = workspace.config(root / name, model=str(model), probe=probe, importance={"sequences": 4})
        result = adept(1, "run", config, "train.steps=3", *overrides)
        assert result.returncode == 0, result.stderr
        found[name] = RunDirectory(root / name)
    return found


def _losses(run: RunDirectory) -> list[Any]:
    return [record["loss"] for record in read_json_lines(run.metrics) if "loss" in record]


def test_another_training_seed_changes_the_training_and_nothing_before_it(runs: dict[str, RunDirectory]) -> None:
    first, second = runs["first"], runs["train"]
    assert _losses(first) != _losses(second)
    for path in ("layer_importance", "expansion"):
        assert getattr(first, path).read_bytes() == getattr(second, path).read_bytes()
    weights = [sorted(run.expanded.glob("*.safetensors")) for run in (first, second)]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    start = [read_json_lines(run.unit_importance)[0] for run in (first, second)]
    assert start[0] == start[1], "importances of the source layers, before the first step"


def test_another_seed_of_the_probe_samples_other_text(runs: dict[str, RunDirectory]) -> None:
    first, second = runs["first"], runs["probe"]
    assert first.layer_importance.read_bytes() != second.layer_importance.read_bytes()
    start = [read_json_lines(run.unit_importance)[0] for run in (first, second)]
    assert start[0] != start[1], "refreshes take their text with the same seed"
