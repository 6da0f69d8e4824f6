"""The configuration of a run that lets another one's learning rate fall to 0, from a checkpoint on.

With `schedule: wsd` the course of training up to the end of the flat part does not depend on how long the run will be:
neither the rates (their warmup is counted in steps) nor the order of the data. So one flat trunk can be decayed from
any of its checkpoints, and each branch is what a run of its length would have been. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import lies_in
from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config

OPTION = "--decay-from"


def decayed(trunk: Config, step: int, run_dir: Path | None = None) -> Config:
    """A run of its own, as long as one whose flat part ends after `step`, and otherwise as `trunk`.

    Args:
        run_dir: where it is written; by default in the trunk's.

    Raises:
        InputError: the trunk has no flat part, or `step` does not lie in it; or `run_dir` is the trunk's own.
    """
    if run_dir is not None and lies_in(trunk.run_dir, run_dir):
        raise InputError(f"--decay-dir: '{run_dir}' is or holds '{trunk.run_dir}', which is read; give another")
    train = trunk.train
    if train.schedule != "wsd":
        raise InputError(
            f"{OPTION}: with train.schedule: {train.schedule} no part of training is flat, and a run cannot be decayed "
            "from one of its checkpoints; train with train.schedule: wsd"
        )
    begin, end = train.num_warmup_steps, train.flat_until
    if not max(1, begin) <= step <= end:
        where = "warmup" if step < begin else "decay"
        raise InputError(
            f"{OPTION}: {step} lies in the {where}; choose the step of a checkpoint from {max(1, begin)} to {end}, "
            "where the learning rate is flat"
        )
    tree = trunk.model_dump(mode="json")
    tree["run_dir"] = str(run_dir or RunDirectory(trunk.run_dir).decayed_from(step))
    tree["train"].pop("warmup_ratio", None)
    tree["train"] |= {"steps": train.steps_if_decayed_from(step), "warmup_steps": begin}
    return parse_config(tree, OPTION)
