"""The adapted model as a Hugging Face directory (export/)."""

from __future__ import annotations

from typing import Any

from adept_ds.base.run_dir import checkpoint_tag
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage
from adept_ds.run.prerequisites import exported_step
from adept_ds.run.replacing import keep_aside
from adept_ds.training.checkpoint import check_same_expansion, check_whole
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.export import export_checkpoint


def export_stage(run: Context, step: int | None = None) -> None:
    """Write the adapted model, from the newest checkpoint or from `step`."""
    run_dir, dtype = run.run_dir, run.settings.config.export.dtype
    chosen = run.ranks.on_main(lambda: exported_step(run.settings.config, step))
    checkpoint, trained = run_dir.checkpoints / checkpoint_tag(chosen), 0

    def inputs() -> dict[str, Any]:
        manifest = check_whole(checkpoint)
        check_same_expansion(manifest, Expansion.read(run_dir.expanded).fingerprint, checkpoint)
        return {"checkpoint": manifest.to_json(), "dtype": dtype}

    def write() -> int:
        keep_aside(run, run_dir.export, "export")
        with run.progress.on_main("exporting") as bar:
            return export_checkpoint(run_dir.expanded, checkpoint, run_dir.export, dtype, bar, overwrite=True)

    def make() -> None:
        nonlocal trained
        trained = run.ranks.on_main(write)

    if run.ledger.once(Stage("export", run_dir.export, inputs), make):
        run.terminal.stage("export", f"{trained} trained tensors of step {chosen} in {run_dir.export}")
    else:
        run.unchanged("export")
