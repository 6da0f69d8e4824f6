"""Gradients of this rank's partitions: read, added to, forgotten, set aside; backward passes beside training.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_set_local_grad

from adept_ds.zero.engine import Engine, zero_stage
from adept_ds.zero.outside_training import outside_training

Addition = Callable[[str, torch.Tensor, int, int], torch.Tensor | None]
"""From a parameter's full name, elements start:stop of its flattened fp32 weight, start and stop to what is added to
the gradient of these elements; of the same shape [stop - start] and on the same device; None adds nothing."""


def local_weight_and_grad(engine: Engine, parameter: Any) -> tuple[torch.Tensor, torch.Tensor, int] | None:
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


@torch.no_grad()
def add_to_gradient(engine: Engine, addition: Addition) -> None:
    """Add to the gradient that the next step takes, before it is clipped and its norm is taken.

    So a term of the loss that depends on the weights alone, such as lambda/2 |w - w0|^2, whose gradient is
    lambda (w - w0), acts as if it stood in the loss. To be called on every rank, after the last backward pass of a step
    and before the step.

    Args:
        addition: in units of the mean loss's gradient, without loss scaling. It is asked on each rank for the elements
            whose gradient that rank steps; no element is asked for twice.
    """
    scale = loss_scale(engine)
    for name, parameter in engine.module.named_parameters():
        found = local_weight_and_grad(engine, parameter) if parameter.requires_grad else None
        if found is None:
            continue
        weight, _, start = found
        added = addition(name, weight, start, start + weight.numel())
        if added is not None:
            _add(engine, parameter, added if scale == 1 else added * scale)


def _add(engine: Engine, parameter: Any, added: torch.Tensor) -> None:
    """To this rank's elements of the gradient, as they are stored."""
    if zero_stage(engine) == 3:
        grad = safe_get_local_grad(parameter)
        grad.flatten()[: added.numel()].add_(added)
        safe_set_local_grad(parameter, grad)  # which takes its norm anew, with optimizer states on the host
        return
    grad = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    grad.add_(added.view_as(grad))


def loss_scale(engine: Engine) -> float:
    """What losses are multiplied by before the backward pass: 1 unless training in fp16."""
    return float(engine.optimizer.loss_scale)


def set_loss_scale(engine: Engine, scale: float) -> None:
    engine.optimizer.loss_scale = scale


def _unscaled(engine: Engine, grad: torch.Tensor) -> torch.Tensor:
    scale = loss_scale(engine)
    return grad if scale == 1 else grad.float() / scale


@contextmanager
def gradients_outside_training(engine: Engine) -> Iterator[None]:
    """Run backward passes beside training without leaving a trace in it: see `outside_training`.

    Also in the middle of accumulation: what was accumulated is set aside, at stage 3 in a copy, and goes on after it.
    """
    restore_gradients = _set_gradients_aside(engine)
    boundary, scale = engine._is_gradient_accumulation_boundary, loss_scale(engine)
    try:
        with outside_training(engine):
            yield
    finally:
        clear_gradients(engine)
        restore_gradients()
        set_loss_scale(engine, scale)
        _set_boundary(engine, boundary)


def clear_gradients(engine: Engine) -> None:
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


def end_segment(engine: Engine, backward: Callable[[], None], read: Callable[[], None]) -> Callable[[], None]:
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


def _set_gradients_aside(engine: Engine) -> Callable[[], None]:
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
    clear_gradients(engine)
    optimizer._epilogue_ran_this_backward = False

    def restore_references() -> None:
        for gradients, saved in zip(reduced, reduced_saved, strict=True):
            gradients.update(saved)
        for parameter, (grad, accumulated) in zip(parameters, own_saved, strict=True):
            parameter.grad, parameter.grad_accum = grad, accumulated
        optimizer._epilogue_ran_this_backward = epilogue_ran

    return restore_references


def _set_boundary(engine: Engine, boundary: bool | None) -> None:
    """Whether the next backward pass ends an accumulation; None: as the engine counts. There is no public reset."""
    engine._is_gradient_accumulation_boundary = boundary
    engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
