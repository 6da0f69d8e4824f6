"""What ranks send each other in an optimizer step. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adept_ds.planning.cluster import Collective
from adept_ds.planning.memory import Held, Step
from adept_ds.planning.zero_settings import ZeroSettings

if TYPE_CHECKING:
    from adept_ds.planning.outline import Outline

_SINGLE = 4


def collectives(outline: Outline, zero: ZeroSettings, step: Step, found: Held) -> list[Collective]:
    """Of a whole step; numbers that ranks tell each other, some hundred bytes, are left out."""
    return [*within_micro_batches(outline, zero, step, found), *after_micro_batches(outline, zero, step, found)]


def within_micro_batches(outline: Outline, zero: ZeroSettings, step: Step, found: Held) -> list[Collective]:
    """Those that run beside forward and backward passes where `overlap_comm` is on."""
    trained, micro_batches = outline.trainable, step.micro_batches
    if zero.stage < 3:
        if zero.stage == 1 and not zero.overlap_comm:
            return []
        return [_all_reduce(trained, zero, micro_batches)]
    assert found.gathering is not None
    first, following = found.gathering.first, found.gathering.following
    padded = sum(-(-w.numel // step.ranks) * step.ranks for w in outline.weights if w.trains)
    buckets = _buckets(trained, zero.reduce_bucket_size)
    return [
        Collective(
            "all-gather",
            "weights before they are used",
            first.payload + (micro_batches - 1) * following.payload,
            first.calls + (micro_batches - 1) * following.calls,
        ),
        Collective("reduce-scatter", "gradients", float(_SINGLE * padded * micro_batches), buckets * micro_batches),
    ]


def after_micro_batches(outline: Outline, zero: ZeroSettings, step: Step, found: Held) -> list[Collective]:
    """Those that nothing hides."""
    size, ranks = outline.element_size, step.ranks
    if zero.stage == 3:
        numel = [outline.weights[position].numel for position in found.persistent]
        payload = float(size * sum(-(-each // ranks) * ranks for each in numel)) if ranks > 1 else 0.0
        return [Collective("all-gather", "small weights after a step", payload, len(numel))]
    flat = -(-outline.trainable // (2 * ranks)) * 2 * ranks if ranks > 1 else 0
    gathered = Collective("all-gather", "trained weights after a step", float(size * flat), int(ranks > 1))
    if zero.stage == 1 and not zero.overlap_comm:
        return [_all_reduce(outline.trainable, zero, 1), gathered]
    return [gathered]


def _all_reduce(trained: int, zero: ZeroSettings, times: int) -> Collective:
    calls = _buckets(trained, zero.reduce_bucket_size) * times
    return Collective("all-reduce", "gradients", float(_SINGLE * trained * times), calls)


def _buckets(numel: int, bucket: int) -> int:
    return max(1, -(-numel // bucket))
