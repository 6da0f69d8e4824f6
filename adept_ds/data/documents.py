"""Corpus files -> texts: JSON lines or plain text, questions rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.question_template import DEFAULT_TEMPLATE, render_question


def read_documents(
    key: str,
    path: Path,
    on_bytes: Callable[[int], None] | None = None,
    question_template: str = DEFAULT_TEMPLATE,
) -> Iterator[str]:
    """The texts of a corpus file: JSON lines ({"text"} or {"question", "choices", "answer"}), or one plain text.

    Raises:
        InputError: naming file and line of a malformed record.
    """
    if path.suffix not in {".jsonl", ".json", ".ndjson"}:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{key}: '{path}' is not UTF-8 text (byte {error.start}); convert it") from None
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if on_bytes:
                on_bytes(len(line))
            if line.strip():
                yield _render(f"{key}: '{path}' line {number}", line, question_template)


def _render(place: str, line: bytes, question_template: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{place} is not JSON; write one record per line") from None
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if {"question", "choices", "answer"} <= record.keys():
            try:
                return render_question(record, question_template)
            except ValueError as error:
                raise InputError(f"{place}: {error}") from None
    raise InputError(f"{place} has neither 'text' nor 'question', 'choices' and 'answer'")
