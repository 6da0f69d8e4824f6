"""A trial of a study: a trained and evaluated run, and what its files say that is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import Evaluation, MetricsLine, RunSummary, Scores, TaskScores, read_log
from adept_ds.comparison import wording
from adept_ds.comparison.between import filled

BASE, ADAPTED = 0.0, 1.0
"""Ends of the dial: weights of the base, and as training left them."""

CORPORA, ROLES = ("general", "domain"), ("validation", "test")
"""Rates and dials are chosen on validation documents; what is reported is of test documents."""

_EVALUATE = "`adept eval` on its configuration makes it again"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Timing(Record):
    """What a method takes where nothing else runs, in seconds: measured alone, not while trials ran side by side."""

    step_seconds: PositiveFloat
    refresh_seconds: NonNegativeFloat
    before_seconds: NonNegativeFloat
    """Before the first step: the probe, and what the method prepares."""


class Trial(Record):
    """A trained and evaluated cell of a study."""

    label: str
    """Of its method."""
    setting: str = ""
    """Of the method, where a study compares several; '' otherwise."""
    lr: PositiveFloat
    seed: int
    run_dir: Path
    shared_seconds: NonNegativeFloat = 0.0
    """Of work that the study did once for several trials, and that this method needs: the probe."""
    timing: Timing | None = None
    """Stands for what the trial itself took, `shared_seconds` included, where it is known."""

    @property
    def arm(self) -> str:
        """What is compared: a method with its setting."""
        return f"{self.label} ({self.setting})" if self.setting else self.label

    @property
    def name(self) -> str:
        return f"{self.arm}, learning rate {wording.rate(self.lr)}, seed {self.seed}"


class Source(NamedTuple):
    """Held-out documents of one kind and one role."""

    corpus: str
    """'general' or 'domain'"""
    role: str
    """'validation' or 'test'"""
    name: str

    @property
    def key(self) -> str:
        """As configurations name it."""
        return f"{self.role}/{self.name}"


class TrialSummary(RunSummary):
    """summary.json of a trial."""

    learned_bytes: NonNegativeInt | None = None
    """On disk, of what was learned: an adapter, copies, or a whole model."""


class _Evaluated(Record):
    model_config = ConfigDict(extra="ignore")

    loss: float


class ProgressLine(MetricsLine):
    """A line of metrics.jsonl, with the held-out losses of an evaluation during training."""

    eval: dict[str, _Evaluated] | None = None


class Progress(NamedTuple):
    """How a loss fell during training; arrays [points]."""

    tokens: Floats
    """Trained on so far."""
    seconds: Floats
    """Spent so far, with what came before the first step and refreshes."""
    loss: Floats


@dataclass(frozen=True)
class Documents:
    """Of a source; arrays [documents]."""

    ids: Ints
    tokens: Ints


@dataclass(frozen=True)
class Cell:
    """What a trial measured."""

    trial: Trial
    documents: Mapping[Source, Documents]
    evaluated: Mapping[float, Mapping[Source, Floats]]
    """Position of the dial -> source -> sum of each document's token losses in nats, [documents]. Without `lost`."""
    lost: tuple[float, ...]
    """Positions of the dial where a loss is no finite number."""
    accuracy: Mapping[float, Mapping[Source, float]]
    scores: Mapping[float, Scores]
    """On tasks, by position of the dial."""
    summary: TrialSummary
    training: Progress
    """The loss on training batches."""
    held_out: Progress
    """The loss on all held-out text of the domain, as far as evaluations during training say it."""

    @cached_property
    def sums(self) -> Mapping[float, Mapping[Source, Floats]]:
        """As `evaluated`, with positions between."""
        return filled(self.evaluated)


def document_losses(trial: Trial) -> Path:
    return RunDirectory(trial.run_dir).document_losses


def read_cell(trial: Trial) -> Cell:
    """Raises `InputError`: a file is missing or damaged, or a source has no role."""
    run, losses = RunDirectory(trial.run_dir), document_losses(trial)
    documents, sums = _read_losses(losses)
    clock = _Clock(trial.timing, trial.shared_seconds)
    summary, progress = clock.of(TrialSummary.load(run.summary), run.metrics)
    lost = tuple(
        alpha for alpha, of in sorted(sums.items()) if not all(np.isfinite(loss).all() for loss in of.values())
    )
    if BASE in lost:
        raise InputError(f"'{losses}' has losses of the base that are no finite numbers; {_EVALUATE}")
    return Cell(
        trial=trial,
        documents=documents,
        evaluated={alpha: sums[alpha] for alpha in sorted(sums) if alpha not in lost},
        lost=lost,
        accuracy=_accuracies(Evaluation.load(run.evaluation)) if run.evaluation.is_file() else {},
        scores=_scores(run.task_scores) if run.task_scores.is_file() else {},
        summary=summary,
        **progress,
    )


def _read_losses(path: Path) -> tuple[dict[Source, Documents], dict[float, dict[Source, Floats]]]:
    """Documents by source; sums of token losses by position of the dial and source."""
    tensors = _tensors(path)
    ids = {_source(name): value.astype(np.int64) for name, value in _below("ids", tensors)}
    tokens = {_source(name): value.astype(np.int64) for name, value in _below("tokens", tensors)}
    sums: dict[float, dict[Source, Floats]] = {}
    for name, value in _below("loss", tensors):
        model, _, of = name.partition("/")
        sums.setdefault(_position(model, path), {})[_source(of)] = value.astype(np.float64)
    if not {BASE, ADAPTED} <= sums.keys():
        raise InputError(f"'{path}' lacks the losses of a model, base or adapted; {_EVALUATE}")
    shapes = _shapes(ids)
    if _shapes(tokens) != shapes or any(_shapes(of) != shapes for of in sums.values()):
        raise InputError(f"'{path}' has not the same documents for every model; {_EVALUATE}")
    return {source: Documents(ids[source], tokens[source]) for source in ids}, sums


def _shapes(arrays: dict[Source, Any]) -> dict[Source, tuple[int, ...]]:
    return {source: array.shape for source, array in arrays.items()}


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"'{path}' cannot be read ({reason}); {_EVALUATE}") from None


def _below(kind: str, tensors: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names behind `kind/`, in order."""
    for name in sorted(tensors):
        if name.startswith(f"{kind}/"):
            yield name.removeprefix(f"{kind}/"), tensors[name]


def _position(model: str, path: Path) -> float:
    if model in ("base", "adapted"):
        return BASE if model == "base" else ADAPTED
    try:
        return float(model.removeprefix("alpha="))
    except ValueError:
        raise InputError(f"'{path}' has a model {model!r}, which is no position of the dial; {_EVALUATE}") from None


def _accuracies(evaluation: Evaluation) -> dict[float, dict[Source, float]]:
    """Shares of right answers by position of the dial and source, of sources with questions: by log-likelihood per
    character where that is known."""
    models = {BASE: evaluation.base, ADAPTED: evaluation.adapted}
    found: dict[float, dict[Source, float]] = {}
    for alpha, corpora in (models | {at.alpha: at.corpora for at in evaluation.dial}).items():
        for corpus, losses in corpora.items():
            for name, of in losses.sources.items():
                share = of.accuracy if of.accuracy_norm is None else of.accuracy_norm
                if share is not None:
                    found.setdefault(alpha, {})[_source(f"{corpus}/{name}")] = share
    return found


def _scores(path: Path) -> dict[float, Scores]:
    return {_position(model, path): scores for model, scores in TaskScores.load(path).models.items()}


def _source(name: str) -> Source:
    """Of 'CORPUS/ROLE/NAME'."""
    corpus, _, key = name.partition("/")
    role, _, rest = key.partition("/")
    if corpus not in CORPORA or role not in ROLES or not rest:
        raise InputError(
            f"the source '{key}' of data.{corpus}_eval has no role; "
            "call it validation/NAME (to choose by) or test/NAME (to report)"
        )
    return Source(corpus, role, rest)


@dataclass(frozen=True)
class _Clock:
    """Seconds of a trial: its own, or those that were measured alone."""

    timing: Timing | None
    shared_seconds: float

    def of(self, summary: TrialSummary, metrics: Path) -> tuple[TrialSummary, dict[str, Progress]]:
        """Its summary, and what stands in metrics.jsonl, as arguments of `Cell`."""
        lines = [line for _, line in read_log(metrics, ProgressLine)]
        steps = sum(line.is_step for line in lines)
        before = self._before(summary)
        if self.timing is not None:
            seconds = steps * self.timing.step_seconds
            summary = summary.model_copy(
                update={
                    "seconds": seconds,
                    "overhead_seconds": before + sum(map(self._refresh, lines)),
                    "tokens_per_second": summary.tokens / seconds if summary.tokens and steps else None,
                }
            )
        return summary, self._progress(lines, before)

    def _before(self, summary: TrialSummary) -> float:
        if self.timing is not None:
            return self.timing.before_seconds
        return self.shared_seconds + (summary.preparation_seconds or 0.0)

    def _refresh(self, line: ProgressLine) -> float:
        """That before the first step is among what comes before."""
        if self.timing is None:
            return line.refresh_seconds or 0.0
        return self.timing.refresh_seconds if line.refresh_seconds is not None and line.step else 0.0

    def _step(self, line: ProgressLine) -> float:
        return self.timing.step_seconds if self.timing is not None and line.is_step else line.seconds

    def _progress(self, lines: Sequence[ProgressLine], seconds: float) -> dict[str, Progress]:
        tokens = 0
        points: dict[str, list[tuple[float, float, float]]] = {"training": [], "held_out": []}
        for line in lines:
            seconds += self._step(line) + self._refresh(line)
            tokens = line.tokens if line.is_step else tokens
            if line.is_step:
                points["training"] += [(tokens, seconds, np.nan if line.loss is None else line.loss)]
            if line.eval and "domain" in line.eval:
                points["held_out"].append((tokens, seconds, line.eval["domain"].loss))
        return {name: Progress(*np.array(rows, dtype=np.float64).reshape(-1, 3).T) for name, rows in points.items()}
