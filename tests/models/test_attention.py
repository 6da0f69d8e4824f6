"""Attention in products: the formula, its gradients, and who stays with PyTorch's kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import VOCABULARY, save_tiny_model

from adept_ds.models import attention
from adept_ds.models.attention import _CausalProducts, use_products
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train, load_causal_lm

ROWS, HEADS, WIDTH, SCALE = 2, 6, 5, 0.7


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In double precision, head by head: [rows, tokens, heads, width]"""
    query, key, value = query.double(), key.double(), value.double()
    share, tokens = HEADS // key.shape[1], query.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    heads = []
    for head in range(HEADS):
        scores = SCALE * query[:, head] @ key[:, head // share].transpose(1, 2)
        heads.append(torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ value[:, head // share])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_values_and_gradients_are_those_of_the_formula(tokens: int, groups: int) -> None:
    """Blocks of 64 queries, whole ones and rests. float32 against double: sums of up to 130 terms of order 1."""
    generator = torch.Generator().manual_seed(tokens)
    # As layers hand them over: heads lie beside each other in memory.
    made = [torch.randn(ROWS, tokens, heads, WIDTH, generator=generator) for heads in (HEADS, groups, groups)]
    ours = [tensor.clone().transpose(1, 2).requires_grad_(True) for tensor in made]
    plain = [tensor.clone().transpose(1, 2).requires_grad_(True) for tensor in made]
    out, wanted = _CausalProducts.apply(*ours, SCALE), formula(*plain)
    assert out.shape == (ROWS, tokens, HEADS, WIDTH)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-6)
    weights = torch.randn(wanted.shape, generator=generator)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model_dir(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory.read(save_tiny_model(tmp_path / "model"))


def passes(model: Any, length: int, positions: torch.Tensor | None = None) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    losses: torch.Tensor = model(tokens, tokens, positions)
    return losses


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the products."""
    seen: list[int] = []
    apply = _CausalProducts.apply

    def counted(query: torch.Tensor, *others: Any) -> Any:
        seen.append(query.shape[2])
        return apply(query, *others)

    monkeypatch.setattr(_CausalProducts, "apply", counted)
    return seen


def test_every_layer_takes_the_products_on_a_cpu(model_dir: ModelDirectory, taken: list[int]) -> None:
    model = load_causal_lm(model_dir, torch.float32)
    layers_train(model_dir.family, [1, 3]).prepare(model)
    passes(model, 24).sum().backward()
    assert taken == [24] * 5


def test_long_texts_half_precision_and_texts_in_a_row_stay_with_pytorch(
    model_dir: ModelDirectory, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LONGEST", 16)
    model = load_causal_lm(model_dir, torch.float32)
    passes(model, 17)
    passes(model, 16, torch.tensor([[*range(10), *range(6)], [*range(16)]]))
    passes(load_causal_lm(model_dir, torch.bfloat16), 16)
    assert taken == []
    passes(model, 16)
    assert taken == [16] * 5


def test_another_way_that_a_model_asks_for_stays(model_dir: ModelDirectory, taken: list[int]) -> None:
    model = load_causal_lm(model_dir, torch.float32)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    use_products(model)
    passes(model, 16)
    assert taken == []
