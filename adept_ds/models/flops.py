"""Floating-point operations of a training step, for model FLOPs utilisation.

Counts what partly frozen training really does: 6 N per token overstates it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adept_ds.models.device import synchronize
from adept_ds.models.families import Family, module_path


@dataclass(frozen=True)
class StepFlops:
    """Operations per token."""

    forward: float
    backward_inputs: float
    """Gradients with respect to activations: the layers from the lowest trainable one up (all, where the embedding
    trains), and the head."""
    backward_weights: float
    """Gradients with respect to trainable weights of layers (adapters inside them too) and of the head."""

    @property
    def total(self) -> float:
        return self.forward + self.backward_inputs + self.backward_weights


def count_step_flops(model: torch.nn.Module, family: Family, seq_len: int, bypassed: Container[int] = ()) -> StepFlops:
    """Of a loaded model, in which that trains which requires a gradient.

    Args:
        bypassed: decoder layers that the residual stream passes around.
    """
    config: Any = model.config
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    layers = []
    for layer in (layer for index, layer in enumerate(family.layer_modules(model)) if index not in bypassed):
        sizes = [(p.requires_grad, _passed_weights(p, config, family)) for p in layer.parameters()]
        layers.append((sum(size for _, size in sizes), sum(size for trains, size in sizes if trains)))
    return step_flops(
        layers,
        attention_width(config),
        config.hidden_size * config.vocab_size,
        seq_len,
        head_trains=output.weight.requires_grad,
        embedding_trains=_trains_below_layers(model, family),
    )


def planned_step_flops(
    passed_weights: Sequence[float],
    chosen: Collection[int],
    attention_width: int,
    head_weights: float,
    seq_len: int,
    *,
    copied: bool = True,
) -> StepFlops:
    """Of a model that need not be there yet: its base with a trainable copy above each chosen layer.

    Args:
        passed_weights: of each layer of the base, those that a token passes.
        copied: otherwise the chosen layers train in place.
    """
    layers = []
    for layer, weights in enumerate(passed_weights):
        layers.append((weights, weights if layer in chosen and not copied else 0.0))
        if layer in chosen and copied:
            layers.append((weights, weights))
    return step_flops(layers, attention_width, head_weights, seq_len)


def step_flops(
    layers: Sequence[tuple[float, float]],
    attention_width: int,
    head_weights: float,
    seq_len: int,
    *,
    head_trains: bool = False,
    embedding_trains: bool = False,
) -> StepFlops:
    """2 operations per weight that a token passes in a matrix product, and those of attention's scores.

    The embedding's lookup and its gradient are no products and count as nothing, the final norm neither.

    Args:
        layers: of each layer, lowest first, the weights that a token passes, and those of them that train.
    """
    attention = _attention_flops(attention_width, seq_len)
    head = 2.0 * head_weights
    forward, backward_inputs = head, head
    backward_weights = head if head_trains else 0.0
    reached = embedding_trains
    for weights, trainable in layers:
        forward += 2.0 * weights + attention
        reached = reached or trainable > 0
        if reached:
            backward_inputs += 2.0 * weights + 2 * attention
        backward_weights += 2.0 * trainable
    return StepFlops(forward, backward_inputs, backward_weights)


def forward_flops(model: torch.nn.Module, family: Family, seq_len: int, lowest: int) -> float:
    """Operations per token of the decoder layers from `lowest` up, forward."""
    config: Any = model.config
    total = 0.0
    for layer in list(family.layer_modules(model))[lowest:]:
        total += 2.0 * sum(_passed_weights(parameter, config, family) for parameter in layer.parameters())
        total += _attention_flops(attention_width(config), seq_len)
    return total


def attention_width(config: Any) -> int:
    """Of all query heads together, which need not be the width of the residual stream. From transformers' config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_dim)


def _attention_flops(width: int, seq_len: int) -> float:
    """Of a layer, by token: scores and what is weighted by them, half of them behind the causal mask."""
    return 4.0 * seq_len * width / 2


def count_anchor_flops(
    model: torch.nn.Module, family: Family, seq_len: int, copies: Sequence[int], kind: Literal["kl", "neutral"]
) -> float:
    """Operations per anchor token, what the base computes being known (see `AnchorPasses.anchored`).

    Layers from the lowest copy up, forward and backward; kl: all of them, the head of both models, and its gradient;
    neutral: up to the highest copy, and no head.
    """
    config: Any = model.config
    attention = _attention_flops(attention_width(config), seq_len)
    total = 6.0 * config.hidden_size * config.vocab_size if kind == "kl" else 0.0
    layers = family.layer_modules(model)
    for number in range(copies[0], len(layers) if kind == "kl" else copies[-1] + 1):
        weights = 2.0 * sum(_passed_weights(parameter, config, family) for parameter in layers[number].parameters())
        total += 2 * weights + 3 * attention + (weights if number in copies else 0.0)
    return total


def _trains_below_layers(model: torch.nn.Module, family: Family) -> bool:
    """Whether an embedding, of tokens or of positions, is trained: all that is outside, but a norm or the head."""
    head = module_path(family.head)
    return any(
        parameter.requires_grad and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        for name, parameter in model.named_parameters()
        if family.split_name(name) is None and not name.startswith(f"{head}.")
    )


def _passed_weights(parameter: torch.Tensor, config: Any, family: Family) -> float:
    """Elements that one token meets: of a stack of experts, those of the ones that it is sent to."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    size = float(math.prod(shape))
    if family.experts_per_token_key and len(shape) == 3:
        return size * getattr(config, family.experts_per_token_key) / shape[0]
    return size


def measure_matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Operations per second of a large matrix product on this device: the ceiling that MFU is measured against."""
    size = 768 if torch.device(device).type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    synchronize()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            torch.mm(left, right)
        synchronize()
        products += 5
    return 2.0 * size**3 * products / (time.perf_counter() - start)
