"""What a checkpoint holds of training, in an engine of any shape: number of ranks, ZeRO stage, place of the states.

Each rank takes the elements that it steps now from the files of the ranks that stepped them then. Nothing is
converted, nothing lies on the disk twice, and no rank reads more than it keeps, a part of a parameter at a time. In an
engine of the shape that wrote it, a checkpoint comes back bit for bit.

DeepSpeed's own way, universal checkpoints, takes a program that is run in between and as much disk again. And it does
not give back what was saved: the first parameter group's settings stand in all groups, and sub-groups share one counter
of steps, which each of them advances (stage3.py: load_hp_checkpoint_state_from_checkpoint_dir_stage3).

Frozen weights are in no checkpoint: the engine has them from the model that training started from.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py: state_dict, load_state_dict).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT

from adept_ds.base.errors import InputError, LayoutError
from adept_ds.weights.saved_state import WEIGHT, SavedState
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, client_optimizer, parameter_shapes, zero_stage
from adept_ds.zero.layout import FlatPartition, partition_layout


def resume(engine: Engine, saved: SavedState) -> None:
    """Go on where `saved` was: weights that train, the optimizer's state and settings, loss scaling.

    To be called on every rank, on an engine that has not stepped yet.

    Raises:
        InputError: something else was trained.
        LayoutError: see `partition_layout`.
    """
    _check_parameters(engine, saved)
    zero, is_stage3 = engine.optimizer, zero_stage(engine) == 3
    try:
        if is_stage3:
            zero.checkpoint_event_prologue()
        for partition in partition_layout(engine):
            client_optimizer(engine).state[partition.tensor] = _filled(partition, saved)
        state = zero.state_dict() | saved.loss_scaling
        optimizer = state[OPTIMIZER_STATE_DICT if is_stage3 else BASE_OPTIMIZER_STATE]
        for own, written in zip(optimizer["param_groups"], saved.param_groups, strict=True):
            own.update({key: value for key, value in written.items() if key != "params"})
        # Its tensors are the engine's own: loading it is for all that follows from them.
        zero.load_state_dict([state] * torch.distributed.get_world_size(), load_from_fp32_weights=True)
        if is_stage3:
            zero.checkpoint_event_epilogue()
        else:
            zero.update_lp_params()
    except (AttributeError, KeyError) as error:
        raise LayoutError(layout_complaint(f"{type(error).__name__}: {error}")) from error
    for counter, value in saved.counters.items():
        setattr(engine, counter, value)


def _check_parameters(engine: Engine, saved: SavedState) -> None:
    trains = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    here = {name: shape for name, shape in parameter_shapes(engine.module).items() if name in trains}
    there = {name: parameter.shape for name, parameter in saved.parameters.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise InputError(
                f"the checkpoint is of other training: its '{name}' is {there.get(name)}, not {here.get(name)}; "
                "go on with the model and the settings that it was written with"
            )


@torch.no_grad()
def _filled(partition: FlatPartition, saved: SavedState) -> dict[str, Any]:
    """Set the fp32 weights of a partition; what the optimizer knows of it."""
    names = [fragment.parameter for fragment in partition.fragments]
    of_one = saved.parameters[names[0] if names else next(iter(saved.parameters))]  # without any, it is padding
    vectors = {key: torch.zeros_like(partition.tensor) for key in of_one.vectors if key != WEIGHT}
    for fragment in partition.fragments:
        parameter = saved.parameters[fragment.parameter]
        for key, vector in (vectors | {WEIGHT: partition.tensor}).items():
            vector[fragment.flat] = parameter.elements(key, fragment.param_start, fragment.param_stop)
    return vectors | copy.deepcopy(of_one.scalars)
