"""Causal attention on a CPU: matrix products of blocks of queries with the keys before them.

PyTorch's fused kernel for a CPU forms many small products, and takes each head's keys and values once for every query
head that shares them. For 256 tokens of SmolLM2-135M, forward and back, it does 35 GFLOP/s on a core that does 95 in
larger products; the products here, of all query heads of a group at once, do 57. The price is that the weights of
attention are kept for the backward pass, T / 2 numbers for each head and token; so longer texts stay with PyTorch's
kernel, and so does whatever has a mask of its own (sliding windows, several texts in a row).

Put into a model by transformers' `AttentionInterface` (read from 5.23): its attention modules find their function by a
name in their configuration.
"""

from __future__ import annotations

from typing import Any

import torch

_NAME = "causal_products"
_LONGEST = 512
"""Tokens."""
_BLOCK = 64
"""Queries whose scores are formed together: those against later keys are waste."""


class _CausalProducts(torch.autograd.Function):
    """query [rows, heads, tokens, width], key and value [rows, groups, tokens, width] -> [rows, tokens, heads, width].

    softmax(scale * query key^T) value, over the keys up to the query's own.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        rows, heads, tokens, width = query.shape
        keys, values = _grouped(key), _grouped(value)
        queries = query.reshape(len(keys), -1, tokens, width)
        out, later = torch.empty_like(queries), queries.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
        weights = []
        for start in range(0, tokens, _BLOCK):
            stop = min(tokens, start + _BLOCK)
            length = stop - start
            scores = torch.bmm(_flat(queries[:, :, start:stop]), keys[:, :stop].transpose(1, 2)).mul_(scale)
            scores.view(len(keys), -1, length, stop)[..., start:].add_(later[:length, :length])
            weights.append(torch.softmax(scores, dim=-1))
            out[:, :, start:stop] = torch.bmm(weights[-1], values[:, :stop]).view(len(keys), -1, length, width)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scale = scale
        return out.view(rows, heads, tokens, width).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        tokens, width = query.shape[2:]
        keys, values = _grouped(key), _grouped(value)
        queries = query.reshape(len(keys), -1, tokens, width)
        of_out = grad_outputs[0].transpose(1, 2).reshape(queries.shape)
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block, start in zip(weights, range(0, tokens, _BLOCK), strict=True):
            stop = min(tokens, start + _BLOCK)
            of_block = _flat(of_out[:, :, start:stop])
            of_values[:, :stop].baddbmm_(block.transpose(1, 2), of_block)
            of_weights = torch.bmm(of_block, values[:, :stop].transpose(1, 2))
            # Of a softmax: w (g - sum of w g).
            of_scores = of_weights.sub_(torch.linalg.vecdot(of_weights, block).unsqueeze(-1)).mul_(block)
            found = torch.bmm(of_scores, keys[:, :stop]).mul_(ctx.scale)
            of_queries[:, :, start:stop] = found.view(len(keys), -1, stop - start, width)
            of_keys[:, :stop].baddbmm_(of_scores.transpose(1, 2), _flat(queries[:, :, start:stop]), alpha=ctx.scale)
        return of_queries.view(query.shape), of_keys.view(key.shape), of_values.view(value.shape), None


def _grouped(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, groups, tokens, width] -> [rows * groups, tokens, width]"""
    return tensor.reshape(-1, *tensor.shape[2:])


def _flat(block: torch.Tensor) -> torch.Tensor:
    """[pairs, heads of a group, queries, width] -> [pairs, heads * queries, width]"""
    return block.reshape(block.shape[0], -1, block.shape[-1])


def use_products(model: torch.nn.Module) -> None:
    """Where the model would use PyTorch's own function for attention, and the device is a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config: Any = model.config
    if config._attn_implementation != "sdpa":
        return
    of_pytorch = AttentionInterface()["sdpa"]

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        tokens = query.shape[2]
        if (
            attention_mask is None
            and causal
            and dropout == 0
            and query.dtype == torch.float32
            and query.device.type == "cpu"
            and key.shape[2] == tokens <= _LONGEST
            and value.shape == key.shape
            and others.get("position_bias") is None
        ):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _CausalProducts.apply(query, key, value, scale), None
        result: tuple[torch.Tensor, None] = of_pytorch(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
        return result

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(_NAME)  # type: ignore[operator]
