"""`UnitLR` without the rest of adept-ds: the page that explains it, tried out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.alone_worker import STAGES, STEPS, batches_of, tiny_model
from harness.launching import launch


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
