"""Whole runs on one CUDA device, beside the same runs on the machine's CPU.

Both compute in fp32 (PyTorch takes no TF32 for matrix products unless it is told to), with sums in another order:
relative errors of some 1e-6 in losses and gradients. AdamW divides a gradient by its size, so a weight whose gradient
is near zero may differ by as much as it moves: by 1e-3 times the number of steps at most; nearly all of them agree to a
hundredth of that.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.device_runs import STEPS, adept_on, config_of, run_on
from harness.finished_run import Finished
from harness.workspace import Workspace

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag

RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": "zero1"},
    "zero2": {"stage": "zero2"},
    "zero3": {"stage": "zero3"},
    "offload": {"stage": "zero3_offload"},
    "parameters offloaded": {"stage": "zero3_offload_params"},
    "ZeRO++": {"stage": "zeropp"},
    "fine units": {"stage": "zero3", "importance": {"granularity": "fine"}},
    "recomputed": {"stage": "zero3", "train": {"activation_checkpointing": True}},
    "compiled": {"stage": "zero2", "train": {"compile": "auto"}},
    "anchored": {"stage": "zero2", "anchor": {"kind": "kl", "share": 0.5}},
}


def assert_same_weights(found: Finished, expected: Finished) -> None:
    mine, other = found.weights(), expected.weights()
    assert mine.keys() == other.keys()
    difference = torch.cat([(mine[name].cpu() - other[name]).abs().flatten() for name in other])
    assert float(difference.max()) <= 1e-3 * STEPS
    assert float((difference > 1e-5 * STEPS).float().mean()) < 1e-3


@pytest.fixture(scope="module")
def on_cpu(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_on("cpu", workspace, tmp_path_factory.mktemp("cpu") / "run")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_device_comes_to_what_it_comes_to_on_the_cpu(
    name: str, workspace: Workspace, on_cpu: Finished, tmp_path: Path
) -> None:
    """From the probe to the export, with the kernels of the device: unit rates in one Triton pass."""
    sections = dict(RUNS[name])
    stage = sections.pop("stage")
    expected = run_on("cpu", workspace, tmp_path / "cpu", stage, **sections) if sections else on_cpu
    found = run_on("cuda", workspace, tmp_path / "cuda", stage, **sections)
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-4)
    for mine, other in zip(found.evaluations(), expected.evaluations(), strict=True):
        for corpus, of in other.items():
            assert mine[corpus]["loss"] == pytest.approx(of["loss"], rel=1e-4)
    assert found.units("importance")[0] == pytest.approx(expected.units("importance")[0], rel=1e-3)
    assert found.units("multiplier")[0] == pytest.approx(expected.units("multiplier")[0], abs=1e-3)
    assert_same_weights(found, expected)


def test_layers_have_the_deltas_of_the_cpu(workspace: Workspace, tmp_path: Path) -> None:
    deltas = []
    for device in ("cpu", "cuda"):
        result = adept_on(device, "probe", config_of(workspace, tmp_path / device, probe={"method": "mask"}))
        assert result.returncode == 0, result.stderr
        layers = read_json(RunDirectory(tmp_path / device).layer_importance)["layers"]
        deltas.append([layer["delta"] for layer in layers])
    assert deltas[1] == pytest.approx(deltas[0], abs=1e-4)


def test_bf16_is_the_default_and_learns_what_fp32_learns(
    workspace: Workspace, on_cpu: Finished, tmp_path: Path
) -> None:
    """bf16 has 8 bits: losses agree to a few thousandths."""
    found = run_on("cuda", workspace, tmp_path / "run", train={"precision": "auto"})
    assert read_json(RunDirectory(found.directory).summary)["precision"] == "bfloat16"
    assert found.losses() == pytest.approx(on_cpu.losses(), rel=5e-3)
    assert found.losses() != on_cpu.losses()
    moved = [[unit["moved_since_start"] for unit in run.movement()[-1]["units"]] for run in (found, on_cpu)]
    assert moved[0] == pytest.approx(moved[1], rel=0.1)


@pytest.mark.parametrize("stage", ["zero1", "zero3", "zero3_offload"])
def test_a_run_that_was_cut_comes_to_what_the_whole_one_came_to(
    stage: str, workspace: Workspace, tmp_path: Path
) -> None:
    """Attention's backward pass adds up in no fixed order on a device, so it is no comparison of bits: a lost moment or
    a wrong batch would show as 1e-3, rounding as 1e-6."""
    whole = run_on("cuda", workspace, tmp_path / "run", stage, train={"checkpoint_every": 3})
    losses, weights = whole.losses(), whole.weights()
    files = RunDirectory(whole.directory)
    shutil.rmtree(files.checkpoints / checkpoint_tag(STEPS))
    result = adept_on("cuda", "run", config_of(workspace, tmp_path / "run", stage, train={"checkpoint_every": 3}))
    assert result.returncode == 0, result.stderr
    assert "resuming after step 6" in result.stdout
    assert whole.losses() == pytest.approx(losses, rel=1e-5)
    after = whole.weights()
    for name, tensor in weights.items():
        assert float((after[name] - tensor).abs().max()) <= 1e-5, name


def test_a_checkpoint_of_the_cpu_goes_on_on_the_device(workspace: Workspace, on_cpu: Finished, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(on_cpu.directory, copied)
    files = RunDirectory(copied)
    shutil.rmtree(files.checkpoints / checkpoint_tag(STEPS))
    result = adept_on("cuda", "run", config_of(workspace, copied))
    assert result.returncode == 0, result.stderr
    assert "resuming after step 6" in result.stdout
    assert Finished(copied).losses() == pytest.approx(on_cpu.losses(), rel=1e-4)
    assert_same_weights(Finished(copied), on_cpu)
