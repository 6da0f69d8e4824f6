"""Stage one, first half: which layers does general competence hardly need? (paper, section 3.1)

    delta_i = loss(D_gen, model with layer i bypassed) - loss(D_gen, model)

All M + 1 losses come out of one walk up the decoder. A stack of hidden states is carried along: the unchanged model,
and one variant for every layer already bypassed. At layer j the whole stack passes through the layer, and variant j
joins as a copy of the unchanged model's input to it. That is M (M + 1) / 2 + M layer passes instead of about M^2, and
under ZeRO-3 each layer is gathered once per batch instead of M + 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.probing.estimators import Probe
from adept_ds.probing.model_size import model_size
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import Selection, select_layers
from adept_ds.probing.stability import Against, Agreement, compare


@dataclass(frozen=True)
class LayerLoss:
    index: int
    loss: float | None
    """Mean token loss with this layer bypassed: measured (mask), or estimated (taylor). None for other methods."""
    delta: float
    """`loss` minus the base loss: what general competence loses without the layer. Other methods: their score."""
    standard_error: float | None = None
    """Of `delta`, by the bootstrap; None where there was nothing to draw from."""


@dataclass(frozen=True)
class LayerImportance:
    """The result file of the probe (layer_importance.json)."""

    method: str
    base_loss: float
    tokens: int
    layers: tuple[LayerLoss, ...]
    selected: tuple[int, ...]
    sequences: int = 0
    sources: tuple[dict[str, Any], ...] = ()
    """Of each source of the corpus: name, weight, sequences, tokens."""
    selection: dict[str, Any] | None = None
    """How the layers were chosen (see `selection.Selection`)."""
    stability: dict[str, Any] | None = None
    """How the choice compares with another one (see `stability`)."""

    @property
    def deltas(self) -> list[float]:
        return [layer.delta for layer in self.layers]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> LayerImportance:
        record = {key: value for key, value in read_json(path).items() if key in cls.__dataclass_fields__}
        layers = tuple(LayerLoss(**layer) for layer in record.pop("layers"))
        return cls(layers=layers, selected=tuple(record.pop("selected")), **record)


@dataclass(frozen=True)
class Beside:
    """Scores of the same layers that the choice is compared with."""

    against: Against
    name: str
    scores: LayerScores


def judge(probe: Probe, scores: LayerScores, beside: Beside | None = None) -> LayerImportance:
    """Everything that follows from `scores`.

    Raises:
        InputError: the configuration asks for layers that cannot be chosen.
    """
    sample, deltas, base = probe.sample, scores.deltas, scores.base_loss
    replicates = scores.replicates(probe.config.train.seed)
    errors: list[float | None] = [None] * len(deltas)
    if replicates is not None:
        errors = replicates.std(axis=0, ddof=1).tolist()
    selection = _selection(probe, deltas, None if replicates is None else replicates.tolist())
    agreement = _agreement(probe, scores, selection.layers, beside)
    return LayerImportance(
        method=scores.method,
        base_loss=base,
        tokens=sum(sample.tokens()),
        sequences=len(sample),
        sources=tuple(sample.facts()),
        layers=tuple(
            LayerLoss(index, base + delta if scores.by_sequence else None, delta, error)
            for index, (delta, error) in enumerate(zip(deltas, errors, strict=True))
        ),
        selected=selection.layers,
        selection={key: value for key, value in asdict(selection).items() if key != "layers"},
        stability=asdict(agreement) if agreement else None,
    )


def select(probe: Probe, deltas: Sequence[float]) -> list[int]:
    """The layers that the configuration chooses by these deltas."""
    return list(_selection(probe, deltas).layers)


def check_halves(probe: Probe) -> None:
    """Both halves of the sequences have something of every source, or of the batches.

    Raises:
        InputError: before any pass.
    """
    sample, section = probe.sample, probe.config.probe
    counts = [sample.sources.count(source) for source in range(len(sample.names))]
    if section.method in ("mask", "taylor") and min(counts) < 2:
        raise InputError(
            f"probe.stability: halves needs two sequences of every source, but '{sample.names[counts.index(1)]}' has "
            "one in the sample; raise probe.sequences, or give it more text or weight"
        )
    if section.method in ("gradient", "fisher") and len(probe.batches.global_batches()) < 2:
        raise InputError(
            f"probe.stability: halves needs two batches, but {len(sample)} sequences are one of "
            f"probe.gradient_batch_sequences {section.gradient_batch_sequences}; lower it, or raise probe.sequences"
        )


def _agreement(probe: Probe, scores: LayerScores, selected: Sequence[int], beside: Beside | None) -> Agreement | None:
    if beside is not None:
        other = beside.scores.deltas
        return compare(beside.against, beside.name, (selected, select(probe, other)), (scores.deltas, other))
    halves = scores.halves() if probe.config.probe.stability == "halves" else None
    if halves is None:
        return None
    first, second = halves.tolist()
    return compare("halves", "", (select(probe, first), select(probe, second)), (first, second))


def _selection(probe: Probe, deltas: Sequence[float], replicates: Sequence[Sequence[float]] | None = None) -> Selection:
    size, config = model_size(probe.model_dir), probe.config
    return select_layers(config.expand, deltas, size, config.train.seed, replicates)
