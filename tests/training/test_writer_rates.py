"""`train.writer_lr_ratio`: the silent factors of copies learn at a rate of their own, whatever a unit is."""

from __future__ import annotations

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
from harness.packing import pack, rows_of_step
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config, parse_config

STEPS, MIDDLE = 4, 2
COPIES = (1, 5)
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Case:
    name: str
    world_size: int
    stage: int
    ratio: float
    sections: dict[str, Any]


CASES = [
    slow(Case("matrix", 1, 1, 4.0, {})),
    Case("module", 2, 3, 4.0, {"importance": {"granularity": "module"}}),
    slow(Case("fine", 2, 2, 16.0, {"importance": {"granularity": "fine"}})),
    slow(Case("uniform", 1, 3, 0.25, {"method": "llama_pro"})),
]


@dataclass(frozen=True)
class Outcome:
    case: Case
    config_file: Path
    run: Finished


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def outcome(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("writers")
    write_json(folder / "zero.json", {"zero_optimization": {"stage": case.stage}})
    train = {"steps": STEPS, "checkpoint_every": MIDDLE, "eval_every": 0, "lr": 4e-3, "writer_lr_ratio": case.ratio}
    tree = workspace.tree(
        folder / "run",
        deepspeed=str(folder / "zero.json"),
        expand={"k": None, "layers": [0, 3]},
        train=train,
        **case.sections,
    )
    if "method" in case.sections:
        del tree["importance"]
    write_json(folder / "run.yaml", tree)  # which is YAML too
    result = adept(case.world_size, "run", folder / "run.yaml")
    assert result.returncode == 0, result.stderr
    return Outcome(case, folder / "run.yaml", Finished(folder / "run"))


def plain(outcome: Outcome, workspace: Workspace) -> oracle.Training:
    """AdamW's formula with a rate for every element: schedule x multiplier of its unit, as logged, x ratio."""
    config = load_config(outcome.config_file)
    train, model, result = config.train, oracle.load(outcome.run.directory / "expanded"), oracle.Training()
    parameters = oracle.trainable(model, COPIES)
    blocks = pack([workspace.root / "domain.jsonl"], workspace.model, outcome.run.directory / "oracle", seq_len=32)
    refreshed, units = outcome.run.units("multiplier"), config.importance.granularity
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    beta1, beta2 = train.betas
    for step, record in enumerate(outcome.run.steps()):
        loss = oracle.mean_loss(model, [rows_of_step(blocks, step, train.global_batch_size, train.seed)])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        clip = min(1.0, train.clip_grad_norm / (norm + 1e-6))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            first, second = moments[name]
            first.lerp_(gradient * clip, 1 - beta1)
            second.mul_(beta2).add_((gradient * clip) ** 2, alpha=1 - beta2)
            update = first / (1 - beta1 ** (step + 1)) / ((second / (1 - beta2 ** (step + 1))).sqrt() + train.eps)
            names = oracle.units_of_elements(name, parameter.shape, units, model.config.head_dim)
            factors = [refreshed[step // 2][unit] if refreshed else 1.0 for unit in names]
            ratio = outcome.case.ratio if name.endswith(WRITERS) else 1.0
            rate = torch.tensor(factors).view(parameter.shape) * record["lr"] * ratio
            parameter.data.sub_(rate * (update + train.weight_decay * parameter.data))
        result.losses.append(float(loss.detach()))
    result.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return result


def test_it_is_adamw_with_their_rate_times_the_ratio_and_resumes_bit_for_bit(
    outcome: Outcome, workspace: Workspace
) -> None:
    """Losses of four steps to 1e-5, weights to 5e-5 relative to the ratio, where steps are of 4e-3 times it."""
    wanted, exported = plain(outcome, workspace), outcome.run.weights()
    assert outcome.run.losses() == pytest.approx(wanted.losses, abs=1e-5)
    tolerance = 5e-5 * max(1.0, outcome.case.ratio / 4)
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= tolerance, name
    shutil.rmtree(RunDirectory(outcome.run.directory).checkpoints / checkpoint_tag(STEPS))
    result = adept(outcome.case.world_size, "run", outcome.config_file)
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {MIDDLE}" in result.stdout
    again = outcome.run.weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())


def test_the_ratio_is_named_and_multipliers_stay_the_units_own(outcome: Outcome) -> None:
    summary = read_json(RunDirectory(outcome.run.directory).summary)
    assert summary["writer_lr_ratio"] == outcome.case.ratio
    assert all(0 <= value <= 2 for refresh in outcome.run.units("multiplier") for value in refresh.values())
    if outcome.case.sections.get("method") is None:
        assert "train.writer_lr_ratio" in RunDirectory(outcome.run.directory).report.read_text()


def test_another_ratio_does_not_go_on(outcome: Outcome) -> None:
    result = adept(outcome.case.world_size, "run", outcome.config_file, "train.writer_lr_ratio=2.5")
    assert result.returncode == 2
    assert_one_line(result.stderr, ["train.writer_lr_ratio", f"{outcome.case.ratio!r}, not 2.5"])


@pytest.mark.parametrize(
    ("train", "method", "parts"),
    [
        pytest.param({"writer_lr_ratio": 0}, "adept", ["train.writer_lr_ratio: 0"], id="none"),
        pytest.param({"writer_lr_ratio": 4}, "freeze", ["train.writer_lr_ratio: 4", "method: freeze"], id="in place"),
        pytest.param({"writer_lr_ratio": 4}, "lora", ["train.writer_lr_ratio: 4", "method: lora"], id="adapters"),
    ],
)
def test_a_ratio_without_effect_is_refused(train: dict[str, Any], method: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "train": train, "method": method})
    assert_one_line(f"adept: {caught.value}", parts)
