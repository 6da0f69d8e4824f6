"""Complaints about input."""

from __future__ import annotations

import pickle

import pytest

from adept_ds.base.errors import MOST_CHARACTERS, InputError


@pytest.mark.parametrize("odd", ["\n", "\r", "\x1b[31m", "\0", "\u2028", "\ud83d", "\x7f"], ids=ascii)
def test_a_complaint_is_one_printable_line_whatever_the_input_was(odd: str) -> None:
    message = str(InputError(f"key: 'a{odd}b' is not possible; write é or \U0001f600"))
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    assert "é or \U0001f600" in message, "what can be printed stays"
    assert str(pickle.loads(pickle.dumps(InputError(message)))) == message, "ranks send it to each other"


@pytest.mark.parametrize("much", ["[" * 70_000, "\0" * 70_000, "a, " * 500], ids=["brackets", "escaped", "list"])
def test_a_long_complaint_keeps_its_key_and_its_remedy(much: str) -> None:
    message = str(InputError(f"some.key: {much} is not possible; write a number"))
    assert len(message) <= MOST_CHARACTERS
    assert message.startswith("some.key: ")
    assert message.endswith(" is not possible; write a number")
    assert " ... " in message
    assert str(pickle.loads(pickle.dumps(InputError(message)))) == message


def test_a_complaint_of_the_usual_length_is_not_cut() -> None:
    message = "k" * MOST_CHARACTERS
    assert str(InputError(message)) == message
