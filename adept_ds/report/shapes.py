"""What the report takes from files of a run: names, types and ranges of the values that it computes with.

Everything may be missing, which costs the page only what shows it. What is there and cannot be what it should be makes
a record damaged, and a line of a log one that is left out.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Layer = Annotated[int, Field(ge=0, lt=4096)]
"""There are figures with a rectangle for each."""


class Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class LayerShape(Shape):
    index: Layer
    delta: float
    loss: float | None = None
    standard_error: float | None = None


class TieBreakShape(Shape):
    lowest: list[Layer] | None = None
    tied: list[Layer] | None = None
    rise: float | None = None
    standard_error: float | None = None
    flops: float | None = None
    flops_of_lowest: float | None = None


class SelectionShape(Shape):
    choose: str | None = None
    k: int | None = None
    rule: str | None = None
    reason: str | None = None
    rules: dict[str, Layer] | None = None
    within_noise: list[Layer] | None = None
    tie_break: TieBreakShape | None = None


class StabilityShape(Shape):
    against: str | None = None
    name: str | None = None
    selected: list[list[Layer]] | None = None
    jaccard: float | None = None
    kendall_tau: float | None = None


class ImportanceShape(Shape):
    """layer_importance.json"""

    method: str | None = None
    base_loss: float | None = None
    tokens: float | None = None
    layers: list[LayerShape] | None = None
    selected: list[Layer] | None = None
    measures: str | None = None
    selection: SelectionShape | None = None
    stability: StabilityShape | None = None


class PlaceShape(Shape):
    index: Layer
    gain: float
    harm: float
    score: float


class WeighedTextShape(Shape):
    loss: float | None = None
    tokens: float | None = None


class PlacesShape(Shape):
    """place_benefits.json"""

    domain: WeighedTextShape | None = None
    general: WeighedTextShape | None = None
    places: list[PlaceShape] | None = None
    selected: list[Layer] | None = None
    harm_weight: float | None = None
    min_distance: int | None = None
    reason: str | None = None
    seconds: float | None = None


class MethodShape(Shape):
    deltas: list[float] = []
    selected: list[Layer] | None = None
    seconds: float | None = None


class MethodsShape(Shape):
    """layer_methods.json"""

    methods: dict[str, MethodShape] | None = None
    spearman: dict[str, float | None] | None = None


class CopyShape(Shape):
    source: Layer
    index: Layer


class ExpansionShape(Shape):
    """expansion.json"""

    source_layers: Layer
    copies: list[CopyShape] = []


class SourceShape(Shape):
    loss: float | None = None
    tokens: float | None = None
    questions: int | None = None
    accuracy: float | None = None
    accuracy_norm: float | None = None


class LossShape(SourceShape):
    sources: dict[str, SourceShape] | None = None


class DialShape(Shape):
    alpha: float
    corpora: dict[str, LossShape] | None = None


class EvaluationShape(Shape):
    """evaluation.json"""

    base: dict[str, LossShape] | None = None
    adapted: dict[str, LossShape] | None = None
    dial: list[DialShape] | None = None


class ChangeShape(Shape):
    loss: float | None = None
    rise: float | None = None
    limit: float | None = None


class HalfShape(Shape):
    general: dict[str, ChangeShape] = {}
    domain: ChangeShape = ChangeShape()


class TriedShape(Shape):
    alphas: list[float] = Field(min_length=1)
    keeps: bool | None = None
    tried_as: str | None = None
    validation: HalfShape = HalfShape()
    test: HalfShape = HalfShape()


class ChoiceShape(Shape):
    """dial.json"""

    kind: str | None = None
    sources: list[Layer] = []
    max_general_rise: float | None = None
    confidence: float | None = None
    positions: list[TriedShape] = []
    chosen: list[float] | None = None
    reason: str | None = None
    promise: str | None = None
    seconds: float | None = None


class SummaryShape(Shape):
    """summary.json"""

    method: str | None = None
    trainable_parameters: float | None = None
    total_parameters: float | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_memory_bytes: list[float] | float | None = None
    world_size: int | None = None
    zero_stage: int | None = None
    precision: str | None = None
    writer_lr_ratio: float | None = None
    copy_dropout: float | None = None


class RiseShape(Shape):
    rise: float
    lower: float
    upper: float


class GuardShape(Shape):
    """Of a line of metrics.jsonl"""

    general: dict[str, RiseShape] = {}
    domain: float
    forgotten: bool = False


class MetricsShape(Shape):
    """A line of metrics.jsonl; series pick the numbers that they show."""

    step: float
    eval: dict[str, LossShape] | None = None
    guard: GuardShape | None = None


class UnitShape(Shape):
    unit: str
    multiplier: float
    importance: float | None = None
    domain_importance: float | None = None


class RefreshShape(Shape):
    """A line of unit_importance.jsonl"""

    step: float
    units: list[UnitShape] = []


class MovementShape(Shape):
    """A line of unit_movement.jsonl; of its units those count that have all that is needed."""

    step: float
    since: float | None = None
    units: list[object] | None = None
