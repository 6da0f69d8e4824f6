"""From a file and overrides to a checked configuration. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from adept_ds.base.errors import InputError
from adept_ds.config.mistakes import describe
from adept_ds.config.schema import Config


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read CONFIG and apply dotted overrides (`train.lr=1e-4`).

    Raises:
        InputError: naming the key, the value and the remedy.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; give the path of a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise InputError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys such as 'model:' and 'run_dir:', found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Check a nested dictionary. Raises `InputError` with one line about the first mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        mistakes = error.errors()
        # A misspelt required key is two mistakes; the unknown key is the one that the user can see in the file.
        first = min(mistakes, key=lambda mistake: mistake["type"] != "extra_forbidden")
        more = f" ({len(mistakes) - 1} more like this)" if len(mistakes) > 1 else ""
        raise InputError(f"{origin}: {describe(first)}{more}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"'{override}' is no override; write key=value, for example train.lr=1e-4")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise InputError(f"override '{override}': '{section}' is not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override '{override}': '{text}' is not a valid YAML value") from None
