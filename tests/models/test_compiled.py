"""Layers that torch.compile has made kernels of compute what they computed before, copies and frozen ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.marks import slow
from harness.models import FAMILY_OPTIONS, VOCABULARY, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import checkpoint_activations, compile_layers, layers_train, load_causal_lm

COPIES = [1, 3]


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, tokens).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "backend", "recomputed"),
    [
        ("llama", "aot_eager", False),
        slow("llama", "aot_eager", True),
        *(slow(family, "aot_eager", False) for family in sorted(FAMILY_OPTIONS.keys() - {"llama"})),
        slow("llama", "inductor", False),
        slow("qwen3_moe", "inductor", True),
    ],
)
def test_gradients_are_those_of_pytorchs_operations(
    family: str, backend: str, recomputed: bool, tmp_path: Path
) -> None:
    """To float32 rounding of a backward pass through five layers, relative to the largest of a tensor."""
    model_dir = ModelDirectory.read(save_tiny_model(tmp_path / "model", family))
    plain = load_causal_lm(model_dir, torch.float32)
    compiled = load_causal_lm(model_dir, torch.float32)
    compile_layers(compiled, model_dir.family, backend)
    for model in (plain, compiled):
        layers_train(model_dir.family, COPIES).prepare(model)
    if recomputed:
        checkpoint_activations(compiled, model_dir.family, COPIES[0])
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(gradients(plain, tokens))
    for _ in range(2):
        found = gradients(compiled, tokens)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            difference = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
            assert float(difference) < 1e-4, name
    with torch.no_grad():
        assert torch.equal(compiled(tokens, tokens), plain(tokens, tokens)), "evaluation is not compiled"
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0, "something must have been compiled"
