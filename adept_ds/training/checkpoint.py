"""Training checkpoints: DeepSpeed's own format plus a manifest, whole or absent.

    checkpoints/step_N/        what `engine.save_checkpoint` writes (zero_to_fp32 and ds_to_universal read it)
    checkpoints/step_N/manifest.json    written last; a directory without it is not a checkpoint
    checkpoints/latest         the newest tag, as DeepSpeed's tools expect it

Frozen weights are not saved: they come from the expanded checkpoint, whose fingerprint the manifest records.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import NewDirectory, write_text
from adept_ds.base.records import Record
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.models.device import device_rng_state, set_device_rng_state
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.engine import Engine


class CheckpointManifest(Record):
    """What a checkpoint must fit to be resumed from."""

    step: int
    world_size: int
    zero_stage: int
    fingerprint: str
    """Of the expanded checkpoint that training started from."""
    settings: dict[str, Any]
    """Everything that determines the course of training (see `run.train.training_settings`)."""

    @classmethod
    def remedy(cls) -> str:
        return "move this checkpoint away to resume from an older one"


def save_checkpoint(
    engine: Engine,
    directory: Path,
    manifest: CheckpointManifest,
    ranks: Ranks,
    keep: int,
    state: dict[str, Any],
    write_more: Callable[[Path], None],
) -> None:
    """Write a checkpoint under a temporary tag; it takes its real name only when every rank is done.

    Args:
        state: of the trainer on this rank.
        write_more: called on every rank with the checkpoint's directory.
    """
    tag = checkpoint_tag(manifest.step)
    new: NewDirectory | None = None

    def begin() -> str:
        nonlocal new
        new = NewDirectory(directory / tag)
        return new.temporary.name

    def publish() -> None:
        assert new is not None
        manifest.save(manifest_of(new.temporary))
        new.publish()
        write_text(directory / "latest", tag)
        for step in checkpoint_steps(directory)[:-keep]:
            old = directory / checkpoint_tag(step)
            manifest_of(old).unlink()  # first: half of it is no checkpoint
            shutil.rmtree(old)

    temporary = ranks.on_main(begin)
    try:
        engine.save_checkpoint(
            str(directory),
            tag=temporary,
            client_state={"adept_ds": {"step": manifest.step, "ranks": ranks.gather((_rng_state(), state))}},
            exclude_frozen_parameters=True,
            save_latest=False,
        )
        write_more(directory / temporary)
        ranks.barrier()
        ranks.on_main(publish)
    finally:
        if new is not None:
            new.discard()


def load_checkpoint(engine: Engine, directory: Path, expected: CheckpointManifest, ranks: Ranks) -> dict[str, Any]:
    """Restore weights of the copies, optimizer, multipliers and random state; returns this rank's state.

    Raises:
        InputError: the checkpoint belongs to another expansion, number of ranks, ZeRO stage or setting.
    """
    path, client_state = engine.load_checkpoint(
        str(directory), tag=checkpoint_tag(expected.step), load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        raise InputError(
            f"'{directory / checkpoint_tag(expected.step)}' cannot be loaded; move it away to resume from an older one"
        )
    rng, state = client_state["adept_ds"]["ranks"][ranks.rank]
    _restore_rng_state(rng)
    return dict(state)


def check_resumable(directory: Path, expected: CheckpointManifest) -> None:
    """Raises `InputError`, naming the difference and the remedy, if a checkpoint does not fit this run."""
    place = directory / checkpoint_tag(expected.step)
    found = CheckpointManifest.load(manifest_of(place))
    remedy = "set it back, or choose another run_dir"
    if found.world_size != expected.world_size:
        raise InputError(
            f"'{place}' was written by {found.world_size} ranks and this run has {expected.world_size}; "
            f"start {found.world_size} ranks, or choose another run_dir"
        )
    if found.zero_stage != expected.zero_stage:
        raise InputError(f"deepspeed: '{place}' was written with ZeRO stage {found.zero_stage}; {remedy}")
    for key, value in found.settings.items():
        if expected.settings.get(key) != value:
            raise InputError(
                f"{key}: '{place}' was trained with {value!r}, not {expected.settings.get(key)!r}; {remedy}"
            )
    if found.fingerprint != expected.fingerprint:
        raise InputError(f"'{place}' belongs to another expanded checkpoint; choose another run_dir")


def _rng_state() -> dict[str, Any]:
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": device_rng_state()}


def _restore_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    set_device_rng_state(state["cuda"])
