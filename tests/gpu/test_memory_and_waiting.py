"""What a training step takes of a device's memory, and how often the host waits for the device meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.device_runs import adept_on, config_of
from harness.launching import ROOT
from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory

WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def test_peak_memory_is_what_weights_gradients_and_optimizer_take(tmp_path: Path) -> None:
    """In bf16: 2 bytes of each weight; of a trained one also 2 to 4 of gradient and 12 of the optimizer's weight and
    moments.

    Two sequences of 512 tokens at 1,024 wide are small beside them: at most 34 numbers of 2 bytes per layer, token and
    element, a wide layer's activations in full; and a vocabulary of 262. A tenth of room for the caching allocator's
    rounding.
    """
    save_tiny_model(tmp_path / "model", **WIDE)
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(tmp_path / f"{name}.jsonl", seed, documents=400)
    config = config_of(
        Workspace(tmp_path),
        tmp_path / "run",
        "zero2",
        data=Workspace(tmp_path).tree(tmp_path)["data"] | {"seq_len": 512},
        train={"precision": "bf16", "global_batch_size": 2, "micro_batch_size": 2, "eval_every": 0},
    )
    result = adept_on("cuda", "run", config)
    assert result.returncode == 0, result.stderr
    summary = read_json(RunDirectory(tmp_path / "run").summary)
    total, trained = summary["total_parameters"], summary["trainable_parameters"]
    (peak,) = summary["peak_memory_bytes"]
    least = 2 * total + 14 * trained
    activations = 34 * 2 * (WIDE["num_hidden_layers"] + 2) * 2 * 512 * WIDE["hidden_size"]
    assert least <= peak <= 1.1 * (2 * total + 16 * trained + activations)


PROGRAM = """
import json, sys, warnings
import torch
from adept_ds.cli.app import main
from adept_ds.training import trainer

found, whole = open(sys.argv.pop(1), "a", buffering=1), trainer.Trainer._train_step

def stepped(training, step):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = whole(training, step)
    torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{line.filename}:{line.lineno}"
        for line in caught
        if "synchronizing CUDA operation" in str(line.message) and "runtime/zero/stage" not in line.filename
    ]
    print(json.dumps([step, waits]), file=found)
    return outcome

trainer.Trainer._train_step = stepped
main()
"""


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_host_waits_for_the_device_once_in_a_step(stage: str, workspace: Workspace, tmp_path: Path) -> None:
    """As CUDA itself counts, from the third step on: before it, DeepSpeed compares what it has recorded of modules.
    That it waits for its own reductions at the end of each backward pass is not counted."""
    config = config_of(workspace, tmp_path / "run", stage, importance={"every": 100}, train={"eval_every": 0})
    env = os.environ | {"DS_ACCELERATOR": "cuda", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "found"), "run", str(config)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    steps = dict(json.loads(line) for line in (tmp_path / "found").read_text().splitlines())
    assert {step: len(waits) for step, waits in steps.items() if step >= 2} == dict.fromkeys(range(2, 7), 1), steps


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_kernels_change_nothing_but_rounding(kernels: str, workspace: Workspace, tmp_path: Path) -> None:
    """liger-kernel's, where it is installed, beside PyTorch's on the CPU."""
    pytest.importorskip("liger_kernel")
    losses = []
    for device, setting in (("cpu", "torch"), ("cuda", kernels)):
        result = adept_on(device, "run", config_of(workspace, tmp_path / device, train={"kernels": setting}))
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
