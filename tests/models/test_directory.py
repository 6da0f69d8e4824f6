"""A model as a directory: what its configuration says, and what is refused before weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.models.directory import ModelDirectory


def test_a_multimodal_model_is_refused_with_the_way_to_its_language_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    with pytest.raises(InputError, match=r"'gemma3', which is not supported; .*'gemma3_text'.*save its language model"):
        ModelDirectory.read(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_way_to_add_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mamba"})
    with pytest.raises(InputError, match=r"'mamba', which is not supported; supported: .*CONTRIBUTING\.md"):
        ModelDirectory.read(tmp_path)
