"""An expanded tiny model as Hugging Face loads it, and how smoothly its training starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.models import VOCABULARY

from adept_ds.models.family_table import FAMILIES

SELECTED = [0, 2, 4]  # the lowest, the highest and one between
COPIES = [1, 4, 7]


def load(directory: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def layers_of(model: Any) -> Sequence[Any]:
    return FAMILIES[model.config.model_type].layer_modules(model)


def random_tokens(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(7))


def change_after_one_step(directory: Path) -> float:
    """Of the logits, relative to their size, by one step of AdamW with 1e-4 on the copies."""
    model, tokens = load(directory), random_tokens(4, 40)
    model.requires_grad_(False)
    copies = [parameter for index in COPIES for parameter in layers_of(model)[index].requires_grad_(True).parameters()]
    before = model(input_ids=tokens, labels=tokens)
    before.loss.backward()
    torch.optim.AdamW([parameter for parameter in copies if parameter.grad is not None], lr=1e-4).step()
    with torch.no_grad():
        after = model(input_ids=tokens).logits
        return float((after - before.logits).norm() / before.logits.norm())
