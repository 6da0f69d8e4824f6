"""ZeRO++'s quantised weights, which DeepSpeed has for CUDA alone and takes only between ranks: two devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.finished_run import Finished
from harness.launching import ROOT
from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus

EIGHTS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
"""Every rank's share of every matrix is a multiple of 8 elements, as DeepSpeed's kernel wants it."""


def run_under(workspace: Workspace, run_dir: Path, **zero: Any) -> Finished:
    path = run_dir.with_suffix(".json")
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100} | zero}))
    train = {"precision": "fp32", "lr": 1e-3, "micro_batch_size": 1, "keep_gathered_gib": 0}
    places = {"k": None, "layers": [1, 3]}
    config = workspace.config(run_dir, deepspeed=str(path), expand=places, train=train)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["-m", "adept_ds", "run", str(config)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return Finished(run_dir)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("hpz", [1, 2])
def test_a_run_with_quantised_weights_is_near_the_exact_one_and_keeps_frozen_weights(tmp_path: Path, hpz: int) -> None:
    """Weights rounded to 1/128 of a group's largest: losses to a fiftieth, not to the bit. What is exported of frozen
    layers was never rounded."""
    save_tiny_model(tmp_path / "model", vocab_size=264, **EIGHTS)
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(tmp_path / f"{name}.jsonl", seed)
    workspace = Workspace(tmp_path)
    exact = run_under(workspace, tmp_path / "exact", zero_hpz_partition_size=hpz)
    rounded = run_under(workspace, tmp_path / "rounded", zero_hpz_partition_size=hpz, zero_quantized_weights=True)
    assert rounded.losses() == pytest.approx(exact.losses(), rel=2e-2)
    assert rounded.losses() != exact.losses()
    mine, other = rounded.weights(), exact.weights()
    frozen = [name for name in other if ".layers." in name and name.split(".")[2] not in ("2", "5")]
    assert frozen and all(torch.equal(mine[name], other[name]) for name in frozen)
