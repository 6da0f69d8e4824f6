"""Training checkpoints: DeepSpeed's own format plus a manifest, whole or absent.

    checkpoints/step_N/        what `engine.save_checkpoint` writes (zero_to_fp32 and ds_to_universal read it)
    checkpoints/step_N/manifest.json    written last; a directory without it is not a checkpoint
    checkpoints/latest         the newest tag, as DeepSpeed's tools expect it

Frozen weights are not saved: they come from the expanded checkpoint, whose fingerprint the manifest records.
"""

from __future__ import annotations

import random
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt

from adept_ds.base.errors import InputError
from adept_ds.base.files import NewDirectory, aside, link_tree, new_directory, write_text, writing
from adept_ds.base.records import Record
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.models.device import device_rng_state, set_device_rng_state
from adept_ds.ranks.collectives import Ranks
from adept_ds.weights.deepspeed_files import reading_data_only
from adept_ds.zero.engine import Engine

_GO_ON = "set it back to go on with this run, or start another one in a run_dir of its own"


class CheckpointManifest(Record):
    """What a checkpoint must fit to be resumed from."""

    step: int
    world_size: int
    zero_stage: int
    fingerprint: str
    """Of the model that training started from."""
    settings: dict[str, Any]
    """Everything that determines the course of training (see `run.train.training_settings`)."""
    id: str | None = None
    """Of this very checkpoint, wherever it is copied; older ones have none."""
    files: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """What it consists of, by path, in bytes; of older ones nothing."""

    @classmethod
    def remedy(cls) -> str:
        return "copy it again, or put this checkpoint aside to resume from the one before it"


def save_checkpoint(
    engine: Engine,
    directory: Path,
    manifest: CheckpointManifest,
    ranks: Ranks,
    keep: int,
    state: dict[str, Any],
    write_more: Callable[[Path], None],
    stays: Collection[int] = (),
) -> None:
    """Write a checkpoint under a temporary tag; it takes its real name only when every rank is done.

    Args:
        state: of the trainer on this rank.
        write_more: called on every rank with the checkpoint's directory.
        stays: steps whose checkpoints are not removed, however old.
    """
    tag = checkpoint_tag(manifest.step)
    new: NewDirectory | None = None

    def begin() -> str:
        nonlocal new
        new = NewDirectory(directory / tag, _refuse_if_whole)
        return new.temporary.name

    def publish() -> None:
        assert new is not None
        files = _files_of(new.temporary)
        manifest.model_copy(update={"id": uuid.uuid4().hex, "files": files}).save(manifest_of(new.temporary))
        new.publish()
        write_text(directory / "latest", tag)
        for step in set(checkpoint_steps(directory)[:-keep]) - set(stays):
            old = directory / checkpoint_tag(step)
            manifest_of(old).unlink()  # first: half of it is no checkpoint
            shutil.rmtree(old)

    temporary = ranks.on_main(begin)
    try:
        with writing(directory / tag):
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


def adopt_checkpoint(checkpoint: Path, directory: Path, manifest: CheckpointManifest) -> None:
    """Make the checkpoint of another run one of those in `directory`, under a manifest of its own; on rank 0 alone.

    Its files get second names and are not copied, where the file system can do that.
    """
    tag = checkpoint_tag(manifest.step)
    with new_directory(directory / tag, _refuse_if_whole) as folder:
        link_tree(checkpoint, folder, leave_out={manifest_of(checkpoint).name})
        manifest.model_copy(update={"id": uuid.uuid4().hex, "files": _files_of(folder)}).save(manifest_of(folder))
    write_text(directory / "latest", tag)


def _files_of(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): size for file, size in _sizes(folder)}


def _refuse_if_whole(place: Path) -> None:
    """What is no checkpoint was left by a process that was killed while it removed an old one."""
    if manifest_of(place).exists():
        raise InputError(f"'{place}' is a whole checkpoint already; put it aside to train these steps again")


def load_checkpoint(engine: Engine, directory: Path, expected: CheckpointManifest, ranks: Ranks) -> dict[str, Any]:
    """Restore weights of the copies, optimizer, multipliers and random state; returns this rank's state.

    Raises:
        InputError: a file of it is damaged.
    """
    with reading_data_only():
        path, client_state = engine.load_checkpoint(
            str(directory), tag=checkpoint_tag(expected.step), load_module_strict=False, load_lr_scheduler_states=False
        )
    if path is None:
        place = directory / checkpoint_tag(expected.step)
        raise InputError(f"'{place}' cannot be loaded; put it aside to resume from the one before it")
    rng, state = client_state["adept_ds"]["ranks"][ranks.rank]
    _restore_rng_state(rng)
    return dict(state)


def put_aside(directory: Path, step: int) -> None:
    """Let the checkpoint of step `step`, if there is one, count no more: its weights are broken."""
    place = directory / checkpoint_tag(step)
    if not manifest_of(place).exists():
        return
    place.rename(aside(place, "broken"))
    left = checkpoint_steps(directory)
    if left:
        write_text(directory / "latest", checkpoint_tag(left[-1]))
    else:
        (directory / "latest").unlink(missing_ok=True)


def check_whole(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint that is complete, as far as sizes of files tell.

    Raises:
        InputError: copying it broke off.
    """
    manifest, found = CheckpointManifest.load(manifest_of(checkpoint)), dict(_sizes(checkpoint))
    for name, size in manifest.files.items():
        if found.get(checkpoint / name) != size:
            have = found.get(checkpoint / name, "no")
            raise InputError(f"'{checkpoint / name}' has {have} bytes of {size}; {manifest.remedy()}")
    return manifest


def _sizes(directory: Path) -> Iterator[tuple[Path, int]]:
    return ((path, path.stat().st_size) for path in sorted(directory.rglob("*")) if path.is_file())


def newest_manifest(directory: Path) -> CheckpointManifest | None:
    """Of the newest checkpoint. Raises `InputError` if it is damaged."""
    steps = checkpoint_steps(directory)
    return CheckpointManifest.load(manifest_of(directory / checkpoint_tag(steps[-1]))) if steps else None


def check_same_training(directory: Path, expected: CheckpointManifest) -> None:
    """The checkpoint of step `expected.step` is one of this very training.

    Raises:
        InputError: it is one of another; the message names the difference and how to go on.
    """
    place = directory / checkpoint_tag(expected.step)
    found = CheckpointManifest.load(manifest_of(place))
    for key, value in found.settings.items():
        now = expected.settings.get(key)
        if now != value:
            how = "on other texts" if _are_texts(value) or _are_texts(now) else f"with {value!r}, not {now!r}"
            raise InputError(f"{key}: '{place}' was trained {how}; {_GO_ON}")
    check_same_start(found, expected.fingerprint, place)


def check_same_start(found: CheckpointManifest, fingerprint: str, place: Path) -> None:
    """Raises `InputError` if the checkpoint `found` at `place` is of training that started from another model."""
    if found.fingerprint != fingerprint:
        raise InputError(
            f"model: '{place}' trained another model than the one there now; give the model and the layers "
            "(expand.layers) that this run began with, or start another one in a run_dir of its own"
        )


def check_same_ranks(directory: Path, expected: CheckpointManifest) -> None:
    """Raises `InputError`, with the remedy, if these ranks cannot read the checkpoint of step `expected.step`."""
    place = directory / checkpoint_tag(expected.step)
    found = CheckpointManifest.load(manifest_of(place))
    if found.world_size != expected.world_size:
        raise InputError(
            f"'{place}' was written by {found.world_size} ranks and this run has {expected.world_size}; "
            f"start {found.world_size} ranks"
        )
    if found.zero_stage != expected.zero_stage:
        raise InputError(
            f"deepspeed: '{place}' was written with ZeRO stage {found.zero_stage}, not {expected.zero_stage}; {_GO_ON}"
        )


def _are_texts(value: Any) -> bool:
    """Whose digests say nothing to people (see `run.identity`)."""
    return isinstance(value, list) and any(isinstance(source, dict) for source in value)


def _rng_state() -> dict[str, Any]:
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": device_rng_state()}


def _restore_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    set_device_rng_state(state["cuda"])
