"""Going on with training that was begun: from which checkpoint, and whether it is the same training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.markup import escape

from adept_ds.base.errors import DamagedError
from adept_ds.base.run_dir import checkpoint_steps
from adept_ds.base.run_records import GivenUp
from adept_ds.base.version import __version__
from adept_ds.config.method import EVERY_KEY
from adept_ds.config.schema import Config
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.expand import check_same_model, selected_layers
from adept_ds.run.identity import Identity, reading_settings
from adept_ds.run.ledger import plain
from adept_ds.run.prerequisites import trained_model
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    check_same_training,
    check_whole,
    verify,
)
from adept_ds.training.checkpoint_choice import choose, set_aside
from adept_ds.training.run_log import check_logs

_NOT_PART_OF_TRAINING = {
    "micro_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "activation_checkpointing",
    "keep_gathered_gib",
    "kernels",
    "compile",
    "max_skipped",
}
"""Keys of the train section that change how a run is done, but not what comes out."""


_NOT_PART_OF_ANCHOR = {"cache_mib", "corpus"}
"""Of the anchor section; what is in its corpus is."""


def check_can_go_on(run: Context) -> None:
    """Before anything is done anew: training that was begun can go on with this model, these texts and settings.

    Raises:
        InputError: naming what it began with, and how to go on.
    """

    def check() -> None:
        checkpoints = run.run_dir.checkpoints
        newest = choose(checkpoints, checkpoint_steps(checkpoints), check_whole).manifest
        if newest is None:
            return
        check_logs(run.run_dir)
        config, fingerprint, layers = run.settings.config, newest.fingerprint, None
        known = None if config.needs_probe or not config.method.chooses_layers else selected_layers(run)
        if method_of(config).makes_copies:
            check_same_model(run, known)  # the expansion's fingerprint: when it is there
        else:
            fingerprint, layers = run.identity.weights(run.settings.model), known
        settings = training_settings(config, run.identity, run.settings.model, layers)
        _check_fits(run, newest, training_manifest(run, fingerprint, settings, newest.step))

    run.ranks.on_main(check)


def training_manifest(run: Context, fingerprint: str, settings: dict[str, Any], step: int) -> CheckpointManifest:
    """Of a checkpoint that this run writes, or goes on from."""
    return CheckpointManifest(
        step=step,
        world_size=run.ranks.world_size,
        zero_stage=run.settings.zero_stage,
        offload=run.settings.offload,
        precision=str(run.precision).removeprefix("torch."),
        adept_ds=__version__,
        fingerprint=fingerprint,
        settings=settings | {"train.precision": run.precision_name},  # "auto" is not the same on every device
    )


def first_step_of(run: Context, manifest_at: Callable[[int], CheckpointManifest]) -> int:
    """After how many steps training goes on: those of the newest checkpoint that is whole. On every rank.

    What is going to be loaded, or exported, is read beforehand, to the last bit.

    Raises:
        InputError: it cannot go on like this, or no checkpoint is whole.
    """
    checkpoints = run.run_dir.checkpoints
    steps = run.ranks.on_main(lambda: checkpoint_steps(checkpoints))
    choice = run.ranks.on_main(lambda: choose(checkpoints, steps, check_whole))
    if choice.step < run.settings.config.train.steps or not run.ranks.on_main(lambda: _is_exported(run)):
        choice = choose(checkpoints, steps, partial(verify, ranks=run.ranks))

    def settle() -> int:
        if choice.manifest is not None:
            check_logs(run.run_dir)
            _check_fits(run, choice.manifest, manifest_at(choice.step))
        set_aside(checkpoints, choice, lambda line: run.terminal.stage("train", escape(line)))
        return choice.step

    return run.ranks.on_main(settle)


def _is_exported(run: Context) -> bool:
    """Whether the adapted model is there, as it was written, where this configuration wants it."""
    config = run.settings.config
    model = trained_model(config)
    if config.dial is None and model != run.run_dir.export:  # turned by hand: it is made of the checkpoint again
        return False
    try:
        run.identity.check_as_written(model)
    except DamagedError:
        return False
    return (model / "config.json").is_file()


def _check_fits(run: Context, found: CheckpointManifest, expected: CheckpointManifest) -> None:
    """Where training broke down with its rate, it may go on with a lower one.

    Raises:
        InputError: the checkpoint is of another training.
    """
    before, now = found.settings.get("train.lr"), expected.settings["train.lr"]
    if GivenUp.of(run.run_dir.given_up).may_lower(before, now):
        expected = expected.model_copy(update={"settings": expected.settings | {"train.lr": before}})
    check_same_training(run.run_dir.checkpoints, expected)


def training_settings(
    config: Config, identity: Identity, base: ModelDirectory, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Everything that determines the course of training, by dotted key: a resumed run must have the same.

    Args:
        base: of which nothing but its weights would be known where training begins with it; copies have their own.
        layers: that are trained in place; of copies the model says itself where they are. None: not known yet.
    """
    data, importance, method = config.data, config.importance, method_of(config)
    sections = {
        "method": method.model_dump(mode="json", context=EVERY_KEY),
        # A dump leaves out what is not set, and what is left out could be set on the way.
        "train": {"spike_sigma": None} | config.train.model_dump(mode="json", exclude=_NOT_PART_OF_TRAINING),
        "data": reading_settings(data),
    }
    if "importance" in method.sections:
        sections["importance"] = importance.model_dump(mode="json", exclude={"prefix_cache_mib"})
    if "lr_policy" in method.sections:
        sections["lr_policy"] = config.lr_policy.model_dump(mode="json")
    anchor = config.anchor
    sections["anchor"] = anchor.model_dump(mode="json", exclude=_NOT_PART_OF_ANCHOR) if anchor else {"kind": None}
    guard = config.guard if config.guard and config.guard.action == "slow" else None
    sections["guard"] = guard.model_dump(mode="json") if guard else {"action": None}
    settings = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    settings["data.seq_len"] = data.seq_len
    settings["data.domain"] = identity.corpus("data.domain", data.domain)
    settings["data.replay"] = identity.corpus("data.replay", data.replay)
    settings["data.replay_share"] = data.replay_share if data.replay else None
    if anchor:
        settings["anchor.corpus"] = identity.corpus("anchor.corpus", anchor.corpus)
    if guard:
        settings["guard.every"] = config.train.eval_every
        settings["data.general_eval"] = identity.corpus("data.general_eval", data.general_eval)
        settings["data.eval_sequences"] = data.eval_sequences
    if config.reads_general_text:
        settings["probe.corpus"] = identity.corpus("probe.corpus", config.probe.corpus)
        settings["probe.seq_len"] = config.probe.seq_len
    if anchor or config.reads_general_text or (config.refreshes and importance.initial == "source"):
        settings["probe.seed"] = config.probe.seed
    if method.starts_from == "base":
        settings["model"] = identity.besides_weights(base)
    if layers is not None and method.starts_from == "base" and method.chooses_layers:
        settings["expand.layers"] = list(layers)
    return dict(plain(settings))
