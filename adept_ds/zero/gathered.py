"""What of a model stays gathered under ZeRO-3, and what is gathered together.

Written against DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py, parameter_offload.py, stage3.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules

from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, zero_stage


def gather_layers_whole(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Make ZeRO-3 gather each layer at once, around the layer's own call, for a forward-only engine.

    By default every projection is gathered by itself around its own call; a layer that passes a stack of hidden
    states through them in chunks would gather each of them once per chunk.
    """
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))


def keep_frozen_gathered(engine: Engine, max_bytes: int) -> tuple[int, int]:
    """Let frozen parameters stay whole on every rank from now on, as many as `max_bytes` hold; (kept, all) bytes.

    ZeRO-3 gathers a parameter before each use and drops it after. A frozen one is the same every time, so where
    memory is left over, gathering it once is enough. Parameters nearest to the head come first: the backward pass
    uses those again. Every rank must give the same `max_bytes`.

    To be called between optimizer steps. Does nothing at other stages, where parameters are whole anyway, and under
    `offload_param`, which was asked for to save this memory.
    """
    frozen: list[Any] = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
    offload_param = engine.zero_offload_param()
    if zero_stage(engine) != 3 or (offload_param is not None and offload_param.device != "none"):
        return 0, 0
    kept, kept_bytes = [], 0
    for parameter in reversed(frozen):
        size = parameter.ds_numel * parameter.element_size()
        if kept_bytes + size <= max_bytes:
            kept.append(parameter)
            kept_bytes += size
    if not kept:
        return 0, _bytes(frozen)
    try:
        for parameter in kept:
            parameter.all_gather()
            _share_partition(parameter)
            parameter.ds_persist = True
            parameter.partition = lambda *_, **__: None
        _hide_when_all_are_partitioned(engine.optimizer, kept)
    except AttributeError as error:
        raise LayoutError(layout_complaint(str(error))) from error
    return kept_bytes, _bytes(frozen)


def _bytes(parameters: Sequence[Any]) -> int:
    return sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)


def _hide_when_all_are_partitioned(optimizer: Any, kept: Sequence[Any]) -> None:
    """Where DeepSpeed partitions every parameter and insists on it, let `kept` look as if they were."""
    offload = optimizer.parameter_offload
    partition_all = offload.partition_all_parameters
    before_checkpoint, after_checkpoint = optimizer.checkpoint_event_prologue, optimizer.checkpoint_event_epilogue
    values = [parameter.data for parameter in kept]

    def set_status(status: ZeroParamStatus) -> None:
        for parameter in kept:
            parameter.ds_status = status

    def partition_the_others() -> None:
        set_status(ZeroParamStatus.NOT_AVAILABLE)
        partition_all()
        set_status(ZeroParamStatus.AVAILABLE)

    def empty_before_checkpoint() -> None:
        # Otherwise a tied head would be saved whole by every rank: DeepSpeed leaves frozen parameters out by name, and
        # knows one of its two names.
        before_checkpoint()
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value.new_empty(0)

    def restore_after_checkpoint() -> None:
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value
        after_checkpoint()

    offload.partition_all_parameters = partition_the_others
    optimizer.checkpoint_event_prologue = empty_before_checkpoint
    optimizer.checkpoint_event_epilogue = restore_after_checkpoint
    # After each step DeepSpeed gathers these again, in one list with the small trainable ones.
    ids = {id(parameter) for parameter in kept}
    offload.persistent_parameters[:] = [p for p in offload.persistent_parameters if id(p) not in ids]


def _share_partition(parameter: Any) -> None:
    """Let this rank's partition be a view of the gathered parameter; a last one that ends in padding stays apart."""
    import deepspeed.comm as dist

    partition = parameter.ds_tensor
    start = dist.get_rank(group=parameter.ds_process_group) * partition.numel()
    if start + partition.numel() <= parameter.ds_numel:
        partition.data = parameter.data.flatten()[start : start + partition.numel()]
