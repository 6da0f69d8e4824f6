"""Fixtures that tests of several packages share."""

from __future__ import annotations

import pytest
from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    save_tiny_model(root / "model")
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(root / f"{name}.jsonl", seed)
    return Workspace(root)
