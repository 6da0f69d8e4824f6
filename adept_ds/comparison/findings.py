"""What the trials of a study show: measured, chosen, compared, and put into records."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from adept_ds.base.errors import InputError
from adept_ds.comparison.arms import CRITERIA, PLAIN, Arm, Criterion, Point, arms_of, search_warnings
from adept_ds.comparison.between import misses
from adept_ds.comparison.fronts import front, front_hypervolume, on_test
from adept_ds.comparison.measurements import Measurements, read_measurements
from adept_ds.comparison.record import (
    ArmRecord,
    ByCorpus,
    ChosenPoint,
    Comparison,
    Interpolation,
    PointRecord,
    SourceRecord,
    StudyDescription,
    TrialRecord,
)
from adept_ds.comparison.trials import BASE, Cell, Source, Trial
from adept_ds.comparison.verdicts import Choices, Difference, TestLosses, difference, excess_on_test

DEFAULT_REFERENCE = "full"
"""The arm that others are compared with in tables and sentences, if there is one of this name; else the first."""


class Findings(NamedTuple):
    """What the page and its figures are made of."""

    comparison: Comparison
    arms: list[Arm]
    """With the curves of training, which compare.json leaves in the runs."""


def compare(study_dir: Path, description: StudyDescription, trials: Sequence[Trial]) -> Findings:
    """Read the trials of a study and compare them.

    Raises:
        InputError: trials cannot be compared (see `read_measurements`), or the reference is none of the arms.
    """
    measured = read_measurements(trials)
    arms = arms_of(measured)
    reference = _reference(description.reference, [arm.name for arm in arms])
    choices = {arm.name: {criterion: arm.choose(criterion) for criterion in CRITERIA} for arm in arms}
    chosen = [(arm, point) for arm in arms for point in choices[arm.name].values() if point is not None]
    losses = TestLosses(measured, chosen)
    comparison = Comparison(
        description=description,
        reference=reference,
        interpolation=_interpolation(measured),
        sources=[_source_record(measured, source) for source in measured.documents],
        base_scores=measured.base_scores,
        arms=[_arm_record(arm, choices[arm.name], losses) for arm in arms],
        differences=_differences(arms, choices, losses),
        warnings=[sentence for arm in arms for sentence in search_warnings(arm, choices[arm.name])],
        trials=[_trial_record(measured, cell, study_dir) for cell in measured.cells],
    )
    return Findings(comparison, arms)


def _reference(asked: str | None, names: list[str]) -> str:
    if asked is not None and asked not in names:
        raise InputError(f"reference: '{asked}' is none of the methods compared; choose one of {', '.join(names)}")
    return asked or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in names else names[0])


def _differences(arms: list[Arm], choices: Mapping[str, Choices], losses: TestLosses) -> list[Difference]:
    found = []
    for criterion in CRITERIA:
        reached = [(arm, point) for arm in arms if (point := choices[arm.name][criterion]) is not None]
        found += [difference(losses, criterion, *pair) for pair in itertools.combinations(reached, 2)]
    return [pair for pair in found if pair is not None]


def _arm_record(arm: Arm, choices: Choices, losses: TestLosses) -> ArmRecord:
    on_front = set(front(arm))
    return ArmRecord(
        name=arm.name,
        label=arm.label,
        setting=arm.setting,
        learning_rates=arm.rates,
        seeds=arm.seeds,
        search_seeds=arm.search_seeds,
        chosen={
            criterion.name: point and _chosen(arm, criterion, point, losses) for criterion, point in choices.items()
        },
        points=[_point_record(arm, point, on_front=point in on_front) for point in arm.points],
        hypervolume=front_hypervolume(arm),
    )


def _chosen(arm: Arm, criterion: Criterion, point: Point, losses: TestLosses) -> ChosenPoint:
    measured, seeds = arm.measured, arm.seeds_at(point)
    domain = measured.sources("domain", "test")
    by_seed = losses.by_seed(arm, point, seeds)
    validation_domain, validation_rise = arm.search_scores(point)
    largest, largest_of = arm.largest_rise(point, "test")
    low, high = losses.interval_of_mean(arm, point)
    change_low, change_high = losses.interval_of_change(arm, point)
    excess = excess_on_test(arm, point, criterion)
    return ChosenPoint(
        criterion=criterion.name,
        bound=criterion.bound,
        lr=point.lr,
        alpha=point.alpha,
        seeds=seeds,
        validation_domain_loss=validation_domain,
        validation_general_rise=validation_rise,
        domain_loss=fmean(by_seed),
        low=low,
        high=high,
        by_seed=by_seed,
        change=fmean(by_seed) - measured.loss(measured.base, domain),
        change_low=change_low,
        change_high=change_high,
        general_rise={source.name: arm.rise(point, source) for source in measured.sources("general", "test")},
        largest_rise=largest,
        largest_rise_of=largest_of.name,
        holds_on_test=None if criterion == PLAIN else excess is None,
        excess=excess[0] if excess else 0.0,
    )


def _point_record(arm: Arm, point: Point, *, on_front: bool) -> PointRecord:
    losses: ByCorpus = {"general": {}, "domain": {}}
    for source in arm.measured.documents:
        losses[source.corpus][source.key] = arm.loss(point, [source])
    domain, rise = on_test(arm, point)
    return PointRecord(
        lr=point.lr,
        alpha=point.alpha,
        evaluated=arm.is_evaluated(point),
        seeds=arm.seeds_at(point),
        losses=losses,
        test_domain_loss=domain,
        test_general_rise=rise,
        on_front=on_front,
    )


def _interpolation(measured: Measurements) -> Interpolation | None:
    missed = [miss for cell in measured.cells for miss in misses(cell.evaluated, measured.tokens)]
    return Interpolation(mean=fmean(missed), largest=max(missed)) if missed else None


def _source_record(measured: Measurements, source: Source) -> SourceRecord:
    return SourceRecord(
        corpus=source.corpus,
        role=source.role,
        name=source.name,
        documents=len(measured.documents[source].ids),
        tokens=measured.tokens[source],
        base_loss=measured.loss(measured.base, [source]),
        base_accuracy=measured.base_accuracy.get(source),
    )


def _trial_record(measured: Measurements, cell: Cell, study_dir: Path) -> TrialRecord:
    trial, summary = cell.trial, cell.summary
    within = trial.run_dir.is_relative_to(study_dir)
    losses = {
        alpha: {source: measured.loss(sums, [source]) for source in sums}
        for alpha, sums in cell.evaluated.items()
        if alpha != BASE
    }
    return TrialRecord(
        arm=trial.arm,
        lr=trial.lr,
        seed=trial.seed,
        run_dir=str(trial.run_dir.relative_to(study_dir) if within else trial.run_dir),
        losses={f"{alpha:g}": _by_corpus(values) for alpha, values in losses.items()},
        accuracy={f"{alpha:g}": _by_corpus(values) for alpha, values in cell.accuracy.items() if values},
        scores={f"{alpha:g}": scores for alpha, scores in cell.scores.items() if alpha != BASE},
        trainable_parameters=summary.trainable_parameters,
        total_parameters=summary.total_parameters,
        tokens=summary.tokens,
        tokens_per_second=summary.tokens_per_second,
        seconds=summary.seconds,
        overhead_seconds=(summary.overhead_seconds or 0.0) + (0.0 if trial.timing else trial.shared_seconds),
        peak_memory_bytes=max(summary.peak_memory_bytes or (), default=None),
        learned_bytes=summary.learned_bytes,
    )


def _by_corpus(values: Mapping[Source, float]) -> ByCorpus:
    nested: ByCorpus = {}
    for source, value in values.items():
        nested.setdefault(source.corpus, {})[source.key] = value
    return nested
