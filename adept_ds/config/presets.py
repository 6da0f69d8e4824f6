"""The key `preset`: the defaults of a whole configuration by a word. Keys that the user wrote win.

A preset is an entry of `PRESETS`. It is not what a method fixes (`MethodSection.presets`, which no key may contradict),
and not `lr_policy.preset`, which follows the paper's published code instead of its text in one section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adept_ds.config.known_methods import chosen_method
from adept_ds.config.method import without_effect

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # ADEPT as its text has it (arXiv 2510.10071): section 3.1, deltas of layers by masking, four copies; section 3.2,
    # equations 5 and 6, matrices and norms as units, a refresh every 500 steps. In a fresh copy all importances would
    # be 0: those of its source stand for them.
    "paper": {
        "method": "adept",
        "probe": {"method": "mask"},
        "expand": {"k": 4, "choose": "lowest"},
        "importance": {"source": "corpus", "every": 500, "granularity": "matrix", "initial": "source"},
        "lr_policy": {
            "map": "linear",
            "scope": "norms_apart",
            "preserve_mean": False,
            "min_multiplier": 0.0,
            "max_multiplier": None,
            "smoothing": 0.0,
        },
    },
    # What measurements have left of it (docs/evidence.md): many small changes, evenly spread and none behind the last
    # layers; one rate for all units; outputs on general text held where they were; and what is exported is turned down
    # where that is not enough.
    "recommended": {
        "method": "adept",
        "expand": {"k": 8, "choose": "uniform", "spare_top": 2},
        "lr_policy": {"map": "constant"},
        "anchor": {"kind": "kl"},
        "dial": {"max_general_rise": 0.0},
    },
}
"""By word: section -> key -> value, and the method. What an entry leaves out has the schema's default."""

SWITCHED = ("dial", "anchor", "guard")
"""Sections that are there or not."""

Keys = Mapping[str, Any]

_REPLACED: Mapping[str, Callable[[Keys, Keys], bool]] = {
    "expand": lambda given, _: given.get("layers") is not None or isinstance(given.get("choose"), list),
    "lr_policy": lambda given, preset: (
        given.get("preset") is not None or given.get("map", preset.get("map")) != preset.get("map")
    ),
}
"""Whether the keys (given, of the preset) that a user wrote in a section leave no room for the rest of the preset's: a
list says which layers, and keys of a map go with that map."""


def known_preset(word: str) -> str:
    """Raises `ValueError`: there is no such preset."""
    if word not in PRESETS:
        raise ValueError(f"{word!r:.100} is no preset: choose {' or '.join(PRESETS)}")
    return word


def with_defaults(tree: Any) -> Any:
    """A configuration with what its preset gives where the user wrote nothing.

    Of the preset there remains what the method looks at and does not fix itself, so that studies compare methods under
    one preset.
    """
    word = tree.get("preset") if isinstance(tree, dict) else None
    table = PRESETS.get(word) if isinstance(word, str) else None
    if table is None:
        return tree  # none, or a mistake of its own
    tree = {"method": table["method"]} | tree if "method" in table else dict(tree)
    method = chosen_method(tree)
    if method is None:
        return tree
    for section, values in table.items():
        if section in SWITCHED and section in tree and tree[section] is None:
            continue  # null switches it off
        given = {} if tree.get(section) is None else tree[section]
        if section == "method" or section in without_effect(method) or not isinstance(given, dict):
            continue
        replaced = _REPLACED.get(section)
        if not (replaced and replaced(given, values)):
            fixed = method.presets.get(section, {})
            tree[section] = {key: value for key, value in values.items() if key not in fixed} | given
    return tree
