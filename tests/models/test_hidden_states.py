"""What rows hold is told to transformers, which would ask the device for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.models import save_tiny_model
from host_copies import HostCopies
from transformers import AutoModelForCausalLM, masking_utils

from adept_ds.models import hidden_states
from adept_ds.models.hidden_states import final_hidden

PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")).eval()


@pytest.mark.parametrize("positions", [None, PACKED], ids=["one text a row", "several"])
def test_it_is_what_the_model_computes_by_itself_without_a_question(model: Any, positions: torch.Tensor | None) -> None:
    tokens = torch.arange(16).view(2, 8)
    wanted = model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    with HostCopies() as copies:
        found = final_hidden(model, tokens, positions)
    assert torch.equal(found, wanted)
    assert copies.seen == []
    assert masking_utils.find_packed_sequence_indices.__module__ == "transformers.masking_utils"


def test_texts_are_counted_as_transformers_counts_them() -> None:
    wanted = masking_utils.find_packed_sequence_indices(PACKED)
    assert wanted is not None and torch.equal(hidden_states._numbers_of_texts(PACKED), wanted)


def test_a_transformers_that_asks_otherwise_is_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(8).view(1, 8)
    wanted = final_hidden(model, tokens, None)
    monkeypatch.setattr(hidden_states, "masking_utils", object())
    assert torch.equal(final_hidden(model, tokens, None), wanted)
