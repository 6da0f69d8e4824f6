"""Stage two: train what the method trains (checkpoints/, and what a run writes about itself)."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.markup import escape

from adept_ds.base.errors import DamagedError, InputError, NonFiniteLossError
from adept_ds.base.files import remove_abandoned, write_json
from adept_ds.base.progress import ProgressCallback, stage
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import GivenUp, MetricsLine, RunSummary, read_log
from adept_ds.base.version import __version__
from adept_ds.config.loading import dump_config
from adept_ds.config.schema import Config
from adept_ds.data.mixture import Mixture
from adept_ds.evaluation.held_out import DocumentLosses
from adept_ds.methods.shape import Preparation, Start, Training, method_of
from adept_ds.models.device import device_name, peak_memory_bytes
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import silent_factors
from adept_ds.models.flops import count_step_flops, measure_matmul_rate
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.models.loading import Trains
from adept_ds.ranks.unfinished import LongWork, Unfinished, Work
from adept_ds.run.anchor import anchor_text_stage, make_anchor
from adept_ds.run.context import Context
from adept_ds.run.going_on import first_step_of, training_manifest, training_settings
from adept_ds.run.guard import check_guard_texts, losses_of_base, make_guard
from adept_ds.run.non_finite import check_finite, naming_what_is_not_finite
from adept_ds.run.prerequisites import guard_stop
from adept_ds.run.start import find_start
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    change_of_shape,
)
from adept_ds.training.copy_dropout import CopyDropout
from adept_ds.training.movement import UnitMovement
from adept_ds.training.tracking import Tracking
from adept_ds.training.trainer import Trainer
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import GradientBatches
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.zero.build import StepShape, build_training_engine
from adept_ds.zero.engine import Engine, count_parameters, parameter_shapes, release


@stage("train")
def train_stage(run: Context) -> None:
    """Train, from the newest checkpoint if there is one."""
    config, run_dir = run.settings.config, run.run_dir
    found = find_start(run)
    _check_copy_dropout(config, found.start)
    settings = run.ranks.on_main(
        lambda: training_settings(config, run.identity, run.settings.model, found.start.layers)
    )
    manifest_at = partial(training_manifest, run, found.fingerprint, settings)
    run.ranks.on_main(lambda: remove_abandoned(run_dir.checkpoints))
    first_step = first_step_of(run, manifest_at)
    unfinished = run.keep("train", [found.fingerprint, settings])
    if first_step:
        unfinished.remove()  # what comes before the first step
    stop = run.ranks.on_main(lambda: guard_stop(config))
    if first_step == config.train.steps or stop:
        run.ranks.on_main(lambda: _complete_summary(run))
        run.ranks.on_main(lambda: _tell_the_rest(run))
        how = f"ended by the guard after step {stop.step}" if stop else "finished before"
        run.terminal.stage("train", f"[dim]{how}, not run again[/]")
        return
    run.ranks.on_main(lambda: run_dir.guard.unlink(missing_ok=True))  # by settings that hold no more
    if first_step:
        change = run.ranks.on_main(lambda: change_of_shape(run_dir.checkpoints, manifest_at(first_step)))
        run.terminal.stage("train", f"resuming after step {first_step}{change}")
    check_guard_texts(run)
    base = losses_of_base(run)
    begun = time.perf_counter()
    anchor_text_stage(run)
    together = partial(_together, run, unfinished)
    prepared = None if first_step else _prepare(run, found.start, together)
    _train(run, found.start, manifest_at, first_step, prepared, time.perf_counter() - begun, together, base)
    run.ranks.on_main(lambda: guard_stop(config))  # complains of an end with no good checkpoint
    unfinished.remove()


def _tell_the_rest(run: Context) -> None:
    def say(line: str) -> None:
        run.terminal.stage("train", escape(line))

    config = run.settings.config
    Tracking(config, run.run_dir, config.train.steps, say).tell_the_rest()


@contextmanager
def _together(run: Context, unfinished: Unfinished, doing: str) -> Iterator[tuple[ProgressCallback, Work]]:
    """See `LongWork`."""
    with run.progress.together(doing) as bar:
        yield bar, unfinished.work(doing)


def _check_copy_dropout(config: Config, start: Start) -> None:
    """With `k: auto` the number of copies is known now only."""
    if config.train.copy_dropout and len(start.layers) == 1:
        raise InputError(
            f"train.copy_dropout: {config.train.copy_dropout} has no effect with a single copy, since no step goes "
            "around all of them; set it to 0, or have more layers copied"
        )


def _prepare(run: Context, start: Start, together: LongWork) -> Any:
    """What the method computes before the engine that trains is there."""
    config = run.settings.config

    def make_engine(model: ModelDirectory, trains: Trains) -> Engine:
        recompute = config.train.activation_checkpointing
        return build_training_engine(
            run.engines, model, trains, seed=config.probe.seed, recompute_activations=recompute
        )

    preparation = Preparation(
        config,
        start,
        make_engine,
        partial(_general_text, run),
        partial(_domain_text, run),
        run.ranks,
        partial(run.terminal.stage, "train"),
        together,
    )
    with naming_what_is_not_finite(run, start.base):
        return method_of(config).prepare(preparation)


def _train(
    run: Context,
    start: Start,
    manifest_at: Callable[[int], CheckpointManifest],
    first_step: int,
    prepared: Any,
    preparation_seconds: float,
    together: LongWork,
    base: DocumentLosses | None,
) -> None:
    config, run_dir, ranks, method = run.settings.config, run.run_dir, run.ranks, method_of(run.settings.config)
    trains = method.trains(config, start)
    engine = _training_engine(run, start.model, trains)
    shapes = parameter_shapes(engine.module)
    registry = method.units(config, start, shapes, engine.module.config)
    unit_lr = UnitLR(engine, registry, config.lr_policy, ranks, _lr_ratios(config, start, shapes))
    trainable, total = count_parameters(engine.module)
    run.terminal.stage("train", f"{trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters, {len(registry)} units")
    training = Training(
        config,
        start,
        engine,
        unit_lr,
        ranks,
        prepared,
        partial(_general_text, run),
        partial(_domain_text, run),
        partial(_frozen_prefix, run, engine, lowest=trains.lowest_trainable_layer),
        together,
    )
    written_start = None if method.learns_new_parameters else start.model
    trainer = Trainer(
        config=config,
        run_dir=run_dir,
        ranks=ranks,
        engine=engine,
        unit_lr=unit_lr,
        data=run.corpora.training_data,
        rule=method.rule(training),
        movement=UnitMovement(engine, registry, written_start, run.precision, ranks),
        eval_sets=run.corpora.held_out,
        manifest_at=manifest_at,
        copy_dropout=_copy_dropout(engine, config, start),
        flops_without=functools.cache(
            partial(count_step_flops, engine.module, start.model.family, config.data.seq_len)
        ),
        matmul_rate=measure_matmul_rate(engine.device, run.precision),
        terminal=run.terminal,
        stop=run.progress.stop,
        anchor=make_anchor(run, engine, start),
        guard=make_guard(run, engine, base),
    )
    facts = {
        "method": method.name,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "learned_bytes": round(trainable * _bytes_per_element(start.model)),
        "units": len(registry),
        "world_size": ranks.world_size,
        "zero_stage": run.settings.zero_stage,
        "precision": str(run.precision).removeprefix("torch."),
        "adept_ds": __version__,
    }
    if method.makes_copies:
        facts |= {"writer_lr_ratio": config.train.writer_lr_ratio, "copy_dropout": config.train.copy_dropout}
    given_up = ranks.on_main(lambda: GivenUp.of(run_dir.given_up)).lr
    if given_up:
        facts |= {"given_up_lr": given_up}
    ranks.on_main(lambda: _begin_summary(run, facts, None if first_step else preparation_seconds))
    try:
        trainer.run(first_step, dump_config(config))
    except NonFiniteLossError:
        check_finite(run, start.model)
        ranks.on_main(lambda: _give_up(run, config.train.lr))
        raise
    peaks = ranks.gather(peak_memory_bytes())
    ranks.on_main(lambda: _complete_summary(run, peak_memory_bytes=peaks))
    release(engine)


def _lr_ratios(config: Config, start: Start, shapes: Mapping[str, Any]) -> dict[str, float]:
    """Of the copies' silent factors, where they have a rate of their own."""
    ratio = config.train.writer_lr_ratio
    return {} if ratio == 1 else dict.fromkeys(silent_factors(start.model.family, shapes, start.layers), ratio)


def _copy_dropout(engine: Engine, config: Config, start: Start) -> CopyDropout:
    train, layers = config.train, start.model.family.layer_modules(engine.module)
    copies = start.layers if config.method.makes_copies else ()
    return CopyDropout(engine, {copy: layers[copy] for copy in copies}, train.copy_dropout, train.seed)


def _bytes_per_element(model: ModelDirectory) -> float:
    """On disk, of the model that training starts from: what was learned will be kept in its precision."""
    tensors = stored_tensors(model.path).values()
    return sum(tensor.num_bytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)


def _training_engine(run: Context, model: ModelDirectory, trains: Trains) -> Engine:
    train, accumulation = run.settings.config.train, run.settings.accumulation_steps
    assert accumulation is not None
    # DeepSpeed wants the product of the others; with an anchor that is more than train.global_batch_size.
    sequences = train.micro_batch_size * accumulation * run.ranks.world_size

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return UnitAdamW(parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)

    return build_training_engine(
        run.engines,
        model,
        trains,
        optimizer,
        StepShape(sequences, train.micro_batch_size, accumulation, train.clip_grad_norm),
        seed=train.seed,
        recompute_activations=train.activation_checkpointing,
        compiled=_compiles(run),
    )


def _compiles(run: Context) -> bool:
    """What `train.compile` comes to here."""
    if run.settings.config.train.compile == "off" or device_name() != "cuda":
        return False
    if run.settings.zero_stage == 3:
        run.terminal.stage("train", "layers are not compiled: ZeRO-3 gathers weights within them")
        return False
    run.terminal.stage("train", "layers are compiled, in the first steps")
    return True


def _general_text(run: Context, sequences: int | None = None, batch_sequences: int | None = None) -> GradientBatches:
    return _sampled(run, run.corpora.for_importance, sequences, batch_sequences)


def _domain_text(run: Context, sequences: int | None = None, batch_sequences: int | None = None) -> GradientBatches:
    domain = run.corpora.domain
    assert isinstance(domain, Mixture)
    return _sampled(run, domain, sequences, batch_sequences)


def _sampled(run: Context, corpus: Mixture, sequences: int | None, batch_sequences: int | None) -> GradientBatches:
    config = run.settings.config
    return GradientBatches(
        corpus.blocks,
        corpus.sample(sequences or config.importance.sequences, config.probe.seed).indices,
        batch_sequences or config.importance.batch_sequences,
        config.train.micro_batch_size,
    )


def _frozen_prefix(
    run: Context, engine: Engine, batches: GradientBatches, sharing: int = 1, *, lowest: int
) -> FrozenPrefix:
    hidden_size: Any = engine.module.config.hidden_size  # type: ignore[union-attr]
    room = (run.settings.config.importance.prefix_cache_mib << 20) // sharing
    layers = run.settings.model.family.layer_modules(engine.module)
    return FrozenPrefix(layers, lowest, batches.batches_within(room, hidden_size * run.precision.itemsize))


def _give_up(run: Context, lr: float) -> None:
    known = GivenUp.of(run.run_dir.given_up)
    GivenUp(lr=(*known.lr, lr)).save(run.run_dir.given_up)
    _complete_summary(run)


def _begin_summary(run: Context, facts: dict[str, Any], preparation_seconds: float | None) -> None:
    """At the start of training, or where it goes on: what was prepared is known from the start alone."""
    if preparation_seconds is None:
        preparation_seconds = _known_summary(run).preparation_seconds
    write_json(run.run_dir.summary, facts | {"preparation_seconds": preparation_seconds or 0.0})


def _known_summary(run: Context) -> RunSummary:
    """What was written so far; of one that is damaged as much as the logs say is written again."""
    file = run.run_dir.summary
    if not file.is_file():
        return RunSummary()
    try:
        return RunSummary.load(file)
    except DamagedError as error:
        run.terminal.stage("train", escape(f"{error.reason}: made again from the logs"))
        return RunSummary()


def _complete_summary(run: Context, **facts: Any) -> None:
    """Add what is known only at the end to what was written at the start of training."""
    run_dir, known = run.run_dir, _known_summary(run)
    totals = _totals(run_dir, known.preparation_seconds or 0.0)
    write_json(run_dir.summary, known.model_dump(mode="json", exclude_unset=True) | facts | totals)


def _totals(run_dir: RunDirectory, preparation_seconds: float) -> dict[str, Any]:
    """Sums over the whole run, interruptions included, from what it wrote about itself."""
    lines = [line for _, line in read_log(run_dir.metrics, MetricsLine)]
    steps = [line for line in lines if line.is_step]
    if not steps:  # the log is gone
        return {}
    refreshed = [line for line in lines if line.refresh_seconds is not None]
    refreshes = [line.refresh_seconds or 0.0 for line in refreshed if line.step]
    return {
        "steps": len(steps),
        "tokens": steps[-1].tokens,
        "seconds": sum(line.seconds for line in steps),
        "step_seconds": statistics.median(line.seconds for line in steps),
        "tokens_per_second": statistics.median(line.tokens_per_second for line in steps),
        "mfu": statistics.median(line.mfu for line in steps),
        **_anchor_totals(steps),
        # What the method costs beside its steps.
        "overhead_seconds": preparation_seconds + sum(line.refresh_seconds or 0.0 for line in refreshed),
        **_guard_totals(lines),
        "skipped_steps": sum(line.skipped is not None for line in steps),
        "refreshes": len(refreshes),
        "refresh_seconds": statistics.median(refreshes) if refreshes else None,
    }


def _guard_totals(lines: Sequence[MetricsLine]) -> dict[str, Any]:
    """How often the guard has found something forgotten; nothing without one."""
    found = [line.guard.forgotten for line in lines if line.guard is not None]
    return {"guard_alarms": sum(found)} if found else {}


def _anchor_totals(steps: Sequence[MetricsLine]) -> dict[str, Any]:
    """What the anchor took of them; nothing without one."""
    if steps[-1].anchor is None:
        return {}
    return {
        "anchor_tokens": sum(line.anchor_tokens for line in steps),
        "anchor_seconds": sum(line.anchor_seconds for line in steps),
    }
