"""Whole runs of one rank, on the CPU or on a CUDA device of the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.finished_run import Finished
from harness.launching import ROOT
from harness.workspace import Workspace

STEPS = 7


def adept_on(device: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`adept ARGUMENTS` in a process of its own: forked ranks have settled on a device already."""
    env = os.environ | {"DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Products of matrices whose sums have a fixed order; read when cuBLAS starts.
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "adept_ds", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


def config_of(workspace: Workspace, run_dir: Path, stage: str = "zero3", **sections: Any) -> Path:
    """Two given copies: deltas that are close may change places. fp32, where `sections` say nothing else."""
    train = {"precision": "fp32", "steps": STEPS, "lr": 1e-3} | sections.pop("train", {})
    places = {"k": None, "layers": [1, 3]}
    return workspace.config(run_dir, deepspeed=f"ds_configs/{stage}.json", expand=places, train=train, **sections)


def run_on(device: str, workspace: Workspace, run_dir: Path, stage: str = "zero3", **sections: Any) -> Finished:
    result = adept_on(device, "run", config_of(workspace, run_dir, stage, **sections))
    assert result.returncode == 0, result.stderr
    return Finished(run_dir)
