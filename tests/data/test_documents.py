"""Corpus files as texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.data.documents import read_documents

QUESTION = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
RENDERED = "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer: B. 4"


@pytest.mark.parametrize("answer", [1, "B"], ids=["index", "letter"])
def test_a_question_is_rendered_with_its_choices_and_the_right_answer(tmp_path: Path, answer: Any) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION | {"answer": answer}) + "\n")
    assert list(read_documents("probe.corpus", path)) == [RENDERED]


def test_texts_and_questions_may_be_mixed_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n" + json.dumps({"text": "ä\n"}) + "\n   \n" + json.dumps(QUESTION), encoding="utf-8")
    assert list(read_documents("probe.corpus", path)) == ["ä\n", RENDERED]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\n{two}\n", encoding="utf-8")
    assert list(read_documents("data.domain", path)) == ["one\n\n{two}\n"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"text": "a', id="cut short"),
        pytest.param("plain words", id="not JSON"),
        pytest.param('{"txt": "a"}', id="no text"),
        pytest.param('{"text": 5}', id="text is a number"),
        pytest.param('["a"]', id="a list"),
        pytest.param('{"question": "q", "choices": ["a", "b"]}', id="no answer"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": 2}', id="answer past the choices"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": "C"}', id="letter past the choices"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": null}', id="answer is null"),
        pytest.param('{"question": "q", "choices": 5, "answer": 0}', id="choices is a number"),
        pytest.param('{"question": "q", "choices": [], "answer": 0}', id="no choices"),
    ],
)
def test_a_malformed_record_is_named_by_key_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(InputError) as caught:
        list(read_documents("data.domain", path))
    message = str(caught.value)
    assert message.startswith("data.domain: ")
    assert "c.jsonl' line 3" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_text_that_is_not_utf8_is_refused_with_the_files_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=name):
        list(read_documents("data.domain", path))
