"""What all sections of the configuration have in common: strictness, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Beta = Annotated[float, Field(ge=0, lt=1)]

Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many of something. Beyond the limit it is a slip of the pen, not a plan."""

Tokens = Annotated[int, Field(ge=8, le=2**24)]
"""Of one sequence."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every generator of random numbers takes, NumPy's old one included."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change once checked.

    Nothing is converted but an integer to a float: `true` is no 1, a text no number, and a fraction no count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value


FILE, PART, WORD, NUMBER = ALTERNATIVES = "<file>", "<source>", "<word>", "<number>"
"""Alternatives of a value; not part of the key that messages name."""

METHOD = "<method {}>"
"""The same, of the key `method`."""


def is_alternative(part: int | str) -> bool:
    """Whether a part of a location names an alternative, and no key."""
    return part in ALTERNATIVES or (isinstance(part, str) and part.startswith(METHOD.partition("{")[0]))
