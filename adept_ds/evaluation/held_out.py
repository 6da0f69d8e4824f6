"""Losses of held-out documents: by document, which pairs any two models, and by source and corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_records import Accuracy, CorpusLoss, SourceLoss
from adept_ds.data.document_rows import DocumentRows, JoinedRows
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.unfinished import Work


class SourceName(NamedTuple):
    """Of held-out documents."""

    corpus: str
    """'general' or 'domain'."""
    source: str
    """Its name in the configuration."""

    @property
    def key(self) -> str:
        """Of the configuration."""
        return f"data.{self.corpus}_eval"

    def __str__(self) -> str:
        return f"{self.corpus}/{self.source}"


HeldOut = Mapping[SourceName, DocumentRows]
"""All held-out documents, in the order of the configuration."""

DocumentLosses = Mapping[SourceName, np.ndarray]
"""Of one model: [documents] float64, the sum of each document's token losses in nats."""


def document_losses(
    evaluator: Evaluator,
    held_out: HeldOut,
    progress: ProgressCallback | None = None,
    prefix: FrozenPrefix | None = None,
    work: Work | None = None,
) -> DocumentLosses:
    """Raises `NonFiniteLossError`, on every rank, that names the corpus.

    Args:
        prefix: of the layers that are the same in all models whose losses are asked for; for these documents alone.
        work: where they are kept, pass by pass.
    """
    rows = JoinedRows(tuple(held_out.values()))
    losses = rows.split(evaluator.losses(rows, progress, prefix, work))
    found = {name: documents.by_document(of) for (name, documents), of in zip(held_out.items(), losses, strict=True)}
    for name, sums in found.items():
        if not math.isfinite(total := float(sums.sum())):
            raise NonFiniteLossError(f"{name.key}: the held-out loss is {total}")
    return found


def by_corpus(
    held_out: HeldOut, losses: DocumentLosses, accuracies: Mapping[SourceName, Accuracy] | None = None
) -> dict[str, CorpusLoss]:
    """Means over tokens: of every source, and of every corpus over all its sources together."""
    found = dict[str, CorpusLoss]()
    for corpus in dict.fromkeys(name.corpus for name in held_out):
        names = [name for name in held_out if name.corpus == corpus]
        sources = {
            name.source: _mean([held_out[name]], [losses[name]]).with_accuracy((accuracies or {}).get(name))
            for name in names
        }
        whole = _mean([held_out[name] for name in names], [losses[name] for name in names])
        found[corpus] = CorpusLoss(**dict(whole), sources=sources)
    return found


def _mean(sources: Sequence[DocumentRows], losses: Sequence[np.ndarray]) -> SourceLoss:
    tokens = sum(int(source.tokens.sum()) for source in sources)
    total = math.fsum(float(sums.sum()) for sums in losses)
    return SourceLoss(loss=total / tokens, tokens=tokens, documents=sum(len(source.ids) for source in sources))
