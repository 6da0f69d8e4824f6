"""Every weight that a DeepSpeed checkpoint holds, put together when it is asked for: few are in memory at once.

What trained is in the optimizer's files, in fp32 (see `saved_state`). What was frozen is there only if the checkpoint
was saved with it, in the precision of the model: below stage 3 whole on rank 0, at stage 3 in the files of all ranks.
Without ZeRO (stage 0) everything is whole on rank 0, and nothing says what of it trained.

DeepSpeed's own reader (utils/zero_to_fp32.py) holds all of stages 1 and 2 in memory, twice, and leaves out what was
frozen at stage 1.

Written against DeepSpeed 0.19.8 (runtime/engine.py: _common_checkpoint_state, _get_zero_frozen_param_attributes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adept_ds.weights.by_rank import elements_of, files_by_rank
from adept_ds.weights.deepspeed_files import check_understood, mapped, reading_checkpoint
from adept_ds.weights.made_tensors import MadeTensors
from adept_ds.weights.saved_state import WEIGHT, SavedParameter, SavedState, read_saved_state

_ON_RANK_0 = "mp_rank_00_model_states.pt"
_BY_RANK = r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt"


@dataclass(frozen=True)
class SavedWeights:
    """By full name."""

    trained: MadeTensors
    """fp32. Of a checkpoint without ZeRO everything, in the precision of the model."""
    frozen: MadeTensors
    """As the model had them, with its buffers; nothing where the checkpoint was saved without them."""
    state: SavedState | None
    """Of training; None without ZeRO."""
    shapes: dict[str, tuple[int, ...]]
    """Of what trained; a tied parameter counts once."""


def read_saved_weights(checkpoint: Path) -> SavedWeights:
    """What the directory of a checkpoint holds of a model.

    Raises:
        InputError: it is damaged, or of a kind that is not understood.
    """
    check_understood(checkpoint)
    if not any(checkpoint.glob("*optim_states.pt")):
        return _without_zero(checkpoint)
    state = read_saved_state(checkpoint)
    with reading_checkpoint(checkpoint):
        engine = state.client
        trained = {name: partial(_whole, parameter) for name, parameter in state.parameters.items()}
        aliases = dict(engine.get("shared_params") or {})
        frozen = _in_parts(checkpoint) if state.zero_stage == 3 else _in_module(engine, state, aliases)
        for makes in (trained, frozen):
            makes |= {alias: makes[name] for alias, name in aliases.items() if name in makes}
        shapes = {name: parameter.shape for name, parameter in state.parameters.items()}
        frozen = {name: make for name, make in frozen.items() if name not in trained}
        return SavedWeights(MadeTensors(trained), MadeTensors(frozen), state, shapes)


def _without_zero(checkpoint: Path) -> SavedWeights:
    with reading_checkpoint(checkpoint):
        module = mapped(checkpoint / _ON_RANK_0)["module"]
        shapes = {name: tuple(tensor.shape) for name, tensor in module.items()}
        return SavedWeights(MadeTensors(_as_they_are(module)), MadeTensors({}), None, shapes)


def _whole(parameter: SavedParameter) -> torch.Tensor:
    return parameter.elements(WEIGHT, 0, math.prod(parameter.shape)).view(parameter.shape)


def _in_module(engine: Mapping[str, Any], state: SavedState, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Below stage 3: of the model's own state whatever the optimizer does not have.

    A head that is tied to a frozen embedding is there even where what was frozen was to be left out.
    """
    module, known = engine.get("module") or {}, state.parameters.keys() | aliases.keys()
    return _as_they_are({name: tensor for name, tensor in module.items() if name not in known})


def _in_parts(checkpoint: Path) -> dict[str, Any]:
    """At stage 3: parts of one size, the last ones filled up."""
    ranks = [mapped(file) for file in files_by_rank(checkpoint, _BY_RANK)]
    buffers = {name: ranks[0]["module"][name] for name in ranks[0].get("buffer_names") or ()}
    shapes = ranks[0].get("frozen_param_shapes") or {}
    parts = [rank.get("frozen_param_fragments") or {} for rank in ranks]
    return _as_they_are(buffers) | {
        name: partial(_joined, [of_rank[name].flatten() for of_rank in parts], tuple(shape))
        for name, shape in shapes.items()
    }


def _joined(parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return elements_of(parts, 0, math.prod(shape)).view(shape)


def _as_they_are(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: partial(torch.Tensor.contiguous, tensor) for name, tensor in tensors.items()}
