"""Gradients of imagined copies, against those of the real ones in an expanded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.expanding import layers_of, load, random_tokens
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.models import save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import load_causal_lm
from adept_ds.probing.silent_copies import imagine_copies
from adept_ds.weights.expansion import expand_checkpoint


def gradients_of_real_copies(source: Path, expanded: Path) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """A copy of every layer, made and loaded; of each the parameters that have a gradient other than zero."""
    expand_checkpoint(source, expanded, range(5))
    model, tokens = load(expanded), random_tokens(2, 24)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    found = {}
    for source_layer in range(5):
        parameters = layers_of(model)[2 * source_layer + 1].parameters()
        parts = [parameter.grad.flatten() for parameter in parameters if parameter.grad.any()]
        found[source_layer] = torch.cat(parts)
    return found, loss.detach()


@pytest.mark.parametrize("model_type", MOSTLY_SLOW_FAMILIES)
def test_imagined_copies_have_the_gradients_of_real_ones_in_every_family(tmp_path: Path, model_type: str) -> None:
    """Sequences are longer than the sliding windows, so a copy with another layer's settings would show."""
    model_dir = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type))
    wanted, loss = gradients_of_real_copies(model_dir.path, tmp_path / "expanded")
    found: dict[int, torch.Tensor] = {}
    model: Any = load_causal_lm(model_dir, torch.float32).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    imagine_copies(model, model_dir.family, found.__setitem__)
    losses = model(random_tokens(2, 24), random_tokens(2, 24))
    losses.sum().backward()
    torch.testing.assert_close(losses.detach().sum(), loss, rtol=1e-5, atol=0)
    assert list(found) == [4, 3, 2, 1, 0]
    for layer, want in wanted.items():
        # float32 sums over 48 tokens in another order, as a share of the largest element
        torch.testing.assert_close(found[layer], want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))
        assert want.abs().max() > 1e-3
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_a_parallel_residual_is_imagined_as_it_is(tmp_path: Path) -> None:
    """GPT-NeoX adds attention and MLP side by side, or one after the other."""
    for parallel in (True, False):
        folder = tmp_path / str(parallel)
        model_dir = ModelDirectory.read(save_tiny_model(folder / "model", "gpt_neox", use_parallel_residual=parallel))
        wanted, _ = gradients_of_real_copies(model_dir.path, folder / "expanded")
        found: dict[int, torch.Tensor] = {}
        model: Any = load_causal_lm(model_dir, torch.float32).eval()
        imagine_copies(model, model_dir.family, found.__setitem__)
        model(random_tokens(2, 24), random_tokens(2, 24)).sum().backward()
        for layer, want in wanted.items():
            torch.testing.assert_close(found[layer], want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


def test_no_gradient_is_carried_through_what_a_silent_copy_does_not_write(tmp_path: Path) -> None:
    """The backward pass of a copy multiplies for its silent factors alone: here 0.5 of what its forward pass does."""
    from torch.utils.flop_counter import FlopCounterMode

    model_dir = ModelDirectory.read(save_tiny_model(tmp_path / "model"))
    model: Any = load_causal_lm(model_dir, torch.float32).eval()
    tokens = random_tokens(1, 8)

    def operations(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).sum().backward()
        return int(counter.get_total_flops())

    # Without copies, but with the same backward pass of the base.
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].requires_grad_(), *inputs[1:]))
    plain = operations(model)
    imagine_copies(model, model_dir.family, lambda *_: None)
    extra = operations(model) - plain
    matrices = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    silent = sum(
        p.numel()
        for n, p in model.model.layers[0].named_parameters()
        if n.endswith(("o_proj.weight", "down_proj.weight"))
    )
    forward_and_factors = 2 * 8 * 5 * (matrices + silent)
    # attention's scores are in neither number, or counted by PyTorch for the eager kernel alone
    assert extra == pytest.approx(forward_and_factors, rel=0.12)
