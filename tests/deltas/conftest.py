"""Adapted models and their packages, which tests read and never change."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.domains import Domains, make


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return make(tmp_path_factory.mktemp("domains"), "llama", "20KB")


@pytest.fixture(scope="module")
def packages(llama: Domains) -> tuple[Path, Path]:
    return llama.packages(llama.root)
