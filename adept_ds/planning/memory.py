"""Bytes that a GPU holds in a training step, by kind.

Which copies of weights, gradients and moments there are, and how they are padded, is DeepSpeed's (0.19.8,
runtime/zero/stage_1_and_2.py, stage3.py) with what `zero.build` asks of it: gradients averaged and accumulated in
float32. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING

from adept_ds.planning.gathering import Gathering, gathering
from adept_ds.planning.zero_settings import ZeroSettings

if TYPE_CHECKING:
    from adept_ds.planning.outline import Outline, Weight

_SINGLE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU."""

    frozen_weights: float
    """Whole at stages 1 and 2; at stage 3 a partition, and what stays whole on every GPU."""
    trained_weights: float
    """As the model computes with them, and the float32 weights that are stepped."""
    gradients: float
    """As they are accumulated."""
    optimizer: float
    """Two moments in float32."""
    gather_buffers: float
    """Stage 3: weights that are whole for a while, and where they arrive."""
    bucket: float
    """Where gradients are collected, as far as it is there all the time: at stage 3, and at stage 1 once a first
    micro-batch of several has gradients."""
    reduce_buffers: float
    """What else holds gradients on their way, in the backward pass."""
    activations: float
    """Kept for the backward pass, where the forward pass ends; with checkpointing, one layer's beside the inputs."""
    logits: float
    """A chunk of them, in all precisions in which they are held together."""
    working: float
    """Of the backward pass of a layer."""
    kept_beside: float = 0.0
    """What else is kept of trained elements: by the method, and where gradients are set aside."""
    on_host: float = 0.0
    """Of the host, for each GPU: what offload_optimizer and offload_param keep there. No part of the peak."""

    @property
    def peak(self) -> float:
        """A bound: what the passes hold at most is added up, but for the logits, which are gone when they turn."""
        apart = ("logits", "working", "reduce_buffers", "on_host")
        held = sum(getattr(self, each.name) for each in fields(self) if each.name not in apart)
        return float(held + max(self.logits, self.working + self.reduce_buffers))

    @property
    def states(self) -> float:
        """Weights, gradients and moments."""
        return self.frozen_weights + self.trained_weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Step:
    """How a GPU takes a step."""

    ranks: int
    rows: int
    """Sequences of a micro-batch."""
    micro_batches: int
    recompute: bool
    """train.activation_checkpointing"""


@dataclass(frozen=True)
class Held:
    """Memory, and what of the weights stays whole."""

    memory: Memory
    gathering: Gathering | None
    """At stage 3."""
    persistent: tuple[int, ...] = ()
    """Positions of small weights that are whole, and gathered anew after each step."""
    kept: float = 0.0
    """Bytes of frozen weights that stay whole for good (train.keep_gathered_gib)."""


def held(
    outline: Outline, zero: ZeroSettings, step: Step, logits_at_once: float, keep: float | None, room: float
) -> Held:
    """What a step holds.

    Args:
        logits_at_once: so many are formed together (see `models.head_chunks`).
        keep: bytes of frozen weights that may stay whole at stage 3; None: half of what the first step leaves free.
        room: bytes that there are.
    """
    if zero.stage < 3:
        return Held(_whole_weights(outline, zero, step, logits_at_once), None)
    small = tuple(
        position for position, weight in enumerate(outline.weights) if weight.numel <= zero.param_persistence_threshold
    )
    first = _partitioned(outline, zero, step, logits_at_once, small, ())
    budget = max(0.0, (room - first.memory.peak) / 2) if keep is None else keep
    keeps = step.ranks > 1 and not zero.weights_on_host  # see `zero.gathered`
    kept = tuple(_kept(outline, budget)) if keeps else ()
    return _partitioned(outline, zero, step, logits_at_once, small, kept) if kept else first


def _whole_weights(outline: Outline, zero: ZeroSettings, step: Step, logits_at_once: float) -> Memory:
    """Stages 1 and 2."""
    size, trained = outline.element_size, outline.trainable
    align = 2 * step.ranks
    flat = -(-trained // align) * align
    part = flat / step.ranks
    bucket, used = zero.reduce_bucket_size, _sent_at_once(outline, zero)
    whole = zero.stage == 1  # gradients are, until they are reduced in the last micro-batch
    own = float(_SINGLE * _largest_share(outline.weights, flat // step.ranks, step.ranks))
    if whole:
        gradients, width = float(_SINGLE * trained), _SINGLE
    elif size == _SINGLE:  # those of parameters that a rank steps a part of
        gradients, width = own, size
    else:
        gradients, width = _SINGLE * part, size
    aside = min(own, gradients) if outline.sets_gradients_aside else 0.0
    buffers = float(width * bucket * (2 if zero.overlap_comm else 1))
    there = buffers if whole and not zero.overlap_comm and step.micro_batches > 1 else 0.0
    sent = (width + (0 if width == _SINGLE else _SINGLE)) * used  # what of a bucket is flattened, and then in float32
    if whole or (size == _SINGLE and step.micro_batches > 1):
        sent += int(_SINGLE * part)  # a rank's own, apart from the others, and from those of earlier micro-batches
    return Memory(
        frozen_weights=float(size * (outline.total - trained)),
        trained_weights=size * flat + _SINGLE * part,
        gradients=gradients,
        optimizer=2 * _SINGLE * part,
        gather_buffers=0.0,
        bucket=there,
        reduce_buffers=buffers - there + sent,
        activations=activation_bytes(outline, step, zero),
        logits=logit_bytes(outline, step.rows, logits_at_once),
        working=working_bytes(outline, step, zero),
        kept_beside=outline.kept_per_element * part + aside,
    )


def _partitioned(
    outline: Outline,
    zero: ZeroSettings,
    step: Step,
    logits_at_once: float,
    persistent: Sequence[int],
    kept: Sequence[int],
) -> Held:
    """Stage 3."""
    size, ranks = outline.element_size, step.ranks
    parts = [-(-weight.numel // ranks) for weight in outline.weights]
    frozen = sum(part for part, weight in zip(parts, outline.weights, strict=True) if not weight.trains)
    trained = sum(part for part, weight in zip(parts, outline.weights, strict=True) if weight.trains)
    persistent = tuple(sorted(set(persistent) - set(kept)))
    whole = {position: outline.weights[position].numel for position in (*persistent, *kept)} if ranks > 1 else {}
    beside = 0.0
    for position, numel in whole.items():
        if not outline.weights[position].trains:
            # The partition of a kept weight is a view of it.
            beside += size * (numel - parts[position] if position in kept else numel)
    of_trained = sum(size * numel for position, numel in whole.items() if outline.weights[position].trains)
    played = gathering(outline, ranks, tuple(sorted({*persistent, *kept})), zero.windows, step.recompute)
    single, beside_optimizer = float(_SINGLE * trained), float(outline.kept_per_element * trained)
    on_host = 0.0
    if zero.weights_on_host:
        on_host += size * (frozen + trained)
        frozen = halves = 0
    else:
        halves = trained
    if zero.optimizer_on_host:  # the gradient twice: summed over micro-batches, and as it is stepped with
        on_host += 5 * single + beside_optimizer
        single = beside_optimizer = 0.0
    memory = Memory(
        frozen_weights=size * frozen + beside,
        trained_weights=size * halves + single + of_trained,
        gradients=single,
        optimizer=2 * single,
        gather_buffers=played.peak,
        bucket=float(_SINGLE * zero.reduce_bucket_size),
        reduce_buffers=float(_SINGLE * _sent_at_once(outline, zero)),
        activations=activation_bytes(outline, step, zero),
        logits=logit_bytes(outline, step.rows, logits_at_once),
        working=working_bytes(outline, step, zero),
        kept_beside=beside_optimizer,
        on_host=float(on_host),
    )
    kept_bytes = float(size * sum(outline.weights[position].numel for position in kept))
    return Held(memory, played, persistent, kept_bytes)


def _sent_at_once(outline: Outline, zero: ZeroSettings) -> int:
    """Elements of gradients: a bucket, or a single parameter that is larger than one, such as a stack of experts."""
    largest = max((weight.numel for weight in outline.weights if weight.trains), default=0)
    return max(min(zero.reduce_bucket_size, outline.trainable), largest)


def _kept(outline: Outline, budget: float) -> Iterator[int]:
    """As `zero.gathered.keep_frozen_gathered` chooses: those nearest to the head first."""
    taken = 0.0
    for position in reversed(range(len(outline.weights))):
        weight = outline.weights[position]
        size = weight.numel * outline.element_size
        if not weight.trains and taken + size <= budget:
            taken += size
            yield position


def _largest_share(weights: Sequence[Weight], part: int, ranks: int) -> int:
    """Elements of all parameters that a rank steps a part of, where most: a flat partition has so many elements."""
    shares, start = [0] * ranks, 0
    for weight in weights:
        if weight.trains:
            for rank in range(start // part, (start + weight.numel - 1) // part + 1):
                shares[rank] += weight.numel
            start += weight.numel
    return max(shares)


def activation_bytes(outline: Outline, step: Step, zero: ZeroSettings) -> float:
    """With checkpointing, every layer from the lowest up keeps its input, and one at a time all that it needs."""
    layers = _kept_by_layers(outline, step, zero)
    if not step.recompute:
        return sum(layers) + outline.other_saved.of(step.rows)
    repeated = layers[outline.lowest :]
    inputs = outline.layer_input * step.rows * len(repeated)
    return sum(layers[: outline.lowest]) + inputs + max(repeated) + outline.other_saved.of(step.rows)


def working_bytes(outline: Outline, step: Step, zero: ZeroSettings) -> float:
    """What a layer's backward pass adds to the activations, where it adds most; what layers above it kept is gone."""
    layers = _kept_by_layers(outline, step, zero)
    kept = layers if step.recompute else list(accumulate(layers))  # while a layer has its turn
    most = max(kept[outline.lowest :])
    held = ((size, moment.of(step.rows)) for size, of in zip(kept, outline.layer_working, strict=True) for moment in of)
    return max(size + beside - most for size, beside in held)


def _kept_by_layers(outline: Outline, step: Step, zero: ZeroSettings) -> list[float]:
    layers = [saved.of(step.rows) for saved in outline.layer_saved]
    if zero.stage == 3 and zero.memory_efficient_linear:
        inputs_too = [inputs.of(step.rows) for inputs in outline.layer_inputs]
        layers = [saved + inputs for saved, inputs in zip(layers, inputs_too, strict=True)]
    return layers


def logit_bytes(outline: Outline, rows: int, logits_at_once: float) -> float:
    """Of a chunk (see `models.head_chunks.tokens_at_once`)."""
    tokens = rows * outline.seq_len
    most = max(1, int(logits_at_once) // outline.vocabulary)
    chunk = -(-tokens // -(-tokens // most))
    return float(chunk * outline.vocabulary * outline.logit_bytes)
