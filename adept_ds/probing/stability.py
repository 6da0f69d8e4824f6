"""Would another sample, corpus, checkpoint or method have chosen the same layers?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from adept_ds.base.records import Record

ReferenceKind = Literal["halves", "corpus", "model"]


class Agreement(Record):
    """Two probes of the same layers, compared."""

    against: ReferenceKind
    name: str
    """Of the other corpus or model."""
    selected: tuple[tuple[int, ...], tuple[int, ...]]
    jaccard: float
    """Layers that both chose, over layers that either chose."""
    kendall_tau: float | None
    """Rank correlation of the deltas (tau-b); None where one of both has the same delta everywhere."""

    def sentence(self) -> str:
        first, second = (list(layers) for layers in self.selected)
        tau = "not defined" if self.kendall_tau is None else f"{self.kendall_tau:.2f}"
        what = {"halves": "the two halves of the sequences", "corpus": f"corpus {self.name}", "model": self.name}
        sets = f"choose {first} and {second}" if self.against == "halves" else f"chooses {second}"
        return f"{what[self.against]} {sets}: Jaccard {self.jaccard:.2f}, Kendall tau of the deltas {tau}"


def agreement_between(
    kind: ReferenceKind,
    name: str,
    selected: tuple[Sequence[int], Sequence[int]],
    deltas: tuple[Sequence[float], Sequence[float]],
) -> Agreement:
    from scipy.stats import kendalltau  # takes a second to import

    first, second = (tuple(sorted(layers)) for layers in selected)
    either = set(first) | set(second)
    tau = _number(kendalltau(*deltas).statistic)
    jaccard = len(set(first) & set(second)) / len(either)
    return Agreement(against=kind, name=name, selected=(first, second), jaccard=jaccard, kendall_tau=tau)


def rank_correlations(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Spearman's, of every method's deltas with those of mask."""
    from scipy.stats import spearmanr

    mask = methods["mask"]["deltas"]
    return {
        name: _number(spearmanr(mask, found["deltas"]).statistic) for name, found in methods.items() if name != "mask"
    }


def _number(statistic: float) -> float | None:
    """None instead of what JSON cannot hold."""
    return float(statistic) if math.isfinite(statistic) else None
