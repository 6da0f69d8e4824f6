"""YAML as a configuration is written in it: what a value is, and what is refused in one line."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import Any

import pytest
import yaml

from adept_ds.config.yaml_text import YamlMistakeError, read_yaml, write_yaml

VALUES = {
    "1e-4": 1e-4,
    "2E5": 2e5,
    "-.5": -0.5,
    "1.": 1.0,
    "1_000": 1000,
    "+3": 3,
    "-0": 0,
    ".inf": float("inf"),
    "-.Inf": float("-inf"),
    "yes": True,
    "OFF": False,
    "~": None,
    "": None,
    "Null": None,
    # numbers by YAML 1.1, of which nobody would think: 8, 90, 16, 2 and days
    "010": "010",
    "1:30": "1:30",
    "0x10": "0x10",
    "0b10": "0b10",
    "2020-01-31": "2020-01-31",
    "2020-13-45": "2020-13-45",
    # written as texts
    "'1e-4'": "1e-4",
    '"yes"': "yes",
    "a=b": "a=b",
    "=": "=",
    "$HOME/x": "$HOME/x",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_is_what_it_looks_like(text: str) -> None:
    value = read_yaml(text)
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])
    assert read_yaml(f"a: {text}\nb: [x]") == {"a": VALUES[text], "b": ["x"]}


def test_aliases_stand_for_what_they_name() -> None:
    assert read_yaml("a: &files [x, y]\nb: *files") == {"a": ["x", "y"], "b": ["x", "y"]}


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "a tag of YAML": ("a: 1\nb: !!bool 7", 2, "'!!bool'"),
    "a tag of Python": ("a: !!python/object/apply:os.system ['true']", 1, "'!!python/object/apply:os.system'"),
    "a binary": ("a: !!binary aGk=", 1, "'!!binary'"),
    "an empty tag": ("a: ! 5", 1, "'!'"),
    "an unknown tag": ("a: !include x", 1, "'!include'"),
    "a control character": ("a: 1\nb: '\a'", 2, "U+0007"),
    "NUL": ("a: \0", 1, "U+0000"),
    "half a character": ('a: "\\ud83d"', 1, "half a character"),
    "an alias in itself": ("a: &a [*a]", 1, "aliases"),
    "an alias in its own section": ("a: &a {b: *a}", 1, "aliases"),
    "a billion laughs": (LAUGHS, 1, "aliases"),
    "an alias of nothing": ("a: *b", 1, "undefined alias 'b'"),
    "a key twice": ("a: 1\nb:\n  c: 1\n  c: 2", 4, "'c' stands twice"),
    "a number for a key": ("a: 1\n2: 3", 2, "'2' is no name"),
    "a truth for a key": ("no: 3", 1, "'no' is no name"),
    "nothing for a key": ("~: 3", 1, "'~' is no name"),
    "a list for a key": ("? [a]\n: b", 1, "'a sequence' is no name"),
    "merged keys": ("a: &a {b: 1}\nc:\n  <<: *a", 3, "'<<' merges nothing"),
    "a tab": ("a:\n\tb: 1", 2, "'\\t'"),
    "two documents": ("a: 1\n---\nb: 2", 2, "single document"),
    "brackets": ("[" * 100_000, 1, "more than 32 levels"),
    "lists in lists": ("- " * 50_000, 1, "more than 32 levels"),
    "a number without end": ("a: " + "9" * 5000, 1, "a number of 5000 characters"),
    "a quote without end": ("a: 'b", 1, "end of stream"),
    "a bracket without end": ("a: [1", 1, "',' or ']'"),
    "two colons": ("a: b: c", 1, "mapping values"),
    "another YAML": ("%YAML 3.0\n---\na: 1", 1, "version 1"),
    "far too much": ("# " + "x" * 300_000, None, "300002 characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_line(name: str) -> None:
    text, line, words = REFUSED[name]
    with pytest.raises(YamlMistakeError) as refusal:
        read_yaml(text)
    assert words in str(refusal.value)
    assert refusal.value.line == line
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("item", ["1,", "a,", "{},", "[],", "'',", "&a b,", "? a,"])
def test_the_largest_text_is_read_or_refused_within_seconds(item: str) -> None:
    text = "a: [" + item * ((1 << 17) // len(item) - 4) + "]"
    before = time.process_time()
    with suppress(YamlMistakeError):
        read_yaml(text)
    assert time.process_time() - before < 10, "it takes one, on a machine with nothing else to do"


def test_what_is_written_is_read_back_the_same_by_this_and_by_any_reader() -> None:
    texts = [*VALUES, "a: b", "<<", "*a", "&a", "- a", "#", "é", "日本", "a\nb", " a ", "!!bool 7", "{", "'", '"']
    tree: dict[str, Any] = {
        "texts": texts,
        "numbers": [1, -2, 1e-12, 3e300, 0.1, True, None],
        "empty": {"a": [], "b": {}},
    }
    text = write_yaml(tree)
    assert read_yaml(text) == tree
    assert yaml.safe_load(text) == tree, "PyYAML reads by YAML 1.1"
    assert "&" not in write_yaml({"a": texts[:1] * 2, "b": texts}).replace("'&a'", ""), "nothing is an alias"


def test_any_text_is_read_or_refused() -> None:
    """Bytes of configurations, mixed up: never an error of another kind, and a result of plain values only."""
    generator = random.Random(0)
    words = """a|b: |- |\n|  |[|]|{|}|,|'|"|#|&x |*x|!|!!int |? |: |>|---\n|...|\t|%|@|`|1e-4|0|\\|\\x00|é|<<: |~|="""
    pieces = [*words.split("|"), "|", "\ufeff", "\x85"]

    def is_plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
        if isinstance(value, list):
            return all(map(is_plain, value))
        return value is None or type(value) in (str, int, float, bool)

    outcomes = set()
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randint(1, 12)))
        try:
            assert is_plain(read_yaml(text)), text
            outcomes.add("read")
        except YamlMistakeError as error:
            assert "\n" not in str(error), text
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
