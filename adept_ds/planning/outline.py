"""What a plan knows of a training step: which weights there are, in which order they are used, what is kept.

It is filled in by `recording`. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adept_ds.models.flops import StepFlops


@dataclass(frozen=True)
class Weight:
    """A parameter."""

    name: str
    numel: int
    trains: bool


@dataclass(frozen=True)
class Call:
    """A module that runs, with weights of its own, or a decoder layer around such modules."""

    weights: tuple[int, ...]
    """Positions in `Outline.weights`."""
    layer: int | None
    """The decoder layer that it is part of, or is."""
    is_layer: bool
    gradient_leaves: bool
    """Whether what it returns has a gradient: then it has a backward pass."""
    gradient_enters: bool
    """Whether what it is given has one."""


@dataclass(frozen=True)
class Event:
    """A call begins, or ends."""

    call: int
    begins: bool


@dataclass(frozen=True)
class Saved:
    """Bytes that are held for the backward pass: fixed, and of each sequence."""

    fixed: float = 0.0
    per_row: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.fixed + other.fixed, self.per_row + other.per_row)

    def of(self, rows: int) -> float:
        return self.fixed + rows * self.per_row


@dataclass(frozen=True, eq=False)
class Outline:
    """A training step of one micro-batch of one sequence."""

    weights: tuple[Weight, ...]
    """In the model's order; a tied one once."""
    calls: tuple[Call, ...]
    forward: tuple[Event, ...]
    """Beginnings and ends of calls, in order."""
    element_size: int
    """Bytes of an element of weights and hidden states."""
    lowest: int
    """Decoder layer from which on gradients are wanted."""
    layer_saved: tuple[Saved, ...]
    """By decoder layer."""
    layer_inputs: tuple[Saved, ...]
    """By decoder layer, what else a linear layer keeps that keeps its input, whether or not its weight trains."""
    other_saved: Saved
    """Around the layers, the gradient that leaves the head included."""
    layer_input: float
    """Bytes of the hidden states of a sequence."""
    layer_working: tuple[tuple[Saved, ...], ...]
    """By decoder layer, what its backward pass holds beside what was kept, at moments of which each holds most for some
    number of sequences: gradients of activations, or of weights, which do not grow with it, when part of what was kept
    is gone. None below the lowest."""
    seq_len: int
    vocabulary: int
    planned_logit_bytes: int
    """For each logit, by which the size of a chunk is chosen (`models.head_chunks`)."""
    logit_bytes: int
    """That are held for each: in float32, itself and its log-probability, and its tangent under a cap."""
    flops: StepFlops
    """By token."""
    recomputed_flops: float
    """By token, of the forward passes that activation checkpointing repeats."""
    kept_per_element: int = 0
    """Bytes that the method keeps for each trained element, where the optimizer steps it."""
    sets_gradients_aside: bool = False
    """Whether at stages 1 and 2 the gradient of replayed text stands beside that of the rest (importance.source:
    online)."""

    @cached_property
    def trainable(self) -> int:
        return sum(weight.numel for weight in self.weights if weight.trains)

    @cached_property
    def total(self) -> int:
        return sum(weight.numel for weight in self.weights)
