"""The adapted model as a Hugging Face directory (export/)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_output
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME, checkpoint_tag, manifest_of
from adept_ds.config.known_methods import parse_method
from adept_ds.methods.shape import Method
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage
from adept_ds.run.prerequisites import exported_step
from adept_ds.run.replacing import keep_aside
from adept_ds.run.start import start_directory
from adept_ds.training.checkpoint import CheckpointManifest, check_same_start, check_whole
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.export import export_checkpoint, tag_of
from adept_ds.weights.fingerprints import fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors


def export_stage(run: Context, step: int | None = None) -> None:
    """Write the adapted model, from the newest checkpoint or from `step`."""
    run_dir, dtype = run.run_dir, run.settings.config.export.dtype
    chosen = run.ranks.on_main(lambda: exported_step(run.settings.config, step))
    checkpoint, trained, start = run_dir.checkpoints / checkpoint_tag(chosen), 0, start_directory(run)

    def fingerprint() -> str:
        expands = start == run_dir.expanded
        return Expansion.read(start).fingerprint if expands else run.identity.weights(run.settings.model)

    def inputs() -> dict[str, Any]:
        manifest = check_whole(checkpoint)
        check_same_start(manifest, fingerprint(), checkpoint)
        return {"checkpoint": manifest.to_json(), "dtype": dtype}

    def write() -> int:
        keep_aside(run, run_dir.export, "export")
        with run.progress.on_main("exporting") as bar:
            return _export(start, checkpoint, run_dir.export, dtype, bar, overwrite=True)

    def make() -> None:
        nonlocal trained
        trained = run.ranks.on_main(write)

    if run.ledger.once(Stage("export", run_dir.export, inputs), make):
        run.terminal.stage("export", f"{trained} trained tensors of step {chosen} in {run_dir.export}")
    else:
        run.unchanged("export")


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

    def learned(trained: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        return method.learned(trained, model, checkpoint) if method else trained.items()

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
