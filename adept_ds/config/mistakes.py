"""One line about a mistake in a configuration: the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from adept_ds.config.section import Section, is_alternative
from adept_ds.config.yaml_text import read_scalar

_SHOULD_BE = "Input should be "

_EXPECTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "is_instance_of": "a path",
    "list_type": "a list, [...]",
    "string_type": "a text",
    "tuple_type": "a list, [...]",
}
"""Pydantic's names of wrong types, and the right ones in words."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40


@dataclass(frozen=True)
class Mistake:
    """What pydantic complains about; equal to a complaint of the same kind about the same key, whatever its value."""

    location: tuple[int | str, ...]
    """Keys, and positions in lists."""
    kind: str
    """Pydantic's name of it."""
    message: str
    value: Any = dataclasses.field(compare=False)

    def describe(self, root: type[Section]) -> str:
        """One line in our words; `root` is what keys are looked up in."""
        keys = [part for part in self.location if isinstance(part, str)]
        key, value = ".".join(keys), shown(self.value)
        if self.kind == "extra_forbidden":
            return f"unknown key '{key}'; {_nearest_key(root, keys)}"
        if self.kind == "missing" and isinstance(self.location[-1], int):
            return f"{key}: {value} has too few values; the default is the form to follow"
        if self.kind == "missing":
            return f"'{key}' is missing; add it"
        if self.kind in ("model_type", "model_attributes_type"):
            return f"{key}: {value} is no section; write its keys below it"
        if self.kind == "value_error":
            return f"{key}: {self.message}" if key else self.message
        return f"{key}: {value} is not possible: {self.message[0].lower()}{self.message[1:]}{self._hint()}"

    def _hint(self) -> str:
        """Some texts look like values of other kinds, and the other way round."""
        if self.kind in ("string_type", "is_instance_of") and isinstance(self.value, bool | int | float):
            return "; a text that looks like this needs quotes"
        if self.kind in ("int_type", "float_type", "bool_type") and isinstance(self.value, str):
            looks = type(read_scalar(self.value)).__name__
            return "; write it without quotes" if self.kind.startswith(looks) else ""
        return ""


def mistakes_in(error: ValidationError) -> list[Mistake]:
    """All of them, worst first: a misspelt required key is two, of which the unknown one can be seen in the file."""
    found = [_mistake(details) for details in error.errors(include_url=False, include_context=False)]
    distinct = [_together(list(alternatives)) for _, alternatives in groupby(found, key=lambda each: each.location)]
    return sorted(distinct, key=lambda mistake: mistake.kind != "extra_forbidden")


def shown(value: Any) -> str:
    """A value of any size, as it can stand in a line."""
    return _SHORT.repr(value)


def _mistake(details: Any) -> Mistake:
    expected = _EXPECTED.get(details["type"])
    message = _SHOULD_BE + expected if expected else details["msg"].removeprefix("Value error, ")
    location = tuple(part for part in details["loc"] if not is_alternative(part))
    return Mistake(location, details["type"], message, details["input"])


def _together(alternatives: list[Mistake]) -> Mistake:
    """What can be one thing or another, and is neither."""
    first, *others = alternatives
    message = ", or ".join([first.message, *(other.message.removeprefix(_SHOULD_BE) for other in others)])
    return dataclasses.replace(first, message=message)


def nearest(key: str, siblings: Collection[str], section: str = "") -> str:
    """The remedy for an unknown key: the one that it looks like, else all that there are."""
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{section}.{near[0]}'?" if section else f"did you mean '{near[0]}'?"
    return f"valid keys here: {', '.join(siblings)}"


def _nearest_key(root: type[Section], location: list[str]) -> str:
    siblings = _fields_at(root, location[:-1])
    leaves = {path.rsplit(".", 1)[-1]: path for path in _all_keys(root)}
    near = difflib.get_close_matches(location[-1], list(leaves), n=1, cutoff=0.75)
    if near and not difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.6):
        return f"did you mean '{leaves[near[0]]}'?"
    return nearest(location[-1], siblings, ".".join(location[:-1]))


def _section_type(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, types.UnionType):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _sections_within(annotation: Any) -> list[type[Section]]:
    """Also those that are items of a list, or alternatives."""
    section = _section_type(annotation)
    if section is not None:
        return [section]
    return [found for argument in typing.get_args(annotation) for found in _sections_within(argument)]


def _fields_at(root: type[Section], location: list[str]) -> list[str]:
    sections: list[type[Section]] = [root]
    for part in location:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [child for field in fields for child in _sections_within(field.annotation)]
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        child = _section_type(field.annotation)
        keys += _all_keys(child, f"{prefix}{name}.") if child else [f"{prefix}{name}"]
    return keys
