"""What a backward pass leaves at every layer, against the gradients that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import FAMILY_OPTIONS, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import load_causal_lm
from adept_ds.probing.taps import _tapped, install_taps


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_taylor_is_the_inner_product_of_gradient_and_change_in_every_family(tmp_path: Path, model_type: str) -> None:
    """Against the gradients that autograd keeps for Hugging Face's own forward and loss."""
    from transformers import AutoModelForCausalLM

    model_dir = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type))
    products: dict[int, torch.Tensor] = {}
    input_ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    plain: Any = AutoModelForCausalLM.from_pretrained(model_dir.path, dtype=torch.float32).eval()
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, inputs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        after.retain_grad()
        passed.append((inputs[0], after))

    for layer in model_dir.family.layer_modules(plain):
        layer.register_forward_hook(keep)
    loss = plain(input_ids=input_ids, use_cache=False).logits[:, :-1].float().transpose(1, 2)
    torch.nn.functional.cross_entropy(loss, input_ids[:, 1:], reduction="sum").backward()
    wanted = [-(after.grad * (after - before)).sum((1, 2)) for before, after in passed if after.grad is not None]
    assert len(wanted) == 5

    model = load_causal_lm(model_dir, torch.float32).eval()
    install_taps(model, model_dir.family, products)
    model(input_ids, input_ids).sum().backward()
    assert sorted(products) == list(range(5))
    for position, want in enumerate(wanted):
        # float32 sums of 240 products in another order, of losses of about 60 nats a row
        torch.testing.assert_close(products[position].float(), want.detach(), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_returns_a_tuple_is_tapped_at_its_first_entry() -> None:
    products: dict[int, torch.Tensor] = {}
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    after, weights = _tapped(lambda h: (h * 1.5, "attention"), products, 7, hidden)
    (after * torch.tensor([1.0, 2.0]).view(2, 1, 1)).sum().backward()
    assert weights == "attention"
    # dL/dh_out is 1 and 2, h_out - h_in is h / 2
    expected = -torch.tensor([0.5, 1.0]) * hidden.detach().sum((1, 2))
    torch.testing.assert_close(products[7], expected.double(), rtol=1e-6, atol=1e-6)
