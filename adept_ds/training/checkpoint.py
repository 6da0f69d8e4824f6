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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json, write_text
from adept_ds.ranks.collectives import barrier, gather_objects, on_main_rank, rank, world_size

_PREFIX = "step_"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint must fit to be resumed from."""

    step: int
    world_size: int
    zero_stage: int
    fingerprint: str
    """Of the expanded checkpoint that training started from."""
    settings: dict[str, Any]
    """Everything that determines the course of training (see `stages.training_settings`)."""


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    tags = [path.parent.name for path in directory.glob(f"{_PREFIX}*/manifest.json")]
    return sorted(int(tag.removeprefix(_PREFIX)) for tag in tags if tag.removeprefix(_PREFIX).isdigit())


def tag_of(step: int) -> str:
    return f"{_PREFIX}{step}"


def read_manifest(directory: Path, step: int) -> Manifest:
    return Manifest(**read_json(directory / tag_of(step) / "manifest.json"))


def save_checkpoint(
    engine: Any,
    directory: Path,
    manifest: Manifest,
    keep: int,
    state: dict[str, Any],
    write_more: Callable[[Path], None],
) -> None:
    """Write a checkpoint under a temporary tag; it takes its real name only when every rank is done.

    Args:
        state: of the trainer on this rank.
        write_more: called on every rank with the checkpoint's directory.
    """
    temporary, tag = f".{tag_of(manifest.step)}.tmp", tag_of(manifest.step)
    on_main_rank(lambda: shutil.rmtree(directory / temporary, ignore_errors=True))
    engine.save_checkpoint(
        str(directory),
        tag=temporary,
        client_state={"adept_ds": {"step": manifest.step, "ranks": gather_objects((_rng_state(), state))}},
        exclude_frozen_parameters=True,
        save_latest=False,
    )
    write_more(directory / temporary)
    barrier()

    def publish() -> None:
        write_json(directory / temporary / "manifest.json", asdict(manifest))
        shutil.rmtree(directory / tag, ignore_errors=True)
        (directory / temporary).rename(directory / tag)
        write_text(directory / "latest", tag)
        for step in checkpoint_steps(directory)[:-keep]:
            shutil.rmtree(directory / tag_of(step))

    on_main_rank(publish)


def load_checkpoint(engine: Any, directory: Path, expected: Manifest) -> dict[str, Any]:
    """Restore weights of the copies, optimizer, multipliers and random state; returns this rank's state.

    Raises:
        InputError: the checkpoint belongs to another expansion, number of ranks, ZeRO stage or setting.
    """
    path, client_state = engine.load_checkpoint(
        str(directory), tag=tag_of(expected.step), load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        raise InputError(
            f"'{directory / tag_of(expected.step)}' cannot be loaded; delete it to resume from an older one"
        )
    rng, state = client_state["adept_ds"]["ranks"][rank()]
    _restore_rng_state(rng)
    return dict(state)


def check_resumable(directory: Path, expected: Manifest) -> None:
    """Raises `InputError`, naming the difference and the remedy, if a checkpoint does not fit this run."""
    found = read_manifest(directory, expected.step)
    place = directory / tag_of(expected.step)
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


def expected_manifest(step: int, zero_stage: int, fingerprint: str, settings: dict[str, Any]) -> Manifest:
    return Manifest(step, world_size(), zero_stage, fingerprint, settings)


def _rng_state() -> dict[str, Any]:
    import torch

    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_rng_state(state: dict[str, Any]) -> None:
    import torch

    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
