"""Paths in a configuration: all of them are read alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.paths import expanded
from adept_ds.config.schema import Config


def _tree(key: str, path: str) -> dict[str, Any]:
    """A configuration in which `path` stands at `key`; a key that ends in [] is a list."""
    tree: dict[str, Any] = {"model": "m", "run_dir": "r"}
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf.removesuffix("[]").removesuffix("{}")] = (
        [{"files": [path]}] if leaf.endswith("{}") else [path] if leaf.endswith("[]") else path
    )
    return tree


def _at(config: Config, key: str) -> str:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part.removesuffix("[]").removesuffix("{}"))
    if isinstance(node, list):
        node = node[0] if isinstance(node[0], Path) else node[0].files[0]
    return str(node)


CORPORA = ("data.domain", "data.replay", "data.general_eval", "data.domain_eval", "probe.corpus")
PATHS = ["model", "run_dir", "deepspeed", "probe.stability.model"]
PATHS += [f"{key}{form}" for key in (*CORPORA, "probe.stability.corpus") for form in ("[]", "{}")]


@pytest.mark.parametrize("key", PATHS)
def test_the_home_directory_may_stand_in_front_of_every_path_and_nothing_else_is_replaced(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _at(parse_config(_tree(key, "~/a")), key) == str(tmp_path / "a")
    for literal in ("a~", "$HOME/a", "a/~/b"):
        assert _at(parse_config(_tree(key, literal)), key) == literal


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "'' is no path"),
        ("  ", "'  ' is no path"),
        ("a\0b", "the character '\\x00'"),
        ("a\nb", "the character '\\n'"),
        ("~nobody-of-this-name/a", "home of 'nobody-of-this-name'"),
        ("x" * 256, "too long"),
        ("x/" * 2048, "too long"),
        ("é" * 128, "too long"),
        ("\ud83d", "no text that a file can be named by"),
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_what_no_file_can_be_called_is_refused_in_every_path_alike(key: str, path: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_config(_tree(key, path))
    message, dotted = str(refusal.value), key.removesuffix("[]").removesuffix("{}")
    assert message.startswith(f"config: {dotted}"), message
    assert words in message


def test_the_longest_names_are_names() -> None:
    assert expanded("x" * 255) == "x" * 255
    assert expanded("x/" * 2047) == "x/" * 2047
