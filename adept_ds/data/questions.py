"""Questions with choices, as a model is asked them: which choice does it hold for the likeliest continuation?

context         "Question: QUESTION\\nAnswer:"
continuation    " CHOICE"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adept_ds.config.question_template import question_variables

CONTEXT, DELIMITER = "Question: {question}\nAnswer:", " "


@dataclass(frozen=True)
class Question:
    """A question, of whose choices one is right."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """Position of the right one."""
    place: str
    """Where it stands, for messages."""

    @classmethod
    def of(cls, record: Mapping[str, Any], place: str) -> Question | None:
        """None: a choice is empty, so that it has no likelihood.

        Raises:
            ValueError: the record is no question.
        """
        found = question_variables(record)
        choices = tuple(map(str, found["choices"]))
        right = found["letters"].index(found["answer_letter"])
        return cls(str(found["question"]), choices, right, place) if all(choices) else None

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice."""
        return [(CONTEXT.format(question=self.question), DELIMITER + choice) for choice in self.choices]
