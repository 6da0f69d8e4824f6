"""A page that several tests look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.made_up_run import make_run, page_of
from harness.undrawn import undrawn


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a complete run, drawn once: drawing is what takes the time."""
    run_dir = make_run(tmp_path_factory.mktemp("complete") / "run")
    text = page_of(run_dir)
    assert not list(run_dir.glob(".report*"))
    return text


@pytest.fixture
def no_figures() -> Iterator[None]:
    """For tests that look at words alone."""
    with undrawn():
        yield
