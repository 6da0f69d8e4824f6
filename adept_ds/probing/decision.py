"""From scores to the result of a probe: what is selected, how sure that is, how it compares. No pass, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adept_ds.base.errors import InputError
from adept_ds.probing.estimators import ESTIMATORS, Probe
from adept_ds.probing.model_size import model_size
from adept_ds.probing.result import LayerImportance, LayerRecord, SourceRecord
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import Selection, select_layers
from adept_ds.probing.stability import Agreement, ReferenceKind, agreement_between


@dataclass(frozen=True)
class Reference:
    """Scores of the same layers that the choice is compared with."""

    kind: ReferenceKind
    name: str
    """Of the other corpus or model."""
    scores: LayerScores


def result_of(probe: Probe, scores: LayerScores, reference: Reference | None = None) -> LayerImportance:
    """Everything that follows from `scores`.

    Raises:
        InputError: the configuration asks for layers that cannot be chosen.
    """
    sample, deltas, base = probe.sample, scores.deltas, scores.base_loss
    estimator = ESTIMATORS[scores.method]
    replicates = scores.replicates(probe.seed)
    errors: list[float | None] = [None] * len(deltas)
    if replicates is not None:
        errors = replicates.std(axis=0, ddof=1).tolist()
    selection = _selection(probe, deltas, None if replicates is None else replicates.tolist())
    return LayerImportance(
        method=scores.method,
        base_loss=base,
        tokens=sum(sample.tokens()),
        sequences=len(sample),
        sources=tuple(SourceRecord(**facts) for facts in sample.facts()),
        layers=tuple(
            LayerRecord(
                index=index, loss=base + delta if estimator.in_nats else None, delta=delta, standard_error=error
            )
            for index, (delta, error) in enumerate(zip(deltas, errors, strict=True))
        ),
        selected=selection.layers,
        selection=selection,
        stability=_agreement(probe, scores, reference),
        measures=estimator.measures,
    )


def select(probe: Probe, deltas: Sequence[float]) -> list[int]:
    """The layers that the configuration chooses by these deltas, before a tie is broken."""
    return list(_selection(probe, deltas).layers)


def check_halves(probe: Probe) -> None:
    """Both halves of the sequences have something of every source, or of the batches.

    Raises:
        InputError: before any pass.
    """
    _check_two(probe, "probe.stability: halves")


def check_noise(probe: Probe) -> None:
    """There is a bootstrap, which tells what a tie is: two sequences of every source, or two batches.

    Raises:
        InputError: before any pass.
    """
    _check_two(probe, "expand.tie_break: cost")


def _check_two(probe: Probe, what: str) -> None:
    sample, section = probe.sample, probe.section
    counts = [sample.sources.count(source) for source in range(len(sample.names))]
    if not ESTIMATORS[section.method].by_sequence:
        if len(probe.batches.global_batches()) < 2:
            raise InputError(
                f"{what} needs two batches, but {len(sample)} sequences are one of "
                f"probe.batch_sequences {section.batch_sequences}; lower it, or raise probe.sequences"
            )
    elif min(counts) < 2:
        raise InputError(
            f"{what} needs two sequences of every source, but '{sample.names[counts.index(1)]}' has "
            "one in the sample; raise probe.sequences, or give it more text or weight"
        )


def _agreement(probe: Probe, scores: LayerScores, reference: Reference | None) -> Agreement | None:
    if reference is not None:
        other = reference.scores.deltas
        chosen = (select(probe, scores.deltas), select(probe, other))
        return agreement_between(reference.kind, reference.name, chosen, (scores.deltas, other))
    halves = scores.halves() if probe.section.stability == "halves" else None
    if halves is None:
        return None
    first, second = halves.tolist()
    return agreement_between("halves", "", (select(probe, first), select(probe, second)), (first, second))


def _selection(probe: Probe, deltas: Sequence[float], replicates: Sequence[Sequence[float]] | None = None) -> Selection:
    return select_layers(probe.expand, deltas, model_size(probe.model), probe.seed, replicates, probe.cost)
