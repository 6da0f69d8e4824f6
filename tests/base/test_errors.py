"""Complaints about input."""

from __future__ import annotations

import pickle

import pytest

from adept_ds.base.errors import InputError


@pytest.mark.parametrize("odd", ["\n", "\r", "\x1b[31m", "\0", "\u2028", "\ud83d", "\x7f"], ids=ascii)
def test_a_complaint_is_one_printable_line_whatever_the_input_was(odd: str) -> None:
    message = str(InputError(f"key: 'a{odd}b' is not possible; write é or \U0001f600"))
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    assert "é or \U0001f600" in message, "what can be printed stays"
    assert str(pickle.loads(pickle.dumps(InputError(message)))) == message, "ranks send it to each other"
