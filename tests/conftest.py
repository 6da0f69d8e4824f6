"""Fixtures that tests of several packages share."""

from __future__ import annotations

import pytest
from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus

_LONG = ("fuzz", "zero", "run", "study", "evaluation", "methods", "training", "probing", "models", "ranks", "units")
"""Packages whose files take long. They begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    save_tiny_model(root / "model")
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(root / f"{name}.jsonl", seed)
    return Workspace(root)
