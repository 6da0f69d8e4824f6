"""Records as texts, and what is found where they have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.reading import json_lines, skipped, texts_of

from adept_ds.base.errors import InputError

QUESTION = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
RENDERED = "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer: B. 4"


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("answer", [1, "B"], ids=["index", "letter"])
def test_a_question_is_rendered_with_its_choices_and_the_right_answer(tmp_path: Path, answer: Any) -> None:
    assert texts_of(lines(tmp_path / "q", QUESTION | {"answer": answer})) == [RENDERED]
    assert texts_of(lines(tmp_path / "q", QUESTION), question_template="{{ answer }}!") == ["4!"]


def test_texts_and_questions_may_be_mixed(tmp_path: Path) -> None:
    """What has a text is that; a null beside a question is none."""
    path = lines(tmp_path / "q", {"text": "ä\n"}, QUESTION, QUESTION | {"text": "given"}, QUESTION | {"text": None})
    assert texts_of(path) == ["ä\n", RENDERED, "given", RENDERED]


def test_the_field_of_the_text_has_a_name(tmp_path: Path) -> None:
    path = lines(tmp_path / "c", {"body": "one", "text": "two"})
    assert texts_of(path) == ["two"]
    assert texts_of(path, text_key="body") == ["one"]
    assert texts_of(lines(tmp_path / "q", QUESTION), text_key="question") == ["2 + 2?"]


BAD = {
    "cut short": ('{"text": "a', "not JSON (Unterminated string starting at position 10)"),
    "no JSON": ("plain words", "not JSON (Expecting value at position 1)"),
    "two on a line": ('{"text": "a"}{"text": "b"}', "not JSON (Extra data at position 14)"),
    "tab": ('{"text": "a\tb"}', "not JSON (Invalid control character at position 12)"),
    "zeros": ("\0" * 4096, "not JSON"),
    "list": ('["a"]', "a list, not an object"),
    "string": ('"a"', "a string, not an object"),
    "number": ("7", "a number, not an object"),
    "null": ("null", "null, not an object"),
    "true": ("true", "true or false, not an object"),
    "brackets": ("[" * 100_000, "nested too deeply"),
    "closed brackets": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "objects": ('{"a":' * 100_000, "nested too deeply"),
    "digits": ('{"text": ' + "7" * 5_000 + "}", "a number of thousands of digits"),
    "NaN": ('{"text": "a", "score": NaN}', "NaN is not JSON; write null"),
    "infinity": ('{"text": "a", "score": -Infinity}', "-Infinity is not JSON"),
    "Latin-1": ('{"text": "caf\udce9"}', "not UTF-8 (byte 0xe9 at position 14)"),
    "lone surrogate": (
        '{"text": "ab\\ud83d"}',
        "'text' has half a character (\\ud83d, a lone surrogate) at position 3",
    ),
    "low surrogate": ('{"text": "\\ude00 ä"}', "half a character (\\ude00, a lone surrogate) at position 1"),
    "surrogate as bytes": ('{"text": "\udced\udca0\udc80"}', "not UTF-8 (byte 0xed at position 11)"),
    "NUL": ('{"text": "ab\\u0000"}', "'text' has a NUL character at position 3"),
    "no text": ('{"txt": "a", "id": 7}', "no 'text', only 'txt', 'id'; set data.text_key"),
    "many keys": (json.dumps({f"k{number}": 0 for number in range(99)}), "'k7' and 91 more; set data.text_key"),
    "long key": (json.dumps({"k" * 9_999: 0}), "kkk...'; set data.text_key"),
    "nothing": ("{}", "no 'text', nor anything else"),
    "null text": ('{"text": null}', "'text' is null, not a text"),
    "number as text": ('{"text": 5}', "'text' is a number, not a text"),
    "list as text": ('{"text": ["a"]}', "'text' is a list, not a text"),
    "object as text": ('{"text": {"a": "b"}}', "'text' is an object, not a text"),
    "empty": ('{"text": ""}', "'text' is empty"),
    "white space": ('{"text": " \\n\\u3000"}', "'text' is only white space"),
    "no answer": ('{"question": "q", "choices": ["a", "b"]}', "no 'text', only 'question', 'choices'"),
    "answer past the choices": ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2 is none of the 2"),
    "letter past the choices": ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "answer 'C' is none of"),
    "answer is null": ('{"question": "q", "choices": ["a", "b"], "answer": null}', "answer None is none of"),
    "answer is true": ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is none of"),
    "choices is a number": ('{"question": "q", "choices": 5, "answer": 0}', "'choices' is not a list"),
    "no choices": ('{"question": "q", "choices": [], "answer": 0}', "answer 0 is none of the 0"),
    "question is null": ('{"question": null, "choices": ["a"], "answer": 0}', "'question' is null, not a text"),
    "choice is null": ('{"question": "q", "choices": ["a", null], "answer": 0}', "choice 2 is null, not a text"),
    "question is an object": ('{"question": {}, "choices": ["a"], "answer": 0}', "'question' is an object, not a text"),
    "choice is a list": ('{"question": "q", "choices": [[]], "answer": 0}', "choice 1 is a list, not a text"),
    "surrogate in a choice": ('{"question": "q", "choices": ["\\ud83d"], "answer": 0}', "the question has half a"),
}


def test_a_template_may_take_a_question_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "q", QUESTION | {"question": {"stem": "2 + 2?"}})
    assert texts_of(path, question_template="{{ question.stem }} {{ answer }}") == ["2 + 2? 4"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named_by_file_and_line_and_what_was_found(tmp_path: Path, kind: str) -> None:
    line, words = BAD[kind]
    path = tmp_path / "c.jsonl"
    path.write_bytes(json_lines("one") + b"\n" + line.encode(errors="surrogateescape") + b"\n" + json_lines("two"))
    with pytest.raises(InputError) as refusal:
        texts_of(path)
    message = str(refusal.value)
    assert message.startswith(f"data.domain: '{path}' line 3: ")
    assert words in message.replace("\\\\", "\\"), message
    assert "\n" not in message
    assert len(message) < 600
    texts, bad = skipped(path, allowed=1)
    assert (texts, bad.count) == (["one", "two"], 1)
    assert words in bad.places[0]


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path: Path) -> None:
    """At the beginning, and where files were joined."""
    path = tmp_path / "c.jsonl"
    part = b"\xef\xbb\xbf" + json_lines("one")
    path.write_bytes(part + part)
    assert texts_of(path) == ["one", "one"]
