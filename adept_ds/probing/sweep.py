"""Which layers does general competence hardly need? One sweep that bypasses each of them (paper, section 3.1).

    delta_i = loss(D_gen, model with layer i bypassed) - loss(D_gen, model)

All M + 1 losses come out of one walk up the decoder. A stack of hidden states is carried along: the unchanged model,
and one variant for every layer already bypassed. At layer j the whole stack passes through the layer, and variant j
joins as a copy of the unchanged model's input to it. That is M (M + 1) / 2 + M layer passes instead of about M^2, and
under ZeRO-3 each layer is gathered once per batch instead of M + 1 times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Sample
from adept_ds.models.families import Family
from adept_ds.probing.passes import PassProgress, table_by_sequence
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work


def bypass_losses(
    model: Callable[..., torch.Tensor],
    num_layers: int,
    sample: Sample,
    ranks: Ranks,
    *,
    micro_batch_size: int,
    device: torch.device | str,
    progress: PassProgress | None = None,
    work: Work | None = None,
) -> torch.Tensor:
    """Summed token loss of every sequence: of the model, and of the model without each layer. [sequences, M + 1]

    Args:
        model: returns the loss sums of the whole stack, [(num_layers + 1) * rows] (see `install_layer_sweep`).
        micro_batch_size: sequences per rank that are swept together.
        work: where the passes are kept.
    """

    def forward(batch: Batch) -> torch.Tensor:
        return model(*batch).view(num_layers + 1, len(batch.input_ids)).T

    with torch.no_grad():
        return table_by_sequence(
            forward,
            sample,
            num_layers + 1,
            ranks,
            micro_batch_size=micro_batch_size,
            device=device,
            progress=progress,
            work=work,
        )


@dataclass(frozen=True)
class Stack:
    """Which variants there are just below a layer, and what becomes of them there."""

    variants: int
    """Those that have joined, the unchanged model included."""
    around: tuple[int, ...]
    """Places of those that go around this layer; more of them join behind the last."""
    joining: int

    @property
    def through(self) -> list[int]:
        """Places of those that pass the layer."""
        return [place for place in range(self.variants) if place not in self.around]


def stacks(num_layers: int, bypasses: Sequence[Collection[int]]) -> list[Stack]:
    """The stack below each layer.

    Args:
        bypasses: of each variant the layers that it goes around, those with the lowest layer first.
    """
    lowest = [min(layers) for layers in bypasses]
    assert lowest == sorted(lowest), "variants join in order"
    found = []
    for layer in range(num_layers):
        joined = sum(low < layer for low in lowest)
        around = tuple(1 + number for number in range(joined) if layer in bypasses[number])
        found.append(Stack(1 + joined, around, lowest.count(layer)))
    return found


def install_layer_sweep(
    model: torch.nn.Module,
    family: Family,
    max_stack_tokens: int,
    on_layer: Callable[[int], None] | None = None,
    bypasses: Sequence[Collection[int]] | None = None,
) -> None:
    """Make every decoder layer carry the stack of variants: `model(input_ids, labels)` returns losses of all of them.

    First those of the rows in the unchanged model, then in each variant. Needs nothing of a family's `forward` but that
    it maps hidden states to hidden states. Replaces the instance's `forward`, so DeepSpeed's hooks around the layer's
    call gather its weights once for the whole stack.

    Args:
        max_stack_tokens: the stack passes a layer in chunks of at most so many tokens (at least one block).
        on_layer: called with the index of each layer that the stack has passed.
        bypasses: see `stacks`; by default one variant without each layer.
    """
    layers = family.layer_modules(model)
    of_layers = stacks(len(layers), [{layer} for layer in range(len(layers))] if bypasses is None else bypasses)
    for position, (layer, stack) in enumerate(zip(layers, of_layers, strict=True)):
        layer.forward = functools.partial(_sweep_layer, layer.forward, stack, max_stack_tokens)
        if on_layer:
            layer.register_forward_hook(functools.partial(_report, on_layer, position))


def _sweep_layer(
    forward: Callable[..., Any], stack: Stack, max_stack_tokens: int, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """hidden [variants * rows, tokens, dim] -> [(variants + joining) * rows, tokens, dim]."""
    rows = hidden.shape[0] // stack.variants
    passing = _at(hidden, stack.through, rows) if stack.around else hidden
    variants_per_chunk = max(1, max_stack_tokens // (rows * hidden.shape[1]))
    outputs = []
    for chunk in passing.split(variants_per_chunk * rows):
        repeat = chunk.shape[0] // rows
        output = forward(
            chunk,
            *(_repeat_rows(value, rows, repeat) for value in args),
            **{key: _repeat_rows(value, rows, repeat) for key, value in kwargs.items()},
        )
        outputs.append(output[0] if isinstance(output, tuple) else output)
    if stack.around:
        outputs = _merged(torch.cat(outputs), hidden, stack, rows)
    return torch.cat([*outputs, *[hidden[:rows]] * stack.joining])


def _at(hidden: torch.Tensor, places: Sequence[int], rows: int) -> torch.Tensor:
    """The hidden states of the variants at these places."""
    return torch.cat([hidden[place * rows : (place + 1) * rows] for place in places])


def _merged(passed: torch.Tensor, hidden: torch.Tensor, stack: Stack, rows: int) -> list[torch.Tensor]:
    """Of each variant in the stack what it is above the layer."""
    above = iter(passed.split(rows))
    below = hidden.split(rows)
    return [below[place] if place in stack.around else next(above) for place in range(stack.variants)]


def _report(on_layer: Callable[[int], None], position: int, *_: Any) -> None:
    on_layer(position)


def _repeat_rows(value: Any, rows: int, repeat: int) -> Any:
    """Repeat what belongs to the batch (masks, positions) for every variant; what has one row broadcasts by itself."""
    if isinstance(value, tuple):
        return tuple(_repeat_rows(item, rows, repeat) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == rows > 1:
        return value.repeat(repeat, *[1] * (value.dim() - 1))
    return value
