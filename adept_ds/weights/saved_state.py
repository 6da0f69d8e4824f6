"""The state of training in a DeepSpeed checkpoint, by parameter, whichever ranks and ZeRO stage wrote it.

Each rank writes what it stepped: its part of every parameter, back to back. Stages 1 and 2 cut the parameters of a
group like one long vector, and each file says where in it a parameter lies. Stage 3 cuts every parameter by itself into
parts of one size; what of a part is beyond the parameter's end is padding.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py: state_dict; runtime/engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adept_ds.weights.by_rank import elements_of, files_by_rank
from adept_ds.weights.deepspeed_files import mapped, reading_checkpoint

WEIGHT = "fp32"
"""Key of the weights that the optimizer steps; its own state has its own keys, such as exp_avg."""

_LOSS_SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow")


@dataclass(frozen=True)
class SavedParameter:
    """What trains, and what the optimizer knows of it."""

    shape: tuple[int, ...]
    vectors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By key the elements of each rank, in the order of ranks; mapped, not read."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """By key what is the same for all elements, such as step."""

    def elements(self, key: str, start: int, stop: int) -> torch.Tensor:
        """[stop - start]: elements start:stop of the flattened parameter."""
        return elements_of(self.vectors[key], start, stop)


@dataclass(frozen=True)
class SavedState:
    """A checkpoint."""

    parameters: dict[str, SavedParameter]
    """By full name."""
    param_groups: list[dict[str, Any]]
    """Of the optimizer; the same on every rank."""
    loss_scaling: dict[str, Any]
    """As ZeRO's optimizer names it."""
    counters: dict[str, int]
    """Of the engine, by the names of its attributes."""
    client: dict[str, Any]
    """What the engine was given to save, by key, among all that it saved."""
    zero_stage: int
    world_size: int
    """Of the ranks that wrote it."""


def read_saved_state(checkpoint: Path) -> SavedState:
    """What the directory of a checkpoint holds; each rank can read all of it.

    Raises:
        InputError: it is damaged.
    """
    from deepspeed.checkpoint import constants as key

    with reading_checkpoint(checkpoint):
        files = files_by_rank(checkpoint, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
        ranks = [mapped(file)[key.OPTIMIZER_STATE_DICT] for file in files]
        stage = int(ranks[0].get(key.ZERO_STAGE, 1))  # what steps bf16 by itself says none, and cuts like stage 1
        is_stage3 = stage == 3
        engine = mapped(checkpoint / f"{'zero_pp_rank_0_' if is_stage3 else ''}mp_rank_00_model_states.pt")
        shapes = engine[key.PARAM_SHAPES]
        parameters = {name: SavedParameter(tuple(shape)) for group in shapes for name, shape in group.items()}
        weights = key.FP32_FLAT_GROUPS if is_stage3 else key.SINGLE_PARTITION_OF_FP32_GROUPS
        inner = key.OPTIMIZER_STATE_DICT if is_stage3 else key.BASE_OPTIMIZER_STATE
        for rank, saved in enumerate(ranks):
            for group, flat in enumerate(saved[weights]):
                runs = (
                    _equal_parts(shapes[group], rank, len(ranks))
                    if is_stage3
                    else _mapped_parts(saved[key.PARAM_SLICE_MAPPINGS][group])
                )
                for name, run in runs:
                    state = saved[inner]["state"]
                    _add_part(parameters[name], {WEIGHT: flat} | (state[group] if state else {}), run)
        for name, parameter in parameters.items():
            _check_whole(name, parameter)
        return SavedState(
            parameters,
            param_groups=ranks[0][inner]["param_groups"],
            loss_scaling={name: ranks[0][name] for name in _LOSS_SCALING if name in ranks[0]},
            counters={name: engine[name] for name in ("global_steps", "global_samples", "skipped_steps")},
            client=engine,
            zero_stage=stage,
            world_size=len(ranks),
        )


def _equal_parts(shapes: Mapping[str, Any], rank: int, world_size: int) -> Iterator[tuple[str, slice]]:
    begin = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        size = -(-numel // world_size)
        yield name, slice(begin, begin + max(0, min(size, numel - rank * size)))
        begin += size


def _mapped_parts(mapping: Mapping[str, Any]) -> Iterator[tuple[str, slice]]:
    for name, address in mapping.items():
        yield name, slice(address.start, address.start + address.numel)


def _add_part(parameter: SavedParameter, state: Mapping[str, Any], run: slice) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            parameter.vectors.setdefault(key, []).append(value.detach()[run])
        else:
            parameter.scalars[key] = value


def _check_whole(name: str, parameter: SavedParameter) -> None:
    numel = math.prod(parameter.shape)
    for key in dict.fromkeys((WEIGHT, *parameter.vectors)):
        found = sum(part.numel() for part in parameter.vectors.get(key, ()))
        if found != numel:
            raise ValueError(f"{found} of {numel} elements of {key} of {name}")
