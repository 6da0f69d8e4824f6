"""Passes of several kinds in one training step, each with a recorded order of modules of its own.

ZeRO-3 records in which order a pass uses modules, and gathers the next ones ahead in the passes after it. A pass that
does not follow the record makes it fetch late or twice, and the record is dropped. So passes of another kind than the
training step's, which come back in every step, have a record of their own.

Written against DeepSpeed 0.19.8 (runtime/zero/parameter_offload.py, partitioned_param_coordinator.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, zero_stage


class ModuleOrders:
    """By kind, what is known of the order in which its passes use modules. At other stages there is nothing to know."""

    def __init__(self, engine: Engine) -> None:
        self._offload: Any = engine.optimizer.parameter_offload if zero_stage(engine) == 3 else None
        self._coordinators: dict[str, Any] = {}

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Passes in here, backward passes too, are all of this kind; every rank has to make them."""
        if self._offload is None:
            yield
            return
        usual = self._offload.param_coordinator
        if kind not in self._coordinators:
            self._coordinators[kind] = _without_record(usual)
        self._offload.param_coordinator = self._coordinators[kind]
        try:
            yield
        finally:
            self._offload.param_coordinator = usual


def _without_record(coordinator: Any) -> Any:
    """Another one that shares everything but the record: streams, and what is being gathered."""
    try:
        other = copy.copy(coordinator)
        if not other.is_invalid_trace():
            other._invalidate_trace()
        other._clear_trace_structures()  # new ones, also where both are empty
        return other
    except AttributeError as error:
        raise LayoutError(layout_complaint(str(error))) from error
