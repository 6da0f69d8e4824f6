"""Whatever stands in a run's files, the page shows it as text: names come from others' models and corpora."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.made_up_run import FIGURES, SELECTED, figures, make_run, page_of
from harness.marks import slow
from harness.page_structure import HOSTILE, Structure, mostly_slow

HARMLESS = "harmless"
_KEYS_OF_TABLES = {"methods", "spearman", "rules", "eval", "base", "adapted"}
"""Objects whose keys are names, not fields."""

_WRITTEN_AS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, json.dumps),
    ".yaml": (yaml.safe_load, lambda value: yaml.safe_dump(value, allow_unicode=False)),
}


def with_strings(value: Any, more: str, *, names: bool = False) -> Any:
    """Every string with `more` around it; `names`: beside the keys of this object there are such keys too."""
    if isinstance(value, dict):
        items = {key: with_strings(item, more, names=key in _KEYS_OF_TABLES) for key, item in value.items()}
        return items | ({f"{more}{key}{more}": item for key, item in items.items()} if names else {})
    if isinstance(value, list):
        return [with_strings(item, more) for item in value]
    return f"{more}{value}{more}" if isinstance(value, str) else value


def full_run(run_dir: Path) -> Path:
    """With all that a page can show."""
    make_run(run_dir)
    path = run_dir / "layer_importance.json"
    record = json.loads(path.read_text())
    record["selection"] = {"choose": "lowest", "k": 4, "rule": "knee", "reason": "because", "within_noise": [3],
                           "rules": {"knee": 4, "threshold": 9}}  # fmt: skip
    record["stability"] = {"against": "corpus", "name": "other", "selected": [SELECTED, SELECTED], "jaccard": 1.0}
    path.write_text(json.dumps(record))
    deltas = [layer["delta"] for layer in record["layers"]]
    methods = {name: {"deltas": deltas, "selected": SELECTED, "seconds": 7.5} for name in ("mask", "fisher")}
    (run_dir / "layer_methods.json").write_text(json.dumps({"methods": methods, "spearman": {"fisher": 0.8}}))
    return run_dir


def page_with(run_dir: Path, more: str) -> str:
    for path in (path for path in full_run(run_dir).rglob("*") if path.is_file()):
        if path.suffix == ".jsonl":
            lines = [with_strings(json.loads(line), more) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            read, write = _WRITTEN_AS[path.suffix]
            path.write_text(write(with_strings(read(path.read_text()), more)))
    return page_of(run_dir)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    page = page_with(tmp_path_factory.mktemp("harmless") / "run", HARMLESS)
    assert figures(page) == dict.fromkeys(FIGURES, True)
    return Structure(page)


@pytest.mark.parametrize("kind", mostly_slow(HOSTILE))
def test_strings_of_any_field_are_text_and_nothing_else(tmp_path: Path, harmless: Structure, kind: str) -> None:
    """The page has the very elements and attributes that it has with harmless strings in the same places."""
    page = page_with(tmp_path / "run", HOSTILE[kind])
    found = Structure(page)
    assert found.elements == harmless.elements
    assert {tag for tag, _ in found.in_figures} == {tag for tag, _ in harmless.in_figures}
    assert {name for _, name in found.in_figures} == {name for _, name in harmless.in_figures}
    assert not any(name.startswith("on") for _, name in found.in_figures)


@pytest.mark.parametrize("kind", ["quotes", slow("comment"), slow("entity"), slow("template"), "mathematics"])
def test_a_string_is_shown_as_it_stands(tmp_path: Path, harmless: Structure, kind: str) -> None:
    """As often as the harmless one, but for the model's name, of which the title has what follows the last slash."""
    shown = "".join(Structure(page_with(tmp_path / "run", HOSTILE[kind])).text)
    expected = "".join(harmless.text).count(HARMLESS)
    in_configuration = len(re.findall(r"model:", shown))
    assert expected > 20
    assert abs(shown.count(HOSTILE[kind]) - expected) <= in_configuration + 2
