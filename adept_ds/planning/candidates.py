"""Ways to take a step on a cluster: what each holds, sends and takes; and which one is best. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adept_ds.planning.cluster import Cluster, Collective
from adept_ds.planning.memory import Held, Step, held
from adept_ds.planning.traffic import after_micro_batches, within_micro_batches
from adept_ds.planning.zero_settings import ZeroSettings

if TYPE_CHECKING:
    from adept_ds.planning.outline import Outline

_LOGITS_SHARE = 32
"""Of an accelerator's memory, that a chunk of logits is given a part of (see `models.head_chunks`)."""
_ALIKE = 1.05
"""Step times that differ by less are the same to a plan: then less is recomputed, the stage is lower, and the
micro-batch larger."""
_SIZES_TRIED = 4
"""Of micro-batches, the largest that fit, for each stage."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a step."""

    compute: float
    """Operations at the assumed share of the peak."""
    communication: float
    """All collectives."""
    total: float
    """With what overlaps counted once."""


@dataclass(frozen=True)
class Candidate:
    """One way to take a step."""

    stage: int
    """As it stands in DeepSpeed's file."""
    zero: ZeroSettings
    step: Step
    found: Held
    collectives: tuple[Collective, ...]
    timing: Timing | None
    """None: the cluster's rates are not known."""

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a step."""
        return sum(collective.sent(self.step.ranks) for collective in self.collectives)

    def fits(self, cluster: Cluster) -> bool:
        return self.found.memory.peak <= cluster.usable


@dataclass(frozen=True)
class Task:
    """What is trained, and with how much of it in a step."""

    outline: Outline
    global_batch_size: int
    keep_gathered: float | None
    """Bytes of frozen weights that may stay whole at stage 3; None: as many as half of the free memory holds."""
    precision: str
    """'bf16', 'fp16' or 'fp32'."""
    settings: Mapping[int, ZeroSettings]
    """By stage."""
    run_takes: Callable[[int, int, int, int], bool] = lambda *_: True
    """Whether a run does, by its own checks: stage, sequences of a micro-batch and of a step, GPUs."""


def candidate(task: Task, cluster: Cluster, stage: int, rows: int, recompute: bool) -> Candidate:
    """One with micro-batches of `rows` sequences."""
    zero, outline = as_run(task.settings[stage], task.precision), task.outline
    step = Step(cluster.gpus, rows, task.global_batch_size // (rows * cluster.gpus), recompute)
    logits_at_once = cluster.memory / _LOGITS_SHARE / outline.planned_logit_bytes
    found = held(outline, zero, step, logits_at_once, task.keep_gathered, cluster.usable)
    within = within_micro_batches(outline, zero, step, found)
    after = after_micro_batches(outline, zero, step, found)
    timing = _timing(outline, zero, step, cluster, within, after) if cluster.is_timed else None
    return Candidate(stage, zero, step, found, (*within, *after), timing)


def as_run(zero: ZeroSettings, precision: str) -> ZeroSettings:
    """Stage 1 in bf16 is run as stage 2 (see `zero.build`)."""
    return replace(zero, stage=2) if precision == "bf16" and zero.stage == 1 else zero


def best_by_stage(task: Task, cluster: Cluster) -> dict[int, Candidate]:
    """For each stage the best that fits; where none does, that which needs least."""
    found = {}
    for stage in sorted(task.settings):
        fitting = list(_fitting(task, cluster, stage))
        smallest = smallest_micro_batch(task, cluster, stage) or 1
        found[stage] = best(fitting) or candidate(task, cluster, stage, smallest, recompute=True)
    return found


def smallest_micro_batch(task: Task, cluster: Cluster, stage: int) -> int | None:
    """Its sequences; None: a run takes none."""
    return min(_micro_batches(task, cluster, stage), default=None)


def recommended(task: Task, cluster: Cluster, by_stage: Mapping[int, Candidate]) -> Candidate | None:
    """None: nothing fits."""
    stages = [stage for stage in by_stage if as_run(task.settings[stage], task.precision).stage == stage]
    return best([by_stage[stage] for stage in stages if by_stage[stage].fits(cluster)])


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The fastest; where rates are not known, that which computes nothing twice and sends least."""
    if not candidates:
        return None
    times = [each.timing.total for each in candidates if each.timing]
    if len(times) < len(candidates):
        return min(candidates, key=lambda each: (each.step.recompute, each.sent, each.stage, -each.step.rows))
    alike = [each for each in candidates if each.timing and each.timing.total <= _ALIKE * min(times)]
    return min(alike, key=lambda each: (each.step.recompute, each.stage, -each.step.rows))


def _fitting(task: Task, cluster: Cluster, stage: int) -> Iterator[Candidate]:
    """Without and with checkpointing, the largest micro-batches that fit."""
    sizes = _micro_batches(task, cluster, stage)
    for recompute in (False, True):
        seen = 0
        for rows in sizes:
            tried = candidate(task, cluster, stage, rows, recompute)
            if tried.fits(cluster):
                yield tried
                seen += 1
            if seen == _SIZES_TRIED:
                break


def _micro_batches(task: Task, cluster: Cluster, stage: int) -> list[int]:
    """The largest first."""
    share = task.global_batch_size // cluster.gpus
    sizes = (rows for rows in range(share, 0, -1) if share % rows == 0)
    return [rows for rows in sizes if task.run_takes(stage, rows, task.global_batch_size, cluster.gpus)]


def _timing(
    outline: Outline,
    zero: ZeroSettings,
    step: Step,
    cluster: Cluster,
    within: Sequence[Collective],
    after: Sequence[Collective],
) -> Timing:
    assert cluster.flops is not None
    operations = outline.flops.total + (outline.recomputed_flops if step.recompute else 0.0)
    tokens = step.micro_batches * step.rows * outline.seq_len
    compute = operations * tokens / (cluster.flops * cluster.efficiency)
    beside = sum(cluster.seconds(collective) for collective in within)
    alone = sum(cluster.seconds(collective) for collective in after)
    passes = max(compute, beside) if zero.overlap_comm else compute + beside
    return Timing(compute, beside + alone, passes + alone)
