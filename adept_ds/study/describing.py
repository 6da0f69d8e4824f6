"""What the page says of a study beside its figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adept_ds.base.version import __version__
from adept_ds.comparison.record import StudyDescription
from adept_ds.study.budget import tokens_per_step
from adept_ds.study.cell_records import Failure
from adept_ds.study.cells import Cell
from adept_ds.study.plan import Plan
from adept_ds.study.variants import Variant


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    finished: Sequence[Cell]
    missing: Sequence[Cell]
    """Planned, and neither finished nor failed."""
    failed: Mapping[Cell, Failure]


def describe(plan: Plan, progress: Progress, overlaps: Sequence[str], scale: float) -> StudyDescription:
    study = plan.study
    texts = {
        "trained on": _names(plan.texts.train),
        "replayed and probed": _names(plan.texts.general) or "nothing",
    }
    arguments = [str(plan.checked.path), *plan.checked.overrides, *([f"--scale={scale:g}"] if scale != 1 else [])]
    return StudyDescription(
        title=study.title or study.study_dir.name,
        model=plan.example(plan.checked.variants[0]).model,
        budget=budget_in_words(plan),
        reference=study.reference if study.reference in _arms(progress) else None,
        texts=texts,
        commands=[shlex.join(["adept", "compare", *arguments])],
        notes=[*_unfinished(study.reference, progress), *overlaps],
        facts=_facts(plan),
    )


def budget_in_words(plan: Plan) -> str:
    budget = plan.study.budget
    if budget.tokens is None:
        return f"{budget.seconds:g} seconds each, of steps and of everything that a method needs beside them"
    lengths = {_length(plan, variant) for variant in plan.checked.variants}
    detail = f" ({lengths.pop()})" if len(lengths) == 1 else ""
    return f"{budget.tokens:,} tokens of training each{detail}"


def _length(plan: Plan, variant: Variant) -> str:
    return f"{plan.steps(variant):,} steps of {tokens_per_step(plan.example(variant)):,} tokens"


def _facts(plan: Plan) -> list[str]:
    study = plan.study
    validation, test = study.domain.validation, study.domain.test
    facts = [f"Of the domain's documents {validation:.0%} are for validation and {test:.0%} for test, by hash."]
    if plan.checked.tells_time:
        facts += [
            f"{name}: {rate.step_seconds:.3f} s a step, {rate.refresh_seconds:.2f} s a refresh, "
            f"{rate.before_training:.1f} s before the first step; measured alone, before the study."
            for name, rate in plan.rates.items()
        ]
        lengths = [f"{variant.name}: {_length(plan, variant)}." for variant in plan.checked.variants]
        facts += lengths if study.budget.tokens is None else []
    return [*facts, f"adept-ds {__version__}, {study.ranks} rank{'s' if study.ranks > 1 else ''}."]


def _unfinished(reference: str | None, progress: Progress) -> list[str]:
    notes = [f"Failed: {cell.title}: {failure.reason}" for cell, failure in progress.failed.items()]
    if progress.missing:
        notes.append(f"{len(progress.missing)} cells have not been run yet.")
    if reference is not None and reference not in _arms(progress):
        notes.append(f"{reference}, which others are to be compared with, has no finished cell.")
    return notes


def _arms(progress: Progress) -> set[str]:
    return {cell.variant.name for cell in progress.finished}


def _names(sources: Sequence[object]) -> str:
    return ", ".join(getattr(source, "title", "") for source in sources)
