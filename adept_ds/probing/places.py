"""Which places copies get by what they would do there: `expand.choose: gain` (docs/choosing_layers.md).

Greedily the largest gain - c max(0, harm), with a distance between any two copies; what gain and harm are, says
`place_gradients`. A greedy choice could leave no room for the copies that are still to come: a place that would is
passed over. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field, model_validator

from adept_ds.base.records import Record
from adept_ds.config.checks import check_room
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.probing.result import SourceRecord
from adept_ds.probing.selection import spared


class TextRecord(Record):
    """A text that gradients were taken on: one global batch."""

    loss: float
    """Mean token loss of the base."""
    tokens: int = Field(ge=1)
    sequences: int
    sources: tuple[SourceRecord, ...]


class PlaceScores(Record):
    """What was measured (place_scores.json): any choice follows from it without another pass."""

    domain: TextRecord
    general: TextRecord
    gains: tuple[float, ...]
    """By layer: what the domain's mean token loss would fall by at a copy above it, in nats per unit of learning rate,
    to first order."""
    harms: tuple[float, ...]
    """What the general loss would rise by, in the same unit; negative where it falls."""
    seconds: float
    """That the passes took."""

    @model_validator(mode="after")
    def _both_are_of_the_same_places(self) -> PlaceScores:
        if not self.gains or len(self.gains) != len(self.harms):
            raise ValueError(f"{len(self.gains)} gains and {len(self.harms)} harms")
        return self

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and places are weighed again"


class PlaceRecord(Record):
    """The place directly above a layer."""

    index: int
    """Of the layer."""
    gain: float
    harm: float
    score: float
    """gain - harm_weight * max(0, harm)"""


class PlaceBenefits(Record):
    """What copies would do at each place, and which places they get (place_benefits.json)."""

    domain: TextRecord
    general: TextRecord
    places: tuple[PlaceRecord, ...]
    selected: tuple[int, ...]
    """Ascending."""
    harm_weight: float
    min_distance: int
    reason: str
    """Why these, for people."""
    seconds: float

    @model_validator(mode="after")
    def _selected_are_places(self) -> PlaceBenefits:
        if not {*self.selected} <= {place.index for place in self.places}:
            raise ValueError(f"selected: {list(self.selected)} are not all among the places")
        return self

    @classmethod
    def remedy(cls) -> str:
        return "run `adept probe` again"


def choose_places(section: ExpandSection, found: PlaceScores) -> PlaceBenefits:
    """The places that the section chooses by what was measured.

    Raises:
        InputError: so many copies have no room at that distance.
    """
    c, distance, k = section.harm_weight, section.min_distance, section.num_copies
    assert k is not None, "k: auto counts deltas, and is refused before"
    scores = [gain - c * max(0.0, harm) for gain, harm in zip(found.gains, found.harms, strict=True)]
    chosen = greedy_places(scores[: len(scores) - section.spare_top], k, distance)
    rows = zip(found.gains, found.harms, scores, strict=True)
    return PlaceBenefits(
        domain=found.domain,
        general=found.general,
        places=tuple(
            PlaceRecord(index=index, gain=gain, harm=harm, score=score)
            for index, (gain, harm, score) in enumerate(rows)
        ),
        selected=tuple(sorted(chosen)),
        harm_weight=c,
        min_distance=distance,
        reason=_reason(scores[: len(scores) - section.spare_top], chosen, c, distance) + spared(section),
        seconds=found.seconds,
    )


def greedy_places(scores: Sequence[float], k: int, distance: int) -> list[int]:
    """k places no two of which are nearer than `distance` layers, in the order in which they are chosen.

    Each time the one with the highest score that leaves room for the rest; ties go to the lower layer.

    Raises:
        InputError: there is no room for so many.
    """
    check_room(k, distance, len(scores))
    chosen: list[int] = []
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    while len(chosen) < k:
        chosen.append(
            next(
                place
                for place in order
                if _is_free(place, chosen, distance)
                and _room([*chosen, place], distance, len(scores)) >= k - len(chosen) - 1
            )
        )
    return chosen


def _is_free(place: int, chosen: Collection[int], distance: int) -> bool:
    return all(abs(place - other) >= distance for other in chosen)


def _room(chosen: Collection[int], distance: int, num_layers: int) -> int:
    """How many more places there can be: from the lowest up, each the first that is free."""
    taken = list(chosen)
    for place in range(num_layers):
        if _is_free(place, taken, distance):
            taken.append(place)
    return len(taken) - len(chosen)


def _reason(scores: Sequence[float], chosen: Sequence[int], c: float, distance: int) -> str:
    text = f"k = {len(chosen)}: the largest gain"
    text += f" - {c:g} x what general text would lose" if c else ", whatever general text would lose"
    text += f", {distance} layers or more between two copies" if distance > 1 else ""
    losing = [str(layer) for layer in sorted(chosen) if scores[layer] < 0]
    text += f"; nothing is left of the gain behind {', '.join(losing)}, but k asks for so many" if losing else ""
    left = [layer for layer in range(len(scores)) if layer not in chosen]
    if not left:
        return f"{text}; no place is left"
    following = max(left, key=lambda layer: (scores[layer], -layer))
    lowest = min(scores[layer] for layer in chosen)
    text += f"; of the chosen the lowest has {lowest:.4g}, and the best of the others {scores[following]:.4g} "
    return text + f"(layer {following}{', too near' if scores[following] > lowest else ''})"
