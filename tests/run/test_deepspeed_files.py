"""Whole runs under DeepSpeed files that users bring: "auto" in one, hpZ in another, change no number that comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.finished_run import Finished
from harness.forgetting import write_held_out
from harness.launching import adept
from harness.marks import slow
from harness.trainer_files import trainer_file
from harness.workspace import Workspace

from adept_ds.base.dial_record import DialRecord
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag

WIDTH = 20
"""Of the workspace's model."""


def run_under(workspace: Workspace, run_dir: Path, ranks: int, tree: dict[str, Any], **sections: Any) -> Finished:
    path = run_dir.with_suffix(".json")
    path.write_text(json.dumps(tree))
    result = adept(ranks, "run", workspace.config(run_dir, deepspeed=str(path), **sections))
    assert result.returncode == 0, result.stderr
    return Finished(run_dir)


def assert_same_run(found: Finished, wanted: Finished) -> None:
    """To the last bit."""
    assert found.losses() == wanted.losses()
    assert found.evaluations() == wanted.evaluations()
    assert found.units("importance") == wanted.units("importance")
    mine, other = found.weights(), wanted.weights()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], weight) for name, weight in other.items())


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_a_file_of_the_trainer_runs_as_if_every_auto_were_written_out(
    workspace: Workspace, tmp_path: Path, stage: int
) -> None:
    """Numbers worked out here by hand: on two ranks, 12 sequences in micro-batches of 2 are 3 of them."""
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
    auto = trainer_file(stage, scheduler=scheduler)
    params = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    sizes: dict[str, Any] = {"reduce_bucket_size": WIDTH**2}
    if stage == 3:
        sizes |= {"stage3_prefetch_bucket_size": 360, "stage3_param_persistence_threshold": 10 * WIDTH}
    numbers = trainer_file(
        stage,
        train_batch_size=12,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=3,
        gradient_clipping=0.5,
        optimizer={"params": params},
        scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": 7, "warmup_num_steps": 3}},
        fp16={"enabled": False},
        bf16={"enabled": False},
        zero_optimization=sizes,
    )
    assert "auto" in json.dumps(auto) and "auto" not in json.dumps(numbers)
    found, wanted = (run_under(workspace, tmp_path / name, 2, {"a": auto, "b": numbers}[name]) for name in "ab")
    assert_same_run(found, wanted)


@pytest.fixture
def apart(workspace: Workspace, tmp_path: Path) -> Workspace:
    """The same with held-out text that a dial can decide by."""
    shutil.copytree(workspace.root, tmp_path / "inputs")
    write_held_out(tmp_path / "inputs")
    return Workspace(tmp_path / "inputs")


@pytest.mark.parametrize("ranks", [slow(2), slow(4)])
def test_hpz_changes_no_number_of_a_run_its_dial_and_what_goes_on(apart: Workspace, tmp_path: Path, ranks: int) -> None:
    """Groups of two ranks gather what one of all ranks gathers: the same bits, in every engine that a run builds.

    Nothing stays gathered, so that all passes go through the second partition; the dial writes weights between passes.
    """
    sections: dict[str, Any] = {
        "data": {
            "general_eval": [str(apart.root / "letters.jsonl")],
            "domain_eval": [str(apart.root / "words.jsonl")],
            "eval_sequences": 200,
        },
        "dial": {"alphas": [0.5]},
        "train": {"steps": 4, "checkpoint_every": 2, "keep_gathered_gib": 0, "micro_batch_size": 1},
    }
    plain = {"stage": 3, "stage3_param_persistence_threshold": 0}
    wanted, found = (
        run_under(apart, tmp_path / name, ranks, {"zero_optimization": zero}, **sections)
        for name, zero in {"plain": plain, "hpz": plain | {"zero_hpz_partition_size": 2}}.items()
    )
    assert_same_run(found, wanted)
    dials = [DialRecord.load(RunDirectory(run.directory).dial) for run in (found, wanted)]
    assert dials[0].chosen == dials[1].chosen
    for mine, other in zip(dials[0].positions, dials[1].positions, strict=True):
        assert (mine.alphas, mine.test) == (other.alphas, other.test)
    losses, weights = found.losses(), found.weights()
    files = RunDirectory(found.directory)
    shutil.rmtree(files.checkpoints / checkpoint_tag(4))
    result = adept(ranks, "run", found.directory.with_suffix(".yaml"))
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    assert found.losses() == losses
    assert all(torch.equal(found.weights()[name], weight) for name, weight in weights.items())
