"""What a study measured: the loss of every held-out document under every model of every trial.

Losses are read from document_losses.safetensors, where `adept eval` keeps them so that any two models can be compared
document by document. Documents are paired by their place, and that they are the same ones is checked by their digests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adept_ds.base.errors import InputError
from adept_ds.base.run_records import Scores
from adept_ds.comparison.trials import (
    BASE,
    CORPORA,
    ROLES,
    Cell,
    Documents,
    Floats,
    Source,
    Trial,
    document_losses,
    read_cell,
)

_SAME_BASE = 1e-3
"""By how much (relative) two evaluations of one base may differ: kernels and numbers of ranks, not other weights."""


@dataclass(frozen=True)
class Measurements:
    """Of a whole study."""

    documents: Mapping[Source, Documents]
    base: Mapping[Source, Floats]
    """As `Cell.sums`, of the base model."""
    base_accuracy: Mapping[Source, float]
    base_scores: Scores
    """On tasks."""
    cells: Sequence[Cell]

    def sources(self, corpus: str, role: str) -> list[Source]:
        return [source for source in self.documents if (source.corpus, source.role) == (corpus, role)]

    @cached_property
    def tokens(self) -> dict[Source, int]:
        return {source: int(documents.tokens.sum()) for source, documents in self.documents.items()}

    def loss(self, sums: Mapping[Source, Floats], sources: Sequence[Source]) -> float:
        """Mean over the tokens of these sources together, in nats."""
        return sum(float(sums[source].sum()) for source in sources) / sum(self.tokens[source] for source in sources)


def read_measurements(trials: Sequence[Trial]) -> Measurements:
    """Read all trials, and check that they can be compared document by document.

    Raises:
        InputError: no trial, or one twice; a file is missing or damaged; trials were evaluated on other documents or
            another base, or a corpus lacks one of the two roles.
    """
    if not trials:
        raise InputError("the study has no finished trial; train and evaluate at least one of its cells")
    seen: set[tuple[str, float, int]] = set()
    for trial in trials:
        if (trial.arm, trial.lr, trial.seed) in seen:
            raise InputError(f"the trial '{trial.name}' is given twice ('{trial.run_dir}'); leave one of them out")
        seen.add((trial.arm, trial.lr, trial.seed))
    cells = [read_cell(trial) for trial in trials]
    first = cells[0]
    _check_roles(first)
    for cell in cells:
        _check_same_documents(first, cell)
        _check_same_base(first, cell)
    accuracy, scores = first.accuracy.get(BASE, {}), first.scores.get(BASE, {})
    return Measurements(first.documents, first.sums[BASE], accuracy, scores, cells)


def _check_roles(cell: Cell) -> None:
    path = document_losses(cell.trial)
    for source, documents in cell.documents.items():
        if not documents.tokens.sum():
            raise InputError(
                f"'{path}' has no tokens of '{source.key}' in data.{source.corpus}_eval; leave it out there"
            )
    there = {(source.corpus, source.role) for source in cell.documents}
    missing = [(corpus, role) for corpus in CORPORA for role in ROLES if (corpus, role) not in there]
    for corpus, role in missing:
        raise InputError(
            f"'{path}' has no {role} documents of data.{corpus}_eval; give it a source that is named {role}/NAME"
        )


def _check_same_documents(first: Cell, other: Cell) -> None:
    for source in sorted(first.documents.keys() | other.documents.keys()):
        one, two = first.documents.get(source), other.documents.get(source)
        same = one and two and np.array_equal(one.ids, two.ids) and np.array_equal(one.tokens, two.tokens)
        if not same:
            raise InputError(
                f"'{document_losses(other.trial)}' has other documents of '{source.key}' in "
                f"data.{source.corpus}_eval than '{document_losses(first.trial)}'; evaluate both on the same"
            )


def _check_same_base(first: Cell, other: Cell) -> None:
    for source in first.documents:
        mine, theirs = (float(cell.sums[BASE][source].sum()) for cell in (first, other))
        if abs(mine - theirs) > _SAME_BASE * abs(mine):
            raise InputError(
                f"'{document_losses(other.trial)}' has another loss of the base on '{source.key}' than "
                f"'{document_losses(first.trial)}'; train and evaluate both from the same base"
            )
