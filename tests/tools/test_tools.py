"""The tools work as their help says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from harness.launching import ROOT, adept, launch
from harness.workspace import Workspace
from safetensors.torch import load_file

TOOLS = sorted(ROOT.glob("tools/*.py")) + sorted(ROOT.glob("tools/*/*.py"))


def _tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return launch(1, [*map(str, arguments)])


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_shows_an_example_in_its_help(tool: Path) -> None:
    result = _tool(tool, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python tools/{tool.relative_to(ROOT / 'tools')}" in result.stdout


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks without any probing: two steps on given layers."""
    run_dir = tmp_path_factory.mktemp("tools") / "run"
    config = workspace.config(
        run_dir, expand={"k": None, "layers": [0, 3]}, train={"steps": 2}, importance={"initial": "ones"}
    )
    result = adept(2, "run", config)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_converter_writes_the_model_that_export_writes(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_2"
    result = _tool("tools/checkpoint_to_hf.py", checkpoint, tmp_path / "hf", "--base", trained / "expanded")
    assert result.returncode == 0, result.stderr
    mine, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", trained / "export"))
    assert mine.keys() == exported.keys()
    assert all(torch.equal(mine[name], exported[name]) for name in mine)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_the_command_exports_a_checkpoint_by_itself_as_the_run_did(trained: Path, tmp_path: Path) -> None:
    checkpoint, out = trained / "checkpoints" / "step_2", tmp_path / "out"
    result = adept(1, "export", checkpoint, out, "--base", trained / "expanded")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"18 trained tensors; model in {out}\n"
    for file in (trained / "export").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_converter_reads_raw_deepspeed_output(trained: Path, tmp_path: Path) -> None:
    """The directory that DeepSpeed wrote, without a base: just the trained tensors, as in the exported model."""
    result = _tool("tools/checkpoint_to_hf.py", trained / "checkpoints", tmp_path / "trained.safetensors")
    assert result.returncode == 0, result.stderr
    tensors, exported = load_file(tmp_path / "trained.safetensors"), load_file(trained / "export" / "model.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"1", "5"}
    assert all(torch.equal(tensor, exported[name]) for name, tensor in tensors.items())


def test_converter_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    result = _tool("tools/checkpoint_to_hf.py", tmp_path, tmp_path / "out.safetensors")
    assert result.returncode == 2
    assert "holds no DeepSpeed checkpoint" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_compared_runs_show_correlations_by_kind_and_what_refreshes_cost(tmp_path: Path) -> None:
    """Norms in the same order, everything else in the opposite one."""
    units = ["layers.1.a_norm", "layers.1.b_norm", "layers.1.c_norm", "layers.1.up", "layers.1.down", "layers.1.gate"]
    multipliers = {"first": [0.1, 0.5, 0.9, 0.2, 1.0, 1.8], "second": [0.2, 0.6, 1.0, 1.8, 1.0, 0.2]}
    for name, values in multipliers.items():
        (tmp_path / name).mkdir()
        entries = [{"unit": unit, "multiplier": value} for unit, value in zip(units, values, strict=True)]
        line = {"step": 8, "units": entries}
        (tmp_path / name / "unit_importance.jsonl").write_text(json.dumps(line) + "\n")
        metrics = [{"step": 8, "loss": 2.0, "seconds": 3.25}, {"step": 8, "refresh_seconds": 1.5}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(metric) + "\n" for metric in metrics))
    result = _tool("tools/compare_importance.py", tmp_path / "first", tmp_path / "second")
    assert result.returncode == 0, result.stderr
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ 8 ")]
    assert [cell.strip() for cell in row.strip("│").split("│")][2:] == ["1.000", "-1.000", "0.583"]
    assert "1.50" in result.stdout
    assert "3.25" in result.stdout
