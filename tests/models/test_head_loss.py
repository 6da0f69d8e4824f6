"""The chunked loss against Hugging Face's own loss and PyTorch's autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.losses import count_predicted
from harness.models import VOCABULARY, save_tiny_model

from adept_ds.models import head_loss as loss_module
from adept_ds.models.head_loss import IGNORED_LABEL, _HeadLoss, install_row_losses, shifted_labels

ROWS, TOKENS, DIM = 3, 11, 8


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    directory = save_tiny_model(tmp_path_factory.mktemp("loss") / "model")
    return AutoModelForCausalLM.from_pretrained(directory)


def tokens_and_labels(*, ignored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels = input_ids.clone()
    if ignored:
        labels[0, 4:] = IGNORED_LABEL  # a padded tail
        labels[1, :] = IGNORED_LABEL  # a filler row
        labels[2, 3] = IGNORED_LABEL
    return input_ids, labels


def head_inputs(*, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, TOKENS, DIM, generator=generator, dtype=torch.float32)
    weight = torch.randn(VOCABULARY, DIM, generator=generator)
    return hidden, weight, torch.randn(VOCABULARY, generator=generator) if bias else None


# Both sides are float32 with sums in different orders: a few units in the last place.
ROUNDING: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}


# 262 logits per token: chunks of 1, 4 and 33 tokens. 4 divides neither a row of 11 tokens nor the batch of 33.
@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCABULARY, 1 << 24], ids=["1 token", "4 tokens", "whole"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all labels", "ignored labels"])
@pytest.mark.parametrize("transform", [(1.0, None), (3.0, None), (1.5, 2.0)], ids=["plain", "divided", "capped"])
def test_loss_and_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch,
    chunk_elements: int,
    bias: bool,
    ignored: bool,
    transform: tuple[float, float | None],
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(loss_module, "_BLOCK_ELEMENTS", 3 * VOCABULARY)
    _, labels = tokens_and_labels(ignored=ignored)
    labels = shifted_labels(labels)
    hidden, weight, bias_vector = head_inputs(bias=bias)
    row_weights = torch.tensor([1.0, -0.5, 3.0])  # so that a row's gradient cannot pass for another's

    ours = hidden.clone().requires_grad_(True)
    losses = _HeadLoss.apply(ours, labels, weight, bias_vector, *transform)
    (losses * row_weights).sum().backward()

    plain = hidden.double().requires_grad_(True)
    logits = F.linear(plain, weight.double(), None if bias_vector is None else bias_vector.double())
    divisor, cap = transform
    logits = logits / divisor
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    expected = each.view(ROWS, TOKENS).sum(-1)
    (expected * row_weights.double()).sum().backward()

    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-5)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), plain.grad, **ROUNDING)
    assert losses.dtype == torch.float32


def test_ignored_tokens_get_no_gradient_at_all() -> None:
    _, labels = tokens_and_labels(ignored=True)
    hidden, weight, _ = head_inputs(bias=False)
    hidden.requires_grad_(True)
    losses = _HeadLoss.apply(hidden, shifted_labels(labels), weight, None)
    losses.sum().backward()
    assert float(losses[1].detach()) == 0.0
    assert hidden.grad is not None
    assert not hidden.grad[1].any()
    assert not hidden.grad[:, -1].any(), "the last position predicts nothing"
    assert not hidden.grad[0, 3:].any()
    assert hidden.grad[0, :3].abs().sum(-1).min() > 0


def test_bf16_logits_are_normalised_in_float32() -> None:
    _, labels = tokens_and_labels(ignored=True)
    labels = shifted_labels(labels)
    hidden, weight, _ = head_inputs(bias=False)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    losses = _HeadLoss.apply(hidden, labels, weight, None)
    logits = F.linear(hidden, weight).float()  # the same bf16 product; everything after it in float32
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    torch.testing.assert_close(losses, each.view(ROWS, TOKENS).sum(-1), rtol=2e-6, atol=2e-5)


def test_without_gradient_nothing_is_kept_for_a_backward_pass() -> None:
    _, labels = tokens_and_labels(ignored=False)
    hidden, weight, _ = head_inputs(bias=False)
    assert _HeadLoss.apply(hidden, shifted_labels(labels), weight, None).grad_fn is None


def test_labels_are_shifted_and_counted_by_hand() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [1, 2, IGNORED_LABEL, IGNORED_LABEL], [IGNORED_LABEL] * 4])
    assert shifted_labels(labels).tolist() == [
        [6, 7, 8, IGNORED_LABEL],
        [2, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL],
        [IGNORED_LABEL] * 4,
    ]
    assert count_predicted(labels) == 3 + 1 + 0


@pytest.mark.parametrize("ignored", [False, True], ids=["all labels", "ignored labels"])
def test_the_model_returns_hugging_faces_loss(tiny_model: Any, ignored: bool) -> None:
    input_ids, labels = tokens_and_labels(ignored=ignored)
    expected = tiny_model(input_ids=input_ids, labels=labels).loss
    ours = copy.deepcopy(tiny_model).requires_grad_(False)
    install_row_losses(ours)
    losses = ours(input_ids, labels)
    assert losses.shape == (ROWS,)
    torch.testing.assert_close(losses.sum() / count_predicted(labels), expected, **ROUNDING)


def test_trainable_layers_get_the_gradient_that_hugging_faces_loss_gives(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 4 * VOCABULARY)
    input_ids, labels = tokens_and_labels(ignored=True)
    plain, ours = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for model in (plain, ours):
        model.requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
        model.model.layers[3].requires_grad_(True)
    install_row_losses(ours)
    plain(input_ids=input_ids, labels=labels).loss.backward()
    (ours(input_ids, labels).sum() / count_predicted(labels)).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert expected.grad.abs().max() > 1e-5, f"{name}: a gradient of nothing proves nothing"
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_stack_of_variants_shares_the_labels_of_its_rows(tiny_model: Any) -> None:
    """The head sees [variants * rows, tokens, dim] but labels for the rows only."""
    _, labels = tokens_and_labels(ignored=True)
    model = copy.deepcopy(tiny_model).requires_grad_(False)
    install_row_losses(model)
    head = model.get_output_embeddings()
    stack = torch.randn(4 * ROWS, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    each = torch.cat([head(stack[v * ROWS : (v + 1) * ROWS], labels) for v in range(4)])
    torch.testing.assert_close(head(stack, labels), each, **ROUNDING)


def test_parameter_names_stay_those_of_the_checkpoint(tiny_model: Any) -> None:
    model = copy.deepcopy(tiny_model).requires_grad_(False)
    install_row_losses(model)
    assert list(model.state_dict()) == list(tiny_model.state_dict())
