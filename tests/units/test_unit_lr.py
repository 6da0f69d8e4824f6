"""`UnitLR`: the page that explains it, tried out without the rest of adept-ds; and in a training of adept-ds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.alone_worker import STAGES, STEPS, batches_of, tiny_model
from harness.launching import launch
from harness.trainings import frozen_hashes, hash_before_training, trained
from harness.workspace import Workspace
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    output = tmp_path_factory.mktemp("alone") / "weights.pt"
    result = launch(2, ["-m", "harness.alone_worker", str(output)])
    assert result.returncode == 0, result.stderr
    return dict(torch.load(output))


@pytest.mark.parametrize("stage", STAGES)
def test_the_example_of_the_page_trains_as_two_learning_rates_would(outcomes: dict[int, Any], stage: int) -> None:
    """Two ranks against torch's AdamW with a group for embeddings in one process: 1e-6, a hundredth of a step."""
    model = tiny_model()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["embed" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "lr": 0.1 * 2e-4}, {"params": groups[False], "lr": 2e-4}], weight_decay=0.1
    )
    for both in zip(batches_of(0), batches_of(1), strict=True):
        optimizer.zero_grad()
        (sum(model(**batch).loss for batch in both) / 2).backward()
        optimizer.step()
    assert len(batches_of(0)) == STEPS
    assert outcomes[stage]["multipliers"] == [0.1, 1.0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(outcomes[stage]["weights"][name], parameter.detach(), rtol=0, atol=1e-6)


# --- in a training of adept-ds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(workspace, tmp_path_factory.mktemp("lab"), "units")


def test_a_unit_with_multiplier_zero_does_not_move_by_one_bit(lab: dict[str, Any]) -> None:
    """Weight decay is on (0.1); every other unit moves."""
    before = load_file(Path(lab["expanded"]) / "model.safetensors")
    silent = tuple(f"model.{unit}." for unit in lab["silent_units"])
    for name, tensor in lab["silent"]["trained"].items():
        assert torch.equal(tensor, before[name]) == name.startswith(silent), name
    assert frozen_hashes(lab) == {hash_before_training(lab)}


def test_a_multiplier_that_differs_between_ranks_stops_the_run_and_names_the_unit(lab: dict[str, Any]) -> None:
    assert "unit 'layers.2.mlp.gate_proj' has multiplier 0.5 on rank 1 but 1.0 on rank 0" in lab["disagreement"]
