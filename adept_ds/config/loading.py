"""From a file and overrides to a checked configuration, or whatever else is written like one. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from adept_ds.base.errors import InputError
from adept_ds.config.files import read_small_file
from adept_ds.config.mistakes import Mistake, mistakes_in
from adept_ds.config.schema import Config
from adept_ds.config.section import Section
from adept_ds.config.yaml_text import YamlMistakeError, read_yaml, write_yaml

S = TypeVar("S", bound=Section)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read CONFIG and apply dotted overrides (`train.lr=1e-4`).

    Raises:
        InputError: naming the file or the override, the key, the value and the remedy.
    """
    return load_section(Config, path, overrides, keys="'model:' and 'run_dir:'")


def load_section(root: type[S], path: Path, overrides: Sequence[str] = (), *, keys: str) -> S:
    """The same for a file of another kind.

    Args:
        keys: some that such a file has, in words.
    """
    return _Sources(root, str(path), read_tree(path, keys), overrides).checked()


def read_tree(path: Path, keys: str) -> dict[str, Any]:
    """What a YAML file says, unchecked. Raises `InputError`: there is no such file, or it holds no keys."""
    text = read_small_file(path, _shortened(str(path)), "give the path of a YAML file")
    try:
        tree = read_yaml(text)
    except YamlMistakeError as error:
        raise InputError(f"{path}: {f'line {error.line}: ' if error.line else ''}{error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{path}: expected keys such as {keys}, found {found}")
    return tree


def parse_config(tree: dict[str, Any], origin: str = "config", overrides: Sequence[str] = ()) -> Config:
    """Check a nested dictionary. Raises `InputError` with one line about the first mistake."""
    return _Sources(Config, origin, tree, overrides).checked()


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return write_yaml(config.model_dump(mode="json"))


class _Sources(Generic[S]):
    """What a configuration is made of, in the order in which it is applied: a file, then overrides."""

    def __init__(self, root: type[S], origin: str, tree: dict[str, Any], overrides: Sequence[str]) -> None:
        self._root, self._origin, self._tree, self._overrides = root, origin, tree, overrides

    def checked(self) -> S:
        try:
            return self._root.model_validate(self._tree_after(len(self._overrides)))
        except ValidationError as error:
            mistake, *others = mistakes_in(error)
            more = f" ({len(others)} more like this)" if others else ""
            raise InputError(f"{self._blame(mistake)}{more}") from None

    def _blame(self, mistake: Mistake) -> str:
        """The mistake, behind the source with which it comes in: an override only if the file is without it."""
        for count in range(len(self._overrides) + 1):
            for earliest in self._mistakes(self._tree_after(count)):
                if earliest == mistake:  # perhaps of another value
                    source = _named(self._overrides[count - 1]) if count else self._origin
                    return f"{source}: {earliest.describe(self._root)}"
        raise AssertionError("the mistake is there with all overrides")

    def _tree_after(self, count: int) -> dict[str, Any]:
        """The first so many overrides applied."""
        tree = copy.deepcopy(self._tree)
        for override in self._overrides[:count]:
            self._apply(override, tree)
        return tree

    def _apply(self, override: str, tree: dict[str, Any]) -> None:
        key, separator, text = override.partition("=")
        *sections, leaf = parts = key.split(".")
        if not separator or not all(parts):
            raise InputError(f"{_named(override)} is none; write key=value, for example train.lr=1e-4")
        node = tree
        for depth, section in enumerate(sections, start=1):
            child = node.setdefault(section, {})
            if child is None:
                child = node[section] = {}
            if not isinstance(child, dict):
                raise self._not_below(override, sections[:depth], child)
            node = child
        try:
            node[leaf] = read_yaml(text)
        except YamlMistakeError as error:
            raise InputError(f"{_named(override)}: {error}") from None

    def _not_below(self, override: str, sections: list[str], found: Any) -> InputError:
        """There is a value where the override needs a section, by a mistake in the file or in the override."""
        for mistake in self._mistakes(self._tree):
            if mistake.location == tuple(sections):
                return InputError(f"{self._origin}: {mistake.describe(self._root)}")
        key = ".".join(sections)
        if isinstance(found, list):
            return InputError(f"{_named(override)}: '{key}' is a list; give all of it, {key}=[...]")
        return InputError(f"{_named(override)}: '{key}' is not a section; write {key}=VALUE")

    def _mistakes(self, tree: dict[str, Any]) -> list[Mistake]:
        try:
            self._root.model_validate(tree)
        except ValidationError as error:
            return mistakes_in(error)
        return []


def _named(override: str) -> str:
    return f"override '{_shortened(override)}'"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
