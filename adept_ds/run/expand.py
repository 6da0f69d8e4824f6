"""Identity copies of the selected layers (expanded/).

An expanded model says itself what it was made of. So it is known again wherever a run is moved, and whatever became of
the ledger. One that checkpoints were trained from is never replaced; one that is lost is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.run_dir import checkpoint_steps
from adept_ds.models.tokenizer_files import tokenizer_fingerprint
from adept_ds.probing.places import PlaceBenefits
from adept_ds.probing.result import LayerImportance
from adept_ds.probing.selection import layers_without_probe
from adept_ds.run.context import Context
from adept_ds.run.prerequisites import check_expands, check_probed, check_ready
from adept_ds.run.replacing import keep_aside
from adept_ds.training.checkpoint import check_whole
from adept_ds.training.checkpoint_choice import choose
from adept_ds.weights.base_files import BaseFiles
from adept_ds.weights.expansion import Expansion, expand_checkpoint
from adept_ds.weights.fingerprints import config_digest

_LAYERS = "layers"

MADE_AGAIN = "`adept expand CONFIG` makes it again, and keeps this one aside"
"""What to do with an expanded model that is damaged."""


def expand_stage(run: Context) -> Expansion:
    """Insert the identity copies.

    Raises:
        InputError: the method makes none, or layers cannot be chosen yet.
    """
    check_expands(run.settings.config)
    selected, expanded = run.ranks.on_main(lambda: selected_layers(run)), run.run_dir.expanded

    def make() -> bool:
        damage = _damage(run)
        if damage is not None:
            run.terminal.stage("expand", escape(f"{damage.reason}: made again"))
        elif run.run_dir.expansion.is_file():
            different = _differences(run, selected)
            if not different:
                return False
            _refuse_if_trained(run, different)
        keep_aside(run, expanded, "expand")
        with run.progress.on_main("expanding") as bar:
            expand_checkpoint(run.settings.model.path, expanded, selected, bar, overwrite=True)
        return True

    made = run.ranks.on_main(make)
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

    def find() -> Expansion:
        check_ready(run.settings.config, "train")
        damage = _damage(run)
        if damage is not None:
            raise damage
        different = _differences(run, selected_layers(run))
        if different:
            _refuse_if_trained(run, different)
            raise InputError(
                f"'{run.run_dir.expanded}' was made from other {' and '.join(different)}; run `adept expand` first"
            )
        return Expansion.read(run.run_dir.expanded)

    return run.ranks.on_main(find)


def check_same_model(run: Context, selected: Sequence[int] | None = None) -> None:
    """On rank 0, before anything is done anew: a run that has trained goes on with the model that it began with.

    Args:
        selected: the layers that are copied, if that is known.

    Raises:
        InputError: it is another one, or they are others.
    """
    if run.run_dir.expansion.is_file() and checkpoint_steps(run.run_dir.checkpoints) and not _damage(run):
        different = _differences(run, selected)
        if different:
            _refuse_if_trained(run, different)


def _damage(run: Context) -> DamagedError | None:
    """What of the expanded model is not as it was written: then it says nothing, and is made again."""
    try:
        if run.run_dir.expansion.is_file():
            run.identity.check_as_written(run.run_dir.expanded, MADE_AGAIN)
    except DamagedError as error:
        return error
    return None


def _differences(run: Context, selected: Sequence[int] | None = None) -> list[str]:
    """In what the expanded model there is not the one that would be made; layers count where they are known."""
    wanted: dict[str, Any] = run.identity.model(run.settings.model)
    if selected is not None:
        wanted[_LAYERS] = sorted(selected)
    found = _made_of(run)
    return [what for what, value in wanted.items() if found[what] not in (value, None)]


def _made_of(run: Context) -> dict[str, Any]:
    """What the expanded model says of its base, as `Identity.model` would, and of its layers; old ones lack some."""
    expanded = run.run_dir.expanded
    expansion, base = Expansion.read(expanded), BaseFiles.read(expanded)
    return {
        "weights": expansion.base_fingerprint,
        "config.json": config_digest(base.config()),
        "tokenizer": tokenizer_fingerprint(expanded),
        _LAYERS: expansion.source_indices,
    }


def _refuse_if_trained(run: Context, different: Sequence[str]) -> None:
    """Raises `InputError`, with the way to go on, if checkpoints need the expanded model that is there."""
    checkpoints, expansion = run.run_dir.checkpoints, Expansion.read(run.run_dir.expanded)
    newest = choose(checkpoints, checkpoint_steps(checkpoints), check_whole).manifest
    if newest is None or newest.fingerprint != expansion.fingerprint:
        return
    if _LAYERS in different:
        layers = expansion.source_indices
        raise InputError(
            f"expand: '{checkpoints}' trains copies of layers {layers}, and other layers are chosen now; "
            f"set expand.layers to {layers} to go on with those, or start another run in a run_dir of its own"
        )
    raise InputError(
        f"model: '{checkpoints}' trains copies of another model than '{run.settings.model.path}' "
        f"({' and '.join(different)} differ); give the model that this run began with, or start another run in a "
        "run_dir of its own"
    )


def selected_layers(run: Context) -> list[int]:
    """On rank 0: by the configuration, or by what the probe has found. Raises `InputError` if that is not there."""
    config = run.settings.config
    if not config.needs_probe:
        return layers_without_probe(config.expand, run.settings.model.num_layers, config.probe.seed)
    check_probed(config)
    if config.weighs_places:
        return list(PlaceBenefits.load(run.run_dir.place_benefits).selected)
    return list(LayerImportance.load(run.run_dir.layer_importance).selected)
