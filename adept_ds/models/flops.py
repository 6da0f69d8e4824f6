"""Floating-point operations of a training step, for model FLOPs utilisation.

Counts what partly frozen training really does: 6 N per token overstates it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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


def count_step_flops(model: torch.nn.Module, family: Family, seq_len: int) -> StepFlops:
    """2 operations per weight that a token passes in a matrix product; attention scores 4 * seq_len * dim per layer.

    The embedding's lookup and its gradient are no products and count as nothing, the final norm neither.
    """
    config: Any = model.config
    attention = 4.0 * seq_len * config.hidden_size / 2  # causal: half of the scores
    head = 2.0 * config.hidden_size * config.vocab_size
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    forward, backward_inputs = head, head
    backward_weights = head if output.weight.requires_grad else 0.0
    reached = _trains_below_layers(model, family)
    for layer in family.layer_modules(model):
        sizes = [(p.requires_grad, _passed_weights(p, config, family)) for p in layer.parameters()]
        weights = 2.0 * sum(size for _, size in sizes)
        trainable = 2.0 * sum(size for trains, size in sizes if trains)
        forward += weights + attention
        reached = reached or trainable > 0
        if reached:
            backward_inputs += weights + 2 * attention
        backward_weights += trainable
    return StepFlops(forward, backward_inputs, backward_weights)


def count_anchor_flops(
    model: torch.nn.Module, family: Family, seq_len: int, copies: Sequence[int], kind: Literal["kl", "neutral"]
) -> float:
    """Operations per anchor token, what the base computes being known (see `AnchorPasses.anchored`).

    Layers from the lowest copy up, forward and backward; kl: all of them, the head of both models, and its gradient;
    neutral: up to the highest copy, and no head.
    """
    config: Any = model.config
    attention = 4.0 * seq_len * config.hidden_size / 2
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


def measure_matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3) -> float:
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
