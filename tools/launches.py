"""What a device would be told to do: operator calls as torch.profiler sees them, and bytes between host and device.

Counted on a CPU, where nothing is launched: a call of an operator that computes or copies is a launch on a GPU, of some
more than one, and a view or an allocation is none. What goes between host and device is asked for by name there (`cpu`,
`to` with a device, `item`, `tolist`, `numpy`): where adept asks, it is counted as if the tensor lay on a device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

_FREE = {
    *("view", "slice", "select", "as_strided", "unsqueeze", "squeeze", "expand", "expand_as", "reshape", "flatten"),
    *("narrow", "detach", "alias", "t", "transpose", "permute", "unbind", "split", "unflatten", "view_as"),
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "result_type", "lift_fresh", "contiguous", "to"),
    *("resolve_conj", "resolve_neg", "set_", "is_pinned", "_reshape_alias", "numel", "stride", "size"),
}
"""Operators of views, of allocations, and of what is known without looking at elements."""


@dataclass
class Launches:
    """What was counted."""

    operators: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    """Between host and device."""
    copied_bytes: int = 0

    @property
    def total(self) -> int:
        return self.operators.total()

    def add(self, other: Launches) -> None:
        self.operators += other.operators
        self.copies += other.copies
        self.copied_bytes += other.copied_bytes

    def saw(self, tensor: torch.Tensor) -> None:
        self.copies += 1
        self.copied_bytes += tensor.numel() * tensor.element_size()


@contextmanager
def launches() -> Iterator[Launches]:
    """Counts while the block runs; the counts are there after it."""
    found = Launches()
    with ExitStack() as stack:
        for name in ("cpu", "item", "tolist", "numpy", "to"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, _seen(getattr(torch.Tensor, name), name, found)))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            yield found
    events = seen.events()
    for event in events if events is not None else ():
        if _counts(event) and not _is_within_one(event):
            found.operators[event.name.removeprefix("aten::")] += 1


def _seen(method: Callable[..., Any], name: str, found: Launches) -> Callable[..., Any]:
    """A method of tensors, whose calls that would copy between host and device are counted."""

    def called(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        target = arguments[0] if arguments else options.get("device")
        asks = sys._getframe(1).f_globals["__name__"].partition(".")[0]
        if asks not in ("deepspeed", "torch") and (name != "to" or isinstance(target, torch.device | str)):
            found.saw(tensor)
        return method(tensor, *arguments, **options)

    return called


def _counts(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in _FREE


def _is_within_one(event: Any) -> bool:
    """Whether an operator that was counted called this one."""
    caller = event.cpu_parent
    return caller is not None and (_counts(caller) or _is_within_one(caller))
