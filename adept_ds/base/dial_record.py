"""What the dial of a run found and chose (dial.json; docs/dial.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from adept_ds.base.records import Record

Alphas = tuple[Annotated[float, Field(ge=0, le=1)], ...]
"""A position of the dial: of each copy, lowest first; a single number of a method that makes none."""


class LossChange(Record):
    """Of some held-out documents under a model, against the base on the same documents."""

    loss: float
    """Nats per token."""
    rise: float
    """Above the base's; below 0 where the model is the better one."""
    limit: float
    """Upper limit of the rise, at the confidence of the record."""
    tokens: NonNegativeInt
    documents: NonNegativeInt


class HalfLosses(Record):
    """Of a model on one half of all held-out documents."""

    general: dict[str, LossChange] = Field(min_length=1)
    """By source."""
    domain: LossChange
    """Over all sources together."""

    @property
    def worst(self) -> str:
        """The general source with the highest limit."""
        return max(self.general, key=lambda name: self.general[name].limit)

    def keeps(self, max_general_rise: float) -> bool:
        return all(source.limit <= max_general_rise for source in self.general.values())


class DialPosition(Record):
    """A position that was evaluated."""

    alphas: Alphas
    tried_as: Literal["common", "single", "proposed"]
    """All copies alike; one of them apart from the others; or as the quadratic model proposed."""
    validation: HalfLosses
    test: HalfLosses
    keeps: bool
    """The promise, on validation documents."""
    seconds: NonNegativeFloat
    """That its evaluation took."""

    @property
    def label(self) -> str:
        return label_of(self.alphas)


class DialRecord(Record):
    """Every position, in the order in which they were tried; chosen on validation documents, reported on test ones."""

    kind: Literal["copies", "interpolation"]
    """What the dial moves: what copies write, or all weights between the base's and the trained ones."""
    sources: tuple[NonNegativeInt, ...]
    """The layers that were copied; none for interpolation."""
    max_general_rise: NonNegativeFloat
    confidence: float
    samples: NonNegativeInt
    """Of each bootstrap."""
    positions: tuple[DialPosition, ...] = Field(min_length=1)
    chosen: Alphas
    """The recommended position."""
    reason: str
    """Why it was chosen."""
    promise: str
    """What may be said of general text, by test documents."""
    seconds: NonNegativeFloat
    """Of all of it."""

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and `adept dial CONFIG` makes it again"

    @property
    def position(self) -> DialPosition:
        """The chosen one."""
        return next(position for position in self.positions if position.alphas == self.chosen)

    @model_validator(mode="after")
    def _one_of_them_is_chosen(self) -> DialRecord:
        if all(position.alphas != self.chosen for position in self.positions):
            raise ValueError("the chosen position is none of those that were evaluated")
        return self


def label_of(alphas: Alphas) -> str:
    """'0.5', or where copies differ, '0.5, 1, 0'."""
    labels = [f"{alpha:g}" for alpha in alphas]
    return labels[0] if len(set(labels)) == 1 else ", ".join(labels)
