"""How far what was learned is turned up: chosen on validation documents, for a promise about general text.

Stage of the ledger:
    dial    dial.json: every position that was evaluated, the chosen one, and why (docs/dial.md)

Losses of documents are kept by position (dial_losses.safetensors): a stage that was killed, and one that is asked for
another promise, evaluates only what it has not evaluated yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from rich.markup import escape

from adept_ds.base.dial_record import Alphas, DialPosition, DialRecord, label_of
from adept_ds.base.digests import json_digest
from adept_ds.base.errors import DamagedError
from adept_ds.base.resampling import SAMPLES
from adept_ds.config.dial_section import DialSection
from adept_ds.data.document_rows import JoinedRows
from adept_ds.evaluation.dial_search import Scores, Trial, search
from adept_ds.evaluation.dial_words import promise_of, reason_of
from adept_ds.evaluation.dials import alphas_by_parameter, dial_of
from adept_ds.evaluation.held_out import document_losses
from adept_ds.evaluation.rises import Pairs, check_halves
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.evaluate import base_losses, held_out_texts
from adept_ds.run.kept_losses import KeptLosses, Measured
from adept_ds.run.ledger import Stage
from adept_ds.run.loaded import evaluator_of
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.weights.expansion import Expansion
from adept_ds.zero.dialled import Dial


def dial_stage(run: Context) -> DialRecord:
    """Choose the position of the dial for what is in `trained`.

    Raises:
        InputError: a source has too few documents, or a loss is no number.
    """
    stage = Stage("dial", run.run_dir.dial, lambda: _inputs(run))
    if not run.ledger.once(stage, partial(_choose, run)):
        run.unchanged("dial")
    record = run.ranks.on_main(lambda: DialRecord.load(run.run_dir.dial))
    run.terminal.stage("dial", f"alpha {label_of(record.chosen)}: {record.reason}")
    return record


def _kept(run: Context, made_of: str) -> KeptLosses:
    """What was evaluated before."""
    try:
        return KeptLosses.load(run.run_dir.dial_losses, made_of)
    except DamagedError as error:
        run.terminal.stage("dial", escape(f"{error.reason}: positions are evaluated again"))
        return KeptLosses(made_of)


def check_dial_texts(run: Context) -> None:
    """Held-out documents are enough to choose by, and to report. Raises `InputError`."""
    section = run.settings.config.dial
    if section is not None:
        check_halves(run.corpora.held_out_documents, section.fewest_documents)


def _choose(run: Context, unfinished: Unfinished) -> None:
    section, begun = _section(run), time.monotonic()
    check_dial_texts(run)
    trained = run.ranks.on_main(lambda: ModelDirectory.read(run.run_dir.trained))
    sources = run.ranks.on_main(lambda: _copied(run))
    pairs = Pairs(run.corpora.held_out_documents, base_losses(run), section.confidence)
    turns = search(
        section.positions,
        max(1, len(sources)),
        section.max_general_rise,
        per_copy=section.per_copy and bool(sources),
    )
    # Rank 0 alone decides where to look next: ranks that computed it by themselves could disagree in a last bit.
    course, before = _Course(turns, pairs), 0.0
    made_of = run.ranks.on_main(lambda: json_digest(_measured_of(run)))
    kept = run.ranks.on_main(lambda: _kept(run, made_of))
    kept.add((0.0,), Measured(pairs.base, 0.0))  # bit for bit
    with _evaluations(run, trained, unfinished) as evaluate:
        trial = run.ranks.on_main(course.first)
        while trial is not None:
            measured = kept.of(trial.alphas)
            if measured is not None:
                before += measured.seconds
            else:
                measured = evaluate(trial.alphas)
                kept.add(trial.alphas, measured)
                run.ranks.on_main(lambda: kept.save(run.run_dir.dial_losses))
            trial = run.ranks.on_main(partial(course.next, measured))

    def write() -> None:
        assert course.chosen is not None
        record = DialRecord(
            kind=method_of(run.settings.config).dial,
            sources=sources,
            max_general_rise=section.max_general_rise,
            confidence=section.confidence,
            samples=SAMPLES,
            positions=tuple(course.positions(section.max_general_rise)),
            chosen=course.chosen,
            reason="",
            promise="",
            seconds=before + time.monotonic() - begun,
        )
        words = {"reason": reason_of(record), "promise": promise_of(record)}
        record.model_copy(update=words).save(run.run_dir.dial)

    run.ranks.on_main(write)


@dataclass
class _Course:
    """A search, and what it has found so far; on rank 0."""

    search: Generator[Trial, Scores, Alphas]
    pairs: Pairs
    found: list[tuple[Trial, Measured]] = field(default_factory=list)
    trial: Trial | None = None
    """That which is evaluated now."""
    chosen: Alphas | None = None

    def first(self) -> Trial | None:
        self.trial = next(self.search)
        return self.trial

    def next(self, measured: Measured) -> Trial | None:
        """What to evaluate after this; None: nothing."""
        assert self.trial is not None
        self.found.append((self.trial, measured))
        half = self.pairs.of(measured.losses, "validation")
        scores = Scores(half.domain.loss, tuple(source.limit for source in half.general.values()))
        try:
            self.trial = self.search.send(scores)
        except StopIteration as end:
            self.trial, self.chosen = None, end.value
        return self.trial

    def positions(self, max_general_rise: float) -> list[DialPosition]:
        found = []
        for trial, measured in self.found:
            validation, test = (self.pairs.of(measured.losses, half) for half in ("validation", "test"))
            found.append(
                DialPosition(
                    alphas=trial.alphas,
                    tried_as=trial.tried_as,
                    validation=validation,
                    test=test,
                    keeps=validation.keeps(max_general_rise),
                    seconds=measured.seconds,
                )
            )
        return found


@contextmanager
def _evaluations(
    run: Context, trained: ModelDirectory, unfinished: Unfinished
) -> Iterator[Callable[[Alphas], Measured]]:
    """Of a model that is turned from position to position; it is loaded when the first one is asked for."""
    held_out, kind = run.corpora.held_out_documents, method_of(run.settings.config).dial
    with ExitStack() as stack:

        @cache
        def loaded() -> tuple[Evaluator, Dial, FrozenPrefix | None]:
            evaluator = stack.enter_context(evaluator_of(run, trained))
            dial = dial_of(kind, evaluator.model, trained, run.settings.model, run.precision)
            return evaluator, dial, _prefix(run, evaluator, trained) if kind == "copies" else None

        def evaluate(alphas: Alphas) -> Measured:
            evaluator, dial, prefix = loaded()
            dial.turn(alphas_by_parameter(dial, trained, alphas))
            title = f"dial at alpha {label_of(alphas)}"
            work = unfinished.work(title)
            with naming_what_is_not_finite(run, trained), run.progress.together(title) as bar:
                losses = document_losses(evaluator, held_out, bar, prefix, work)
            return Measured(losses, work.seconds)

        yield evaluate


def _prefix(run: Context, evaluator: Evaluator, trained: ModelDirectory) -> FrozenPrefix:
    """Of the layers below the lowest copy, in which nothing is ever turned."""
    module: Any = getattr(evaluator.model, "module", evaluator.model)
    lowest = min(run.ranks.on_main(lambda: Expansion.read(trained.path)).copy_indices)
    tokens = evaluator.largest_batch(JoinedRows(tuple(run.corpora.held_out_documents.values())))
    bytes_of_batch = tokens * module.config.hidden_size * run.precision.itemsize
    batches = (_section(run).prefix_cache_mib << 20) // bytes_of_batch
    return FrozenPrefix(trained.family.layer_modules(module), lowest, batches)


def _inputs(run: Context) -> dict[str, Any]:
    section = _section(run).model_dump(mode="json", exclude={"prefix_cache_mib"})
    return _measured_of(run) | {"dial": section}


def _measured_of(run: Context) -> dict[str, Any]:
    """What losses are of, whatever is promised."""
    models = [run.settings.model, ModelDirectory.read(run.run_dir.trained)]
    kind = method_of(run.settings.config).dial
    return {"models": [run.identity.model(model) for model in models], "kind": kind, **held_out_texts(run)}


def _copied(run: Context) -> tuple[int, ...]:
    """The layers that were copied, lowest first."""
    makes_copies = method_of(run.settings.config).makes_copies
    return tuple(Expansion.read(run.run_dir.trained).source_indices) if makes_copies else ()


def _section(run: Context) -> DialSection:
    assert run.settings.config.dial is not None
    return run.settings.config.dial
