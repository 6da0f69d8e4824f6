"""The section `dial`: how far what was learned is turned up, so that general text keeps a promise (docs/dial.md)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, field_validator

from adept_ds.config.section import Section

Position = Annotated[float, Field(ge=0, le=1)]


class DialSection(Section):
    """With it, a run exports its adapted model at the position that learned most of those that keep the promise."""

    max_general_rise: float = Field(
        0.0,
        ge=0,
        le=100,
        description="nats per token by which the loss of a general source may rise above the base's, at the upper "
        "limit of the rise",
    )
    confidence: float = Field(0.95, ge=0.5, le=0.999, description="of that limit, which is one-sided")
    alphas: list[Position] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        max_length=100,
        description="positions between base (0) and what was trained (1) that are tried; both ends always are",
    )
    per_copy: bool = Field(True, description="then turn each copy by itself, from the best common position on")
    prefix_cache_mib: int = Field(
        1024,
        ge=0,
        le=2**30,
        description="host memory per rank for what the layers below the lowest copy compute for held-out text, which "
        "is the same at every position; 0 computes it at each",
    )

    @field_validator("alphas")
    @classmethod
    def _every_position_once(cls, alphas: list[float]) -> list[float]:
        labels = [f"{alpha:g}" for alpha in alphas]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice, or differs in the seventh digit only: keep one of both")
        return alphas

    @property
    def positions(self) -> list[float]:
        """Ascending, with both ends."""
        return sorted({0.0, 1.0, *self.alphas})

    @property
    def fewest_documents(self) -> int:
        """Of a general source, in each half."""
        return fewest_documents(self.confidence)


def fewest_documents(confidence: float) -> int:
    """That a limit needs: of fewer, that all rise or fall alike is likelier by chance (2^-n) than `confidence` leaves
    to it, and a bootstrap claims more than they can say."""
    return math.ceil(math.log2(1 / (1 - confidence)))
