"""Divergence of next-token distributions, without ever holding the logits of a whole batch.

The loss of an anchor of kind `kl`: the Kullback-Leibler divergence

    D(p || q) = sum_v p(v) (log p(v) - log q(v))

of a model's next-token distribution q from that of its base, p. In this direction (forward KL, as in distillation) q
has to cover all that the base may say, and the gradient with respect to q's logits is q - p: that of cross entropy with
the base's distribution in the place of the text's next token. Both come out of the same frozen head, so that of p the
hidden states below the head are enough. As in `head_loss`, gradients are formed with the divergence, a chunk of logits
at a time; here two chunks are held together.
"""

from __future__ import annotations

from typing import Any

import torch

from adept_ds.models.head_chunks import bytes_per_logit, tokens_at_once
from adept_ds.models.head_loss import IGNORED_LABEL, head_logits, shifted_labels

_CHUNK_ELEMENTS = 1 << 23
"""Logits of each model that are held at once on a CPU: 32 MiB in float32."""


class _HeadDivergence(torch.autograd.Function):
    """Of each row, the sum of D(p || q) over its predicted tokens.

    hidden, base [rows, tokens, dim], labels [rows, tokens], weight [vocab, dim], bias [vocab] or None
    -> [rows] float32. Only `hidden`, below the head of q, gets a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        base: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        divisor: float,
        cap: float | None,
    ) -> torch.Tensor:
        rows, tokens, dim = hidden.shape
        flat, flat_base = hidden.reshape(-1, dim), base.reshape(-1, dim)
        counted = labels.reshape(-1) != IGNORED_LABEL
        divergences = torch.empty(rows * tokens, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        step = tokens_at_once(rows * tokens, weight, 2 * bytes_per_logit(weight, divisor, cap), _CHUNK_ELEMENTS)
        for start in range(0, rows * tokens, step):
            chunk = slice(start, start + step)
            log_p = head_logits(flat_base[chunk], weight, bias, divisor, cap)[0].log_softmax(-1)
            logits, saturation = head_logits(flat[chunk], weight, bias, divisor, cap)
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            divergences[chunk] = (p * log_p.sub_(log_q)).sum(-1) * counted[chunk]
            if gradient is not None:
                # d D / d logits = q - p; formed in the logits' own memory.
                of_logits = log_q.exp_().sub_(p).mul_(counted[chunk].unsqueeze(-1) / divisor)
                if saturation is not None:
                    of_logits.mul_(saturation.square_().neg_().add_(1))
                gradient[chunk] = of_logits.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.hidden_shape = hidden.shape
            ctx.save_for_backward(gradient)
        return divergences.view(rows, tokens).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient.view(ctx.hidden_shape)
        return gradient * grad_outputs[0].view(-1, 1, 1).to(gradient.dtype), *[None] * 6


def row_divergences(
    hidden: torch.Tensor,
    base: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    divisor: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Of each row, the sum over predicted tokens of the divergence from the base's next-token distribution, in nats.

    Args:
        hidden: what enters the head of the model. [rows, tokens, dim]
        base: the same of its base, on the same tokens; gets no gradient. [rows, tokens, dim]
        labels: which say what is predicted, as those of a loss do. [rows, tokens]
        weight, bias: of the head of both, which is frozen. [vocab, dim], [vocab]
        divisor, cap: as in `head_loss`.

    Returns:
        [rows] float32.
    """
    frozen = weight.detach(), None if bias is None else bias.detach()
    return _HeadDivergence.apply(hidden, base.detach(), shifted_labels(labels), *frozen, divisor, cap)
