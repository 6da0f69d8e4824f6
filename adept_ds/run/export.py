"""The adapted model as a Hugging Face directory (export/)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import checkpoint_tag, manifest_of
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
from adept_ds.weights.export import export_checkpoint


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
            return export_learned(start, checkpoint, run_dir.export, dtype, bar, overwrite=True)

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
    """As `export_checkpoint`, by the method that the checkpoint says it was trained with."""
    method, model = _trained_with(checkpoint), ModelDirectory.read(start)

    def learned(trained: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        return method.learned(trained, model, checkpoint) if method else trained.items()

    return export_checkpoint(start, checkpoint, destination, dtype, progress, learned=learned, overwrite=overwrite)


def _trained_with(checkpoint: Path) -> Method | None:
    """None: the checkpoint is DeepSpeed's alone, and says nothing of a method."""
    if not manifest_of(checkpoint).is_file():
        return None
    settings = CheckpointManifest.load(manifest_of(checkpoint)).settings
    section = {key.removeprefix("method."): value for key, value in settings.items() if key.startswith("method.")}
    method = parse_method(section, str(manifest_of(checkpoint)))
    assert isinstance(method, Method)
    return method
