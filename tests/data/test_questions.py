"""Questions of a source, in the order of its documents, and those of a file of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.packing import text_source, write_records

from adept_ds.base.errors import InputError
from adept_ds.config.data_section import DataSection
from adept_ds.data.documents import read_questions
from adept_ds.data.pieces import document_id
from adept_ds.data.questions import Question
from adept_ds.data.task_files import task_questions

RECORD = {"question": "2 + 2?", "choices": ["3", "4", 5], "answer": "B"}
RENDERED = "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer: B. 4"


def test_a_question_is_asked_without_its_choices_which_are_continuations(tmp_path: Path) -> None:
    source = text_source([write_records(tmp_path / "q.jsonl", {"text": "given"}, RECORD)])
    place = f"'{tmp_path / 'q.jsonl'}' line 2"
    question = Question("2 + 2?", ("3", "4", "5"), 1, place)
    assert list(read_questions(source)) == [(document_id("given"), None), (document_id(RENDERED), question)]
    context = "Question: 2 + 2?\nAnswer:"
    assert question.pairs() == [(context, " 3"), (context, " 4"), (context, " 5")]


def test_braces_in_a_question_are_letters() -> None:
    assert Question("{x}", ("{y}",), 0, "").pairs() == [("Question: {x}\nAnswer:", " {y}")]


def test_an_empty_choice_has_no_likelihood_so_its_question_is_none(tmp_path: Path) -> None:
    ((_, question),) = read_questions(text_source([write_records(tmp_path / "q", RECORD | {"choices": ["", "4"]})]))
    assert question is None


def test_a_file_of_plain_text_is_a_document_and_no_question(tmp_path: Path) -> None:
    """Known by its text as it is read, with line ends as '\\n'."""
    (tmp_path / "plain.txt").write_bytes(b"Question:\r\n2 + 2?")
    found = list(read_questions(text_source([tmp_path / "plain.txt"])))
    assert found == [(document_id("Question:\n2 + 2?"), None)]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([RECORD, {"text": "a"}], ["record 2 is no question that can be asked", "give question, choices"]),
        ([RECORD, RECORD | {"choices": ["a", ""]}], ["record 2 is no question that can be asked", "none is empty"]),
        ([RECORD | {"answer": "Q"}], ["line 1", "answer 'Q' is none of the 3 choices"]),
        ([RECORD, {"question": "?"}], ["line 2", "no 'text'"]),
    ],
    ids=["text", "empty choice", "no such answer", "no choices"],
)
def test_what_is_no_question_in_a_task_is_named(tmp_path: Path, records: list[Any], words: list[str]) -> None:
    path = write_records(tmp_path / "task.jsonl", *records)
    with pytest.raises(InputError, match=r"^eval\.tasks: .*task\.jsonl") as caught:
        task_questions(path, DataSection(max_bad_records=5))
    assert all(word in str(caught.value) for word in words), caught.value
