"""Web pages and multiple-choice questions, from the data files in the package `evals`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo.prepare import Record
from demo.study.packages import member
from demo.study.texts import Question, distinct_questions, distinct_texts

_DATA = "evals/registry/data/"
_PAGES = _DATA + "schelling_point/owt_5.jsonl"
_MEDICAL = _DATA + "medmcqa/samples.jsonl"

MIN_CHARACTERS = 250
"""About 50 tokens."""


def web_pages(archive: Path) -> list[Record]:
    """Beginnings of pages from OpenWebText (a record's other texts are the same sentences shuffled)."""
    rows = enumerate(_rows(archive, _PAGES))
    texts = ((number, row["0"].strip()) for number, row in rows)
    return distinct_texts(Record(text, f"openwebtext/{n}") for n, text in texts if len(text) >= MIN_CHARACTERS)


def _rows(archive: Path, name: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, member(archive, name).splitlines())
