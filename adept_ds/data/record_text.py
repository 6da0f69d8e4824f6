"""Records -> texts: what a line of a JSON lines file, or a row of a table, has to say.

Every function raises `ValueError` where that is no text to train on: what was found, and what to do about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adept_ds.config.question_template import DEFAULT_TEMPLATE, render_question

QUESTION_KEYS = ("question", "choices", "answer")

MAX_LINE_BYTES = 64 << 20

_BOM = "\ufeff"
_WRITE = """write one object on each line, such as {"text": "..."}"""


class NotJsonError(ValueError):
    """It breaks the grammar, whatever limits there are."""


class _NoNumberError(ValueError):
    """NaN or an infinity."""


@dataclass(frozen=True)
class RecordText:
    """How the records of a source become texts."""

    text_key: str
    question_template: str

    def of_record(self, record: Mapping[str, Any]) -> str:
        """Its field `text_key`; without such a text, its question."""
        text = record.get(self.text_key)
        if isinstance(text, str):
            return checked_text(text, repr(self.text_key))
        if self.is_question(record):
            self._refuse_nothing(record)
            return checked_text(render_question(record, self.question_template), "the question")
        if self.text_key in record:
            raise ValueError(f"{self.text_key!r} is {_kind(text)}, not a text; correct it, or set data.text_key")
        raise ValueError(missing_field(self.text_key, list(record)))

    def is_question(self, record: Mapping[str, Any]) -> bool:
        """Whether its text is that of a question: it has no other."""
        return not isinstance(record.get(self.text_key), str) and all(key in record for key in QUESTION_KEYS)

    def _refuse_nothing(self, record: Mapping[str, Any]) -> None:
        """What would be rendered as 'None'; or as Python's code, but a template of the user's may take it apart."""
        values = {"'question'": record["question"]}
        if isinstance(record["choices"], list):
            values |= {f"choice {number}": choice for number, choice in enumerate(record["choices"], start=1)}
        for name, value in values.items():
            if value is None or (self.question_template == DEFAULT_TEMPLATE and isinstance(value, list | dict)):
                raise ValueError(f"{name} is {_kind(value)}, not a text; correct it, or leave the record out")


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of JSON as an object."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB; split the record")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1}); convert the file"
        ) from None
    record = parse_json(text.removeprefix(_BOM))
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)}, not an object; {_WRITE}")
    return record


def parse_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if text.endswith("\n"):  # a string that is cut short is not to be blamed on the line's end
            return parse_json(text.rstrip("\r\n"))
        found = error.msg.removesuffix(" at")
        raise NotJsonError(f"not JSON ({found} at position {error.pos + 1}); {_WRITE}") from None
    except RecursionError:
        raise ValueError("nested too deeply; write a flat object") from None
    except _NoNumberError as error:
        raise ValueError(f"{error} is not JSON; write null") from None
    except ValueError:  # the interpreter's limit for integers
        raise ValueError("a number of thousands of digits; write it as a text") from None


def _refuse_constant(name: str) -> NoReturn:
    raise _NoNumberError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def checked_text(text: str, what: str) -> str:
    """`text` itself, which is no mere white space and can be written as UTF-8.

    Args:
        what: it is, for messages.
    """
    if not text or text.isspace():
        raise ValueError(f"{what} is {'only white space' if text else 'empty'}; leave the record out")
    if "\0" in text:
        raise ValueError(f"{what} has a NUL character at position {text.index(chr(0)) + 1}; remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(text[error.start]):04x}"
            raise ValueError(
                f"{what} has half a character ({code}, a lone surrogate) at position {error.start + 1}; write it whole"
            ) from None
    return text


def missing_field(text_key: str, names: list[str]) -> str:
    """What to say where records have none of the fields that are read."""
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:8])
    shown += f" and {len(names) - 8} more" if len(names) > 8 else ""
    have = f"only {shown}; set data.text_key to the one with the text" if names else "nor anything else; leave it out"
    return f"no {text_key!r}, {have}"


def _kind(value: Any) -> str:
    """In words."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "true or false", list: "a list", dict: "an object", str: "a string"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")
