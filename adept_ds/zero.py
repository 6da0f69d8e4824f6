"""The only place that knows how DeepSpeed lays out partitions and guards its hidden state.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py, partitioned_param_coordinator.py). None of
what is read here is documented interface, so `partition_layout` checks every assumption at start and refuses with a
`LayoutError` rather than multiply a wrong element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, set_z3_leaf_modules

from adept_ds.config import read_deepspeed_config
from adept_ds.errors import LayoutError

WRITTEN_AGAINST = "0.19.8"


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements that lies contiguously in this rank's flat partition."""

    parameter: str
    flat_start: int
    """First element in the flat fp32 partition."""
    param_start: int
    """First element in the flattened parameter."""
    numel: int


@dataclass(frozen=True)
class FlatPartition:
    """One tensor that DeepSpeed hands to the optimizer: this rank's part of many parameters, back to back."""

    tensor: torch.Tensor
    pieces: tuple[Piece, ...]


def gather_layers_whole(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Make ZeRO-3 gather each layer at once, around the layer's own call, for a forward-only engine.

    By default every projection is gathered by itself around its own call; a layer that passes a stack of hidden
    states through them in chunks would gather each of them once per chunk.
    """
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))


def keep_frozen_gathered(engine: Any, max_bytes: int) -> tuple[int, int]:
    """Let frozen parameters stay whole on every rank from now on, as many as `max_bytes` hold; (kept, all) bytes.

    ZeRO-3 gathers a parameter before each use and drops it after. A frozen one is the same every time, so where
    memory is left over, gathering it once is enough. Parameters nearest to the head come first: the backward pass
    uses those again. Every rank must give the same `max_bytes`.

    To be called between optimizer steps. Does nothing at other stages, where parameters are whole anyway, and under
    `offload_param`, which was asked for to save this memory.
    """
    frozen = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
    offload_param = engine.zero_offload_param()
    if zero_stage(engine) != 3 or (offload_param is not None and offload_param.device != "none"):
        return 0, 0
    kept, kept_bytes = [], 0
    for parameter in reversed(frozen):
        size = parameter.ds_numel * parameter.element_size()
        if kept_bytes + size <= max_bytes:
            kept.append(parameter)
            kept_bytes += size
    try:
        for parameter in kept:
            parameter.all_gather()
            _share_partition(parameter)
            parameter.ds_persist = True
            parameter.partition = lambda *_, **__: None
        _hide_when_all_are_partitioned(engine.optimizer, kept)
    except AttributeError as error:
        raise LayoutError(_complaint(str(error))) from error
    return kept_bytes, sum(parameter.ds_numel * parameter.element_size() for parameter in frozen)


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


def zero_stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def ds_config(engine: Any) -> dict[str, Any]:
    """The configuration that the engine was made with, which may have been given as a file."""
    config = engine.config
    return dict(config) if isinstance(config, Mapping) else read_deepspeed_config(Path(config))


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps this rank's partitions."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by full name, also of partitioned ones."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def partition_layout(engine: Any) -> list[FlatPartition]:
    """Where each trainable parameter lies in this rank's flat fp32 partitions; padding belongs to no piece.

    Raises:
        LayoutError: DeepSpeed lays partitions out in another way than this module was written for.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    try:
        layout = _layout_stage3(engine, names) if zero_stage(engine) == 3 else _layout_stage12(engine, names)
    except (AttributeError, KeyError, TypeError) as error:
        raise LayoutError(_complaint(f"{type(error).__name__}: {error}")) from error
    for partition in layout:
        end = 0
        for piece in partition.pieces:
            if piece.flat_start < end or piece.flat_start + piece.numel > partition.tensor.numel():
                raise LayoutError(_complaint(f"'{piece.parameter}' overlaps its neighbour or the end of its partition"))
            end = piece.flat_start + piece.numel
    return layout


def _layout_stage3(engine: Any, names: dict[int, str]) -> list[FlatPartition]:
    """Stage 3 cuts each parameter separately; the last rank's part of it ends in padding."""
    import deepspeed.comm as dist

    zero = engine.optimizer
    layout = []
    for index, group in enumerate(zero.fp16_groups):
        flat, pieces, total = zero.fp32_partitioned_groups_flat[index], [], 0
        for parameter in group:
            _, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(group=parameter.ds_process_group) * padded
            real = max(0, min(padded, parameter.ds_numel - start))
            total += padded
            if real:
                pieces.append(Piece(names[id(parameter)], offset, start, real))
        if total != flat.numel():
            raise LayoutError(_complaint(f"sub-group {index} has {flat.numel()} elements, its parameters {total}"))
        layout.append(FlatPartition(flat, tuple(pieces)))
    return layout


def _layout_stage12(engine: Any, names: dict[int, str]) -> list[FlatPartition]:
    """Stages 1 and 2 cut the concatenation of all parameters, so a boundary falls inside at most one per rank."""
    zero = engine.optimizer
    layout = []
    for index, group in enumerate(zero.bit16_groups):
        pieces = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                pieces.append(Piece(names[id(parameter)], flat.start, part.start, part.numel))
        flat_tensor = zero.single_partition_of_fp32_groups[index]
        layout.append(FlatPartition(flat_tensor, tuple(sorted(pieces, key=lambda piece: piece.flat_start))))
    return layout


def _complaint(detail: str) -> str:
    import deepspeed

    return (
        f"DeepSpeed {deepspeed.__version__} lays out partitions differently from {WRITTEN_AGAINST}, "
        f"which adept-ds was written against ({detail}); install deepspeed=={WRITTEN_AGAINST}"
    )


def local_weight_and_grad(engine: Any, parameter: Any) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """This rank's elements of a parameter's fp32 weight and of its gradient, and where in the flattened parameter they
    begin; without padding; None if it has none.

    To be called right after a backward pass at an accumulation boundary, before the step. The gradient is the mean
    over data-parallel ranks, without loss scaling.
    """
    if zero_stage(engine) == 3:
        import deepspeed.comm as dist

        weight, grad = safe_get_local_fp32_param(parameter), safe_get_local_grad(parameter)
        start = dist.get_rank(group=parameter.ds_process_group) * weight.numel()
        real = max(0, min(weight.numel(), parameter.ds_numel - start))
        return (weight[:real], _unscaled(engine, grad.flatten()[:real]), start) if real else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    grad = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    return mapping.hp_fragment.flatten(), _unscaled(engine, grad.flatten()), mapping.lp_fragment_address.start


def loss_scale(engine: Any) -> float:
    """What losses are multiplied by before the backward pass: 1 unless training in fp16."""
    return float(engine.optimizer.loss_scale)


def set_loss_scale(engine: Any, scale: float) -> None:
    engine.optimizer.loss_scale = scale


def _unscaled(engine: Any, grad: torch.Tensor) -> torch.Tensor:
    scale = loss_scale(engine)
    return grad if scale == 1 else grad.float() / scale


@contextmanager
def outside_training(engine: Any) -> Iterator[None]:
    """Run forward passes beside training without leaving a trace in it.

    Evaluation mode, the state of the random number generators, and ZeRO-3's recorded order of modules are as before
    when the block ends. (A pass that does not follow the recorded order makes DeepSpeed fetch parameters late or
    twice, so the record is dropped before; the next training step makes a new one.)
    """
    _forget_module_order(engine)
    cpu_rng, device_rng = torch.get_rng_state(), _device_rng_state()
    was_training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(was_training)
        torch.set_rng_state(cpu_rng)
        if device_rng is not None:
            torch.cuda.set_rng_state(device_rng)
        _forget_module_order(engine)


@contextmanager
def probing_gradients(engine: Any) -> Iterator[None]:
    """Run backward passes beside training without leaving a trace in it: see `outside_training`.

    Also in the middle of accumulation: what was accumulated is set aside, at stage 3 in a copy, and goes on after it.
    """
    restore_gradients = _set_gradients_aside(engine)
    boundary, scale = engine._is_gradient_accumulation_boundary, loss_scale(engine)
    try:
        with outside_training(engine):
            yield
    finally:
        clear_probe_gradients(engine)
        restore_gradients()
        set_loss_scale(engine, scale)
        _set_boundary(engine, boundary)


def clear_probe_gradients(engine: Any) -> None:
    """Forget all gradients, so that the next backward pass starts from nothing.

    The optimizer's own zero_grad, not the engine's, which leaves ZeRO-3's accumulation counter where it was. Stages 1
    and 2 keep reduced gradients in dictionaries of their own until the step.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if zero_stage(engine) in (1, 2):
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in gradients:
                gradients[group] = None


def end_segment(engine: Any, backward: Callable[[], None], read: Callable[[], None]) -> Callable[[], None]:
    """In the middle of accumulation, reduce what was accumulated so far, and read it.

    Args:
        backward: runs the backward pass that ends the segment.
        read: may use `local_weight_and_grad`, which sees the segment's share of the step's gradient.

    Returns:
        What has to be called before the step, after its last backward pass: stages 1 and 2 would forget the segment.
    """
    _set_boundary(engine, True)
    backward()
    read()
    _set_boundary(engine, None)
    if zero_stage(engine) == 3:
        return lambda: None
    averaged = engine.optimizer.averaged_gradients
    segment = dict(averaged)
    averaged.update(dict.fromkeys(averaged))

    def add_segment() -> None:
        for group, gradients in segment.items():
            for gradient, earlier in zip(averaged[group], gradients, strict=True):
                gradient.add_(earlier)

    return add_segment


def _set_gradients_aside(engine: Any) -> Callable[[], None]:
    """Let the engine look as between two steps; the returned function takes that back."""
    optimizer = engine.optimizer
    epilogue_ran = optimizer._epilogue_ran_this_backward
    if zero_stage(engine) == 3:
        micro_step, flat = optimizer.micro_step_id, optimizer.grad_partitions_flat_buffer
        saved = flat.clone() if micro_step or epilogue_ran else None
        optimizer.zero_grad()

        def restore_partitions() -> None:
            if saved is not None:
                flat.copy_(saved)
            optimizer.micro_step_id = micro_step
            optimizer._epilogue_ran_this_backward = epilogue_ran

        return restore_partitions
    reduced = (optimizer.averaged_gradients, optimizer.all_grad_tensors)
    reduced_saved = [dict(gradients) for gradients in reduced]
    parameters = [parameter for group in optimizer.bit16_groups for parameter in group]
    own_saved = [(parameter.grad, getattr(parameter, "grad_accum", None)) for parameter in parameters]
    clear_probe_gradients(engine)
    optimizer._epilogue_ran_this_backward = False

    def restore_references() -> None:
        for gradients, saved in zip(reduced, reduced_saved, strict=True):
            gradients.update(saved)
        for parameter, (grad, accumulated) in zip(parameters, own_saved, strict=True):
            parameter.grad, parameter.grad_accum = grad, accumulated
        optimizer._epilogue_ran_this_backward = epilogue_ran

    return restore_references


def _set_boundary(engine: Any, boundary: bool | None) -> None:
    """Whether the next backward pass ends an accumulation; None: as the engine counts. There is no public reset."""
    engine._is_gradient_accumulation_boundary = boundary
    engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())


def _forget_module_order(engine: Any) -> None:
    if zero_stage(engine) != 3:
        return
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _device_rng_state() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None
