"""Stage two: train the copies (checkpoints/, and what a run writes about itself)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.base.files import remove_abandoned, write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.base.run_records import MetricsLine, RunSummary, read_log
from adept_ds.base.version import __version__
from adept_ds.config.loading import dump_config
from adept_ds.config.schema import Config
from adept_ds.models.device import peak_memory_bytes
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.flops import count_step_flops, measure_matmul_rate
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.run.context import Context
from adept_ds.run.expand import check_same_model, current_expansion, selected_layers
from adept_ds.run.identity import Identity, reading_settings
from adept_ds.run.ledger import plain
from adept_ds.run.non_finite import check_finite, naming_what_is_not_finite
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    check_same_ranks,
    check_same_training,
    check_whole,
    newest_manifest,
)
from adept_ds.training.movement import UnitMovement
from adept_ds.training.trainer import Trainer
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.importance import OnlineImportance, estimate_importance
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import GradientBatches
from adept_ds.weights.expansion import Expansion
from adept_ds.zero.build import StepShape, build_training_engine
from adept_ds.zero.engine import Engine, count_parameters, parameter_shapes, release

_NOT_PART_OF_TRAINING = {
    "micro_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "activation_checkpointing",
    "keep_gathered_gib",
}
"""Keys of the train section that change how a run is done, but not what comes out."""


def train_stage(run: Context) -> None:
    """Train the copies, from the newest checkpoint if there is one."""
    config, run_dir = run.settings.config, run.run_dir
    expansion = current_expansion(run)
    settings = run.ranks.on_main(lambda: training_settings(config, run.identity))
    manifest_at = partial(_manifest, run, expansion.fingerprint, settings)
    run.ranks.on_main(lambda: remove_abandoned(run_dir.checkpoints))
    first_step = run.ranks.on_main(lambda: _first_step(run, manifest_at))
    if first_step == config.train.steps:
        run.ranks.on_main(lambda: _complete_summary(run_dir))
        run.terminal.stage("train", "[dim]finished before, not run again[/]")
        return
    if first_step:
        run.terminal.stage("train", f"resuming after step {first_step}")
    importance = _initial_importance(run, expansion) if first_step == 0 else None
    _train(run, expansion, manifest_at, first_step, importance)


def check_can_go_on(run: Context) -> None:
    """Before anything is done anew: training that was begun can go on with this model, these texts and settings.

    Raises:
        InputError: naming what it began with, and how to go on.
    """

    def check() -> None:
        newest = newest_manifest(run.run_dir.checkpoints)
        if newest is not None:
            check_same_model(run, None if run.settings.config.expand.needs_probe else selected_layers(run))
            settings = training_settings(run.settings.config, run.identity)
            _first_step(
                run, partial(_manifest, run, newest.fingerprint, settings)
            )  # of the expansion: when it is there

    run.ranks.on_main(check)


def _manifest(run: Context, fingerprint: str, settings: dict[str, Any], step: int) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        world_size=run.ranks.world_size,
        zero_stage=run.settings.zero_stage,
        fingerprint=fingerprint,
        settings=settings,
    )


def _first_step(run: Context, manifest_at: Callable[[int], CheckpointManifest]) -> int:
    """After how many steps training goes on. Raises `InputError` if it cannot go on like this."""
    checkpoints = run.run_dir.checkpoints
    newest = max(checkpoint_steps(checkpoints), default=0)
    if newest:
        check_same_training(checkpoints, manifest_at(newest))
        if newest < run.settings.config.train.steps:
            check_same_ranks(checkpoints, manifest_at(newest))
            check_whole(checkpoints / checkpoint_tag(newest))
    return newest


def training_settings(config: Config, identity: Identity) -> dict[str, Any]:
    """Everything that determines the course of training, by dotted key: a resumed run must have the same."""
    data, importance = config.data, config.importance
    sections = {
        "train": config.train.model_dump(mode="json", exclude=_NOT_PART_OF_TRAINING),
        "importance": importance.model_dump(mode="json", exclude={"prefix_cache_mib"}),
        "lr_policy": config.lr_policy.model_dump(mode="json"),
        "data": reading_settings(data),
    }
    settings = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    settings["data.seq_len"] = data.seq_len
    settings["data.domain"] = identity.corpus("data.domain", data.domain)
    settings["data.replay"] = identity.corpus("data.replay", data.replay)
    settings["data.replay_share"] = data.replay_share if data.replay else None
    if config.lr_policy.map != "constant" and importance.source == "corpus":
        settings["probe.corpus"] = identity.corpus("probe.corpus", config.probe.corpus)
        settings["probe.seq_len"] = config.probe.seq_len
        settings["probe.seed"] = config.probe.seed
    return dict(plain(settings))


def _initial_importance(run: Context, expansion: Expansion) -> list[float] | None:
    """Importance of each copy's *source* layer: in a fresh copy the silent factors hide everything behind them.

    The source model computes the same function as the expanded one, so the same estimate runs on it, with the
    source layers unfrozen and nothing trained.
    """
    config, model = run.settings.config, run.settings.model
    if config.lr_policy.map == "constant" or config.importance.initial == "ones":
        return None
    run.terminal.stage("train", "importance of the source layers' units")
    engine = build_training_engine(
        run.engines,
        model,
        expansion.source_indices,
        seed=config.probe.seed,
        recompute_activations=config.train.activation_checkpointing,
    )
    registry = _registry(config, engine, model, expansion.source_indices)
    with naming_what_is_not_finite(run, model), run.progress.together("estimating importance") as bar:
        importance = estimate_importance(engine, registry, _gradient_batches(run), run.ranks, bar)
        if not all(map(math.isfinite, importance)):
            raise NonFiniteLossError("importance: a gradient of the source layers is NaN or infinite")
    release(engine)
    return importance


def _train(
    run: Context,
    expansion: Expansion,
    manifest_at: Callable[[int], CheckpointManifest],
    first_step: int,
    importance: list[float] | None,
) -> None:
    config, run_dir, ranks = run.settings.config, run.run_dir, run.ranks
    expanded = ranks.on_main(lambda: ModelDirectory.read(run_dir.expanded))
    engine = _training_engine(run, expanded, expansion)
    registry = _registry(config, engine, expanded, expansion.copy_indices)
    trainable, total = count_parameters(engine.module)
    run.terminal.stage("train", f"{trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters, {len(registry)} units")
    refreshed, online = config.lr_policy.map != "constant", config.importance.source == "online"
    batches = _gradient_batches(run) if refreshed and not online else None
    trainer = Trainer(
        config=config,
        run_dir=run_dir,
        ranks=ranks,
        engine=engine,
        unit_lr=UnitLR(engine, registry, config.lr_policy, ranks),
        data=run.corpora.training_data,
        gradient_batches=batches,
        prefix=_frozen_prefix(run, engine, batches, min(expansion.copy_indices)) if batches else None,
        online=OnlineImportance(engine, registry, ranks) if refreshed and online else None,
        movement=UnitMovement(engine, registry, expanded, run.precision, ranks),
        eval_sets=run.corpora.held_out,
        manifest_at=manifest_at,
        flops=count_step_flops(engine.module, expanded.family, config.data.seq_len),
        matmul_rate=measure_matmul_rate(engine.device, run.precision),
        terminal=run.terminal,
        stop=run.progress.stop,
    )
    facts = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "units": len(registry),
        "world_size": ranks.world_size,
        "zero_stage": run.settings.zero_stage,
        "precision": str(run.precision).removeprefix("torch."),
        "adept_ds": __version__,
    }
    ranks.on_main(lambda: write_json(run_dir.summary, facts))
    try:
        trainer.run(first_step, importance, dump_config(config))
    except NonFiniteLossError:
        check_finite(run, expanded)
        raise
    peaks = ranks.gather(peak_memory_bytes())
    ranks.on_main(lambda: _complete_summary(run_dir, peak_memory_bytes=peaks))
    release(engine)


def _training_engine(run: Context, expanded: ModelDirectory, expansion: Expansion) -> Engine:
    train, accumulation = run.settings.config.train, run.settings.accumulation_steps
    assert accumulation is not None

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return UnitAdamW(parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)

    return build_training_engine(
        run.engines,
        expanded,
        expansion.copy_indices,
        optimizer,
        StepShape(train.global_batch_size, train.micro_batch_size, accumulation, train.clip_grad_norm),
        seed=train.seed,
        recompute_activations=train.activation_checkpointing,
    )


def _registry(config: Config, engine: Engine, model: ModelDirectory, layers: list[int]) -> UnitRegistry:
    shapes = parameter_shapes(engine.module)
    return build_registry(model.family, shapes, layers, config.importance.granularity, engine.module.config)


def _gradient_batches(run: Context) -> GradientBatches:
    section, corpus = run.settings.config.importance, run.corpora.for_importance
    return GradientBatches(
        corpus.blocks,
        corpus.sample(section.sequences, run.settings.config.probe.seed).indices,
        section.batch_sequences,
        run.settings.config.train.micro_batch_size,
    )


def _frozen_prefix(run: Context, engine: Engine, batches: GradientBatches, lowest: int) -> FrozenPrefix:
    hidden_size: Any = engine.module.config.hidden_size  # type: ignore[union-attr]
    room = run.settings.config.importance.prefix_cache_mib << 20
    layers = run.settings.model.family.layer_modules(engine.module)
    return FrozenPrefix(layers, lowest, batches.batches_within(room, hidden_size * run.precision.itemsize))


def _complete_summary(run_dir: RunDirectory, **facts: Any) -> None:
    """Add what is known only at the end to what was written at the start of training."""
    known = RunSummary.load(run_dir.summary) if run_dir.summary.is_file() else RunSummary()
    write_json(run_dir.summary, known.model_dump(mode="json", exclude_unset=True) | facts | _totals(run_dir))


def _totals(run_dir: RunDirectory) -> dict[str, Any]:
    """Sums over the whole run, interruptions included, from what it wrote about itself."""
    lines = [line for _, line in read_log(run_dir.metrics, MetricsLine)]
    steps = [line for line in lines if line.is_step]
    if not steps:  # the log is gone
        return {}
    refreshes = [line.refresh_seconds for line in lines if line.refresh_seconds]
    return {
        "steps": len(steps),
        "tokens": steps[-1].tokens,
        "seconds": sum(line.seconds for line in steps),
        "step_seconds": statistics.median(line.seconds for line in steps),
        "tokens_per_second": statistics.median(line.tokens_per_second for line in steps),
        "mfu": statistics.median(line.mfu for line in steps),
        "refreshes": len(refreshes),
        "refresh_seconds": statistics.median(refreshes) if refreshes else None,
    }
