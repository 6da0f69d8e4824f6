"""Token by token, with a cache, a model says what it says of the whole text at once: every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import load
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.models import VOCABULARY, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import load_causal_lm
from adept_ds.models.next_token import NextToken


@pytest.mark.parametrize("family", MOSTLY_SLOW_FAMILIES)
def test_logits_are_those_of_the_whole_text(tmp_path: Path, family: str) -> None:
    """24 tokens, where windows are of 16; 1e-4 in fp32 of logits of order 1. Then new rows, nothing before them."""
    source = ModelDirectory.read(save_tiny_model(tmp_path, family))
    model: Any = load_causal_lm(source, torch.float32).eval()
    next_token = NextToken(model, source.family)
    with torch.no_grad():
        for seed, rows in ((0, 2), (1, 3)):
            ids = torch.randint(VOCABULARY - 6, (rows, 24), generator=torch.Generator().manual_seed(seed))
            next_token.begin()
            found = torch.stack([model(ids[:, at : at + 1]) for at in range(24)], dim=1)
            expected = load(tmp_path)(input_ids=ids, use_cache=False).logits.float()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
