"""TODO probing.sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback
from adept_ds.data.mixture import Sample
from adept_ds.data.order import FILLER, rank_batches
from adept_ds.models.families import Family
from adept_ds.ranks.collectives import rank, sum_over_ranks, world_size


class PassProgress:
    """A bar for passes over batches of sequences.

    Args:
        check: moves the bar; called between batches by every rank, it may communicate and end the work.
        move: moves the bar only; for within a batch.
    """

    def __init__(self, num_layers: int, check: ProgressCallback, move: ProgressCallback) -> None:
        self._num_layers, self._check, self._move = num_layers, check, move
        self._number, self._count = 0, 1

    def batch(self, number: int, count: int) -> None:
        """Batch `number` of `count` begins."""
        self._number, self._count = number, count
        self._check(number / count, f"block {number + 1} of {count}")

    def layer(self, position: int) -> None:
        """The stack of a sweep has passed a layer; each layer takes one variant more than the one below."""
        share = (position + 1) * (position + 2) / (self._num_layers * (self._num_layers + 1))
        self._move(
            (self._number + share) / self._count,
            f"block {self._number + 1} of {self._count}, layer {position + 1} of {self._num_layers}",
        )


def table_by_sequence(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sample: Sample,
    width: int,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: PassProgress | None = None,
) -> torch.Tensor:
    """What `forward(input_ids, labels)` says about each row, [rows, width], for every sequence of the sample.

    Every rank takes its share of the sequences and gets the whole table, [sequences, width] float64. Each entry comes
    from one rank, so sums over the table do not depend on who computed what.
    """
    table = torch.zeros(len(sample), width, dtype=torch.float64)
    batches = rank_batches(range(len(sample)), rank(), world_size(), batch_size)
    for number, positions in enumerate(batches):
        if progress:
            progress.batch(number, len(batches))
        input_ids, labels = (tensor.to(device) for tensor in sample.batch(positions))
        rows = forward(input_ids, labels).double().cpu()
        for row, position in zip(rows, positions, strict=True):
            if position != FILLER:
                table[position] = row
    return sum_over_ranks(table)


def bypass_losses(
    model: Callable[..., torch.Tensor],
    num_layers: int,
    sample: Sample,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: PassProgress | None = None,
) -> torch.Tensor:
    """Summed token loss of every sequence: of the model, and of the model without each layer. [sequences, M + 1]

    Args:
        model: returns the loss sums of the whole stack, [(num_layers + 1) * rows] (see `install_layer_sweep`).
        batch_size: sequences per rank that are swept together.
    """

    def forward(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(input_ids, labels).view(num_layers + 1, len(input_ids)).T

    with torch.no_grad():
        return table_by_sequence(
            forward, sample, num_layers + 1, batch_size=batch_size, device=device, progress=progress
        )


def install_layer_sweep(
    model: torch.nn.Module, family: Family, max_stack_tokens: int, on_layer: Callable[[int], None] | None = None
) -> None:
    """Make every decoder layer carry the stack of variants: `model(input_ids, labels)` returns M + 1 losses per row.

    Needs nothing of a family's `forward` but that it maps hidden states to hidden states. Replaces the instance's
    `forward`, so DeepSpeed's hooks around the layer's call gather its weights once for the whole stack.

    Args:
        max_stack_tokens: the stack passes a layer in chunks of at most so many tokens (at least one block).
        on_layer: called with the index of each layer that the stack has passed.
    """
    for position, layer in enumerate(family.layer_modules(model)):
        layer.forward = functools.partial(_sweep_layer, layer.forward, position, max_stack_tokens)
        if on_layer:
            layer.register_forward_hook(functools.partial(_report, on_layer, position))


def _sweep_layer(
    forward: Callable[..., Any], position: int, max_stack_tokens: int, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """hidden [(position + 1) * rows, tokens, dim] -> [(position + 2) * rows, tokens, dim]."""
    rows = hidden.shape[0] // (position + 1)
    variants_per_chunk = max(1, max_stack_tokens // (rows * hidden.shape[1]))
    outputs = []
    for chunk in hidden.split(variants_per_chunk * rows):
        repeat = chunk.shape[0] // rows
        output = forward(
            chunk,
            *(_repeat_rows(value, rows, repeat) for value in args),
            **{key: _repeat_rows(value, rows, repeat) for key, value in kwargs.items()},
        )
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return torch.cat([*outputs, hidden[:rows]])


def _report(on_layer: Callable[[int], None], position: int, *_: Any) -> None:
    on_layer(position)


def _repeat_rows(value: Any, rows: int, repeat: int) -> Any:
    """Repeat what belongs to the batch (masks, positions) for every variant; what has one row broadcasts by itself."""
    if isinstance(value, tuple):
        return tuple(_repeat_rows(item, rows, repeat) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == rows > 1:
        return value.repeat(repeat, *[1] * (value.dim() - 1))
    return value
