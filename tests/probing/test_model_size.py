"""What a model weighs, read from the headers of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.models import FAMILY_OPTIONS, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES
from adept_ds.probing.model_size import model_size


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_sizes_are_those_of_the_loaded_model(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = save_tiny_model(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(directory)
    layers = FAMILIES[model_type].layer_modules(model)
    size = model_size(ModelDirectory.read(directory))
    assert size.layer_parameters == tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert sum(size.layer_parameters) + size.other_parameters == sum(p.numel() for p in model.parameters())
    assert size.head_passed == model.get_output_embeddings().weight.numel()
    stacks = [sum(p.numel() for p in layer.parameters() if p.dim() == 3) for layer in layers]  # a third is not passed
    expected = [whole - stack / 3 for whole, stack in zip(size.layer_parameters, stacks, strict=True)]
    assert size.layer_passed == pytest.approx(expected)
    assert (FAMILY_OPTIONS[model_type].get("num_experts_per_tok") is not None) == any(stacks)
