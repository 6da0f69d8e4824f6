"""`method: parenting` by `adept run`: AdamW in plain PyTorch, with learning rates by the roles of units."""

from __future__ import annotations

from typing import Any

import method_oracle
import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.method_runs import GRID, STEPS, MethodRun
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config

METHOD = {"name": "parenting", "important": 0.45, "shared_rate": 0.3, "idle_rate": 1.7}
RATES = {"general": 0.0, "domain": 1.0, "shared": 0.3, "idle": 1.7}
IMPORTANCE = {"every": 3, "sequences": 7, "batch_sequences": 5}


@pytest.fixture(scope="module", params=GRID, ids=lambda cell: f"zero{cell[0]}-{cell[1]}")
def run(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> MethodRun:
    stage, world_size = request.param
    folder = tmp_path_factory.mktemp("parenting")
    run = MethodRun(workspace, folder, METHOD, stage, world_size, {"importance": IMPORTANCE})
    run.start()
    return run


def plain(run: MethodRun, refreshed_before: tuple[int, ...] = (0, 3)) -> oracle.Training:
    """Multipliers and importances of general text are those of each refresh, before the steps that are named."""
    model = oracle.load(run.workspace.model)
    texts = [run.sample(corpus, 7, 5) for corpus in ("general", "domain")]
    importances, multipliers = list[method_oracle.PerUnit](), list[method_oracle.PerUnit]()

    def factors(step: int) -> method_oracle.PerUnit | None:
        if step not in refreshed_before:
            return None
        general, domain = (method_oracle.importance(model, batches) for batches in texts)
        important = method_oracle.top(general, 0.45), method_oracle.top(domain, 0.45)
        importances.append(general)
        multipliers.append(method_oracle.by_role(*important, list(general), RATES))
        return multipliers[-1]

    training = method_oracle.train(model, run.steps(), run.rates(), dict(run.config.train), factors=factors)
    training.importances, training.multipliers = importances, multipliers
    return training


def test_it_is_plain_adamw_at_the_rates_of_roles_and_resumes_bit_for_bit(run: MethodRun) -> None:
    """Losses of four steps to 1e-5 relative, exported weights to 5e-5 of steps of 1e-2."""
    wanted, exported = plain(run), run.finished.weights()
    assert set(wanted.multipliers[0].values()) == set(RATES.values()), "every role must have its units"
    for found, expected in zip(run.finished.units("multiplier"), wanted.multipliers, strict=True):
        assert found == expected
    for found, expected in zip(run.finished.units("importance"), wanted.importances, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert run.finished.losses() == pytest.approx(wanted.losses, rel=1e-5)
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 5e-5, name
    again = run.resumed()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())


def test_it_may_begin_with_plain_training(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    sections = {"importance": IMPORTANCE | {"initial": "ones"}}
    run = MethodRun(workspace, tmp_path_factory.mktemp("ones"), METHOD, sections=sections)
    run.start()
    wanted = plain(run, refreshed_before=(3,))
    assert run.finished.units("multiplier") == wanted.multipliers
    assert len(run.finished.losses()) == STEPS
    assert run.finished.losses() == pytest.approx(wanted.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param(
            {"importance": {"source": "online"}, "data": {"replay": ["a"]}}, ["importance.source"], id="online"
        ),
        pytest.param({"data": {"streaming": True}}, ["data.streaming: "], id="streamed"),
        pytest.param(
            {"data": {"domain": [{"files": ["a"]}, {"files": ["b"]}]}, "importance": {"sequences": 1}},
            ["importance.sequences: 1", "2 sources of data.domain"],
            id="a source without a sequence",
        ),
        pytest.param({"lr_policy": {"map": "linear"}}, ["lr_policy.map: 'linear'"], id="other rates"),
        pytest.param({"method": {"name": "parenting", "idle_rate": -1}}, ["method.idle_rate: -1"], id="backwards"),
    ],
)
def test_keys_that_make_no_sense_are_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "method": "parenting"} | sections)
    assert_one_line(f"adept: {caught.value}", words)
