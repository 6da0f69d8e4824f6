"""A branch of a run with `schedule: wsd`: it goes on from one of the run's checkpoints, and decays.

The branch is a run of its own, in a directory of its own. It begins with what the trunk has made up to that step:
tokens, probe, copies, log and checkpoint, under second names for the same files where the file system can do that. Only
the checkpoint's manifest is new, since it says how long the run is. From then on the branch is an ordinary run, and its
trunk may go on, be decayed elsewhere, or be removed.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.files import link_file, link_tree, new_directory, write_bytes, write_text
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.config.loading import dump_config
from adept_ds.config.schema import Config
from adept_ds.run.context import Context
from adept_ds.run.going_on import training_manifest, training_settings
from adept_ds.run.prerequisites import check_decays
from adept_ds.run.start import find_start
from adept_ds.training.checkpoint import check_same_training, verify
from adept_ds.training.checkpoint_choice import adopt_checkpoint


def begin_branch(run: Context, trunk: Config, step: int) -> None:
    """Let the run of `run`, whose configuration is `config.decaying.decayed(trunk, step)`, begin at that step.

    One that has checkpoints has begun. To be called on every rank.

    Raises:
        InputError: the trunk has no such checkpoint, or not a whole one, or it was not trained as `trunk` says.
    """
    source, target = RunDirectory(trunk.run_dir), run.run_dir
    if run.ranks.on_main(lambda: checkpoint_steps(target.checkpoints)):
        return
    run.ranks.on_main(lambda: _take_over_stages(trunk, step, source, target))
    found, checkpoint = find_start(run), source.checkpoints / checkpoint_tag(step)
    verify(checkpoint, run.ranks)

    def take_over_training() -> None:
        trained = training_settings(trunk, run.identity, run.settings.model, found.start.layers)
        expected = training_manifest(run, found.fingerprint, trained, step)
        check_same_training(source.checkpoints, expected)
        _copy_logs(source, target)
        write_text(target.config, dump_config(run.settings.config))
        settings = training_settings(run.settings.config, run.identity, run.settings.model, found.start.layers)
        adopt_checkpoint(
            checkpoint, target.checkpoints, training_manifest(run, found.fingerprint, settings, step)
        )  # last: with it the branch has begun

    run.ranks.on_main(take_over_training)
    run.terminal.stage("train", f"decays from step {step} of {source.root}")


def _take_over_stages(trunk: Config, step: int, source: RunDirectory, target: RunDirectory) -> None:
    """What comes before training. The ledger decides, by content, what of it is not to be made again."""
    check_decays(trunk, step)
    for folder in (source.expanded, *_token_folders(source)):
        _once(folder, target.root / folder.relative_to(source.root))
    for file in (
        source.layer_importance,
        source.layer_methods,
        *source.root.glob(source.layer_scores("*").name),
        source.layer_scores(),
        source.place_scores,
        source.place_benefits,
        source.anchor_text,
        source.base_evaluation,
        source.base_document_losses,
        source.base_task_scores,
    ):
        if file.is_file():
            link_file(file, target.root / file.name)
    for name in (source.ledger, source.digests):  # these are written again: by the trunk, by the branch
        _copy(name, target.root / name.relative_to(source.root))


def _copy_logs(source: RunDirectory, target: RunDirectory) -> None:
    """What the trunk wrote about itself; the later part is cut off when training goes on."""
    for name in (source.metrics, source.unit_importance, source.unit_movement, source.summary):
        _copy(name, target.root / name.name)
    for events in source.tensorboard.glob("*"):
        _copy(events, target.tensorboard / events.name)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        write_bytes(target, source.read_bytes())


def _token_folders(source: RunDirectory) -> list[Path]:
    """Without those that are still being filled."""
    folders = source.tokens.glob("*") if source.tokens.is_dir() else []
    return sorted(folder for folder in folders if folder.is_dir() and not folder.name.startswith("."))


def _once(source: Path, target: Path) -> None:
    """Whole or absent; one that is there stays."""
    if source.is_dir() and not target.exists():
        with new_directory(target) as fresh:
            link_tree(source, fresh)
