"""The adapted model as a Hugging Face directory.

Stages of the ledger:
    trained    trained/: as it was trained, where it may be turned down
    export     export/: as it was trained, or at a position of the dial, which is made of trained/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.dial_record import label_of
from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.outputs import check_as_written, check_output
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME, checkpoint_tag, manifest_of
from adept_ds.config.known_methods import parse_method
from adept_ds.methods.shape import Method
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.expand import MADE_AGAIN
from adept_ds.run.ledger import Stage
from adept_ds.run.prerequisites import exported_step
from adept_ds.run.replacing import keep_aside
from adept_ds.run.start import start_directory
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    check_same_settings,
    check_same_start,
    check_whole,
    verify,
)
from adept_ds.weights.deepspeed_files import tag_of
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.export import export_checkpoint
from adept_ds.weights.fingerprints import fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.turning import check_count, write_turned


def export_stage(run: Context, step: int | None = None, alphas: Sequence[float] | None = None) -> None:
    """Write the adapted model, from the newest checkpoint or from `step`.

    Args:
        alphas: at this position of the dial; None: as it was trained. With a section `dial` that is `trained`, until
            a position is chosen (see `run.dial`).
    """
    if alphas is not None:
        run.ranks.on_main(lambda: _check_positions(run, alphas))
        export_trained(run, step)
        export_turned(run, alphas, step)
    elif run.settings.config.dial is not None:
        export_trained(run, step)
        run.terminal.stage("export", "not turned yet: `adept dial CONFIG` chooses a position, and exports that")
    else:
        _as_trained(run, "export", run.run_dir.export, step)


def export_trained(run: Context, step: int | None = None) -> None:
    """Write `trained`, that the dial turns. What was chosen for another one goes."""
    _as_trained(run, "trained", run.run_dir.trained, step, stale=run.run_dir.dial)


def export_turned(run: Context, alphas: Sequence[float], step: int | None = None) -> None:
    """Write `export`: what is in `trained`, at a position of the dial."""
    run_dir, base = run.run_dir, run.settings.model.path
    makes_copies = run.settings.config.method.makes_copies

    def inputs() -> dict[str, Any]:
        checkpoint = run_dir.checkpoints / checkpoint_tag(exported_step(run.settings.config, step))
        return _made_of(run, checkpoint) | {"alphas": list(alphas)}

    def write() -> None:
        keep_aside(run, run_dir.export, "export")
        with run.progress.on_main("turning") as bar:
            write_turned(run_dir.trained, run_dir.export, alphas, None if makes_copies else base, bar, overwrite=True)

    if run.ledger.once(Stage("export", run_dir.export, inputs), lambda _: run.ranks.on_main(write)):
        run.terminal.stage("export", f"at alpha {label_of(tuple(alphas))} in {run_dir.export}")
    else:
        run.unchanged("export")


def _check_positions(run: Context, alphas: Sequence[float]) -> None:
    """Raises `InputError`: there are not so many copies."""
    expanded = run.run_dir.expanded
    check_count(alphas, len(Expansion.read(expanded).copies) if start_directory(run) == expanded else None)


def _as_trained(run: Context, name: str, destination: Path, step: int | None, stale: Path | None = None) -> None:
    dtype, start = run.settings.config.export.dtype, start_directory(run)
    chosen = run.ranks.on_main(lambda: exported_step(run.settings.config, step))
    checkpoint, trained = run.run_dir.checkpoints / checkpoint_tag(chosen), 0

    def write() -> int:
        if stale is not None:
            stale.unlink(missing_ok=True)
        keep_aside(run, destination, "export")
        if start == run.run_dir.expanded:
            run.identity.check_as_written(start, MADE_AGAIN)
        with run.progress.on_main("exporting") as bar:
            return _export(start, checkpoint, destination, dtype, bar, overwrite=True)

    def make(_: Unfinished) -> None:
        nonlocal trained
        trained = run.ranks.on_main(write)

    if run.ledger.once(Stage(name, destination, lambda: _made_of(run, checkpoint)), make):
        run.terminal.stage("export", f"{trained} trained tensors of step {chosen} in {destination}")
    else:
        run.unchanged("export")


def _made_of(run: Context, checkpoint: Path) -> dict[str, Any]:
    """What decides what is exported as it was trained. Raises `InputError`: the checkpoint is none of this run."""
    start = start_directory(run)
    expands = start == run.run_dir.expanded
    fingerprint = Expansion.read(start).fingerprint if expands else run.identity.weights(run.settings.model)
    manifest = check_whole(checkpoint)
    check_same_start(manifest, fingerprint, checkpoint)
    made_of = {"checkpoint": manifest.to_json(), "dtype": run.settings.config.export.dtype}
    if expands:  # the checkpoint says by its start what is beside the weights
        return made_of
    besides = run.identity.besides_weights(run.settings.model)
    if "model" in manifest.settings:  # of an older version not
        check_same_settings({"model": manifest.settings["model"]}, {"model": besides}, checkpoint)
    return made_of | {"model": besides}


def export_learned(
    start: Path,
    checkpoint: Path,
    destination: Path,
    dtype: str = "source",
    progress: ProgressCallback | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """As `export_checkpoint`, by the method that the checkpoint says it was trained with, on plain directories.

    Raises:
        InputError: also if the checkpoint was trained from another model than `start`. Methods in place put what they
            learned over any model of the same shapes, or add to it.
    """
    check_output(destination, "export", {"CHECKPOINT": checkpoint, "--base": start}, overwrite=overwrite)
    directory = tag_of(checkpoint)
    check_as_written(start, remedy=Expansion.remedy())
    if manifest_of(directory).is_file():
        manifest = CheckpointManifest.load(manifest_of(directory))
        if manifest.fingerprint != _fingerprint(start):
            raise InputError(f"--base: '{directory}' was trained from another model than '{start}'; give its own")
    return _export(start, directory, destination, dtype, progress, overwrite=overwrite)


def _export(
    start: Path,
    checkpoint: Path,
    destination: Path,
    dtype: str,
    progress: ProgressCallback | None,
    *,
    overwrite: bool,
) -> int:
    method, model = _trained_with(checkpoint), ModelDirectory.read(start)
    if manifest_of(checkpoint).is_file():
        try:
            verify(checkpoint, Ranks())
        except DamagedError as error:
            raise DamagedError(error.reason, CheckpointManifest.remedy()) from None

    def learned(trained: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return method.learned(trained, model, checkpoint) if method else trained

    return export_checkpoint(start, checkpoint, destination, dtype, progress, learned=learned, overwrite=overwrite)


def _fingerprint(start: Path) -> str:
    """Of an expanded model as it says itself, of another by its tensors, which are read."""
    if (start / EXPANSION_NAME).is_file():
        return Expansion.read(start).fingerprint
    return fingerprint_of(hash_tensors(stored_tensors(start)))


def _trained_with(checkpoint: Path) -> Method | None:
    """None: the checkpoint is DeepSpeed's alone, and says nothing of a method."""
    if not manifest_of(checkpoint).is_file():
        return None
    settings = CheckpointManifest.load(manifest_of(checkpoint)).settings
    section = {key.removeprefix("method."): value for key, value in settings.items() if key.startswith("method.")}
    method = parse_method(section, str(manifest_of(checkpoint)))
    assert isinstance(method, Method)
    return method
