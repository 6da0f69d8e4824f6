"""A whole run in bf16, the default on accelerators: from the probe to the report, on two real ranks.

Beside it the same run in fp32. bf16 has 8 bits: a relative error of 2^-9 in each number, so losses agree to a few
thousandths, and sums over many gradients to some hundredths.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.workspace import Workspace

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag

STEPS = 5


@dataclass(frozen=True)
class Both:
    """The configuration of the run in bf16, and what both came to."""

    config: Path
    bf16: Finished
    fp32: Finished


@pytest.fixture(scope="module", params=[slow("zero2"), slow("zero3")])
def both(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder, configs = tmp_path_factory.mktemp("bf16"), {}
    for precision in ("bf16", "fp32"):
        configs[precision] = workspace.config(
            folder / precision,
            deepspeed=f"ds_configs/{request.param}.json",
            expand={"k": None, "layers": [1, 3]},  # deltas that are close may change places
            probe={"method": "mask"},
            train={"precision": precision, "steps": STEPS, "lr": 1e-3, "checkpoint_every": 2, "eval_every": 2},
        )
        result = adept(2, "run", configs[precision])
        assert result.returncode == 0, result.stderr
        assert adept(2, "probe", configs[precision]).returncode == 0
    return Both(configs["bf16"], Finished(folder / "bf16"), Finished(folder / "fp32"))


def test_it_trains_in_bf16_and_learns_what_fp32_learns(both: Both) -> None:
    files = RunDirectory(both.bf16.directory)
    assert read_json(files.summary)["precision"] == "bfloat16"
    assert files.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert both.bf16.losses() == pytest.approx(both.fp32.losses(), rel=5e-3)
    assert both.bf16.losses() != both.fp32.losses()
    for mine, other in zip(both.bf16.evaluations(), both.fp32.evaluations(), strict=True):
        for corpus, of in other.items():
            assert mine[corpus]["loss"] == pytest.approx(of["loss"], rel=5e-3)
    mine, other = (read_json(RunDirectory(run.directory).evaluation) for run in (both.bf16, both.fp32))
    for model in ("base", "adapted"):
        for corpus, of in other[model].items():
            assert mine[model][corpus]["loss"] == pytest.approx(of["loss"], rel=5e-3)


def test_layers_have_the_deltas_of_fp32(both: Both) -> None:
    """To 0.01 nats, where they differ by more than that."""
    mine, other = (read_json(RunDirectory(run.directory).layer_importance) for run in (both.bf16, both.fp32))
    deltas = [np.array([layer["delta"] for layer in found["layers"]]) for found in (mine, other)]
    assert np.ptp(deltas[1]) > 0.01
    assert deltas[0] == pytest.approx(deltas[1], abs=0.01)


def test_units_have_the_importances_of_fp32(both: Both) -> None:
    """At the start to 5%; later refreshes are of weights that bf16 rounds."""
    first, *later = zip(both.bf16.units("importance"), both.fp32.units("importance"), strict=True)
    assert len(later) == 2
    assert first[0] == pytest.approx(first[1], rel=0.05)


def test_weights_move_as_far_as_in_fp32(both: Both) -> None:
    """The optimizer's own weights are fp32, and what moves is measured on them."""
    mine, other = (run.movement()[-1]["units"] for run in (both.bf16, both.fp32))
    moved = [np.array([unit["moved_since_start"] for unit in units]) for units in (mine, other)]
    assert (moved[1] > 0).all()
    assert moved[0] == pytest.approx(moved[1], rel=0.1)


def test_it_resumes_bit_for_bit(both: Both) -> None:
    files, before, losses = RunDirectory(both.bf16.directory), both.bf16.weights(), both.bf16.losses()
    shutil.rmtree(files.checkpoints / checkpoint_tag(STEPS))
    result = adept(2, "run", both.config)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout
    after = both.bf16.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert both.bf16.losses() == losses
