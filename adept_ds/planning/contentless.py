"""Models without content, on PyTorch's meta device, where tensors have a shape and nothing else.

Attention is taken for PyTorch's fused kernel of an accelerator, which keeps queries, keys, values, its output and a
number for each query, and no scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from adept_ds.models.directory import ModelDirectory, understood_by_transformers
from adept_ds.models.weight_files import Shapes

_ATTENTION = "planned"


def contentless_shapes(model: ModelDirectory) -> Shapes:
    """As `contentless_model`, of its parameters."""
    return {name: tuple(of.shape) for name, of in contentless_model(model, torch.float32).named_parameters()}


def contentless_model(model: ModelDirectory, precision: torch.dtype) -> Any:
    """A frozen causal language model, ready to train; nothing but config.json has to be there.

    Raises:
        InputError: transformers cannot make a model of its configuration.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    with understood_by_transformers(model.path), torch.device("meta"):
        config = AutoConfig.for_model(**model.config)
        built: Any = AutoModelForCausalLM.from_config(config, dtype=precision)
    if built.config._attn_implementation == "sdpa":
        built.set_attn_implementation(_ATTENTION)
    for module in built.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # others look at the positions; shapes are the same
    built.config.use_cache = False
    built.config.pad_token_id = None  # or GPT-2 looks for it among the tokens
    built.requires_grad_(False)
    return built.train()


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps and returns, without computing anything. [rows, heads, tokens, width] each."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _FusedAttention.apply(query, key, value), None


class _GroupedProduct(torch.autograd.Function):
    """Shapes of `grouped_mm`: rows [n, inputs], in groups, times a matrix of each [groups, inputs, outputs]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        needs_rows, needs_matrices = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_matrices else None, matrices if needs_rows else None)
        ctx.shapes = rows.shape, matrices.shape
        return rows.new_empty(rows.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
        return tuple(grad_outputs[0].new_empty(shape) if needs else None for needs, shape in needed)


class StandIns(TorchFunctionMode):
    """Of operations that refuse tensors without content: PyTorch (2.13) groups products of such in bf16 alone."""

    def __init__(self, sees_linear: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._sees_linear = sees_linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm") and args[0].dtype != torch.bfloat16:
            return _GroupedProduct.apply(args[0], args[1])
        if func is torch.nn.functional.linear and any(tensor.requires_grad for tensor in args[:2]):
            self._sees_linear(args[0])
        return func(*args, **(kwargs or {}))
