"""A study that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.made_up_study import description, make_study

from adept_ds.comparison.page import write_comparison


@pytest.fixture(scope="session")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six methods compared, with everything that is written about them."""
    folder = tmp_path_factory.mktemp("study")
    write_comparison(folder, description(notes=["A cell is missing."]), make_study(folder))
    return folder
