"""Made-up questions with choices."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ["sum", "norm of x", "zero", "the matrix is a proof", "x", "seven layers"]


def made_up_questions(count: int) -> list[dict[str, Any]]:
    generator = random.Random(0)
    choices = [generator.sample(_WORDS, generator.randint(2, 5)) for _ in range(count)]
    return [
        {"question": f"{generator.choice(_WORDS)} {number}?", "choices": of, "answer": generator.randrange(len(of))}
        for number, of in enumerate(choices)
    ]
