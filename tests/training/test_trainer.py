"""Steps that are skipped, and training that breaks down: on real ranks, with faults that are planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_oracle
import oracle
import pytest
import torch
from harness.forgetting import write_held_out
from harness.launching import adept, launch
from harness.method_runs import MIDDLE, MethodRun
from harness.workspace import Workspace

from adept_ds.base.files import read_json, read_json_lines
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.training.checkpoint import CheckpointManifest

PROGRAM = """
import json, os, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from adept_ds.cli.app import main
from adept_ds.training import trainer

faults = json.loads(sys.argv.pop(1))          # step, from 0, as text -> what is wrong with it
counts = sys.argv.pop(1)
whole_step, whole_gradient = trainer.Trainer._train_step, trainer.accumulate_gradient
now, is_last = 0, os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

class Waits(TorchDispatchMode):
    # How often the host asks the device for a number.
    asked = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Waits.asked += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

def stepped(training, step):
    global now
    now, Waits.asked = step, 0
    if faults.get(str(step)) == "weight":
        for flat in training.engine.optimizer.fp32_partitioned_groups_flat:
            flat.data[:1] = float("nan")
    with Waits():
        found = whole_step(training, step)
    if is_last:
        with open(counts, "a") as file:
            file.write(json.dumps([step, Waits.asked]) + "\\n")
    return found

def planted(engine, batch, online=None, further=()):
    fault, hooks = faults.get(str(now)), []
    if fault == "gradient" and is_last:
        first = next(p for p in engine.module.parameters() if p.requires_grad)
        hooks = [first.register_hook(lambda gradient: gradient * float("inf"))]
    losses = whole_gradient(engine, batch, online, further)
    for hook in hooks:
        hook.remove()
    if is_last and fault in ("nan", "inf"):
        losses[0] = float(fault)
    if fault == "spike":
        losses[0] *= 1000
    return losses

trainer.Trainer._train_step, trainer.accumulate_gradient = stepped, planted
main()
"""
"""Faults of the last rank alone, but for weights, and of the loss as it is told, but for gradients and weights."""

FAULTS = {1: "nan", 3: "gradient", 5: "spike", 6: "inf"}
STEPS = 8
HELD_OUT = {"general": "letters.jsonl", "domain": "words.jsonl"}


def run_with_faults(world_size: int, faults: dict[int, str], folder: Path, *arguments: object) -> Any:
    return launch(world_size, ["-c", PROGRAM, json.dumps(faults), str(folder / "counts"), *map(str, arguments)])


STAGES = (2, 3)
"""Of ZeRO: each looks at gradients in its own way."""


@pytest.fixture(scope="module")
def skipping(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, MethodRun]:
    """By stage, eight steps on two ranks, of which four are skipped."""
    return {stage: skip_steps(workspace, tmp_path_factory.mktemp(f"zero{stage}"), stage) for stage in STAGES}


def skip_steps(workspace: Workspace, folder: Path, stage: int) -> MethodRun:
    train = {"steps": STEPS, "checkpoint_every": MIDDLE, "keep_checkpoints": 9, "spike_sigma": 6.0, "spike_window": 4}
    sections = {"train": workspace.tree(folder)["train"] | train}
    run = MethodRun(workspace, folder, {"name": "full"}, stage, 2, sections)
    result = run_with_faults(2, FAULTS, run.folder, "run", run.file)
    assert result.returncode == 0, result.stderr
    (run.folder / "said").write_text(result.stdout)
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_of_one_rank_lets_all_of_them_pass_over_the_step(skipping: dict[int, MethodRun], stage: int) -> None:
    """What is left is plain AdamW on the other batches: no weight, no moment and no count saw the skipped ones.

    Losses to 1e-5, exported weights to 5e-5 of steps of 1e-2.
    """
    run, taken = skipping[stage], [step for step in range(STEPS) if step not in FAULTS]
    batches, rates = run.steps(), run.rates()
    model = oracle.load(run.workspace.model)
    wanted = method_oracle.train(
        model, [batches[step] for step in taken], [rates[step] for step in taken], dict(run.config.train)
    )
    losses = run.finished.losses()
    assert [losses[step] for step in taken] == pytest.approx(wanted.losses, abs=1e-5)
    exported = run.finished.weights()
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 5e-5, name


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_steps_are_told_and_counted(skipping: dict[int, MethodRun], stage: int) -> None:
    run = skipping[stage]
    records = {record["step"] - 1: record for record in run.finished.steps()}
    told = {step: record["skipped"] for step, record in records.items() if "skipped" in record}
    assert told == {1: "loss", 3: "gradient", 5: "loss spike", 6: "loss"}
    assert [records[step]["skipped_steps"] for step in told] == [1, 2, 3, 4]
    assert (records[1]["loss"], records[1]["ranks"], records[3]["grad_norm"]) == (None, [1], None)
    assert read_json(run.files.summary)["skipped_steps"] == 4
    said = (run.folder / "said").read_text()
    assert "step 2 is skipped on all ranks: loss is no number on rank 1 alone" in said
    assert "step 4 is skipped on all ranks: gradient is no number" in said
    assert "step 6 is skipped on all ranks: loss spike" in said


@pytest.mark.parametrize("stage", STAGES)
def test_the_rule_asks_the_device_for_no_number_more(skipping: dict[int, MethodRun], stage: int) -> None:
    """A step that is compared with those before it waits no more often than one that has too few before it."""
    asked = dict(read_lines(skipping[stage].folder / "counts"))
    assert asked[2] == asked[4] == asked[7] > 0
    assert asked[5] == asked[2], "nor does one that is skipped as a spike"


def test_skipping_resumes_bit_for_bit(skipping: dict[int, MethodRun]) -> None:
    """From a checkpoint between faults: the spike is one by the steps before the checkpoint."""
    run = skipping[3]
    before, losses = run.finished.weights(), run.finished.losses()
    for step in checkpoint_steps(run.files.checkpoints)[2:]:
        shutil.rmtree(run.files.checkpoints / checkpoint_tag(step))
    left = checkpoint_steps(run.files.checkpoints)[-1]
    assert 4 < left < 6, "a save that falls on a skipped step is made up for after the next one that is taken"
    result = run_with_faults(2, FAULTS, run.folder, "run", run.file)
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {left}" in result.stdout
    assert repr(run.finished.losses()) == repr(losses)
    again = run.finished.weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())
    assert read_json(run.files.summary)["skipped_steps"] == 4


def test_a_skipped_step_is_not_the_best_of_the_guard(workspace: Workspace, tmp_path: Path) -> None:
    """It gets no checkpoint, and what the guard names as its result is one that there is; here no other was good."""
    write_held_out(workspace.root)
    texts = {f"{name}_eval": [str(workspace.root / file)] for name, file in HELD_OUT.items()}
    config = workspace.config(
        tmp_path / "run",
        data=texts | {"eval_sequences": 200},
        expand={"k": None, "layers": [1, 3]},
        importance={"initial": "ones", "every": 100},
        train={"steps": STEPS, "eval_every": 2, "checkpoint_every": 100, "lr": 0.05},
        guard={"action": "stop"},
    )
    result = run_with_faults(1, {1: "nan"}, tmp_path, "run", config)
    run = RunDirectory(config.with_suffix(""))
    readings = {line["step"]: line["guard"]["forgotten"] for line in read_json_lines(run.metrics) if "guard" in line}
    assert readings == {0: False, 2: False, 4: True}, "or this shows nothing"
    assert result.returncode == 2
    assert "no checkpoint has less" in result.stderr
    assert read_json(run.guard)["best"] == 0


# --- training that breaks down --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The configuration of a run whose weights step 5 breaks, and what it said."""
    return broken_after(4, workspace, tmp_path_factory.mktemp("broken"))


def broken_after(steps: int, workspace: Workspace, folder: Path) -> tuple[Path, str]:
    config = workspace.config(
        folder / "run",
        expand={"k": None, "layers": [1]},
        train={"steps": 12, "checkpoint_every": 2, "max_skipped": 4, "eval_every": 0},
        importance={"initial": "ones", "every": 100},
    )
    result = run_with_faults(2, {steps: "weight"}, config.parent, "run", config)
    assert result.returncode == 2, result.stderr
    return config, result.stderr


def test_training_that_breaks_down_ends_in_one_line_with_the_remedy(broken: tuple[Path, str]) -> None:
    config, said = broken
    (line,) = said.splitlines()
    assert line == (
        "adept: train.lr: with 0.01, steps 6 to 9 were skipped, the last since its loss is no number "
        "(train.max_skipped); lower it, and run the same command again: it goes on after step 4"
    )
    run = RunDirectory(config.with_suffix(""))
    assert [record["step"] for record in read_json_lines(run.metrics) if "skipped" in record] == [6, 7, 8, 9]
    assert read_json(run.summary)["skipped_steps"] == 4


def test_nothing_of_the_broken_state_takes_the_place_of_the_last_good_checkpoint(broken: tuple[Path, str]) -> None:
    run = RunDirectory(broken[0].with_suffix(""))
    assert checkpoint_steps(run.checkpoints) == [2, 4]
    assert (run.checkpoints / "latest").read_text() == "step_4"


def test_weights_that_are_no_numbers_become_no_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    """They were broken by the step before it, whose own loss was one."""
    config, said = broken_after(3, workspace, tmp_path)
    (line,) = said.splitlines()
    assert line == (
        "adept: train.lr: with 0.01, weights are no numbers after step 4; lower it, and run the same command again: "
        "it goes on after step 2"
    )
    checkpoints = RunDirectory(config.with_suffix("")).checkpoints
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["step_2"]


def test_it_goes_on_from_there_with_a_lower_rate(broken: tuple[Path, str]) -> None:
    config, _ = broken
    lower = adept(2, "run", config, "train.lr=0.001")
    assert lower.returncode == 0, lower.stderr
    assert "resuming after step 4" in lower.stdout
    run = RunDirectory(config.with_suffix(""))
    rates = [record["lr"] for record in read_json_lines(run.metrics) if "loss" in record]
    assert len(rates) == 12 and max(rates[:4]) > 2e-3 and max(rates[4:]) <= 1e-3
    assert read_json(run.summary)["given_up_lr"] == [0.01]
    newest = CheckpointManifest.load(manifest_of(run.checkpoints / "step_12"))
    assert newest.settings["train.lr"] == 0.001


def test_a_rate_that_nobody_means_is_refused_before_anything_is_done(broken: tuple[Path, str]) -> None:
    config, _ = broken
    before = contents(config.with_suffix(""))
    result = adept(1, "run", config, "train.lr=1e6")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "train.lr: 1000000.0 is not possible: input should be less than or equal to 10" in line
    assert contents(config.with_suffix("")) == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def read_lines(path: Path) -> Iterator[Any]:
    return (json.loads(line) for line in path.read_text().splitlines())
