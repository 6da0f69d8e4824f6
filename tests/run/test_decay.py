"""`adept train CONFIG --decay-from STEP`: a branch is what a run of its length would have been, bit for bit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.cli.run import train as cli_train
from adept_ds.config.decaying import decayed
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config

TRUNK, STEP, BRANCH = 12, 8, 10
"""Steps of the trunk, which warms up in 3 and is flat until step 9; where it is decayed; how long the branch is."""


def configured(workspace: Workspace, run_dir: Path, stage: int, **train: Any) -> Path:
    zero = run_dir.with_suffix(".json")
    write_json(zero, {"zero_optimization": {"stage": stage}})
    schedule = {"schedule": "wsd", "steps": TRUNK, "warmup_ratio": 0.25, "checkpoint_every": 2, "keep_checkpoints": 9}
    train = {"eval_every": 2} | schedule | train
    anchor = {"kind": "neutral", "text": "sampled", "sequences": 4}
    tree = workspace.tree(run_dir, deepspeed=str(zero), train=train, anchor=anchor)
    if "warmup_steps" in train:
        del tree["train"]["warmup_ratio"]
    write_json(run_dir.with_suffix(".yaml"), tree)  # which is YAML too
    return run_dir.with_suffix(".yaml")


@dataclass(frozen=True)
class Runs:
    """A trunk, what was decayed from it, and a run of that length from scratch."""

    world_size: int
    stage: int
    config_file: Path
    trunk: RunDirectory
    branch: RunDirectory
    scratch: RunDirectory


def trained(workspace: Workspace, folder: Path, world_size: int, stage: int) -> Runs:
    """A refresh every two steps, so that importances go on too."""
    file = configured(workspace, folder / "trunk", stage)
    scratch = configured(workspace, folder / "scratch", stage, steps=BRANCH, warmup_steps=3)
    for command in (("run", file), ("train", file, "--decay-from", STEP), ("run", scratch)):
        result = adept(world_size, *command)
        assert result.returncode == 0, result.stderr
    trunk = RunDirectory(folder / "trunk")
    branch = RunDirectory(trunk.decayed_from(STEP))
    return Runs(world_size, stage, file, trunk, branch, RunDirectory(folder / "scratch"))


CELLS = [(1, 2), slow((2, 3))]
"""Ranks and ZeRO stages."""


@pytest.fixture(scope="module")
def every_cell(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, int]], Runs]:
    return functools.cache(lambda cell: trained(workspace, tmp_path_factory.mktemp("decay"), *cell))


@pytest.fixture(params=CELLS, ids=lambda cell: f"ranks{cell[0]}-zero{cell[1]}")
def runs(request: pytest.FixtureRequest, every_cell: Callable[[tuple[int, int]], Runs]) -> Runs:
    return every_cell(request.param)


@pytest.fixture
def alone(every_cell: Callable[[tuple[int, int]], Runs]) -> Runs:
    """On one rank."""
    return every_cell((1, 2))


def test_it_trains_nothing_but_the_decay(runs: Runs) -> None:
    """The record of steps before it is the trunk's own, with the same seconds."""
    trunk, branch = Finished(runs.trunk.root).steps(), Finished(runs.branch.root).steps()
    assert [record["step"] for record in branch] == list(range(1, BRANCH + 1))
    assert branch[:STEP] == trunk[:STEP]
    assert [record["lr"] for record in branch[STEP - 1 :]] == [1e-2, 1e-2, 5e-3], "linear, to 0 after the last"
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
    assert all(f"{stage} unchanged" in " ".join(result.stdout.split()) for stage in ("probe", "expand"))


def test_it_resumes_bit_for_bit(runs: Runs) -> None:
    before = Finished(runs.branch.root).losses()
    shutil.rmtree(runs.branch.checkpoints / checkpoint_tag(BRANCH))
    again = adept(runs.world_size, "train", runs.config_file, "--decay-from", STEP)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {STEP}" in again.stdout
    assert Finished(runs.branch.root).losses() == before


def test_what_it_takes_over_is_not_copied_and_needs_no_trunk(alone: Runs, tmp_path: Path) -> None:
    """The same files under second names; the trunk's checkpoints are as they were. A copy elsewhere is a whole run."""
    ours, theirs = (run.checkpoints / checkpoint_tag(STEP) for run in (alone.branch, alone.trunk))
    names = [file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file() and file != manifest_of(theirs)]
    assert len(names) >= 2
    assert all((ours / name).samefile(theirs / name) for name in names)
    assert alone.branch.anchor_text.samefile(alone.trunk.anchor_text), "text that the base wrote"
    assert read_json(manifest_of(theirs))["settings"]["train.steps"] == TRUNK
    assert checkpoint_steps(alone.trunk.checkpoints) == [2, 4, 6, 8, 10, 12]
    copied = tmp_path / "copied"
    shutil.copytree(alone.branch.root, copied)
    tree = yaml.safe_load(alone.branch.config.read_text()) | {"run_dir": str(copied)}
    write_json(tmp_path / "copied.yaml", tree)
    shutil.rmtree(copied / "checkpoints" / checkpoint_tag(BRANCH))
    result = adept(1, "train", tmp_path / "copied.yaml")
    assert result.returncode == 0, result.stderr
    assert Finished(copied).losses() == Finished(alone.scratch.root).losses()


def test_other_ranks_may_decay_it(runs: Runs, tmp_path: Path) -> None:
    """As many as the trunk had not, at another stage: a loss of about 5 to 1e-5, after what gradients differ by."""
    place, zero = tmp_path / "decayed", tmp_path / "other.json"
    write_json(zero, {"zero_optimization": {"stage": 5 - runs.stage}})
    options = (f"deepspeed={zero}", "--decay-from", STEP, "--decay-dir", place)
    result = adept(3 - runs.world_size, "train", runs.config_file, *options)
    assert result.returncode == 0, result.stderr
    written, read = ("1 rank", "2 ranks") if runs.world_size == 1 else ("2 ranks", "1 rank")
    assert f"written by {written} under ZeRO-{runs.stage}, on {read} under ZeRO-{5 - runs.stage}" in result.stdout
    assert Finished(place).losses() == pytest.approx(Finished(runs.scratch.root).losses(), abs=1e-5)


def test_a_trunk_trained_otherwise_is_no_trunk_of_it(alone: Runs, tmp_path: Path) -> None:
    place = tmp_path / "never"
    result = adept(1, "train", alone.config_file, "train.lr=1e-3", "--decay-from", STEP, "--decay-dir", place)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["train.lr", "0.01, not 0.001"])
    assert not checkpoint_steps(RunDirectory(place).checkpoints)


# --- which runs can be decayed, from where ---------------------------------------------------------------------------


def trunk_of(workspace: Workspace, run_dir: Path, **train: Any) -> Config:
    return load_config(configured(workspace, run_dir, 3, **train))


def test_the_branch_differs_in_its_length_and_its_place_alone(workspace: Workspace, tmp_path: Path) -> None:
    trunk = trunk_of(workspace, tmp_path / "trunk")
    branch = decayed(trunk, 8, tmp_path / "branch")
    assert branch.run_dir == tmp_path / "branch"
    assert (branch.train.steps, branch.train.num_warmup_steps, branch.train.flat_until) == (10, 3, 8)
    both = [config.model_dump(mode="json") for config in (trunk, branch)]
    for tree in both:
        del tree["run_dir"]
        for key in ("steps", "warmup_ratio", "warmup_steps"):
            tree["train"].pop(key, None)
    assert both[0] == both[1]
    assert decayed(trunk, 8).run_dir == tmp_path / "trunk" / "decay_from_8"


@pytest.mark.parametrize(
    ("step", "train", "parts"),
    [
        pytest.param(2, {}, ["--decay-from: 2", "warmup", "from 3 to 9"], id="warming up"),
        pytest.param(10, {}, ["--decay-from: 10", "decay", "from 3 to 9"], id="decaying"),
        pytest.param(0, {"warmup_ratio": 0}, ["--decay-from: 0", "from 1 to 9"], id="the start"),
        pytest.param(5, {}, ["no checkpoint of step 5", "[4, 8]", "keep_checkpoints (now 9)"], id="no checkpoint"),
        pytest.param(4, {"schedule": "cosine"}, ["--decay-from", "cosine", "train.schedule: wsd"], id="not flat"),
    ],
)
def test_what_cannot_be_decayed_is_refused_in_one_line(
    workspace: Workspace, tmp_path: Path, step: int, train: dict[str, Any], parts: list[str]
) -> None:
    config = trunk_of(workspace, tmp_path / "trunk", **train)
    for known in (4, 8, 12):
        write_json(manifest_of(RunDirectory(config.run_dir).checkpoints / checkpoint_tag(known)), {})
    with pytest.raises(InputError) as caught:
        cli_train(config, decay_from=step)
    assert_one_line(f"adept: {caught.value}", parts)


def test_a_place_that_is_none_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    config = trunk_of(workspace, tmp_path / "trunk")
    with pytest.raises(InputError, match=r"--decay-dir: .* has no effect without --decay-from"):
        cli_train(config, decay_dir=tmp_path / "branch")
    with pytest.raises(InputError, match=r"--decay-dir: .* is or holds"):
        (tmp_path / "trunk").mkdir()
        cli_train(config, decay_from=STEP, decay_dir=tmp_path / "trunk")
