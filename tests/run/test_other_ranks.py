"""A run goes on with other ranks, another ZeRO stage, offload and other micro-batches as if nothing had happened.

Two ranks train each case to its end. Three ranks go on from one of its checkpoints, and one rank from one of theirs:
the first run says what must come out. (That it is right itself is tested where its method is, in plain PyTorch.)
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.finished_run import Finished
from harness.launching import launch
from harness.marks import slow
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.weights.by_rank import SavedElements
from adept_ds.weights.export import read_zero_checkpoint

RANKS = (2, 3, 1)
ZERO: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "3 offloaded": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
REFRESHED = {"every": 3, "sequences": 7, "batch_sequences": 5}


@dataclass(frozen=True)
class Case:
    method: Any
    zero: tuple[str, str, str]
    """Of two ranks, of three, and of one."""
    cuts: tuple[int, int] = (2, 4)
    """After which steps three ranks go on, and one."""
    micro_batch_size: tuple[int, int, int] = (2, 1, 3)
    steps: int = 6
    sections: dict[str, Any] = field(default_factory=dict)


WITH_STATE = {
    # Multipliers between two refreshes, smoothed importances, what lies between two measurements of movement, copies
    # that are bypassed, replayed text. Twenty steps after the cut, over ends of epochs.
    "adept": Case(
        "adept",
        ("3", "1", "3 offloaded"),
        cuts=(7, 14),
        steps=27,
        sections={
            "importance": REFRESHED | {"granularity": "fine"},
            "lr_policy": {"smoothing": 0.5},
            "data": {"replay_share": 1 / 3},
            "train": {"copy_dropout": 0.3, "writer_lr_ratio": 2.0, "eval_every": 9, "lr": 2e-3},
        },
    ),
    # Sums of importances that no refresh has taken yet, and an anchor.
    "online": Case(
        "adept",
        ("2", "3", "1"),
        micro_batch_size=(1, 2, 3),
        sections={
            "importance": {"source": "online", "every": 3, "granularity": "fine"},
            "lr_policy": {"smoothing": 0.7},
            "anchor": {"kind": "kl", "weight": 2.0, "share": 0.25, "sequences": 7},
            "data": {"replay_share": 0.5},
        },
    ),
    "ewc": Case({"name": "ewc", "strength": 40.0, "sequences": 7, "batch_sequences": 3}, ("1", "3", "2")),
    "tasl": Case({"name": "tasl", "sequences": 8, "observe_every": 3}, ("3", "2", "1")),
    "lora": Case({"name": "lora", "rank": 3, "alpha": 6.0, "lr_ratio": 4.0, "dora": True}, ("2", "3", "1")),
}
"""Methods that remember something besides weights, moments and multipliers, or whose parameters are in no file."""
WITHOUT = {
    "parenting": Case("parenting", ("1", "2", "3"), sections={"importance": REFRESHED}),
    "oft": Case({"name": "oft", "block_size": 5, "targets": ["self_attn.q_proj", "mlp.up_proj"]}, ("3", "1", "2")),
    "full": Case("full", ("2", "1", "3 offloaded")),
    "replay": Case("replay", ("3", "3", "3"), sections={"data": {"replay_share": 1 / 3}}),
    "freeze": Case("freeze", ("3 offloaded", "2", "1"), sections={"expand": {"layers": [1, 3]}}),
    "llama_pro": Case("llama_pro", ("1", "3", "2"), sections={"expand": {"layers": [1, 3]}}),
}
EXACT = ("step", "lr", "tokens", "bypassed")
CLOSE = {"loss", "grad_norm", "replay_loss", "domain_loss", "anchor", "penalty"}

CASES = WITH_STATE | WITHOUT
AT_EVERY_COMMIT = ("online", "ewc")
GROUPS = (AT_EVERY_COMMIT, tuple(WITH_STATE.keys() - set(AT_EVERY_COMMIT)), tuple(WITHOUT))
"""What is started together."""
each_case = pytest.mark.parametrize("name", [name if name in AT_EVERY_COMMIT else slow(name) for name in CASES])


def configured(workspace: Workspace, folder: Path, name: str, number: int) -> Path:
    """Of the run by two ranks (0), by three (1), or by one (2)."""
    case, place = CASES[name], folder / f"{name}{number}"
    zero = place.with_suffix(".zero.json")
    zero.write_text(json.dumps({"zero_optimization": ZERO[case.zero[number]]}))
    tree = workspace.tree(place, method=case.method, deepspeed=str(zero))
    del tree["expand"], tree["importance"]
    train = {"steps": case.steps, "checkpoint_every": case.cuts[0], "keep_checkpoints": 9, "eval_every": 3}
    own = case.sections | ({"expand": {"layers": [1, 3]}} if case.method == "adept" else {})
    own["train"] = train | case.sections.get("train", {}) | {"micro_batch_size": case.micro_batch_size[number]}
    if "data" in own:
        own["data"] = own["data"] | {"replay": [str(workspace.root / "general.jsonl")]}
    for section, values in own.items():
        tree[section] = tree.get(section, {}) | values
    file = place.with_suffix(".yaml")
    file.write_text(json.dumps(tree))  # which is YAML too
    return file


@dataclass(frozen=True)
class Runs:
    """Of one case: what two ranks made to the end, and what was made of it afterwards."""

    directories: list[Path]
    said: list[str]

    @property
    def finished(self) -> list[Finished]:
        return [Finished(directory) for directory in self.directories]

    def checkpoint(self, number: int, step: int) -> Path:
        return RunDirectory(self.directories[number]).checkpoints / checkpoint_tag(step)


def cut(whole: Path, copy: Path, step: int) -> None:
    """As it was when a run was killed just before its next checkpoint."""
    shutil.copytree(whole, copy)
    for later in checkpoint_steps(RunDirectory(copy).checkpoints):
        if later > step:
            shutil.rmtree(RunDirectory(copy).checkpoints / checkpoint_tag(later))


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    @functools.cache
    def of_group(names: tuple[str, ...]) -> dict[str, Runs]:
        folder, said = tmp_path_factory.mktemp("runs"), []
        for number, world_size in enumerate(RANKS):
            files = [configured(workspace, folder, name, number) for name in names]
            for name in names if number else ():
                cut(folder / f"{name}{number - 1}", folder / f"{name}{number}", CASES[name].cuts[number - 1])
            result = launch(world_size, ["-m", "harness.training_worker", *map(str, files)], timeout=1200)
            assert result.returncode == 0, result.stderr
            said.append(result.stdout)
        return {name: Runs([folder / f"{name}{number}" for number in range(len(RANKS))], said) for name in names}

    return lambda name: of_group(next(group for group in GROUPS if name in group))[name]


@each_case
def test_losses_and_what_is_logged_beside_them_are_those_of_the_run_that_went_through(
    runs: Callable[[str], Runs], name: str
) -> None:
    """Losses of about 5.6, norms and terms to 1e-5; rates, tokens and bypassed copies are functions of the step."""
    whole, *others = runs(name).finished
    for number, other in enumerate(others):
        assert len(other.steps()) == CASES[name].steps
        assert other.steps()[: CASES[name].cuts[number]] == (whole, *others)[number].steps()[: CASES[name].cuts[number]]
        for mine, wanted in zip(other.steps(), whole.steps(), strict=True):
            assert [mine.get(key) for key in EXACT] == [wanted.get(key) for key in EXACT]
            for key in CLOSE & wanted.keys():
                assert mine[key] == pytest.approx(wanted[key], abs=1e-5), (mine["step"], key)
        for mine, wanted in zip(other.evaluations(), whole.evaluations(), strict=True):
            for corpus in wanted:
                assert mine[corpus]["loss"] == pytest.approx(wanted[corpus]["loss"], abs=1e-5)


@each_case
def test_weights_multipliers_and_movements_at_the_end_are_the_same(runs: Callable[[str], Runs], name: str) -> None:
    """Weights of order 1 to 1e-5, after rounding of gradients that are summed in another order."""
    whole, *others = runs(name).finished
    expected = read_zero_checkpoint(runs(name).checkpoint(0, CASES[name].steps))
    for number, other in enumerate(others, start=1):
        trained = read_zero_checkpoint(runs(name).checkpoint(number, CASES[name].steps))
        assert trained.keys() == expected.keys()
        for parameter, weight in expected.items():
            torch.testing.assert_close(trained[parameter], weight, rtol=0, atol=1e-5, msg=parameter)
        for key in ("importance", "multiplier"):
            for mine, wanted in zip(other.units(key), whole.units(key), strict=True):
                assert mine == pytest.approx(wanted, rel=2e-3, abs=1e-9)
        for mine_moved, wanted_moved in zip(other.movement(), whole.movement(), strict=True):
            assert (mine_moved["step"], mine_moved["since"]) == (wanted_moved["step"], wanted_moved["since"])
            for unit, wanted_unit in zip(mine_moved["units"], wanted_moved["units"], strict=True):
                for key in ("moved", "moved_since_start"):
                    assert unit[key] == pytest.approx(wanted_unit[key], rel=1e-2)


def test_what_was_estimated_on_the_base_is_carried_on_bit_for_bit(runs: Callable[[str], Runs]) -> None:
    """The Fisher diagonal of EWC: it cannot be estimated again, since the weights have moved."""
    run, shapes = runs("ewc"), read_zero_checkpoint(runs("ewc").checkpoint(0, 2))
    saved = [SavedElements(run.checkpoint(number, step), "fisher") for number, step in enumerate((2, 4, 6))]
    for name, parameter in shapes.items():
        if name != "lm_head.weight":  # tied
            first, *others = (fisher.of(name, 0, parameter.numel()) for fisher in saved)
            assert all(torch.equal(first, other) for other in others), name


def test_one_line_says_that_it_goes_on_elsewhere(runs: Callable[[str], Runs]) -> None:
    _, on_three, on_one = runs("online").said
    assert "resuming after step 2, written by 2 ranks under ZeRO-2, on 3 ranks under ZeRO-3\n" in on_three
    assert "resuming after step 4, written by 3 ranks under ZeRO-3, on 1 rank under ZeRO-1\n" in on_one


@pytest.mark.parametrize(("name", "refreshes"), [("online", 2), slow("adept", 9)])
def test_what_is_cut_is_the_middle_of_something(runs: Callable[[str], Runs], name: str, refreshes: int) -> None:
    """Otherwise this would prove little: of an epoch, of the way to the next refresh, of what the method sums up."""
    run = runs(name)
    since = [record["since"] for record in run.finished[0].movement()]
    assert not set(CASES[name].cuts) & set(since)
    assert any(record["bypassed"] for record in run.finished[0].steps()[14:]) == (name == "adept")
    multipliers = run.finished[0].units("multiplier")
    assert len(multipliers) == refreshes and multipliers[-1] != multipliers[-2]
