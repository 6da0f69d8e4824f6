"""YAML as a configuration is written in it: plain values, lists and mappings, and nothing that surprises.

Read by YAML 1.2's rules where those of 1.1 surprise: `1e-4` is a number; `2020-01-31`, `1:30` and `010` are texts.
Refused are tags (`!!binary`), merge keys (`<<`), keys that stand twice and keys that are no words, and whatever is
larger or deeper than a configuration can be, with aliases written out.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_MOST_CHARACTERS = 1 << 17
"""Of the text; and of all its values, with aliases written out: a short text can stand for any number of values."""

_DEEPEST = 32
"""Levels of values inside values."""

_LONGEST_NUMBER = 300
"""Characters: more than a float can hold, and less than Python refuses to read."""

_TAG = "tag:yaml.org,2002:"

_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}

_SCALARS = {
    "null": re.compile("~|null|Null|NULL|"),
    "bool": re.compile("|".join(f"{word}|{word.title()}|{word.upper()}" for word in _BOOLEANS)),
    "int": re.compile("[-+]?(0|[1-9][0-9_]*)"),
    "float": re.compile(
        r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""What a plain scalar is: the first that fits, else a text. `010` is one: in YAML 1.1 it is 8, in 1.2 it is 10."""


class YamlMistakeError(ValueError):
    """What was found, and what to do; where, if that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def read_yaml(text: str) -> Any:
    """The values that `text` stands for.

    Raises:
        YamlMistakeError: it is not valid YAML, or none of a configuration.
    """
    if len(text) > _MOST_CHARACTERS:
        raise YamlMistakeError(f"{len(text)} characters are no configuration; {_MOST_CHARACTERS} is the limit")
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Values().of(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlMistakeError(f"the character U+{error.character:04X} cannot be read; remove it", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlMistakeError(f"not valid YAML: {reason}", mark.line + 1 if mark else None) from None


def read_scalar(text: str) -> Any:
    """What `text` is without quotes, if it is one value."""
    return _scalar(_kind(text), text, 1)


def write_yaml(tree: dict[str, Any]) -> str:
    """What `read_yaml` reads as `tree`, and any other reader of YAML too."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _kind(text: str) -> str:
    return next((kind for kind, pattern in _SCALARS.items() if pattern.fullmatch(text)), "str")


class _Loader(yaml.SafeLoader):
    """PyYAML's reader up to its nodes, without what a configuration does not need."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Counts levels on the way down, where the parser would reach Python's own limit."""
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_TAG, "!!")
            raise YamlMistakeError(f"the tag '{tag}' is not read; write the value alone", line)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise YamlMistakeError(f"more than {_DEEPEST} levels of values inside values", line)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        plain = kind is yaml.ScalarNode and implicit[0]
        return _TAG + _kind(value) if plain else super().resolve(kind, value, implicit)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that would be something else, by these rules or by YAML 1.1's."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and _kind(value) != "str":
            return _TAG + _kind(value)
        return super().resolve(kind, value, implicit)

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Values:
    """From nodes to values; counts what it has made."""

    def __init__(self) -> None:
        self._left = _MOST_CHARACTERS

    def of(self, node: yaml.Node, depth: int = 1) -> Any:
        line = node.start_mark.line + 1
        self._left -= len(node.value) + 1 if isinstance(node, yaml.ScalarNode) else 1
        if self._left < 0 or depth > _DEEPEST:  # each of both also ends an alias inside what it stands for
            raise YamlMistakeError("aliases in it stand for too much; write out what is meant", line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, depth + 1) for item in node.value]
        return _scalar(node.tag.removeprefix(_TAG), node.value, line)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = self.of(key_node, depth + 1), key_node.start_mark.line + 1
            if not isinstance(key, str):
                written = key_node.value if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
                raise YamlMistakeError(f"'{written}' is no name of a key; correct it, or write it in quotes", line)
            if key == "<<":
                raise YamlMistakeError("'<<' merges nothing here; write the keys of both sections out", line)
            if key in values:
                raise YamlMistakeError(f"the key '{key}' stands twice in one section; remove one of them", line)
            values[key] = self.of(value_node, depth + 1)
        return values


def _scalar(kind: str, text: str, line: int) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return _BOOLEANS[text.lower()]
    if kind in ("int", "float"):
        if len(text) > _LONGEST_NUMBER:
            raise YamlMistakeError(f"a number of {len(text)} characters; write it shorter", line)
        digits = text.replace("_", "").lower()
        return int(digits) if kind == "int" else float(re.sub(r"\.(inf|nan)", r"\1", digits))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlMistakeError("a text has half a character in it (\\ud800 to \\udfff); write the whole one", line)
    return text
