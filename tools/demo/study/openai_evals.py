"""Web pages and multiple-choice questions, from the data files in the package `evals`.

A question stands there as one text with lettered choices. Each kind has a layout of its own, and so a pattern of its
own here; a question that does not fit it is an error, since the package is one fixed version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from demo.prepare import Record
from demo.study.packages import member
from demo.study.texts import Question, distinct_questions, distinct_texts

from adept_ds.base.errors import InputError

_DATA = "evals/registry/data/"
PAGES = _DATA + "schelling_point/owt_5.jsonl"

PAGE_CHARACTERS = range(250, 2000)
"""About 50 to 400 tokens; the few that are longer are tables and programs."""

MIN_ASCII_SHARE = 0.97
"""Pages with less are in another language, or debris; English ones reach it with typographic quotes and names."""

NUM_QUESTIONS = 500
"""At most, of each kind: the standard error of an accuracy is then two points."""


def web_pages(archive: Path) -> list[Record]:
    """Beginnings of English pages from OpenWebText (a record's other texts are the same sentences shuffled)."""
    texts = enumerate(row["0"].strip() for row in _rows(archive, PAGES))
    return distinct_texts(Record(text, f"openwebtext/{number}") for number, text in texts if _is_wanted(text))


def _is_wanted(text: str) -> bool:
    return len(text) in PAGE_CHARACTERS and sum(map(str.isascii, text)) >= MIN_ASCII_SHARE * len(text)


class Layout(NamedTuple):
    """How one kind of questions is written."""

    source: str
    file: str
    keys: tuple[str, str]
    """Of the question with its choices, and of the right letter."""
    pattern: re.Pattern[str]
    """Its groups: the question, then each choice."""


MMLU = Layout(
    "mmlu_test",
    "sandbagging/samples-all-large.jsonl",
    ("question", "answer"),
    re.compile(r"(.*?)\s*\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", re.DOTALL),
)
SOCIAL_IQA = Layout(
    "social_iqa",
    "theory_of_mind/socialiqa/test.jsonl",
    ("input", "ideal"),
    re.compile(r"(.*?)\s+A: (.*); B: (.*); C: (.*?)\.?", re.DOTALL),
)
MEDMCQA = Layout(
    "medmcqa",
    "medmcqa/samples.jsonl",
    ("input", "ideal"),
    re.compile(r"Subject: [^\n]*\s+(.*?)\s*\na\) (.*)\nb\) (.*)\nc\) (.*)\nd\) (.*)", re.DOTALL),
)


def _questions(layout: Layout, archive: Path) -> list[Question]:
    rows = enumerate(_rows(archive, _DATA + layout.file))
    return distinct_questions((_question(layout, number, row) for number, row in rows), NUM_QUESTIONS)


def _question(layout: Layout, number: int, row: dict[str, Any]) -> Question:
    text, ideal = (row[key] for key in layout.keys)
    if isinstance(text, list):  # a conversation, which ends with the question
        text = text[-1]["content"]
    match = layout.pattern.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{layout.file}: line {number + 1} is not as expected; delete the package and run again")
    question, *choices = (group.strip() for group in match.groups())
    return Question(question, choices, "abcd".index(ideal[0].lower()), f"{layout.source}/{number}")


mmlu_questions = partial(_questions, MMLU)
"""Questions of the MMLU test set, of all subjects."""
social_questions = partial(_questions, SOCIAL_IQA)
"""Social IQa: what people want, feel or do next."""
medical_questions = partial(_questions, MEDMCQA)
"""MedMCQA: entrance examinations of medical schools."""


def _rows(archive: Path, name: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, member(archive, name).splitlines())
