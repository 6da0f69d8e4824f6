"""A head that trains: its gradient is PyTorch's, formed with the loss, and a frozen one costs nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.losses import count_predicted
from harness.models import FAMILY_OPTIONS, VOCABULARY, save_tiny_model

from adept_ds.models import head_loss as loss_module
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.head_loss import IGNORED_LABEL, _HeadLoss, install_row_losses, shifted_labels
from adept_ds.models.loading import load_causal_lm, make_all_trainable

ROWS, TOKENS, DIM = 3, 24, 8
FEW_TOKENS = 5 * VOCABULARY
"""Chunks of 5 tokens, which divide neither a row of 24 tokens nor the batch of 72."""


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, labels and positions: two documents in the first row, a padded second one, a third without labels."""
    input_ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).repeat(ROWS, 1)
    positions[0, 13:] -= 13
    labels = input_ids.clone()
    labels[0, 13] = labels[1, 17:] = labels[2] = IGNORED_LABEL
    return input_ids, labels, positions


def head_inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Hidden states, weight and bias; all of them train."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, TOKENS, DIM), (VOCABULARY, DIM), (VOCABULARY,))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_(True) for shape in shapes]


def plain_losses(inputs: list[torch.Tensor], divisor: float = 1.0, cap: float | None = None) -> torch.Tensor:
    """[rows] by PyTorch's own cross entropy."""
    logits = F.linear(*inputs).to(torch.promote_types(inputs[0].dtype, torch.float32)) / divisor
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    labels = shifted_labels(packed_batch()[1])
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return each.view(ROWS, TOKENS).sum(-1)


def our_losses(inputs: list[torch.Tensor], divisor: float = 1.0, cap: float | None = None) -> torch.Tensor:
    hidden, weight, bias = inputs
    return _HeadLoss.apply(hidden, shifted_labels(packed_batch()[1]), weight, bias, divisor, cap)


# --- the head alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_elements", [1, FEW_TOKENS, 1 << 24], ids=["1 token", "5 tokens", "whole"])
@pytest.mark.parametrize("transform", [(1.0, None), (3.0, None), (1.5, 2.0)], ids=["plain", "divided", "capped"])
@pytest.mark.parametrize("trains", [(0, 1, 2), (1,), (2,), (0, 2)], ids=["all", "weight", "bias", "all but the weight"])
def test_gradients_of_weight_and_bias_are_autograds(
    monkeypatch: pytest.MonkeyPatch,
    chunk_elements: int,
    transform: tuple[float, float | None],
    trains: tuple[int, ...],
) -> None:
    """Against float64; a few units in the last place of float32."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    ours = [tensor.requires_grad_(index in trains) for index, tensor in enumerate(head_inputs())]
    exact = [tensor.detach().double().requires_grad_(index in trains) for index, tensor in enumerate(ours)]
    (our_losses(ours, *transform).mean() * 0.37).backward()
    (plain_losses(exact, *transform).mean() * 0.37).backward()
    for index, (mine, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert (mine.grad is None) == (index not in trains)
        if mine.grad is not None and wanted.grad is not None:
            assert wanted.grad.abs().max() > 0.01
            torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=2e-6, atol=2e-6)


def test_in_bf16_the_gradient_is_as_near_to_the_exact_one_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks must not add up to a larger error than one product of all tokens has."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", VOCABULARY)
    ours, plain = head_inputs(torch.bfloat16), head_inputs(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_(True) for tensor in ours]
    our_losses(ours).sum().backward()
    plain_losses(plain).sum().backward()
    plain_losses(exact).sum().backward()
    for mine, pytorchs, wanted in zip(ours, plain, exact, strict=True):
        errors = [float((tensor.grad.double() - wanted.grad).norm()) for tensor in (mine, pytorchs)]  # type: ignore
        assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
        assert errors[0] < 1.05 * errors[1]


def test_rows_that_count_differently_make_the_heads_gradient_nan_and_leave_the_others_right() -> None:
    hidden, weight, bias = ours = head_inputs()
    exact = [tensor.detach().double().requires_grad_(True) for tensor in ours]
    row_weights = torch.tensor([1.0, 1.0, 1.5])
    (our_losses(ours) * row_weights).sum().backward()
    (plain_losses(exact) * row_weights).sum().backward()
    assert weight.grad is not None and bias.grad is not None and hidden.grad is not None
    assert weight.grad.isnan().all() and bias.grad.isnan().all()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=2e-6, atol=2e-6)


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    loss = our_losses(head_inputs()).sum() * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- a frozen head --------------------------------------------------------------------------------------------------


def test_a_frozen_head_keeps_nothing_for_its_gradient_and_changes_no_bit() -> None:
    trained, frozen = head_inputs(), head_inputs()
    for tensor in frozen[1:]:
        tensor.requires_grad_(False)
    losses = [our_losses(inputs, 1.5, 2.0) for inputs in (trained, frozen)]
    kept = [[tensor for tensor in loss.grad_fn.saved_tensors if tensor is not None] for loss in losses]  # type: ignore
    assert [len(tensors) for tensors in kept] == [3, 1]
    for loss in losses:
        loss.sum().backward()
    assert torch.equal(*losses)
    assert trained[0].grad is not None and frozen[0].grad is not None
    assert torch.equal(trained[0].grad, frozen[0].grad)
    assert frozen[1].grad is None and frozen[2].grad is None


def test_an_evaluation_of_a_model_that_trains_forms_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_causal_lm(ModelDirectory.read(save_tiny_model(tmp_path)), torch.float32)
    make_all_trainable(model)
    monkeypatch.setattr(loss_module._Gradients, "add", lambda *_: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        model(*packed_batch())


# --- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_gradients_of_all_parameters_are_those_of_hugging_faces_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """1e-4 relative in fp32: sums over tokens in another order. Heads, tied ones too, embeddings, positions, norms."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", FEW_TOKENS)
    directory = save_tiny_model(tmp_path, model_type)
    ours: Any = load_causal_lm(ModelDirectory.read(directory), torch.float32).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    make_all_trainable(ours)
    input_ids, labels, positions = packed_batch()
    (ours(input_ids, labels, positions).sum() / count_predicted(labels)).backward()
    plain(input_ids=input_ids, labels=labels, position_ids=positions, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = expected.pop(name).grad
        assert parameter.grad is not None and wanted is not None, name
        assert wanted.abs().max() > 1e-6, f"{name}: a gradient of nothing proves nothing"
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert not expected


def test_in_bf16_a_whole_models_gradient_is_as_near_to_the_exact_one_as_hugging_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parameters together, the tied one counted once: rounding, not a missing or doubled part."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", FEW_TOKENS)
    directory = save_tiny_model(tmp_path)
    input_ids, labels, positions = packed_batch()
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        plain(input_ids=input_ids, labels=labels, position_ids=positions, use_cache=False).loss.backward()
        gradients.append(list(plain.parameters()))
    ours: Any = load_causal_lm(ModelDirectory.read(directory), torch.bfloat16).eval()
    make_all_trainable(ours)
    (ours(input_ids, labels, positions).sum() / count_predicted(labels)).backward()
    flat = [
        torch.cat([parameter.grad.flatten().double() for parameter in parameters])
        for parameters in (list(ours.parameters()), *gradients)
    ]
    error, plain_error = (float((gradient - flat[2]).norm() / flat[2].norm()) for gradient in flat[:2])
    assert error < 1.1 * plain_error < 0.1


def test_a_tied_head_counts_as_embedding_and_as_head_once_each(tmp_path: Path) -> None:
    """The gradient of a tied matrix is the sum of those of its two uses, which an untied copy shows apart."""
    from transformers import AutoModelForCausalLM

    source = ModelDirectory.read(save_tiny_model(tmp_path))
    tied: Any = load_causal_lm(source, torch.float32)
    untied: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    untied.lm_head.weight = copy.deepcopy(untied.lm_head.weight)
    install_row_losses(untied)
    for model in (tied, untied):
        make_all_trainable(model)
        model(*packed_batch()).sum().backward()
    parts = [untied.model.embed_tokens.weight.grad, untied.lm_head.weight.grad]
    assert min(float(part.norm()) for part in parts) > 0.1
    torch.testing.assert_close(tied.lm_head.weight.grad, sum(parts), rtol=1e-5, atol=1e-5)
