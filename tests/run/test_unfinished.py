"""A stage that is stopped or killed on two ranks goes on where it was: what it makes is the same to the last bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import launch
from harness.marks import slow
from harness.unfinished_worker import STAGES
from harness.workspace import Workspace
from safetensors.torch import load_file

AT_EVERY_COMMIT = ("mask", "evaluation", "ewc")
"""One that is asked to stop, one that is killed, one whose method goes on."""


@pytest.fixture(scope="module")
def roots(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    @functools.cache
    def of_group(at_every_commit: bool) -> Path:
        root = tmp_path_factory.mktemp("unfinished")
        stages = [stage for stage in STAGES if (stage in AT_EVERY_COMMIT) == at_every_commit]
        arguments = ["-m", "harness.unfinished_worker", str(workspace.root), str(root), *stages]
        result = launch(2, arguments, timeout=1800)
        assert result.returncode == 0, result.stderr[-3000:]
        return root

    return of_group


@pytest.fixture
def root(roots: Callable[[bool], Path], stage: str) -> Path:
    return roots(stage in AT_EVERY_COMMIT)


every_stage = pytest.mark.parametrize("stage", [stage if stage in AT_EVERY_COMMIT else slow(stage) for stage in STAGES])


@every_stage
def test_what_was_done_is_not_done_again(stage: str, root: Path) -> None:
    reports = json.loads((root / "reports.json").read_text())[stage]
    assert reports["whole"] >= 3
    assert reports["before"] > 0
    assert reports["after"] == reports["whole"] - reports["before"]
    assert not (root / stage / "parts" / "cache" / "unfinished" / stage).exists()


@every_stage
def test_what_comes_out_is_bit_for_bit_that_of_a_stage_that_nobody_disturbed(stage: str, root: Path) -> None:
    whole, parts = (results(root / stage / part) for part in ("whole", "parts"))
    assert whole
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, parts[name]), name
        else:
            assert value == parts[name], name


def results(run_dir: Path) -> dict[str, Any]:
    """Numbers that a run has found; not how long that took."""
    found: dict[str, Any] = {}
    for file in run_dir.rglob("*.safetensors"):
        if "cache" not in file.relative_to(run_dir).parts:
            found |= {f"{file.relative_to(run_dir)}: {name}": tensor for name, tensor in load_file(file).items()}
    for name in ("layer_importance.json", "place_scores.json", "evaluation_base.json"):
        if (run_dir / name).is_file():
            found[name] = {
                key: value for key, value in json.loads((run_dir / name).read_text()).items() if key != "seconds"
            }
    for file in run_dir.rglob("consolidation.json"):
        found[file.name] = json.loads(file.read_text())
    metrics = run_dir / "metrics.jsonl"
    if metrics.is_file():
        lines = map(json.loads, metrics.read_text().splitlines())
        found["steps"] = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    return found
