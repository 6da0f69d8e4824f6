"""The chunked divergence against its definition in float64, and PyTorch's autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adept_ds.models import head_divergence as divergence_module
from adept_ds.models.head_divergence import row_divergences
from adept_ds.models.head_loss import IGNORED_LABEL

ROWS, TOKENS, DIM, VOCABULARY = 3, 11, 8, 262


def inputs(*, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hidden, base, labels, weight and bias; the labels with a padded tail, a row of nothing, and a hole."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, TOKENS, DIM, generator=generator)
    hidden = base + 0.5 * torch.randn(ROWS, TOKENS, DIM, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[0, 4:] = IGNORED_LABEL
    labels[1, :] = IGNORED_LABEL
    labels[2, 3] = IGNORED_LABEL
    weight = torch.randn(VOCABULARY, DIM, generator=generator)
    return hidden, base, labels, weight, torch.randn(VOCABULARY, generator=generator) if bias else None


# 262 logits per token: chunks of 1, 4 and 33 tokens. 4 divides neither a row of 11 tokens nor the batch of 33.
@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCABULARY, 1 << 23], ids=["1 token", "4 tokens", "whole"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", [(1.0, None), (3.0, None), (1.5, 2.0)], ids=["plain", "divided", "capped"])
def test_divergence_and_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, bias: bool, transform: tuple[float, float | None]
) -> None:
    """Float32 against float64: a few units in the last place of sums of about 60 nats."""
    monkeypatch.setattr(divergence_module, "_CHUNK_ELEMENTS", chunk_elements)
    hidden, base, labels, weight, bias_vector = inputs(bias=bias)
    row_weights = torch.tensor([1.0, -0.5, 3.0])  # so that a row's gradient cannot pass for another's
    ours = hidden.clone().requires_grad_(True)
    found = row_divergences(ours, base, labels, weight, bias_vector, *transform)
    (found * row_weights).sum().backward()

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        divisor, cap = transform
        logits = F.linear(states, weight.double(), None if bias_vector is None else bias_vector.double()) / divisor
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    plain = hidden.double().requires_grad_(True)
    each = F.kl_div(log_probabilities(plain), log_probabilities(base.double()), log_target=True, reduction="none")
    predicted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) != IGNORED_LABEL
    expected = (each.sum(-1) * predicted).sum(-1)
    (expected * row_weights.double()).sum().backward()

    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=5e-6)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=5e-6)
    assert found.dtype == torch.float32
    assert float(found.detach()[2]) > 0.1, "they must differ for this to mean anything"
    assert float(found.detach()[1]) == 0.0


def test_nothing_but_the_models_hidden_states_gets_a_gradient() -> None:
    hidden, base, labels, weight, bias = inputs(bias=True)
    assert bias is not None
    for tensor in (hidden, base, weight, bias):
        tensor.requires_grad_(True)
    row_divergences(hidden, base, labels, weight, bias).sum().backward()
    assert hidden.grad is not None
    assert base.grad is weight.grad is bias.grad is None
    assert not hidden.grad[:, -1].any(), "the last position predicts nothing"


def test_where_both_are_equal_there_is_neither_divergence_nor_gradient() -> None:
    """To rounding of float32: the probabilities of one softmax, formed twice alike."""
    _, base, labels, weight, _ = inputs(bias=False)
    hidden = base.clone().requires_grad_(True)
    found = row_divergences(hidden, base, labels, weight, None)
    found.sum().backward()
    assert hidden.grad is not None
    assert float(found.detach().abs().max()) == 0
    assert float(hidden.grad.abs().max()) < 1e-6


def test_in_bf16_products_are_bf16_and_all_after_them_float32() -> None:
    hidden, base, labels, weight, _ = inputs(bias=False)
    hidden, base, weight = hidden.bfloat16(), base.bfloat16(), weight.bfloat16()
    found = row_divergences(hidden, base, labels, weight, None)
    q, p = (F.linear(states, weight).float().log_softmax(-1) for states in (hidden, base))
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    predicted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) != IGNORED_LABEL
    torch.testing.assert_close(found, (each * predicted).sum(-1), rtol=1e-5, atol=1e-5)
