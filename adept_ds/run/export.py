"""The adapted model as a Hugging Face directory (export/)."""

from __future__ import annotations

from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import stamp_files
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage
from adept_ds.weights.export import export_checkpoint


def export_stage(run: Context, step: int | None = None) -> None:
    """Write the adapted model, from the newest checkpoint or from `step`."""
    run_dir, dtype = run.run_dir, run.settings.config.export.dtype

    def choose() -> int:
        steps = checkpoint_steps(run_dir.checkpoints)
        if not steps or (step is not None and step not in steps):
            wanted = "any" if step is None else f"step {step}"
            raise InputError(f"'{run_dir.checkpoints}' has not {wanted} checkpoint ({steps}); run `adept train` first")
        return steps[-1] if step is None else step

    chosen = run.ranks.on_main(choose)
    checkpoint, trained = run_dir.checkpoints / checkpoint_tag(chosen), 0

    def inputs() -> dict[str, Any]:
        return {"checkpoint": stamp_files([manifest_of(checkpoint)]), "dtype": dtype}

    def write() -> int:
        with run.progress.on_main("exporting") as bar:
            return export_checkpoint(run_dir.expanded, checkpoint, run_dir.export, dtype, bar)

    def make() -> None:
        nonlocal trained
        trained = run.ranks.on_main(write)

    if run.ledger.once(Stage("export", run_dir.export, inputs), make):
        run.terminal.stage("export", f"{trained} trained tensors of step {chosen} in {run_dir.export}")
    else:
        run.unchanged("export")
