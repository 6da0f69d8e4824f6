"""One line about a mistake in a configuration: the key, the value and the remedy."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from adept_ds.config.schema import ALTERNATIVES, Config, Section


def describe(mistake: Any) -> str:
    """One of pydantic's complaints (`ValidationError.errors()`) in our words."""
    location = [part for part in mistake["loc"] if isinstance(part, str) and part not in ALTERNATIVES]
    key = ".".join(location)
    is_item = any(isinstance(part, int) for part in mistake["loc"][-1:])
    if mistake["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_nearest_key(location)}"
    if mistake["type"] == "missing" and is_item:
        return f"{key}: {mistake['input']!r} has too few values; the default is the form to follow"
    if mistake["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: {mistake['input']!r} is no section; write its keys below it"
    if mistake["type"] == "missing":
        return f"'{key}' is missing; add it"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {mistake['input']!r} is not possible: {message[0].lower()}{message[1:]}"


def _nearest_key(location: list[str]) -> str:
    siblings = _fields_at(location[:-1])
    near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{'.'.join([*location[:-1], near[0]])}'?"
    leaves = {path.rsplit(".", 1)[-1]: path for path in _all_keys(Config)}
    near = difflib.get_close_matches(location[-1], list(leaves), n=1, cutoff=0.75)
    if near:
        return f"did you mean '{leaves[near[0]]}'?"
    return f"valid keys here: {', '.join(siblings)}"


def _section_type(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, types.UnionType):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _section_within(annotation: Any) -> type[Section] | None:
    """Also one that is an item of a list, or one of several alternatives."""
    nested = (_section_within(argument) for argument in typing.get_args(annotation))
    return _section_type(annotation) or next((section for section in nested if section), None)


def _fields_at(location: list[str]) -> list[str]:
    section: type[Section] = Config
    for part in location:
        field = section.model_fields.get(part)
        child = _section_within(field.annotation) if field else None
        if child is None:
            return []
        section = child
    return list(section.model_fields)


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        child = _section_type(field.annotation)
        keys += _all_keys(child, f"{prefix}{name}.") if child else [f"{prefix}{name}"]
    return keys
