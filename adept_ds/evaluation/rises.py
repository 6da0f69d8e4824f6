"""How far losses of held-out text rise above the base's: paired by document, by halves, with one-sided limits.

    rise  = sum over documents (loss - base loss) / number of predicted tokens
    limit = the `confidence` quantile of the same ratio over documents that are drawn anew, within each source

Documents fall into two halves by the hash of their text: positions are chosen on one, and reported on the other. A text
that is there twice is in one half only, and the same text is in the same half of every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from adept_ds.base.dial_record import HalfLosses, LossChange
from adept_ds.base.errors import InputError
from adept_ds.base.guard_record import RiseLimits
from adept_ds.base.resampling import SAMPLES, SEED, Stratum, resampled_losses
from adept_ds.data.document_rows import DocumentRows
from adept_ds.evaluation.held_out import DocumentLosses, HeldOut, SourceName

Half = Literal["validation", "test"]
HALVES: tuple[Half, Half] = ("validation", "test")


def in_half(ids: np.ndarray, half: Half) -> np.ndarray:
    """[documents] bool: by the last bit of what a document is known by, which is of SHA-256 of its text."""
    found: np.ndarray = ((ids & 1) == 0) == (half == "validation")
    return found


class SourceRises(NamedTuple):
    """Of the documents of a source in one half."""

    tokens: np.ndarray
    """[documents] int64, predicted ones."""
    base: np.ndarray
    """[documents] float64, sums of token losses in nats."""
    losses: np.ndarray
    """[documents] float64, the same of the model."""


def loss_change(sources: Sequence[SourceRises], confidence: float, *, samples: int = SAMPLES) -> LossChange:
    """Of these sources together."""
    tokens, base, losses = (np.concatenate(columns) for columns in zip(*sources, strict=True))
    total = int(tokens.sum())
    return LossChange(
        loss=float(losses.sum()) / total,
        rise=float((losses - base).sum()) / total,
        limit=float(np.quantile(_resampled(sources, samples), confidence)),
        tokens=total,
        documents=len(tokens),
    )


def rise_limits(source: SourceRises, confidence: float, *, samples: int = SAMPLES) -> RiseLimits:
    """Of a source, with both limits: each is one-sided at `confidence`."""
    lower, upper = np.quantile(_resampled([source], samples), [1 - confidence, confidence])
    rise = float((source.losses - source.base).sum()) / int(source.tokens.sum())
    return RiseLimits(rise=rise, lower=float(lower), upper=float(upper))


def _resampled(sources: Sequence[SourceRises], samples: int) -> np.ndarray:
    """[samples] float64: rises over documents that are drawn anew."""
    strata = [Stratum(of.tokens, (of.losses - of.base)[np.newaxis]) for of in sources]
    return resampled_losses(strata, samples, SEED)[:, 0]


@dataclass(frozen=True)
class Pairs:
    """All held-out documents with their losses under the base: what models are compared by."""

    held_out: HeldOut
    base: DocumentLosses
    confidence: float
    """Of limits."""

    def of(self, losses: DocumentLosses, half: Half) -> HalfLosses:
        """Of a model on one half."""
        rises = {name: self._source(name, losses, half) for name in self.held_out}
        of_domain = [source for name, source in rises.items() if name.corpus == "domain" and len(source.tokens)]
        return HalfLosses(
            general={
                name.source: loss_change([source], self.confidence)
                for name, source in rises.items()
                if name.corpus == "general"
            },
            domain=loss_change(of_domain, self.confidence),
        )

    def limits(self, losses: DocumentLosses, half: Half) -> dict[str, RiseLimits]:
        """Of every general source, by its name."""
        general = [name for name in self.held_out if name.corpus == "general"]
        return {name.source: rise_limits(self._source(name, losses, half), self.confidence) for name in general}

    def domain_loss(self, losses: DocumentLosses, half: Half) -> float:
        """Per token, over all sources of the domain together."""
        of_domain = [self._source(name, losses, half) for name in self.held_out if name.corpus == "domain"]
        return sum(float(of.losses.sum()) for of in of_domain) / sum(int(of.tokens.sum()) for of in of_domain)

    def _source(self, name: SourceName, losses: DocumentLosses, half: Half) -> SourceRises:
        documents = self.held_out[name]
        mine = _that_count(documents, half)
        return SourceRises(documents.tokens[mine], self.base[name][mine], losses[name][mine])


def check_halves(held_out: HeldOut, fewest: int, section: str = "dial") -> None:
    """Every general source has so many documents in both halves, and the domain has any.

    Args:
        section: of the configuration, that needs them.

    Raises:
        InputError: naming the source and how many it has.
    """
    counts = {name: _counts([documents]) for name, documents in held_out.items() if name.corpus == "general"}
    for name, of in counts.items():
        if min(of.values()) < fewest:
            raise InputError(
                f"{name.key}: source '{name.source}' has {_told(of)} documents among those that are evaluated, where "
                f"{section}.confidence takes at least {fewest} of each: give more documents, or raise "
                "data.eval_sequences"
            )
    domain = _counts([documents for name, documents in held_out.items() if name.corpus == "domain"])
    if not min(domain.values()):
        raise InputError(
            f"data.domain_eval: {_told(domain)} documents are among those that are evaluated, where the {section} "
            "needs both: give more documents, or raise data.eval_sequences"
        )


def _counts(sources: Sequence[DocumentRows]) -> dict[Half, int]:
    return {half: sum(int(_that_count(documents, half).sum()) for documents in sources) for half in HALVES}


def _told(counts: Mapping[Half, int]) -> str:
    return " and ".join(f"{count} {half}" for half, count in counts.items())


def _that_count(documents: DocumentRows, half: Half) -> np.ndarray:
    """[documents] bool: those of the half in which something is predicted."""
    return in_half(documents.ids, half) & (documents.tokens > 0)
