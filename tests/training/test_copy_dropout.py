"""`train.copy_dropout`: steps go around copies, and what comes out is plain AdamW on the model without those."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.packing import pack, rows, rows_of_step
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config, parse_config
from adept_ds.training.copy_dropout import drawn_copies

STEPS, MIDDLE, DROPOUT = 8, 4, 0.5
COPIES = (1, 4, 6)
"""Of layers 0, 2 and 3 of five."""


# --- which copies ----------------------------------------------------------------------------------------------------


def test_the_draw_is_a_function_of_seed_and_step_alone() -> None:
    draws = [drawn_copies(COPIES, DROPOUT, 3, step) for step in range(50)]
    assert [drawn_copies(COPIES, DROPOUT, 3, step) for step in reversed(range(50))] == draws[::-1]
    assert [drawn_copies(COPIES, DROPOUT, 4, step) for step in range(50)] != draws
    known = [set(), {1, 6}, {1, 6}, {1}, {1}, {4, 6}]
    assert draws[:6] == known, "a run that began with an earlier version goes on"


@pytest.mark.parametrize(("count", "probability"), [(1, 0.7), (2, 0.3), (3, 0.5), (4, 0.9), (3, 0.999999)])
def test_subsets_have_the_probabilities_of_independent_draws_of_which_one_stays(count: int, probability: float) -> None:
    """Of every subset but all copies, from the definition, within 5 standard errors of 20,000 draws."""
    copies, draws = tuple(range(count)), 20_000
    seen = [drawn_copies(copies, probability, 0, step) for step in range(draws)]
    for size in range(count + 1):
        for subset in itertools.combinations(copies, size):
            share = probability**size * (1 - probability) ** (count - size) / (1 - probability**count)
            expected = 0.0 if size == count else share
            error = (expected * (1 - expected) / draws) ** 0.5
            assert abs(seen.count(frozenset(subset)) / draws - expected) <= 5 * error, subset


def test_without_dropout_every_copy_is_always_there() -> None:
    assert not any(drawn_copies(COPIES, 0.0, 0, step) for step in range(100))


# --- what a run computes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    world_size: int
    zero: dict[str, Any]
    train: dict[str, Any]


CASES = [
    slow(Case("zero1", 1, {"stage": 1}, {})),
    slow(Case("zero2", 2, {"stage": 2}, {"micro_batch_size": 6})),  # one micro-batch in a step
    Case("zero3", 2, {"stage": 3, "stage3_param_persistence_threshold": 0}, {}),
    slow(Case("zero3_recomputed", 1, {"stage": 3}, {"activation_checkpointing": True})),
    slow(Case("zero3_offload", 2, {"stage": 3, "offload_optimizer": {"device": "cpu"}}, {})),
]


@dataclass(frozen=True)
class Outcome:
    case: Case
    config_file: Path
    run: Finished


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def outcome(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("dropout")
    write_json(folder / "zero.json", {"zero_optimization": case.zero})
    file = workspace.config(
        folder / "run",
        deepspeed=str(folder / "zero.json"),
        expand={"k": None, "layers": [0, 2, 3]},
        importance={"every": 3},
        train={"steps": STEPS, "checkpoint_every": MIDDLE, "eval_every": STEPS, "copy_dropout": DROPOUT} | case.train,
    )
    result = adept(case.world_size, "run", file)
    assert result.returncode == 0, result.stderr
    return Outcome(case, file, Finished(folder / "run"))


def without(model: Any, layers: list[int], batch: oracle.Batch) -> torch.Tensor:
    """Mean loss of the model when these layers are gone."""
    kept = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(kept) if index not in layers)
    try:
        return oracle.mean_loss(model, [batch])
    finally:
        model.model.layers = kept


def plain(outcome: Outcome, workspace: Workspace) -> oracle.Training:
    """AdamW with a group per parameter; a copy that is not there has a gradient of 0. Multipliers are those logged."""
    config, steps = load_config(outcome.config_file), outcome.run.steps()
    train, model = config.train, oracle.load(outcome.run.directory / "expanded")
    parameters, result = oracle.trainable(model, COPIES), oracle.Training()
    blocks = pack([workspace.root / "domain.jsonl"], workspace.model, outcome.run.directory / "oracle", seq_len=32)
    groups = [{"params": [parameter], "name": name} for name, parameter in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, weight_decay=train.weight_decay, eps=train.eps)
    refreshed = outcome.run.units("multiplier")
    for step in range(STEPS):
        batch = rows_of_step(blocks, step, train.global_batch_size, train.seed)
        loss = without(model, steps[step]["bypassed"], batch)
        optimizer.zero_grad()
        loss.backward()
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = steps[step]["lr"] * refreshed[step // 3][oracle.unit_of(group["name"])]
        optimizer.step()
        result.losses.append(float(loss.detach()))
    result.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return result


def test_it_is_plain_adamw_in_which_a_bypassed_copy_has_a_gradient_of_0(outcome: Outcome, workspace: Workspace) -> None:
    """Losses to 1e-5, weights to 5e-5 of steps of 1e-2. A gradient left over from the step before moves them by 1e-3.

    The order of sums differs between one process and several ranks, and AdamW's first steps are of the size of the
    learning rate whatever the gradient's.
    """
    wanted, exported = plain(outcome, workspace), outcome.run.weights()
    bypassed = [record["bypassed"] for record in outcome.run.steps()]
    assert bypassed == [sorted(drawn_copies(COPIES, DROPOUT, 0, step)) for step in range(STEPS)]
    assert {len(layers) for layers in bypassed} == {0, 1, 2}, "it must be something that shows"
    assert outcome.run.losses() == pytest.approx(wanted.losses, abs=1e-5)
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 5e-5, name


def test_evaluation_sees_every_copy(outcome: Outcome, workspace: Workspace) -> None:
    """Whatever the last step went around: to 1e-5 the loss of the exported model, on the same blocks."""
    model = oracle.load(outcome.run.directory / "export")
    for corpus, found in outcome.run.evaluations()[-1].items():
        file = workspace.root / f"{corpus}_heldout.jsonl"
        blocks = pack([file], workspace.model, outcome.run.directory / "oracle", seq_len=32, keep_tail=True)
        with torch.no_grad():
            assert found["loss"] == pytest.approx(float(oracle.mean_loss(model, [rows(blocks, range(7))])), abs=1e-5)


def test_it_resumes_bit_for_bit(outcome: Outcome) -> None:
    files, before = RunDirectory(outcome.run.directory), outcome.run.weights()
    losses = outcome.run.losses()
    shutil.rmtree(files.checkpoints / checkpoint_tag(STEPS))
    result = adept(outcome.case.world_size, "run", outcome.config_file)
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {MIDDLE}" in result.stdout
    after = outcome.run.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert outcome.run.losses() == losses


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        pytest.param({"method": "full"}, ["train.copy_dropout: 0.5", "method: full", "makes none"], id="no copies"),
        pytest.param({"expand": {"k": 1}}, ["train.copy_dropout: 0.5", "single copy", "expand.k"], id="one copy"),
        pytest.param(
            {"importance": {"source": "online"}, "data": {"replay": ["a.jsonl"]}},
            ["train.copy_dropout: 0.5", "importance.source"],
            id="online",
        ),
    ],
)
def test_where_it_has_no_effect_or_a_wrong_one_it_is_refused(sections: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "train": {"copy_dropout": 0.5}} | sections)
    assert_one_line(f"adept: {caught.value}", parts)
