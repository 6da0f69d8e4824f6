"""`method: ewc` by `adept run` is EWC in plain PyTorch: the Fisher diagonal on general text, and the penalty by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import method_oracle
import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.launching import adept
from harness.method_runs import GRID, MethodRun
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config

METHOD: dict[str, Any] = {"name": "ewc", "strength": 40.0, "sequences": 7, "batch_sequences": 3}


@dataclass
class Plain:
    training: oracle.Training
    penalties: list[float]
    fisher: dict[str, float]
    """Its mean over each unit."""


@pytest.fixture(scope="module", params=GRID, ids=lambda cell: f"zero{cell[0]}-{cell[1]}")
def run(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> MethodRun:
    stage, world_size = request.param
    run = MethodRun(workspace, tmp_path_factory.mktemp("ewc"), METHOD, stage, world_size)
    run.start()
    return run


def plain(run: MethodRun) -> Plain:
    model = oracle.load(run.workspace.model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fisher = {name: torch.zeros_like(parameter) for name, parameter in start.items()}
    batches = run.sample("general", METHOD["sequences"], METHOD["batch_sequences"])
    for batch in batches:
        tokens = int((batch[1][:, 1:] != -100).sum())
        for name, gradient in method_oracle.gradients(model, batch).items():
            fisher[name] += tokens * gradient**2 / len(batches)
    penalties = []

    def penalty(parameters: method_oracle.Parameters) -> torch.Tensor:
        squares = [(fisher[name] * (weight - start[name]) ** 2).sum() for name, weight in parameters.items()]
        term = METHOD["strength"] / 2 * torch.stack(squares).sum()
        penalties.append(float(term.detach()))
        return term

    training = method_oracle.train(model, run.steps(), run.rates(), dict(run.config.train), term=penalty)
    return Plain(training, penalties, method_oracle.unit_means(fisher))


def test_it_is_plain_adamw_on_the_loss_with_the_penalty_and_resumes_bit_for_bit(run: MethodRun) -> None:
    """Losses and penalties of four steps to 1e-5 relative, exported weights to 5e-5 of steps of 1e-2."""
    wanted, exported = plain(run), run.finished.weights()
    penalties = [record["penalty"] for record in run.finished.steps()]
    assert run.finished.losses() == pytest.approx(wanted.training.losses, rel=1e-5)
    assert penalties == pytest.approx(wanted.penalties, rel=1e-4)
    assert penalties[0] == 0 < 0.05 < penalties[-1], "it must be something that shows"
    for name, weight in wanted.training.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 5e-5, name
    (first,) = run.finished.units("importance")
    assert first == pytest.approx(wanted.fisher, rel=1e-4)
    (multipliers,) = run.finished.units("multiplier")
    assert set(multipliers.values()) == {1.0}
    again = run.resumed()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        pytest.param({"strength": 0}, ["method.strength: 0"], id="no penalty"),
        pytest.param({"sequences": 0}, ["method.sequences: 0"], id="no text"),
        pytest.param({"lambda": 3.0}, ["unknown key 'method.lambda'"], id="unknown"),
        pytest.param({"sequences": 1}, ["method.sequences: 1", "2 sources", "at least 2"], id="a source unseen"),
    ],
)
def test_keys_that_make_no_sense_are_refused(method: dict[str, Any], words: list[str]) -> None:
    sources = [{"name": name, "files": [f"{name}.jsonl"], "weight": 1.0} for name in ("a", "b")]
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "method": {"name": "ewc"} | method, "probe": {"corpus": sources}})
    assert_one_line(f"adept: {caught.value}", words)


def test_in_bf16_the_penalty_begins_at_the_rounded_weights(workspace: Workspace, tmp_path: Path) -> None:
    """What is rounded when the model is loaded is no way that training went."""
    run = MethodRun(workspace, tmp_path, METHOD)
    result = adept(1, "run", run.file, "train.precision=bf16", "train.steps=2")
    assert result.returncode == 0, result.stderr
    first, second = (record["penalty"] for record in run.finished.steps())
    assert first == 0 < second


def test_without_general_text_nothing_begins(workspace: Workspace, tmp_path: Path) -> None:
    run = MethodRun(workspace, tmp_path, METHOD)
    result = adept(1, "run", run.file, "probe.corpus=[]")
    assert result.returncode == 2
    assert_one_line(result.stderr, ["probe.corpus"])
    assert not (tmp_path / "run").exists()
