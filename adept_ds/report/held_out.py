"""Rows of the report about held-out text: losses by corpus and source, positions of the dial, questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from adept_ds.report.run_files import RunFiles, finite, losses

_MEASURES = {"accuracy": "right", "accuracy_norm": "right by length"}


class LossRow(NamedTuple):
    """Of a corpus, or of a source where a corpus has several."""

    title: str
    before: float
    after: float
    tokens: float | None
    is_source: bool


class DialRow(NamedTuple):
    """Of models between base (0) and adapted (1)."""

    alpha: float
    losses: dict[str, float]
    """By corpus."""


class AnswerRow(NamedTuple):
    """Of the questions of a source."""

    title: str
    questions: int
    before: float
    after: float


def loss_rows(run: RunFiles) -> Iterator[LossRow]:
    """Of the base and the adapted model; else of the first and the last evaluation."""
    before, after = run.before_after()
    for corpus in before:
        if corpus not in after:
            continue
        adapted = _corpus(run, "adapted", corpus)
        yield LossRow(corpus, before[corpus], after[corpus], _number(adapted, "tokens"), False)
        pairs = _sources(run, corpus)
        for name, first, last in pairs if len(pairs) > 1 else ():
            if finite(first.get("loss")) and finite(last.get("loss")):
                yield LossRow(name, first["loss"], last["loss"], _number(last, "tokens"), True)


def dial_rows(run: RunFiles) -> list[DialRow]:
    """From the base to the adapted model; none without `eval.dial`."""
    between = [
        DialRow(position["alpha"], losses(position.get("corpora"))) for position in run.evaluation.get("dial") or ()
    ]
    ends = [DialRow(alpha, losses(run.evaluation.get(name))) for alpha, name in ((0, "base"), (1, "adapted"))]
    return sorted([*between, *ends], key=lambda row: row.alpha) if between else []


def answer_rows(run: RunFiles) -> Iterator[AnswerRow]:
    """Of the sources that hold questions."""
    for corpus in run.evaluation.get("adapted") or ():
        for name, first, last in _sources(run, corpus):
            for measure, words in _MEASURES.items():
                if finite(first.get(measure)) and finite(last.get(measure)):
                    title = f"{corpus}: {name}, {words}"
                    yield AnswerRow(title, last.get("questions") or 0, first[measure], last[measure])


def _sources(run: RunFiles, corpus: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, and what was found of base and adapted model."""
    base, adapted = (_corpus(run, model, corpus).get("sources") or {} for model in ("base", "adapted"))
    return [(name, base[name], adapted[name]) for name in base if name in adapted]


def _corpus(run: RunFiles, model: str, corpus: str) -> dict[str, Any]:
    return dict((run.evaluation.get(model) or {}).get(corpus) or {})


def _number(found: dict[str, Any], key: str) -> float | None:
    value = found.get(key)
    return value if finite(value) else None
