"""Next-token loss without ever holding the logits of a whole batch.

Gradients are computed together with the loss, chunk by chunk: the same arithmetic as a plain backward, but one chunk of
logits in memory instead of several copies of all of them, and under ZeRO-3 the head is gathered once. A head that
trains gets the gradient of its weight from the same chunks, which costs one more matrix product and, until the backward
pass, a float32 copy of the weight; a frozen one costs nothing.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from adept_ds.models.head_chunks import bytes_per_logit, tokens_at_once
from adept_ds.models.hidden_states import final_hidden
from adept_ds.models.liger import Liger

IGNORED_LABEL = -100

_CHUNK_ELEMENTS = 1 << 24
"""Logits held at once on a CPU: 64 MiB in float32."""

_BLOCK_ELEMENTS = 1 << 18
"""Of those, what passes through a CPU's cache together: 1 MiB, and as much beside it. A device takes all at once."""


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy of each row.

    hidden [rows, tokens, dim], labels [rows, tokens], weight [vocab, dim], bias [vocab] or None -> [rows] float32.
    Logits are what the head says divided by `divisor`, and with a cap, c tanh(logits / c).

    Gradients of weight and bias are sums over rows that were formed before it is known how much each row counts: rows
    must count alike, as in any sum or mean of them. Where they do not, both become NaN.
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
        liger: Liger | None = None,
    ) -> torch.Tensor:
        rows, tokens, dim = hidden.shape
        flat_hidden, flat_labels = hidden.reshape(-1, dim), labels.reshape(-1)
        losses = torch.empty(rows * tokens, dtype=torch.float32, device=hidden.device)
        gradients = _Gradients.wanted(ctx.needs_input_grad, flat_hidden, weight, bias)
        step = tokens_at_once(rows * tokens, weight, bytes_per_logit(weight, divisor, cap), _CHUNK_ELEMENTS)
        for start in range(0, rows * tokens, step):
            chunk = slice(start, start + step)
            target = flat_labels[chunk]
            if liger is not None:
                logits = F.linear(flat_hidden[chunk], weight, bias)
                losses[chunk] = liger.cross_entropy(logits, target, cap, gradients is not None)
            else:
                logits, saturation = head_logits(flat_hidden[chunk], weight, bias, divisor, cap)
                losses[chunk] = _cross_entropy(logits, saturation, target, divisor, gradients is not None)
            if gradients is not None:
                gradients.add(chunk, logits, flat_hidden, weight)
        if gradients is not None:
            ctx.hidden_shape = hidden.shape
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return losses.view(rows, tokens).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_rows = grad_outputs[0]
        hidden, *of_head = ctx.saved_tensors
        if hidden is not None:
            hidden = hidden.view(ctx.hidden_shape)
            hidden = hidden * of_rows.view(-1, 1, 1).to(hidden.dtype)
        if any(grad is not None for grad in of_head):
            alike = (of_rows == of_rows[0]).all()
            of_any_row = torch.where(alike, of_rows[0], torch.nan)  # the host need not know
            # In place, as each is as large as the head; a second backward pass would be refused by autograd.
            of_head = [None if grad is None else grad.mul_(of_any_row) for grad in of_head]
        return hidden, None, *of_head, None, None, None


def _cross_entropy(
    logits: torch.Tensor, saturation: torch.Tensor | None, target: torch.Tensor, divisor: float, with_gradient: bool
) -> torch.Tensor:
    """Loss of each token, 0 where the label is ignored. [tokens] float32

    Args:
        logits, saturation: as from `head_logits`; `with_gradient`, the loss' gradient with respect to what the head
            says stands in the place of the logits afterwards.
    """
    counted = target != IGNORED_LABEL
    index = target.clamp_min(0).unsqueeze(-1)
    losses = torch.empty_like(target, dtype=torch.float32)
    on_cpu = logits.device.type == "cpu"
    step = max(1, _BLOCK_ELEMENTS // logits.shape[-1]) if on_cpu else len(logits)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        block, picked = logits[rows], index[rows]
        log_probabilities = torch.log_softmax(block, dim=-1)
        losses[rows] = log_probabilities.gather(-1, picked).squeeze(-1).neg_()
        if with_gradient:
            # d loss / d logits = softmax - one-hot; formed in the logits' own memory.
            torch.exp(log_probabilities, out=block)
            block.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=block.dtype))
            block.mul_(counted[rows].unsqueeze(-1) / divisor)
    if with_gradient and saturation is not None:
        logits.mul_(saturation.square_().neg_().add_(1))
    return losses * counted


@dataclass(frozen=True)
class _Gradients:
    """Of the sum of all token losses, while chunks are added; None where none is wanted."""

    hidden: torch.Tensor | None
    """[rows * tokens, dim], in the dtype of the hidden states."""
    weight: torch.Tensor | None
    """[vocab, dim] float32."""
    bias: torch.Tensor | None
    """[vocab] float32."""

    @classmethod
    def wanted(
        cls, needed: tuple[bool, ...], hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> _Gradients | None:
        """Nothing yet. `needed` says of each argument of `_HeadLoss` whether it requires one; None: none does."""
        of_hidden, _, of_weight, of_bias, *_ = needed
        if not (of_hidden or of_weight or of_bias):
            return None
        return cls(
            torch.empty_like(hidden) if of_hidden else None,
            torch.zeros_like(weight, dtype=torch.float32) if of_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if of_bias and bias is not None else None,
        )

    def add(self, chunk: slice, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """A chunk of tokens, whose gradients with respect to the logits are `logits` [tokens, vocab]."""
        products = logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = products @ weight
        if self.weight is not None:
            if weight.dtype == torch.float32:
                self.weight.addmm_(products.t(), hidden[chunk])
            else:  # a product in half precision, a sum of them in float32
                self.weight.add_(products.t() @ hidden[chunk])
        if self.bias is not None:
            self.bias.add_(logits.sum(0, dtype=torch.float32))


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, divisor: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[tokens, vocab] float32, and with a cap, tanh(logits / cap) before it."""
    logits = F.linear(hidden, weight, bias).float()
    if divisor != 1:
        logits = logits / divisor
    if cap is None:
        return logits, None
    saturation = torch.tanh(logits / cap)
    return saturation * cap, saturation


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels of the next token: position t predicts t + 1, the last position predicts nothing. [rows, tokens]"""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def install_row_losses(
    model: torch.nn.Module, divisor: float = 1.0, cap: float | None = None, liger: Liger | None = None
) -> None:
    """Make `model(input_ids, labels, positions)` return the summed next-token loss of each row, [rows] float32.

    `positions` [rows, tokens], where a row holds several texts, restarts at 0 with each of them; transformers then lets
    none attend to another.

    Replaces the `forward` of this instance and of its output head. An instance attribute rather than a wrapping
    module, because a wrapper would rename every parameter in checkpoints; through the head's own call rather than
    beside it, because DeepSpeed's hooks gather the head's weight around that call.

    Args:
        divisor, cap: what the model's own forward does to the logits afterwards (see `Family.logit_transform`).
        liger: its kernel makes losses of logits, where it can; None: PyTorch's operations do.
    """
    kernel = liger if liger and liger.takes(divisor) else None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def head_forward(self: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] != labels.shape[0]:  # a stack of variants over the same rows
            labels = labels.repeat(hidden.shape[0] // labels.shape[0], 1)
        weight, bias = self.weight, self.bias
        if not torch.is_grad_enabled():  # inside a `Function` it never is
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return _HeadLoss.apply(hidden, shifted_labels(labels), weight, bias, divisor, cap, kernel)

    def model_forward(
        self: Any, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        return head(final_hidden(self, input_ids, positions), labels)

    head.forward = types.MethodType(head_forward, head)
    model.forward = types.MethodType(model_forward, model)
