"""Identity copies of the selected layers (expanded/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import checkpoint_steps
from adept_ds.probing.result import LayerImportance
from adept_ds.probing.selection import layers_without_probe
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage, stamp_model
from adept_ds.weights.expansion import Expansion, expand_checkpoint


def expand_stage(run: Context) -> Expansion:
    """Insert the identity copies."""
    selected = run.ranks.on_main(lambda: _selected_layers(run))
    expanded = run.run_dir.expanded

    def write() -> None:
        if checkpoint_steps(run.run_dir.checkpoints):
            raise InputError(f"'{run.run_dir.checkpoints}' was trained from another expansion; choose another run_dir")
        with run.progress.on_main("expanding") as bar:
            expand_checkpoint(run.settings.model.path, expanded, selected, bar)

    made = run.ledger.once(_stage(run, selected), lambda: run.ranks.on_main(write))
    expansion = run.ranks.on_main(lambda: Expansion.read(expanded))
    if made:
        run.terminal.stage("expand", f"{expansion.source_layers} + {len(expansion.copies)} layers in {expanded}")
    else:
        run.unchanged("expand")
    return expansion


def current_expansion(run: Context) -> Expansion:
    """The expanded model of this run.

    Raises:
        InputError: there is none, or it was made from other inputs.
    """
    expansion = run.ranks.on_main(lambda: Expansion.read(run.run_dir.expanded))
    selected = run.ranks.on_main(lambda: _selected_layers(run))
    if not run.ledger.is_current(_stage(run, selected)):
        raise InputError(
            f"'{run.run_dir.expanded}' was made from another model or other layers; run `adept expand` first"
        )
    return expansion


def _stage(run: Context, selected: Sequence[int]) -> Stage:
    def inputs() -> dict[str, Any]:
        return {"model": stamp_model(run.settings.model), "layers": sorted(selected)}

    return Stage("expand", run.run_dir.expanded, inputs)


def _selected_layers(run: Context) -> list[int]:
    config, path = run.settings.config, run.run_dir.layer_importance
    if not config.expand.needs_probe:
        return layers_without_probe(config.expand, run.settings.model.num_layers, config.train.seed)
    if not path.is_file():
        raise InputError(f"expand: '{path}' does not exist; run `adept probe CONFIG` first, or set expand.layers")
    return list(LayerImportance.load(path).selected)
