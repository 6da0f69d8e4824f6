"""`adept train CONFIG --decay-from STEP`: a branch is what a run of its length would have been, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.workspace import Workspace

from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.config.loading import load_config

TRUNK, STEP, BRANCH = 12, 4, 5
"""Steps of the trunk, which warms up in 3 and is flat until step 9; where it is decayed; how long the branch is."""


def configured(workspace: Workspace, run_dir: Path, stage: int, **train: Any) -> Path:
    zero = run_dir.with_suffix(".json")
    write_json(zero, {"zero_optimization": {"stage": stage}})
    schedule = {"schedule": "wsd", "steps": TRUNK, "warmup_ratio": 0.25, "checkpoint_every": 2, "keep_checkpoints": 9}
    tree = workspace.tree(run_dir, deepspeed=str(zero), train={"eval_every": 2} | schedule | train)
    if "warmup_steps" in train:
        del tree["train"]["warmup_ratio"]
    write_json(run_dir.with_suffix(".yaml"), tree)  # which is YAML too
    return run_dir.with_suffix(".yaml")


@dataclass(frozen=True)
class Runs:
    """A trunk, what was decayed from it, and a run of that length from scratch."""

    world_size: int
    config_file: Path
    trunk: RunDirectory
    branch: RunDirectory
    scratch: RunDirectory


@pytest.fixture(scope="module", params=[(1, 2), (2, 3)], ids=lambda cell: f"{cell[0]} ranks zero{cell[1]}")
def runs(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A refresh every two steps, so that importances go on too."""
    world_size, stage = request.param
    folder = tmp_path_factory.mktemp("decay")
    file = configured(workspace, folder / "trunk", stage)
    scratch = configured(workspace, folder / "scratch", stage, steps=BRANCH, warmup_steps=3)
    for command in (("run", file), ("train", file, "--decay-from", STEP), ("run", scratch)):
        result = adept(world_size, *command)
        assert result.returncode == 0, result.stderr
    trunk = RunDirectory(folder / "trunk")
    return Runs(world_size, file, trunk, RunDirectory(trunk.decayed_from(STEP)), RunDirectory(folder / "scratch"))


def test_it_trains_nothing_but_the_decay(runs: Runs) -> None:
    """The record of steps before it is the trunk's own, with the same seconds."""
    trunk, branch = Finished(runs.trunk.root).steps(), Finished(runs.branch.root).steps()
    assert [record["step"] for record in branch] == list(range(1, BRANCH + 1))
    assert branch[:STEP] == trunk[:STEP]
    assert [record["lr"] for record in branch[3:]] == [1e-2, 1e-2], "one step decays, of which the first is full"
    assert read_json(runs.branch.summary)["steps"] == BRANCH


def test_it_is_what_a_run_of_that_length_is(runs: Runs) -> None:
    """Losses, evaluations, refreshes, and after `adept run` the exported weights and their evaluation: bit for bit."""
    result = adept(runs.world_size, "run", runs.branch.config)
    assert result.returncode == 0, result.stderr
    branch, scratch = Finished(runs.branch.root), Finished(runs.scratch.root)
    assert branch.losses() == scratch.losses()
    assert branch.evaluations() == scratch.evaluations()
    assert branch.units("multiplier") == scratch.units("multiplier")
    assert branch.movement() == scratch.movement()
    assert branch.weights().keys() == scratch.weights().keys()
    assert all(torch.equal(tensor, scratch.weights()[name]) for name, tensor in branch.weights().items())
    assert read_json(runs.branch.evaluation) == read_json(runs.scratch.evaluation)
    assert runs.branch.report.is_file()
    probed = [line for line in result.stdout.splitlines() if line.startswith(("probe", "expand"))]
    assert all("unchanged" in line for line in probed), probed


def test_it_resumes_and_a_finished_one_is_left_alone(runs: Runs) -> None:
    before = Finished(runs.branch.root).losses()
    again = adept(runs.world_size, "train", runs.config_file, "--decay-from", STEP)
    assert again.returncode == 0, again.stderr
    assert "not run again" in again.stdout
    shutil.rmtree(runs.branch.checkpoints / checkpoint_tag(BRANCH))
    again = adept(runs.world_size, "train", runs.config_file, "--decay-from", STEP)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {STEP}" in again.stdout
    assert Finished(runs.branch.root).losses() == before


def test_what_it_takes_over_is_not_copied_and_outlives_the_trunk(runs: Runs, tmp_path: Path) -> None:
    """The same files under second names; the trunk's checkpoint is as it was."""
    ours, theirs = (run.checkpoints / checkpoint_tag(STEP) for run in (runs.branch, runs.trunk))
    names = [file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file() and file != manifest_of(theirs)]
    assert len(names) > 2
    assert all((ours / name).samefile(theirs / name) for name in names)
    assert read_json(manifest_of(theirs))["settings"]["train.steps"] == TRUNK
    assert checkpoint_steps(runs.trunk.checkpoints) == [2, 4, 6, 8, 10, 12]
    alone = tmp_path / "alone"
    shutil.copytree(runs.branch.root, alone)
    tree = yaml.safe_load(runs.branch.config.read_text()) | {"run_dir": str(alone)}
    write_json(tmp_path / "alone.yaml", tree)
    shutil.rmtree(alone / "checkpoints" / checkpoint_tag(BRANCH))
    result = adept(runs.world_size, "train", tmp_path / "alone.yaml")
    assert result.returncode == 0, result.stderr
    assert Finished(alone).losses() == Finished(runs.scratch.root).losses()


def test_it_may_be_written_elsewhere(runs: Runs, tmp_path: Path) -> None:
    place = tmp_path / "branch"
    result = adept(runs.world_size, "train", runs.config_file, "--decay-from", 8, "--decay-dir", place)
    assert result.returncode == 0, result.stderr
    assert load_config(RunDirectory(place).config).train.steps == 10
    assert [record["step"] for record in Finished(place).steps()] == list(range(1, 11))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["--decay-from", 2], ["--decay-from: 2", "warmup", "from 3 to 9"], id="warming up"),
        pytest.param(["--decay-from", 10], ["--decay-from: 10", "decay", "from 3 to 9"], id="decaying"),
        pytest.param(
            ["--decay-from", 5],
            ["--decay-from", "no checkpoint of step 5", "[4, 6, 8]", "train.keep_checkpoints (now 9)"],
            id="no checkpoint",
        ),
        pytest.param(["--decay-from", 4, "train.lr=1e-3"], ["train.lr", "0.01, not 0.001"], id="another training"),
        pytest.param(["--decay-dir", "x"], ["--decay-dir: 'x'", "--decay-from"], id="a place alone"),
    ],
)
def test_what_cannot_be_decayed_is_refused_in_one_line(runs: Runs, arguments: list[Any], parts: list[str]) -> None:
    overrides = [f"{argument}" for argument in arguments if "=" in str(argument)]
    options = [argument for argument in arguments if "=" not in str(argument)]
    if overrides:
        options += ["--decay-dir", runs.trunk.root.parent / "never"]
    result = adept(runs.world_size, "train", runs.config_file, *overrides, *options)
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, parts)


def test_a_schedule_without_a_flat_part_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    result = adept(1, "train", workspace.config(tmp_path / "run"), "--decay-from", 3)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["--decay-from", "cosine", "train.schedule: wsd"])


def test_the_trunk_is_not_its_own_branch(runs: Runs) -> None:
    result = adept(1, "train", runs.config_file, "--decay-from", STEP, "--decay-dir", runs.trunk.root)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["--decay-dir", "is or holds"])
