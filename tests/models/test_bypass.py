"""Copies that are bypassed, and what they write with, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.expanding import COPIES, SELECTED, layers_of, load, random_tokens
from harness.models import FAMILY_OPTIONS, save_tiny_model

from adept_ds.models.bypass import bypassed
from adept_ds.models.families import silent_factors
from adept_ds.models.family_table import FAMILIES
from adept_ds.weights.expansion import expand_checkpoint


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_a_model_whose_copies_are_bypassed_is_its_base_and_its_silent_factors_are_known(
    model_type: str, tmp_path: Path
) -> None:
    """Bit for bit, whatever was trained; and a fresh copy is silent in those parameters and in no other."""
    source = save_tiny_model(tmp_path / "source", model_type)
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    base, model = load(source), load(tmp_path / "expanded")
    family, tokens = FAMILIES[model_type], random_tokens(2, 30)
    parameters = dict(model.named_parameters())
    silent = {name for name, parameter in parameters.items() if bool((parameter == family.silent).all())}
    assert set(silent_factors(family, parameters, COPIES)) == silent
    copies = [layers_of(model)[copy] for copy in COPIES]
    with torch.no_grad():
        for parameter in (parameter for copy in copies for parameter in copy.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expected, trained = base(input_ids=tokens).logits, model(input_ids=tokens).logits
    with bypassed(copies):
        around = model(input_ids=tokens).logits
        around.sum().backward()
    assert torch.equal(around, expected)
    assert not torch.equal(trained, expected)
    assert all(parameter.grad is None for copy in copies for parameter in copy.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, trained), "they are there again"
