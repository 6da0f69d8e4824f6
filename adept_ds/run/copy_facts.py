"""From sums by sequence to what a diagnosis says of each copy."""

from __future__ import annotations

import numpy as np
import torch

from adept_ds.models.families import Family
from adept_ds.probing.bypassed_copies import CopyPasses, Written
from adept_ds.probing.copy_gradients import UnitGradients
from adept_ds.probing.overlap import energy_coefficient, separability
from adept_ds.report.diagnosis import (
    Change,
    CopyEffect,
    CopyWrites,
    Overlap,
    TextLosses,
    UnitGradient,
    WriteShare,
)
from adept_ds.report.diagnosis_signs import compared, paired_error

FEWEST_SEQUENCES = 4
"""With fewer of either text, nothing is said about how far they are apart."""


def losses_of(corpus: str, found: CopyPasses) -> TextLosses:
    """Of base and adapted model, both from one sweep."""
    tokens = float(found.tokens.sum())
    base, adapted = (float(losses.sum()) / tokens for losses in (found.without_any, found.with_all))
    error = paired_error((found.with_all - found.without_any).numpy(), found.tokens.numpy())
    return compared(corpus, base, adapted, int(tokens), error)


def effect_of(number: int, index: int, source: int, passes: dict[str, CopyPasses]) -> CopyEffect:
    """Of the copy that is the `number`-th of the sweep; `passes` are by corpus, as everywhere here."""
    changes = {name: _change(found.with_all - found.without[:, number], found.tokens) for name, found in passes.items()}
    return CopyEffect(index=index, source=source, general=changes.get("general"), domain=changes.get("domain"))


def _change(differences: torch.Tensor, tokens: torch.Tensor) -> Change:
    error = paired_error(differences.numpy(), tokens.numpy())
    return Change(change=float(differences.sum() / tokens.sum()), standard_error=error)


def writes_of(index: int, source: int, passes: dict[str, CopyPasses]) -> CopyWrites:
    """What the copy at layer `index` writes, beside the layer below it."""
    return CopyWrites(
        index=index, source=source, on={name: _share(found, index, found.tokens) for name, found in passes.items()}
    )


def _share(found: CopyPasses, index: int, tokens: torch.Tensor) -> WriteShare:
    copy, below = found.written[index], found.written[index - 1]

    def rms(sums: torch.Tensor) -> float:
        return float((sums.sum() / tokens.sum()).sqrt())

    return WriteShare(
        copy_share=rms(copy.share_squares),
        below_share=rms(below.share_squares),
        copy_rms=rms(copy.squares),
        stream_rms=rms(copy.stream_squares),
    )


def gradients_of(family: Family, found: UnitGradients) -> tuple[UnitGradient, ...]:
    """Of every unit in a layer."""
    return tuple(
        UnitGradient(
            unit=unit.name,
            kind=unit.kind,
            layer=unit.layer,
            part=unit.part,
            rms=rms,
            silent=family.writes_residual(f"{unit.part}.weight"),
        )
        for unit, rms in zip(found.units, found.rms, strict=True)
        if unit.layer is not None
    )


def overlaps_of(copies: dict[int, int], passes: dict[str, CopyPasses]) -> list[Overlap]:
    """Of every copy (index -> source), on general against domain text; none where there are too few sequences."""
    if passes.keys() < {"general", "domain"}:
        return []
    if min(len(found.tokens) for found in passes.values()) < FEWEST_SEQUENCES:
        return []
    found = []
    for index, source in copies.items():
        texts = {
            layer: [_means(passes[name].written[layer], passes[name].tokens) for name in ("domain", "general")]
            for layer in (index - 1, index)
        }
        (domain, general), below = texts[index], texts[index - 1]
        parted, parted_below = separability(domain, general), separability(below[0], below[1])
        found.append(
            Overlap(
                index=index,
                source=source,
                accuracy=parted.accuracy,
                distance=energy_coefficient(domain, general),
                below_accuracy=parted_below.accuracy,
                below_distance=energy_coefficient(below[0], below[1]),
                general_scores=parted.y_scores,
                domain_scores=parted.x_scores,
            )
        )
    return found


def _means(written: Written, tokens: torch.Tensor) -> np.ndarray:
    """Over the tokens of each sequence. [sequences, dim]"""
    means: np.ndarray = (written.sums / tokens.clamp(min=1)[:, None]).numpy()
    return means
