"""A tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.models import save_byte_tokenizer
from harness.packing import byte_ids


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def ids(tokenizer_dir: Path) -> dict[str, int]:
    return byte_ids(tokenizer_dir)
