"""What ZeRO-3 gathers in a step, and how much of it is whole at once: DeepSpeed's own order, played without weights.

Written after DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py, parameter_offload.py). A module's weights
are gathered when its forward or backward pass begins, and those of the next modules ahead of it, as far as
`stage3_prefetch_bucket_size` and `stage3_max_live_parameters` allow; they are dropped when it ends, unless they are
used again within `stage3_max_reuse_distance`. What is played is a step whose order is known, as from the third
micro-batch of a run on. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from adept_ds.planning.outline import Outline


@dataclass(frozen=True)
class Windows:
    """Keys of DeepSpeed's file, in elements."""

    prefetch: int
    max_live: int
    max_reuse: int


@dataclass(frozen=True)
class Gathered:
    """Bytes, and calls of all-gather."""

    payload: float
    calls: int


@dataclass(frozen=True)
class Gathering:
    """Of the weights that do not stay whole."""

    first: Gathered
    """In the first micro-batch of a step."""
    following: Gathered
    """In each of the others."""
    peak: float
    """Bytes that are gathered at once, receive buffers included."""


@dataclass(frozen=True)
class _Action:
    kind: Literal["fetch", "release"]
    call: int
    forward: bool
    recomputes: bool = False


@lru_cache(maxsize=256)  # it is the same for all sizes of micro-batches
def gathering(outline: Outline, ranks: int, resident: tuple[int, ...], windows: Windows, recompute: bool) -> Gathering:
    """Play a step of two micro-batches.

    Args:
        resident: positions of weights that stay whole on every rank.
        recompute: activations are, from the lowest layer that gradients pass up.
    """
    play = _Play(outline, ranks, set(resident), windows, _actions(outline, recompute))
    play.micro_batch()
    play.end_step()
    play.peak = play.live = 0.0
    first, following = play.micro_batch(), play.micro_batch()
    return Gathering(first, following, play.peak)


def _actions(outline: Outline, recompute: bool) -> list[_Action]:
    """Of one micro-batch: the forward pass, and back."""
    forward = [_Action("fetch" if event.begins else "release", event.call, True) for event in outline.forward]
    backward: list[_Action] = []
    repeated: set[int] = set()
    for event in reversed(outline.forward):
        call = outline.calls[event.call]
        if not call.gradient_leaves:
            continue
        if event.begins:
            if call.gradient_enters:
                backward.append(_Action("release", event.call, False))
            continue
        backward.append(_Action("fetch", event.call, False))
        layer = None if call.is_layer or not call.weights else call.layer
        if recompute and layer is not None and layer >= outline.lowest and layer not in repeated:
            repeated.add(layer)  # this is the first module that needs what was not kept
            backward += _recomputed(outline, forward, layer, event.call)
    return forward + backward


def _recomputed(outline: Outline, forward: Sequence[_Action], layer: int, last: int) -> list[_Action]:
    """The forward pass of a layer again; it ends within its last module, whose inputs are the last that are missing."""
    inner = [a for a in forward if outline.calls[a.call].layer == layer and not outline.calls[a.call].is_layer]
    end = next(position for position, action in enumerate(inner) if action.call == last)
    return [_Action(action.kind, action.call, True, True) for action in inner[: end + 1]]


@dataclass
class _Handle:
    """One all-gather under way."""

    weights: tuple[int, ...]
    buffer: float
    waiting: set[int] = field(default_factory=set)
    arrived: bool = False


class _Play:
    def __init__(
        self, outline: Outline, ranks: int, resident: set[int], windows: Windows, actions: Sequence[_Action]
    ) -> None:
        self._numel = [weight.numel for weight in outline.weights]
        self._frozen = [not weight.trains for weight in outline.weights]
        self._weights = [tuple(sorted(set(call.weights))) for call in outline.calls]
        self._ranks, self._resident, self._windows, self._actions = ranks, resident, windows, actions
        self._size = outline.element_size
        self._order = [action.call for action in actions if action.kind == "fetch"]
        sizes = [sum(self._numel[w] for w in self._weights[call]) for call in self._order]
        self._before = [0, *accumulate(sizes)]
        self._uses: dict[int, list[int]] = defaultdict(list)
        for step, call in enumerate(self._order):
            for weight in self._weights[call]:
                self._uses[weight].append(step)
        self._trace = [(weight, step) for step, call in enumerate(self._order) for weight in self._weights[call]]
        self._whole = set(resident)
        self._held: dict[int, float] = {}
        self._inflight: dict[int, _Handle] = {}
        self._active: dict[int, set[int]] = defaultdict(set)
        self._backward: dict[int, None] = {}
        self._borrowed: dict[int, set[int]] = defaultdict(set)
        self.live = self.peak = 0.0
        self._payload, self._calls = 0.0, 0

    def micro_batch(self) -> Gathered:
        self._clean()
        self._queue = deque(self._trace)
        self._fetched_for: dict[int, int] = defaultdict(lambda: -1)
        self._step = self._available = 0
        self._payload, self._calls = 0.0, 0
        for action in self._actions:
            if action.kind == "fetch":
                self._fetch(action)
            else:
                self._release(action)
        while self._backward:  # modules whose backward pass has no end that is seen
            call, _ = self._backward.popitem()
            self._let_go(call, set(self._weights[call]) | self._borrowed.pop(call, set()))
        return Gathered(self._payload, self._calls)

    def end_step(self) -> None:
        """All weights are dropped but those that stay whole."""
        self._clean()
        self._active.clear()
        for weight in list(self._whole):
            self._drop(weight)

    def _fetch(self, action: _Action) -> None:
        call, weights = action.call, self._weights[action.call]
        if not action.forward:
            self._backward[call] = None
        self._gather([w for w in weights if w not in self._whole and w not in self._inflight])
        for weight in weights:
            self._active[weight].add(call)
            if action.recomputes and self._frozen[weight] and self._backward:
                borrower = next(reversed(self._backward))
                self._active[weight].add(borrower)
                self._borrowed[borrower].add(weight)
            if weight in self._inflight:
                self._wait(weight)
        self._prefetch(weights)
        self._step += 1

    def _prefetch(self, weights: Sequence[int]) -> None:
        new = {weight for weight in weights if self._fetched_for[weight] < self._step}
        seen: set[int] = set()
        while self._queue and len(seen) < len(new):
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = step
            seen.add(weight)
        room = min(self._windows.max_live - self._available, self._windows.prefetch)
        ahead: list[int] = []
        numel = 0
        while self._queue and numel < room:
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = max(self._fetched_for[weight], step)
            if weight not in self._whole and weight not in self._inflight and weight not in ahead:
                ahead.append(weight)
                numel += self._numel[weight]
        self._gather(ahead)

    def _release(self, action: _Action) -> None:
        call = action.call
        let_go = {w for w in self._weights[call] if not self._needed_soon(w)}
        weights = set(self._weights[call])
        if not action.forward:
            borrowed = self._borrowed.pop(call, set())
            let_go |= borrowed
            weights |= borrowed
            self._backward.pop(call, None)
        for weight in weights:
            self._active[weight].discard(call)
            if weight in let_go:
                self._drop(weight)

    def _let_go(self, call: int, weights: set[int]) -> None:
        for weight in weights:
            self._active[weight].discard(call)
            self._drop(weight)

    def _needed_soon(self, weight: int) -> bool:
        if self._fetched_for[weight] > self._step:
            return True
        uses = self._uses[weight]
        position = bisect_left(uses, self._step)
        return (
            position < len(uses) and self._before[uses[position]] - self._before[self._step] < self._windows.max_reuse
        )

    def _gather(self, weights: Sequence[int]) -> None:
        if not weights:
            return
        self._available += sum(self._numel[weight] for weight in weights)
        alone = self._ranks == 1
        buffer = 0.0 if alone else sum(self._padded(weight) for weight in weights)
        handle = _Handle(tuple(sorted(weights)), buffer, set(weights))
        self._inflight.update(dict.fromkeys(weights, handle))
        self._payload += buffer
        self._calls += not alone
        self._grow(buffer)

    def _wait(self, weight: int) -> None:
        handle = self._inflight.pop(weight)
        if not handle.arrived:
            handle.arrived = True
            copied = len(handle.weights) > 1 and handle.buffer > 0
            for each in handle.weights:
                self._whole.add(each)
                # Of a single weight, the buffer itself becomes the weight.
                self._held[each] = self._numel[each] * self._size if copied else handle.buffer
                self._grow(self._held[each] if copied else 0.0)
            if not copied:
                handle.buffer = 0.0
        handle.waiting.discard(weight)
        if not handle.waiting:
            self.live -= handle.buffer

    def _clean(self) -> None:
        for weight in list(self._inflight):
            self._wait(weight)
            self._drop(weight)

    def _drop(self, weight: int) -> None:
        if weight in self._whole and weight not in self._resident and not self._active[weight]:
            self._whole.remove(weight)
            self.live -= self._held.pop(weight)
            self._available -= self._numel[weight]

    def _padded(self, weight: int) -> float:
        return -(-self._numel[weight] // self._ranks) * self._ranks * self._size

    def _grow(self, size: float) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
