"""A DeepSpeed checkpoint as a universal one, which DeepSpeed loads at any ZeRO stage and on any number of ranks.

    OUT/latest_universal                         names the directory below
    OUT/TAG/zero/PARAMETER/fp32.pt               {"param": whole tensor, "cat_dim": 0}; likewise exp_avg, exp_avg_sq
    OUT/TAG/zero/PARAMETER/step.pt               how many steps its moments have seen
    OUT/TAG/zero/optimizer_state.pt              parameter groups, loss scaling
    OUT/TAG/mp_rank_00_model_states.pt           counters and whatever the training program saved, for stages 1 and 2
    OUT/TAG/zero_pp_rank_0_mp_rank_00_model_states.pt    the same, for stage 3

DeepSpeed's own converter (deepspeed.checkpoint.ds_to_universal, 0.19.8) writes two formats: what it makes of stage 3
holds plain tensors without a step, and DeepSpeed loads it at stage 3 alone; what it makes of stages 1 and 2 lacks the
optimizer's state that loading at stage 3 begins with. It runs whatever code the pickles name, and stores each fragment
once more on the way. This one writes what both loaders read, one tensor in memory at a time.

Frozen weights are in no universal checkpoint: DeepSpeed's loaders ask for what trains, and leave the rest as it is.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py: load_hp_checkpoint_state_from_checkpoint_dir_stage3,
runtime/base_optimizer.py: load_hp_checkpoint_state_from_checkpoint_dir, checkpoint/universal_checkpoint.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_text, writing
from adept_ds.base.outputs import check_output, new_output
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.weights.deepspeed_files import check_understood, tag_of
from adept_ds.weights.saved_state import SavedParameter, SavedState, read_saved_state

_MOMENTS = ("exp_avg", "exp_avg_sq")

_OF_THE_MODEL = ("module", "optimizer", "frozen_param_fragments", "frozen_param_shapes")
"""What DeepSpeed saves beside counters, and does not look at in a universal checkpoint."""


def write_universal(
    checkpoint: Path, destination: Path, progress: ProgressCallback | None = None, *, overwrite: bool = False
) -> SavedState:
    """Write the universal checkpoint of `checkpoint` to `destination`; returns what was read.

    Args:
        checkpoint: its tag, or the directory above it with its `latest` file.
        overwrite: an earlier one in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: `checkpoint` is none that a universal one can be made of, is damaged, or `destination` is no place
            for a new directory.
    """
    check_output(destination, "to_universal.py", {"CHECKPOINT": checkpoint}, overwrite=overwrite)
    directory = tag_of(checkpoint)
    check_understood(directory)
    if not any(directory.glob("*optim_states.pt")):
        raise InputError(f"'{directory}' was saved without ZeRO, and has no states by parameter; train at stage 1 to 3")
    state = read_saved_state(directory)
    _check_adam(state, directory)
    numels = {name: math.prod(parameter.shape) for name, parameter in state.parameters.items()}
    meter = Meter(sum(numels.values()), progress)
    with new_output(destination, "to_universal.py", overwrite=overwrite) as folder:
        place = folder / directory.name
        for name, parameter in state.parameters.items():
            _write_parameter(place / "zero" / name, parameter)
            meter.advance(numels[name], name)
        _save(_optimizer_state(state), place / "zero" / "optimizer_state.pt")
        engine = _engine_state(state)
        for prefix in ("", "zero_pp_rank_0_"):
            _save(engine, place / f"{prefix}mp_rank_00_model_states.pt")
        write_text(folder / "latest_universal", directory.name)
    return state


def universal_tag_of(path: Path) -> Path | None:
    """The directory with the files of a universal checkpoint, whoever wrote it: `path`, or that which its
    `latest_universal` names; None: there is none."""
    latest = path / "latest_universal"
    tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    places = [path, path / tag] if tag and Path(tag).name == tag else [path]
    return next((place for place in places if (place / "zero" / "optimizer_state.pt").is_file()), None)


def _check_adam(state: SavedState, directory: Path) -> None:
    for name, parameter in state.parameters.items():
        missing = [key for key in _MOMENTS if key not in parameter.vectors]
        if missing:
            raise InputError(
                f"'{directory}' has no {missing[0]} of '{name}', and a universal checkpoint is one of Adam's "
                "(exp_avg, exp_avg_sq); give one whose optimizer has stepped, and is Adam or AdamW"
            )


def _write_parameter(folder: Path, parameter: SavedParameter) -> None:
    from deepspeed.checkpoint.constants import CAT_DIM, PARAM

    numel = math.prod(parameter.shape)
    for key in parameter.vectors:
        whole = parameter.elements(key, 0, numel).view(parameter.shape)
        _save({PARAM: whole, CAT_DIM: 0}, folder / f"{key}.pt")
    if "step" in parameter.scalars:
        _save(parameter.scalars["step"], folder / "step.pt")


def _optimizer_state(state: SavedState) -> dict[str, Any]:
    """Stage 3 looks below `optimizer_state_dict`, the other stages beside it."""
    from deepspeed.checkpoint import constants as key

    first = next(iter(state.parameters.values()))
    return {
        **state.loss_scaling,
        key.DS_VERSION: state.client[key.DS_VERSION],
        key.ZERO_STAGE: state.zero_stage,
        key.PARAM_GROUPS: state.param_groups,
        key.OPTIMIZER_STATE_DICT: {"state": {0: dict(first.scalars)}, key.PARAM_GROUPS: state.param_groups},
    }


def _engine_state(state: SavedState) -> dict[str, Any]:
    from deepspeed.checkpoint import constants as key

    kept = {name: value for name, value in state.client.items() if name not in _OF_THE_MODEL}
    version = {key.UNIVERSAL_CHECKPOINT_VERSION_KEY: key.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    return kept | {"module": {}, "optimizer": None, key.UNIVERSAL_CHECKPOINT_INFO: version}


def _save(value: Any, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
