"""What the readers share: records of questions, passages of prose, and files without repetitions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from demo.prepare import Record, fingerprint

PASSAGE_CHARACTERS = 1200
"""About 250 tokens: a document of every general corpus fits into an evaluation block of 256."""

_Item = TypeVar("_Item")

_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'\u201d\u2019)]))\s+(?=["'\u201c\u2018(]?[A-Z])""")


class Question(NamedTuple):
    """A multiple-choice question, as `adept eval` takes it."""

    question: str
    choices: list[str]
    answer: int
    """Position of the right one in `choices`."""
    source: str


def sentences(text: str) -> list[str]:
    """The sentences of a text, roughly: an abbreviation before a capital letter ends one too."""
    return _SENTENCE_END.split(" ".join(text.split()))


def passage(parts: Iterable[str], at_most: int = PASSAGE_CHARACTERS) -> str:
    """As many sentences as fit, from the first on; the first alone, cut at a word, if even that does not fit."""
    text = ""
    for part in parts:
        longer = f"{text} {part}".strip()
        if len(longer) > at_most:
            return text or longer[:at_most].rsplit(" ", 1)[0]
        text = longer
    return text


def distinct_texts(records: Iterable[Record]) -> list[Record]:
    """Each text once, in the order of their hashes: the first N of a file are a fair sample of it, for any N."""
    return list(_by_hash((record.text, record) for record in records))


def distinct_questions(questions: Iterable[Question], at_most: int) -> list[Question]:
    """`at_most` of the questions, each once, in the order of their hashes."""
    return list(_by_hash((item.question, item) for item in questions))[:at_most]


def _by_hash(items: Iterable[tuple[str, _Item]]) -> Iterator[_Item]:
    unique: dict[str, _Item] = {}
    for text, item in items:
        unique.setdefault(fingerprint(text), item)
    return (unique[digest] for digest in sorted(unique))
