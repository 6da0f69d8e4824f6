"""The result file of the probe (layer_importance.json). Imports no torch."""

from __future__ import annotations

from pydantic import model_validator

from adept_ds.base.records import Record
from adept_ds.probing.selection import Selection
from adept_ds.probing.stability import Agreement


class LayerRecord(Record):
    """One layer."""

    index: int
    loss: float | None
    """Mean token loss with this layer bypassed: measured (mask), or estimated (taylor). None for other methods."""
    delta: float
    """`loss` minus the base loss: what general competence loses without the layer. Other methods: their score."""
    standard_error: float | None = None
    """Of `delta`, by the bootstrap; None where there was nothing to draw from."""


class SourceRecord(Record):
    """A source of the corpus, and what of it was sampled."""

    name: str
    weight: float
    sequences: int
    tokens: int


class LayerImportance(Record):
    """What was found out about every layer, and which are to be copied."""

    method: str
    base_loss: float
    tokens: int
    layers: tuple[LayerRecord, ...]
    selected: tuple[int, ...]
    sequences: int = 0
    sources: tuple[SourceRecord, ...] = ()
    selection: Selection | None = None
    """How the layers were chosen."""
    stability: Agreement | None = None
    """How the choice compares with another one."""
    measures: str = ""
    """What a delta is, for the axis of a figure."""

    @model_validator(mode="after")
    def _selection_knows_its_layers(self) -> LayerImportance:
        if self.selection is not None and not self.selection.layers:
            object.__setattr__(self, "selection", self.selection.model_copy(update={"layers": self.selected}))
        return self

    @classmethod
    def remedy(cls) -> str:
        return "run `adept probe` again"

    @property
    def deltas(self) -> list[float]:
        return [layer.delta for layer in self.layers]
