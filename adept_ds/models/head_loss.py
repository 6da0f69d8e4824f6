"""Next-token loss without ever holding the logits of a whole batch.

The output head is frozen here, so the gradient with respect to the hidden states can be computed together with the
loss, chunk by chunk: the same arithmetic as a plain backward, but one chunk of logits in memory instead of several
copies of all of them, and under ZeRO-3 the head is gathered once.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100


_CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy of each row.

    hidden [rows, tokens, dim], labels [rows, tokens], weight [vocab, dim], bias [vocab] or None -> [rows] float32.
    Logits are what the head says divided by `divisor`, and with a cap, c tanh(logits / c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        divisor: float = 1.0,
        cap: float | None = None,
    ) -> torch.Tensor:
        rows, tokens, dim = hidden.shape
        flat_hidden, flat_labels = hidden.reshape(-1, dim), labels.reshape(-1)
        needs_grad = hidden.requires_grad
        losses = torch.empty(rows * tokens, dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(flat_hidden) if needs_grad else None
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, rows * tokens, step):
            chunk = slice(start, start + step)
            logits = F.linear(flat_hidden[chunk], weight, bias).float()
            if divisor != 1:
                logits = logits / divisor
            if cap is not None:
                saturation = torch.tanh(logits / cap)
                logits = saturation * cap
            target = flat_labels[chunk]
            log_normaliser = torch.logsumexp(logits, dim=-1)
            counted = target != IGNORED_LABEL
            index = target.clamp_min(0).unsqueeze(-1)
            losses[chunk] = (log_normaliser - logits.gather(-1, index).squeeze(-1)) * counted
            if grad is not None:
                # d loss / d logits = softmax - one-hot; formed in the logits' own memory.
                logits.sub_(log_normaliser.unsqueeze(-1)).exp_()
                logits.scatter_add_(-1, index, torch.full_like(index, -1, dtype=logits.dtype))
                logits.mul_(counted.unsqueeze(-1) / divisor)
                if cap is not None:
                    logits.mul_(saturation.square_().neg_().add_(1))
                grad[chunk] = logits.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad.view(rows, tokens, dim))
        return losses.view(rows, tokens).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].view(-1, 1, 1).to(grad.dtype), *(None,) * 5


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels of the next token: position t predicts t + 1, the last position predicts nothing. [rows, tokens]"""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def install_row_losses(model: torch.nn.Module, divisor: float = 1.0, cap: float | None = None) -> None:
    """Make `model(input_ids, labels, positions)` return the summed next-token loss of each row, [rows] float32.

    `positions` [rows, tokens], where a row holds several texts, restarts at 0 with each of them; transformers then lets
    none attend to another.

    Replaces the `forward` of this instance and of its output head. An instance attribute rather than a wrapping
    module, because a wrapper would rename every parameter in checkpoints; through the head's own call rather than
    beside it, because DeepSpeed's hooks gather the head's weight around that call.

    Args:
        divisor, cap: what the model's own forward does to the logits afterwards (see `Family.logit_transform`).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight.requires_grad:
        raise ValueError("the output head must be frozen: its gradient is not computed")

    def head_forward(self: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] != labels.shape[0]:  # a stack of variants over the same rows
            labels = labels.repeat(hidden.shape[0] // labels.shape[0], 1)
        return _HeadLoss.apply(hidden, shifted_labels(labels), self.weight, self.bias, divisor, cap)

    def model_forward(
        self: Any, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = self.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        return head(hidden, labels)

    head.forward = types.MethodType(head_forward, head)
    model.forward = types.MethodType(model_forward, model)
