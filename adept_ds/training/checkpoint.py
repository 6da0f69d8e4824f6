"""What a checkpoint says of itself (manifest.json), what it must fit to be resumed from, and loading it.

    checkpoints/step_N/        what `engine.save_checkpoint` would write (zero_to_fp32 and ds_to_universal read it)
    checkpoints/step_N/random_state_rank_R.safetensors, unit_names.json, and what a method adds
    checkpoints/step_N/manifest.json    a directory without it is not a checkpoint

Frozen weights are not saved: they come from the expanded checkpoint, whose fingerprint the manifest records. See
`checkpoint_writer` for how one comes about, and `checkpoint_choice` for which of several is taken.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator

from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.proofs import FileProof, InnerName, Sealed, check_file, check_size
from adept_ds.base.run_dir import checkpoint_tag, manifest_of
from adept_ds.models.device import name_of_precision
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.random_states import load_random_state
from adept_ds.weights.saved_state import read_saved_state
from adept_ds.zero.engine import Engine
from adept_ds.zero.resuming import resume

UNIT_NAMES = "unit_names.json"
"""The names of all units, once, in the order of the multipliers in every rank's file of optimizer states."""

_PRECISION = "train.precision"
_GO_ON = "set it back to go on with this run, or start another one in a run_dir of its own"


class WrittenFile(FileProof):
    """A file of a checkpoint."""

    rank: NonNegativeInt
    """That wrote it."""


class CheckpointManifest(Sealed):
    """What a checkpoint is, and what it must fit to be resumed from."""

    step: int
    world_size: int
    zero_stage: int
    offload: Literal["none", "optimizer", "parameters", "both"] | None = None
    """What DeepSpeed kept on the host; not told by older ones, like all that may be None."""
    precision: str | None = None
    """In which the model computed: 'bfloat16'."""
    adept_ds: str | None = None
    """Version of the program that wrote it."""
    fingerprint: str
    """Of the model that training started from."""
    settings: dict[str, Any]
    """Everything that determines the course of training (see `run.going_on.training_settings`)."""
    id: str | None = None
    """Of this very checkpoint, wherever it is copied."""
    files: dict[InnerName, WrittenFile | NonNegativeInt] = Field(default_factory=dict)
    """What it consists of; of older ones sizes alone, or nothing."""

    @classmethod
    def remedy(cls) -> str:
        return "copy it again, or put this checkpoint aside to resume from the one before it"

    def sealed(self) -> CheckpointManifest:
        """Of a checkpoint of its own, as it is written: from then on a change in it shows."""
        return super(CheckpointManifest, self.model_copy(update={"id": uuid.uuid4().hex})).sealed()

    @model_validator(mode="after")
    def _wholly_proved(self) -> CheckpointManifest:
        if self.check is None and any(isinstance(file, FileProof) for file in self.files.values()):
            raise ValueError("files are proved, and the manifest itself is not")
        return self


def load_checkpoint(engine: Engine, directory: Path, manifest: CheckpointManifest, ranks: Ranks) -> dict[str, Any]:
    """Restore weights of the copies, optimizer, multipliers and random state of step `manifest.step`.

    Other ranks, or another ZeRO stage, may have written them (see `zero.resuming`).

    Returns:
        The state that the trainer had, on rank 0 where ranks differ.

    Raises:
        InputError: a file of it is damaged.
    """
    place = directory / checkpoint_tag(manifest.step)
    saved = ranks.on_each(lambda: read_saved_state(place), CheckpointManifest.remedy())
    resume(engine, saved)
    client = saved.client["adept_ds"]
    ranks.on_each(lambda: load_random_state(place, ranks.rank), CheckpointManifest.remedy())
    state: dict[str, Any] = client["state"]
    return state


def check_whole(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint that is complete, as far as names and sizes of files tell.

    Raises:
        DamagedError: the manifest, or a file that it names, is not as it was written.
        InputError: there is a file that DeepSpeed would open with the others, and that it does not name.
    """
    manifest = CheckpointManifest.load(manifest_of(checkpoint))
    for name, file in manifest.files.items():
        check_size(checkpoint, name, file.size if isinstance(file, FileProof) else file)
    for path in checkpoint.glob("*.pt"):
        if manifest.files and path.name not in manifest.files:
            raise InputError(f"'{path}' came to this checkpoint after it was written; move it away")
    return manifest


def verify(checkpoint: Path, ranks: Ranks) -> CheckpointManifest:
    """The manifest of a checkpoint whose files are what it says, to the last bit: each is read by one rank.

    Raises, on every rank:
        DamagedError: one is not; the message names it, without a remedy.
        InputError: as `check_whole`.
    """
    manifest, complaint = ranks.on_main(lambda: check_whole(checkpoint)), None
    try:
        for name, file in manifest.files.items():
            if isinstance(file, WrittenFile) and file.rank % ranks.world_size == ranks.rank:
                check_file(checkpoint, name, file)
    except DamagedError as error:
        complaint = error
    for found in ranks.gather(complaint):
        if found is not None:
            raise found
    return manifest


def check_same_training(directory: Path, expected: CheckpointManifest) -> None:
    """The checkpoint of step `expected.step` is one of this very training.

    Raises:
        InputError: it is one of another; the message names the difference and how to go on.
    """
    place = directory / checkpoint_tag(expected.step)
    found = CheckpointManifest.load(manifest_of(place))
    check_same_settings(_told(found), expected.settings, place)
    check_same_start(found, expected.fingerprint, place)


def check_same_settings(found: Mapping[str, Any], expected: Mapping[str, Any], place: Path) -> None:
    """Raises `InputError` if the checkpoint at `place` was trained by `found`, and not by what is expected."""
    for key, value in found.items():
        now = expected.get(key)
        if now != value and key == _PRECISION:
            raise InputError(
                f"{key}: '{place}' was trained in {value}, not {now}; set {key} to {value} to go on with this run, or "
                "start another one in a run_dir of its own"
            )
        if now != value:
            raise InputError(f"{key}: '{place}' was trained {_otherwise(value, now)}; {_GO_ON}")


def check_same_start(found: CheckpointManifest, fingerprint: str, place: Path) -> None:
    """Raises `InputError` if the checkpoint `found` at `place` is of training that started from another model."""
    if found.fingerprint != fingerprint:
        raise InputError(
            f"model: '{place}' trained another model than the one there now; give the model and the layers "
            "(expand.layers) that this run began with, or start another one in a run_dir of its own"
        )


def change_of_shape(directory: Path, expected: CheckpointManifest) -> str:
    """Which ranks wrote the checkpoint of step `expected.step`, and which go on with it; nothing if they are alike."""
    found = CheckpointManifest.load(manifest_of(directory / checkpoint_tag(expected.step)))
    before, now = (f"{_count(of.world_size)} under ZeRO-{of.zero_stage}" for of in (found, expected))
    return "" if before == now else f", written by {before}, on {now}"


def _count(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _told(manifest: CheckpointManifest) -> dict[str, Any]:
    """Its settings; older versions left the precision to the device, and told what it was beside them."""
    settings, known = manifest.settings, manifest.precision
    if settings.get(_PRECISION) != "auto":
        return settings
    told = {_PRECISION: name_of_precision(getattr(torch, known))} if known else {}
    return {key: value for key, value in settings.items() if key != _PRECISION} | told


def _otherwise(value: Any, now: Any) -> str:
    if _are_texts(value) or _are_texts(now):
        return "on other texts"
    if isinstance(value, dict):  # digests too
        other = [name for name in value if not isinstance(now, dict) or now.get(name) != value[name]]
        return f"with another {' and another '.join(other)}"
    return f"with {value!r}, not {now!r}"


def _are_texts(value: Any) -> bool:
    """Whose digests say nothing to people (see `run.identity`)."""
    return isinstance(value, list) and any(isinstance(source, dict) for source in value)
